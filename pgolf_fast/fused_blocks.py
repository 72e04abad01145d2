"""All visits of a model's blocks as one autograd node: forward and backward written out by hand over the ops.

The forward leaves a tape, the backward reads it from its end. In between no gradient of an activation meets autograd, and
the weights' gradients are summed over the visits in the accumulation dtype. The weights come packed (`Weights`), by
differentiable torch code in model.py, which turns the sums of the packed gradients into those of the parameters.

model.py states the same mathematics in plain torch; the tests hold the two against each other.
"""

import math
from typing import NamedTuple

import torch

from pgolf_fast.ops import _library
from pgolf_fast.ops._library import accumulation_dtype
from pgolf_fast.ops.fused_mlp import ACTIVATIONS
from pgolf_fast.ops.products import add_weight_gradient, project, project_backward

ops = torch.ops.pgolf_fast


class Weights(NamedTuple):
    """In the accumulation dtype; every field is an input of the node and receives a gradient. Absent parts are None."""

    qkv: torch.Tensor  # [layers, C + 2 kv_dim (+ heads), C]: queries, keys, values, logits of the attention gate
    o: torch.Tensor  # [layers, C, C], rows times attn_scale
    up: torch.Tensor  # [layers, hidden, C]
    down: torch.Tensor  # [layers, C, hidden], rows times mlp_scale, columns times star_scale
    shift: torch.Tensor | None  # [layers, C], added to the MLP's output
    q_gain: torch.Tensor  # [layers, heads]
    mix: torch.Tensor  # [visits, 3, C]: what of the stream, of x0 and of the skip enters the block
    lane0: torch.Tensor | None  # [visits, 4, C]: what of lane 0, attention, MLP and skip leaves on lane 0
    lane1: torch.Tensor | None  # [visits, 3, C]: what of lane 1, attention and MLP leaves on lane 1


class Plan(NamedTuple):
    """What the visits read beside weights and streams."""

    visits: tuple
    config: object  # ModelConfig
    tokens: torch.Size  # (B, T)
    cos: torch.Tensor
    sin: torch.Tensor
    value_blocks: tuple[int, ...]  # the blocks whose values receive an embedding
    cu_seqlens: torch.Tensor | None
    max_seqlen: int

    def norm_scale(self, block):
        return 1 / math.sqrt(block + 1) if self.config.ln_scale else 1.0


def serve(config, x) -> bool:
    """Whether the kernels take this stream: chosen by device, dtype and widths, never by a failure."""
    widths = (config.model_dim, config.kv_dim, config.hidden_dim)
    fits = x.is_cuda and x.dtype == torch.bfloat16 and config.head_dim == 64 and all(w % 64 == 0 for w in widths) and x.numel() > 0
    return fits and _library.uses_kernel("product_forward", x.device)


def run(plan, weights, x0, values):
    """The stream after the last visit.  x0 [B, T, C]; values: one [B, T, kv_dim] for each of plan.value_blocks"""
    x0, values = x0.flatten(0, 1), [v.flatten(0, 1) for v in values]
    if torch.is_grad_enabled():
        out = _Blocks.apply(plan, x0, *weights, *values)
    else:
        out = _Forward(plan, weights, x0, values, tape=None).run()
    return out.view(*plan.tokens, -1)


class _Blocks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, plan, x0, *tensors):
        weights, values = Weights(*tensors[: len(Weights._fields)]), tensors[len(Weights._fields) :]
        tape = []
        forward = _Forward(plan, weights, x0, values, tape)
        out = forward.run()
        ctx.plan, ctx.tape, ctx.operands = plan, tape, forward.operands
        ctx.save_for_backward(x0, *weights)
        return out

    @staticmethod
    def backward(ctx, dout):
        x0, *weights = ctx.saved_tensors
        if ctx.tape is None:
            raise RuntimeError("the blocks' activations were freed by the first backward; run the forward again")
        tape, ctx.tape = ctx.tape, None
        backward = _Backward(ctx.plan, Weights(*weights), ctx.operands, x0, tape)
        dx0 = backward.run(dout)
        return None, dx0, *backward.gradients, *(backward.dvalues.get(block) for block in ctx.plan.value_blocks)


class Operands(NamedTuple):
    """The matrices in the stream's dtype."""

    qkv: tuple
    o: tuple
    up: tuple
    down: tuple


class Attended(NamedTuple):
    n: torch.Tensor
    qkv: torch.Tensor
    q: torch.Tensor
    k: torch.Tensor
    gate: torch.Tensor | None
    y: torch.Tensor
    lse: torch.Tensor
    own: torch.Tensor


class Sequential(NamedTuple):
    """What the backward of a visit needs; `skip` and `streams` as they came in."""

    stream: torch.Tensor
    skip: torch.Tensor | None
    mixed: torch.Tensor
    attended: Attended
    x1: torch.Tensor
    n1: torch.Tensor
    u: torch.Tensor


class TwoLanes(NamedTuple):
    lane0: torch.Tensor
    lane1: torch.Tensor
    skip: torch.Tensor | None
    mixed: torch.Tensor
    attended: Attended
    attention: torch.Tensor
    n1: torch.Tensor
    u: torch.Tensor
    mlp: torch.Tensor


def _heads(packed, config, tokens):
    """Queries, keys and values of a packed product, as views [B, T, H, D]."""
    dim, kv = config.model_dim, config.kv_dim
    rows = packed.view(*tokens, -1)
    parts = rows[..., :dim], rows[..., dim : dim + kv], rows[..., dim + kv : dim + 2 * kv]
    return [part.unflatten(-1, (-1, config.head_dim)) for part in parts]


def _gate_columns(packed, config):
    return packed[:, config.model_dim + 2 * config.kv_dim :]


class _Forward:
    def __init__(self, plan, weights, x0, values, tape):
        self.plan, self.config, self.weights, self.x0, self.tape = plan, plan.config, weights, x0, tape
        self.values = dict(zip(plan.value_blocks, values))
        matrices = (weights.qkv, weights.o, weights.up, weights.down)
        self.operands = Operands(*(w.to(x0.dtype).unbind(0) for w in matrices))

    def keep(self, entry):
        if self.tape is not None:
            self.tape.append(entry)

    def run(self):
        stream, lane1, kept = self.x0, None, []
        for i, visit in enumerate(self.plan.visits):
            skip = kept.pop() if visit.skip is not None else None
            if visit.two_lanes:
                stream, lane1 = self.two_lanes(i, visit.block, stream, stream if lane1 is None else lane1, skip)
            else:
                stream = self.sequential(i, visit.block, stream, skip)
            if visit.first_half:
                kept.append(stream)
        return stream if lane1 is None else 0.5 * (stream + lane1)

    def mix(self, i, block, stream, skip):
        """The block's input and its norm."""
        tensors, coefficients = _present((stream, self.x0, skip), self.weights.mix[i])
        return mix_norm(tensors, coefficients, self.plan.norm_scale(block))

    def sequential(self, i, block, stream, skip):
        mixed, n = self.mix(i, block, stream, skip)
        attended = self.attend(block, n)
        x1 = project(attended.y, self.operands.o[block], residual=mixed)
        _, n1 = mix_norm((x1,), None, self.plan.norm_scale(block))
        mlp, u = self.mlp(block, n1)
        self.keep(Sequential(stream, skip, mixed, attended, x1, n1, u))
        return x1 + mlp

    def two_lanes(self, i, block, lane0, lane1, skip):
        """Attention reads lane 0, the MLP lane 1; both write both."""
        mixed, n = self.mix(i, block, lane0, skip)
        attended = self.attend(block, n)
        attention = project(attended.y, self.operands.o[block])
        _, n1 = mix_norm((lane1,), None, self.plan.norm_scale(block))
        mlp, u = self.mlp(block, n1)
        self.keep(TwoLanes(lane0, lane1, skip, mixed, attended, attention, n1, u, mlp))
        return mix(*_present((lane0, attention, mlp, skip), self.weights.lane0[i])), mix((lane1, attention, mlp), self.weights.lane1[i])

    def attend(self, block, n):
        config, plan = self.config, self.plan
        qkv = project(n, self.operands.qkv[block])
        _, _, v = _heads(qkv, config, plan.tokens)
        if block in self.values:
            v += self.values[block].view(v.shape)
        q, k = qk_norm_rope(qkv, self.weights.q_gain[block], plan)
        gate = None
        if config.attn_gate:
            gate = torch.sigmoid(config.attn_gate_scale * _gate_columns(qkv, config)).view(*plan.tokens, -1)
        y, lse, own = ops.xsa_attention_fwd(q, k, v, gate, plan.cu_seqlens, plan.max_seqlen, _is_xsa(config, block), config.head_dim**-0.5)
        return Attended(n, qkv, q, k, gate, y.flatten(0, 1).flatten(1), lse, own)

    def mlp(self, block, n1):
        y, u = ops.fused_mlp_fwd(n1, self.operands.up[block], self.operands.down[block], _activation(self.config))
        if self.weights.shift is not None:
            y += self.weights.shift[block].to(y.dtype)
        return y, u


class _Backward:
    def __init__(self, plan, weights, operands, x0, tape):
        self.plan, self.config, self.weights, self.operands, self.x0, self.tape = plan, plan.config, weights, operands, x0, tape
        self.gradients = Weights(*(None if w is None else torch.zeros_like(w) for w in weights))
        self.dx0 = torch.zeros_like(x0)
        self.dvalues = {}

    def run(self, dout):
        kept = []  # gradients of kept streams, as their skips report them: the last kept reports first
        dlane1 = None
        if self.plan.visits[-1].two_lanes:
            dout = dlane1 = 0.5 * dout
        dstream = dout
        dkept = []
        for i, visit in reversed(list(enumerate(self.plan.visits))):
            entry = self.tape.pop()
            if visit.first_half:
                dstream = dstream + dkept.pop()
            if visit.two_lanes:
                dstream, dlane1, dskip = self.two_lanes(i, visit.block, dstream, dlane1, entry)
            else:
                if dlane1 is not None:
                    dstream, dlane1 = dstream + dlane1, None
                dstream, dskip = self.sequential(i, visit.block, dstream, entry)
            if visit.skip is not None:
                dkept.append(dskip)
        return self.dx0 + dstream if dlane1 is None else self.dx0 + dstream + dlane1

    def sequential(self, i, block, dx2, saved):
        dn1 = self.mlp(block, dx2, saved.n1, saved.u)
        dx1 = norm_backward(dx2, dn1, saved.x1, self.plan.norm_scale(block))
        dn = self.attend(block, dx1, saved.attended)
        return self.unmix(i, block, dx1, dn, saved, saved.stream)

    def two_lanes(self, i, block, dlane0, dlane1, saved):
        gradients, weights = self.gradients, self.weights
        dlane0, dattention, dmlp, dskip = self.unmix_lane(
            dlane0, (saved.lane0, saved.attention, saved.mlp, saved.skip), weights.lane0[i], gradients.lane0[i]
        )
        dlane1, more_dattention, more_dmlp = self.unmix_lane(dlane1, (saved.lane1, saved.attention, saved.mlp), weights.lane1[i], gradients.lane1[i])
        dn1 = self.mlp(block, dmlp + more_dmlp, saved.n1, saved.u)
        dlane1 = norm_backward(dlane1, dn1, saved.lane1, self.plan.norm_scale(block))
        dn = self.attend(block, dattention + more_dattention, saved.attended)
        more_dlane0, more_dskip = self.unmix(i, block, None, dn, saved, saved.lane0)
        return dlane0 + more_dlane0, dlane1, None if dskip is None else dskip + more_dskip

    def unmix_lane(self, dmixed, tensors, coefficients, dcoefficients):
        present, rows = _present(tensors, coefficients)
        _, drows = _present(tensors, dcoefficients)
        gradients = iter(mix_backward(dmixed, present, rows, drows))
        return [None if t is None else next(gradients) for t in tensors]

    def unmix(self, i, block, dmixed, dn, saved, stream):
        """Gradients of the stream and of the skip that the block's input was mixed of; that of x0 is added up."""
        dmixed = norm_backward(dmixed, dn, saved.mixed, self.plan.norm_scale(block))
        tensors = (stream, self.x0, saved.skip)
        dstream, dx0, dskip = self.unmix_lane(dmixed, tensors, self.weights.mix[i], self.gradients.mix[i])
        self.dx0 += dx0
        return dstream, dskip

    def attend(self, block, dx1, saved):
        config, plan = self.config, self.plan
        add_weight_gradient(self.gradients.o[block], dx1, saved.y)
        dy = project_backward(dx1, self.operands.o[block]).view(saved.q.shape)
        _, _, v = _heads(saved.qkv, config, plan.tokens)
        y = saved.y.view(saved.q.shape)
        xsa, scale = _is_xsa(config, block), config.head_dim**-0.5
        dq, dk, dv, dgate = ops.xsa_attention_bwd(
            dy, saved.q, saved.k, v, saved.gate, y, saved.lse, saved.own, plan.cu_seqlens, plan.max_seqlen, xsa, scale
        )
        dqkv = qk_norm_rope_backward(dq, dk, dv, saved.qkv, self.weights.q_gain[block], self.gradients.q_gain[block], plan)
        if config.attn_gate:
            gate = saved.gate.flatten(0, 1)
            _gate_columns(dqkv, config).copy_(config.attn_gate_scale * dgate.flatten(0, 1) * gate * (1 - gate))
        if block in plan.value_blocks:
            dvalue = dv.flatten(0, 1).flatten(1)
            self.dvalues[block] = self.dvalues[block] + dvalue if block in self.dvalues else dvalue
        add_weight_gradient(self.gradients.qkv[block], dqkv, saved.n)
        return project_backward(dqkv, self.operands.qkv[block])

    def mlp(self, block, dy, n1, u):
        if self.weights.shift is not None:
            self.gradients.shift[block] += dy.sum(0, dtype=self.gradients.shift.dtype)
        up, down = self.operands.up[block], self.operands.down[block]
        sums = self.gradients.up[block], self.gradients.down[block]
        return ops.fused_mlp_bwd_add(dy, n1, u, up, down, _activation(self.config), *sums)


def _is_xsa(config, block):
    return block >= config.num_layers - config.xsa_last_n


def _activation(config):
    # star_relu2 is relu2 between scaled weights (model.py).
    return ACTIVATIONS.index("leaky_relu2" if config.activation == "leaky_relu2" else "relu2")


def _present(tensors, rows):
    """The tensors that are not None, and their rows of coefficients."""
    chosen = [j for j, t in enumerate(tensors) if t is not None]
    return [tensors[j] for j in chosen], [rows[j] for j in chosen]


# --- to be replaced by kernels


def _wide(x):
    return x.to(accumulation_dtype(x.dtype))


def mix(tensors, coefficients):
    return sum(c * _wide(t) for c, t in zip(coefficients, tensors)).to(tensors[0].dtype)


def mix_norm(tensors, coefficients, norm_scale):
    mixed = tensors[0] if coefficients is None else mix(tensors, coefficients)
    w = _wide(mixed)
    return mixed, (w * norm_scale * torch.rsqrt(w.square().mean(-1, keepdim=True) + EPS)).to(mixed.dtype)


EPS = 2.0**-23


def norm_backward(dmixed, dn, mixed, norm_scale):
    w, g = _wide(mixed), _wide(dn) * norm_scale
    rstd = torch.rsqrt(w.square().mean(-1, keepdim=True) + EPS)
    d = rstd * (g - w * rstd.square() * (g * w).mean(-1, keepdim=True))
    return (d if dmixed is None else d + dmixed).to(dn.dtype)


def mix_backward(dmixed, tensors, coefficients, dcoefficients):
    d = _wide(dmixed)
    for t, dc in zip(tensors, dcoefficients):
        dc += (d * t).sum(0)
    return [(c * d).to(dmixed.dtype) for c in coefficients]


def _norm_rotate(x, gain, cos, sin):
    half = cos.shape[-1]
    x = _wide(x)
    x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS)
    a, b, rest = x.split([half, half, x.shape[-1] - 2 * half], dim=-1)
    x = torch.cat([a * cos + b * sin, b * cos - a * sin, rest], dim=-1)
    return x if gain is None else x * gain[:, None]


def qk_norm_rope(qkv, gain, plan):
    q, k, _ = _heads(qkv, plan.config, plan.tokens)
    return _norm_rotate(q, gain, plan.cos, plan.sin).to(qkv.dtype), _norm_rotate(k, None, plan.cos, plan.sin).to(qkv.dtype)


def qk_norm_rope_backward(dq, dk, dv, qkv, gain, dgain, plan):
    dqkv = torch.empty_like(qkv)
    dq_out, dk_out, dv_out = _heads(dqkv, plan.config, plan.tokens)
    q, k, _ = _heads(qkv, plan.config, plan.tokens)
    dv_out.copy_(dv)
    half = plan.cos.shape[-1]
    for x, d, out, g in ((q, dq, dq_out, gain), (k, dk, dk_out, None)):
        x, d = _wide(x), _wide(d)
        if g is not None:
            dgain += (d * _norm_rotate(x, None, plan.cos, plan.sin)).sum((0, 1, 3))
            d = d * g[:, None]
        a, b, rest = d.split([half, half, d.shape[-1] - 2 * half], dim=-1)
        d = torch.cat([a * plan.cos - b * plan.sin, a * plan.sin + b * plan.cos, rest], dim=-1)
        rstd = torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS)
        out.copy_(rstd * (d - x * rstd.square() * (d * x).mean(-1, keepdim=True)))
    return dqkv
