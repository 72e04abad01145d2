"""Newton-Schulz orthogonalisation: the matrices of a Muon update to (nearly) orthogonal ones.

    X = M / (|M|_F + 1e-7), transposed if it has more rows than columns
    per step, with its (a, b, c):   A = X X^T,   X <- a X + (b A + c A A) X

Arithmetic is bfloat16, which the recipes' published runs use; float64 input is
iterated in float64, as the truth that tests compare with.
"""

import torch

from pgolf_fast.ops import _library
from pgolf_fast.ops._library import library, require, require_device, require_dtype

# Per step (a, b, c); a shorter table repeats its last row.
COEFFICIENTS = {
    # Keller Jordan's quintic, tuned to inflate small singular values; they land in about [0.7, 1.2].
    "muon": ((3.4445, -4.7750, 2.0315),),
    # Polar Express (arXiv:2505.16932), as the CaseOps recipe's published run has them.
    "polar_express": (
        (8.156554524902461, -22.48329292557795, 15.878769915207462),
        (4.042929935166739, -2.808917465908714, 0.5000178451051316),
        (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
        (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
        (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
    ),
}
EPSILON = 1e-7


def orthogonalize_ref(matrix, steps):
    """The definition, on [..., m, n] and a list of (a, b, c)."""
    x = matrix.to(torch.float64 if matrix.dtype == torch.float64 else torch.bfloat16)
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    # The norm in float32: squares of values under 1e-19 vanish in it, and with them the update of an all but zero gradient.
    norm = x.to(torch.promote_types(x.dtype, torch.float32)).norm(dim=(-2, -1), keepdim=True)
    x = x / (norm + EPSILON).to(x.dtype)
    for a, b, c in steps:
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x.mT if tall else x


# `coefficients` holds a, b, c of each step, one after the other.
library.define("orthogonalize(Tensor[] matrices, float[] coefficients) -> Tensor[]")


def _steps(coefficients):
    return [coefficients[i : i + 3] for i in range(0, len(coefficients), 3)]


def _each(matrices, coefficients):
    return [orthogonalize_ref(m, _steps(coefficients)).contiguous() for m in matrices]


library.impl("orthogonalize", _each, "CPU")


@torch.library.impl(library, "orthogonalize", "CUDA")
def _cuda(matrices, coefficients):
    if not _library.uses_kernel("orthogonalize", matrices[0].device):
        return _each(matrices, coefficients)
    raise NotImplementedError


@torch.library.register_fake(f"{_library.NAMESPACE}::orthogonalize")
def _fake(matrices, coefficients):
    return [m.new_empty(m.shape, dtype=torch.float64 if m.dtype == torch.float64 else torch.bfloat16) for m in matrices]


def orthogonalize(matrices, coefficients="polar_express", steps=5):
    """Orthogonalise every matrix of a list by Newton-Schulz iteration.

    matrices      list of [..., m, n], bfloat16, float32 or float64, on one device; gradients do not flow through
    coefficients  "polar_express", "muon", or a table of (a, b, c) per step
    steps         iterations; a table shorter than that repeats its last row
    Returns a list of the same shapes in bfloat16 (float64 for float64 input).
    """
    table = COEFFICIENTS.get(coefficients) if isinstance(coefficients, str) else coefficients
    require(table is not None, "coefficients", f"expected a table or one of {', '.join(COEFFICIENTS)}, got {coefficients!r}")
    require(len(table) > 0 and all(len(row) == 3 for row in table), "coefficients", "expected rows of (a, b, c)")
    require(steps >= 1, "steps", f"expected at least 1, got {steps}")
    for i, m in enumerate(matrices):
        require(m.dim() >= 2, "matrices", f"entry {i}: expected [..., m, n], got shape {list(m.shape)}")
        require_dtype(m, "matrices", (torch.bfloat16, torch.float32, torch.float64))
        require_device(m, "matrices", matrices[0].device)
    if not matrices:
        return []
    flat = [float(v) for i in range(steps) for v in table[min(i, len(table) - 1)]]
    return torch.ops.pgolf_fast.orthogonalize([m.detach() for m in matrices], flat)
