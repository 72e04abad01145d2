"""Queries, keys and values in one product, the first two normalised and rotated. For backwards written by hand: not differentiable itself.

    raw = n weight^T                                      [M, (Hq + 2 Hk) D]: queries, keys, values
    q   = gain R(rstd raw_q)    k = R(rstd raw_k)         per head, rstd = 1 / sqrt(mean(raw^2) + 2^-23)    v = raw_v

R rotates dimension i of a head with i + half. It keeps products, so the backward reads what the forward wrote and rstd: with d
the gradient of q (or k, whose gain is 1),

    draw = rstd R^T(gain d - q (q . d) / (D gain))        dgain = sum of (q . d) / gain        (0 where the gain is exactly 0)
"""

import torch

from pgolf_fast.ops import _library
from pgolf_fast.ops._library import RMS_EPSILON, accumulation_dtype, library

HEAD_DIM, ROTATED = 64, 16  # of the kernel
MAX_HEADS = 32  # kQkvMaxHeads

# n [M, C], weight [(Hq + 2 Hk) D, C], gain [Hq] in the accumulation dtype, cos and sin [positions, half]; row r is at position
# r % positions.
# qkv [M, (Hq + 2 Hk) D], rstd [M, Hq + Hk] in the accumulation dtype
library.define("qkv_forward(Tensor n, Tensor weight, Tensor gain, Tensor cos, Tensor sin, int kv_heads) -> (Tensor qkv, Tensor rstd)")
# The same of a product that is made already, in place: of raw [M, (Hq + 2 Hk) D]. Returns rstd.
library.define("qkv_normalize(Tensor(a!) qkv, Tensor gain, Tensor cos, Tensor sin, int kv_heads) -> Tensor")
# dqkv holds the gradients of q, k and v, and afterwards that of raw; dgain is added to.
library.define("qkv_backward(Tensor(a!) dqkv, Tensor qkv, Tensor rstd, Tensor gain, Tensor cos, Tensor sin, Tensor(b!) dgain) -> ()")


def qkv_ref(n, weight, gain, cos, sin, kv_heads):
    """The definition, differentiable."""
    heads = (n @ weight.T).unflatten(-1, (gain.shape[0] + 2 * kv_heads, -1))
    q, k, v = heads.split([gain.shape[0], kv_heads, kv_heads], dim=1)
    positions = torch.arange(n.shape[0], device=n.device) % cos.shape[0]
    cos, sin = cos[positions][:, None], sin[positions][:, None]
    q, k = (_rotated(x * torch.rsqrt(x.square().mean(-1, keepdim=True) + RMS_EPSILON), cos, sin) for x in (q, k))
    return torch.cat([gain[:, None] * q, k, v], dim=1).flatten(1)


def _rotated(x, cos, sin):
    half = cos.shape[-1]
    a, b, rest = x.split([half, half, x.shape[-1] - 2 * half], dim=-1)
    return torch.cat([a * cos + b * sin, b * cos - a * sin, rest], dim=-1)


def _tables(cos, sin, num_rows, dtype):
    positions = torch.arange(num_rows, device=cos.device) % cos.shape[0]
    return cos[positions][:, None].to(dtype), sin[positions][:, None].to(dtype)


def _all_gains(gain, kv_heads):
    """[Hq + Hk, 1]"""
    return torch.cat([gain, gain.new_ones(kv_heads)])[:, None]


def _forward_formula(n, weight, gain, cos, sin, kv_heads):
    qkv = n @ weight.T
    return qkv, _normalize_formula(qkv, gain, cos, sin, kv_heads)


def _normalize_formula(qkv, gain, cos, sin, kv_heads):
    wide, normed = accumulation_dtype(qkv.dtype), gain.shape[0] + kv_heads
    qk = qkv.to(wide).unflatten(-1, (normed + kv_heads, -1))[:, :normed]
    rstd = torch.rsqrt(qk.square().mean(-1) + RMS_EPSILON)
    qk = _all_gains(gain, kv_heads) * _rotated(rstd[..., None] * qk, *_tables(cos, sin, qkv.shape[0], wide))
    qkv[:, : normed * qk.shape[-1]] = qk.flatten(1)
    return rstd


def _backward_formula(dqkv, qkv, rstd, gain, cos, sin, dgain):
    wide, normed = accumulation_dtype(qkv.dtype), rstd.shape[1]
    gains = _all_gains(gain, normed - gain.shape[0])
    d, qk = (t.to(wide).unflatten(-1, (2 * normed - gain.shape[0], -1))[:, :normed] for t in (dqkv, qkv))
    along = (d * qk).sum(-1, keepdim=True) * torch.where(gains != 0, 1 / gains, 0)
    dgain += along[:, : gain.shape[0], 0].sum(0)
    cos, sin = _tables(cos, sin, qkv.shape[0], wide)
    draw = rstd[..., None] * _rotated(gains * d - qk * along / qk.shape[-1], cos, -sin)
    dqkv[:, : normed * draw.shape[-1]] = draw.flatten(1)


library.impl("qkv_forward", _forward_formula, "CPU")
library.impl("qkv_normalize", _normalize_formula, "CPU")
library.impl("qkv_backward", _backward_formula, "CPU")


def kernel_fits(head_dim, rotated):
    return head_dim == HEAD_DIM and rotated == ROTATED


def _kernel_serves(name, qkv_width, heads, cos, normed_heads=0):
    fits = kernel_fits(qkv_width // heads, 2 * cos.shape[1]) and normed_heads <= MAX_HEADS
    return fits and _library.uses_kernel(name, cos.device)


@torch.library.impl(library, "qkv_forward", "CUDA")
def _forward_cuda(n, weight, gain, cos, sin, kv_heads):
    if not _kernel_serves("qkv_forward", weight.shape[0], gain.shape[0] + 2 * kv_heads, cos):
        return _forward_formula(n, weight, gain, cos, sin, kv_heads)
    qkv = n.new_empty(n.shape[0], weight.shape[0])
    rstd = gain.new_empty(n.shape[0], gain.shape[0] + kv_heads)
    torch.ops.pgolf_fast_sm90.qkv_forward(n, weight, gain, cos, sin, kv_heads, qkv, rstd)
    return qkv, rstd


@torch.library.impl(library, "qkv_normalize", "CUDA")
def _normalize_cuda(qkv, gain, cos, sin, kv_heads):
    normed = gain.shape[0] + kv_heads
    if not _kernel_serves("qkv_normalize", qkv.shape[1], normed + kv_heads, cos, normed):
        return _normalize_formula(qkv, gain, cos, sin, kv_heads)
    rstd = gain.new_empty(qkv.shape[0], normed)
    torch.ops.pgolf_fast_sm90.qkv_normalize(qkv, gain, cos, sin, kv_heads, rstd)
    return rstd


@torch.library.impl(library, "qkv_backward", "CUDA")
def _backward_cuda(dqkv, qkv, rstd, gain, cos, sin, dgain):
    normed = rstd.shape[1]
    if not _kernel_serves("qkv_backward", qkv.shape[1], 2 * normed - gain.shape[0], cos, normed):
        return _backward_formula(dqkv, qkv, rstd, gain, cos, sin, dgain)
    torch.ops.pgolf_fast_sm90.qkv_backward(dqkv, qkv, rstd, gain, cos, sin, dgain)


@torch.library.register_fake(f"{_library.NAMESPACE}::qkv_forward")
def _forward_fake(n, weight, gain, cos, sin, kv_heads):
    return n.new_empty(n.shape[0], weight.shape[0]), gain.new_empty(n.shape[0], gain.shape[0] + kv_heads)


@torch.library.register_fake(f"{_library.NAMESPACE}::qkv_normalize")
def _normalize_fake(qkv, gain, cos, sin, kv_heads):
    return gain.new_empty(qkv.shape[0], gain.shape[0] + kv_heads)


@torch.library.register_fake(f"{_library.NAMESPACE}::qkv_backward")
def _backward_fake(dqkv, qkv, rstd, gain, cos, sin, dgain):
    pass
