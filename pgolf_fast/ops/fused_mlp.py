"""MLP of the recipes: down(act(up(x))), with act(u) = max(u, 0)^2 or leaky_relu(u, 1/2)^2."""

import torch

from pgolf_fast.ops._library import require, require_device, require_dtype

ACTIVATIONS = ("relu2", "leaky_relu2")


def activation_ref(u, activation):
    return torch.where(u > 0, u, 0.0 if activation == "relu2" else 0.5 * u).square()


def fused_mlp_ref(x, w_up, w_down, activation="relu2"):
    """The definition.  x [..., D], w_up [H, D], w_down [D_out, H]"""
    return activation_ref(x @ w_up.T, activation) @ w_down.T


def fused_mlp(x, w_up, w_down, activation="relu2"):
    """`act(x @ w_up.T) @ w_down.T`.

    x       [..., D], float
    w_up    [H, D], the dtype of x
    w_down  [D_out, H], the dtype of x
    """
    require(x.dim() >= 1, "x", "expected [..., D], got a scalar")
    require(x.is_floating_point(), "x", f"expected a float dtype, got {x.dtype}")
    require(w_up.dim() == 2 and w_up.shape[1] == x.shape[-1], "w_up", f"expected [H, {x.shape[-1]}], got shape {list(w_up.shape)}")
    require(w_down.dim() == 2 and w_down.shape[1] == w_up.shape[0], "w_down", f"expected [D, {w_up.shape[0]}], got shape {list(w_down.shape)}")
    for tensor, argument in ((w_up, "w_up"), (w_down, "w_down")):
        require_dtype(tensor, argument, (x.dtype,))
        require_device(tensor, argument, x.device)
    require(activation in ACTIVATIONS, "activation", f"expected one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    return fused_mlp_ref(x, w_up, w_down, activation)
