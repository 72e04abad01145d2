"""Hessians against the oracle's own matrix products, and the published order of calibration rows."""

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode

from pgolf_fast.calibrate import Windows, hessians
from pgolf_fast.errors import UserError
from pgolf_fast.gptq import HessianSum
from pgolf_fast.shards import shard_name, write_shard
from tests.compare import relative_error
from tests.test_model import RECIPES, oracle_loss, random_model, small, tokens_of


class Products(TorchFunctionMode):
    """Sums x^T x of every x that is multiplied by a transposed parameter: x @ w.T."""

    def __init__(self, parameters):
        super().__init__()
        self.names = {(w.data_ptr(), tuple(w.shape)): name for name, w in parameters.items() if w.dim() == 2}
        self.sums = {}

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in (torch.Tensor.matmul, torch.Tensor.__matmul__):
            x, w = args
            name = self.names.get((w.data_ptr(), tuple(w.shape)[::-1]))
            if name:
                self.sums[name] = self.sums.get(name, 0) + x.double().T @ x.double()
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", RECIPES)
def test_hessians_are_those_of_the_oracles_products(name):
    """Every recipe: gates, star activation, value embeddings, lanes, and three visits of a looped block summed."""
    config = small(name)
    model = random_model(config)
    batches = [tokens_of(config, 2, 24)[0], tokens_of(config, 1, 31)[0].flip(1)]
    found = hessians(model, batches)

    parameters = model.published_tensors()
    products = Products(parameters)
    for row in (row for batch in batches for row in batch):
        with products, torch.no_grad():
            oracle_loss(name, config, parameters, row, row, torch.zeros(len(row), dtype=torch.int64), looped=True)
    matrices = {n for n in parameters if n == "tok_emb.weight" or (n.startswith("blocks.") and n.endswith(".weight"))}
    assert set(found) == matrices and len(matrices) == 67
    for key, hessian in found.items():
        assert relative_error(hessian, products.sums[key] / 2) < 1e-4, key


def test_hessian_sum_of_bf16_inputs(device):
    x = torch.randn(3, 1000, 96, dtype=torch.bfloat16, device=device)
    total = HessianSum(96, device)
    total.add(x)
    rows = x.double().flatten(0, 1)
    assert relative_error(total.mean(2), rows.T @ rows / 2) < 1e-5  # tensor cores cut off what they add: 3,000 / 16 times 2^-24


# --- rows ---------------------------------------------------------------------------------------------------------------


def write_shards(folder, lengths, split="train"):
    """Shards whose tokens say where they stand: place + 1000 * shard."""
    for number, length in enumerate(lengths):
        write_shard(folder / shard_name(split, number), np.arange(length, dtype=np.uint16) + 1000 * number)
    return folder


def published_order(rank, counts, seq_len, rows):
    """(shard, start) of each row, as the specification tells it."""
    rng = np.random.default_rng(rank)  # a Generator over PCG64
    left = {}
    for shard, count in counts.items():
        phase = rng.integers(0, seq_len)
        left[shard] = [phase + seq_len * i for i in rng.permutation((count - 1 - phase) // seq_len)]
    for _ in range(rows):
        weights = np.array([len(windows) for windows in left.values()])
        shard = list(left)[rng.choice(len(left), p=weights / weights.sum())]
        yield shard, left[shard].pop()


def test_rows_are_drawn_as_published(tmp_path):
    """Rank 0 of the published run has every eighth shard."""
    write_shards(tmp_path, [100, 90, 90, 90, 90, 90, 90, 90, 70])
    rows = Windows(tmp_path, 8).take(14)
    expected = list(published_order(0, {0: 100, 8: 70}, 8, 14))
    assert {shard for shard, _ in expected} == {0, 8}
    assert rows.tolist() == [[1000 * shard + start + i for i in range(9)] for shard, start in expected]
    assert Windows(tmp_path, 8, rank=3).take(1)[0, 0] // 1000 == 3


@pytest.mark.parametrize("rank", range(8))
def test_a_shard_of_a_single_window_gives_it(tmp_path, rank):
    write_shards(tmp_path, [40] * 8 + [9] * 8)
    rows = Windows(tmp_path, 8, rank=rank).take(5).tolist()
    assert [row for row in rows if row[0] >= 8000] == [[1000 * (8 + rank) + i for i in range(9)]]


def test_every_window_once_before_any_comes_again(tmp_path):
    write_shards(tmp_path, [100])
    windows = Windows(tmp_path, 8)
    first, then = windows.take(5), windows.take(6)
    starts = [int(t) for t in [*first[:, 0], *then[:, 0]]]
    assert len(set(starts)) == 11 and all(abs(a - b) % 8 == 0 for a in starts for b in starts)
    assert windows.take(20).shape == (20, 9)  # and the deal begins again


def test_only_training_shards_are_read(tmp_path):
    write_shards(tmp_path, [100], "val")
    with pytest.raises(UserError, match="no fineweb_train_000000.bin"):
        Windows(tmp_path, 8)
    write_shards(tmp_path, [12])
    with pytest.raises(UserError, match="no training shard holds two windows of 8 tokens"):
        Windows(tmp_path, 8)
