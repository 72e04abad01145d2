"""Backward of the attention and of the output projection after it, for backwards written by hand: not differentiable itself.

    grad_out = d_projected weight, then xsa_attention_bwd_packed; where q and k are of qkv_forward (rstd is given), then qkv_backward

On the kernel path grad_out never lies in memory: the product's epilogue makes of it what attention's backward starts from.
The attention's kernels turn dq and dk into the gradients of the raw product on their way out.
There dgate is 0 where the gate is exactly 0; a gate that is a sigmoid passes nothing on there.
"""

import torch

from pgolf_fast.ops import _library, qkv
from pgolf_fast.ops._library import library
from pgolf_fast.ops.products import project_backward
from pgolf_fast.ops.xsa_attention import HEAD_DIM, NOT_OF_RAW, _bwd_into

# d_projected [B T, C], weight [C, Hq D]; rstd, gain, cos, sin and dgain as in qkv_backward; the rest, and the
# results, as in xsa_attention_bwd_packed
library.define(
    "xsa_output_bwd(Tensor d_projected, Tensor weight, Tensor q, Tensor k, Tensor v, Tensor? gate, Tensor out, Tensor lse, Tensor own,"
    " Tensor[] documents, bool xsa, float scale, Tensor? rstd=None, Tensor? gain=None, Tensor? cos=None, Tensor? sin=None,"
    " Tensor(a!)? dgain=None) -> (Tensor dqkv, Tensor dgate)"
)


def _op_by_op(d_projected, weight, q, k, v, gate, out, lse, own, documents, xsa, scale, rstd=None, *source):
    grad_out = project_backward(d_projected, weight).view(q.shape)
    forward = q, k, v, gate, out, lse, own, documents, xsa, scale
    dqkv, dgate = torch.ops.pgolf_fast.xsa_attention_bwd_packed(grad_out, *forward)
    if rstd is not None:
        made = torch.cat([q, k, v], dim=2).flatten(2).flatten(0, 1)
        torch.ops.pgolf_fast.qkv_backward(dqkv.view_as(made), made, rstd, *source)
    return dqkv, dgate


library.impl("xsa_output_bwd", _op_by_op, "CPU")


def _kernel_serves(q, k, v, gate, out, cos):
    tokens = q.shape[1]
    fits = q.dtype == torch.bfloat16 and q.shape[3] == HEAD_DIM and q.shape[2] == 2 * k.shape[2]
    fits = fits and out.is_contiguous() and v.stride()[2:] == (HEAD_DIM, 1) and v.stride(1) % 8 == 0 and v.data_ptr() % 16 == 0
    fits = fits and (q.shape[0] == 1 or v.stride(0) == tokens * v.stride(1))
    fits = fits and (gate is None or (gate.dtype == torch.bfloat16 and gate.is_contiguous()))
    fits = fits and (cos is None or qkv.kernel_fits(q.shape[3], 2 * cos.shape[1]))
    return fits and _library.uses_kernel("xsa_output_bwd", q.device)


@torch.library.impl(library, "xsa_output_bwd", "CUDA")
def _cuda(d_projected, weight, q, k, v, gate, out, lse, own, documents, xsa, scale, *raw):
    raw = raw or NOT_OF_RAW
    if not _kernel_serves(q, k, v, gate, out, raw[2]):
        return _op_by_op(d_projected, weight, q, k, v, gate, out, lse, own, documents, xsa, scale, *raw)
    heads = [x.shape[2] for x in (q, k, v)]
    dqkv = q.new_empty((*q.shape[:2], sum(heads), q.shape[3]))
    gradients = dqkv.split(heads, dim=2)
    return dqkv, _bwd_into(gradients, d_projected, q, k, v, gate, out, lse, own, documents, xsa, scale, weight, raw)


@torch.library.register_fake(f"{_library.NAMESPACE}::xsa_output_bwd")
def _fake(d_projected, weight, q, k, v, gate, out, lse, own, documents, xsa, scale, *raw):
    dgate = gate.new_empty(gate.shape) if gate is not None else q.new_empty(0)
    return q.new_empty((*q.shape[:2], q.shape[2] + 2 * k.shape[2], q.shape[3])), dgate
