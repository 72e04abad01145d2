"""Newton-Schulz with five Polar Express steps, on all matrices of a model and on one rank's share of eight.

Fewest operations: symmetric products at half, the update in full; where it costs less, two steps on one Gram matrix, which is
as many as stay accurate (LOG.md).
"""

import torch

from benchmarks.shapes import model_matrices, rank_share_matrices
from benchmarks.timing import Case, rotations_for
from pgolf_fast import orthogonalize
from pgolf_fast.ops.orthogonalize import COEFFICIENTS, _iterate_batched, orthogonalize_ref

STEPS = COEFFICIENTS["polar_express"]


def _flops(shapes):
    total = 0
    for m, n in (sorted(s) for s in shapes):
        step, pair = 3 * m * m * n + m**3, 3 * m * m * n + 5 * m**3
        total += len(STEPS) % 2 * step + len(STEPS) // 2 * min(2 * step, pair)
    return total


def cases(device):
    sets = {
        "27M model, 66 matrices": model_matrices("sp1024"),
        "36M model, 66 matrices": model_matrices("caseops8192"),
        "36M model, one rank's 10 of 66": rank_share_matrices("caseops8192"),
    }
    for name, shapes in sets.items():
        if device.type == "cpu":
            name, shapes = f"{name}: 6 of them", shapes[:6]
        bytes_once = sum(4 * m * n for m, n in shapes)
        rotations = rotations_for(bytes_once)
        # The peers get their matrices stacked by shape beforehand, ours takes the list.
        batches = [[torch.randn(shapes.count(s), *s, device=device).bfloat16() for s in sorted(set(shapes))] for _ in range(rotations)]
        torch.compiler.reset()  # else the shapes of all cases together pass torch.compile's limit of variants
        compiled = torch.compile(_iterate_batched, dynamic=False)
        contestants = {
            "ours": lambda i: orthogonalize([m for batch in batches[i] for m in batch]),
            "torch.compile": lambda i: [compiled(batch, STEPS) for batch in batches[i]],
            "torch": lambda i: [orthogonalize_ref(batch, STEPS) for batch in batches[i]],
        }
        yield Case(name, contestants, bytes_once, _flops(shapes), rotations)
