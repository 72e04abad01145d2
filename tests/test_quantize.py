"""Quantization against oracles that follow the published descriptions row by row."""

import dataclasses
import functools
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.states import synthetic_state
from pgolf_fast.errors import UserError
from pgolf_fast.quantize import (
    PUBLISHED,
    Codes,
    Gptq,
    Keep,
    Lqer,
    MaxRows,
    MaxTensor,
    PercentileRows,
    QuantizeConfig,
    QuantTable,
    Rule,
    _fma,
    dequantize,
    quantize,
    row_quantiles,
)

F32 = np.float32
full_size_state = functools.lru_cache(maxsize=1)(synthetic_state)  # two tables share one


def only(scheme, w, **arguments):
    """The one tensor's result under one scheme."""
    tensors, errors = quantize({"w": w}, QuantTable((Rule(("*",), scheme),)), **arguments)
    return tensors["w"], errors[0]


def rows_around_the_floor(rows=24, columns=96, seed=0):
    """Rows on the scale floor, off it, and with outliers: every branch of the clip search."""
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, columns, generator=g) * torch.logspace(-2, 0.7, rows)[torch.randperm(rows, generator=g), None]
    w[::3, ::17] *= 6
    w[1] = 0
    return w


# --- the clip searches: the published loops, one row and one candidate at a time --------------------------------------


def half(x):
    return F32(np.float16(x))


def published_clip_search(w, variant):
    """(codes, fp16 scales, chosen percentile); torch.quantile decides the clip, as in the published scripts."""
    percentiles = {
        "gepa-598": (0.999, 0.9995, 0.9999, 0.99999, 1.0),
        "gptq-lite-379": (1.0, 0.999, 0.995, 0.99, 0.98),
        "legal-ttt-691": (0.999, 0.9995, 0.9999, 0.99999, 1.0),
    }[variant]
    lowest = -31 if variant == "legal-ttt-691" else -32
    best = (None, None, None, np.inf)
    for p in percentiles:
        codes, scales, error = np.zeros(w.shape, np.int8), np.zeros(len(w), np.float16), 0.0
        for r, row in enumerate(w.numpy()):
            magnitude = torch.from_numpy(np.abs(row))
            clip = F32((magnitude.max() if p == 1.0 else torch.quantile(magnitude, p)).item())
            scale = max(F32(clip / F32(31)), F32(F32(1) / F32(31)))
            scales[r] = np.float16(scale)
            if variant != "gepa-598":
                scale = half(scale)
            source = np.clip(row, -clip, clip) if variant == "gptq-lite-379" else row
            q = np.clip(np.rint(source / scale), lowest, 31).astype(F32)
            codes[r] = q
            error += ((q * scale - row).astype(np.float64) ** 2).sum()
        if error < best[3]:
            best = codes, scales, p, error
    return best[:3]


@pytest.mark.parametrize("variant", ["gepa-598", "gptq-lite-379", "legal-ttt-691"])
@pytest.mark.parametrize("seed", range(4))
def test_clip_search_is_the_published_one_bit_for_bit(variant, seed):
    w = rows_around_the_floor(seed=seed)
    codes, scales, _ = published_clip_search(w, variant)
    tensors, _ = quantize({"blocks.0.attn.c_q.weight": w}, dataclasses.replace(PUBLISHED[variant], rules=big_rules(variant)))
    got = tensors["blocks.0.attn.c_q.weight"]
    assert np.array_equal(got.scales.numpy(), scales)
    assert np.array_equal(got.codes.numpy(), codes)


def big_rules(variant):
    """The table without its rule for small tensors."""
    return tuple(rule for rule in PUBLISHED[variant].rules if rule.max_elements is None)


def clip_search_of(variant):
    return PUBLISHED[variant].rule_of("blocks.0.attn.c_q.weight", torch.empty(512, 512)).scheme


def test_the_three_clip_searches_differ_where_they_should():
    low = torch.full((1, 64), -1.0)
    low[0, 0] = -5.0  # one outlier: lower percentiles clip it, to -32 or to -31
    for variant, lowest in (("gepa-598", -32), ("legal-ttt-691", -31)):
        scheme = dataclasses.replace(clip_search_of(variant), percentiles=(0.9,))
        assert int(only(scheme, low)[0].codes[0, 0]) == lowest
    # PR #598 rounds with the fp32 scale and stores its fp16 value: a few codes differ by one, the scales do not.
    w = 2 * torch.randn(200, 512)
    scheme = dataclasses.replace(clip_search_of("gepa-598"), percentiles=(0.99999,))
    one, other = (only(dataclasses.replace(scheme, rounds_with_stored_scale=s), w)[0] for s in (True, False))
    assert torch.equal(one.scales, other.scales)
    assert 0 < (one.codes != other.codes).sum() < 1000 and (one.codes - other.codes).abs().max() == 1


def test_ties_keep_the_first_candidate_and_rows_on_the_floor_tie():
    w = 0.1 * torch.randn(16, 64)  # every row on the floor: all candidates round alike
    scheme = clip_search_of("legal-ttt-691")
    first, _ = only(scheme, w)
    alone, _ = only(dataclasses.replace(scheme, percentiles=(1.0,)), w)
    assert torch.equal(first.codes, alone.codes) and (first.scales == torch.tensor(1 / 31).half()).all()
    assert first.scales[0].item() == 0.032257080078125
    # PR #379 clips the values themselves, so there the percentile still matters, and the whole range wins.
    scheme = clip_search_of("gptq-lite-379")
    assert torch.equal(only(scheme, w)[0].codes, only(dataclasses.replace(scheme, percentiles=(1.0,)), w)[0].codes)
    assert not torch.equal(only(scheme, w)[0].codes, only(dataclasses.replace(scheme, percentiles=(0.98,)), w)[0].codes)


def test_a_tie_between_different_codes_goes_to_the_first_candidate():
    # 3.5 steps: the whole range rounds it up to 4, clipped to 3.25 it becomes 3, and both are half a step off.
    w = torch.tensor([[3.5, 3.0]]) * torch.tensor(1 / 31).half().float()
    for percentiles, codes in (((1.0, 0.5), [4, 3]), ((0.5, 1.0), [3, 3])):
        scheme = dataclasses.replace(clip_search_of("gptq-lite-379"), percentiles=percentiles)
        assert only(scheme, w)[0].codes[0].tolist() == codes


# --- quantiles --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [2, 3, 31, 128, 512, 1536, 2048])
def test_row_quantiles_are_torch_quantile_bit_for_bit(columns):
    w = torch.randn(300, columns).abs()
    percentiles = (0.98, 0.99, 0.995, 0.999, 0.9995, 0.9999, 0.99999, 0.9999984, 1.0)
    for p, ours in zip(percentiles, row_quantiles(w, percentiles)):
        assert torch.equal(ours, torch.quantile(w, p, dim=1)), p


finite = st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False)


@settings(max_examples=300, deadline=None)
@given(finite, st.floats(0, 1, width=32, allow_subnormal=False), finite)
def test_fma_rounds_once(x, f, y):
    exact = Fraction(x) * Fraction(f) + Fraction(y)
    ours = _fma(torch.tensor([x]), F32(f), torch.tensor([y]))
    # The nearest float32 to an exact rational: the closest of the float32s around the float64 nearest to it.
    near = F32(float(exact))
    around = {np.nextafter(near, F32(-np.inf)), near, np.nextafter(near, F32(np.inf))}
    nearest = min(around, key=lambda v: (abs(Fraction(float(v)) - exact), int(v.view(np.uint32)) & 1))
    assert ours.item() == float(nearest)


def test_fma_where_float64_would_round_twice():
    # The sum lies 2^-70 below the middle of two float32s; float64 rounds it to the middle, and the tie then goes up.
    x, f, y = torch.tensor([2.0**-24 * (1 + 2.0**-23)]), F32(1 - 2.0**-23), torch.tensor([1 + 2.0**-23])
    exact = Fraction(x.item()) * Fraction(float(f)) + Fraction(y.item())
    assert exact == 1 + Fraction(3, 2**24) - Fraction(1, 2**70) and float(F32(float(exact))) == 1 + 2.0**-22
    assert _fma(x, f, y).item() == 1 + 2.0**-23


# --- the int8 schemes -------------------------------------------------------------------------------------------------


def test_int8_rows_are_the_published_ones():
    w = torch.cat([rows_around_the_floor(), 3 * torch.randn(4, 96)])
    got, _ = only(PercentileRows(), w)
    for r, row in enumerate(w.numpy()):
        clip = F32(torch.quantile(torch.from_numpy(np.abs(row)), 0.9999984).item())
        scale = max(F32(clip / F32(127)), F32(F32(1) / F32(127)))
        q = np.clip(np.rint(np.clip(row, -clip, clip) / scale), -127, 127)
        assert np.array_equal(got.codes[r].numpy(), q.astype(np.int8)) and got.scales[r].item() == float(np.float16(scale))
    assert got.scales.min().item() == 0.00787353515625


def test_int8_tensor_uses_the_stored_scale_and_no_floor():
    w = 0.01 * torch.randn(32, 16)
    got, _ = only(MaxTensor(), w)
    scale = half(F32(F32(w.abs().max().item()) / F32(127)))
    assert got.scales.shape == () and got.scales.item() == float(scale)
    assert np.array_equal(got.codes.numpy(), np.clip(np.rint(w.numpy() / scale), -127, 127).astype(np.int8))
    zero, error = only(MaxTensor(), torch.zeros(3, 4))
    assert zero.scales.item() == 1 and not zero.codes.any() and error.rmse == 0


def test_gate_rows_and_rows_of_zeros():
    w = torch.randn(8, 12)
    w[3] = 0
    got, error = only(MaxRows(), w)
    for r, row in enumerate(w.numpy()):
        scale = half(F32(np.abs(row).max() / F32(127)))
        q = np.clip(np.rint(row / scale), -127, 127) if scale else np.zeros(12)
        assert np.array_equal(got.codes[r].numpy(), q.astype(np.int8))
    assert got.scales[3] == 0 and torch.isfinite(dequantize({"w": got})["w"]).all() and error.rmse > 0


# --- SDClip and LQER --------------------------------------------------------------------------------------------------


def test_sdclip_scale_is_a_multiple_of_the_row_deviation():
    w = rows_around_the_floor()
    got, error = only(Gptq(level=31, clip_sigmas=12.0), w, plain_rounding=True)
    for r, row in enumerate(w.numpy()):
        scale = half(12.0 * np.std(row.astype(np.float64), ddof=1) / 31)
        assert got.scales[r].item() == pytest.approx(float(scale), rel=1e-3, abs=6e-8)  # one fp16 step: the deviation is an fp32 sum
        q = np.clip(np.rint(row / F32(got.scales[r].item())), -31, 31) if scale else np.zeros(96)
        assert np.array_equal(got.codes[r].numpy(), q.astype(np.int8))
    assert error.bits == 6 and Gptq(63, 12.0).bits == 7 and Gptq(127, 12.0).bits == 8


def slow_lqer(error, rank, group):
    """The published packing from numpy's decomposition; signs of singular vectors are free, so they are given."""
    u, s, vt = np.linalg.svd(error.numpy(), full_matrices=False)
    return u[:, :rank] * s[:rank], vt[:rank]


def test_lqer_codes_scales_and_gain():
    w = torch.randn(96, 128) + torch.outer(torch.randn(96), torch.randn(128))
    scheme = Gptq(level=3, clip_sigmas=3.0)
    config = QuantTable((Rule(("*",), scheme),), lqer=Lqer(rank=4, top=1, group=64))
    plain, plain_error = only(scheme, w, plain_rounding=True)
    tensors, (error,) = quantize({"w": w}, config, plain_rounding=True)
    low = tensors["w"].low_rank
    assert torch.equal(tensors["w"].codes, plain.codes) and error.rmse < plain_error.rmse
    e = w - dequantize({"w": plain})["w"]
    a, b = slow_lqer(e, 4, 64)
    a_scale = half(F32(np.abs(a).max() / F32(1.5)))
    assert low.a_scale.item() == pytest.approx(float(a_scale), rel=2e-3)
    assert low.a.min() >= -2 and low.a.max() <= 1 and low.b.min() >= -8 and low.b.max() <= 7
    for k in range(4):  # numpy's singular vectors may have the other sign
        for sign in (1, -1):
            qa = np.clip(np.rint(sign * a[:, k] / F32(low.a_scale.item())), -2, 1)
            qb = [
                np.clip(np.rint(sign * g / F32(s)), -8, 7) for g, s in zip(b[k].reshape(-1, 64), low.b_scales[2 * k : 2 * k + 2].tolist())
            ]
            if (qa == low.a[:, k].numpy()).mean() > 0.99 and (np.concatenate(qb) == low.b[k].numpy()).mean() > 0.99:
                break
        else:
            pytest.fail(f"factor {k} is not the singular vector's")
    for i, g in enumerate(b.reshape(-1, 64)):
        assert low.b_scales[i].item() == pytest.approx(float(np.float16(np.abs(g).max() / 7.5)), rel=2e-3)
    # Dequantised by the formula, in float64.
    product = (low.a.double() * low.a_scale.double()) @ (low.b.double().reshape(-1, 64) * low.b_scales.double()[:, None]).reshape(4, 128)
    truth = plain.codes.double() * plain.scales.double()[:, None] + product
    torch.testing.assert_close(dequantize(tensors)["w"].double(), truth, rtol=1e-6, atol=1e-6)


def test_lqer_goes_to_the_largest_errors_in_absolute_norm():
    state = {f"blocks.{i}.mlp.fc.weight": (i + 1) * torch.randn(64, 128) for i in range(5)} | {"tok_emb.weight": 50 * torch.randn(64, 128)}
    tensors, _ = quantize(state, PUBLISHED["caseops-1934"], plain_rounding=True)
    corrected = {name for name, t in tensors.items() if t.low_rank}
    assert corrected == {"tok_emb.weight", "blocks.4.mlp.fc.weight", "blocks.3.mlp.fc.weight"}


# --- tables -----------------------------------------------------------------------------------------------------------


def payload_bytes(tensors):
    codes = [t for t in tensors.values() if isinstance(t, Codes)]
    return sum(c.codes.nbytes + c.scales.nbytes for c in codes) + sum(t.nbytes for t in tensors.values() if not isinstance(t, Codes))


@pytest.mark.parametrize("family,table,num_parameters,num_bytes", [
    ("sp1024-s", "legal-ttt-691", 26_993_756, 27_204_792),
    ("sp1024-s", "gptq-lite-379", 26_993_756, 27_204_792),
    ("sp1024-g", "gepa-598", 27_030_108, 27_522_422),
])  # fmt: skip
def test_payload_of_the_full_models_to_the_byte(family, table, num_parameters, num_bytes):
    state = full_size_state(family)
    assert sum(t.numel() for t in state.values()) == num_parameters
    tensors, errors = quantize(state, PUBLISHED[table])
    assert payload_bytes(tensors) == num_bytes
    assert [e.name for e in errors] == list(tensors) == list(state)
    assert sum(e.bits == 6 for e in errors) == 66


def test_schemes_of_each_table():
    def kinds(table, family):
        config = PUBLISHED[table]
        return {name: config.rule_of(name, t).scheme for name, t in synthetic_state(family, layers=1).items()}

    s = kinds("legal-ttt-691", "sp1024-s")
    assert s["bigram.proj.weight"] == Keep("float16")  # exactly 65,536 elements: kept
    assert s["bigram.embed.weight"] == s["tok_emb.weight"] == s["ve_shared.embed.weight"] == PercentileRows()
    g = kinds("gepa-598", "sp1024-g")
    assert g["blocks.0.mlp.scale"] == g["blocks.0.mlp.bias"] == Keep("float16")
    assert g["blocks.0.mlp_scale"] == g["bigram_emb.proj.weight"] == g["skip_gates"] == Keep("float32")
    assert g["tok_emb.weight"] == g["bigram_emb.embed.weight"] == g["ve_shared.embed.weight"] == MaxTensor()
    c = kinds("caseops-1934", "caseops")
    assert c["blocks.0.attn.attn_gate_w"] == MaxRows() and c["tok_emb.weight"] == Gptq(63, 12.0)
    assert all(c[f"blocks.0.{m}.weight"] == Gptq(31, 12.0) for m in ("attn.c_q", "attn.c_k", "attn.c_v", "attn.proj", "mlp.fc", "mlp.proj"))
    assert c["smear_lambda"] == c["blocks.0.mlp_scale"] == Keep("float16")
    names = ("blocks.0.attn.c_q.weight", "tok_emb.weight", "skip_weights")
    assert [[of_table[name].bits for name in names] for of_table in (s, g, c)] == [[6, 8, 16], [6, 8, 32], [6, 7, 16]]


def test_error_table_is_true():
    w = rows_around_the_floor()
    got, error = only(MaxRows(), w)
    values = got.codes.double() * got.scales.double()[:, None]
    assert error.rmse == pytest.approx((values - w.double()).pow(2).mean().sqrt().item(), rel=1e-5)
    counts = np.unique(got.codes.numpy(), return_counts=True)[1] / w.numel()
    assert error.entropy_bits == pytest.approx(-(counts * np.log2(counts)).sum(), rel=1e-6)
    outlier = torch.ones(1, 100)
    outlier[0, 7] = 40.0
    assert only(Gptq(31, 1.0), outlier, plain_rounding=True)[1].clipped_frac == 0.01
    beyond_seven = PercentileRows(percentile=0.7), dataclasses.replace(clip_search_of("gptq-lite-379"), percentiles=(0.7,))
    assert [only(scheme, torch.arange(1.0, 11.0)[None])[1].clipped_frac for scheme in beyond_seven] == [0.3, 0.3]
    kept, error = only(Keep("float16"), torch.tensor([0.1, 1.0]))
    assert error.rmse == pytest.approx(abs(0.1 - float(np.float16(0.1))) / 2**0.5, rel=1e-3) and error.entropy_bits == 16


def test_empty_state_and_narrow_dtypes():
    assert quantize({}, PUBLISHED["caseops-1934"]) == ({}, [])
    w = torch.randn(300, 300)
    assert torch.equal(only(MaxRows(), w.bfloat16())[0].codes, only(MaxRows(), w.bfloat16().float())[0].codes)


def test_a_gpu_gives_the_same_codes(device):
    w = rows_around_the_floor()
    for scheme in (clip_search_of("gepa-598"), clip_search_of("gptq-lite-379"), PercentileRows(), MaxTensor(), MaxRows()):
        there, here = only(scheme, w.to(device))[0], only(scheme, w)[0]
        assert torch.equal(there.codes.cpu(), here.codes) and torch.equal(there.scales.cpu(), here.scales)


def test_bad_input_names_the_tensor_and_the_remedy():
    good = torch.randn(4, 64)
    bad = good.clone()
    bad[2, 3] = float("nan")
    large = good.clone()
    large[2, 3] = 1e9
    for w, scheme, message in (
        (bad, MaxRows(), "tensor w: holds nan or inf"),
        (good[0], MaxRows(), "tensor w: MaxRows needs a matrix"),
        (torch.ones(4, 64, dtype=torch.int8), MaxRows(), "tensor w: expected floats"),
        (large, Keep("float16"), "tensor w: magnitude 1e\\+09 does not fit"),
        (large, MaxRows(), "tensor w: magnitude 1e\\+09 does not fit"),
        (large, clip_search_of("legal-ttt-691"), "tensor w: magnitude .* does not fit"),
        (good, Gptq(31, 12.0), "hessians: none for w"),
    ):
        with pytest.raises(UserError, match=message):
            only(scheme, w)
    with pytest.raises(UserError, match="hessians: w needs shape"):
        only(Gptq(31, 12.0), good, hessians={"w": torch.eye(3)})
    with pytest.raises(UserError, match="tensor w: hessians: number 0 is not positive definite"):
        only(Gptq(31, 12.0), good, hessians={"w": -torch.eye(64)})
    with pytest.raises(UserError, match="tensor w: no rule"):
        quantize({"w": good}, QuantTable((Rule(("x*",), Keep()),)))
    with pytest.raises(UserError, match="no rank-4 correction"):
        quantize({"w": torch.randn(8, 30)}, QuantTable((Rule(("*",), Gptq(31, 12.0)),), Lqer()), plain_rounding=True)


@pytest.mark.parametrize("table", PUBLISHED)
def test_variants_keep_their_bits_and_one_has_the_published_step(table):
    w = rows_around_the_floor(rows=12, columns=64)
    for rule in PUBLISHED[table].rules:
        if not hasattr(rule.scheme, "variants"):
            continue
        variants = list(rule.scheme.variants())
        assert len(set(variants)) == len(variants)
        published = only(rule.scheme, w, plain_rounding=True)[1].rmse
        assert published in [pytest.approx(only(v, w, plain_rounding=True)[1].rmse, rel=2e-3) for v in variants]
        for variant in variants:
            codes = only(variant, w, plain_rounding=True)[0].codes
            assert -(2 ** (variant.bits - 1)) <= int(codes.min()) and int(codes.max()) < 2 ** (variant.bits - 1), variant
            assert variant.short().startswith(f"{variant.bits} bits")
            assert 2 ** (variant.bits - 1) - 1 == getattr(variant, "level", getattr(variant, "highest", None)), "all codes of the width"


def test_settings_change_the_rules_of_gptq_alone():
    config = QuantizeConfig(
        table="caseops-1934", matrix_bits=5, embed_bits=8, attn_clip_sigmas=9.0, mlp_clip_sigmas=10.0, embed_clip_sigmas=20.0
    )
    shapes = {"blocks.3.attn.c_q.weight": (15, 9.0), "blocks.3.mlp.proj.weight": (15, 10.0), "tok_emb.weight": (127, 20.0)}
    for name, (level, clip) in shapes.items():
        scheme = config.rules().rule_of(name, torch.empty(4, 4)).scheme
        assert (scheme.level, scheme.clip_sigmas) == (level, clip)
    for table, published in PUBLISHED.items():
        assert QuantizeConfig(table=table).rules() == published
    widest = QuantizeConfig(table="caseops-1934", matrix_bits=2, embed_bits=8).rules()
    assert [widest.rule_of(name, torch.empty(4, 4)).scheme.level for name in shapes] == [1, 1, 127]
    for field, value in (("embed_bits", 9), ("matrix_bits", 1)):
        with pytest.raises(UserError, match=rf"quantize\.{field}: expected 2 to 8, got {value}"):
            QuantizeConfig(**{field: value})
    for field in ("attn_clip_sigmas", "mlp_clip_sigmas", "embed_clip_sigmas", "calibration_batches", "calibration_rows"):
        with pytest.raises(UserError, match=rf"quantize\.{field}: expected more than 0, got 0"):
            QuantizeConfig(**{field: 0})
