"""The gate of each attention head, from the first channels of the block's normalised input:

    gate = sigmoid(scale * n[:, :window] weight^T)      l = scale * gate (1 - gate) dgate
    dn[:, :window] += l weight                          dweight += l^T n[:, :window]

For backwards written by hand.
"""

import torch

from pgolf_fast.ops import _library
from pgolf_fast.ops._library import library

HEADS, MAX_WINDOW = 8, 16  # of the kernel

# n [M, C], weight [H, window] in the accumulation dtype; gate [M, H] in the dtype of n
library.define("attn_gate_fwd(Tensor n, Tensor weight, float scale) -> Tensor")
library.define("attn_gate_bwd(Tensor dgate, Tensor gate, Tensor n, Tensor weight, float scale, Tensor(a!) dn, Tensor(b!) dweight) -> ()")


def _forward_formula(n, weight, scale):
    logits = n[:, : weight.shape[1]].to(weight.dtype) @ weight.T
    return torch.sigmoid(scale * logits).to(n.dtype)


def _backward_formula(dgate, gate, n, weight, scale, dn, dweight):
    dgate, gate, window = dgate.to(weight.dtype), gate.to(weight.dtype), weight.shape[1]
    dlogits = scale * gate * (1 - gate) * dgate
    dn[:, :window] = (dn[:, :window] + dlogits @ weight).to(dn.dtype)
    dweight += dlogits.T @ n[:, :window].to(weight.dtype)


library.impl("attn_gate_fwd", _forward_formula, "CPU")
library.impl("attn_gate_bwd", _backward_formula, "CPU")


def _kernel_serves(name, n, weight):
    fits = weight.shape[0] == HEADS and weight.shape[1] <= MAX_WINDOW <= n.shape[1] and n.shape[1] % 8 == 0
    return fits and _library.uses_kernel(name, n.device)


@torch.library.impl(library, "attn_gate_fwd", "CUDA")
def _forward_cuda(n, weight, scale):
    if not _kernel_serves("attn_gate_fwd", n, weight):
        return _forward_formula(n, weight, scale)
    gate = n.new_empty(n.shape[0], weight.shape[0])
    torch.ops.pgolf_fast_sm90.attn_gate_fwd(n, weight, scale, gate)
    return gate


@torch.library.impl(library, "attn_gate_bwd", "CUDA")
def _backward_cuda(dgate, gate, n, weight, scale, dn, dweight):
    if not _kernel_serves("attn_gate_bwd", n, weight):
        return _backward_formula(dgate, gate, n, weight, scale, dn, dweight)
    torch.ops.pgolf_fast_sm90.attn_gate_bwd(dgate, gate, n, weight, scale, dn, dweight)


@torch.library.register_fake(f"{_library.NAMESPACE}::attn_gate_fwd")
def _forward_fake(n, weight, scale):
    return n.new_empty(n.shape[0], weight.shape[0])


@torch.library.register_fake(f"{_library.NAMESPACE}::attn_gate_bwd")
def _backward_fake(dgate, gate, n, weight, scale, dn, dweight):
    pass
