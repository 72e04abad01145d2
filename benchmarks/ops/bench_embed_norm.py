"""The stream's first value: token rows, addend, smear, RMSNorm; forward and backward as the fused step calls them.

Fewest bytes: forward, the addend read and the result written; backward, the incoming gradient and the addend read and the gradient
of e written. The table lies in the L2; its own gradient is `embedding`'s. torch.compile gets the same mathematics.
"""

import torch

from benchmarks.ops.bench_embedding import zipf
from benchmarks.shapes import SEQUENCE, WIDTH, tokens
from benchmarks.timing import Case, rotations_for
from pgolf_fast.ops import embed_norm
from pgolf_fast.ops.embed_norm import SMEARS, embed_norm_ref

BOS = 1


@torch.no_grad()
def cases(device):
    compiled = torch.compile(embed_norm_ref, dynamic=False)
    m = tokens(device)
    unit = 2 * m * WIDTH
    rotations = rotations_for(unit)
    for name, num_rows, smear, with_addend, table_dtype in (
        ("caseops8192, smear by token", 8192, "token", False, torch.bfloat16),
        ("sp1024, bigrams, smear by channel", 1024, "channel", True, torch.float32),
        ("no smear", 1024, "none", False, torch.bfloat16),
    ):
        batches = [zipf(m, num_rows, device).view(-1, SEQUENCE) for _ in range(rotations)]
        table = torch.randn(num_rows, WIDTH, device=device).to(table_dtype)
        streams = [torch.randn(*batches[0].shape, WIDTH, device=device).bfloat16() for _ in range(rotations)]
        addend = torch.randn(*batches[0].shape, WIDTH, device=device).bfloat16() if with_addend else None
        gate = {"none": None, "token": torch.randn(12, device=device), "channel": torch.randn(WIDTH, device=device)}[smear]
        smear_lambda = torch.ones(1, device=device) if smear == "token" else None
        given = (table, addend, gate, smear_lambda)

        def forward(function, batches=batches, given=given, smear=smear):
            return lambda i: function(batches[i], given[0], given[1], smear, *given[2:], BOS)

        def backward(i, batches=batches, streams=streams, given=given, smear=smear):
            return torch.ops.pgolf_fast.embed_norm_bwd(streams[i], batches[i], *given, SMEARS.index(smear), BOS)

        contestants = {"ours": forward(embed_norm), "torch.compile": forward(compiled)}
        yield Case(f"{name} fwd", contestants, (1 + with_addend) * unit, 0, rotations)
        yield Case(f"{name} bwd", {"ours": backward}, (2 + with_addend) * unit, 0, rotations)
