"""The container: exact, repeatable, and closed to anything that is not one."""

import dataclasses
import hashlib
import json
import shutil
import struct
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as stnp

from benchmarks.states import synthetic_state
from pgolf_fast.artifact import HEAD, ArtifactError, pack, role, same, stream_bytes, unpack
from pgolf_fast.codecs import CODECS, Stored
from pgolf_fast.errors import UserError
from pgolf_fast.quantize import PUBLISHED, Codes, LowRank, dequantize, quantize
from tests.fuzz_artifact import example, fuzz, index_of, reseal, with_index

NAMES = [
    pytest.param(
        name, marks=pytest.mark.skipif(name == "lrzip" and shutil.which("lrzip") is None, reason="the lrzip program is not installed")
    )
    for name in CODECS
]


@pytest.mark.parametrize("codec", NAMES)
def test_round_trip_is_exact(codec):
    tensors = example()
    loaded = unpack(pack(tensors, codec, {"recipe": "tiny", "model": {"layers": 2}}))
    assert same(loaded.tensors, tensors) and loaded.metadata == {"recipe": "tiny", "model": {"layers": 2}}
    for name, t in tensors.items():  # not through `same`, which is code under test
        if isinstance(t, Codes):
            assert torch.equal(loaded.tensors[name].codes, t.codes) and torch.equal(loaded.tensors[name].scales, t.scales)
        else:
            assert loaded.tensors[name].dtype == t.dtype and torch.equal(loaded.tensors[name], t)
    low, given_low = loaded.tensors["tok_emb.weight"].low_rank, tensors["tok_emb.weight"].low_rank
    assert all(torch.equal(getattr(low, f.name), getattr(given_low, f.name)) for f in dataclasses.fields(LowRank))


@pytest.mark.parametrize("table,family", [("legal-ttt-691", "sp1024-s"), ("gepa-598", "sp1024-g"), ("caseops-1934", "caseops")])
def test_two_blocks_of_each_family(table, family):
    tensors, _ = quantize(synthetic_state(family, layers=2), PUBLISHED[table], plain_rounding=True)
    loaded = unpack(pack(tensors)).tensors
    before, after = dequantize(tensors), dequantize(loaded)
    assert list(before) == list(after) and all(torch.equal(before[n], after[n]) for n in before)


def test_nothing_and_nearly_nothing():
    for tensors in ({}, {"a": torch.empty(0)}, {"a": torch.empty(2, 0, 3).half()}, {"": torch.tensor(1.0)}, {"naïve": torch.tensor([0.0])}):
        assert same(unpack(pack(tensors)).tensors, tensors)


def test_bits_survive_that_equality_does_not_see():
    floats = torch.tensor([float("nan"), -0.0, 0.0, float("inf"), 1e-45])
    floats = torch.cat([floats, torch.tensor([0x7FC01234], dtype=torch.int32).view(torch.float32)])
    loaded = unpack(pack({"x": floats})).tensors["x"]
    assert torch.equal(loaded.view(torch.int32), floats.view(torch.int32))
    zeros = {"x": torch.tensor([0.0])}
    assert same(zeros, {"x": torch.tensor([0.0])}) and not same(zeros, {"x": torch.tensor([-0.0])})
    assert not same(zeros, {"y": torch.tensor([0.0])}) and not same(zeros, {"x": torch.tensor([[0.0]])})
    a, b = example(), example()
    b["tok_emb.weight"].low_rank.b[0, 0] += 1
    assert not same(a, b)


kinds = st.sampled_from([torch.float16, torch.bfloat16, torch.float32])


@st.composite
def tensor_dicts(draw):
    tensors = {}
    for name in draw(st.lists(st.text(max_size=12), max_size=5, unique=True)):
        g = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
        if draw(st.booleans()):
            rows, columns = draw(st.integers(0, 6)), draw(st.integers(0, 6))
            scales = torch.rand((rows,) if draw(st.booleans()) else (), generator=g).half()
            tensors[name] = Codes(torch.randint(-128, 128, (rows, columns), generator=g).to(torch.int8), scales)
        else:
            tensors[name] = torch.randn(draw(stnp.array_shapes(min_dims=0, max_dims=4, max_side=4)), generator=g).to(draw(kinds))
    return tensors


@settings(max_examples=150, deadline=None)
@given(tensor_dicts(), st.sampled_from(["none", "zstd-22", "range"]))
def test_any_tensors_round_trip(tensors, codec):
    assert same(unpack(pack(tensors, codec)).tensors, tensors)


def test_the_same_bytes_every_time_and_everywhere():
    """The digest was taken once, with brotli 1.2 and constriction 0.5: another machine must give the same file."""
    assert pack(example()) == pack(example())
    assert pack(example(), "none", {"a": 1, "b": 2}) == pack(example(), "none", {"b": 2, "a": 1})
    tensors = {
        "blocks.0.mlp.fc.weight": Codes(
            torch.arange(-2048, 2048).div(64, rounding_mode="floor").to(torch.int8).view(64, 64), torch.ones(64).half()
        )
    }
    assert hashlib.sha256(pack(tensors, "range")).hexdigest()[:16] == "6c8bc613a4de9085"


def test_planes_are_flat():
    """Codes by role, then scales, then floats by width; high bytes before low bytes."""
    tensors = {
        "blocks.0.a": Codes(torch.tensor([[1, 2]], dtype=torch.int8), torch.tensor([0x0102], dtype=torch.int16).view(torch.float16)),
        "x": torch.tensor([0x0304], dtype=torch.int16).view(torch.bfloat16),
        "y": torch.tensor([0x05060708], dtype=torch.int32).view(torch.float32),
        "b": Codes(torch.tensor([[9]], dtype=torch.int8), torch.tensor(0x0A0B, dtype=torch.int16).view(torch.float16)),
        "blocks.1.a": Codes(torch.tensor([[-1, 4]], dtype=torch.int8), torch.tensor([0x0C0D], dtype=torch.int16).view(torch.float16)),
    }
    data = pack(tensors, "none")
    content = bytes([1, 2, 255, 4, 9]) + bytes([0x01, 0x0A, 0x0C, 0x02, 0x0B, 0x0D]) + bytes([3, 4]) + bytes([5, 6, 7, 8])
    assert data[: HEAD.size] == b"PGLF" + struct.pack("<HHIII", 1, 0, *HEAD.unpack_from(data)[3:5], 1)
    assert data[-32 - len(content) : -32] == content


def test_role():
    assert (
        role("blocks.10.attn.c_q.weight") == "attn.c_q"
        and role("tok_emb.weight") == "tok_emb"
        and role("blocks.3.mlp.scale") == "mlp.scale"
    )


@pytest.mark.parametrize("codec", ["zstd", "range"])
def test_stream_bytes_add_up(codec):
    data = pack(example(), codec)
    sizes = stream_bytes(data)
    assert sum(sizes.values()) == len(data)
    assert set(sizes) == (
        {"all", "metadata"} if codec == "zstd" else {"tok_emb", "lqer.a", "lqer.b", "attn.c_q", "ve_shared.embed", "rest", "metadata"}
    )


# --- refusals ---------------------------------------------------------------------------------------------------------


def replaced(path, value):
    def change(index):
        *way, last = path
        target = index
        for step in way:
            target = target[step]
        target[last] = value
        return index

    return change


@pytest.mark.parametrize("change,message", [
    (replaced(["tensors", 1, 2], [2**40, 2**40]), "wrong entry"),
    (replaced(["tensors", 1, 2], [2**14, 2**14]), "more than"),
    (replaced(["tensors", 1, 2], [-16, -32]), "wrong entry"),
    (replaced(["tensors", 1, 2], [16.0, 32]), "wrong entry"),
    (replaced(["tensors", 1, 2], [True, 32]), "wrong entry"),
    (replaced(["tensors", 1, 2], [16, 32, 1]), "wrong entry"),
    (replaced(["tensors", 1, 1], "pickle"), "wrong entry"),
    (replaced(["tensors", 1, 0], 5), "wrong entry"),
    (replaced(["tensors", 1], []), "wrong entry"),
    (replaced(["tensors", 1], ["x", "rows", [16, 32], [4, 32], 1]), "wrong entry"),
    (replaced(["tensors", 1], ["x", "one", [16, 32], [4, 32]]), "wrong entry"),
    (replaced(["tensors", 1], ["x", "float16", [16, 32], [4, 32]]), "wrong entry"),
    (replaced(["tensors", 1, 0], "tok_emb.weight"), "two tensors have one name"),
    (replaced(["tensors", 0, 3], [4, 0]), "wrong entry"),
    (replaced(["tensors", 0, 3], [4, 63]), "wrong entry"),
    (replaced(["tensors", 4, 2], [1] * 9), "wrong entry"),
    (replaced(["tensors", 1, 2], [17, 32]), "artifact: "),
    (replaced(["tensors"], {}), "wrong type"),
    (replaced(["metadata"], []), "wrong type"),
    (lambda index: index | {"more": 1}, "lacks its two parts"),
    (lambda index: b"[" * 10_000, "not JSON"),
    (lambda index: b"\xff\xfe", "not JSON"),
    (lambda index: b" " * (2**20 + 1), "more than 1048576"),
])  # fmt: skip
def test_a_false_index_is_refused(change, message):
    for codec in ("none", "zstd", "brotli-11", "lzma-6", "range"):
        with pytest.raises(ArtifactError, match=message):
            data = pack(example(), codec)
            index = change(index_of(data))
            unpack(reseal(with_index(data, index if isinstance(index, bytes) else json.dumps(index).encode())))


def test_a_false_head_is_refused():
    data = pack(example())
    for begin, field, message in (
        (0, b"PGLX", "not a pgolf artifact"),
        (4, struct.pack("<H", 2), "version 2, this program reads version 1"),
        (6, struct.pack("<H", 99), "codec 99 is unknown"),
        (8, struct.pack("<I", 2**32 - 1), "cut short"),
        (12, struct.pack("<I", 2**32 - 1), "declares an index of 4294967295 bytes"),
        (12, struct.pack("<I", 1000), "brotli stream does not hold 1000 bytes"),
        (16, struct.pack("<I", 2**32 - 1), "declares 4294967295 streams"),
        (16, struct.pack("<I", 4000), "cut short"),
        (20, struct.pack("<I", 2**31), "cut short or extended"),
    ):
        changed = data[:begin] + field + data[begin + len(field) :]
        with pytest.raises(ArtifactError, match=message):
            unpack(reseal(changed))
    for wrong in (b"", b"PGLF", data[:-1], data + b"\0", data[: len(data) // 2]):
        with pytest.raises(ArtifactError):
            unpack(wrong)
    with pytest.raises(ArtifactError, match="checksum mismatch"):
        unpack(data[:-40] + bytes([data[-40] ^ 1]) + data[-39:])


def test_every_bit_of_a_small_artifact():
    data = pack({"a": Codes(torch.tensor([[1, -2], [3, 4]], dtype=torch.int8), torch.ones(2).half())})
    for bit in range(8 * len(data)):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        with pytest.raises(ArtifactError):
            unpack(bytes(changed))


def test_mutated_artifacts_load_exactly_or_are_refused():
    begin = time.monotonic()
    outcomes = fuzz(4000, seed=1)
    assert sum(outcomes.values()) == 4000 and sum(n for (_, _, o), n in outcomes.items() if o == "refused") > 3500
    assert time.monotonic() - begin < 100  # a hang, not a speed


@pytest.mark.skipif(shutil.which("lrzip") is None, reason="the lrzip program is not installed")
def test_mutated_lrzip_artifacts_too():
    assert sum(fuzz(60, seed=2, codecs=("lrzip",)).values()) == 60


def test_a_codec_that_gives_back_something_else_is_noticed_while_packing(monkeypatch):
    class Lossy(Stored):
        def decompress(self, stream, size):
            return stream[:-1] + bytes([stream[-1] ^ 1])

    monkeypatch.setitem(CODECS, "none", (0, Lossy()))
    with pytest.raises(ArtifactError, match="decoded content does not match its checksum"):
        pack(example(), "none")


def test_bad_input_to_pack_is_named():
    with pytest.raises(UserError, match="codec: no 'gzip'"):
        pack({}, "gzip")
    with pytest.raises(UserError, match="tensor x: an artifact holds codes or"):
        pack({"x": torch.zeros(3, dtype=torch.int64)})
    with pytest.raises(UserError, match="more than an artifact may hold"):
        pack({"x": torch.zeros(2**25 + 1)})
