"""All visits of a model's blocks as one autograd node: forward and backward written out by hand over the ops.

The forward leaves a tape, the backward reads it from its end. In between no gradient of an activation meets autograd, and
the weights' gradients are summed over the visits in the accumulation dtype. The weights come packed (`Weights`), by
differentiable torch code in model.py, which turns the sums of the packed gradients into those of the parameters.

model.py states the same mathematics in plain torch; the tests hold the two against each other.
"""

import math
from typing import NamedTuple

import torch

from pgolf_fast.ops import _library, attn_gate, xsa_output  # noqa: F401  defines their ops
from pgolf_fast.ops._library import accumulation_dtype
from pgolf_fast.ops.fused_mlp import ACTIVATIONS
from pgolf_fast.ops.mix_norm import KERNEL_WIDTH as MIX_WIDTH
from pgolf_fast.ops.mix_norm import row_rstd
from pgolf_fast.ops.products import add_weight_gradient, project, project_backward, project_residual_rstd
from pgolf_fast.ops.qkv import kernel_fits as qkv_kernel_fits

ops = torch.ops.pgolf_fast

# Of the scores: they are then powers of 2, which the attention's kernels take as they are. The queries' gain has the rest of the scale.
ATTENTION_SCALE = math.log(2)


def score_gain(config):
    """What the queries' gain is multiplied by for scores of ATTENTION_SCALE to be those of head_dim ** -0.5."""
    return config.head_dim**-0.5 / ATTENTION_SCALE


class Weights(NamedTuple):
    """Computed with in the accumulation dtype; every field is an input of the node and receives a gradient. Absent parts are None."""

    qkv: torch.Tensor  # [layers, C + 2 kv_dim, C]: queries, keys, values
    gate: torch.Tensor | None  # [layers, heads, gate_window]
    o: torch.Tensor  # [layers, C, C], rows times attn_scale
    up: torch.Tensor  # [layers, hidden, C]
    down: torch.Tensor  # [layers, C, hidden], rows times mlp_scale, columns times star_scale
    shift: torch.Tensor | None  # [layers, C], added to the MLP's output
    value: torch.Tensor | None  # [value_blocks, kv_dim, ve_dim]
    q_gain: torch.Tensor  # [layers, heads], times score_gain
    mix: torch.Tensor  # [visits, 3, C]: what of the stream, of x0 and of the skip enters the block
    lane0: torch.Tensor | None  # [visits, 4, C]: what of lane 0, attention, MLP and skip leaves on lane 0
    lane1: torch.Tensor | None  # [visits, 3, C]: what of lane 1, attention and MLP leaves on lane 1
    mean: torch.Tensor | None  # [1, 5, C]: what of lane 0, attention, MLP, lane 1 and skip leaves the last visit, both lanes in one


class Plan(NamedTuple):
    """What the visits read beside weights and streams."""

    visits: tuple
    config: object  # ModelConfig
    tokens: torch.Size  # (B, T)
    cos: torch.Tensor  # [T, half]
    sin: torch.Tensor
    value_blocks: tuple[int, ...]  # the blocks whose values receive an embedding's rows, times weights.value
    documents: list[torch.Tensor]  # xsa_attention.documents_of

    def norm_scale(self, block):
        return 1 / math.sqrt(block + 1) if self.config.ln_scale else 1.0


def serve(config, x) -> bool:
    """Whether the kernels take this stream: chosen by device, dtype and widths, never by a failure."""
    if torch.are_deterministic_algorithms_enabled():
        return False  # the weights' gradients are added up in an order that varies
    fits = x.is_cuda and x.dtype == torch.bfloat16 and x.numel() > 0 and config.hidden_dim % 8 == 0
    fits = fits and config.model_dim == MIX_WIDTH and qkv_kernel_fits(config.head_dim, config.rope_dims)
    return fits and _library.uses_kernel("product_forward", x.device)


def rows_at(x, positions):
    """Of x [B, T, ..] the rows at positions [B, S], or the last so many if it is a number."""
    if isinstance(positions, int):
        return x[:, x.shape[1] - positions :]
    return x.gather(1, positions.view(*positions.shape, *[1] * (x.dim() - 2)).expand(-1, -1, *x.shape[2:]))


def as_columns(positions, rows):
    """`positions` as rows_at takes them, without numbers, of rows [B, T, ..]."""
    if not isinstance(positions, int):
        return positions
    length = rows.shape[1]
    return torch.arange(length - positions, length, device=rows.device).expand(len(rows), -1)


def run(plan, weights, x0, value_rows, positions=None):
    """The stream after the last visit, [B, T, C].  x0 [B, T, C]; value_rows [B, T, ve_dim], or None without value_blocks

    positions  [B, S]: only these of each row, [B, S, C]; or the last so many, which spares most of the last visit while scoring.
               Not of packed documents
    """
    x0, value_rows = x0.flatten(0, 1), None if value_rows is None else value_rows.flatten(0, 1)
    weights = Weights(*(None if w is None else w.to(accumulation_dtype(x0.dtype)) for w in weights))
    if torch.is_grad_enabled():
        out = _Blocks.apply(plan, x0, value_rows, *weights)
    else:
        last = positions if isinstance(positions, int) and positions < plan.tokens[1] else None
        out = Forward(plan, weights, x0, value_rows, tape=None, positions=last).run()
    out = out.view(plan.tokens[0], -1, x0.shape[1])
    return out if positions is None else rows_at(out, positions)


class _Blocks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, plan, x0, value_rows, *weights):
        tape = []
        forward = Forward(plan, Weights(*weights), x0, value_rows, tape)
        out = forward.run()
        ctx.plan, ctx.tape, ctx.operands = plan, tape, forward.operands
        ctx.save_for_backward(value_rows, *weights)
        return out

    @staticmethod
    def backward(ctx, dout):
        value_rows, *weights = ctx.saved_tensors
        backward = Backward(ctx.plan, Weights(*weights), ctx.operands, take_tape(ctx), value_rows)
        dx0 = backward.run(dout)
        return None, dx0, backward.dvalue_rows, *backward.gradients


def take_tape(ctx):
    """What the forward left, once."""
    if ctx.tape is None:
        raise RuntimeError("the blocks' activations were freed by the first backward; run the forward again")
    tape, ctx.tape = ctx.tape, None
    return tape


class Operands(NamedTuple):
    """The matrices in the stream's dtype."""

    qkv: tuple
    o: tuple
    up: tuple
    down: tuple
    value: tuple


class Attended(NamedTuple):
    n: torch.Tensor
    qkv: torch.Tensor | None  # for a backward
    rstd: torch.Tensor | None
    gate: torch.Tensor | None
    y: torch.Tensor
    lse: torch.Tensor
    own: torch.Tensor


class Mix(NamedTuple):
    """Of a sum of tensors, each times its row of coefficients, and of the norm of that sum. The backward makes the sum again.

    A tensor that is several summands (the first visit's stream is x0, the first skip the stream) is read once, times the sum of their rows.
    """

    tensors: list[torch.Tensor]
    coefficients: torch.Tensor  # [tensors, C]
    places: list[int]  # of each summand: which of the tensors it is
    rstd: torch.Tensor

    def gathered(self, gradients):
        """The sum of each tensor's gradients, of those that its summands have; None: nothing."""
        found = [None] * len(self.tensors)
        for place, gradient in zip(self.places, gradients):
            if gradient is not None:
                found[place] = gradient if found[place] is None else found[place] + gradient
        return found

    def spread(self, gradients):
        """Each tensor's gradient, at the first of its summands; None at the others."""
        return [gradients[place] if self.places.index(place) == i else None for i, place in enumerate(self.places)]


def heads(packed, config, tokens):
    """Queries, keys and values of a packed product, as views [B, T, H, D]."""
    dim, kv = config.model_dim, config.kv_dim
    rows = packed.view(*tokens, -1)
    parts = rows[..., :dim], rows[..., dim : dim + kv], rows[..., dim + kv : dim + 2 * kv]
    return [part.unflatten(-1, (-1, config.head_dim)) for part in parts]


class Forward:
    def __init__(self, plan, weights, x0, value_rows, tape, positions=None):
        """
        tape       list that the backward will read; None where there is none
        positions  those of each row that are read after the last visit, which makes the others' keys and values alone; None: all
        """
        self.plan, self.config, self.weights, self.x0, self.tape, self.positions = plan, plan.config, weights, x0, tape, positions
        self.value_rows = value_rows
        matrices = (weights.qkv, weights.o, weights.up, weights.down, weights.value)
        self.operands = Operands(*(() if w is None else w.to(x0.dtype).unbind(0) for w in matrices))

    def keep(self, entry):
        if self.tape is not None:
            self.tape.append(entry)

    def at(self, x, positions):
        """Rows of x [B T, ..] at the positions; all without any."""
        return x if x is None or positions is None else rows_at(x.view(*self.plan.tokens, *x.shape[1:]), positions).flatten(0, 1)

    def run(self):
        stream, lane1, rstd1, kept = self.x0, None, None, []
        for i, visit in enumerate(self.plan.visits):
            skip = kept.pop() if visit.skip is not None else None
            positions = self.positions if i + 1 == len(self.plan.visits) else None
            if visit.two_lanes:
                if lane1 is None:
                    lane1, rstd1 = stream, row_rstd(stream)
                stream, lane1, rstd1 = self.two_lanes(i, visit.block, stream, lane1, rstd1, skip, positions)
            else:
                stream = self.sequential(i, visit.block, stream, skip, positions)
            if visit.first_half:
                kept.append(stream)
        return stream

    def sequential(self, i, block, stream, skip, positions):
        entered, x, n = self.enter(i, block, stream, skip)
        attended = self.attend(i, block, n, positions)
        x1, rstd1 = self.output(i, block, attended, residual=self.at(x, positions))
        x2, u = self.mlp(i, block, x1, rstd1, residual=x1)
        self.keep((entered, attended, x1, rstd1, u))
        return x2

    def two_lanes(self, i, block, lane0, lane1, rstd1, skip, positions):
        """Attention reads lane 0, the MLP lane 1, of whose norm rstd1 are the factors; both write both, but for the last visit's mean."""
        entered, _, n = self.enter(i, block, lane0, skip)
        attended = self.attend(i, block, n, positions)
        attention, _ = self.output(i, block, attended, residual=None)
        lane0, lane1, rstd1, skip = (self.at(x, positions) for x in (lane0, lane1, rstd1, skip))
        mlp, u = self.mlp(i, block, lane1, rstd1, residual=None)
        if i + 1 == len(self.plan.visits):
            left, mean, _ = _mix(self.weights.mean[0], (lane0, attention, mlp, lane1, skip))
            self.keep((entered, attended, lane1, rstd1, u, left))
            return mean, None, None
        left0, out0, _ = _mix(self.weights.lane0[i], (lane0, attention, mlp, skip))
        left1, out1, _ = _mix(self.weights.lane1[i], (lane1, attention, mlp))
        self.keep((entered, attended, lane1, rstd1, u, left0, left1))
        return out0, out1, left1.rstd

    def enter(self, i, block, stream, skip):
        return _mix(self.weights.mix[i], (stream, self.x0, skip), self.plan.norm_scale(block))

    def attend(self, i, block, n, positions):
        if positions is not None:
            return self.attend_last(block, n, positions)
        plan, kv_heads = self.plan, self.config.num_kv_heads
        qkv, rstd = ops.qkv_forward(n, self.operands.qkv[block], self.weights.q_gain[block], plan.cos, plan.sin, kv_heads)
        return self.attend_with(block, n, qkv, rstd)

    def attend_with(self, block, n, qkv, rstd):
        return Attended(n, qkv, rstd, *self.attention(block, n, *heads(qkv, self.config, self.plan.tokens)))

    def attend_last(self, block, n, count):
        """Of the last positions of each row, for scoring: keys and values of all, queries of those alone."""
        plan, config, weight, gain = self.plan, self.config, self.operands.qkv[block], self.weights.q_gain[block]
        dim, last = config.model_dim, self.at(n, count)
        q, _ = ops.qkv_forward(last, weight[:dim], gain, plan.cos[-count:], plan.sin[-count:], 0)
        kv, _ = ops.qkv_forward(n, weight[dim:], gain[:0], plan.cos, plan.sin, config.num_kv_heads)
        q, kv = (x.view(plan.tokens[0], -1, x.shape[1] // config.head_dim, config.head_dim) for x in (q, kv))
        return Attended(last, None, None, *self.attention(block, last, q, *kv.chunk(2, dim=2)))

    def attention(self, block, n, q, k, v):
        """Gate, output, lse and own; n: the rows of q."""
        config, plan, gate = self.config, self.plan, None
        if block in plan.value_blocks:
            matrix = self.operands.value[plan.value_blocks.index(block)]
            v.view(-1, config.kv_dim).addmm_(self.value_rows, matrix.mT)
        if config.attn_gate:
            gate = ops.attn_gate_fwd(n, self.weights.gate[block], config.attn_gate_scale).view(*q.shape[:2], -1)
        xsa = is_xsa(config, block)
        y, lse, own = ops.xsa_attention_fwd(q, k, v, gate, plan.documents, xsa, ATTENTION_SCALE)
        return gate, y.flatten(0, 1).flatten(1), lse, own

    def output(self, i, block, attended, residual):
        """What attention writes, and with a residual the factors of the sum's norm."""
        if residual is None:
            return project(attended.y, self.operands.o[block]), None
        return project_residual_rstd(attended.y, self.operands.o[block], residual)

    def mlp(self, i, block, x, rstd, residual):
        """Of the norm of x, plus the residual."""
        up, down = self.operands.up[block], self.operands.down[block]
        y, u = ops.norm_mlp_fwd(x, rstd, self.plan.norm_scale(block), residual, up, down, activation_index(self.config))
        if self.weights.shift is not None:
            y += self.weights.shift[block].to(y.dtype)
        return y, u


class Backward:
    def __init__(self, plan, weights, operands, tape, value_rows):
        self.plan, self.config, self.weights, self.operands, self.tape = plan, plan.config, weights, operands, tape
        self.value_rows, self.dvalue_rows = value_rows, None
        self.gradients = Weights(*(None if w is None else torch.zeros_like(w) for w in weights))
        self.dx0 = None

    def run(self, dout):
        """The gradient of x0, which is the stream that enters the first visit."""
        visits = self.plan.visits
        dstream, dlane1, dkept = dout, None, []  # dkept: of streams kept for a skip, the first kept at the bottom
        for i, visit in reversed(list(enumerate(visits))):
            was_kept = i > 0 and visits[i - 1].first_half
            from_skip = dkept.pop() if was_kept and visit.skip is None else None
            if visit.two_lanes:
                dstream, dlane1, dskip = self.two_lanes(i, visit.block, dstream, dlane1)
            else:
                dstream, dskip = self.sequential(i, visit.block, dstream, from_skip)
            if visit.skip is not None:
                dkept.append(dskip)
                from_skip = dkept.pop() if was_kept else None  # the skip of the visit just before
                dstream = dstream if from_skip is None else dstream + from_skip
            if dlane1 is not None and not visits[i - 1].two_lanes:
                dstream, dlane1 = dstream + dlane1, None
        return dstream

    def sequential(self, i, block, dx2, from_skip):
        entered, attended, x1, rstd1, u = self.tape.pop()
        dx1 = self.mlp(i, block, dx2, dx2, x1, rstd1, u)
        dn = self.attend(i, block, dx1, attended)
        return self.unmix_entered(i, block, entered, dx1, dn, from_skip, None)

    def two_lanes(self, i, block, dlane0, dlane1):
        entered, attended, lane1, rstd1, u, *left = self.tape.pop()
        one_stream = lane1 is left[0].tensors[0]  # on both lanes, before the first such visit
        if i + 1 == len(self.plan.visits):
            dlane0, dattention, dmlp, dlane1, *dskip = self.unmix(0, "mean", left[0], dlane0)
            dlane1 = dlane0 if one_stream else dlane1
        else:
            dlane0, dattention, dmlp, *dskip = self.unmix(i, "lane0", left[0], dlane0)
            accumulate = [dlane0 if one_stream else None, dattention, dmlp]
            dlane1, dattention, dmlp = self.unmix(i, "lane1", left[1], dlane1, accumulate=accumulate)
        dlane1 = self.mlp(i, block, dmlp, dlane1, lane1, rstd1, u)
        if one_stream:
            dlane0, dlane1 = dlane1, None
        dn = self.attend(i, block, dattention, attended)
        dlane0, dskip = self.unmix_entered(i, block, entered, None, dn, dlane0, *(dskip or [None]))
        return dlane0, dlane1, dskip

    def unmix_entered(self, i, block, entered, dmixed, dn, dstream, dskip):
        """Gradients of the stream and of the skip, added to what they have already; that of x0 is added up over the visits."""
        accumulate = [dstream, self.dx0, dskip][: len(entered.places)]
        dstream, self.dx0, *dskip = self.unmix(i, "mix", entered, dmixed, dn, self.plan.norm_scale(block), accumulate)
        return dstream, dskip[0] if dskip else None

    def unmix(self, i, name, mix, dmixed, dn=None, scale=1.0, accumulate=None):
        """Gradients of the summands, added to what they have already, and of the coefficients."""
        rows = list(range(len(mix.tensors)))
        accumulate = mix.gathered(accumulate or [])
        gradients, dcoefficients = ops.mix_norm_bwd(dmixed, dn, None, mix.rstd, mix.tensors, mix.coefficients, rows, scale, accumulate)
        if len(mix.places) > len(rows):
            dcoefficients = torch.stack([dcoefficients[place] for place in mix.places])
        getattr(self.gradients, name)[i, : len(mix.places)] = dcoefficients
        return mix.spread(gradients)

    def attend(self, i, block, dx1, saved):
        config, plan = self.config, self.plan
        add_weight_gradient(self.gradients.o[block], dx1, saved.y)
        q, k, v = heads(saved.qkv, config, plan.tokens)
        y, xsa = saved.y.view(q.shape), is_xsa(config, block)
        raw = saved.rstd, self.weights.q_gain[block], plan.cos, plan.sin, self.gradients.q_gain[block]
        forward = q, k, v, saved.gate, y, saved.lse, saved.own, plan.documents, xsa, ATTENTION_SCALE
        dqkv, dgate = ops.xsa_output_bwd(dx1, self.operands.o[block], *forward, *raw)
        dqkv = dqkv.view_as(saved.qkv)
        if block in plan.value_blocks:
            self.value_gradients(plan.value_blocks.index(block), dqkv[:, -config.kv_dim :])
        add_weight_gradient(self.gradients.qkv[block], dqkv, saved.n)
        dn = project_backward(dqkv, self.operands.qkv[block])
        if config.attn_gate:
            gate, dgate = saved.gate.flatten(0, 1), dgate.flatten(0, 1)
            ops.attn_gate_bwd(dgate, gate, saved.n, self.weights.gate[block], config.attn_gate_scale, dn, self.gradients.gate[block])
        return dn

    def value_gradients(self, place, dv):
        matrix = self.operands.value[place]
        self.gradients.value[place] += dv.mT @ self.value_rows
        self.dvalue_rows = dv @ matrix if self.dvalue_rows is None else self.dvalue_rows.addmm_(dv, matrix)

    def mlp(self, i, block, dy, dx, x, rstd, u):
        """dx, the gradient that x has already, plus that through the norm and the MLP."""
        if self.weights.shift is not None:
            self.gradients.shift[block] += dy.sum(0, dtype=self.gradients.shift.dtype)
        up, down = self.operands.up[block], self.operands.down[block]
        sums = self.gradients.up[block], self.gradients.down[block]
        scale, activation = self.plan.norm_scale(block), activation_index(self.config)
        return ops.norm_mlp_bwd(dy, x, dx, rstd, scale, u, up, down, activation, *sums)


def is_xsa(config, block):
    return block >= config.num_layers - config.xsa_last_n


def activation_index(config):
    # star_relu2 is relu2 between scaled weights (model.py).
    return ACTIVATIONS.index("leaky_relu2" if config.activation == "leaky_relu2" else "relu2")


def _mix(coefficients, tensors, norm_scale=None):
    """Each tensor (but those that are None, at the end) times its row of coefficients, summed; the norm of the sum if it has a scale."""
    summands = [t for t in tensors if t is not None]
    coefficients = coefficients[: len(summands)]
    tensors, rows, places = [], [], []
    for summand, row in zip(summands, coefficients):
        place = next((place for place, tensor in enumerate(tensors) if tensor is summand), len(tensors))
        places.append(place)
        if place < len(tensors):
            rows[place] = rows[place] + row
        else:
            tensors.append(summand)
            rows.append(row)
    if len(tensors) < len(summands):
        coefficients = torch.stack(rows)
    mixed, normed, rstd = ops.mix_norm_fwd(tensors, coefficients, list(range(len(tensors))), norm_scale)
    return Mix(tensors, coefficients, places, rstd), mixed, normed
