"""The arithmetic of an optimizer step over lists of tensors: in place, in one launch each on sm_90.

Numbers that change from step to step are tensors on the device. Everything is computed in float32 at least and rounded once to
how it is stored; `muon_direction_` says where in between.
"""

import torch

from pgolf_fast.ops import _library
from pgolf_fast.ops._library import accumulation_dtype, require

MAX_TENSORS = 48  # kOptimizerMaxTensors
ROW_EPSILON = 1e-7  # least norm of a row that is brought to length 1


def wide(tensor):
    """In the dtype of the arithmetic: at least float32."""
    return tensor.to(accumulation_dtype(tensor.dtype))


def _kernel_serves(name, *lists):
    """Whether the kernel takes these lists; the first one decides where."""
    tensors = [t for tensors in lists for t in tensors]
    fits = len(tensors) > 0 and len(lists[0]) <= MAX_TENSORS and tensors[0].device.type == "cuda" and all(t.numel() for t in tensors)
    fits = fits and all(t.dtype in (torch.bfloat16, torch.float32) and t.is_contiguous() and t.data_ptr() % 16 == 0 for t in tensors)
    return fits and _library.uses_kernel(name, tensors[0].device)


def gradient_norm(grads):
    """Square root of the sum of all squares, a 0-dim tensor.  grads: list of tensors of one device"""
    require(len(grads) > 0, "grads", "the list is empty")
    if _kernel_serves("gradient_norm", grads):
        chunks = sum(torch.ops.pgolf_fast_sm90.optimizer_chunks(g.numel()) for g in grads)
        norm = torch.empty((), device=grads[0].device)
        torch.ops.pgolf_fast_sm90.gradient_norm(grads, torch.empty(chunks, dtype=torch.float64, device=norm.device), norm)
        return norm
    return torch.stack([torch.linalg.vector_norm(wide(g)) for g in grads]).square().sum().sqrt()


def muon_direction_(grads, momenta, scale, momentum, normalize_rows=False):
    """Nesterov momentum of `scale * grads`: moves the momenta and returns the directions, in bfloat16.

    Newton-Schulz begins with this rounding, so a wider direction would only be more to move.

    grads      list of [..., rows, columns], the gradients or this rank's share of them
    momenta    list of the same shapes; each line below that makes one rounds once to their dtype
    scale, momentum   0-dim float32 tensors
    """
    if _kernel_serves("muon_direction", grads, momenta) and all(g.shape[-1] % 4 == 0 for g in grads):
        directions = [torch.empty_like(m, dtype=torch.bfloat16) for m in momenta]
        torch.ops.pgolf_fast_sm90.muon_direction(grads, momenta, directions, scale, momentum, ROW_EPSILON if normalize_rows else 0.0)
        return directions
    directions = []
    for grad, state in zip(grads, momenta):
        g = (scale * wide(grad)).to(state.dtype)
        state.copy_((momentum * wide(state)).to(state.dtype) + g)
        direction = (g + momentum * wide(state)).to(torch.bfloat16)
        if normalize_rows:
            length = torch.linalg.vector_norm(wide(direction), dim=-1, keepdim=True).clamp_min(ROW_EPSILON)
            direction = direction / length.to(torch.bfloat16)
        directions.append(direction)
    return directions


def _step_sizes(param, rates, lr_factor):
    """The learning rate of each entry of the first dimension."""
    return (rates * lr_factor).view(-1, *[1] * (param.dim() - 1)) if len(rates) > 1 else rates[0] * lr_factor


def muon_apply_(params, updates, averages, rates, weight_decays, shape_factors, lr_factor, average_decay=0.0):
    """param <- param (1 - lr weight_decay) - lr shape_factor update, with lr = rate lr_factor; then the averages follow.

    params    list of float32 tensors
    updates   list of the same shapes, bfloat16
    averages  list of the same shapes, float32, moved towards the new parameters by 1 - average_decay; [] for none
    rates     list of 1-dim float32 tensors: one rate, or one for each entry of the parameter's first dimension
    """
    if _kernel_serves("muon_apply", params, updates, averages) and all(u.dtype == torch.bfloat16 for u in updates):
        torch.ops.pgolf_fast_sm90.muon_apply(params, updates, averages, rates, weight_decays, shape_factors, lr_factor, average_decay)
        return
    for param, update, rate, decay, shape_factor in zip(params, updates, rates, weight_decays, shape_factors):
        lr = _step_sizes(param, rate, lr_factor)
        param.mul_(1 - lr * decay).sub_(lr * shape_factor * update.to(param.dtype))
    _follow(averages, params, average_decay)


def adam_apply_(
    params, grads, means, squares, averages, rates, weight_decays, scale, lr_factor, step, beta1, beta2, epsilon, average_decay=0.0
):
    """Decoupled AdamW on `scale * grads`, rounded to their dtype; then the averages follow, as in `muon_apply_`.

    params, grads, means, squares   lists of equal shapes; all four of one dtype, each parameter its own
    scale, lr_factor                0-dim float32 tensors
    step                            0-dim float64 tensor, counted from 1
    """
    if _kernel_serves("adam_apply", params, grads, means, squares, averages):
        torch.ops.pgolf_fast_sm90.adam_apply(
            params, grads, means, squares, averages, rates, weight_decays, scale, lr_factor, step, beta1, beta2, epsilon, average_decay
        )
        return
    for param, grad, mean, square, rate, decay in zip(params, grads, means, squares, rates, weight_decays):
        g = wide((scale * wide(grad)).to(grad.dtype))
        new_mean = beta1 * wide(mean) + (1 - beta1) * g
        new_square = beta2 * wide(square) + (1 - beta2) * g.square()
        mean.copy_(new_mean)
        square.copy_(new_square)
        lr = _step_sizes(param, rate, lr_factor)
        update = new_mean / (1 - beta1**step) / ((new_square / (1 - beta2**step)).sqrt() + epsilon)
        param.copy_(wide(param) * (1 - lr * decay) - lr * update)
    _follow(averages, params, average_decay)


def _follow(averages, params, decay):
    for average, param in zip(averages, params):
        average.lerp_(wide(param), 1 - decay)
