"""The products of a block's linear layers: forward with and without residual, gradient of the input, gradient of the weight.

Fewest operations: one product each. "torch" is the bare product (and, with a residual, the sum as a pass of its own); its weight gradient
is stored, ours is added to a float32 sum.
"""

import torch

from benchmarks.shapes import HEAD_DIM, HEADS, KV_HEADS, WIDTH, tokens
from benchmarks.timing import Case
from pgolf_fast.ops.products import add_weight_gradient, project, project_backward

WIDTHS = {"qkv": (HEADS + 2 * KV_HEADS) * HEAD_DIM, "output": WIDTH}


def cases(device):
    m = tokens(device)
    for name, n in WIDTHS.items():
        x, residual = torch.randn(m, WIDTH, device=device).bfloat16(), torch.randn(m, n, device=device).bfloat16()
        dy, weight = torch.randn(m, n, device=device).bfloat16(), (torch.randn(n, WIDTH, device=device) / WIDTH**0.5).bfloat16()
        total = torch.zeros(n, WIDTH, device=device)
        pairs = {
            "fwd": (lambda i, x=x, w=weight: project(x, w), lambda i, x=x, w=weight: x @ w.T),
            "fwd + residual": (
                lambda i, x=x, w=weight, r=residual: project(x, w, residual=r),
                lambda i, x=x, w=weight, r=residual: x @ w.T + r,
            ),
            "dx": (lambda i, dy=dy, w=weight: project_backward(dy, w), lambda i, dy=dy, w=weight: dy @ w),
            "dweight": (lambda i, dy=dy, x=x, total=total: add_weight_gradient(total, dy, x), lambda i, dy=dy, x=x: dy.T @ x),
        }
        for kind, (ours, torch_alone) in pairs.items():
            yield Case(f"{name} {m}x{WIDTH}x{n} {kind}", {"ours": ours, "torch": torch_alone}, 2 * m * (WIDTH + n), 2 * m * WIDTH * n)
