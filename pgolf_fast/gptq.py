"""GPTQ: round a matrix column by column, each column's error pushed onto the columns not yet rounded.

The order of operations is PR #1855's: dead columns, damping, columns by falling diagonal, the upper Cholesky
factor of the inverse, blocks of columns. Matrices of one shape go together, so that a whole model takes a few
hundred small launches on a GPU. Arithmetic is in the weights' dtype.
"""

import torch


class HessianSum:
    """Sum of x x^T over every input row that a matrix sees while calibrating, in fp32 on the inputs' device."""

    def __init__(self, columns: int, device="cpu"):
        self.total = torch.zeros(columns, columns, device=device)

    def add(self, x: torch.Tensor) -> None:
        """x [..., columns]; one call per visit, so a block that runs three times adds three."""
        if x.shape[-1] != self.total.shape[0]:
            raise ValueError(f"x: expected {self.total.shape[0]} columns, got shape {list(x.shape)}")
        x = x.reshape(-1, x.shape[-1])
        if x.is_cuda and x.dtype == torch.bfloat16:
            # Products of bfloat16 are exact in fp32, so tensor cores lose nothing here.
            self.total += torch.mm(x.T, x, out_dtype=torch.float32)
        else:
            self.total.addmm_(x.T.float(), x.float())

    def mean(self, num_batches: int) -> torch.Tensor:
        """The Hessian: the sum over the number of calibration batches, not of rows."""
        return self.total / num_batches


def inverse_factor(hessians: torch.Tensor, damping: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hessians [n, C, C] to (order [n, C], upper [n, C, C] with inverse(H) = upper^T upper, dead [n, C]).

    `order` lists the columns by falling diagonal of the damped Hessian; `upper` is in that order.
    """
    h = hessians.clone()
    diagonal = h.diagonal(dim1=1, dim2=2)
    dead = diagonal == 0
    diagonal[dead] = 1
    diagonal += damping * diagonal.mean(dim=1, keepdim=True)
    order = diagonal.argsort(dim=1, descending=True, stable=True)
    h = h.gather(1, order[:, :, None].expand_as(h)).gather(2, order[:, None, :].expand_as(h))
    lower, failed = torch.linalg.cholesky_ex(h)
    if not failed.any():
        upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
    if failed.any():
        which = int(failed.nonzero()[0])
        raise ValueError(f"hessians: number {which} is not positive definite after damping by {damping}; use more calibration tokens")
    return order, upper, dead


def gptq(weights, hessians, scales, level: int, damping: float = 0.01, block: int = 128) -> torch.Tensor:
    """Codes int8 [n, R, C] in [-level, level]; a weight is then code * scale.

    weights   [n, R, C]
    hessians  [n, C, C], the inputs' second moments; left as they are
    scales    [n, R], one step per row, used as given (pass the values as they will be stored); a row of scale 0 gets codes 0
    """
    n, rows, columns = weights.shape
    if hessians.shape != (n, columns, columns):
        raise ValueError(f"hessians: expected shape {[n, columns, columns]}, got {list(hessians.shape)}")
    if scales.shape != (n, rows):
        raise ValueError(f"scales: expected shape {[n, rows]}, got {list(scales.shape)}")
    order, upper, dead = inverse_factor(hessians.to(weights.dtype), damping)
    has_scale = scales > 0
    step = torch.where(has_scale, scales, 1).to(weights.dtype)
    # Columns lead, so that the column at work is contiguous: [n, C, R].
    w = (weights * ~dead[:, None, :] * has_scale[:, :, None]).transpose(1, 2)
    by_order = order[:, :, None].expand(n, columns, rows)
    w = w.gather(1, by_order)
    codes = torch.empty_like(w, dtype=torch.int8)
    for begin in range(0, columns, block):
        end = min(begin + block, columns)
        errors = torch.empty_like(w[:, begin:end])
        for j in range(begin, end):
            code = torch.round(w[:, j] / step).clamp_(-level, level)
            error = (w[:, j] - code * step) / upper[:, j, j, None]
            w[:, j + 1 : end] -= upper[:, j, j + 1 : end, None] * error[:, None, :]
            codes[:, j], errors[:, j - begin] = code, error
        w[:, end:] -= upper[:, begin:end, end:].transpose(1, 2) @ errors
    return torch.empty_like(codes).scatter_(1, by_order, codes).transpose(1, 2).contiguous()
