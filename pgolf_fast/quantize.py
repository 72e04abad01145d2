"""Quantization: named float tensors to small integers with fp16 scales, by a table of rules.

    quantize(state, config, hessians) -> QuantizedTensors and one TensorError per tensor
    dequantize(tensors)               -> named fp32 tensors, to be cast to the model's own dtypes

A scheme is a dataclass of its published parameters; a config is a list of rules, name pattern to scheme, the
first match wins; PUBLISHED holds the records' tables. No file format here.
"""

import dataclasses
import fnmatch
import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from pgolf_fast.errors import UserError
from pgolf_fast.gptq import gptq
from pgolf_fast.settings import requirer, setting

FLOAT16_MAX = 65504.0


# --- what comes out ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LowRank:
    """Correction of a rounding error: (a * a_scale) times (b * b_scales), b's scales per group of consecutive values."""

    a: torch.Tensor  # int8 [rows, rank]
    a_scale: torch.Tensor  # fp16 []
    b: torch.Tensor  # int8 [rank, columns]
    b_scales: torch.Tensor  # fp16 [rank * columns / group]

    @property
    def group(self) -> int:
        return self.b.numel() // self.b_scales.numel()


@dataclass(frozen=True)
class Codes:
    """A matrix as integers: code * scale, plus the correction if there is one."""

    codes: torch.Tensor  # int8 [rows, columns]
    scales: torch.Tensor  # fp16 [rows], or [] for one scale of the whole matrix
    low_rank: LowRank | None = None


# Name to integers, or to the floats that are stored as they are.
QuantizedTensors = dict[str, Codes | torch.Tensor]


@dataclass(frozen=True)
class TensorError:
    name: str
    scheme: str
    shape: tuple[int, ...]
    rmse: float  # of the dequantized values against the given ones
    clipped_frac: float  # share of values that lie beyond the outermost code
    bits: int  # width of a stored value
    entropy_bits: float  # order-0 entropy of the stored values, per value; `bits` for floats


# --- schemes ----------------------------------------------------------------------------------------------------------


# A scheme's `variants`, where it has any, are what a search over bytes and loss may put in its place (fit.py), named by `short`.
STEPS = tuple(2 ** (k / 4) for k in range(-8, 9))  # factors on the published one


@dataclass(frozen=True)
class Keep:
    """Stored as floats."""

    dtype: str = "float16"

    def __call__(self, w):
        kept = w.to(getattr(torch, self.dtype))
        return (_fits(kept, w), 0)

    @property
    def bits(self):
        return 8 * getattr(torch, self.dtype).itemsize


@dataclass(frozen=True)
class ClipSearch:
    """int6 per row with "GPTQ-lite": one clip percentile per matrix, the first of those with the least error of the whole matrix."""

    percentiles: tuple[float, ...]
    lowest: int = -31
    highest: int = 31
    clips_first: bool = False  # values are clipped to the percentile before rounding; matters for rows whose scale is at the floor
    rounds_with_stored_scale: bool = True  # else rounding uses the fp32 scale and only its fp16 value is kept
    scale_floor: float = 1 / 31  # makes most rows a fixed-step quantizer, which suits the entropy coder

    @property
    def bits(self):
        return (self.highest - self.lowest).bit_length()

    def short(self):
        return f"{self.bits} bits, step {self.scale_floor:.4g}"

    def variants(self):
        below = self.highest + self.lowest  # 0, or -1 where there is one code more below zero
        for level, factor in itertools.product((15, 31, 63), STEPS):
            yield dataclasses.replace(self, lowest=below - level, highest=level, scale_floor=self.scale_floor * factor)

    def __call__(self, w):
        best, least = None, math.inf
        for clip in row_quantiles(w.abs(), self.percentiles):
            stored = _fits((clip / self.highest).clamp_min(self.scale_floor).half(), clip)
            scale = (stored.float() if self.rounds_with_stored_scale else (clip / self.highest).clamp_min(self.scale_floor))[:, None]
            source = w.clamp(-clip[:, None], clip[:, None]) if self.clips_first else w
            codes, num_clipped = _round(source, scale, self.lowest, self.highest)
            # NOTE: in float64, so that candidates which round every row alike tie exactly and the first one stays.
            error = torch.linalg.vector_norm(codes * scale - w, dtype=torch.float64).item()
            if error < least:
                least = error
                num_clipped += int((source != w).sum())
                best = Codes(codes.to(torch.int8), stored), num_clipped
        return best


@dataclass(frozen=True)
class PercentileRows:
    """int8 per row, clipped at a percentile so near 1 that it only interpolates below the row's largest value."""

    percentile: float = 0.9999984
    level: int = 127
    scale_floor: float = 1 / 127

    @property
    def bits(self):
        return (2 * self.level).bit_length()

    def short(self):
        return f"{self.bits} bits, step {self.scale_floor:.4g}"

    def variants(self):
        for level, factor in itertools.product((31, 63, 127), STEPS):
            yield dataclasses.replace(self, level=level, scale_floor=self.scale_floor * factor)

    def __call__(self, w):
        (clip,) = row_quantiles(w.abs(), (self.percentile,))
        scale = (clip / self.level).clamp_min(self.scale_floor)
        clipped = w.clamp(-clip[:, None], clip[:, None])
        codes, _ = _round(clipped, scale[:, None], -self.level, self.level)
        return Codes(codes.to(torch.int8), _fits(scale.half(), clip)), int((clipped != w).sum())


@dataclass(frozen=True)
class MaxTensor:
    """int8 with one scale for the matrix, its largest magnitude over 127, and 1 for a matrix of zeros."""

    level: int = 127

    @property
    def bits(self):
        return (2 * self.level).bit_length()

    def short(self):
        return f"{self.bits} bits"

    def variants(self):
        for level in (15, 31, 63, 127):
            yield MaxTensor(level)

    def __call__(self, w):
        largest = w.abs().max()
        scale = torch.where(largest > 0, largest / self.level, 1.0).half()
        codes, num_clipped = _round_stored(w, _fits(scale, largest), self.level)
        return Codes(codes, scale), num_clipped


@dataclass(frozen=True)
class MaxRows:
    """int8 per row, the row's largest magnitude over 127; a row too small for an fp16 scale becomes zeros."""

    level: int = 127

    bits = 8

    def __call__(self, w):
        scales = (w.abs().amax(dim=1) / self.level).half()
        codes, num_clipped = _round_stored(w, _fits(scales, w)[:, None], self.level)
        return Codes(codes, scales), num_clipped


@dataclass(frozen=True)
class Gptq:
    """Symmetric rows rounded by GPTQ, with a step of `clip_sigmas` standard deviations of the row over `level`.

    With 12 deviations hardly anything is clipped: the number sets the rate.
    """

    level: int
    clip_sigmas: float
    damping: float = 0.01
    block: int = 128

    @property
    def bits(self):
        return (2 * self.level).bit_length()

    def short(self):
        return f"{self.bits} bits, step {self.clip_sigmas / self.level:.3g} sigma"

    def variants(self):
        """At 8 bits, where a coarse step leaves codes unused: the entropy coder charges nothing for them, and no weight is clipped."""
        for factor in STEPS:
            yield dataclasses.replace(self, level=127, clip_sigmas=factor * self.clip_sigmas * 127 / self.level)

    def scales(self, w):
        """fp16 [rows]; a row too small for an fp16 scale gets 0 and becomes zeros."""
        return _fits((self.clip_sigmas * w.std(dim=1) / self.level).half(), w)


def round_together(schemes: list[Gptq], matrices: list[torch.Tensor], hessians: list[torch.Tensor] | None) -> list[tuple[Codes, int]]:
    """Matrices of one shape, by schemes that differ in their clips alone; without Hessians, plain rounding with the same scales."""
    scales = [scheme.scales(w) for scheme, w in zip(schemes, matrices)]
    level, damping, block = schemes[0].level, schemes[0].damping, schemes[0].block
    if hessians is None:
        codes = [_round_stored(w, s[:, None], level)[0] for w, s in zip(matrices, scales)]
    else:
        codes = gptq(torch.stack(matrices), torch.stack(hessians), torch.stack(scales).float(), level, damping, block)
    limits = [(level + 0.5) * s.float()[:, None] for s in scales]
    return [(Codes(c, s), int((w.abs() > limit).sum())) for w, c, s, limit in zip(matrices, codes, scales, limits)]


@dataclass(frozen=True)
class Lqer:
    """Low-rank correction of the `top` rounding errors with the largest Frobenius norm: 2-bit rows times 4-bit columns."""

    rank: int = 4
    top: int = 3
    group: int = 64

    def __call__(self, error: torch.Tensor) -> LowRank:
        rank, group = self.rank, self.group
        u, s, vt = torch.linalg.svd(error, full_matrices=False)
        a, b = u[:, :rank] * s[:rank], vt[:rank]
        a_scale = (a.abs().max() / 1.5).half()
        groups = b.reshape(-1, group)
        b_scales = (groups.abs().amax(dim=1) / 7.5).half()
        qa, _ = _round(a, _nonzero(a_scale), -2, 1)
        qb, _ = _round(groups, _nonzero(b_scales)[:, None], -8, 7)
        return LowRank(qa.to(torch.int8), a_scale, qb.to(torch.int8).reshape(b.shape), b_scales)


Scheme = Keep | ClipSearch | PercentileRows | MaxTensor | MaxRows | Gptq


# --- the table --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rule:
    """Tensors whose name matches one of the shell patterns, and are no larger than `max_elements` where that is given."""

    patterns: tuple[str, ...]
    scheme: Scheme
    max_elements: int | None = None

    def serves(self, name: str, tensor: torch.Tensor) -> bool:
        small_enough = self.max_elements is None or tensor.numel() <= self.max_elements
        return small_enough and any(fnmatch.fnmatchcase(name, p) for p in self.patterns)


@dataclass(frozen=True)
class QuantTable:
    rules: tuple[Rule, ...]  # the first that serves a tensor decides
    lqer: Lqer | None = None  # corrects tensors of a Gptq rule

    def rule_of(self, name: str, tensor: torch.Tensor) -> Rule:
        for rule in self.rules:
            if rule.serves(name, tensor):
                return rule
        raise UserError(f"tensor {name}: no rule of the quantization table serves it; add one, for instance '*' kept as float16")


ATTENTION = ("blocks.*.attn.c_[qkv]*", "blocks.*.attn.proj*")
MLP = ("blocks.*.mlp.fc*", "blocks.*.mlp.proj*", "blocks.*.mlp.up_proj*", "blocks.*.mlp.down_proj*")
EMBEDDING = ("tok_emb*",)
SMALL = Rule(("*",), Keep("float16"), max_elements=65_536)

BASE_CLIP = ClipSearch((0.999, 0.9995, 0.9999, 0.99999, 1.0))
GEPA_CLIP = dataclasses.replace(BASE_CLIP, lowest=-32, rounds_with_stored_scale=False)
LITE_CLIP = ClipSearch((1.0, 0.999, 0.995, 0.99, 0.98), lowest=-32, clips_first=True)

PUBLISHED = {
    "gepa-598": QuantTable((
        Rule(ATTENTION, GEPA_CLIP),
        Rule(MLP, GEPA_CLIP),
        Rule(("tok_emb*", "bigram_emb.embed*", "ve_shared.embed*"), MaxTensor()),
        Rule(("blocks.*.mlp.scale", "blocks.*.mlp.bias"), Keep("float16")),
        Rule(("*",), Keep("float32")),
    )),
    "gptq-lite-379": QuantTable((
        SMALL,
        Rule(ATTENTION, LITE_CLIP),
        Rule(MLP, LITE_CLIP),
        Rule(("*",), PercentileRows()),
    )),
    "legal-ttt-691": QuantTable((
        SMALL,
        Rule(ATTENTION, BASE_CLIP),
        Rule(MLP, BASE_CLIP),
        Rule(("*",), PercentileRows()),
    )),
    "caseops-1934": QuantTable((
        Rule(ATTENTION, Gptq(level=31, clip_sigmas=12.0)),
        Rule(MLP, Gptq(level=31, clip_sigmas=12.0)),
        Rule(EMBEDDING, Gptq(level=63, clip_sigmas=12.0)),
        Rule(("*attn_gate_w*",), MaxRows()),
        Rule(("*",), Keep("float16")),
    ), lqer=Lqer()),
}  # fmt: skip


# --- settings ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class QuantizeConfig:
    table: Literal[tuple(PUBLISHED)] = setting("legal-ttt-691", "whose schemes the weights are quantized by")
    matrix_bits: int = setting(6, "of the attention and MLP matrices that GPTQ rounds", "MATRIX_BITS")
    embed_bits: int = setting(7, "of the token table that GPTQ rounds", "EMBED_BITS")
    attn_clip_sigmas: float = setting(12.0, "outermost code of attention matrices in GPTQ, in deviations of the row", "ATTN_CLIP_SIGMAS")
    mlp_clip_sigmas: float = setting(12.0, "the same of MLP matrices", "MLP_CLIP_SIGMAS")
    embed_clip_sigmas: float = setting(12.0, "the same of the token table", "EMBED_CLIP_SIGMAS")
    calibration_batches: int = setting(16, "of training text, for GPTQ's Hessians", "GPTQ_CALIBRATION_BATCHES")
    calibration_rows: int = setting(48, "rows of train.seq_len tokens in each")

    def __post_init__(self):
        require = requirer("quantize")
        for field in ("matrix_bits", "embed_bits"):
            require(2 <= getattr(self, field) <= 8, field, f"expected 2 to 8, got {getattr(self, field)}")
        for field in ("attn_clip_sigmas", "mlp_clip_sigmas", "embed_clip_sigmas", "calibration_batches", "calibration_rows"):
            require(getattr(self, field) > 0, field, f"expected more than 0, got {getattr(self, field)}")

    def rules(self) -> QuantTable:
        """The published table, its GPTQ rules with these widths and clips."""
        chosen = {
            ATTENTION: (self.matrix_bits, self.attn_clip_sigmas),
            MLP: (self.matrix_bits, self.mlp_clip_sigmas),
            EMBEDDING: (self.embed_bits, self.embed_clip_sigmas),
        }

        def tuned(rule):
            if not isinstance(rule.scheme, Gptq):
                return rule
            bits, clip = chosen[rule.patterns]
            return dataclasses.replace(rule, scheme=dataclasses.replace(rule.scheme, level=2 ** (bits - 1) - 1, clip_sigmas=clip))

        table = PUBLISHED[self.table]
        return dataclasses.replace(table, rules=tuple(tuned(rule) for rule in table.rules))


# --- the stage --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def quantize(
    state: Mapping[str, torch.Tensor],
    config: QuantTable,
    hessians: Mapping[str, torch.Tensor] | None = None,
    plain_rounding: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[QuantizedTensors, list[TensorError]]:
    """Quantize every tensor of `state`, on the device it lies on.

    hessians        name to [columns, columns], for the tensors of Gptq rules
    plain_rounding  round those to nearest instead, for forecasts of the size
    progress        called with the number of weights done so far, and of all
    """
    schemes = {name: config.rule_of(name, tensor).scheme for name, tensor in state.items()}
    source = {name: _source(name, tensor, schemes[name]) for name, tensor in state.items()}
    results, together = {}, {}  # what GPTQ's matrices must share to go through it together, to their names
    done, total = 0, sum(w.numel() for w in source.values())
    for name, w in source.items():
        if isinstance(schemes[name], Gptq):
            alike = dataclasses.replace(schemes[name], clip_sigmas=1.0)
            together.setdefault((alike, w.shape, w.device), []).append(name)
        else:
            results[name] = _naming(name, schemes[name], w)
            done += w.numel()
            progress(done, total)
    for names in together.values():
        given = None if plain_rounding else [_hessian(name, source[name], hessians) for name in names]
        label = names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more of its shape"
        results |= zip(names, _naming(label, round_together, [schemes[n] for n in names], [source[n] for n in names], given))
        done += sum(source[n].numel() for n in names)
        progress(done, total)
    tensors = {name: results[name][0] for name in state}
    if config.lqer:
        corrected = [name for names in together.values() for name in names]
        tensors |= _low_rank_corrections(config.lqer, source, {name: tensors[name] for name in corrected})
    errors = [_error(name, source[name], schemes[name], tensors[name], results[name][1]) for name in state]
    return tensors, errors


@torch.no_grad()
def dequantize(tensors: QuantizedTensors) -> dict[str, torch.Tensor]:
    """fp32 values, the same on every machine: elementwise products and sums in a fixed order."""
    return {name: _values(t) if isinstance(t, Codes) else t.float() for name, t in tensors.items()}


# --- pieces -----------------------------------------------------------------------------------------------------------


def row_quantiles(magnitudes: torch.Tensor, percentiles: tuple[float, ...]) -> list[torch.Tensor]:
    """Each row's quantiles, fp32 [rows], in the arithmetic of torch.quantile on fp32, bit for bit.

    The rank is a float32 product: in float64 it would move the clip by up to 3e-5, enough to flip codes.
    """
    n = magnitudes.shape[1]
    ranks = [np.float32(p) * np.float32(n - 1) for p in percentiles]
    # Only the values from the lowest rank upwards are sorted.
    falling = magnitudes.topk(n - int(min(ranks)), dim=1).values
    quantiles = []
    for rank in ranks:
        below = int(rank)
        f = np.float32(rank - np.float32(below))
        a, b = falling[:, n - 1 - below], falling[:, n - 1 - min(below + 1, n - 1)]
        d = b - a
        quantiles.append(_fma(d, f, a) if f < 0.5 else _fma(-d, np.float32(1) - f, b))
    return quantiles


def _fma(x: torch.Tensor, factor: np.float32, y: torch.Tensor) -> torch.Tensor:
    """x * factor + y in fp32, rounded once, on every machine.

    The product is exact in float64. The sum is rounded to odd there, which keeps the rounding to fp32 from rounding twice.
    """
    product, y = x.double() * float(factor), y.double()
    total = product + y
    back = total - product
    rest = (product - (total - back)) + (y - back)
    bits = total.view(torch.int64)
    odd = torch.where((rest != 0) & (bits & 1 == 0), bits + torch.where((rest > 0) == (total > 0), 1, -1), bits)
    return odd.view(torch.float64).float()


def _round(w, scale, lowest, highest):
    """Codes as floats, to nearest with ties to even, and how many were clipped."""
    nearest = torch.round(w / scale)
    codes = nearest.clamp(lowest, highest)
    return codes, int((nearest != codes).sum())


def _nonzero(scale):
    return torch.where(scale > 0, scale, 1).float()


def _round_stored(w, scale, level):
    """int8 codes with a stored fp16 scale; 0 where the scale is 0."""
    codes, num_clipped = _round(w, _nonzero(scale), -level, level)
    return (codes * (scale > 0)).to(torch.int8), num_clipped


def _fits(stored, source):
    if not torch.isfinite(stored).all():
        raise UserError(f"magnitude {source.abs().max().item():.6g} does not fit {stored.dtype}, whose largest is {FLOAT16_MAX:.0f}")
    return stored


def _naming(name, scheme, *arguments):
    """The scheme's result; its complaints gain the tensor's name."""
    try:
        return scheme(*arguments)
    except (UserError, ValueError) as error:
        raise UserError(f"tensor {name}: {error}") from None


def _source(name, tensor, scheme):
    if not tensor.is_floating_point():
        raise UserError(f"tensor {name}: expected floats, got {tensor.dtype}; is this a checkpoint?")
    w = tensor.detach().float()
    if not torch.isfinite(w).all():
        raise UserError(f"tensor {name}: holds nan or inf; the run diverged, use an earlier checkpoint")
    if not isinstance(scheme, Keep) and (w.dim() != 2 or w.shape[0] < 1 or w.shape[1] < 2):
        raise UserError(
            f"tensor {name}: {type(scheme).__name__} needs a matrix, got shape {list(w.shape)}; give it a rule that keeps floats"
        )
    return w


def _hessian(name, w, hessians):
    h = None if hessians is None else hessians.get(name)
    if h is None:
        raise UserError(f"hessians: none for {name}; collect it on calibration batches, or ask for plain rounding")
    if h.shape != (w.shape[1], w.shape[1]):
        raise UserError(f"hessians: {name} needs shape {[w.shape[1]] * 2}, got {list(h.shape)}")
    if not torch.isfinite(h).all():
        raise UserError(f"hessians: that of {name} holds nan or inf; calibrate again")
    return h.to(device=w.device, dtype=torch.float32)


def _low_rank_corrections(lqer, source, tensors):
    norms = {name: torch.linalg.vector_norm(source[name] - _values(t)).item() for name, t in tensors.items()}
    worst = sorted(norms, key=norms.get, reverse=True)[: lqer.top]
    for name in worst:
        rows, columns = source[name].shape
        if min(rows, columns) < lqer.rank or lqer.rank * columns % lqer.group:
            raise UserError(f"tensor {name}: shape {[rows, columns]} has no rank-{lqer.rank} correction in groups of {lqer.group}")
    return {n: Codes(tensors[n].codes, tensors[n].scales, _naming(n, lqer, source[n] - _values(tensors[n]))) for n in worst}


def _values(t: Codes) -> torch.Tensor:
    values = t.codes.float() * (t.scales.float()[:, None] if t.scales.dim() else t.scales.float())
    if t.low_rank:
        a = t.low_rank.a.float() * t.low_rank.a_scale.float()
        groups = t.low_rank.b.reshape(t.low_rank.b_scales.numel(), -1)
        b = (groups.float() * t.low_rank.b_scales.float()[:, None]).reshape(t.low_rank.b.shape)
        # NOTE: not a matrix product, whose order of summation depends on the machine.
        correction = a[:, :1] * b[:1]
        for k in range(1, a.shape[1]):
            correction += a[:, k : k + 1] * b[k : k + 1]
        values += correction
    return values


def _error(name, w, scheme, stored, num_clipped):
    values = _values(stored) if isinstance(stored, Codes) else stored.float()
    entropy = float(scheme.bits)
    if isinstance(stored, Codes):
        counts = torch.bincount(stored.codes.flatten().to(torch.int16) + 128).double()
        shares = counts[counts > 0] / stored.codes.numel()
        entropy = -(shares * shares.log2()).sum().item()
    num = max(1, w.numel())
    rmse = (torch.linalg.vector_norm(values - w, dtype=torch.float64) / num**0.5).item()
    label = type(scheme).__name__ + (" + Lqer" if isinstance(stored, Codes) and stored.low_rank else "")
    return TensorError(name, label, tuple(w.shape), rmse, num_clipped / num, scheme.bits, entropy + 0.0)
