"""Attention's backward behind its output projection: one product with the preparation in its epilogue, or the product and a pass.

Fewest operations: the projection's input gradient and the attention backward's five products of the causal half.
"""

import torch

from benchmarks.shapes import HEAD_DIM, HEADS, KV_HEADS, SEQUENCE, WIDTH, cu_seqlens, document_lengths, tokens
from benchmarks.timing import Case
from pgolf_fast.ops.xsa_output import _in_two_ops


def cases(device):
    m, scale = tokens(device), HEAD_DIM**-0.5
    rows, documents = m // SEQUENCE, document_lengths(m)
    weight = (torch.randn(WIDTH, HEADS * HEAD_DIM, device=device) / WIDTH**0.5).bfloat16()
    d_projected = torch.randn(m, WIDTH, device=device).bfloat16()
    ops = torch.ops.pgolf_fast
    for name, batch, lengths, starts, gated in (
        (f"dense {rows}x{SEQUENCE}", rows, [SEQUENCE] * rows, None, False),
        (f"packed {len(documents)} documents, {m}, gated", 1, documents, cu_seqlens(documents, device), True),
    ):
        qkv = torch.randn(batch, m // batch, HEADS + 2 * KV_HEADS, HEAD_DIM, device=device).bfloat16()
        q, k, v = qkv.split([HEADS, KV_HEADS, KV_HEADS], dim=2)
        gate = torch.rand(batch, m // batch, HEADS, device=device).bfloat16() if gated else None
        forward = ops.xsa_attention_fwd(q, k, v, gate, starts, SEQUENCE, True, scale)
        arguments = (d_projected, weight, q, k, v, gate, *forward, starts, SEQUENCE, True, scale)
        contestants = {
            "ours": lambda i, a=arguments: ops.xsa_output_bwd(*a),
            "two ops": lambda i, a=arguments: _in_two_ops(*a),
        }
        pairs = sum(length * (length + 1) // 2 for length in lengths)
        flops = 2 * m * WIDTH * HEADS * HEAD_DIM + 5 * 2 * HEADS * HEAD_DIM * pairs
        yield Case(f"{name} bwd", contestants, 2 * m * (WIDTH + 3 * (HEADS + KV_HEADS) * HEAD_DIM), flops)
