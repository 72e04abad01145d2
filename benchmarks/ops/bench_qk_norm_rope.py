"""Norm, rotation and gain of packed queries and keys, forward and backward as the fused block calls them.

Fewest bytes: what is read and written of queries and keys (and values, with a value embedding), once. The backward writes into the
gradient of the packed product. torch.compile gets the same mathematics.
"""

import torch

from benchmarks.shapes import HEAD_DIM, HEADS, KV_HEADS, SEQUENCE, tokens
from benchmarks.timing import Case, rotations_for
from pgolf_fast.ops import qk_norm_rope
from pgolf_fast.ops.qk_norm_rope import qk_norm_rope_ref

HALF = 8  # of the 16 dimensions that rotate


def cases(device):
    compiled = torch.compile(qk_norm_rope_ref, dynamic=False)
    m = tokens(device)
    head = 2 * m * HEAD_DIM  # bytes of one head's channels
    rotations = rotations_for((HEADS + 2 * KV_HEADS) * head)
    packed = [torch.randn(m, (HEADS + 2 * KV_HEADS) * HEAD_DIM, device=device).bfloat16().requires_grad_() for _ in range(rotations)]
    d_packed = [torch.randn_like(x) for x in packed]
    gain = torch.full((HEADS,), 1.5, device=device, requires_grad=True)
    angle = torch.arange(SEQUENCE, device=device)[:, None] * 10000.0 ** (-torch.arange(HALF, device=device) / HALF)
    cos, sin = angle.cos().bfloat16(), angle.sin().bfloat16()
    values = torch.randn(m, KV_HEADS * HEAD_DIM, device=device).bfloat16()
    columns = [HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM]
    for name, value_add in (("queries and keys", None), ("with a value embedding", values)):
        heads = HEADS + KV_HEADS

        def forward(function, value_add=value_add):
            def run(i):
                with torch.no_grad():
                    return function(packed[i], gain, cos, sin, KV_HEADS, HEAD_DIM, value_add)

            return run

        @torch.no_grad()
        def backward(i, value_add=value_add):
            dq, dk, dv = d_packed[i].split(columns, dim=1)
            d_qkv = torch.empty_like(packed[i])
            dv = None if value_add is None else dv
            return torch.ops.pgolf_fast.qk_norm_rope_bwd_(d_qkv, dq, dk, dv, packed[i], gain, cos, sin, KV_HEADS, HEAD_DIM)

        contestants = {"ours": qk_norm_rope, "torch.compile": compiled}
        fwd = (2 * heads + (0 if value_add is None else 3 * KV_HEADS)) * head
        bwd = (3 * heads + (0 if value_add is None else 2 * KV_HEADS)) * head
        yield Case(f"{name} fwd", {k: forward(f) for k, f in contestants.items()}, fwd, 0, rotations)
        yield Case(f"{name} bwd", {"ours": backward}, bwd, 0, rotations)
