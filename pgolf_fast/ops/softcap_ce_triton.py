"""Softcapped cross-entropy for GPUs without the kernel: one Triton program per row, which is read twice."""

import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice


@triton.jit
def softcap_ce_row(
    logits, targets, loss, grad, weight, v, row_stride, cap, ignore_index, WITH_GRAD: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits += row * row_stride
    target = tl.load(targets + row)
    kept = target != ignore_index
    valid = (target >= 0) & (target < v)
    columns = tl.arange(0, BLOCK)

    # One running maximum and sum per lane, merged behind the loop.
    largest = tl.full([BLOCK], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, v, BLOCK):
        within = start + columns < v
        x = tl.load(logits + start + columns, mask=within, other=0.0).to(tl.float32)
        z = cap * libdevice.tanh(x / cap)
        grown = tl.where(within, tl.maximum(largest, z), largest)
        total = tl.where(within, total * tl.exp(largest - grown) + tl.exp(z - grown), total)
        largest = grown
    z_max = tl.max(largest, 0)
    lse = z_max + tl.log(tl.sum(total * tl.exp(largest - z_max), 0))

    z_target = cap * libdevice.tanh(tl.load(logits + target, mask=valid, other=0.0).to(tl.float32) / cap)
    row_loss = tl.where(kept, tl.where(valid, lse - z_target, float("nan")), 0.0)
    tl.store(loss + row, row_loss)
    if WITH_GRAD:
        row_weight = tl.where(valid, tl.load(weight), float("nan"))
        for start in range(0, v, BLOCK):
            within = start + columns < v
            x = tl.load(logits + start + columns, mask=within, other=0.0).to(tl.float32)
            t = libdevice.tanh(x / cap)
            p = tl.exp(cap * t - lse) - tl.where(start + columns == target, 1.0, 0.0)
            d = tl.where(kept, p * (1 - t * t) * row_weight, 0.0)
            tl.store(grad + row * v + start + columns, d.to(grad.dtype.element_ty), mask=within)


def softcap_ce_triton(logits, targets, cap, reduction, ignore_index, with_grad):
    """Loss and gradient as `softcap_ce_fwd` returns them; bfloat16, float16 or float32 logits."""
    n, v = logits.shape
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    kept = (targets != ignore_index).sum()
    loss = logits.new_empty(n, dtype=torch.float32)
    grad = logits.new_empty(logits.shape if with_grad else 0)
    weight = 1 / kept.float() if reduction == "mean" else torch.ones((), device=logits.device)
    if n:
        block = min(4096, triton.next_power_of_2(v))
        softcap_ce_row[(n,)](
            logits, targets.contiguous(), loss, grad, weight, v, logits.stride(0), cap, ignore_index, with_grad, block, num_warps=8
        )
    if reduction == "none":
        return loss, grad
    return loss.sum() / kept if reduction == "mean" else loss.sum(), grad
