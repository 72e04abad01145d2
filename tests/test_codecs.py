"""Codecs: exact both ways, every shape, every refusal."""

import hashlib
import lzma
import math
import shutil
import struct
import tracemalloc

import brotli
import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from pgolf_fast import codecs
from pgolf_fast.codecs import CODECS, Matrix, Range, Shape, Zstd, _levels, brotli_compress, brotli_decompress
from pgolf_fast.errors import UserError
from pgolf_fast.host import host

needs_lrzip = pytest.mark.skipif(shutil.which("lrzip") is None, reason="the lrzip program is not installed")
NAMES = [pytest.param(name, marks=needs_lrzip) if name == "lrzip" else name for name in CODECS]
IN_PROCESS = [name for name in CODECS if name != "lrzip"]


def gaussian(rows, columns, sigma=2.6, seed=0, row_spread=0.0, column_spread=0.0, limit=31):
    g = np.random.default_rng(seed)
    scale = sigma * np.exp(row_spread * g.normal(size=(rows, 1)) + column_spread * g.normal(size=(1, columns)))
    return np.clip(np.rint(scale * g.normal(size=(rows, columns))), -limit, limit).astype(np.int8)


def round_trip(name, matrices, rest):
    codec = CODECS[name][1]
    streams = codec.encode(matrices, rest)
    shapes = [Shape(m.role, *m.codes.shape) for m in matrices]
    codes, tail = codec.decode(streams, shapes, len(rest))
    assert tail == rest and len(codes) == len(matrices)
    for m, c in zip(matrices, codes):
        assert c.dtype == np.int8 and np.array_equal(c, m.codes)
    return sum(map(len, streams))


@pytest.mark.parametrize("name", NAMES)
def test_round_trip(name):
    roles = ["tok_emb", "attn.c_q", "mlp.fc", "attn.c_q", "mlp.fc", "mlp.proj"]
    matrices = [Matrix(role, gaussian(40 + i, 30, seed=i, row_spread=0.5)) for i, role in enumerate(roles)]
    assert round_trip(name, matrices, bytes(range(256)) * 3) < sum(m.codes.size for m in matrices) + 768 + 400


@pytest.mark.parametrize("name", NAMES)
def test_edges(name):
    extremes = np.array([[-128, 127], [0, -1]], np.int8)
    for matrices, rest in (
        ([], b""),
        ([], b"rest"),
        ([Matrix("a", np.zeros((0, 5), np.int8))], b""),
        ([Matrix("a", np.zeros((3, 0), np.int8)), Matrix("b", extremes)], b"x"),
        ([Matrix("a", np.zeros((4, 6), np.int8))], b""),
        ([Matrix("a", np.full((1, 1), -128, np.int8))], b""),
        ([Matrix("tok_emb", extremes), Matrix("tok_emb", extremes.T.copy())], b""),
    ):
        round_trip(name, matrices, rest)


small_matrices = st.lists(
    st.tuples(st.sampled_from(["tok_emb", "mlp.fc", "x"]), st.integers(0, 9), st.integers(0, 9), st.integers(0, 2**32 - 1)), max_size=5
)


@pytest.mark.parametrize("name", IN_PROCESS)
@settings(max_examples=40, deadline=None)
@given(small_matrices, st.binary(max_size=40))
def test_anything_round_trips(name, descriptions, rest):
    matrices = [Matrix(r, np.random.default_rng(s).integers(-128, 128, (n, m)).astype(np.int8)) for r, n, m, s in descriptions]
    round_trip(name, matrices, rest)


@pytest.mark.parametrize("name", IN_PROCESS)
def test_repeatable(name):
    matrices = [Matrix("mlp.fc", gaussian(64, 64, seed=i)) for i in range(3)]
    assert CODECS[name][1].encode(matrices, b"tail") == CODECS[name][1].encode(matrices, b"tail")


# --- the range coder --------------------------------------------------------------------------------------------------


def entropy_bytes(codes):
    counts = np.bincount(codes.reshape(-1).astype(np.int16) + 128)
    shares = counts[counts > 0] / codes.size
    return -(shares * np.log2(shares)).sum() * codes.size / 8


def test_range_coder_reaches_the_entropy():
    m = gaussian(512, 512)
    assert round_trip("range", [Matrix("a", m)], b"") < entropy_bytes(m) * 1.001 + 150


@pytest.mark.parametrize("rows,columns", [(0.0, 0.0), (0.6, 0.0), (0.0, 0.6), (0.4, 0.4)])
def test_contexts_find_the_structure_that_is_there(rows, columns):
    """Against the entropy under the true deviations, which the coder does not know."""
    g = np.random.default_rng(1)
    scale = 6 * np.exp(rows * g.normal(size=(768, 1)) + columns * g.normal(size=(1, 512)))
    m = np.clip(np.rint(scale * g.normal(size=(768, 512))), -127, 127).astype(np.int8)
    edges = (np.arange(-127, 129) - 0.5) / np.broadcast_to(scale, m.shape)[..., None]
    cdf = 0.5 * (1 + np.vectorize(math.erf)(edges[::16, ::16] / 2**0.5))
    p = np.diff(cdf, axis=-1)
    ideal = -(p * np.log2(np.maximum(p, 1e-300))).sum(-1).mean() * m.size / 8
    size = round_trip("range", [Matrix("a", m)], b"")
    assert size < 1.03 * ideal  # in a matrix this small, levels and histograms are a percent
    if rows or columns:
        assert size < 0.99 * entropy_bytes(m)
    assert Range()._plan([m]).mode == (rows > 0) + 2 * (columns > 0)


def test_estimate_is_the_size():
    matrices = [Matrix("a", gaussian(300, 200, row_spread=0.4)), Matrix("b", gaussian(300, 200)), Matrix("a", gaussian(300, 200, seed=3))]
    codec = Range()
    size = sum(map(len, codec.encode(matrices, b"rest" * 50)))
    assert codec.estimate(matrices, b"rest" * 50) == pytest.approx(size, rel=2e-3)


def test_rare_rows_at_both_ends_share_and_count_in_their_neighbours_histogram():
    """A thousandth of the rows each; their values occur nowhere else, so a histogram without them could hardly say them."""
    m = np.full((20_000, 10), 8, np.int8)
    m[::1000], m[1::1000] = 0, 127
    assert round_trip("range", [Matrix("a", m)], b"") < entropy_bytes(m) * 1.01 + 60


@pytest.mark.parametrize(("mode", "digest"), list(enumerate(["a924471ea30b", "26955ddb77a2", "3ca3dbb9d6c5", "3ab2fd7b4001"])))
def test_a_stream_of_every_mode_is_what_it_always_was(mode, digest):
    """Digests taken once, as for the artifact: files that are written must load forever."""
    row, column = np.arange(96)[:, None], np.arange(64)[None, :]
    m = ((row * 37 + column * 101) % 23 - 11) * (1 + row // 32) * (1 + column // 16) // 4
    m = m.astype(np.int8)
    stream = codecs._RangePlan([m, m[:50]], bool(mode & 1), bool(mode & 2)).encode()
    one, other = Range().decode_role("a", stream, [(96, 64), (50, 64)])
    assert stream[0] == mode and np.array_equal(one, m) and np.array_equal(other, m[:50])
    assert hashlib.sha256(stream).hexdigest()[:12] == digest


def test_levels_are_six_to_an_octave_and_do_not_depend_on_floating_point():
    assert _levels(np.array([1, 2, 4, 8]), 1).tolist() == [60, 66, 72, 78]
    assert _levels(np.array([0, 10**9]), 1).tolist() == [0, 109]
    assert _levels(np.array([5]), 0).tolist() == [_levels(np.array([5]), 1)[0]]


# --- rows in similarity order -----------------------------------------------------------------------------------------


def slow_similarity_order(codes):
    left, order = list(range(1, len(codes))), [0]
    while left:
        last = codes[order[-1]].astype(int)
        order.append(min(left, key=lambda r: (np.abs(codes[r].astype(int) - last).sum(), r)))
        left.remove(order[-1])
    return order


@pytest.mark.parametrize("rows,columns", [(1, 3), (2, 1), (17, 5), (40, 33), (30, 0)])
def test_similarity_order(rows, columns):
    codes = np.random.default_rng(rows).integers(-3, 3, (rows, columns)).astype(np.int8)  # few values: many ties
    assert host.similarity_order(codes).tolist() == slow_similarity_order(codes)
    wide = np.random.default_rng(rows).integers(-128, 128, (rows, columns)).astype(np.int8)
    assert host.similarity_order(wide).tolist() == slow_similarity_order(wide)


def test_similarity_order_refuses():
    assert host.similarity_order(np.zeros((0, 4), np.int8)).tolist() == []
    with pytest.raises(ValueError, match="codes"):
        host.similarity_order(np.zeros(4, np.int8))
    with pytest.raises(TypeError):
        host.similarity_order(np.zeros((4, 4), np.int32))


@needs_lrzip
def test_lrzip_sorts_only_the_published_roles():
    m = gaussian(50, 20)
    for role, is_sorted in (("tok_emb", True), ("attn.c_q", True), ("mlp.fc", True), ("attn.c_k", False), ("mlp.proj", False)):
        stream = codecs.Lrzip().encode_role(role, [m])
        (length,) = struct.unpack_from("<I", stream)
        assert len(brotli.decompress(stream[4 : 4 + length])) == (100 if is_sorted else 0)


def test_lrzip_takes_rows_whose_places_fit_16_bits():
    assert codecs.Lrzip().encode_role("mlp.proj", [np.zeros((2**16, 0), np.int8)])
    with pytest.raises(ValueError, match="a row's place must fit 16 bits"):
        codecs.Lrzip().encode_role("mlp.proj", [np.zeros((2**16 + 1, 0), np.int8)])


def test_a_missing_program_is_named(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(UserError, match="apt install lrzip"):
        codecs.Lrzip().encode_role("tok_emb", [gaussian(3, 3)])


# --- hostile streams --------------------------------------------------------------------------------------------------


def test_bombs_are_refused_before_they_grow():
    zeros = bytes(2**26)
    for codec, stream in (
        (CODECS["zstd"][1], zstandard.ZstdCompressor().compress(zeros)),
        (CODECS["brotli-11"][1], brotli.compress(zeros, quality=5)),
        (CODECS["lzma-6"][1], lzma.compress(zeros, preset=0)),
    ):
        tracemalloc.start()
        with pytest.raises(ValueError):
            codec.decode([stream], [Shape("a", 10, 10)], 0)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 2**20, f"{codec} allocated {peak} bytes for 100"
    # A frame of 100 bytes whose window would take two gigabytes: magic, 4-byte size, window exponent 31, one empty last block.
    frame = bytes.fromhex("28b52ffd 80 a8") + struct.pack("<I", 100) + bytes([1, 0, 0])
    with pytest.raises(ValueError, match="window of 2147483648 bytes"):
        Zstd(()).decompress(frame, 100)
    # Level 22's own window, exponent 17 above 2^10, with 100 bytes in one raw block: the longest that is taken.
    frame = bytes.fromhex("28b52ffd 80 88") + struct.pack("<I", 100) + (100 << 3 | 1).to_bytes(3, "little") + bytes(range(100))
    assert Zstd(()).decompress(frame, 100) == bytes(range(100))


@needs_lrzip
def test_lrzip_cannot_write_more_than_was_declared():
    with pytest.raises(ValueError):
        codecs._lrzip(["-d"], codecs._lrzip(["-z"], bytes(2**18)), 1000)


def test_brotli_exact_size_only():
    stream = brotli_compress(b"x" * 1000)
    assert brotli_decompress(stream, 1000) == b"x" * 1000
    for size in (0, 999, 1001):
        with pytest.raises((ValueError, brotli.error)):
            brotli_decompress(stream, size)
    with pytest.raises((ValueError, brotli.error)):
        brotli_decompress(stream[:-1], 1000)
    with pytest.raises((ValueError, brotli.error)):
        brotli_decompress(stream + b"more", 1000)


def test_a_range_stream_that_goes_on_is_refused():
    """From two words on: of one the decoder cannot tell, and `pgolf audit` packs again."""
    m = gaussian(40, 30)
    (stream, rest) = Range().encode([Matrix("a", m)], b"")
    for words in (2, 3, 7):
        with pytest.raises(ValueError, match="goes on after its last value"):
            Range().decode([stream + bytes(range(4 * words)), rest], [Shape("a", *m.shape)], 0)


def test_wrong_number_of_streams():
    for name in CODECS:
        for streams in ([], [b"", b"", b""]):
            with pytest.raises(ValueError, match="expected . stream"):
                CODECS[name][1].decode(streams, [Shape("a", 2, 2)], 0)
