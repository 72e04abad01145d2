"""The products of a linear layer, for backwards written by hand: not differentiable themselves.

    y = x weight^T (+ residual)      dx = dy weight      dweight += dy^T x

dweight is in the accumulation dtype, float32 for bf16: gradients of several visits and micro-batches are summed there unrounded.
"""

import torch

from pgolf_fast.ops import _library
from pgolf_fast.ops._library import RMS_EPSILON, accumulation_dtype, library, require, require_dtype

COLUMN_TILE = 256  # kProductColumnTile

# x [M, K], weight [N, K], residual and y [M, N]
library.define("product_forward(Tensor x, Tensor weight, Tensor? residual) -> Tensor")
# ... and rstd [M], 1 / sqrt(mean of a row's squares + 2^-23), in the accumulation dtype
library.define("product_residual_rstd(Tensor x, Tensor weight, Tensor residual) -> (Tensor y, Tensor rstd)")
library.define("product_backward(Tensor dy, Tensor weight) -> Tensor")
library.define("product_weight(Tensor dy, Tensor x, Tensor(a!) dweight) -> ()")


def _forward_formula(x, weight, residual):
    y = x @ weight.T
    return y if residual is None else y + residual


def _residual_rstd_formula(x, weight, residual):
    y = _forward_formula(x, weight, residual)
    return y, torch.rsqrt(y.to(accumulation_dtype(y.dtype)).square().mean(-1) + RMS_EPSILON)


def _backward_formula(dy, weight):
    return dy @ weight


def _weight_formula(dy, x, dweight):
    dweight += dy.T.to(dweight.dtype) @ x.to(dweight.dtype)


library.impl("product_forward", _forward_formula, "CPU")
library.impl("product_residual_rstd", _residual_rstd_formula, "CPU")
library.impl("product_backward", _backward_formula, "CPU")
library.impl("product_weight", _weight_formula, "CPU")


@torch.library.impl(library, "product_forward", "CUDA")
def _forward_cuda(x, weight, residual):
    if not _library.uses_kernel("product_forward", x.device):
        return _forward_formula(x, weight, residual)
    y = x.new_empty(x.shape[0], weight.shape[0])
    torch.ops.pgolf_fast_sm90.product_forward(x, weight, residual, y, None, None)
    return y


@torch.library.impl(library, "product_residual_rstd", "CUDA")
def _residual_rstd_cuda(x, weight, residual):
    if not _library.uses_kernel("product_forward", x.device):
        return _residual_rstd_formula(x, weight, residual)
    y, rstd = torch.empty_like(residual), x.new_empty(x.shape[0], dtype=torch.float32)
    row_squares = rstd.new_empty(-(-weight.shape[0] // COLUMN_TILE), x.shape[0])
    torch.ops.pgolf_fast_sm90.product_forward(x, weight, residual, y, rstd, row_squares)
    return y, rstd


@torch.library.impl(library, "product_backward", "CUDA")
def _backward_cuda(dy, weight):
    if not _library.uses_kernel("product_backward", dy.device):
        return _backward_formula(dy, weight)
    dx = dy.new_empty(dy.shape[0], weight.shape[1])
    torch.ops.pgolf_fast_sm90.product_backward(dy, weight, dx)
    return dx


@torch.library.impl(library, "product_weight", "CUDA")
def _weight_cuda(dy, x, dweight):
    if not _library.uses_kernel("product_weight", x.device):
        return _weight_formula(dy, x, dweight)
    torch.ops.pgolf_fast_sm90.product_weight(dy, x, dweight)


@torch.library.register_fake(f"{_library.NAMESPACE}::product_forward")
def _forward_fake(x, weight, residual):
    return x.new_empty(x.shape[0], weight.shape[0])


@torch.library.register_fake(f"{_library.NAMESPACE}::product_residual_rstd")
def _residual_rstd_fake(x, weight, residual):
    return torch.empty_like(residual), x.new_empty(x.shape[0], dtype=accumulation_dtype(x.dtype))


@torch.library.register_fake(f"{_library.NAMESPACE}::product_backward")
def _backward_fake(dy, weight):
    return dy.new_empty(dy.shape[0], weight.shape[1])


@torch.library.register_fake(f"{_library.NAMESPACE}::product_weight")
def _weight_fake(dy, x, dweight):
    pass


def _require_rows(tensor, argument, columns, dtype):
    require(tensor.dim() == 2 and tensor.shape[1] == columns, argument, f"expected [rows, {columns}], got {list(tensor.shape)}")
    require_dtype(tensor, argument, (dtype,))


def project(x, weight, residual=None):
    """x [M, K] @ weight [N, K]^T, plus residual [M, N]."""
    _require_rows(x, "x", weight.shape[1], weight.dtype)
    if residual is not None:
        _require_rows(residual, "residual", weight.shape[0], x.dtype)
    return torch.ops.pgolf_fast.product_forward(x, weight, residual)


def project_residual_rstd(x, weight, residual):
    """The same sum, and 1 / sqrt(mean(row^2) + 2^-23) of its rows."""
    _require_rows(x, "x", weight.shape[1], weight.dtype)
    _require_rows(residual, "residual", weight.shape[0], x.dtype)
    return torch.ops.pgolf_fast.product_residual_rstd(x, weight, residual)


def project_backward(dy, weight):
    """dy [M, N] @ weight [N, K]: the gradient of x."""
    _require_rows(dy, "dy", weight.shape[0], weight.dtype)
    return torch.ops.pgolf_fast.product_backward(dy, weight)


def add_weight_gradient(dweight, dy, x):
    """dweight [N, K] += dy [M, N]^T @ x [M, K]."""
    _require_rows(x, "x", dweight.shape[1], dy.dtype)
    _require_rows(dy, "dy", dweight.shape[0], x.dtype)
    require_dtype(dweight, "dweight", (accumulation_dtype(x.dtype),))
    torch.ops.pgolf_fast.product_weight(dy, x, dweight)
