"""Softcapped cross-entropy on logits.

    z = cap * tanh(x / cap)          loss_i = logsumexp_j(z_ij) - z_i,target
    dx_ij = (softmax(z)_ij - [j = target]) * (1 - tanh(x_ij / cap)^2)

The gradient is made in the forward, while the row is on chip: one read and one
write of [N, V] serve both directions. The backward multiplies it by the
incoming gradient, and skips that pass where the incoming gradient is 1.
"""

import importlib.util
import math

import torch

from pgolf_fast.ops import _library
from pgolf_fast.ops._library import accumulation_dtype, library, require, require_device, require_dtype

REDUCTIONS = ("none", "mean", "sum")
WORKSPACE_BYTES = 17160  # sizeof(SoftcapCEWorkspace)


def softcap_cross_entropy_ref(logits, targets, cap=30.0, reduction="mean", ignore_index=-100):
    """The definition, differentiable in any float dtype.  logits [N, V], targets [N]"""
    z = cap * torch.tanh(logits.to(accumulation_dtype(logits.dtype)) / cap)
    kept = targets != ignore_index
    picked = z.gather(1, torch.where(kept, targets, 0)[:, None])[:, 0]
    loss = torch.where(kept, torch.logsumexp(z, dim=1) - picked, 0.0)
    if reduction == "none":
        return loss
    return loss.sum() / kept.sum() if reduction == "mean" else loss.sum()


# `reduction` is an index into REDUCTIONS. With `with_grad` the second result is
# d(reduced loss)/d(logits) in the logits' dtype, else it is empty.
library.define(
    "softcap_ce_fwd(Tensor logits, Tensor targets, float cap, int reduction, int ignore_index, bool with_grad)"
    " -> (Tensor loss, Tensor grad_logits)"
)
library.define("softcap_ce_scale_(Tensor(a!) grad_logits, Tensor scale) -> ()")


def _forward_formula(logits, targets, cap, reduction, ignore_index, with_grad):
    """Forward and explicit gradient in plain torch."""
    x = logits.to(accumulation_dtype(logits.dtype))
    t = torch.tanh(x / cap)
    z = cap * t
    kept = targets != ignore_index
    index = torch.where(kept, targets, 0)[:, None]
    lse = torch.logsumexp(z, dim=1)
    loss = torch.where(kept, lse - z.gather(1, index)[:, 0], 0.0)
    weight = kept.to(x.dtype)
    if REDUCTIONS[reduction] == "mean":
        weight = weight / kept.sum()
    if with_grad:
        p = torch.exp(z - lse[:, None])
        p.scatter_add_(1, index, torch.full_like(index, -1, dtype=p.dtype))
        grad = torch.where(kept[:, None], p * (1 - t * t) * weight[:, None], 0.0).to(logits.dtype).contiguous()
    else:
        grad = logits.new_empty(0)
    if REDUCTIONS[reduction] == "mean":
        loss = loss.sum() / kept.sum()
    elif REDUCTIONS[reduction] == "sum":
        loss = loss.sum()
    return loss, grad


@torch.library.impl(library, "softcap_ce_fwd", "CPU")
def _fwd_cpu(logits, targets, cap, reduction, ignore_index, with_grad):
    valid = (targets == ignore_index) | ((targets >= 0) & (targets < logits.shape[1]))
    if not bool(valid.all()):
        row = int((~valid).nonzero()[0])
        raise IndexError(f"targets: row {row} holds {int(targets[row])}, outside [0, {logits.shape[1]})")
    return _forward_formula(logits, targets, cap, reduction, ignore_index, with_grad)


@torch.library.impl(library, "softcap_ce_fwd", "CUDA")
def _fwd_cuda(logits, targets, cap, reduction, ignore_index, with_grad):
    if not _library.uses_kernel("softcap_ce_fwd", logits.device):
        if logits.dtype == torch.float64 or importlib.util.find_spec("triton") is None:
            return _forward_formula(logits, targets, cap, reduction, ignore_index, with_grad)
        from pgolf_fast.ops.softcap_ce_triton import softcap_ce_triton

        return softcap_ce_triton(logits, targets, cap, REDUCTIONS[reduction], ignore_index, with_grad)
    if logits.dtype != torch.bfloat16:
        raise TypeError(f"logits: the kernel takes bfloat16, got {logits.dtype}; pass logits.bfloat16()")
    _library.check_device_errors()
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    loss = logits.new_empty(logits.shape[:1] if REDUCTIONS[reduction] == "none" else (), dtype=torch.float32)
    grad = logits.new_empty(logits.shape if with_grad else 0)
    workspace = logits.new_empty(WORKSPACE_BYTES, dtype=torch.uint8)
    report = _library.device_report("targets")
    torch.ops.pgolf_fast_sm90.softcap_ce_fwd(logits, targets.contiguous(), loss, grad, workspace, report, cap, reduction, ignore_index)
    return loss, grad


@torch.library.register_fake(f"{_library.NAMESPACE}::softcap_ce_fwd")
def _fwd_fake(logits, targets, cap, reduction, ignore_index, with_grad):
    shape = (logits.shape[0],) if REDUCTIONS[reduction] == "none" else ()
    loss = logits.new_empty(shape, dtype=accumulation_dtype(logits.dtype))
    return loss, logits.new_empty(logits.shape if with_grad else 0)


@torch.library.impl(library, "softcap_ce_scale_", "CPU")
def _scale_cpu(grad_logits, scale):
    grad_logits.mul_(scale.to(accumulation_dtype(grad_logits.dtype)) if scale.dim() == 0 else scale[:, None])


@torch.library.impl(library, "softcap_ce_scale_", "CUDA")
def _scale_cuda(grad_logits, scale):
    if _library.uses_kernel("softcap_ce_scale_", grad_logits.device):
        torch.ops.pgolf_fast_sm90.softcap_ce_scale_(grad_logits, scale)
    else:
        _scale_cpu(grad_logits, scale)


def _save_gradient(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1])


def _backward(ctx, grad_loss, _):
    (grad_logits,) = ctx.saved_tensors
    if grad_loss is None or grad_logits.dim() != 2:
        return (None,) * 6
    if grad_logits.is_cuda and type(grad_logits) is torch.Tensor:  # not while a compiler traces, with a subclass
        # NOTE: in place, and autograd is told, so that its version check refuses a second backward through the same
        # graph (retain_graph), which would scale twice.
        torch.ops.pgolf_fast.softcap_ce_scale_(grad_logits, grad_loss)
        torch.autograd.graph.increment_version(grad_logits)
    else:
        scale = grad_loss if grad_loss.dim() == 0 else grad_loss[:, None]
        grad_logits = (grad_logits * scale).to(grad_logits.dtype)
    return grad_logits, None, None, None, None, None


torch.library.register_autograd(f"{_library.NAMESPACE}::softcap_ce_fwd", _backward, setup_context=_save_gradient)


def softcap_cross_entropy(logits, targets, cap=30.0, reduction="mean", ignore_index=-100):
    """Cross-entropy of `cap * tanh(logits / cap)` against `targets`.

    logits   [N, V], float; on the kernel path bfloat16
    targets  [N], int64, each in [0, V) or `ignore_index`
    cap      softcap, > 0
    Returns float32 (float64 for float64 logits): a scalar for "mean" and "sum", [N] for "none", where
    ignored rows are 0. The mean over no rows is nan, as in torch.

    A target out of range raises IndexError: at once on the CPU; on a GPU, which cannot raise, the row's loss and
    gradient become nan and the next call raises (or `_library.check_device_errors()`, after a synchronisation).
    """
    require(logits.dim() == 2, "logits", f"expected [N, V], got shape {list(logits.shape)}")
    require(logits.shape[1] > 0, "logits", "the vocabulary is empty")
    require(logits.is_floating_point(), "logits", f"expected a float dtype, got {logits.dtype}")
    require(targets.shape == logits.shape[:1], "targets", f"expected shape [{logits.shape[0]}], got {list(targets.shape)}")
    require_dtype(targets, "targets", (torch.int64,))
    require_device(targets, "targets", logits.device)
    require(0 < cap < math.inf, "cap", f"expected > 0 and finite, got {cap}")
    require(reduction in REDUCTIONS, "reduction", f"expected one of {', '.join(REDUCTIONS)}, got {reduction!r}")
    with_grad = logits.requires_grad and torch.is_grad_enabled()
    loss, _ = torch.ops.pgolf_fast.softcap_ce_fwd(logits, targets, cap, REDUCTIONS.index(reduction), ignore_index, with_grad)
    return loss
