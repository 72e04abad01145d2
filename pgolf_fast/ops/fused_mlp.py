"""MLP of the recipes: down(act(up(x))), with act(u) = max(u, 0)^2 or leaky_relu(u, 1/2)^2.

Only u = up(x) is kept for the backward:

    du = (dy w_down) * act'(u)     dx = du w_up     dw_up = du^T x     dw_down = dy^T act(u)
"""

import torch

from pgolf_fast.ops import _library
from pgolf_fast.ops._library import aligned, library, require, require_device, require_dtype

ACTIVATIONS = ("relu2", "leaky_relu2")
ROW_TILE = 256  # kFusedMlpRowTile


def activation_ref(u, activation):
    return torch.where(u > 0, u, 0.0 if activation == "relu2" else 0.5 * u).square()


def fused_mlp_ref(x, w_up, w_down, activation="relu2"):
    """The definition.  x [..., D], w_up [H, D], w_down [D_out, H]"""
    return activation_ref(x @ w_up.T, activation) @ w_down.T


# `activation` is an index into ACTIVATIONS.  x [M, D]; y [M, D_out], u [M, H]
library.define("fused_mlp_fwd(Tensor x, Tensor w_up, Tensor w_down, int activation) -> (Tensor y, Tensor u)")
library.define(
    "fused_mlp_bwd(Tensor dy, Tensor x, Tensor u, Tensor w_up, Tensor w_down, int activation) -> (Tensor dx, Tensor dw_up, Tensor dw_down)"
)
library.define("fused_mlp_bwd_input(Tensor dy, Tensor u, Tensor w_up, Tensor w_down, int activation) -> Tensor dx")
# Of a normalised input, for backwards written by hand: y = residual + MLP(f x), f = scale * rstd of each row [M], scale > 0. The norm
# needs no tensor: u = f (x w_up^T). The backward returns the gradient of x, through MLP and norm, plus dx_residual, what x has already;
# the weight gradients are added to dw_up and dw_down, in the accumulation dtype.
library.define(
    "norm_mlp_fwd(Tensor x, Tensor rstd, float scale, Tensor? residual, Tensor w_up, Tensor w_down, int activation) -> (Tensor y, Tensor u)"
)
library.define(
    "norm_mlp_bwd(Tensor dy, Tensor x, Tensor dx_residual, Tensor rstd, float scale, Tensor u, Tensor w_up, Tensor w_down, int activation,"
    " Tensor(a!) dw_up, Tensor(b!) dw_down) -> Tensor dx"
)


def _forward_formula(x, w_up, w_down, activation):
    u = x @ w_up.T
    return activation_ref(u, ACTIVATIONS[activation]) @ w_down.T, u


def _slope(u, activation):
    return 2 * torch.where(u > 0, u, 0.0 if ACTIVATIONS[activation] == "relu2" else 0.25 * u)


def _backward_formula(dy, x, u, w_up, w_down, activation):
    du = (dy @ w_down) * _slope(u, activation)
    return du @ w_up, du.T @ x, dy.T @ activation_ref(u, ACTIVATIONS[activation])


def _input_gradient_formula(dy, u, w_up, w_down, activation):
    return ((dy @ w_down) * _slope(u, activation)) @ w_up


def _norm_forward_formula(x, rstd, scale, residual, w_up, w_down, activation):
    u = (scale * rstd[:, None] * (x @ w_up.T)).to(x.dtype)
    y = activation_ref(u, ACTIVATIONS[activation]) @ w_down.T
    return y if residual is None else residual + y, u


def _norm_backward_formula(dy, x, dx_residual, rstd, scale, u, w_up, w_down, activation, dw_up, dw_down):
    du = (scale * rstd[:, None] * (dy @ w_down) * _slope(u, activation)).to(x.dtype)
    dw_up += du.T @ x
    dw_down += dy.T @ activation_ref(u, ACTIVATIONS[activation])
    dx = (du @ w_up).to(rstd.dtype)
    along = rstd.square() * (dx * x).mean(-1)
    return (dx_residual + dx - along[:, None] * x).to(x.dtype)


library.impl("fused_mlp_fwd", _forward_formula, "CPU")
library.impl("fused_mlp_bwd", _backward_formula, "CPU")
library.impl("fused_mlp_bwd_input", _input_gradient_formula, "CPU")
library.impl("norm_mlp_fwd", _norm_forward_formula, "CPU")
library.impl("norm_mlp_bwd", _norm_backward_formula, "CPU")


def _forward_kernel(x, rstd, scale, residual, w_up, w_down, activation):
    u = x.new_empty(x.shape[0], w_up.shape[0])
    y = x.new_empty(x.shape[0], w_down.shape[0])
    torch.ops.pgolf_fast_sm90.fused_mlp_fwd(aligned(x), rstd, scale, residual, aligned(w_up), aligned(w_down), activation, u, y)
    return y, u


def _backward_kernel(dy, x, dx_residual, rstd, scale, u, w_up, w_down, activation, dw_up, dw_down):
    du, dx = torch.empty_like(u), x.new_empty(x.shape)
    dy, x, u, w_up, w_down = (aligned(t) for t in (dy, x, u, w_up, w_down))
    row_sums = None
    if rstd is not None:
        dx_residual, row_sums = aligned(dx_residual), rstd.new_empty(-(-u.shape[1] // ROW_TILE), x.shape[0])
    # The kernel adds to the weight gradients in an order that varies.
    torch.ops.pgolf_fast_sm90.fused_mlp_bwd(dy, x, dx_residual, rstd, scale, u, w_up, w_down, activation, du, dx, dw_up, dw_down, row_sums)
    return dx, du


@torch.library.impl(library, "fused_mlp_fwd", "CUDA")
def _fwd_cuda(x, w_up, w_down, activation):
    if not _library.uses_kernel("fused_mlp_fwd", x.device):
        return _forward_formula(x, w_up, w_down, activation)
    return _forward_kernel(x, None, 1.0, None, w_up, w_down, activation)


@torch.library.impl(library, "fused_mlp_bwd", "CUDA")
def _bwd_cuda(dy, x, u, w_up, w_down, activation):
    if not _library.uses_kernel("fused_mlp_bwd", x.device):
        return _backward_formula(dy, x, u, w_up, w_down, activation)
    dw_up, dw_down = (torch.zeros_like(w, dtype=torch.float32) for w in (w_up, w_down))
    dx, du = _backward_kernel(dy, x, None, None, 1.0, u, w_up, w_down, activation, dw_up, dw_down)
    if torch.are_deterministic_algorithms_enabled():
        # The kernel adds in an order that varies: these two products again.
        return dx, du.T @ x, dy.T @ activation_ref(u, ACTIVATIONS[activation])
    return dx, dw_up.to(w_up.dtype), dw_down.to(w_down.dtype)


@torch.library.impl(library, "fused_mlp_bwd_input", "CUDA")
def _bwd_input_cuda(dy, u, w_up, w_down, activation):
    if not _library.uses_kernel("fused_mlp_bwd_input", dy.device):
        return _input_gradient_formula(dy, u, w_up, w_down, activation)
    du, dx = torch.empty_like(u), dy.new_empty(dy.shape[0], w_up.shape[1])
    tensors = [aligned(t) for t in (dy, u, w_up, w_down)]
    torch.ops.pgolf_fast_sm90.fused_mlp_bwd_input(*tensors, activation, du, dx)
    return dx


@torch.library.impl(library, "norm_mlp_fwd", "CUDA")
def _norm_fwd_cuda(x, *arguments):
    return (_forward_kernel if _library.uses_kernel("fused_mlp_fwd", x.device) else _norm_forward_formula)(x, *arguments)


@torch.library.impl(library, "norm_mlp_bwd", "CUDA")
def _norm_bwd_cuda(dy, *arguments):
    if not _library.uses_kernel("fused_mlp_bwd", dy.device):
        return _norm_backward_formula(dy, *arguments)
    return _backward_kernel(dy, *arguments)[0]


@torch.library.register_fake(f"{_library.NAMESPACE}::fused_mlp_fwd")
def _fwd_fake(x, w_up, w_down, activation):
    return x.new_empty(x.shape[0], w_down.shape[0]), x.new_empty(x.shape[0], w_up.shape[0])


@torch.library.register_fake(f"{_library.NAMESPACE}::fused_mlp_bwd")
def _bwd_fake(dy, x, u, w_up, w_down, activation):
    return x.new_empty(x.shape), w_up.new_empty(w_up.shape), w_down.new_empty(w_down.shape)


@torch.library.register_fake(f"{_library.NAMESPACE}::fused_mlp_bwd_input")
def _bwd_input_fake(dy, u, w_up, w_down, activation):
    return dy.new_empty(dy.shape[0], w_up.shape[1])


@torch.library.register_fake(f"{_library.NAMESPACE}::norm_mlp_fwd")
def _norm_fwd_fake(x, rstd, scale, residual, w_up, w_down, activation):
    return _fwd_fake(x, w_up, w_down, activation)


@torch.library.register_fake(f"{_library.NAMESPACE}::norm_mlp_bwd")
def _norm_bwd_fake(dy, x, dx_residual, rstd, scale, u, w_up, w_down, activation, dw_up, dw_down):
    return x.new_empty(x.shape)


def _save(ctx, inputs, output):
    x, w_up, w_down, ctx.activation = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, output[1], w_up, w_down)


def _backward(ctx, dy, _):
    if dy is None:
        return (None,) * 4
    if not any(ctx.needs_input_grad[1:3]):  # weights that do not learn: half of the backward is spared
        _, u, w_up, w_down = ctx.saved_tensors
        return torch.ops.pgolf_fast.fused_mlp_bwd_input(dy, u, w_up, w_down, ctx.activation), None, None, None
    return *torch.ops.pgolf_fast.fused_mlp_bwd(dy, *ctx.saved_tensors, ctx.activation), None


torch.library.register_autograd(f"{_library.NAMESPACE}::fused_mlp_fwd", _backward, setup_context=_save)


def fused_mlp(x, w_up, w_down, activation="relu2"):
    """`act(x @ w_up.T) @ w_down.T`.

    x           [..., D], float; on the kernel path bfloat16, and all widths multiples of 8
    w_up        [H, D], the dtype of x
    w_down      [D_out, H], the dtype of x
    activation  "relu2", max(u, 0)^2, or "leaky_relu2", leaky_relu(u, 1/2)^2
    Returns [..., D_out] in the dtype of x.
    """
    require(x.dim() >= 1, "x", "expected [..., D], got a scalar")
    require(x.is_floating_point(), "x", f"expected a float dtype, got {x.dtype}")
    require(w_up.dim() == 2 and w_up.shape[1] == x.shape[-1], "w_up", f"expected [H, {x.shape[-1]}], got shape {list(w_up.shape)}")
    require(
        w_down.dim() == 2 and w_down.shape[1] == w_up.shape[0], "w_down", f"expected [D, {w_up.shape[0]}], got shape {list(w_down.shape)}"
    )
    for tensor, argument in ((w_up, "w_up"), (w_down, "w_down")):
        require_dtype(tensor, argument, (x.dtype,))
        require_device(tensor, argument, x.device)
    require(activation in ACTIVATIONS, "activation", f"expected one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    y, _ = torch.ops.pgolf_fast.fused_mlp_fwd(x.flatten(0, -2), w_up, w_down, ACTIVATIONS.index(activation))
    return y.unflatten(0, x.shape[:-1])
