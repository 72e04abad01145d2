"""The quantization of least loss whose artifact fits a number of bytes.

Every matrix of integers may leave its recipe's table for a variant of its own scheme: clip, step, bits. Three stages:

    rises    of each matrix: how far it alone, quantized as published, moves the loss
    predict  of each variant: the rise, in proportion to the squared error of plain rounding; bytes, by the entropy of the codes.
             From the coarsest of all, one step finer at a time: the step that buys most loss per byte
    measure  the published table and the best few predictions under the cap, quantized in full (GPTQ, corrections)

The codec is the default one, the smallest on every model measured. All losses are of training text, kept out of calibration; validation is
not read. The same input gives the same choice.
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from pgolf_fast import artifact
from pgolf_fast.calibrate import Windows
from pgolf_fast.errors import UserError
from pgolf_fast.export import Run, calibrate, metadata, model_of, needs_hessians
from pgolf_fast.quantize import QuantizedTensors, QuantTable, Rule, Scheme, TensorError, dequantize, quantize

NUM_ROWS = 128  # of train.seq_len tokens, that losses are measured on
NUM_ROWS_OF_RISES = 32
NUM_MEASURED = 3
ROWS_APART = 8  # of a matrix, in predictions: a processor would take minutes for all


@dataclass(frozen=True)
class Choice:
    schemes: tuple[Scheme, ...]  # of the searched matrices, in the model's order
    bytes: float
    loss: float  # nats per token


@dataclass(frozen=True)
class Measured:
    choice: Choice
    tensors: QuantizedTensors
    errors: list[TensorError]


@dataclass(frozen=True)
class Fit:
    chosen: Measured
    artifact: bytes
    tried: list[Choice]  # as measured; the published table first


class Search:
    """Of one run: Search(run, device).fit(room_bytes), for any number of rooms."""

    def __init__(
        self,
        run: Run,
        device: torch.device | str,
        data: Path | None = None,
        progress: Callable[[str, int, int], None] = lambda task, done, total: None,
    ):
        self.rules, train = run.recipe.quantize.rules(), run.recipe.train
        if needs_hessians(run, self.rules):
            self.hessians, windows = calibrate(run, device, data, progress)
        else:
            self.hessians, windows = None, Windows(data or train.data, train.seq_len, run.recipe.model.vocab_size)
        self.rows = windows.take(NUM_ROWS)
        self.model = model_of(run.recipe, device)
        self.state = {name: t.to(device) for name, t in run.state.items()}
        self.metadata, self.progress = metadata(run.name, run.recipe), progress
        published = {name: self.rules.rule_of(name, t).scheme for name, t in self.state.items()}
        self.searched = tuple(name for name, scheme in published.items() if hasattr(scheme, "variants"))
        self.published = self.measure(tuple(published[name] for name in self.searched))
        self.frontier = self._frontier()  # as predicted, by rising bytes and falling loss

    def losses(self, weights, num_rows: int = NUM_ROWS) -> torch.Tensor:
        self.model.load_published(weights)
        return token_losses(self.model, self.rows[:num_rows])

    def measure(self, schemes: tuple[Scheme, ...]) -> Measured:
        chosen = tuple(Rule((name,), scheme) for name, scheme in zip(self.searched, schemes))
        tensors, errors = quantize(self.state, dataclasses.replace(self.rules, rules=chosen + self.rules.rules), self.hessians)
        loss = self.losses(dequantize(tensors)).mean().item()
        return Measured(Choice(schemes, artifact.estimate_bytes(tensors, self.metadata), loss), tensors, errors)

    def _frontier(self) -> list[Choice]:
        before, weights, options = self.losses(self.state), dequantize(self.published.tensors), []
        self.unquantized_loss = before.mean().item()
        for i, (name, scheme) in enumerate(zip(self.searched, self.published.choice.schemes)):
            alone = self.losses(self.state | {name: weights[name]}, NUM_ROWS_OF_RISES)
            options.append(predict(self.state[name], scheme, rise_of_loss(alone - before[: len(alone)])))
            self.progress("predicting", i + 1, len(self.searched))
        # Right from matrix to matrix and too large in all, for text is not drawn from the model: what the table measured scales them.
        measured, estimated = self.published.choice.loss - self.unquantized_loss, sum(of_matrix[0].loss for of_matrix in options)
        scale = measured / estimated if measured > 0 else 1.0
        options = [[dataclasses.replace(c, loss=scale * c.loss) for c in of_matrix] for of_matrix in options]
        rest_bytes = self.published.choice.bytes - sum(of_matrix[0].bytes for of_matrix in options)
        return cheapest_first([hull(of_matrix) for of_matrix in options], rest_bytes, self.unquantized_loss)

    def fit(self, room_bytes: int) -> Fit:
        """`room_bytes` is what the artifact may take, code not counted."""
        tried = [self.published]
        ratio = 1.0  # of bytes as measured to bytes as predicted: the coder sees more than histograms
        for i in range(NUM_MEASURED):
            known = [one.choice.schemes for one in tried]
            fitting = [c for c in self.frontier if ratio * c.bytes <= room_bytes and c.schemes not in known]
            if fitting:
                tried.append(self.measure(fitting[-1].schemes))
                ratio = tried[-1].choice.bytes / fitting[-1].bytes
            self.progress("measuring", i + 1, NUM_MEASURED)
        for one in sorted(tried, key=lambda one: one.choice.loss):
            # The forecast is right to a few hundredths of a percent: what is far over need not be packed.
            if one.choice.bytes <= 1.01 * room_bytes and len(packed := artifact.pack(one.tensors, metadata=self.metadata)) <= room_bytes:
                return Fit(one, packed, [t.choice for t in tried])
        least = math.ceil(self.frontier[0].bytes)
        remedy = f"the smallest choice is forecast at {least:,}: use a smaller model"
        raise UserError(f"fit: nothing found under {room_bytes:,} bytes beside the code; {remedy}")


@torch.inference_mode()
def token_losses(model, rows: torch.Tensor, rows_at_a_time: int = 32) -> torch.Tensor:
    """Nats of every token, in plain float32 losses; float64 [tokens]."""
    parts = rows.to(model.tok_emb.device).split(rows_at_a_time)
    return torch.cat([model(part[:, :-1], part[:, 1:], reduction="none").flatten() for part in parts]).double()


def rise_of_loss(changes: torch.Tensor) -> float:
    """Of the mean loss, from every token's change: half their mean square.

    To second order the same as their mean, where the model's probabilities are true; and free of the mean's noise, tokens that rise against
    tokens that fall, in which one matrix's share would be lost.
    """
    return max(changes.square().mean().item() / 2, 1e-30)


def predict(matrix: torch.Tensor, published: Scheme, rise: float) -> list[Choice]:
    """A matrix's variants, the published one first: bytes, and rise of the loss."""
    sample, found = {"": matrix[::ROWS_APART]}, []
    for scheme in (published, *(v for v in published.variants() if v != published)):
        _, (error,) = quantize(sample, QuantTable((Rule(("*",), scheme),)), plain_rounding=True)
        found.append(Choice((scheme,), error.entropy_bits * matrix.numel() / 8, max(error.rmse, 1e-30) ** 2))
    return [dataclasses.replace(c, loss=rise * c.loss / found[0].loss) for c in found]


def hull(choices: list[Choice]) -> list[Choice]:
    """By rising bytes and falling loss, each step buying less per byte than the one before: the others are never worth it."""
    kept = []
    for choice in sorted(choices, key=lambda c: (c.bytes, c.loss)):
        if kept and choice.loss >= kept[-1].loss:
            continue
        while len(kept) > 1 and _gain(kept[-2], kept[-1]) <= _gain(kept[-1], choice):
            kept.pop()
        kept.append(choice)
    return kept


def cheapest_first(hulls: list[list[Choice]], rest_bytes: float, loss: float) -> list[Choice]:
    """From every matrix at its smallest: the steps along all hulls, those that buy most per byte first."""
    steps = [(_gain(a, b), i, b) for i, of_matrix in enumerate(hulls) for a, b in zip(of_matrix, of_matrix[1:])]
    picked = [of_matrix[0] for of_matrix in hulls]
    found = [_together(picked, rest_bytes, loss)]
    for _, i, finer in sorted(steps, key=lambda step: -step[0]):
        picked[i] = finer
        found.append(_together(picked, rest_bytes, loss))
    return found


def _together(picked: list[Choice], rest_bytes: float, loss: float) -> Choice:
    return Choice(tuple(c.schemes[0] for c in picked), rest_bytes + sum(c.bytes for c in picked), loss + sum(c.loss for c in picked))


def _gain(coarse: Choice, fine: Choice) -> float:
    """Nats per byte."""
    return (coarse.loss - fine.loss) / (fine.bytes - coarse.bytes)
