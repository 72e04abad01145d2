"""Newton-Schulz orthogonalisation: the matrices of a Muon update to (nearly) orthogonal ones.

    X = M / |M|_F, transposed if it has more rows than columns
    per step, with its (a, b, c):   A = X X^T,   X <- a X + (b A + c A A) X

Arithmetic is bfloat16, which the recipes' published runs use; float64 input is
iterated in float64, as the truth that tests compare with. The published runs
divide by |M|_F + 1e-7; here a matrix of any magnitude is orthogonalised alike,
and a zero matrix stays zero.

The kernel serves matrices whose rows and columns are multiples of 8, all of
them in one persistent launch; other shapes take the composite, batched by shape.
"""

import torch

from pgolf_fast.ops import _library
from pgolf_fast.ops._library import library, require, require_device, require_dtype

MAX_STEPS = 16  # of the kernel

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



def _normalized(x):
    """x / |x|_F over the last two dimensions; divided by the largest magnitude first, whose square may leave the range."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    for size in (lambda w: w.abs().amax(dim=(-2, -1), keepdim=True), lambda w: w.norm(dim=(-2, -1), keepdim=True)):
        divisor = size(wide)
        wide = wide / torch.where(divisor == 0, 1.0, divisor)
    return wide.to(x.dtype)


def orthogonalize_ref(matrix, steps):
    """The definition, on [..., m, n] and a list of (a, b, c)."""
    x = matrix.to(torch.float64 if matrix.dtype == torch.float64 else torch.bfloat16)
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = _normalized(x)
    for a, b, c in steps:
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x.mT if tall else x


# `coefficients` holds a, b, c of each step, one after the other.
library.define("orthogonalize(Tensor[] matrices, float[] coefficients) -> Tensor[]")


def _steps(coefficients):
    return [coefficients[i : i + 3] for i in range(0, len(coefficients), 3)]


@torch.library.impl(library, "orthogonalize", "CPU")
def _cpu(matrices, coefficients):
    return [orthogonalize_ref(m, _steps(coefficients)).contiguous() if m.numel() else _empty_like(m) for m in matrices]


def _empty_like(matrix):
    return matrix.new_empty(matrix.shape, dtype=torch.float64 if matrix.dtype == torch.float64 else torch.bfloat16)


def _composite(batch, steps):
    """orthogonalize_ref on [count, m, n], with the sums folded into the batched products."""
    x = batch.to(torch.float64 if batch.dtype == torch.float64 else torch.bfloat16)
    tall = x.shape[-2] > x.shape[-1]
    x = _normalized(x.mT if tall else x)
    for a, b, c in steps:
        gram = torch.bmm(x, x.mT)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).contiguous()


def _kernel(groups, coefficients):
    """`groups`: lists of equally shaped matrices. Returns [count, rows, columns] for each."""
    first = groups[0][0]
    # NOTE: the kernel divides b by c.
    coefficients = [v if i % 3 < 2 or abs(v) > 1e-20 else 1e-20 for i, v in enumerate(coefficients)]
    new = lambda g, rows, columns: torch.empty(len(g), rows, columns, dtype=torch.bfloat16, device=first.device)  # noqa: E731
    outputs, x0, x1 = ([new(g, *g[0].shape) for g in groups] for _ in range(3))
    gram, poly = ([new(g, min(g[0].shape), min(g[0].shape)) for g in groups] for _ in range(2))
    matrices = [m for g in groups for m in g]
    counters = torch.empty(len(matrices) + len(groups), dtype=torch.int32, device=first.device)
    sums = sum(torch.ops.pgolf_fast_sm90.orthogonalize_partial_sums(m.numel()) for m in matrices)
    partial_sums = torch.empty(sums, dtype=torch.float64, device=first.device)
    torch.ops.pgolf_fast_sm90.orthogonalize(matrices, coefficients, outputs, x0, x1, gram, poly, counters, partial_sums)
    return outputs


@torch.library.impl(library, "orthogonalize", "CUDA")
def _cuda(matrices, coefficients):
    # Every matrix of every batch on its own, then grouped by shape and dtype.
    flat = [single for m in matrices for single in (m.reshape(-1, *m.shape[-2:]).unbind() if m.numel() else ())]
    groups = {}
    for i, m in enumerate(flat):
        groups.setdefault((m.shape, m.dtype), []).append(i)
    results = [None] * len(flat)
    for dtype in (torch.bfloat16, torch.float32):
        served = [k for k in groups if k[1] == dtype and k[0][0] % 8 == 0 and k[0][1] % 8 == 0]
        if served and len(coefficients) <= 3 * MAX_STEPS and _library.uses_kernel("orthogonalize", flat[0].device):
            aligned = lambda m: m if m.is_contiguous() and m.data_ptr() % 16 == 0 else m.clone(memory_format=torch.contiguous_format)  # noqa: E731
            for key, batch in zip(served, _kernel([[aligned(flat[i]) for i in groups[k]] for k in served], coefficients)):
                for i, result in zip(groups.pop(key), batch.unbind()):
                    results[i] = result
    for indices in groups.values():
        for i, result in zip(indices, _composite(torch.stack([flat[i] for i in indices]), _steps(coefficients)).unbind()):
            results[i] = result
    left = iter(results)
    outputs = []
    for m in matrices:
        singles = [next(left) for _ in range(m.shape[:-2].numel())] if m.numel() else []
        outputs.append(_empty_like(m) if not singles else singles[0] if m.dim() == 2 else torch.stack(singles).view(m.shape))
    return outputs


@torch.library.register_fake(f"{_library.NAMESPACE}::orthogonalize")
def _fake(matrices, coefficients):
    return [_empty_like(m) for m in matrices]


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
