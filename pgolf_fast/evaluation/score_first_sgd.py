"""Score-first test-time training (PR #598, PR #691, after PR #549): score a chunk with the weights so far, then train all of them on it.

    for each chunk of the stream, in order:
        score its windows, shared out over the ranks
        unless it is the last: epochs x SGD on its rows, all ranks the same step

The momentum lives through all chunks; the learning rate falls along a cosine over the chunks. The published runs trained through
fake-quantized weights by accident, which made #691's score worse; `ttt.fake_quant` does the same on purpose.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pgolf_fast import dist
from pgolf_fast.data import Batch
from pgolf_fast.errors import UserError
from pgolf_fast.evaluation.referee import Referee
from pgolf_fast.evaluation.rehearsal import rehearse
from pgolf_fast.evaluation.sliding import score_published_tail, share_out
from pgolf_fast.evaluation.windows import sliding
from pgolf_fast.settings import requirer, setting
from pgolf_fast.step import GraphedStep, Step
from pgolf_fast.tensor_names import published_views


@dataclass(frozen=True)
class TttConfig:
    chunk_tokens: int = setting(32768, "positions scored, then trained on, at a time; a multiple of eval.seq_len", "TTT_CHUNK_TOKENS")
    epochs: int = setting(3, "passes over each chunk", "TTT_EPOCHS")
    lr: float = setting(0.002, "learning rate at the first chunk", "TTT_LR")
    momentum: float = setting(0.9, "of the SGD, kept from chunk to chunk", "TTT_MOMENTUM")
    grad_clip: float = setting(1.0, "norm of the whole gradient at most; 0: no limit", "TTT_GRAD_CLIP")
    freeze_blocks: int = setting(0, "first blocks that are not trained; embeddings, skips and gates always are", "TTT_FREEZE_BLOCKS")
    batch_rows: int = setting(32, "rows of eval.seq_len per rank and optimizer step at most", "TTT_BATCH_SEQS")
    fake_quant: bool = setting(False, "train through int6 weights, as the published runs did")

    def __post_init__(self):
        require = requirer("ttt")
        require(self.chunk_tokens > 0, "chunk_tokens", f"expected at least 1, got {self.chunk_tokens}")
        require(self.batch_rows > 0, "batch_rows", f"expected at least 1, got {self.batch_rows}")
        require(self.momentum < 1, "momentum", f"expected less than 1, got {self.momentum}")


class StepPlan(NamedTuple):
    """What a step is told, in the form that training's steps take."""

    lr: float
    fake_quant: bool
    looped: bool = True


class Sgd:
    """m <- momentum m + g;  p <- p - lr m; the optimizer of a Step."""

    def __init__(self, model, config: TttConfig):
        self.config, self.model_config = config, model.config
        self.params = dict(model.named_parameters())
        self.momentum = {name: torch.zeros_like(p) for name, p in self.params.items()}
        for p in self.params.values():
            p.grad = torch.zeros_like(p)  # also of one that no forward reads, such as the skips of a single block
        self.frozen = tuple(f"blocks.{i}." for i in range(config.freeze_blocks))
        self.lr = torch.zeros((), device=next(model.parameters()).device)  # read by a replayed graph

    def set(self, plan: StepPlan) -> None:
        self.lr.fill_(plan.lr)

    def collect(self) -> None:
        pass  # one micro-batch per step

    @torch.no_grad()
    def step(self) -> None:
        gradients = {name: p.grad for name, p in self.params.items()}
        if self.frozen:
            for name, view in published_views(self.model_config, gradients).items():
                if name.startswith(self.frozen):
                    view.zero_()
        for arrival in [dist.mean_(g) for g in gradients.values()]:
            arrival.wait()
        if self.config.grad_clip:
            torch.nn.utils.clip_grad_norm_(self.params.values(), self.config.grad_clip)
        momentum, params = list(self.momentum.values()), list(self.params.values())
        torch._foreach_mul_(momentum, self.config.momentum)
        torch._foreach_add_(momentum, list(gradients.values()))
        torch._foreach_sub_(params, torch._foreach_mul(momentum, self.lr))
        for g in gradients.values():
            g.zero_()


class ScoreFirstSgd:
    def __init__(self, model, seq_len: int, stride: int, batch_tokens: int, config: TttConfig, published_tail: bool = False):
        """As SlidingWindow, but that the model is trained."""
        rows, world = config.chunk_tokens // seq_len, dist.world_size()
        if config.chunk_tokens % seq_len or config.chunk_tokens % stride:
            raise UserError(f"ttt.chunk_tokens: {config.chunk_tokens} is no multiple of eval.seq_len {seq_len} and eval.stride {stride}")
        if rows % world:
            raise UserError(f"ttt.chunk_tokens: {rows} rows of {seq_len} cannot be shared by {world} ranks")
        if config.freeze_blocks > model.config.num_layers:
            raise UserError(f"ttt.freeze_blocks: {config.freeze_blocks} of a model with {model.config.num_layers} blocks")
        self.model, self.config, self.published_tail = model, config, published_tail
        self.seq_len, self.stride, self.batch_rows = seq_len, stride, max(1, batch_tokens // seq_len)
        self.optimizer = Sgd(model, config)
        on_gpu = next(model.parameters()).is_cuda
        self.sgd = (GraphedStep if on_gpu else Step)(model, self.optimizer, seq_len)
        self.done = 0  # chunks

    def warm_up(self, num_documents: int) -> None:
        rehearse(self, 3 * self.config.chunk_tokens)

    def close(self) -> None:
        self.sgd.close()

    def chunks(self, referee: Referee) -> Iterator[None]:
        length = self.config.chunk_tokens
        num_chunks = -(-referee.num_positions // length)
        while self.done < num_chunks:
            start, stop = self.done * length, min((self.done + 1) * length, referee.num_positions)
            windows = sliding(referee.num_positions, self.seq_len, self.stride, start, stop)
            share_out(referee, windows, self.batch_rows, self.seq_len)
            if self.done < num_chunks - 1:  # what the last chunk teaches nobody would use
                referee.meet()
                text = referee.reveal(start, stop)
                with referee.adapt(text):
                    self._learn(text.tokens, 0.5 * self.config.lr * (1 + math.cos(math.pi * self.done / (num_chunks - 1))))
            self.done += 1
            yield
        if self.published_tail:
            score_published_tail(referee, self.seq_len, self.stride)

    def _learn(self, tokens: Tensor, lr: float) -> None:
        """Every rank takes its contiguous part of the chunk's rows, the same in each epoch."""
        inputs, targets = (t.view(dist.world_size(), -1)[dist.rank()] for t in (tokens[:-1], tokens[1:]))
        step_tokens = self.config.batch_rows * self.seq_len
        batches = [Batch(i, t, None, 0) for i, t in zip(inputs.split(step_tokens), targets.split(step_tokens))]
        for _ in range(self.config.epochs):
            for batch in batches:
                self.sgd.run([batch], StepPlan(lr, self.config.fake_quant))

    def state(self) -> tuple[dict[str, Tensor], dict]:
        tensors = {f"weight.{name}": p.detach() for name, p in self.optimizer.params.items()}
        return tensors | {f"momentum.{name}": m for name, m in self.optimizer.momentum.items()}, {"done": self.done}

    @torch.no_grad()
    def load_state(self, tensors: dict[str, Tensor], state: dict) -> None:
        for name, p in self.optimizer.params.items():
            p.copy_(tensors[f"weight.{name}"])
            self.optimizer.momentum[name].copy_(tensors[f"momentum.{name}"])
        self.done = state["done"]
