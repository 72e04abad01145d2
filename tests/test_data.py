import itertools
import json
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from pgolf_fast import data, shards
from pgolf_fast.data import ContinuousStream, Loader, ShardStream, load_validation, pack_segments
from pgolf_fast.data_build import BuildConfig, build
from pgolf_fast.errors import UserError
from tests import corpus

BOS = 1
STREAMS = pytest.mark.parametrize("stream", [ContinuousStream, ShardStream])


def make_shards(folder, sizes, seed=0, bos_every=40):
    """Random training shards; the first of each starts inside a document."""
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(seed)
    parts = []
    for number, size in enumerate(sizes):
        tokens = rng.integers(4, 500, size)
        tokens[rng.random(size) < 1 / bos_every] = BOS
        tokens[:3] = 7
        shards.write_shard(folder / shards.shard_name("train", number), tokens)
        parts.append(tokens)
    return parts


def continuous_windows(parts, tokens, world_size):
    """The recipe's loader as it is told: one endless stream; every micro-batch takes world_size slices of tokens + 1."""
    endless = itertools.cycle(np.concatenate(parts).tolist())
    while True:
        yield [np.array(list(itertools.islice(endless, tokens + 1))) for _ in range(world_size)]


def shard_windows(parts, tokens, world_size):
    """The recipe's loader as it is told: open the next shard at its first BOS; take while a micro-batch remains, drop the rest."""
    for part in itertools.cycle(parts):
        rest = part[np.flatnonzero(part == BOS)[0] :]
        while len(rest) >= world_size * (tokens + 1):
            taken, rest = rest[: world_size * (tokens + 1)], rest[world_size * (tokens + 1) :]
            yield np.split(taken, world_size)


REFERENCES = {ContinuousStream: continuous_windows, ShardStream: shard_windows}


@STREAMS
# Windows that end at, cross, and skip shard ends; a window longer than a shard; several laps.
@pytest.mark.parametrize(
    ("sizes", "tokens", "world_size"), [([500], 49, 1), ([500, 700, 230], 49, 2), ([300, 90, 1000], 99, 1), ([400, 410, 420], 15, 8)]
)
def test_every_rank_gets_what_the_recipe_says(tmp_path, stream, sizes, tokens, world_size):
    parts = make_shards(tmp_path, sizes)
    laid_out = stream(tmp_path, tokens, world_size)
    for batch, windows in zip(range(60), REFERENCES[stream](parts, tokens, world_size)):
        for rank in range(world_size):
            assert np.array_equal(laid_out.window(batch, rank), windows[rank])


def test_a_continuous_window_may_be_longer_than_a_shard(tmp_path):
    parts = make_shards(tmp_path, [30, 20, 25, 60])
    laid_out = ContinuousStream(tmp_path, 100, 1)
    for batch, windows in zip(range(10), continuous_windows(parts, 100, 1)):
        assert np.array_equal(laid_out.window(batch, 0), windows[0])


def test_the_world_size_does_not_change_the_continuous_stream(tmp_path):
    """8 / world_size micro-batches of world_size windows: a step sees the same 8 windows whatever the number of ranks."""
    make_shards(tmp_path, [5000])

    def step(world_size, number):
        laid_out = ContinuousStream(tmp_path, 20, world_size)
        num_micro = 8 // world_size
        return [laid_out.window(number * num_micro + micro, rank).tolist() for micro in range(num_micro) for rank in range(world_size)]

    for number in (0, 5):
        assert step(1, number) == step(2, number) == step(4, number) == step(8, number)


@STREAMS
@pytest.mark.parametrize("is_packed", [False, True])
def test_the_loader_delivers_the_stream_in_order(tmp_path, stream, is_packed):
    make_shards(tmp_path, [900, 700])
    laid_out = stream(tmp_path, 64, 2)
    loader = Loader(laid_out, rank=1, is_packed=is_packed, max_segment=20, cu_seqlens_multiple=2)
    lengths = set()
    for number, batch in zip(range(30), loader):
        window = laid_out.window(number, 1).astype(np.int64)
        lengths.add(len(batch.cu_seqlens) if is_packed else 0)
        assert batch.inputs.dtype == batch.targets.dtype == torch.int64 and batch.number == number
        assert np.array_equal(batch.inputs, window[:-1]) and np.array_equal(batch.targets, window[1:])
        if is_packed:
            assert batch.cu_seqlens.dtype == torch.int32
            assert np.array_equal(batch.cu_seqlens, pack_segments(window[:-1], 20, 2))
        else:
            assert batch.cu_seqlens is None
    assert lengths == {0} or len(lengths) > 1  # batches of more segments than usual come with a longer array, and then the usual again
    loader.close()


@STREAMS
def test_batches_stay_as_delivered(tmp_path, stream):
    """Host buffers are used again; what was handed out must not change with them."""
    make_shards(tmp_path, [900])
    loader = Loader(stream(tmp_path, 64), is_packed=True)
    batches = list(itertools.islice(loader, 12))
    copies = [batch.inputs.clone() for batch in batches]
    time.sleep(0.05)
    loader.close()
    assert all(torch.equal(batch.inputs, copy) for batch, copy in zip(batches, copies))
    assert all(np.array_equal(batch.inputs, loader.stream.window(k, 0)[:-1]) for k, batch in enumerate(batches))


@STREAMS
@pytest.mark.parametrize("stop", [0, 1, 7, 40])
def test_resuming_gives_the_uninterrupted_stream(tmp_path, stream, stop):
    make_shards(tmp_path, [900, 800])
    straight = [batch.inputs for batch in itertools.islice(Loader(stream(tmp_path, 50, 2), is_packed=True), 50)]
    first = Loader(stream(tmp_path, 50, 2), is_packed=True)
    for _ in itertools.islice(first, stop):
        pass
    state = json.loads(json.dumps(first.state()))
    second = Loader(stream(tmp_path, 50, 2), is_packed=True)
    next(second)
    thread = second.thread
    second.load_state(state)
    assert second.position == stop and not thread.is_alive()
    for expected, batch in zip(straight[stop:], second):
        assert torch.equal(batch.inputs, expected)


def test_a_state_of_another_stream_is_refused(tmp_path):
    make_shards(tmp_path / "a", [900])
    make_shards(tmp_path / "b", [901])
    state = Loader(ContinuousStream(tmp_path / "a", 50, 2)).state()
    with pytest.raises(UserError, match="world_size 2 there, 1 here"):
        Loader(ContinuousStream(tmp_path / "a", 50, 1)).load_state(state)
    with pytest.raises(UserError, match="shards"):
        Loader(ContinuousStream(tmp_path / "b", 50, 2)).load_state(state)
    with pytest.raises(UserError, match="ShardStream"):
        Loader(ShardStream(tmp_path / "a", 50, 2)).load_state(state)


def segments_ref(inputs, max_segment):
    """Token by token: a new segment at 0, at BOS, and when the segment is full."""
    starts, length = [], max_segment
    for position, token in enumerate(inputs):
        if position == 0 or token == BOS or length == max_segment:
            starts.append(position)
            length = 0
        length += 1
    return [*starts, len(inputs)]


@pytest.mark.parametrize("max_segment", [1, 7, 50, 2048])
@pytest.mark.parametrize("bos_every", [1, 2, 30, 10_000])
def test_segments_are_documents_cut_at_the_maximum(max_segment, bos_every):
    rng = np.random.default_rng(bos_every)
    for size in (1, 2, 49, 50, 51, 500):
        inputs = np.where(rng.random(size) < 1 / bos_every, BOS, 9).astype(np.uint16)
        expected = segments_ref(inputs, max_segment)
        assert pack_segments(inputs, max_segment).tolist() == expected
        padded = pack_segments(inputs, max_segment, multiple=64)
        assert len(padded) % 64 == 0 and len(padded) - len(expected) < 64 and padded.dtype == np.int32
        assert padded.tolist() == expected + [size] * (len(padded) - len(expected))


def test_the_specifications_own_segment_examples():
    document = np.full(5000, 9)
    document[0] = BOS
    assert np.diff(pack_segments(document)).tolist() == [2048, 2048, 904]
    sixty_three, sixty_four = np.full(63, BOS), np.full(64, BOS)
    assert len(pack_segments(sixty_three, multiple=64)) == 64 and len(pack_segments(sixty_four, multiple=64)) == 128
    assert pack_segments(np.array([], np.uint16)).tolist() == [0]


def test_a_slow_source_shows_as_stalls(tmp_path):
    make_shards(tmp_path, [900])

    class Slow(ContinuousStream):
        def window(self, batch, rank):
            time.sleep(0.02)
            return super().window(batch, rank)

    loader = Loader(Slow(tmp_path, 50))
    for _ in itertools.islice(loader, 6):
        pass
    loader.close()
    assert loader.stalls == 5 and 0.05 < loader.stall_s < 1  # all but the first


def test_a_prefetched_source_does_not_stall(tmp_path):
    make_shards(tmp_path, [900])
    loader = Loader(ContinuousStream(tmp_path, 50))
    for _ in itertools.islice(loader, 5):
        time.sleep(0.02)
    loader.close()
    assert loader.stalls == 0 and loader.stall_s == 0


def test_faults_reach_the_consumer_at_their_batch(tmp_path):
    parts = make_shards(tmp_path, [900])
    tokens = parts[0].copy()
    tokens[130] = 600  # in the third window
    shards.write_shard(tmp_path / shards.shard_name("train", 0), tokens)
    loader = Loader(ContinuousStream(tmp_path, 50, vocab_size=500))
    next(loader), next(loader)
    time.sleep(0.05)
    for _ in range(2):
        with pytest.raises(UserError, match=r"fineweb_train_000000.bin: byte 1284: token 600 is outside the vocabulary of 500"):
            next(loader)
    loader.close()


def test_who_trains_on_shards_needs_no_codec_and_may_end_without_closing_them(tmp_path):
    make_shards(tmp_path, [900])
    heavy = "('rich', 'tyro', 'zstandard', 'pyarrow', 'huggingface_hub')"
    read = "loader = data.Loader(data.ContinuousStream(sys.argv[1], 50)); next(loader)"
    code = f"import sys; from pgolf_fast import data; {read}; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr


def test_what_cannot_make_a_batch_is_refused(tmp_path):
    make_shards(tmp_path / "a", [50], bos_every=5)
    with pytest.raises(UserError, match="50 training tokens are fewer than one window of 51"):
        ContinuousStream(tmp_path / "a", 50)
    with pytest.raises(UserError, match="no shard holds a micro-batch of 2 x 31"):
        ShardStream(tmp_path / "a", 30, 2)
    shards.write_shard(tmp_path / "a/fineweb_train_000000.bin", np.full(100, 9))
    with pytest.raises(UserError, match="no BOS"):
        ShardStream(tmp_path / "a", 10)
    with pytest.raises(UserError, match="rank: 2 is not in"):
        Loader(ContinuousStream(tmp_path / "a", 10, 2), rank=2)
    with pytest.raises(UserError, match="at least 1"):
        ContinuousStream(tmp_path / "a", 0)
    with pytest.raises(UserError, match="no fineweb_train_000000.bin there"):
        (tmp_path / "b").mkdir()
        ContinuousStream(tmp_path / "b", 10)


@pytest.mark.gpu
@STREAMS
def test_on_a_gpu_batches_arrive_on_the_consumers_stream(tmp_path, stream):
    make_shards(tmp_path, [300_000], bos_every=400)
    laid_out = stream(tmp_path, 65_536)
    loader = Loader(laid_out, device="cuda", is_packed=True)
    busy = torch.randn(2048, 2048, device="cuda")
    batches = []
    for batch in itertools.islice(loader, 12):
        busy = busy @ busy * 1e-3  # work of the consumer's stream, ahead of the reads below
        batches.append((batch, batch.inputs.sum() + batch.targets[-1]))
    for number, (batch, total) in enumerate(batches):
        window = laid_out.window(number, 0).astype(np.int64)
        assert batch.inputs.is_cuda and batch.cu_seqlens.is_cuda
        assert total.item() == window[:-1].sum() + window[-1]
        assert np.array_equal(batch.targets.cpu(), window[1:])
        assert np.array_equal(batch.cu_seqlens.cpu(), pack_segments(window[:-1], multiple=256))
    loader.close()


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("built")
    documents = corpus.write_jsonl(folder / "documents.jsonl", corpus.texts())
    for name, is_caseops in (("plain", False), ("caseops", True)):
        corpus.tokenizer(is_caseops).save(folder / f"{name}.model")
        build(BuildConfig((documents,), folder / f"{name}.model", val_documents=20, processes=1), folder / name)
    return folder


@pytest.mark.parametrize("name", ["plain", "caseops"])
def test_validation_is_cut_to_rows_and_knows_its_bytes(built, name):
    tokenizer = corpus.tokenizer(name == "caseops")
    validation = load_validation(built / name, row=128)
    pairs = [tokenizer.encode_counted(text) for text in corpus.texts()[:20]]
    stream, counts = (np.concatenate(parts) for parts in zip(*pairs))
    n = (len(stream) - 1) // 128 * 128
    assert len(validation) == n and np.array_equal(validation.tokens, stream[: n + 1])
    assert validation.has_sidecar == (name == "caseops")
    inputs, targets, target_bytes = validation.slice(5, n - 3)
    assert inputs.tolist() == stream[5 : n - 3].tolist() and targets.tolist() == stream[6 : n - 2].tolist()
    if name == "caseops":
        assert target_bytes.tolist() == counts[6 : n - 2].tolist()
    else:
        assert target_bytes.tolist() == tokenizer.piece_bytes.of_targets(inputs, targets).tolist()
    starts = np.cumsum([0, *(len(tokens) for tokens, _ in pairs)])[:-1]
    assert validation.document_starts.tolist() == [start for start in starts if start < n]


def test_validation_that_cannot_be_scored_is_refused(built, tmp_path):
    with pytest.raises(UserError, match="make no row of 1,000,000"):
        load_validation(built / "plain", row=1_000_000)
    shards.write_shard(tmp_path / "fineweb_val_000000.bin", np.array([BOS, 300, 301]))
    with pytest.raises(UserError, match="no tokenizer.model there"):
        load_validation(tmp_path, row=2)
    with pytest.raises(UserError, match="CaseOps scores count original bytes"):
        load_validation(tmp_path, row=2, tokenizer=built / "caseops.model")
    shards.write_shard(tmp_path / "fineweb_val_bytes_000000.bin", np.array([5, 1, 1]))
    with pytest.raises(UserError, match="do not line up"):
        load_validation(tmp_path, row=2, tokenizer=built / "caseops.model")
    shards.write_shard(tmp_path / "fineweb_val_000000.bin", np.array([BOS, 300, 30_000]))
    with pytest.raises(UserError, match="token 30000 is outside"):
        load_validation(tmp_path, row=2, tokenizer=built / "plain.model")
    no_text = int(np.flatnonzero(corpus.tokenizer(False).is_byte)[255])  # no UTF-8 begins with 0xff, so decoding puts three bytes there
    shards.write_shard(tmp_path / "fineweb_val_000000.bin", np.array([BOS, no_text, 300]))
    (tmp_path / "fineweb_val_bytes_000000.bin").unlink()
    with pytest.raises(UserError, match="validation document 0: the byte rule counts .* and its decoded text has"):
        load_validation(tmp_path, row=2, tokenizer=built / "plain.model")
    with pytest.raises(UserError, match="its tokenizer has .* pieces, the model 96"):
        load_validation(built / "plain", row=128, vocab_size=96)
    assert data.CHECKED_DOCUMENTS >= 1000
