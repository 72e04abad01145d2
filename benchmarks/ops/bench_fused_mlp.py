"""The MLP, forward and forward + backward.

Fewest operations: two products forward, four backward. "six products" is torch's bare matrix products and nothing else,
which no unfused implementation can beat.
"""

import torch

from benchmarks.shapes import MLP_HIDDEN, WIDTH, tokens
from benchmarks.timing import Case
from pgolf_fast import fused_mlp
from pgolf_fast.ops.fused_mlp import fused_mlp_ref


def cases(device):
    m = tokens(device)
    compiled = torch.compile(fused_mlp_ref)
    for family, hidden in MLP_HIDDEN.items():
        x, dy = (torch.randn(m, WIDTH, device=device).bfloat16() for _ in range(2))
        up = (torch.randn(hidden, WIDTH, device=device) / WIDTH**0.5).bfloat16()
        down = (torch.randn(WIDTH, hidden, device=device) / hidden**0.5).bfloat16()
        u = torch.randn(m, hidden, device=device).bfloat16()
        inputs = [t.requires_grad_() for t in (x, up, down)]

        def forward(function, inputs=inputs):
            def run(i):
                with torch.no_grad():
                    return function(*inputs, "leaky_relu2")

            return run

        def forward_backward(function, inputs=inputs, dy=dy):
            return lambda i: torch.autograd.grad(function(*inputs, "leaky_relu2"), inputs, dy)

        @torch.no_grad()
        def two_products(i, x=x, up=up, down=down, u=u):
            return x @ up.T, u @ down.T

        @torch.no_grad()
        def six_products(i, x=x, dy=dy, up=up, down=down, u=u):
            return x @ up.T, u @ down.T, dy @ down, dy.T @ u, u @ up, u.T @ x

        contestants = {"ours": fused_mlp, "torch.compile": compiled, "torch": fused_mlp_ref}
        product = 2 * m * WIDTH * hidden
        name = f"{family} {m}x{WIDTH}x{hidden}"
        yield Case(f"{name} fwd", {k: forward(f) for k, f in contestants.items()} | {"two products": two_products}, 0, 2 * product)
        yield Case(
            f"{name} fwd+bwd", {k: forward_backward(f) for k, f in contestants.items()} | {"six products": six_products}, 0, 6 * product
        )
