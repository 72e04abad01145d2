"""Attention's backward behind its output projection: one product with the preparation in its epilogue, or the product and a pass.
With queries and keys normalised and rotated, also what leads to the raw product: in the attention's kernels, or a pass more.

Fewest operations: the projection's input gradient and the attention backward's five products of the causal half.
"""

import torch

from benchmarks.shapes import HEAD_DIM, HEADS, KV_HEADS, SEQUENCE, WIDTH, cu_seqlens, document_lengths, tokens
from benchmarks.timing import Case
from pgolf_fast.fused_blocks import ATTENTION_SCALE
from pgolf_fast.ops.qkv import ROTATED
from pgolf_fast.ops.xsa_attention import documents_of
from pgolf_fast.ops.xsa_output import _op_by_op


def cases(device):
    m, scale = tokens(device), ATTENTION_SCALE
    rows, documents = m // SEQUENCE, document_lengths(m)
    weight = (torch.randn(WIDTH, HEADS * HEAD_DIM, device=device) / WIDTH**0.5).bfloat16()
    d_projected = torch.randn(m, WIDTH, device=device).bfloat16()
    ops = torch.ops.pgolf_fast
    for name, batch, lengths, starts, gated in (
        (f"dense {rows}x{SEQUENCE}", rows, [SEQUENCE] * rows, None, False),
        (f"packed {len(documents)} documents, {m}, gated", 1, documents, cu_seqlens(documents, device), True),
    ):
        qkv = torch.randn(batch, m // batch, HEADS + 2 * KV_HEADS, HEAD_DIM, device=device)
        qkv[:, :, :HEADS] *= HEAD_DIM**-0.5 / scale  # scores of normal spread
        qkv = qkv.bfloat16()
        q, k, v = qkv.split([HEADS, KV_HEADS, KV_HEADS], dim=2)
        gate = torch.rand(batch, m // batch, HEADS, device=device).bfloat16() if gated else None
        where = documents_of(starts, m // batch, HEADS // KV_HEADS)
        forward = ops.xsa_attention_fwd(q, k, v, gate, where, True, scale)
        arguments = (d_projected, weight, q, k, v, gate, *forward, where, True, scale)
        contestants = {
            "ours": lambda i, a=arguments: ops.xsa_output_bwd(*a),
            "two ops": lambda i, a=arguments: _op_by_op(*a),
        }
        table = torch.rand(SEQUENCE, ROTATED // 2, device=device).bfloat16()
        gain, rstd = torch.rand(HEADS, device=device), torch.rand(m, HEADS + KV_HEADS, device=device)
        raw = rstd, gain, table, table, torch.zeros_like(gain)

        def then_a_pass(i, arguments=arguments, qkv=qkv.view(m, -1), raw=raw):
            dqkv, _ = ops.xsa_output_bwd(*arguments)
            ops.qkv_backward(dqkv.view_as(qkv), qkv, *raw)

        to_raw = {"ours": lambda i, a=(*arguments, *raw): ops.xsa_output_bwd(*a), "a pass more": then_a_pass}
        pairs = sum(length * (length + 1) // 2 for length in lengths)
        flops = 2 * m * WIDTH * HEADS * HEAD_DIM + 5 * 2 * HEADS * HEAD_DIM * pairs
        moved = 2 * m * (WIDTH + 3 * (HEADS + KV_HEADS) * HEAD_DIM)
        yield Case(f"{name} bwd", contestants, moved, flops)
        yield Case(f"{name} bwd to raw", to_raw, moved, flops)
