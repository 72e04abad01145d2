"""From the packed product of the attention's input matrices to what attention reads.

    n = x / sqrt(mean(x^2) + 2^-23)                  of each query and key head
    y = n with its leading dimensions rotated: (a, b) -> (a cos + b sin, b cos - a sin), dimension i with i + half
    q = gain[head] * y,    k = y,    v = x + value_add

in float32, rounded once. With t = R^T dq, R the rotation:

    dgain[head] = sum of n . t          dx = gain * rstd * (t - n * mean(n * t))

Nothing but the packed product is kept for the backward.
"""

import torch

from pgolf_fast.ops import _library
from pgolf_fast.ops._library import accumulation_dtype, library, require, require_device, require_dtype

EPSILON = 2.0**-23
KERNEL_HEAD_DIM, KERNEL_HALF = 64, 8  # the kernel's: 16 of 64 dimensions rotate
MAX_HEADS = 24  # kQkMaxHeads
MAX_CTAS = 1056  # kQkMaxCtas


def qk_norm_rope_ref(qkv, gain, cos, sin, num_kv_heads, head_dim=64, value_add=None):
    """The definition, differentiable in any float dtype.  qkv [M, W], gain [Hq], cos and sin [T, half]"""
    num_heads, m = gain.shape[0], qkv.shape[0]
    q, k, v, _ = _split(qkv, num_heads, num_kv_heads, head_dim)
    half = cos.shape[1]
    position = torch.arange(m, device=qkv.device) % cos.shape[0]
    c, s = cos[position, None].to(qkv.dtype), sin[position, None].to(qkv.dtype)

    def rotated(x):
        x = torch.nn.functional.rms_norm(x.unflatten(-1, (-1, head_dim)), (head_dim,), eps=EPSILON)
        a, b, rest = x.split([half, half, head_dim - 2 * half], dim=-1)
        return torch.cat([a * c + b * s, b * c - a * s, rest], dim=-1)

    v = v if value_add is None else v + value_add
    return (gain.to(qkv.dtype)[:, None] * rotated(q)).flatten(1), rotated(k).flatten(1), v


# qkv        [M, >= (Hq + 2 Hk) D]: queries, keys, values, and columns that are not read; rows any distance apart
# gain       [Hq] float32 (float64 for float64 qkv);  cos, sin [T, half], the dtype of qkv: row m has position m mod T
# value_add  [M, Hk D] or none
# Returns q [M, Hq D], k [M, Hk D], v [M, Hk D]; without value_add v is empty: the values of qkv are themselves.
library.define(
    "qk_norm_rope_fwd(Tensor qkv, Tensor gain, Tensor cos, Tensor sin, int num_kv_heads, int head_dim, Tensor? value_add)"
    " -> (Tensor q, Tensor k, Tensor v)"
)

# Writes the gradients of the queries and keys into their columns of d_qkv, of qkv's width, and dv into the values' if it is given;
# other columns are left alone. dq, dk and dv may be those very columns of d_qkv. The gradient of value_add is dv itself.
# Returns d_gain [Hq].
library.define(
    "qk_norm_rope_bwd_(Tensor(a!) d_qkv, Tensor dq, Tensor dk, Tensor? dv, Tensor qkv, Tensor gain, Tensor cos, Tensor sin,"
    " int num_kv_heads, int head_dim) -> Tensor"
)


def _split(packed, num_heads, num_kv_heads, head_dim):
    """Columns of queries, keys and values, and the rest."""
    widths = [head_dim * num_heads, head_dim * num_kv_heads, head_dim * num_kv_heads]
    return packed.split([*widths, packed.shape[1] - sum(widths)], dim=1)


def _normalised(x, head_dim):
    """n and rstd of [M, H, D], in the arithmetic's dtype."""
    x = x.unflatten(-1, (-1, head_dim)).to(accumulation_dtype(x.dtype))
    rstd = torch.rsqrt(x.square().mean(-1, keepdim=True) + EPSILON)
    return x * rstd, rstd


def _rotated(x, cos, sin, transpose=False):
    """x [M, H, D] by the positions of its rows."""
    half = cos.shape[1]
    position = torch.arange(x.shape[0], device=x.device) % cos.shape[0]
    c, s = cos[position, None].to(x.dtype), sin[position, None].to(x.dtype)
    a, b, rest = x.split([half, half, x.shape[-1] - 2 * half], dim=-1)
    s = -s if transpose else s
    return torch.cat([a * c + b * s, b * c - a * s, rest], dim=-1)


def _forward_formula(qkv, gain, cos, sin, num_kv_heads, head_dim, value_add):
    q, k, v, _ = _split(qkv, gain.shape[0], num_kv_heads, head_dim)
    q, k = (_rotated(_normalised(x, head_dim)[0], cos, sin) for x in (q, k))
    v = qkv.new_empty(0) if value_add is None else v + value_add
    return (gain[:, None] * q).flatten(1).to(qkv.dtype), k.flatten(1).to(qkv.dtype), v


def _backward_formula(d_qkv, dq, dk, dv, qkv, gain, cos, sin, num_kv_heads, head_dim):
    q, k, _, _ = _split(qkv, gain.shape[0], num_kv_heads, head_dim)
    into_q, into_k, into_v, _ = _split(d_qkv, gain.shape[0], num_kv_heads, head_dim)

    def through(x, d, factor):
        n, rstd = _normalised(x, head_dim)
        t = _rotated(d.unflatten(-1, (-1, head_dim)).to(n.dtype), cos, sin, transpose=True)
        along = n * t
        return along, (factor * rstd * (t - n * along.mean(-1, keepdim=True))).flatten(1).to(d_qkv.dtype)

    along, result_q = through(q, dq, gain[:, None])
    into_q.copy_(result_q)
    into_k.copy_(through(k, dk, 1.0)[1])
    if dv is not None:
        into_v.copy_(dv)
    return along.sum((0, 2))


library.impl("qk_norm_rope_fwd", _forward_formula, "CPU")
library.impl("qk_norm_rope_bwd_", _backward_formula, "CPU")


def _kernel_serves(name, qkv, gain, cos, num_kv_heads, head_dim):
    heads = gain.shape[0] + 2 * num_kv_heads
    shapes_fit = (head_dim, cos.shape[1]) == (KERNEL_HEAD_DIM, KERNEL_HALF) and heads <= MAX_HEADS and qkv.shape[0] > 0
    return shapes_fit and qkv.dtype == torch.bfloat16 and _library.uses_kernel(name, qkv.device)


def _has_kernel_rows(x):
    return x.stride(1) == 1 and (x.shape[0] == 1 or (x.stride(0) % 8 == 0 and x.stride(0) > 0)) and x.data_ptr() % 16 == 0


def _kernel_rows(x, width=None):
    """The first `width` columns (None: all), in place, or copied where strides or address forbid the kernel's 16-byte accesses."""
    return x if x is None or _has_kernel_rows(x) else x[:, :width].clone(memory_format=torch.contiguous_format)


@torch.library.impl(library, "qk_norm_rope_fwd", "CUDA")
def _fwd_cuda(qkv, gain, cos, sin, num_kv_heads, head_dim, value_add):
    if not _kernel_serves("qk_norm_rope_fwd", qkv, gain, cos, num_kv_heads, head_dim):
        return _forward_formula(qkv, gain, cos, sin, num_kv_heads, head_dim, value_add)
    m, width = qkv.shape[0], (gain.shape[0] + 2 * num_kv_heads) * head_dim
    q, k = qkv.new_empty(m, gain.shape[0] * head_dim), qkv.new_empty(m, num_kv_heads * head_dim)
    v = None if value_add is None else torch.empty_like(k)
    torch.ops.pgolf_fast_sm90.qk_norm_rope_fwd(
        _kernel_rows(qkv, width), gain.contiguous(), cos.contiguous(), sin.contiguous(), num_kv_heads, _kernel_rows(value_add), q, k, v
    )
    return q, k, qkv.new_empty(0) if v is None else v


@torch.library.impl(library, "qk_norm_rope_bwd_", "CUDA")
def _bwd_cuda(d_qkv, dq, dk, dv, qkv, gain, cos, sin, num_kv_heads, head_dim):
    if not _kernel_serves("qk_norm_rope_bwd", qkv, gain, cos, num_kv_heads, head_dim) or not _has_kernel_rows(d_qkv):
        return _backward_formula(d_qkv, dq, dk, dv, qkv, gain, cos, sin, num_kv_heads, head_dim)
    width = (gain.shape[0] + 2 * num_kv_heads) * head_dim
    d_gain = torch.empty_like(gain, memory_format=torch.contiguous_format)
    torch.ops.pgolf_fast_sm90.qk_norm_rope_bwd(
        _kernel_rows(dq), _kernel_rows(dk), _kernel_rows(dv), _kernel_rows(qkv, width),
        gain.contiguous(), cos.contiguous(), sin.contiguous(), num_kv_heads, d_qkv, gain.new_empty(MAX_CTAS, gain.shape[0]), d_gain,
    )  # fmt: skip
    return d_gain


@torch.library.register_fake(f"{_library.NAMESPACE}::qk_norm_rope_fwd")
def _fwd_fake(qkv, gain, cos, sin, num_kv_heads, head_dim, value_add):
    m = qkv.shape[0]
    kv = (m, num_kv_heads * head_dim)
    return qkv.new_empty(m, gain.shape[0] * head_dim), qkv.new_empty(kv), qkv.new_empty(0 if value_add is None else kv)


@torch.library.register_fake(f"{_library.NAMESPACE}::qk_norm_rope_bwd_")
def _bwd_fake(d_qkv, dq, dk, dv, qkv, gain, cos, sin, num_kv_heads, head_dim):
    return gain.new_empty(gain.shape)


def _save(ctx, inputs, output):
    qkv, gain, cos, sin, ctx.num_kv_heads, ctx.head_dim, value_add = inputs
    ctx.with_values = value_add is not None
    if not ctx.with_values:
        ctx.mark_non_differentiable(output[2])
    ctx.save_for_backward(qkv, gain, cos, sin)


def _backward(ctx, dq, dk, dv):
    qkv, gain, cos, sin = ctx.saved_tensors
    if not ctx.with_values:
        dv = None
    d_qkv = qkv.new_zeros(qkv.shape)  # columns that this op does not read
    d_gain = torch.ops.pgolf_fast.qk_norm_rope_bwd_(d_qkv, dq, dk, dv, qkv, gain, cos, sin, ctx.num_kv_heads, ctx.head_dim)
    return d_qkv, d_gain, None, None, None, None, dv


torch.library.register_autograd(f"{_library.NAMESPACE}::qk_norm_rope_fwd", _backward, setup_context=_save)


def qk_norm_rope(qkv, gain, cos, sin, num_kv_heads, head_dim=64, value_add=None):
    """Normalised, rotated queries and keys, and the values, from the packed product `qkv`.

    qkv           [M, W], float, W >= (Hq + 2 Hk) D: queries, keys, values, then columns that are not read. A slice of a wider
                  matrix is fine. The kernel serves bfloat16, D = 64, half = 8 and up to 24 heads in all
    gain          [Hq], float32 (float64 for float64 qkv)
    cos, sin      [T, half], the dtype of qkv; row m has position m mod T; 2 half leading dimensions rotate
    num_kv_heads  Hk
    value_add     [M, Hk D], the dtype of qkv, added to the values; None: v is a view of qkv
    Returns q [M, Hq D], k [M, Hk D], v [M, Hk D].
    """
    require(qkv.dim() == 2, "qkv", f"expected [M, W], got shape {list(qkv.shape)}")
    require(qkv.is_floating_point(), "qkv", f"expected a float dtype, got {qkv.dtype}")
    require(gain.dim() == 1 and gain.shape[0] > 0, "gain", f"expected [Hq], got shape {list(gain.shape)}")
    require_dtype(gain, "gain", (accumulation_dtype(qkv.dtype),))
    require_device(gain, "gain", qkv.device)
    require(num_kv_heads > 0, "num_kv_heads", f"expected at least 1, got {num_kv_heads}")
    needed = (gain.shape[0] + 2 * num_kv_heads) * head_dim
    require(qkv.shape[1] >= needed, "qkv", f"expected at least {needed} columns, got {qkv.shape[1]}")
    fits = cos.dim() == 2 and cos.shape[0] > 0 and 2 * cos.shape[1] <= head_dim
    require(fits, "cos", f"expected [T, <= {head_dim // 2}], got shape {list(cos.shape)}")
    require(sin.shape == cos.shape, "sin", f"expected the shape of cos, {list(cos.shape)}, got {list(sin.shape)}")
    for tensor, argument in ((cos, "cos"), (sin, "sin"), *(((value_add, "value_add"),) if value_add is not None else ())):
        require_dtype(tensor, argument, (qkv.dtype,))
        require_device(tensor, argument, qkv.device)
    if value_add is not None:
        kv = [qkv.shape[0], num_kv_heads * head_dim]
        require(list(value_add.shape) == kv, "value_add", f"expected {kv}, got shape {list(value_add.shape)}")
    q, k, v = torch.ops.pgolf_fast.qk_norm_rope_fwd(qkv, gain, cos, sin, num_kv_heads, head_dim, value_add)
    return q, k, _split(qkv, gain.shape[0], num_kv_heads, head_dim)[2] if value_add is None else v
