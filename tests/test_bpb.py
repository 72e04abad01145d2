import math

import numpy as np
import pytest
import torch
import torch.multiprocessing

from pgolf_fast.bpb import BitsPerByte, PieceBytes, Score

# id: 0 pad, 1 BOS, 2 "the", 3 "▁the", 4 "▁", 5 byte piece
TABLE = PieceBytes(
    own=torch.tensor([0, 0, 3, 3, 0, 1]),
    has_space=torch.tensor([False, False, False, True, True, False]),
    is_boundary=torch.tensor([True, True, False, False, False, False]),
)


def test_the_byte_rule_counts_a_space_once_and_not_after_a_boundary():
    stream = torch.tensor([1, 3, 3, 4, 5, 2, 1, 4, 0, 3])
    assert TABLE.of_targets(stream[:-1], stream[1:]).tolist() == [3, 4, 1, 1, 3, 0, 0, 0, 3]
    assert TABLE.of_targets(stream[:-1].view(3, 3), stream[1:].view(3, 3)).shape == (3, 3)


def test_score_is_the_formula_in_float64():
    rng = np.random.default_rng(0)
    nats, counts = rng.exponential(3.0, 10_001).astype(np.float32), rng.integers(0, 9, 10_001)
    metric = BitsPerByte()
    for part in np.array_split(np.arange(10_001), 7):
        metric.add(torch.from_numpy(nats[part]), torch.from_numpy(counts[part]))
    score = metric.score()
    truth = nats.astype(np.float64).sum()
    assert score.nats == pytest.approx(truth, rel=1e-12) and score.tokens == 10_001 and score.bytes == counts.sum()
    assert score.bits_per_byte == pytest.approx(truth / math.log(2) / counts.sum(), rel=1e-12)
    assert score.nats_per_token == pytest.approx(truth / 10_001, rel=1e-12)
    assert score.bytes_per_token == pytest.approx(counts.mean(), rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_sums_do_not_lose_small_terms(dtype):
    # Neither is 2^25 + 1 a float32 nor 301 a bfloat16: sums in those would round.
    metric = BitsPerByte()
    metric.nats += 2.0**25
    metric.add(torch.ones(1, dtype=dtype), torch.ones(1, dtype=torch.int64))
    assert metric.score().nats == 2**25 + 1
    metric.add(torch.ones(301, dtype=dtype), torch.ones(301, dtype=torch.int64))
    assert metric.score().nats == 2**25 + 302


def test_uniform_bytes_cost_eight_bits():
    metric = BitsPerByte()
    metric.add(torch.full((64,), math.log(256), dtype=torch.float64), torch.ones(64, dtype=torch.int64))
    assert metric.score().bits_per_byte == pytest.approx(8.0, abs=1e-12)


def test_nothing_scored_is_not_a_number_and_not_a_crash():
    score = BitsPerByte().score()
    assert score == Score(0.0, 0, 0) and math.isnan(score.bits_per_byte) and math.isnan(score.nats_per_token)


def test_wrong_input_is_named():
    with pytest.raises(ValueError, match="target_bytes: shape"):
        BitsPerByte().add(torch.zeros(3), torch.zeros(4, dtype=torch.int64))
    with pytest.raises(ValueError, match="target_bytes: expected an integer"):
        BitsPerByte().add(torch.zeros(3), torch.zeros(3))


def add_up(rank, store):
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    metric = BitsPerByte()
    metric.add(torch.full((2 + rank,), 1.0 + rank), torch.full((2 + rank,), 4))
    metric.all_reduce()
    assert metric.score() == Score(2.0 + 6.0, 5, 20)
    torch.distributed.destroy_process_group()


def test_ranks_add_up(tmp_path):
    metric = BitsPerByte()
    metric.add(torch.ones(2), torch.ones(2, dtype=torch.int64))
    metric.all_reduce()  # without other ranks: nothing
    assert metric.score() == Score(2.0, 2, 2)
    torch.multiprocessing.spawn(add_up, (tmp_path / "store",), 2)
