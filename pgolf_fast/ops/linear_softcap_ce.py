"""Output head and softcapped cross-entropy in one: logits = x weight^T, then `softcap_cross_entropy`.

The kernel never writes the logits. For the backward it keeps G, row_scale and scaled_x = row_scale * x with

    d loss / d logits = row_scale[:, None] * G        so        dx = row_scale * (G weight)        dweight = G^T scaled_x

G is stored before a row's sum of exponentials is known; csrc/kernels/linear_softcap_ce.h says why that is safe.
"""

import torch

from pgolf_fast.ops import _library
from pgolf_fast.ops._library import aligned, library, require, require_device, require_dtype
from pgolf_fast.ops.softcap_ce import REDUCTIONS, WORKSPACE_BYTES, _forward_formula, softcap_cross_entropy, softcap_cross_entropy_ref

KERNEL_DEPTH = 512
KERNEL_VOCABULARY_MULTIPLE = 256
KERNEL_MIN_VOCABULARY = 1024
KERNEL_MAX_CAP = 64.0


def linear_softcap_cross_entropy_ref(x, weight, targets, cap=30.0, reduction="mean", ignore_index=-100):
    """The definition.  x [N, D], weight [V, D], targets [N]"""
    return softcap_cross_entropy_ref(x @ weight.T, targets, cap, reduction, ignore_index)


# `reduction` is an index into REDUCTIONS. Without `with_grad`, all but the loss are empty.  g [N, V], row_scale [N], scaled_x [N, D]
library.define(
    "linear_softcap_ce_fwd(Tensor x, Tensor weight, Tensor targets, float cap, int reduction, int ignore_index, bool with_grad)"
    " -> (Tensor loss, Tensor g, Tensor row_scale, Tensor scaled_x)"
)
library.define(
    "linear_softcap_ce_bwd(Tensor grad_loss, Tensor weight, Tensor g, Tensor row_scale, Tensor scaled_x) -> (Tensor dx, Tensor dweight)"
)


@torch.library.impl(library, "linear_softcap_ce_fwd", "CPU")
def _fwd_cpu(x, weight, targets, cap, reduction, ignore_index, with_grad):
    loss, g = _forward_formula(x @ weight.T, targets, cap, reduction, ignore_index, with_grad)
    return loss, g, loss.new_ones(x.shape[0] if with_grad else 0), x.clone() if with_grad else x.new_empty(0)


@torch.library.impl(library, "linear_softcap_ce_bwd", "CPU")
def _bwd_cpu(grad_loss, weight, g, row_scale, scaled_x):
    dx = (g @ weight) * (row_scale * grad_loss)[:, None]
    return dx.to(weight.dtype), _dweight(grad_loss, g, scaled_x)


def _dweight(grad_loss, g, scaled_x):
    if grad_loss.dim():  # a gradient for each row
        return g.T @ (scaled_x * grad_loss[:, None]).to(g.dtype)
    return (g.T @ scaled_x).mul_(grad_loss)


@torch.library.impl(library, "linear_softcap_ce_fwd", "CUDA")
def _fwd_cuda(x, weight, targets, cap, reduction, ignore_index, with_grad):
    _library.check_device_errors()
    n, v = x.shape[0], weight.shape[0]
    loss = x.new_empty((n,) if REDUCTIONS[reduction] == "none" else (), dtype=torch.float32)
    g = x.new_empty((n, v) if with_grad else 0)
    row_scale = x.new_empty(n if with_grad else 0, dtype=torch.float32)
    scaled_x = x.new_empty(x.shape if with_grad else 0)
    workspace = x.new_empty(WORKSPACE_BYTES, dtype=torch.uint8)
    torch.ops.pgolf_fast_sm90.linear_softcap_ce_fwd(
        aligned(x), aligned(weight), targets.contiguous(), loss, g, row_scale, scaled_x, workspace,
        _library.device_report("targets"), cap, reduction, ignore_index,
    )  # fmt: skip
    return loss, g, row_scale, scaled_x


@torch.library.impl(library, "linear_softcap_ce_bwd", "CUDA")
def _bwd_cuda(grad_loss, weight, g, row_scale, scaled_x):
    dx = torch.empty_like(scaled_x)
    torch.ops.pgolf_fast_sm90.linear_softcap_ce_dx(g, aligned(weight), row_scale, grad_loss, dx)
    return dx, _dweight(grad_loss, g, scaled_x)


@torch.library.register_fake(f"{_library.NAMESPACE}::linear_softcap_ce_fwd")
def _fwd_fake(x, weight, targets, cap, reduction, ignore_index, with_grad):
    n, v = x.shape[0], weight.shape[0]
    loss = x.new_empty((n,) if REDUCTIONS[reduction] == "none" else (), dtype=_library.accumulation_dtype(x.dtype))
    g, scaled_x = x.new_empty((n, v) if with_grad else 0), x.new_empty(x.shape if with_grad else 0)
    return loss, g, loss.new_empty(n if with_grad else 0), scaled_x


@torch.library.register_fake(f"{_library.NAMESPACE}::linear_softcap_ce_bwd")
def _bwd_fake(grad_loss, weight, g, row_scale, scaled_x):
    return scaled_x.new_empty(scaled_x.shape), weight.new_empty(weight.shape)


def _save(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(inputs[1], *output[1:])


def _backward(ctx, grad_loss, *_):
    weight, g, row_scale, scaled_x = ctx.saved_tensors
    if grad_loss is None or g.dim() != 2:
        return (None,) * 7
    return *torch.ops.pgolf_fast.linear_softcap_ce_bwd(grad_loss, weight, g, row_scale, scaled_x), None, None, None, None, None


torch.library.register_autograd(f"{_library.NAMESPACE}::linear_softcap_ce_fwd", _backward, setup_context=_save)


def fits_kernel(x, weight, cap):
    """Whether the fused kernel takes these; else the logits are materialised for `softcap_cross_entropy`."""
    shapes_fit = x.shape[0] > 0 and x.shape[1] == KERNEL_DEPTH
    shapes_fit = shapes_fit and weight.shape[0] >= KERNEL_MIN_VOCABULARY and weight.shape[0] % KERNEL_VOCABULARY_MULTIPLE == 0
    return (
        x.is_cuda and x.dtype == torch.bfloat16 and shapes_fit and cap <= KERNEL_MAX_CAP
        and _library.uses_kernel("linear_softcap_ce_fwd", x.device)
    )  # fmt: skip


def linear_softcap_cross_entropy(x, weight, targets, cap=30.0, reduction="mean", ignore_index=-100):
    """Softcapped cross-entropy of the head `x @ weight.T`.

    x        [N, D], float; fused on the kernel path: bfloat16, D = 512, V a multiple of 256 from 1024 on, cap up to 64
    weight   [V, D], the dtype of x
    targets  [N], int64, each in [0, V) or `ignore_index`
    Returns what `softcap_cross_entropy` returns. An ignored row must still hold finite numbers.
    """
    require(x.dim() == 2, "x", f"expected [N, D], got shape {list(x.shape)}")
    require(x.is_floating_point(), "x", f"expected a float dtype, got {x.dtype}")
    require(weight.dim() == 2 and weight.shape[1] == x.shape[1], "weight", f"expected [V, {x.shape[1]}], got shape {list(weight.shape)}")
    require_dtype(weight, "weight", (x.dtype,))
    require_device(weight, "weight", x.device)
    if not fits_kernel(x, weight, cap):
        return softcap_cross_entropy(x @ weight.T, targets, cap, reduction, ignore_index)
    require(targets.shape == x.shape[:1], "targets", f"expected shape [{x.shape[0]}], got {list(targets.shape)}")
    require_dtype(targets, "targets", (torch.int64,))
    require_device(targets, "targets", x.device)
    require(cap > 0, "cap", f"expected > 0, got {cap}")
    require(reduction in REDUCTIONS, "reduction", f"expected one of {', '.join(REDUCTIONS)}, got {reduction!r}")
    with_grad = (x.requires_grad or weight.requires_grad) and torch.is_grad_enabled()
    loss, *_ = torch.ops.pgolf_fast.linear_softcap_ce_fwd(x, weight, targets, cap, REDUCTIONS.index(reduction), ignore_index, with_grad)
    return loss
