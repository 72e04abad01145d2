"""Newton-Schulz orthogonalisation: the matrices of a Muon update to (nearly) orthogonal ones.

    X = M / |M|_F, transposed if it has more rows than columns
    per step, with its (a, b, c):   A = X X^T,   X <- a X + (b A + c A A) X

Arithmetic is bfloat16, which the recipes' published runs use; float64 input is
iterated in float64, as the truth that tests compare with. The published runs
divide by |M|_F + 1e-7; here a matrix of any magnitude is orthogonalised alike,
and a zero matrix stays zero.

The kernel rounds the input to bfloat16 too but iterates in float16, which is
closer to the truth and lets two steps of a long matrix share one Gram matrix.
It serves matrices whose rows and columns are multiples of 8, all of them in one
persistent launch, with coefficients that stay inside float16's range; others
take the composite, batched by shape.
"""

import functools

import torch

from pgolf_fast.ops import _library
from pgolf_fast.ops._library import aligned, library, require, require_device, require_dtype

MAX_STEPS = 16  # of the kernel
SQUARES = 4  # kOrthogonalizeSquares

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


# matrices [b, m, n]; `coefficients` holds a, b, c of each step, one after the other. One result per shape and dtype
# that occurs, in the order of their first occurrence: all matrices of that kind, one behind the other.
library.define("orthogonalize(Tensor[] matrices, float[] coefficients) -> Tensor[]")


def _groups(matrices):
    """Indices of the matrices of each kind."""
    kinds, groups = [], []
    for i, m in enumerate(matrices):
        kind = (*m.shape[1:], m.dtype)
        if kind not in kinds:  # compared, not hashed: a symbolic size of torch.compile has no hash
            kinds.append(kind)
            groups.append([])
        groups[kinds.index(kind)].append(i)
    return groups


def _steps(coefficients):
    return [coefficients[i : i + 3] for i in range(0, len(coefficients), 3)]


def _new_result(members):
    first = members[0]
    dtype = torch.float64 if first.dtype == torch.float64 else torch.bfloat16
    return first.new_empty((sum(m.shape[0] for m in members), *first.shape[1:]), dtype=dtype)


@torch.library.impl(library, "orthogonalize", "CPU")
def _cpu(matrices, coefficients):
    return _composite([[matrices[i] for i in group] for group in _groups(matrices)], coefficients, orthogonalize_ref)


def _composite(groups, coefficients, iterate):
    results = []
    for members in groups:
        batch = torch.cat(members)
        results.append(iterate(batch, _steps(coefficients)).contiguous() if batch.numel() else _new_result(members))
    return results


def _iterate_batched(batch, steps):
    """orthogonalize_ref on [count, m, n], with the sums folded into the batched products."""
    x = batch.to(torch.float64 if batch.dtype == torch.float64 else torch.bfloat16)
    tall = x.shape[-2] > x.shape[-1]
    x = _normalized(x.mT if tall else x)
    for a, b, c in steps:
        gram = torch.bmm(x, x.mT)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


@functools.cache
def _fits_float16(coefficients):
    """Whether products of singular values and polynomials stay below 2^15, wherever a singular value begins between 0 and 1."""
    values = [i / 256 for i in range(257)]
    for a, b, c in _steps(coefficients):
        polynomials = [a + b * v**2 + c * v**4 for v in values]
        values = [v * p for v, p in zip(values, polynomials)]
        if max(map(abs, polynomials)) > 100 or max(map(abs, values)) > 16:
            return False
    return True


def _kernel_serves(members, coefficients):
    first = members[0]
    fits = first.shape[1] % 8 == 0 and first.shape[2] % 8 == 0 and first.dtype != torch.float64
    fits = fits and len(coefficients) <= 3 * MAX_STEPS and _fits_float16(tuple(coefficients))
    return fits and sum(m.numel() for m in members) > 0 and _library.uses_kernel("orthogonalize", first.device)


def _kernel(groups, coefficients):
    """All matrices of one dtype: `groups` of equal shapes."""
    outputs = [_new_result(members) for members in groups]
    x0, x1 = ([torch.empty_like(o, dtype=torch.float16) for o in outputs] for _ in range(2))
    squares = [x.new_empty(SQUARES, x.shape[0], min(x.shape[1:]), min(x.shape[1:])) for x in x0]
    matrices = [aligned(m) for members in groups for m in members if m.shape[0] > 0]
    counters = outputs[0].new_empty(sum(m.shape[0] for m in matrices) + len(groups), dtype=torch.int32)
    sums = sum(m.shape[0] * torch.ops.pgolf_fast_sm90.orthogonalize_partial_sums(m.shape[1] * m.shape[2]) for m in matrices)
    partial_sums = outputs[0].new_empty(sums, dtype=torch.float64)
    # NOTE: the kernel divides b by c.
    coefficients = [v if i % 3 < 2 or abs(v) > 1e-20 else 1e-20 for i, v in enumerate(coefficients)]
    torch.ops.pgolf_fast_sm90.orthogonalize(matrices, coefficients, outputs, x0, x1, squares, counters, partial_sums)
    return outputs


@torch.library.impl(library, "orthogonalize", "CUDA")
def _cuda(matrices, coefficients):
    groups = [[matrices[i] for i in group] for group in _groups(matrices)]
    results = [None] * len(groups)
    served = [_kernel_serves(members, coefficients) for members in groups]
    for dtype in (torch.bfloat16, torch.float32):
        own = [g for g, members in enumerate(groups) if served[g] and members[0].dtype == dtype]
        if own:
            for g, result in zip(own, _kernel([groups[g] for g in own], coefficients)):
                results[g] = result
    others = [g for g in range(len(groups)) if not served[g]]
    for g, result in zip(others, _composite([groups[g] for g in others], coefficients, _iterate_batched)):
        results[g] = result
    return results


@torch.library.register_fake(f"{_library.NAMESPACE}::orthogonalize")
def _fake(matrices, coefficients):
    return [_new_result([matrices[i] for i in group]) for group in _groups(matrices)]


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
    flat_batches = [m.detach().reshape(m.shape[:-2].numel(), *m.shape[-2:]) for m in matrices]
    results = [None] * len(matrices)
    for group, batch in zip(_groups(flat_batches), torch.ops.pgolf_fast.orthogonalize(flat_batches, flat)):
        for i, part in zip(group, batch.split([flat_batches[i].shape[0] for i in group])):
            results[i] = part.view(matrices[i].shape)
    return results
