"""int6_pack: every implementation gives the same bytes, so every comparison here is for equality."""

from fractions import Fraction

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pgolf_fast import _host, pack_int6, unpack_int6
from pgolf_fast.ops import _library
from pgolf_fast.ops.int6_pack import FLOATS, row_bytes

MODEL = [(512, 512), (256, 512), (256, 512), (512, 512), (1536, 512), (512, 1536)]  # one layer of the 27M model


def expected(weights, scales=None):
    """In float64, whose quotients lie on the right side of every tie, and with the host's bytes."""
    w = weights.detach().cpu().float().numpy()
    amax = numpy.abs(w).max(axis=1, initial=0)
    with numpy.errstate(all="ignore"):
        s = (amax / numpy.float32(31)).astype(numpy.float16) if scales is None else scales.cpu().to(torch.float16).numpy()
        s = numpy.where(numpy.isfinite(amax), s, numpy.float16("inf"))
        usable = numpy.isfinite(s) & (s > 0)
        quotient = w.astype(numpy.float64) / numpy.where(usable, s, 1).astype(numpy.float64)[:, None]
        codes = numpy.where(usable[:, None], numpy.clip(numpy.rint(quotient), -32, 31), 0)
    return torch.from_numpy(_host.int6_pack_codes(numpy.ascontiguousarray(codes, numpy.int8))), torch.from_numpy(s)


def assert_packs(weights, scales=None, name=""):
    packed, row_scales = pack_int6(weights, scales)
    want_packed, want_scales = expected(weights, scales)
    assert torch.equal(row_scales.cpu().view(torch.int16), want_scales.view(torch.int16)), f"{name}: scales differ"
    differ = (packed.cpu() != want_packed).nonzero()
    assert packed.shape == want_packed.shape and not len(differ), f"{name}: {len(differ)} bytes differ, first at {differ[0].tolist()}"
    return packed, row_scales


def assert_unpacks(packed, scales, columns, dtype, name=""):
    weights = unpack_int6(packed, scales, columns, dtype)
    codes = torch.from_numpy(_host.int6_unpack_codes(packed.cpu().contiguous().numpy(), columns))
    want = (codes.double() * scales.cpu().double()[:, None]).to(dtype)
    assert weights.dtype == dtype and weights.shape == want.shape
    assert torch.allclose(weights.cpu(), want, rtol=0, atol=0, equal_nan=True), f"{name}: weights differ"


# ---- definition ----------------------------------------------------------------------------------------


def test_definition():
    """One row, with fractions and Python's own round half to even, against the bits that the header draws."""
    weights = [0.0, 1.0, -1.0, 31.0, 0.5, 1.5, 2.5, -0.5, -1.5, -30.51, 7.25]
    packed, scales = pack_int6(torch.tensor([weights]))
    scale = Fraction(scales[0].item())
    assert scale == 1
    bits = sum((round(Fraction(w) / scale) + 32) << (6 * i) for i, w in enumerate(weights))
    assert packed.tolist() == [list(bits.to_bytes(row_bytes(len(weights)), "little"))]
    assert unpack_int6(packed, scales, len(weights), torch.float32).tolist() == [[float(round(w)) for w in weights]]


# ---- agreement, seams and switches -----------------------------------------------------------------------

# Around a lane's 8 weights, a warp's 256, the 512 and 1024 that a warp holds; teams of 2, 4 and 8 warps; and rows too long for a
# block's registers (8192). Multiples of 64 are stored in 16-byte pieces, other multiples of 8 read but not stored so.
COLUMNS = [*range(10), 31, 32, 33, 64, 72, 255, 256, 257, 511, 512, 513, 520, 1023, 1024, 1025, 1536, 2048, 4096, 4097, 8192, 8200, 9001]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("with_scales", [False, True])
def test_agreement_over_shapes(device, dtype, with_scales):
    for columns in COLUMNS:
        for rows in (0, 1, 7, 19):
            w = torch.randn(rows, columns, device=device).to(dtype)
            scales = 0.02 + 0.1 * torch.rand(rows, device=device) if with_scales else None
            packed, row_scales = assert_packs(w, scales, f"{rows}x{columns}")
            for out in FLOATS:
                assert_unpacks(packed, row_scales, columns, out, f"{rows}x{columns}")


@pytest.mark.parametrize("dtype", FLOATS)
def test_strided_and_offset_inputs(device, dtype):
    base = torch.randn(40, 1100, device=device).to(dtype)
    for w in (base[:, 1:513], base[:, 8:520], base[::2, :512], base[1:, 3:], base.t(), base[:, ::2], base[:1].expand(9, -1)):
        packed, scales = assert_packs(w)
        assert_unpacks(packed.t().contiguous().t(), scales.repeat_interleave(2)[::2], w.shape[1], torch.bfloat16)


@pytest.mark.parametrize("dtype", FLOATS)
def test_lists(device, dtype):
    # More matrices than one launch takes, aligned and not, empty ones between.
    shapes = MODEL + [(3, 5), (0, 7), (2, 0), (5, 512), (1, 1)] * 20
    weights = [torch.randn(s, device=device).to(dtype) for s in shapes]
    packed, scales = pack_int6(weights)
    for i, w in enumerate(weights):
        want_packed, want_scales = expected(w)
        assert torch.equal(packed[i].cpu(), want_packed) and torch.equal(scales[i].cpu(), want_scales), f"matrix {i} of shape {w.shape}"
    columns = [w.shape[1] for w in weights]
    for i, (w, p, s) in enumerate(zip(unpack_int6(packed, scales, columns, dtype), packed, scales)):
        assert torch.equal(w, unpack_int6(p, s, columns[i], dtype)), f"matrix {i}"
        assert_unpacks(p, s, columns[i], dtype, f"matrix {i}")


def test_whole_model_in_one_call(device):
    weights = [torch.randn(s, device=device) for s in (11 if device.type == "cuda" else 1) * MODEL]
    packed, scales = pack_int6(weights)
    restored = unpack_int6(packed, scales, [w.shape[1] for w in weights])
    for w, p, s, r in zip(weights, packed, scales, restored):
        want_packed, want_scales = expected(w)
        assert torch.equal(p.cpu(), want_packed) and torch.equal(s.cpu(), want_scales)
        assert ((w - r).abs() <= 0.6 * s[:, None]).all()  # half a step, the scale's rounding and bf16's


@pytest.mark.parametrize("dtype", FLOATS[:2])
def test_every_16_bit_value_at_many_scales(device, dtype):
    values = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    values = values[values.isfinite()].to(device)
    powers, subnormal = 2.0 ** torch.arange(-24, 16, 3), torch.arange(1, 5) * 2.0**-24
    scales = torch.cat([powers, subnormal, torch.rand(20) * 2.0 ** torch.randint(-12, 4, (20,))])
    assert_packs(values.expand(len(scales), -1), scales.to(device))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("exponent", [-24, -14, -3, 9])
def test_ties_and_their_neighbours_at_every_scale_mantissa(device, dtype, exponent):
    # Every fp16 scale of one binade, and every weight within two floats of a tie between codes.
    mantissas = 1 + torch.arange(1024) / 1024 if exponent >= -14 else torch.arange(1, 1024).float()
    scales = mantissas * 2.0**exponent
    ties = ((torch.arange(-34, 34) + 0.5).double() * scales.double()[:, None]).to(dtype)
    bits = ties.view(torch.int32 if dtype == torch.float32 else torch.int16)
    around = torch.cat([bits + step for step in range(-2, 3)], dim=1).view(dtype)
    assert_packs(around.to(device), scales.to(device))


@pytest.mark.parametrize("dtype", FLOATS)
def test_extreme_rows(device, dtype):
    info = torch.finfo(dtype)
    rows = torch.randn(13, 600)
    rows[0] = 0
    rows[1, 5], rows[2, 599], rows[3, 0] = torch.inf, -torch.inf, torch.nan
    rows[4] *= 1e-6  # scales among fp16's subnormal numbers,
    rows[5] *= 1e-7  # at their end,
    rows[6] *= 1e-9  # and under them
    rows[7] *= info.max / 8  # for all but fp16, beyond its scales
    rows[8] = info.smallest_normal / 4 * torch.randint(1, 4, (600,))
    rows[9] = info.max
    rows[10], rows[11] = 0, -0.0
    rows[10, 300] = 31
    rows[12] = torch.linspace(-43, 43, 600) * 2**-24  # of which fp16's least number is the scale
    w = rows.to(dtype).to(device)
    packed, scales = assert_packs(w)
    assert scales[1:4].isinf().all() and unpack_int6(packed, scales, 600)[1:4].isnan().all()
    assert_unpacks(packed, scales, 600, dtype)
    given = torch.tensor([0.0, 1, 1, 1, torch.inf, torch.nan, -1, 1, 2e-8, 6e4, 6e-8, 1, 6e-8])
    given_packed, given_scales = pack_int6(w, given.to(device))
    want_packed, want_scales = expected(w, given)
    assert torch.equal(given_packed.cpu(), want_packed)
    assert torch.equal(given_scales.cpu().nan_to_num(-7), want_scales.nan_to_num(-7))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", FLOATS)
def test_composite_for_other_gpus(monkeypatch, dtype):
    monkeypatch.setattr(_library, "uses_kernel", lambda name, device: False)
    device = torch.device("cuda")
    for columns in (0, 1, 2, 3, 5, 31, 512, 513, 1536):
        w = torch.randn(9, columns, device=device).to(dtype)
        w[3:4, :1] = torch.nan
        for scales in (None, torch.rand(9, device=device)):
            packed, row_scales = assert_packs(w, scales, f"{columns} columns")
            for out in FLOATS:
                assert_unpacks(packed, row_scales, columns, out, f"{columns} columns")
    ties = (torch.arange(-34, 34, device=device) + 0.5)[None] * (1 + torch.arange(1024, device=device) / 1024)[:, None]
    assert_packs(ties, 1 + torch.arange(1024, device=device) / 1024)
    weights = [torch.randn(s, device=device).to(dtype) for s in ((5, 7), (0, 3), (4, 512))]
    for p, s, w in zip(*pack_int6(weights), weights):
        assert torch.equal(p.cpu(), expected(w)[0]) and torch.equal(s.cpu(), expected(w)[1])


# ---- property: what was packed comes back ------------------------------------------------------------------


@pytest.mark.parametrize("tail", [0, 1, 2, 3])
def test_all_codes_at_all_places_and_tails(device, tail):
    columns = 64 + tail
    codes = (torch.arange(64)[:, None] + torch.arange(columns)[None, :]) % 64 - 32  # each code in each column
    packed, scales = pack_int6(codes.float().to(device), torch.ones(64, device=device))
    assert torch.equal(packed.cpu(), torch.from_numpy(_host.int6_pack_codes(codes.to(torch.int8).numpy())))
    assert torch.equal(unpack_int6(packed, scales, columns, torch.float32).cpu(), codes.float())
    unused = 8 * packed.shape[1] - 6 * columns
    assert (packed[:, -1].cpu() >> (8 - unused) == 0).all()


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 70).flatmap(lambda n: st.lists(st.lists(st.integers(-32, 31), min_size=n, max_size=n), min_size=1, max_size=5)))
def test_round_trip_of_any_codes(codes):
    round_trip(torch.tensor(codes), torch.device("cpu"))


@pytest.mark.cuda
@settings(max_examples=200, deadline=None)
@given(st.integers(1, 70).flatmap(lambda n: st.lists(st.lists(st.integers(-32, 31), min_size=n, max_size=n), min_size=1, max_size=5)))
def test_round_trip_of_any_codes_cuda(codes):
    round_trip(torch.tensor(codes), torch.device("cuda"))


def round_trip(codes, device):
    scales = (2.0 ** torch.randint(-10, 10, (codes.shape[0],))).to(device)
    weights = codes.float().to(device) * scales[:, None]
    packed, row_scales = pack_int6(weights, scales)
    assert torch.equal(unpack_int6(packed, row_scales, codes.shape[1], torch.float32), weights)
    assert numpy.array_equal(_host.int6_unpack_codes(packed.cpu().numpy(), codes.shape[1]), codes.numpy())


# ---- registration, compilation, streams, graphs ------------------------------------------------------------


def test_opcheck(device):
    weights = [torch.randn(4, 9, device=device), torch.randn(3, 64, device=device)]
    packed, scales = pack_int6(weights)
    torch.library.opcheck(torch.ops.pgolf_fast.int6_pack, (weights, []))
    torch.library.opcheck(torch.ops.pgolf_fast.int6_pack, (weights, scales))
    torch.library.opcheck(torch.ops.pgolf_fast.int6_unpack, (packed, scales, [9, 64], torch.bfloat16))


def test_compiles_whole(device):
    def there_and_back(w):
        packed, scales = pack_int6([w, 2 * w])
        return unpack_int6(packed, scales, [w.shape[1]] * 2)

    w = torch.randn(6, 40, device=device)
    for compiled, eager in zip(torch.compile(there_and_back, fullgraph=True)(w), there_and_back(w)):
        assert torch.equal(compiled, eager)


def test_repeats_bitwise(device):
    w = torch.randn(300, 1536, device=device)
    first = pack_int6(w)
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(first, pack_int6(w)))


@pytest.mark.cuda
def test_graph_replay_and_other_stream():
    weights = [torch.randn(s, device="cuda") for s in MODEL]
    columns = [w.shape[1] for w in weights]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        pack_int6(weights)  # loads the kernels before capture
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            packed, scales = pack_int6(weights)
            restored = unpack_int6(packed, scales, columns)
        for w in weights:
            w.copy_(torch.randn_like(w))
        graph.replay()
    stream.synchronize()
    for w, p, s, r, c in zip(weights, packed, scales, restored, columns):
        want_packed, want_scales = expected(w)
        assert torch.equal(p.cpu(), want_packed) and torch.equal(s.cpu(), want_scales)
        assert torch.equal(r, unpack_int6(p, s, c))


def test_rows_past_two_to_the_31_bytes():
    """Sizes only: no buffer this large on the CPU."""
    with torch.device("meta"):
        packed, scales = pack_int6(torch.empty(2**22, 2**11))
        assert packed.shape == (2**22, 3 * 2**9) and unpack_int6(packed, scales, 2**11).shape == (2**22, 2**11)


@pytest.mark.cuda
def test_more_than_two_to_the_31_elements():
    rows, columns = 2**20 + 3, 2**12
    if torch.cuda.mem_get_info()[0] < 30 * 2**30:
        pytest.skip("needs 30 GB")
    w = torch.empty(rows, columns, device="cuda", dtype=torch.bfloat16).normal_()
    packed, scales = pack_int6(w)
    restored = unpack_int6(packed, scales, columns)
    for part in (slice(0, 64), slice(rows // 2, rows // 2 + 64), slice(rows - 64, rows)):
        want_packed, want_scales = expected(w[part])
        assert torch.equal(packed[part].cpu(), want_packed) and torch.equal(scales[part].cpu(), want_scales)
        assert torch.equal(restored[part], unpack_int6(packed[part], scales[part], columns))


# ---- bad input -----------------------------------------------------------------------------------------------


def test_empty_list():
    assert pack_int6([]) == ([], []) and unpack_int6([], [], []) == []


def test_bad_input_names_the_argument():
    w = torch.randn(4, 8)
    packed, scales = pack_int6(w)
    for error, name, call in (
        (ValueError, "weights", lambda: pack_int6(torch.randn(4))),
        (TypeError, "weights", lambda: pack_int6(w.double())),
        (ValueError, "weights", lambda: pack_int6([w, w.half()])),
        (ValueError, "scales", lambda: pack_int6([w], [])),
        (ValueError, "scales", lambda: pack_int6(w, torch.ones(3))),
        (TypeError, "scales", lambda: pack_int6(w, torch.ones(4, dtype=torch.int32))),
        (ValueError, "packed", lambda: unpack_int6(packed[0], scales, 8)),
        (TypeError, "packed", lambda: unpack_int6(packed.int(), scales, 8)),
        (TypeError, "scales", lambda: unpack_int6(packed, scales.float(), 8)),
        (ValueError, "scales", lambda: unpack_int6(packed, scales[:3], 8)),
        (ValueError, "columns", lambda: unpack_int6(packed, scales, 9)),
        (ValueError, "columns", lambda: unpack_int6(packed, scales, -1)),
        (ValueError, "columns", lambda: unpack_int6([packed], [scales], [])),
        (ValueError, "dtype", lambda: unpack_int6(packed, scales, 8, torch.float64)),
    ):
        with pytest.raises(error, match=f"^{name}:"):
            call()


def test_host_refuses_what_is_not_codes():
    for name, call in (
        ("codes", lambda: _host.int6_pack_codes(numpy.full((1, 4), 32, numpy.int8))),
        ("codes", lambda: _host.int6_pack_codes(numpy.zeros(4, numpy.int8))),
        ("columns", lambda: _host.int6_unpack_codes(numpy.zeros((1, 3), numpy.uint8), 5)),
        ("packed", lambda: _host.int6_unpack_codes(numpy.zeros(3, numpy.uint8), 4)),
    ):
        with pytest.raises(ValueError, match=f"^{name}:"):
            call()
