"""Rows of a table by index and the table's gradient, on indices that fall as words do (1 / rank).

Fewest bytes: forward, the indices read and the rows written; backward, the rows read and the gradient read and written. The table
itself lies in the L2. "ours" sorts the indices in the call; "sorted before" is what blocks that share a batch's sort pay. torch's
backward sorts too.
"""

import torch
import torch.nn.functional as F

from benchmarks.shapes import WIDTH, tokens
from benchmarks.timing import Case, rotations_for
from pgolf_fast.ops import embedding, embedding_plan

TABLES = (("tokens of caseops8192", 8192, WIDTH), ("tokens of sp1024", 1024, WIDTH), ("bigrams", 2048, 128), ("value embedding", 1024, 128))


def zipf(m, num_rows, device):
    weight = 1 / torch.arange(1, num_rows + 1, device=device, dtype=torch.float64)
    shuffled = torch.randperm(num_rows, device=device)  # an index says nothing about how often it stands
    return shuffled[torch.multinomial(weight, m, replacement=True)]


@torch.no_grad()
def cases(device):
    m = tokens(device)
    for name, num_rows, width in TABLES:
        moved = 2 * m * width
        rotations = rotations_for(moved)
        indices = [zipf(m, num_rows, device) for _ in range(rotations)]
        plans = [embedding_plan(i, num_rows) for i in indices]
        d_out = [torch.randn(m, width, device=device).bfloat16() for _ in range(rotations)]
        table = torch.randn(num_rows, width, device=device)
        gradient = torch.zeros_like(table)

        def ours(i, indices=indices, d_out=d_out, gradient=gradient, num_rows=num_rows):
            torch.ops.pgolf_fast.embedding_bwd_(gradient, d_out[i], *embedding_plan(indices[i], num_rows))

        def sorted_before(i, plans=plans, d_out=d_out, gradient=gradient):
            torch.ops.pgolf_fast.embedding_bwd_(gradient, d_out[i], *plans[i])

        def torchs(i, indices=indices, d_out=d_out, gradient=gradient, num_rows=num_rows):
            gradient.add_(torch.ops.aten.embedding_dense_backward(d_out[i], indices[i], num_rows, -1, False))

        yield Case(
            f"{name} {num_rows}x{width} fwd",
            {
                "ours": lambda i, t=table, n=indices: embedding(n[i], t),
                "torch": lambda i, t=table, n=indices: F.embedding(n[i], t).bfloat16(),
            },
            moved, 0, rotations,
        )  # fmt: skip
        contestants = {"ours": ours, "sorted before": sorted_before, "torch": torchs}
        yield Case(f"{name} {num_rows}x{width} bwd", contestants, moved + 8 * num_rows * width, 0, rotations)
