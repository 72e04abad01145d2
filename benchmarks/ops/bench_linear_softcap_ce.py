"""Output head fused with the softcapped cross-entropy.

Fewest operations: one matrix product forward, three with the gradients. "two ops" is torch's product with
`softcap_cross_entropy` behind it, the path of shapes that the fused kernel does not take.
"""

import importlib.util

import torch

from benchmarks.shapes import VOCABULARIES, WIDTH, tokens
from benchmarks.timing import Case
from pgolf_fast import linear_softcap_cross_entropy, softcap_cross_entropy
from pgolf_fast.ops.linear_softcap_ce import linear_softcap_cross_entropy_ref


def liger(x, weight, targets):
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    return LigerFusedLinearCrossEntropyFunction.apply(x, weight, targets, None, None, -100, 0.0, 0.0, "mean", 30.0)[0]


def cases(device):
    compiled = torch.compile(linear_softcap_cross_entropy_ref)
    n = tokens(device)
    draw = torch.Generator(device).manual_seed(0)
    contestants = {
        "ours": linear_softcap_cross_entropy,
        "two ops": lambda x, weight, targets: softcap_cross_entropy(x @ weight.T, targets),
        "torch.compile": compiled,
        "torch": linear_softcap_cross_entropy_ref,
    }
    if device.type == "cuda" and importlib.util.find_spec("liger_kernel"):
        contestants["liger"] = liger
    for family, v in VOCABULARIES.items():
        x = torch.randn(n, WIDTH, device=device, generator=draw).bfloat16().requires_grad_()
        weight = (3 * WIDTH**-0.5 * torch.randn(v, WIDTH, device=device, generator=draw)).bfloat16().requires_grad_()
        targets = torch.randint(v, (n,), device=device, generator=draw)
        product = 2 * n * WIDTH * v

        def forward(function):
            def run(i):
                with torch.no_grad():
                    return function(x, weight, targets)

            return run

        def forward_backward(function):
            return lambda i: torch.autograd.grad(function(x, weight, targets), (x, weight))

        bytes_once = 2 * WIDTH * (n + v)
        yield Case(f"{family} {n}x{WIDTH}x{v} fwd", {k: forward(f) for k, f in contestants.items()}, bytes_once, product)
        yield Case(
            f"{family} {n}x{WIDTH}x{v} fwd+bwd", {k: forward_backward(f) for k, f in contestants.items()}, 2 * bytes_once, 3 * product
        )
