"""Exclusive self-attention: causal grouped-query attention whose output drops its own value's direction.

    S = scale q k^T, causal, within a document      P = softmax(S)      y = P v
    own = (y . v) / max(|v|, 1e-12)^2               z = y - own v       (v of the same token and KV head)
    out = gate * z

Backward of the last two lines: with dz = gate dout and e = (dz . v) / |v|^2,
dy = dz - e v and v receives -(e z + own dy) beside what it gets through P. Since dy and z are
both orthogonal to v, rowsum(dy * y) = rowsum(dz * z).

Query head h reads KV head h // (Hq / Hk). Packed documents: B = 1, document i
is the tokens [cu_seqlens[i], cu_seqlens[i + 1]); tokens after the last entry
give 0; documents of length 0 are allowed, so a list can be padded to a fixed length.
The ops take what `documents_of` makes of such a list, once for all layers.

A q shorter than k and v holds the last positions of its row: their attention to all that came before, forward only.
"""

import math

import torch
import torch.nn.functional as F

from pgolf_fast.ops import _library
from pgolf_fast.ops._library import accumulation_dtype, library, require, require_device, require_dtype

EPSILON = 1e-12


def _ascending(cu_seqlens, tokens):
    """As the kernels take any list, so that none is harmful: from 0, never descending, up to `tokens`."""
    return F.pad(cu_seqlens[1:].clamp(0, tokens).cummax(0).values, (1, 0))


def _sequences(k, cu_seqlens):
    """(row of the batch, its tokens) of every document."""
    if cu_seqlens is None:
        return [(b, slice(0, k.shape[1])) for b in range(k.shape[0])]
    ends = _ascending(cu_seqlens, k.shape[1]).tolist()
    return [(0, slice(start, end)) for start, end in zip(ends, ends[1:]) if end > start]


def _attend(q, k, v, scale):
    """One document, [H, T, D] each, q perhaps only its end: y, probabilities, log-sum-exp of the scores."""
    scores = scale * (q @ k.mT)
    hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1 + k.shape[1] - q.shape[1])
    scores = scores.masked_fill(hidden, -math.inf)
    lse = torch.logsumexp(scores, dim=-1)
    p = torch.exp(scores - lse[..., None])
    return p @ v, p, lse


def _own_share(y, v):
    """Coefficient of v in y, [..., 1]."""
    return (y * v).sum(-1, keepdim=True) / v.norm(dim=-1, keepdim=True).clamp_min(EPSILON).square()


def _heads_first(x, repeats=1):
    """[T, H, D] to [H * repeats, T, D] in the accumulation dtype."""
    return x.to(accumulation_dtype(x.dtype)).transpose(0, 1).repeat_interleave(repeats, dim=0)


def xsa_attention_ref(q, k, v, xsa=True, gate=None, scale=None, cu_seqlens=None, max_seqlen=None):
    """The definition, differentiable, one document at a time."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    group = q.shape[2] // k.shape[2]
    rows = [torch.zeros_like(q[b]) for b in range(q.shape[0])]
    for b, tokens in _sequences(k, cu_seqlens):
        qh, kh, vh = _heads_first(q[b, tokens]), _heads_first(k[b, tokens], group), _heads_first(v[b, tokens], group)
        y, _, _ = _attend(qh, kh, vh, scale)
        vh = vh[:, -y.shape[1] :]
        z = (y - _own_share(y, vh) * vh if xsa else y).transpose(0, 1)
        if gate is not None:
            z = z * gate[b, tokens, :, None].to(z.dtype)
        rows[b] = torch.cat([rows[b][: tokens.start], z.to(q.dtype), rows[b][tokens.stop :]])
    return torch.stack(rows)


# What the ops below need to know of packed documents: the kernels' lists of blocks and places of tokens; on a CPU the list itself.
# group: Hq / Hk
library.define("xsa_attention_plan(Tensor cu_seqlens, int tokens, int group) -> Tensor[]")

# documents: of xsa_attention_plan; empty: every row of the batch is one.
# out [B, T, Hq, D]; lse and own [B, Hq, T] float32 (float64 for float64 input), what the backward needs.
library.define(
    "xsa_attention_fwd(Tensor q, Tensor k, Tensor v, Tensor? gate, Tensor[] documents, bool xsa, float scale)"
    " -> (Tensor out, Tensor lse, Tensor own)"
)
library.define(
    "xsa_attention_bwd(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor? gate, Tensor out, Tensor lse, Tensor own,"
    " Tensor[] documents, bool xsa, float scale) -> (Tensor dq, Tensor dk, Tensor dv, Tensor dgate)"
)

# The same with the gradients side by side, dqkv [B, T, Hq + 2 Hk, D].
library.define(
    "xsa_attention_bwd_packed(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor? gate, Tensor out, Tensor lse, Tensor own,"
    " Tensor[] documents, bool xsa, float scale) -> (Tensor dqkv, Tensor dgate)"
)


def documents_of(cu_seqlens, tokens, group):
    """What the ops take for `cu_seqlens`, int32 [documents + 1] or None."""
    return [] if cu_seqlens is None else torch.ops.pgolf_fast.xsa_attention_plan(cu_seqlens, tokens, group)


@torch.library.impl(library, "xsa_attention_plan", "CPU")
def _plan_cpu(cu_seqlens, tokens, group):
    return [cu_seqlens.clone()]


@torch.library.impl(library, "xsa_attention_fwd", "CPU")
def _fwd_cpu(q, k, v, gate, documents, xsa, scale):
    group = q.shape[2] // k.shape[2]
    out = torch.zeros(q.shape, dtype=q.dtype)
    lse = torch.zeros((q.shape[0], q.shape[2], q.shape[1]), dtype=accumulation_dtype(q.dtype))
    own = torch.zeros_like(lse)
    for b, tokens in _sequences(k, *(documents or [None])):
        qh, kh, vh = _heads_first(q[b, tokens]), _heads_first(k[b, tokens], group), _heads_first(v[b, tokens], group)
        y, _, lse[b, :, tokens] = _attend(qh, kh, vh, scale)
        if xsa:
            vh = vh[:, -y.shape[1] :]
            share = _own_share(y, vh)
            own[b, :, tokens] = share[..., 0]
            y = y - share * vh
        if gate is not None:
            y = y * gate[b, tokens].T[..., None].to(y.dtype)
        out[b, tokens] = y.transpose(0, 1).to(q.dtype)
    return out, lse, own


@torch.library.impl(library, "xsa_attention_bwd", "CPU")
def _bwd_cpu(grad_out, q, k, v, gate, out, lse, own, documents, xsa, scale):
    group = q.shape[2] // k.shape[2]
    dq, dk, dv = (torch.zeros(x.shape, dtype=x.dtype) for x in (q, k, v))
    dgate = torch.zeros(gate.shape, dtype=gate.dtype) if gate is not None else q.new_empty(0)

    def per_kv_head(x):  # [Hq, T, D] to [T, Hk, D], summed over the group
        return x.view(-1, group, *x.shape[1:]).sum(1).transpose(0, 1)

    for b, rows in _sequences(k, *(documents or [None])):
        qh, kh, vh = _heads_first(q[b, rows]), _heads_first(k[b, rows], group), _heads_first(v[b, rows], group)
        y, p, _ = _attend(qh, kh, vh, scale)
        dz = _heads_first(grad_out[b, rows])
        share = _own_share(y, vh) if xsa else torch.zeros_like(y[..., :1])
        z = y - share * vh
        if gate is not None:
            dgate[b, rows] = (z * dz).sum(-1).T.to(gate.dtype)
            dz = dz * gate[b, rows].T[..., None].to(dz.dtype)
        e = _own_share(dz, vh) if xsa else torch.zeros_like(share)
        dy = dz - e * vh
        dscores = p * (dy @ vh.mT - (dz * z).sum(-1, keepdim=True)) * scale
        dq[b, rows] = (dscores @ kh).transpose(0, 1).to(q.dtype)
        dk[b, rows] = per_kv_head(dscores.mT @ qh).to(k.dtype)
        dv[b, rows] = per_kv_head(p.mT @ dy - (e * z + share * dy)).to(v.dtype)
    return dq, dk, dv, dgate


@torch.library.impl(library, "xsa_attention_bwd_packed", "CPU")
def _bwd_packed_cpu(*arguments):
    *gradients, dgate = _bwd_cpu(*arguments)
    return torch.cat(gradients, dim=2), dgate


# ---- CUDA: the kernels of csrc/kernels/xsa_attention_*.cu

HEAD_DIM = 64
KEYS_PER_BLOCK = 192  # kXsaKeysPerBlock
NOT_OF_RAW = (None,) * 5  # rstd, gain, cos, sin, dgain


def _kernel_rows(x, argument):
    """`x` where the copy engine can read it in place, as it can slices of a packed QKV buffer; else a contiguous copy."""
    require(x.shape[-1] == HEAD_DIM, argument, f"the kernel serves head width {HEAD_DIM}, got {x.shape[-1]}; the CPU path serves any")
    require_dtype(x, argument, (torch.bfloat16,))
    strides = [stride for size, stride in zip(x.shape, x.stride()) if size > 1]
    readable = x.stride(-1) == 1 and all(stride > 0 and stride % 8 == 0 for stride in strides[:-1]) and x.data_ptr() % 16 == 0
    return x if readable else x.clone(memory_format=torch.contiguous_format)


def _kernel_inputs(q, k, v, gate):
    if gate is not None:
        require_dtype(gate, "gate", (torch.bfloat16, torch.float32))
    return [_kernel_rows(x, name) for x, name in ((q, "q"), (k, "k"), (v, "v"))]


def _plan_space(cu_seqlens, tokens, group):
    """The blocks of queries and of keys, and every token's place."""
    queries_per_block = 64 if group % 2 == 0 else 128  # xsa_queries_per_block
    entries = [tokens // per_block + cu_seqlens.shape[0] + 1 for per_block in (queries_per_block, KEYS_PER_BLOCK)]  # xsa_plan_capacity
    return [*(cu_seqlens.new_empty(n, 4) for n in entries), cu_seqlens.new_empty(tokens, 2)], queries_per_block


@torch.library.impl(library, "xsa_attention_plan", "CUDA")
def _plan_cuda(cu_seqlens, tokens, group):
    plan, queries_per_block = _plan_space(cu_seqlens, tokens, group)
    torch.ops.pgolf_fast_sm90.xsa_attention_plan(cu_seqlens.contiguous(), *plan, queries_per_block)
    return plan


@torch.library.impl(library, "xsa_attention_fwd", "CUDA")
def _fwd_cuda(q, k, v, gate, documents, xsa, scale):
    q, k, v = _kernel_inputs(q, k, v, gate)
    queries, _, places = documents or (None,) * 3
    if places is not None:  # the kernel writes where the list says
        require(len(places) == q.shape[1], "documents", f"made for {len(places)} tokens, not {q.shape[1]}")
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32, device=q.device)
    own = torch.empty_like(lse)
    torch.ops.pgolf_fast_sm90.xsa_attention_fwd(q, k, v, gate, queries, out, lse, own, xsa, scale)
    return out, lse, own


@torch.library.impl(library, "xsa_attention_bwd", "CUDA")
def _bwd_cuda(grad_out, q, k, v, gate, out, lse, own, documents, xsa, scale):
    gradients = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v)]
    return *gradients, _bwd_into(gradients, grad_out, q, k, v, gate, out, lse, own, documents, xsa, scale)


@torch.library.impl(library, "xsa_attention_bwd_packed", "CUDA")
def _bwd_packed_cuda(grad_out, q, k, v, gate, out, lse, own, documents, xsa, scale):
    heads = [x.shape[2] for x in (q, k, v)]
    dqkv = q.new_empty((*q.shape[:2], sum(heads), q.shape[3]))
    return dqkv, _bwd_into(dqkv.split(heads, dim=2), grad_out, q, k, v, gate, out, lse, own, documents, xsa, scale)


def _bwd_into(gradients, grad_out, q, k, v, gate, out, lse, own, documents, xsa, scale, weight=None, raw=NOT_OF_RAW):
    """Writes the gradients of q, k and v, which may be strided, and returns the gate's. With a `weight`, grad_out is that of the
    output projection, and with `raw` the gradients are those of what q and k were made from (xsa_output.py)."""
    q, k, v = _kernel_inputs(q, k, v, gate)
    queries, keys, places = documents or (None,) * 3
    dy = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    dgate = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device) if gate is not None else None
    # Each document may leave a gap of 4; there are more blocks of keys than documents.
    stats_width = -(-q.shape[1] // 4) * 4 + 4 * (0 if keys is None else len(keys))
    stats = torch.empty((q.shape[0] * q.shape[2], 2, stats_width), dtype=torch.float32, device=q.device)
    if weight is None:
        grad_out = _kernel_rows(grad_out, "grad_out")
    else:
        torch.ops.pgolf_fast_sm90.xsa_output_bwd(grad_out, weight, out, v, gate, lse, own, places, *gradients, dgate, dy, stats, xsa)
        grad_out = None
    torch.ops.pgolf_fast_sm90.xsa_attention_bwd(
        grad_out, q, k, v, gate, out, lse, own, queries, keys, places, *gradients, dgate, dy, stats, *raw, xsa, scale
    )
    return dgate if dgate is not None else q.new_empty(0)


@torch.library.register_fake(f"{_library.NAMESPACE}::xsa_attention_plan")
def _plan_fake(cu_seqlens, tokens, group):
    return [torch.empty_like(cu_seqlens)] if cu_seqlens.device.type == "cpu" else _plan_space(cu_seqlens, tokens, group)[0]


@torch.library.register_fake(f"{_library.NAMESPACE}::xsa_attention_fwd")
def _fwd_fake(q, k, v, gate, documents, xsa, scale):
    rows = q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=accumulation_dtype(q.dtype))
    return q.new_empty(q.shape), rows, torch.empty_like(rows)


@torch.library.register_fake(f"{_library.NAMESPACE}::xsa_attention_bwd")
def _bwd_fake(grad_out, q, k, v, gate, out, lse, own, documents, xsa, scale):
    dgate = gate.new_empty(gate.shape) if gate is not None else q.new_empty(0)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dgate


@torch.library.register_fake(f"{_library.NAMESPACE}::xsa_attention_bwd_packed")
def _bwd_packed_fake(grad_out, q, k, v, gate, out, lse, own, documents, xsa, scale):
    dgate = gate.new_empty(gate.shape) if gate is not None else q.new_empty(0)
    return q.new_empty((*q.shape[:2], q.shape[2] + 2 * k.shape[2], q.shape[3])), dgate


def _save(ctx, inputs, output):
    q, k, v, gate, documents, ctx.xsa, ctx.scale = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(q, k, v, gate, *output, *documents)


def _backward(ctx, grad_out, *_):
    q, k, v, gate, out, lse, own, *documents = ctx.saved_tensors
    dq = dk = dv = dgate = None
    if grad_out is not None:
        forward = q, k, v, gate, out, lse, own, documents, ctx.xsa, ctx.scale
        dq, dk, dv, dgate = torch.ops.pgolf_fast.xsa_attention_bwd(grad_out, *forward)
    return dq, dk, dv, dgate if gate is not None else None, [None] * len(documents), None, None


torch.library.register_autograd(f"{_library.NAMESPACE}::xsa_attention_fwd", _backward, setup_context=_save)


def _composite(q, k, v, xsa, gate, scale, cu_seqlens, max_seqlen):
    """Torch's attention, then the projection as separate passes: for GPUs that have no kernel here."""
    if q.shape[1] < k.shape[1]:
        sees = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool, device=q.device).tril(k.shape[1] - q.shape[1])
        y = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), attn_mask=sees, scale=scale, enable_gqa=True)
        y = y.transpose(1, 2)
    elif cu_seqlens is None:
        y = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=True, scale=scale, enable_gqa=True)
        y = y.transpose(1, 2)
    else:
        # Documents side by side in a padded batch; all shapes are known on the host, so nothing synchronises.
        cu_seqlens = _ascending(cu_seqlens, q.shape[1])
        starts = cu_seqlens[:-1].long()
        offset = torch.arange(max_seqlen, device=q.device)
        inside = offset < (cu_seqlens[1:] - cu_seqlens[:-1])[:, None]
        token = (starts[:, None] + offset).clamp(max=q.shape[1] - 1)
        padded = [x[0][token].transpose(1, 2) for x in (q, k, v)]
        y = F.scaled_dot_product_attention(*padded, is_causal=True, scale=scale, enable_gqa=True).transpose(1, 2)
        # Padding is sent to one row past the end, which is cut off again.
        target = torch.where(inside, token, q.shape[1]).reshape(-1)
        y = torch.zeros_like(torch.cat([q[0], q[0, :1]])).index_copy(0, target, y.reshape(-1, *q.shape[2:]))[None, :-1]
    out = y
    if xsa:
        own_v = v[:, -y.shape[1] :].repeat_interleave(y.shape[2] // v.shape[2], dim=2).to(accumulation_dtype(v.dtype))
        out = out - _own_share(out.to(own_v.dtype), own_v) * own_v
    if gate is not None:
        out = out * gate[..., None]
    return out.to(y.dtype)


def xsa_attention(q, k, v, xsa=True, gate=None, scale=None, cu_seqlens=None, max_seqlen=None):
    """Causal grouped-query attention without each output's own-value component.

    q           [B, T, Hq, D], float; slices of one packed QKV buffer are fine
    k, v        [B, T, Hk, D], the dtype of q, Hq a multiple of Hk. May be longer than q, which then holds the last positions
                of T: forward only, and without cu_seqlens
    xsa         remove the component along the token's own value
    gate        [B, T, Hq] factor on each head's output, or None
    scale       of the scores, > 0; None is D ** -0.5. The kernels are fastest with ln 2, for queries that hold the rest of the scale
    cu_seqlens  int32 [documents + 1], ascending from 0 to at most T, for packed documents (then B = 1). Its values are not checked:
                an entry counts as the largest up to it, from 0 and up to T
    max_seqlen  upper bound of the document lengths; T if not given. Only the composite path reads it.
    Returns the shape and dtype of q.

    By the kernel (sm_90, D = 64; other widths take the composite): bf16, gate bf16 or float32, every element finite; nothing
    synchronises with the host, and out and all gradients are the same bits on every run. Tensors that the copy engine cannot
    read in place (last dimension not contiguous, strides not multiples of 16 bytes) are copied first.
    """
    require(q.dim() == 4, "q", f"expected [B, T, Hq, D], got shape {list(q.shape)}")
    require(q.is_floating_point(), "q", f"expected a float dtype, got {q.dtype}")
    for x, argument in ((k, "k"), (v, "v")):
        # NOTE: torch.compile would fix a length for good if it met it in a message, hence the messages inside conditions.
        if x.dim() != 4 or x.shape[0] != q.shape[0] or x.shape[1] < q.shape[1] or x.shape[3] != q.shape[3]:
            expected = f"[{q.shape[0]}, {q.shape[1]} or more, Hk, {q.shape[3]}]"
            require(False, argument, f"expected {expected}, got shape {list(x.shape)}")
        require_dtype(x, argument, (q.dtype,))
        require_device(x, argument, q.device)
    if v.shape != k.shape:
        require(False, "v", f"expected {list(k.shape)} like k, got shape {list(v.shape)}")
    require(k.shape[2] > 0 and q.shape[2] % k.shape[2] == 0, "q", f"{q.shape[2]} heads are not a multiple of k's {k.shape[2]}")
    if gate is not None:
        if gate.shape != q.shape[:3]:
            require(False, "gate", f"expected {list(q.shape[:3])}, got shape {list(gate.shape)}")
        require_device(gate, "gate", q.device)
    if q.shape[1] != k.shape[1]:
        require(cu_seqlens is None, "cu_seqlens", "packed documents need as many queries as keys")
        wants_gradient = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, v, gate))
        require(not wants_gradient, "q", "shorter than k, which serves the forward only: call under torch.no_grad()")
    if cu_seqlens is not None:
        require(q.shape[0] == 1, "cu_seqlens", f"packed documents need B = 1, got {q.shape[0]}")
        require(cu_seqlens.dim() == 1 and cu_seqlens.shape[0] >= 1, "cu_seqlens", f"expected [documents + 1], got {list(cu_seqlens.shape)}")
        require_dtype(cu_seqlens, "cu_seqlens", (torch.int32,))
        require_device(cu_seqlens, "cu_seqlens", q.device)
    if q.numel() == 0:
        return torch.zeros_like(q)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    require(scale > 0, "scale", f"expected > 0, got {scale}")
    # NOTE: other head widths are those of small models; for them the composite is fast enough.
    if q.device.type == "cuda" and (q.shape[-1] != HEAD_DIM or not _library.uses_kernel("xsa_attention_fwd", q.device)):
        return _composite(q, k, v, xsa, gate, scale, cu_seqlens, q.shape[1] if max_seqlen is None else int(max_seqlen))
    documents = documents_of(cu_seqlens, q.shape[1], q.shape[2] // k.shape[2])
    return torch.ops.pgolf_fast.xsa_attention_fwd(q, k, v, gate, documents, xsa, scale)[0]
