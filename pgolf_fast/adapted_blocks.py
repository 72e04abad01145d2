"""The blocks of fused_blocks.py with low-rank adapters, for weights that do not learn: the backward makes the adapters' gradients alone.

model.py states the same mathematics in plain torch; the tests hold the two against each other.
"""

import functools
from typing import NamedTuple

import torch

from pgolf_fast import fused_blocks
from pgolf_fast.adapters import VisitAdapter
from pgolf_fast.fused_blocks import Attended, Mix, Weights, ops, rows_at, take_tape
from pgolf_fast.ops._library import accumulation_dtype
from pgolf_fast.ops.mix_norm import row_rstd
from pgolf_fast.ops.products import project, project_backward


def run(plan, weights, scales, x0, value_rows, adapters, positions):
    """The stream after the last visit at positions [B, S] of each row, [B, S, C], or at all of them; see fused_blocks.run.

    scales    [C] each, of what attention and the MLP write, which `weights` have in them already; a pair for each of plan.visits
    adapters  one for each of plan.visits; the rows of a batch have one each
    """
    x0, value_rows = x0.flatten(0, 1), None if value_rows is None else value_rows.flatten(0, 1)
    weights = Weights(*(None if w is None else w.to(accumulation_dtype(x0.dtype)) for w in weights))
    leaves = [leaf for adapter in adapters for leaf in adapter]
    return _AdaptedBlocks.apply(plan, weights, scales, x0, value_rows, positions, *leaves).view(plan.tokens[0], -1, x0.shape[1])


def _by_visit(leaves):
    size = len(VisitAdapter._fields)
    return [VisitAdapter(*leaves[i : i + size]) for i in range(0, len(leaves), size)]


def _scaled(adapters, scales):
    """The adapters with the scales of the two output products in them; so are scaled the gradients of the adapters without."""
    return [
        adapter._replace(o_up=_times(adapter.o_up, of_attention), mlp_up=_times(adapter.mlp_up, of_mlp))
        for adapter, (of_attention, of_mlp) in zip(adapters, scales)
    ]


def _product(x, factors):
    return (x * factors).to(x.dtype)


@functools.cache
def _product_in_one_pass():
    return torch.compile(_product, dynamic=True)


def _times(x, factors):
    """Times factors of a wider dtype that broadcast; by torch's own kernels that takes two to three times as long."""
    return (_product_in_one_pass() if x.is_cuda else _product)(x, factors)


def _times_rows(x, factors):
    """x [B, rows, ..] times factors [B rows]"""
    return _times(x.flatten(0, 1), factors[:, None]).view_as(x)


class _AdaptedBlocks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, plan, weights, scales, x0, value_rows, positions, *leaves):
        ctx.tape, adapters = [], _scaled(_by_visit(leaves), scales)
        forward = _Forward(plan, weights, x0, value_rows, ctx.tape, positions, adapters)
        out = forward.run()
        ctx.plan, ctx.weights, ctx.scales, ctx.operands, ctx.positions = plan, weights, scales, forward.operands, positions
        ctx.save_for_backward(*(tensor for adapter in adapters for tensor in adapter))
        return out

    @staticmethod
    def backward(ctx, dout):
        adapters = _by_visit(ctx.saved_tensors)
        backward = _Backward(ctx.plan, ctx.weights, ctx.operands, take_tape(ctx), ctx.positions, adapters)
        backward.run(dout)
        gradients = _scaled([VisitAdapter(**found) for found in backward.found], ctx.scales)
        return *(None,) * 6, *(gradient for of_visit in gradients for gradient in of_visit)


class Entered(NamedTuple):
    mixed: torch.Tensor
    rstd: torch.Tensor
    rows: slice  # of the mix's coefficients: of the stream, and of the skip if there is one


class Adapted(NamedTuple):
    attended: Attended  # of all positions
    low: torch.Tensor  # [B, T, 4 rank]: the input times `attention_down`
    y: torch.Tensor  # of the wanted positions, as all that follows
    low_o: torch.Tensor  # [B, S, rank]


def _batched(x, batch):
    """[B, rows, ..] of x [B rows, ..]"""
    return x.view(batch, -1, *x.shape[1:])


class _Forward(fused_blocks.Forward):
    def __init__(self, plan, weights, x0, value_rows, tape, positions, adapters):
        super().__init__(plan, weights, x0, value_rows, tape, positions)
        self.adapters, self.batch = adapters, plan.tokens[0]

    def enter(self, i, block, stream, skip):
        entered, x, n = super().enter(i, block, stream, skip)
        return Entered(x, entered.rstd, slice(1) if skip is None else slice(0, 3, 2)), x, n

    def attend(self, i, block, n, positions):
        adapter, plan, config = self.adapters[i], self.plan, self.config
        low = torch.bmm(_batched(n, self.batch), adapter.attention_down)
        *for_qkv, for_o = low.chunk(4, dim=-1)
        corrections = n.new_empty(n.shape[0], config.model_dim + 2 * config.kv_dim)
        parts = _batched(corrections, self.batch).split([config.model_dim, config.kv_dim, config.kv_dim], dim=-1)
        for part, low_part, up in zip(parts, for_qkv, (adapter.q_up, adapter.k_up, adapter.v_up)):
            torch.bmm(low_part, up, out=part)
        qkv = project(n, self.operands.qkv[block], corrections)
        rstd = ops.qkv_normalize(qkv, self.weights.q_gain[block], plan.cos, plan.sin, config.num_kv_heads)
        attended = self.attend_with(block, n, qkv, rstd)
        return Adapted(attended, low, self.at(attended.y, positions), for_o if positions is None else rows_at(for_o, positions))

    def output(self, i, block, attended, residual):
        y = project(attended.y, self.operands.o[block], residual)
        _batched(y, self.batch).baddbmm_(attended.low_o, self.adapters[i].o_up)
        return y, None if residual is None else row_rstd(y)

    def mlp(self, i, block, x, rstd, residual):
        adapter = self.adapters[i]
        y, u = super().mlp(i, block, x, rstd, residual)
        low = torch.bmm(_batched(x, self.batch), adapter.mlp_down)
        low = _times_rows(low, self.plan.norm_scale(block) * rstd)
        _batched(y, self.batch).baddbmm_(low, adapter.mlp_up)
        return y, (u, low)


class _Backward(fused_blocks.Backward):
    def __init__(self, plan, weights, operands, tape, positions, adapters):
        self.plan, self.config, self.weights, self.operands, self.tape = plan, plan.config, weights, operands, tape
        self.positions, self.adapters, self.batch = positions, adapters, plan.tokens[0]
        self.found: list[dict] = [{} for _ in plan.visits]  # gradients by field of VisitAdapter
        # The ops add to these gradients too.
        self.unwanted_gain, self.unwanted_gate = (None if w is None else torch.zeros_like(w[0]) for w in (weights.q_gain, weights.gate))

    def spread(self, i, d):
        """What the last visit has at the wanted positions, as a gradient at all of them."""
        if d is None or self.positions is None or i + 1 < len(self.plan.visits):
            return d
        index = self.positions[..., None].expand(-1, -1, d.shape[1])
        # NOTE: added, because padded positions repeat one that is wanted.
        return d.new_zeros(*self.plan.tokens, d.shape[1]).scatter_add_(1, index, _batched(d, self.batch)).flatten(0, 1)

    def two_lanes(self, i, block, dlane0, dlane1):
        dlane0, dlane1, dskip = super().two_lanes(i, block, dlane0, dlane1)
        return dlane0, self.spread(i, dlane1), dskip

    def unmix_entered(self, i, block, entered, dmixed, dn, dstream, dskip):
        """As the base's, without the gradient of x0."""
        if i == 0:
            return None, None
        dmixed, dstream, dskip = (self.spread(i, d) for d in (dmixed, dstream, dskip))
        coefficients = self.weights.mix[i, entered.rows]
        accumulate = [dstream, dskip][: len(coefficients)]
        scale = self.plan.norm_scale(block)
        (dstream, *dskip), _ = ops.mix_norm_bwd(dmixed, dn, entered.mixed, entered.rstd, [], coefficients, [], scale, accumulate)
        return dstream, dskip[0] if dskip else None

    def unmix(self, i, name, mix: Mix, dmixed, accumulate=None):
        accumulate = mix.gathered(accumulate or [])
        return mix.spread(ops.mix_norm_bwd(dmixed, None, None, None, [], mix.coefficients, [], 1.0, accumulate)[0])

    def attend(self, i, block, dout, saved: Adapted):
        config, plan, batch, adapter = self.config, self.plan, self.batch, self.adapters[i]
        n, qkv, rstd, gate, y, lse, own = saved.attended
        rank = saved.low_o.shape[-1]

        rows, found = _batched(dout, batch), self.found[i]
        found["o_up"] = torch.bmm(saved.low_o.mT, rows)
        q, k, v = fused_blocks.heads(qkv, config, plan.tokens)
        y, xsa = y.view(q.shape), fused_blocks.is_xsa(config, block)
        forward = q, k, v, gate, y, lse, own, plan.documents, xsa, fused_blocks.ATTENTION_SCALE
        raw = rstd, self.weights.q_gain[block], plan.cos, plan.sin, self.unwanted_gain
        dout = self.spread(i, dout)
        dqkv, dgate = ops.xsa_output_bwd(dout, self.operands.o[block], *forward, *raw)
        dqkv = dqkv.view_as(qkv)

        dlow, place = torch.empty_like(saved.low), 0
        widths = {"q_up": config.model_dim, "k_up": config.kv_dim, "v_up": config.kv_dim}
        for name, d in zip(widths, _batched(dqkv, batch).split(list(widths.values()), dim=-1)):
            torch.bmm(d, getattr(adapter, name).mT, out=dlow[..., place : place + rank])
            found[name] = torch.bmm(saved.low[..., place : place + rank].mT, d)
            place += rank
        torch.bmm(_batched(dout, batch), adapter.o_up.mT, out=dlow[..., place:])
        found["attention_down"] = torch.bmm(_batched(n, batch).mT, dlow)

        if i == 0:
            return None  # nothing before it learns
        dn = project_backward(dqkv, self.operands.qkv[block])
        _batched(dn, batch).baddbmm_(dlow, adapter.attention_down.mT)
        if config.attn_gate:
            gates, dgates = gate.flatten(0, 1), dgate.flatten(0, 1)
            ops.attn_gate_bwd(dgates, gates, n, self.weights.gate[block], config.attn_gate_scale, dn, self.unwanted_gate)
        return dn

    def mlp(self, i, block, dy, dx, x, rstd, kept):
        """dx, the gradient that x has already, plus that through the norm, the MLP and its adapter."""
        (u, low), adapter, scale = kept, self.adapters[i], self.plan.norm_scale(block)
        rows = _batched(dy, self.batch)
        dlow = torch.bmm(rows, adapter.mlp_up.mT)
        dn = ops.fused_mlp_bwd_input(dy, u, self.operands.up[block], self.operands.down[block], fused_blocks.activation_index(self.config))
        _batched(dn, self.batch).baddbmm_(dlow, adapter.mlp_down.mT)
        dlow = _times_rows(dlow, scale * rstd)
        self.found[i] |= {"mlp_down": torch.bmm(_batched(x, self.batch).mT, dlow), "mlp_up": torch.bmm(low.mT, rows)}
        (dx,), _ = ops.mix_norm_bwd(dx, dn, x, rstd, [], None, [], scale, [None])
        return dx
