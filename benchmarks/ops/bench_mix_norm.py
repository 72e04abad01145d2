"""The residual stream between matrix products: per-channel mix and RMSNorm, forward and backward as the fused block calls them.

Fewest bytes: every tensor read once, every result written once. torch.compile gets the same mathematics and both gradients.
"""

import torch

from benchmarks.shapes import WIDTH, tokens
from benchmarks.timing import Case, rotations_for
from pgolf_fast.ops import mix_norm
from pgolf_fast.ops.mix_norm import mix_norm_ref

# name, rows of the coefficients (None: no coefficients), tensors
MIXES = (
    ("norm", None, 1),
    ("residual + norm", None, 2),
    ("MLP and x0 mix + norm", (0, 0, 1), 3),
    ("skip and x0 mix + norm", (0, 0, 1, 2), 4),
    ("two lanes", (0, 1, 2), 3),
)


def cases(device):
    compiled = torch.compile(mix_norm_ref, dynamic=False)
    m = tokens(device)
    unit = 2 * m * WIDTH
    for name, rows, num_tensors in MIXES:
        torch.compiler.reset()  # else the mixes together pass torch.compile's limit of variants
        num_rows = 1 if rows is None else max(rows) + 1
        rotations = rotations_for(num_tensors * unit)
        sets = [[torch.randn(m, WIDTH, device=device).bfloat16().requires_grad_() for _ in range(num_tensors)] for _ in range(rotations)]
        gradients = [torch.randn(m, WIDTH, device=device).bfloat16() for _ in range(2)]
        coefficients = None if rows is None else torch.randn(num_rows, WIDTH, device=device).requires_grad_()
        given_rows = rows or (0,) * num_tensors

        def forward(function, sets=sets, coefficients=coefficients, rows=given_rows):
            def run(i):
                with torch.no_grad():
                    return function(sets[i], coefficients, rows)

            return run

        rstd = torch.rand(m, device=device) + 0.5

        def backward(i, sets=sets, coefficients=coefficients, rows=given_rows, gradients=gradients, num_rows=num_rows, rstd=rstd):
            tensors, mixed = ([], sets[i][0]) if coefficients is None else (sets[i], None)
            return torch.ops.pgolf_fast.mix_norm_bwd(*gradients, mixed, rstd, tensors, coefficients, rows, 1.0, [None] * num_rows)

        def forward_backward(function, sets=sets, coefficients=coefficients, rows=given_rows, gradients=gradients):
            def run(i):
                results = function(sets[i], coefficients, rows)
                leaves = sets[i] if coefficients is None else [*sets[i], coefficients]
                return torch.autograd.grad(results, leaves, gradients)

            return run

        contestants = {"ours": mix_norm, "torch.compile": compiled}
        own_mix = num_tensors == 1
        # Forward: tensors in, mixed and normed out. Backward: two gradients and the tensors, or the mix alone, in; a gradient per row out.
        fwd = (num_tensors + (1 if own_mix else 2)) * unit
        bwd = (2 + (1 if rows is None else num_tensors) + num_rows) * unit
        yield Case(f"{name} fwd", {k: forward(f) for k, f in contestants.items()}, fwd, 0, rotations)
        yield Case(f"{name} bwd", {"ours": backward}, bwd, 0, rotations)
        yield Case(f"{name} fwd+bwd", {k: forward_backward(f) for k, f in contestants.items()}, fwd + bwd, 0, rotations)
