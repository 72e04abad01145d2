"""The residual stream between matrix products: a per-channel mix of up to five tensors, and the RMSNorm of the mix.

    mixed  = sum_i c[rows[i]] * t_i                                   in float32, rounded once
    normed = norm_scale * rstd * mixed,   rstd = 1 / sqrt(mean(mixed^2) + 2^-23)   of the rounded mix

Residual, x0 and skip mixes are all this, with rows of coefficients; tensors that share a row share their gradient:

    d      = d_mixed + norm_scale * rstd * (d_normed - n * mean(n * d_normed)),   n = rstd * mixed
    dt_r   = c[r] * d + accumulate[r]            dc[r] = column sums of d * t_i over the tensors of row r
"""

import torch

from pgolf_fast.ops import _library
from pgolf_fast.ops._library import RMS_EPSILON, accumulation_dtype, aligned, library, require, require_device, require_dtype

MAX_TENSORS = 5
KERNEL_WIDTH = 512  # channels the kernels are built for; other widths take the formula
MAX_CTAS = 528  # kMixNormMaxCtas


def mix_norm_ref(tensors, coefficients=None, rows=None, norm_scale=1.0):
    """The definition, differentiable in any float dtype.  tensors [.., C], coefficients [g, C]"""
    dtype = tensors[0].dtype
    mixed = sum(tensors) if coefficients is None else sum(coefficients[r].to(dtype) * t for r, t in zip(rows, tensors))
    wide = mixed.to(accumulation_dtype(dtype))
    return mixed, (norm_scale * wide / torch.sqrt(wide.square().mean(-1, keepdim=True) + RMS_EPSILON)).to(dtype)


# tensors       1 to 5, [.., C] of one shape and dtype
# coefficients  [g, C] float32 (float64 for float64 tensors), or none: all ones, g = 1 and every entry of rows 0
# rows          each tensor's row of coefficients; every row from 0 to g - 1 occurs
# norm_scale    none: normed is not made, for a product that normalises as it multiplies, and is empty
# Returns mixed [.., C], normed [.., C], rstd [..] float32. One tensor without coefficients is its own mix: mixed is empty.
library.define(
    "mix_norm_fwd(Tensor[] tensors, Tensor? coefficients, int[] rows, float? norm_scale) -> (Tensor mixed, Tensor normed, Tensor rstd)"
)

# d_mixed, d_normed  [.., C], at least one of them
# mixed              the forward's (its tensor, where it had one without coefficients); read only with d_normed and without tensors
# rstd               the forward's; read only with d_normed
# tensors            the forward's if the coefficients' gradient is wanted (the mix is then made again); otherwise an empty list
# accumulate         one entry per coefficient row: [.., C] added before rounding, or none
# Returns one gradient [.., C] per coefficient row, and d_coefficients [g, C], empty without tensors.
library.define(
    "mix_norm_bwd(Tensor? d_mixed, Tensor? d_normed, Tensor? mixed, Tensor? rstd, Tensor[] tensors, Tensor? coefficients, int[] rows,"
    " float norm_scale, Tensor?[] accumulate) -> (Tensor[] gradients, Tensor d_coefficients)"
)


def _is_own_mix(tensors, coefficients):
    return coefficients is None and len(tensors) == 1


def _mix(tensors, coefficients, rows):
    wide = accumulation_dtype(tensors[0].dtype)
    if coefficients is None:
        return sum(t.to(wide) for t in tensors).to(tensors[0].dtype)
    return sum(coefficients[r] * t.to(wide) for r, t in zip(rows, tensors)).to(tensors[0].dtype)


def _forward_formula(tensors, coefficients, rows, norm_scale):
    mixed = _mix(tensors, coefficients, rows)
    wide = mixed.to(accumulation_dtype(mixed.dtype))
    rstd = torch.rsqrt(wide.square().mean(-1) + RMS_EPSILON)
    normed = mixed.new_empty(0) if norm_scale is None else (norm_scale * rstd[..., None] * wide).to(mixed.dtype)
    return mixed.new_empty(0) if _is_own_mix(tensors, coefficients) else mixed, normed, rstd


def _backward_formula(d_mixed, d_normed, mixed, rstd, tensors, coefficients, rows, norm_scale, accumulate):
    given = d_normed if d_mixed is None else d_mixed
    wide = accumulation_dtype(given.dtype)
    d = 0 if d_mixed is None else d_mixed.to(wide)
    if d_normed is not None:
        n = rstd[..., None] * (_mix(tensors, coefficients, rows) if tensors else mixed).to(wide)
        dn = d_normed.to(wide) * norm_scale * rstd[..., None]
        d = d + dn - n * (n * dn).mean(-1, keepdim=True)
    gradients = []
    for r, incoming in enumerate(accumulate):
        gradient = d if coefficients is None else coefficients[r] * d
        gradients.append((gradient if incoming is None else gradient + incoming.to(wide)).to(given.dtype))
    if not tensors:
        return gradients, d.new_empty(0)
    d_coefficients = torch.zeros_like(coefficients)
    for r, t in zip(rows, tensors):
        d_coefficients[r] += (d * t.to(wide)).flatten(0, -2).sum(0)
    return gradients, d_coefficients


library.impl("mix_norm_fwd", _forward_formula, "CPU")
library.impl("mix_norm_bwd", _backward_formula, "CPU")


def _kernel_serves(name, x):
    fits = x.dtype == torch.bfloat16 and x.shape[-1] == KERNEL_WIDTH and x.numel() > 0
    return fits and _library.uses_kernel(name, x.device)


def _as_matrix(x):
    return None if x is None else aligned(x.reshape(-1, KERNEL_WIDTH))


@torch.library.impl(library, "mix_norm_fwd", "CUDA")
def _fwd_cuda(tensors, coefficients, rows, norm_scale):
    x = tensors[0]
    if not _kernel_serves("mix_norm_fwd", x):
        return _forward_formula(tensors, coefficients, rows, norm_scale)
    matrices = [_as_matrix(t) for t in tensors]
    m = matrices[0].shape[0]
    mixed = None if _is_own_mix(tensors, coefficients) else x.new_empty(m, KERNEL_WIDTH)
    rstd = x.new_empty(m, dtype=torch.float32)
    normed = None if norm_scale is None else x.new_empty(m, KERNEL_WIDTH)
    coefficients = None if coefficients is None else aligned(coefficients)
    torch.ops.pgolf_fast_sm90.mix_norm_fwd(matrices, coefficients, rows, 1.0 if norm_scale is None else norm_scale, mixed, normed, rstd)
    return (
        x.new_empty(0) if mixed is None else mixed.view(x.shape),
        x.new_empty(0) if normed is None else normed.view(x.shape),
        rstd.view(x.shape[:-1]),
    )


@torch.library.impl(library, "mix_norm_bwd", "CUDA")
def _bwd_cuda(d_mixed, d_normed, mixed, rstd, tensors, coefficients, rows, norm_scale, accumulate):
    given = d_normed if d_mixed is None else d_mixed
    if not _kernel_serves("mix_norm_bwd", given):
        return _backward_formula(d_mixed, d_normed, mixed, rstd, tensors, coefficients, rows, norm_scale, accumulate)
    m = given.numel() // KERNEL_WIDTH
    gradients = [given.new_empty(m, KERNEL_WIDTH) for _ in accumulate]
    partial_sums = d_coefficients = None
    if tensors:
        partial_sums = coefficients.new_empty(MAX_CTAS, len(tensors), KERNEL_WIDTH)
        d_coefficients = torch.empty_like(coefficients, memory_format=torch.contiguous_format)
    torch.ops.pgolf_fast_sm90.mix_norm_bwd(
        _as_matrix(d_mixed), _as_matrix(d_normed),
        None if tensors or d_normed is None else _as_matrix(mixed),
        None if d_normed is None else rstd.reshape(-1).contiguous(),
        [_as_matrix(t) for t in tensors],
        None if coefficients is None else aligned(coefficients),
        rows, norm_scale,
        [given.new_empty(0) if incoming is None else _as_matrix(incoming) for incoming in accumulate],
        gradients, partial_sums, d_coefficients,
    )  # fmt: skip
    empty = given.new_empty(0, dtype=torch.float32)
    return [g.view(given.shape) for g in gradients], empty if d_coefficients is None else d_coefficients


@torch.library.register_fake(f"{_library.NAMESPACE}::mix_norm_fwd")
def _fwd_fake(tensors, coefficients, rows, norm_scale):
    x = tensors[0]
    wide = accumulation_dtype(x.dtype)
    return (
        x.new_empty(0 if _is_own_mix(tensors, coefficients) else x.shape),
        x.new_empty(0 if norm_scale is None else x.shape),
        x.new_empty(x.shape[:-1], dtype=wide),
    )


@torch.library.register_fake(f"{_library.NAMESPACE}::mix_norm_bwd")
def _bwd_fake(d_mixed, d_normed, mixed, rstd, tensors, coefficients, rows, norm_scale, accumulate):
    given = d_normed if d_mixed is None else d_mixed
    d_coefficients = coefficients.new_empty(coefficients.shape) if tensors else given.new_empty(0, dtype=accumulation_dtype(given.dtype))
    return [given.new_empty(given.shape) for _ in accumulate], d_coefficients


def _save(ctx, inputs, output):
    tensors, coefficients, ctx.rows, ctx.norm_scale = inputs
    mixed, normed, rstd = output
    ctx.set_materialize_grads(False)
    left_empty = ([mixed] if _is_own_mix(tensors, coefficients) else []) + ([normed] if ctx.norm_scale is None else [])
    ctx.mark_non_differentiable(rstd, *left_empty)
    ctx.wants_coefficients = coefficients is not None and coefficients.requires_grad
    if ctx.wants_coefficients:
        kept = list(tensors)
    else:
        kept = [None if ctx.norm_scale is None else tensors[0] if _is_own_mix(tensors, coefficients) else mixed]
    ctx.save_for_backward(coefficients, rstd, *kept)


def _backward(ctx, d_mixed, d_normed, _):
    coefficients, rstd, *kept = ctx.saved_tensors
    if d_mixed is None and d_normed is None:
        return [None] * len(ctx.rows), None, None, None
    tensors, mixed = (kept, None) if ctx.wants_coefficients else ([], kept[0])
    num_rows = 1 if coefficients is None else coefficients.shape[0]
    scale = 1.0 if ctx.norm_scale is None else ctx.norm_scale
    gradients, d_coefficients = torch.ops.pgolf_fast.mix_norm_bwd(
        d_mixed, d_normed, mixed, rstd, tensors, coefficients, ctx.rows, scale, [None] * num_rows
    )
    return [gradients[r] for r in ctx.rows], d_coefficients if ctx.wants_coefficients else None, None, None


torch.library.register_autograd(f"{_library.NAMESPACE}::mix_norm_fwd", _backward, setup_context=_save)


def mix_norm(tensors, coefficients=None, rows=None, norm_scale=1.0):
    """`mixed = sum_i coefficients[rows[i]] * tensors[i]` and `normed = norm_scale * rms_norm(mixed)`.

    tensors       1 to 5 of one shape [.., C] and float dtype; the kernel serves bfloat16 with C = 512
    coefficients  [g, C], float32 (float64 for float64 tensors); None: all ones
    rows          each tensor's row of coefficients, 0 to g - 1; None: 0, 1, 2, .. (all 0 without coefficients)
    norm_scale    None: no norm, and the second result is None
    Returns (mixed, normed) in the tensors' dtype; mixed is rounded once, and the norm is of the rounded mix. One tensor
    without coefficients comes back as mixed itself.
    """
    tensors = list(tensors)
    require(1 <= len(tensors) <= MAX_TENSORS, "tensors", f"expected 1 to {MAX_TENSORS}, got {len(tensors)}")
    x = tensors[0]
    require(x.dim() >= 1 and x.shape[-1] > 0, "tensors", f"expected [.., C], got shape {list(x.shape)}")
    require(x.is_floating_point(), "tensors", f"expected a float dtype, got {x.dtype}")
    for t in tensors[1:]:
        require(t.shape == x.shape, "tensors", f"expected all of shape {list(x.shape)}, got {list(t.shape)}")
        require_dtype(t, "tensors", (x.dtype,))
        require_device(t, "tensors", x.device)
    num_rows = 1
    if coefficients is not None:
        fits = coefficients.dim() == 2 and coefficients.shape[1] == x.shape[-1]
        require(fits, "coefficients", f"expected [g, {x.shape[-1]}], got shape {list(coefficients.shape)}")
        require_dtype(coefficients, "coefficients", (accumulation_dtype(x.dtype),))
        require_device(coefficients, "coefficients", x.device)
        num_rows = coefficients.shape[0]
    if rows is None:
        rows = range(len(tensors)) if coefficients is not None else [0] * len(tensors)
    rows = list(rows)
    require(len(rows) == len(tensors), "rows", f"expected one per tensor, {len(tensors)}, got {len(rows)}")
    require(set(rows) == set(range(num_rows)), "rows", f"expected each of 0 to {num_rows - 1} at least once and no other, got {rows}")
    mixed, normed, _ = torch.ops.pgolf_fast.mix_norm_fwd(tensors, coefficients, rows, norm_scale)
    return x if _is_own_mix(tensors, coefficients) else mixed, None if norm_scale is None else normed


def row_rstd(x):
    """1 / sqrt(mean(row^2) + 2^-23) of the rows of x, for a product that normalises as it multiplies."""
    return torch.ops.pgolf_fast.mix_norm_fwd([x], None, [0], None)[2]
