"""Low-rank adapters of the model's products, one set per row of the batch.

    y = x W^T + scale (x down) up        down [B, in, rank], up [B, rank, out], W shared by all rows

Every visit of a block has its own: a looped block is corrected differently in each pass. The four corrections of
attention read the same input, the block's normalised one (also that of the output product), so their `down` are one matrix.
What products read of `up` is scaled already, so that no pass over activations multiplies by the scale.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn


class VisitAdapter(NamedTuple):
    """What one visit of a block reads."""

    attention_down: Tensor  # [B, C, 4 rank], for queries, keys, values, output
    mlp_down: Tensor  # [B, C, rank]
    q_up: Tensor  # [B, rank, C]
    k_up: Tensor  # [B, rank, kv_dim]
    v_up: Tensor  # [B, rank, kv_dim]
    o_up: Tensor  # [B, rank, C]
    mlp_up: Tensor  # [B, rank, C]

    def correct_attention(self, q, k, v, n):
        """q, k and v [B, T, width] corrected from the block's input `n`, and the function that corrects the output product."""
        for_q, for_k, for_v, for_o = torch.bmm(n, self.attention_down).chunk(4, dim=-1)
        q, k, v = q + torch.bmm(for_q, self.q_up), k + torch.bmm(for_k, self.k_up), v + torch.bmm(for_v, self.v_up)
        return q, k, v, lambda y: y + torch.bmm(for_o, self.o_up)

    def correct_mlp(self, y, m):
        return y + torch.bmm(torch.bmm(m, self.mlp_down), self.mlp_up)


def _shapes(config, rows, rank, num_visits):
    """Name to shape of the `down` and of the `up` matrices; names are (visit, field), the head's visit None."""
    dim, kv_dim = config.model_dim, config.kv_dim
    down, up = {}, {}
    for visit in range(num_visits):
        down |= {(visit, "attention_down"): (rows, dim, 4 * rank), (visit, "mlp_down"): (rows, dim, rank)}
        widths = {"q_up": dim, "k_up": kv_dim, "v_up": kv_dim, "o_up": dim, "mlp_up": dim}
        up |= {(visit, name): (rows, rank, width) for name, width in widths.items()}
    return down | {(None, "down"): (rows, dim, rank)}, up | {(None, "up"): (rows, rank, config.vocab_size)}


def _views(flat, shapes):
    parts = flat.split([torch.Size(shape).numel() for shape in shapes.values()])
    return {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts)}


class Adapters(nn.Module):
    """The adapters of `rows` documents and their AdamW (without a first moment).

    All lie in one flat tensor per kind: `value` float32, first every `down`, then every `up`; `working`, the copy in
    the model's dtype that products read; `gradient`, of that copy; `moment`, of the squared gradient of `value`.
    """

    def __init__(self, model, rows, rank, scale):
        super().__init__()
        config, visits = model.config, model.visits[True]
        device = model.tok_emb.device
        down, up = _shapes(config, rows, rank, len(visits))
        self.dim, self.num_down = config.model_dim, sum(torch.Size(shape).numel() for shape in down.values())
        total = self.num_down + sum(torch.Size(shape).numel() for shape in up.values())
        self.value = torch.zeros(total, device=device)
        self.moment = torch.zeros_like(self.value)
        self.working = torch.zeros_like(self.value, dtype=model.stream_dtype)
        self.gradient = torch.zeros_like(self.working)
        self.steps = torch.zeros((), device=device)
        # Leaves of autograd that are views of `working`: an update in place is seen by the next forward, also in a graph.
        self.leaves = {name: nn.Parameter(view) for name, view in _views(self.working, down | up).items()}
        for (name, leaf), gradient in zip(self.leaves.items(), _views(self.gradient, down | up).values()):
            self.register_parameter("_".join(map(str, name)), leaf)
            leaf.grad = gradient  # backward adds to it in place
        self.visits = [VisitAdapter(*(self.leaves[visit, field] for field in VisitAdapter._fields)) for visit in range(len(visits))]
        self.scale = scale
        self.update = torch.compile(_adamw_, dynamic=False) if device.type == "cuda" else _adamw_

    @property
    def down(self) -> Tensor:
        """Float32 values of every `down`: what may outlive a batch of documents."""
        return self.value[: self.num_down]

    def fill(self, generator):
        """New `down` values, uniform up to 1 / sqrt(in), all inputs being as wide as the model."""
        bound = self.dim**-0.5
        self.down.uniform_(-bound, bound, generator=generator)

    def restart(self):
        """Ready for other documents: `down` stays, `up` and the optimizer's state are zero."""
        for tensor in (self.value[self.num_down :], self.working[self.num_down :], self.moment, self.gradient, self.steps):
            tensor.zero_()
        self.working[: self.num_down].copy_(self.down)

    def correct_head(self, logits, h):
        return logits + torch.bmm(torch.bmm(h, self.leaves[None, "down"]), self.leaves[None, "up"])

    @torch.no_grad()
    def step(self, lr, beta2, epsilon, weight_decay):
        """Take one step down the gradient that `backward` has left, and clear it."""
        self.steps += 1
        for part, scale in ((slice(0, self.num_down), 1.0), (slice(self.num_down, None), self.scale)):
            state = (tensor[part] for tensor in (self.value, self.moment, self.working, self.gradient))
            self.update(*state, self.steps, scale, lr, beta2, epsilon, weight_decay)


def _adamw_(value, moment, working, gradient, steps, scale, lr, beta2, epsilon, weight_decay):
    """AdamW with beta1 = 0, whose first moment is the gradient itself and needs no store. `working` is scale times `value`."""
    slope = scale * gradient.float()
    moment.mul_(beta2).add_((1 - beta2) * slope * slope)
    root = moment.sqrt() / (1 - beta2**steps).sqrt()
    value.mul_(1 - lr * weight_decay).sub_(lr * slope / (root + epsilon))
    working.copy_(scale * value)
    gradient.zero_()
