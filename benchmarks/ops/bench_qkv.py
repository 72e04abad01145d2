"""Queries, keys and values of a block in one product, normalised and rotated; and the gradient through the latter two, in place.

Fewest operations of the forward: the product. Fewest bytes of norm and rotation alone: queries and keys read and written; of the
backward: gradients and values of queries and keys read, gradients written. torch.compile gets the same mathematics, forward from the
definition, backward by autograd.
"""

import torch

from benchmarks.shapes import HEAD_DIM, HEADS, KV_HEADS, SEQUENCE, WIDTH, tokens
from benchmarks.timing import Case
from pgolf_fast.ops.qkv import ROTATED, qkv_ref


def cases(device):
    m, n = tokens(device), (HEADS + 2 * KV_HEADS) * HEAD_DIM
    x, weight = torch.randn(m, WIDTH, device=device).bfloat16(), (torch.randn(n, WIDTH, device=device) / WIDTH**0.5).bfloat16()
    gain = torch.ones(HEADS, device=device)
    angle = torch.rand(SEQUENCE, ROTATED // 2, device=device)
    cos, sin = angle.cos().bfloat16(), angle.sin().bfloat16()
    qkv, rstd = torch.ops.pgolf_fast.qkv_forward(x, weight, gain, cos, sin, KV_HEADS)
    turned = qkv.clone()
    gradient, dgain = torch.randn(m, n, device=device).bfloat16(), torch.zeros_like(gain)
    compiled = torch.compile(lambda *arguments: qkv_ref(*arguments).bfloat16(), dynamic=False)
    leaf = x.clone().requires_grad_()

    def forward(i):
        return torch.ops.pgolf_fast.qkv_forward(x, weight, gain, cos, sin, KV_HEADS)

    @torch.no_grad()
    def compiled_forward(i):
        return compiled(x, weight, gain, cos, sin, KV_HEADS)

    def normalize(i):
        # In place, so each call but the first takes what is normal already: it turns further.
        torch.ops.pgolf_fast.qkv_normalize(turned, gain, cos, sin, KV_HEADS)

    def backward(i):
        # In place, so each call takes what the one before left; with gains of 1 that is a projection, which neither grows nor dies out.
        torch.ops.pgolf_fast.qkv_backward(gradient, qkv, rstd, gain, cos, sin, dgain)

    def compiled_both(i):
        return torch.autograd.grad(compiled(leaf, weight, gain, cos, sin, KV_HEADS), leaf, gradient)

    def both(i):
        forward(i), backward(i)
        return gradient @ weight

    normed = (HEADS + KV_HEADS) * HEAD_DIM
    yield Case(f"{m}x{WIDTH}x{n} fwd", {"ours": forward, "torch.compile": compiled_forward}, 2 * m * (WIDTH + n), 2 * m * WIDTH * n)
    yield Case(f"{m}x{n} norm and rotation alone", {"ours": normalize}, 2 * 2 * m * normed)
    yield Case(f"{m}x{WIDTH}x{n} bwd of norm and rotation", {"ours": backward}, 3 * 2 * m * normed)
    yield Case(f"{m}x{WIDTH}x{n} fwd + bwd to x", {"ours": both, "torch.compile": compiled_both}, 0, 4 * m * WIDTH * n)
