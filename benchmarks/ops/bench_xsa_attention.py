"""Exclusive self-attention, dense rows and packed documents, forward and forward + backward.

Fewest operations: two products of the causal half forward, five more backward. The peers are torch's attention with the
projection as a torch.compile pass behind it; of packed documents that is its FlashAttention-2. FlashAttention-3, which is on no
package index, is a peer where its module imports. "ln 2" is the scale of the scores in the fused blocks, whose queries hold the
rest of it; the others have D ** -0.5.
"""

import importlib.util
import math
from functools import partial

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.shapes import HEAD_DIM, HEADS, KV_HEADS, SEQUENCE, cu_seqlens, document_lengths, target_document_lengths, tokens
from benchmarks.timing import Case
from pgolf_fast import xsa_attention
from pgolf_fast.ops.xsa_attention import _composite

STRIDE = 64  # new positions in a window


@torch.compile
def project(y, v):
    own = v.repeat_interleave(y.shape[2] // v.shape[2], dim=2).float()
    return (y - (y * own).sum(-1, keepdim=True) / own.square().sum(-1, keepdim=True).clamp_min(1e-24) * own).to(v.dtype)


def torch_attention(backend):
    def attention(q, k, v, scale=None):
        with sdpa_kernel(backend):
            y = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=True, enable_gqa=True, scale=scale)
        return project(y.transpose(1, 2), v)

    return attention


def flash_varlen(starts):
    def attention(q, k, v, scale=None):
        # torch's varlen_attn, whose older versions refuse fewer key than query heads, is a wrapper of this.
        y, *_ = torch.ops.aten._flash_attention_forward(q[0], k[0], v[0], starts, starts, SEQUENCE, SEQUENCE, 0.0, True, False, scale=scale)
        return project(y.view_as(q), v)

    return attention


def flash_attention_3(starts=None):
    """{name: attention}, empty where it is not installed."""
    if importlib.util.find_spec("flash_attn_interface") is None:
        return {}
    from flash_attn_interface import flash_attn_func, flash_attn_varlen_func

    def attention(q, k, v):
        if starts is None:
            y = flash_attn_func(q, k, v, causal=True)
        else:
            y = flash_attn_varlen_func(q[0], k[0], v[0], starts, starts, SEQUENCE, SEQUENCE, causal=True)
        y = y[0] if isinstance(y, tuple) else y  # some versions return the log-sum-exp too
        return project(y.view_as(q), v)

    return {"FA3": attention}


def forward(function, inputs):
    def run(i):
        with torch.no_grad():
            return function(*inputs)

    return run


def forward_backward(function, inputs, grad):
    return lambda i: torch.autograd.grad(function(*inputs), inputs, grad)


def cases(device):
    n = tokens(device)
    mixes = [document_lengths(n)]
    if device.type == "cuda":
        mixes.append(target_document_lengths())

    def packed(documents):
        starts = cu_seqlens(documents, device, pad_to=256 if device.type == "cuda" else None)
        ours = partial(xsa_attention, cu_seqlens=starts, max_seqlen=SEQUENCE)
        starts = starts[: len(documents) + 1]
        if device.type == "cuda":
            return {"ours": ours, "flash": flash_varlen(starts), **flash_attention_3(starts)}
        return {"ours": ours, "torch padded": lambda q, k, v: _composite(q, k, v, True, None, HEAD_DIM**-0.5, starts, SEQUENCE)}

    dense_peers = {"torch math": torch_attention(SDPBackend.MATH)}
    if device.type == "cuda":
        dense_peers = {"cuDNN": torch_attention(SDPBackend.CUDNN_ATTENTION), "flash": torch_attention(SDPBackend.FLASH_ATTENTION)}
        dense_peers |= flash_attention_3()
    rows = n // SEQUENCE
    for name, batch, lengths, contestants in (
        (f"dense {rows}x{SEQUENCE}", rows, [SEQUENCE] * rows, {"ours": xsa_attention, **dense_peers}),
        *((f"packed {len(documents)} documents, {n}", 1, documents, packed(documents)) for documents in mixes),
    ):
        product = 2 * HEAD_DIM * HEADS * sum(length * (length + 1) // 2 for length in lengths)
        powers = {k: partial(f, scale=math.log(2)) for k, f in contestants.items() if k in ("ours", "cuDNN", "flash")}
        for work, functions, gain in ((name, contestants, 1), (f"{name}, ln 2,", powers, HEAD_DIM**-0.5 / math.log(2))):
            qkv = torch.randn(batch, n // batch, HEADS + 2 * KV_HEADS, HEAD_DIM, device=device)
            qkv[:, :, :HEADS] *= gain  # the same scores
            inputs = [x.requires_grad_() for x in qkv.bfloat16().split([HEADS, KV_HEADS, KV_HEADS], dim=2)]
            grad = torch.randn_like(inputs[0])
            yield Case(f"{work} fwd", {k: forward(f, inputs) for k, f in functions.items()}, 0, 2 * product)
            yield Case(f"{work} fwd+bwd", {k: forward_backward(f, inputs, grad) for k, f in functions.items()}, 0, 7 * product)

    # Sliding-window evaluation: of every window only the last positions are new.
    q, k, v = (torch.randn(rows, SEQUENCE, heads, HEAD_DIM, device=device).bfloat16() for heads in (HEADS, KV_HEADS, KV_HEADS))
    q = q[:, -STRIDE:]
    contestants = {
        "ours": xsa_attention,
        "torch masked": lambda q, k, v: _composite(q, k, v, True, None, HEAD_DIM**-0.5, None, SEQUENCE),
    }
    product = 2 * HEAD_DIM * HEADS * rows * STRIDE * (SEQUENCE - STRIDE // 2)
    commands = {name: forward(f, (q, k, v)) for name, f in contestants.items()}
    yield Case(f"last {STRIDE} queries of {rows}x{SEQUENCE} fwd", commands, 0, 2 * product)
