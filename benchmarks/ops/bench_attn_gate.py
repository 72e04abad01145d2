"""The attention gate of a block, forward and backward.

Fewest bytes: a sector of 32 bytes of each input row, the gates; backward those, the gates' gradients, and the sector
of dn read and written.
"""

import torch

from benchmarks.shapes import HEADS, WIDTH, tokens
from benchmarks.timing import Case
from pgolf_fast.ops.attn_gate import _backward_formula, _forward_formula

WINDOW = 12


def cases(device):
    m = tokens(device)
    n, dn, dgate = (torch.randn(m, width, device=device).bfloat16() for width in (WIDTH, WIDTH, HEADS))
    weight = torch.randn(HEADS, WINDOW, device=device)
    gate, dweight = torch.ops.pgolf_fast.attn_gate_fwd(n, weight, 1.0), torch.zeros_like(weight)
    contestants = {
        "ours": (torch.ops.pgolf_fast.attn_gate_fwd, torch.ops.pgolf_fast.attn_gate_bwd),
        "torch": (_forward_formula, _backward_formula),
    }
    compiled = tuple(torch.compile(f, dynamic=False) for f in (_forward_formula, _backward_formula))
    contestants["torch.compile"] = compiled
    forward = {name: lambda i, f=f: f(n, weight, 1.0) for name, (f, _) in contestants.items()}
    # dn is added to by each call: it grows, which changes no time.
    backward = {name: lambda i, b=b: b(dgate, gate, n, weight, 1e-3, dn, dweight) for name, (_, b) in contestants.items()}
    yield Case(f"{m} rows fwd", forward, m * (32 + 2 * HEADS))
    yield Case(f"{m} rows bwd", backward, m * (3 * 32 + 4 * HEADS))
