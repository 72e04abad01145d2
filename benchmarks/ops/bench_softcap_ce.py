"""Softcapped cross-entropy on logits.

Fewest bytes: the logits read once and, with the gradient, written once.
"""

import torch

from benchmarks.shapes import VOCABULARIES, tokens
from benchmarks.timing import Case, rotations_for
from pgolf_fast import softcap_cross_entropy
from pgolf_fast.ops.softcap_ce import softcap_cross_entropy_ref


def cases(device):
    compiled = torch.compile(softcap_cross_entropy_ref)
    n = tokens(device)
    for family, v in VOCABULARIES.items():
        bytes_once = 2 * n * v
        rotations = rotations_for(bytes_once)
        logits = [(3 * torch.randn(n, v, device=device)).bfloat16().requires_grad_() for _ in range(rotations)]
        targets = torch.randint(v, (n,), device=device)

        def forward(function):
            def run(i):
                with torch.no_grad():
                    return function(logits[i], targets)

            return run

        def forward_backward(function):
            return lambda i: torch.autograd.grad(function(logits[i], targets), logits[i])

        contestants = {"ours": softcap_cross_entropy, "torch.compile": compiled, "torch": softcap_cross_entropy_ref}
        yield Case(f"{family} {n}x{v} fwd", {k: forward(f) for k, f in contestants.items()}, bytes_once, 0, rotations)
        yield Case(f"{family} {n}x{v} fwd+bwd", {k: forward_backward(f) for k, f in contestants.items()}, 2 * bytes_once, 0, rotations)
