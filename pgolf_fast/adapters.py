"""Low-rank adapters of the model's products, one set per row of the batch.

    y = x W^T + scale (x down^T) up^T        down [B, rank, in], up [B, out, rank], W shared by all rows

Every visit of a block has its own: a looped block is corrected differently in each pass. The four corrections of
attention read the same input, the block's normalised one (also that of the output product), so their `down` are one matrix.
"""

from typing import NamedTuple

import torch
from torch import Tensor


def _corrected(y, narrow, up, scale):
    return torch.baddbmm(y, narrow, up.mT, alpha=scale)


class VisitAdapter(NamedTuple):
    """What one visit of a block reads."""

    scale: float
    attention_down: Tensor  # [B, 4 rank, C], for queries, keys, values, output
    mlp_down: Tensor  # [B, rank, C]
    q_up: Tensor  # [B, C, rank]
    k_up: Tensor  # [B, kv_dim, rank]
    v_up: Tensor  # [B, kv_dim, rank]
    o_up: Tensor  # [B, C, rank]
    mlp_up: Tensor  # [B, C, rank]

    def correct_attention(self, q, k, v, n):
        """q, k and v [B, T, width] corrected from the block's input `n`, and the function that corrects the output product."""
        *inner, for_output = torch.bmm(n, self.attention_down.mT).chunk(4, dim=-1)
        ups = (self.q_up, self.k_up, self.v_up)
        corrected = (_corrected(y, narrow, up, self.scale) for y, narrow, up in zip((q, k, v), inner, ups))
        return *corrected, lambda y: _corrected(y, for_output, self.o_up, self.scale)

    def correct_mlp(self, y, m):
        return _corrected(y, torch.bmm(m, self.mlp_down.mT), self.mlp_up, self.scale)


def _shapes(config, rows, rank, num_visits):
    """Name to shape of the `down` and of the `up` matrices; names are (visit, field), the head's visit None."""
    dim, kv_dim = config.model_dim, config.kv_dim
    down, up = {}, {}
    for visit in range(num_visits):
        down |= {(visit, "attention_down"): (rows, 4 * rank, dim), (visit, "mlp_down"): (rows, rank, dim)}
        widths = {"q_up": dim, "k_up": kv_dim, "v_up": kv_dim, "o_up": dim, "mlp_up": dim}
        up |= {(visit, name): (rows, width, rank) for name, width in widths.items()}
    return down | {(None, "down"): (rows, rank, dim)}, up | {(None, "up"): (rows, config.vocab_size, rank)}


def _views(flat, shapes):
    parts = flat.split([torch.Size(shape).numel() for shape in shapes.values()])
    return {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts)}


class Adapters:
    """The adapters of `rows` documents and their AdamW (without a first moment).

    All lie in one flat tensor per kind: `value` float32, first every `down`, then every `up`; `working`, the copy in
    the model's dtype that products read; `gradient`; `moment`, of the squared gradient.
    """

    def __init__(self, model, rows, rank, scale):
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
        self.leaves = {name: view.detach().requires_grad_() for name, view in _views(self.working, down | up).items()}
        for leaf, gradient in zip(self.leaves.values(), _views(self.gradient, down | up).values()):
            leaf.grad = gradient  # backward adds to it in place
        fields = VisitAdapter._fields[1:]
        self.visits = [VisitAdapter(scale, *(self.leaves[visit, field] for field in fields)) for visit in range(len(visits))]
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
        self.value[self.num_down :] = 0
        self.moment.zero_()
        self.gradient.zero_()
        self.steps.zero_()
        self.working.copy_(self.value)

    def correct_head(self, logits, h):
        down, up = self.leaves[None, "down"], self.leaves[None, "up"]
        return _corrected(logits, torch.bmm(h, down.mT), up, self.scale)

    @torch.no_grad()
    def step(self, lr, beta2, epsilon, weight_decay):
        """Take one step down the gradient that `backward` has left, and clear it."""
        self.steps += 1
        self.update(self.value, self.moment, self.working, self.gradient, self.steps, lr, beta2, epsilon, weight_decay)


def _adamw_(value, moment, working, gradient, steps, lr, beta2, epsilon, weight_decay):
    """AdamW with beta1 = 0, whose first moment is the gradient itself, and which so needs no store for it."""
    slope = gradient.float()
    moment.mul_(beta2).add_((1 - beta2) * slope * slope)
    root = moment.sqrt() / (1 - beta2**steps).sqrt()
    value.mul_(1 - lr * weight_decay).sub_(lr * slope / (root + epsilon))
    working.copy_(value)
    gradient.zero_()
