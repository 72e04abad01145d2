"""The quantization of least loss whose artifact fits a number of bytes.

Every integer rule of the recipe's table (attention, MLP, token table) may take any variant of its scheme: clip, step, bits. Three stages:

    proxy     each variant of each rule by plain rounding of some rows: squared error of the weights, bytes by the entropy of the codes
    predict   loss = unquantized + sum over the rules of slope x squared error, each slope measured with that rule alone quantized as published
    measure   the best few predictions under the cap, and the published table, quantized in full (GPTQ, corrections)

All losses are of the same rows of training text, kept out of calibration; validation is not read. The same input gives the same choice.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from pgolf_fast import artifact
from pgolf_fast.calibrate import Windows
from pgolf_fast.errors import UserError
from pgolf_fast.export import Run, calibrate, metadata, model_of, needs_hessians
from pgolf_fast.quantize import Codes, QuantConfig, QuantizedTensors, Rule, Scheme, TensorError, dequantize, quantize

NUM_ROWS = 128  # of train.seq_len tokens, that losses are measured on
NUM_MEASURED = 6
ROWS_APART = 8  # of a matrix, in the proxies: a processor would take minutes for all
LEAST_RISE = 1e-5  # nats per token: what those rows can tell


@dataclass(frozen=True)
class Choice:
    schemes: tuple[Scheme, ...]  # of the searched rules, in the table's order
    bytes: float
    loss: float  # nats per token


@dataclass(frozen=True)
class Fit:
    rules: QuantConfig
    tensors: QuantizedTensors
    errors: list[TensorError]
    searched: tuple[Rule, ...]
    unquantized_loss: float
    frontier: list[Choice]  # as predicted: no other choice is smaller and better
    measured: list[Choice]  # the published table first
    chosen: Choice


def fit(
    run: Run,
    device: torch.device | str,
    room_bytes: int,
    data: Path | None = None,
    progress: Callable[[str, int, int], None] = lambda task, done, total: None,
) -> Fit:
    """`room_bytes` is what the artifact may take, code not counted."""
    rules, train = run.recipe.quantize.rules(), run.recipe.train
    if needs_hessians(run, rules):
        hessians, windows = calibrate(run, device, data, progress)
    else:
        hessians, windows = None, Windows(data or train.data, train.seq_len, run.recipe.model.vocab_size)
    rows = windows.take(NUM_ROWS)
    model = model_of(run.recipe, device)
    state = {name: t.to(device) for name, t in run.state.items()}

    def loss(weights):
        model.load_published(weights)
        return mean_loss(model, rows)

    published = {name: rules.rule_of(name, t) for name, t in state.items()}
    own = {rule: {name: t for name, t in state.items() if published[name] == rule} for rule in rules.rules if rule in published.values()}
    searched = [rule for rule in own if hasattr(rule.scheme, "variants")]
    described = metadata(run.name, run.recipe)
    unquantized = loss(state)
    as_published = artifact.estimate_bytes(quantize(state, rules, plain_rounding=True)[0], described)
    options = [_options(rule.scheme, own[rule], lambda weights: loss(state | weights) - unquantized, progress) for rule in searched]
    frontier = _combine(options, as_published, unquantized)

    def measure(schemes):
        chosen = _with(rules, searched, schemes)
        tensors, errors = quantize(state, chosen, hessians)
        return chosen, tensors, errors, Choice(schemes, artifact.estimate_bytes(tensors, described), loss(dequantize(tensors)))

    tried = [measure(tuple(rule.scheme for rule in searched))]
    ratio = tried[0][3].bytes / as_published  # of bytes as measured to bytes as predicted: GPTQ and corrections differ a little from rounding
    candidates = list(frontier)
    for i in range(NUM_MEASURED):
        candidates = [c for c in candidates if ratio * c.bytes <= room_bytes]
        if candidates:
            best = candidates.pop()
            tried.append(measure(best.schemes))
            ratio = tried[-1][3].bytes / best.bytes
        progress("measuring", i + 1, NUM_MEASURED)
    for chosen, tensors, errors, choice in sorted(tried, key=lambda t: t[3].loss):
        # The forecast is right to a few hundredths of a percent: what is far over need not be packed.
        if choice.bytes <= 1.01 * room_bytes and len(artifact.pack(tensors, metadata=described)) <= room_bytes:
            return Fit(chosen, tensors, errors, tuple(searched), unquantized, frontier, [t[3] for t in tried], choice)
    least = math.ceil(frontier[0].bytes)
    raise UserError(f"fit: nothing found under {room_bytes:,} bytes beside the code; the smallest choice is forecast at {least:,}: use a smaller model")


@torch.inference_mode()
def mean_loss(model, rows: torch.Tensor, rows_at_a_time: int = 32) -> float:
    """Nats per token, in plain float32 losses."""
    total = 0.0
    for part in rows.to(model.tok_emb.device).split(rows_at_a_time):
        total += model(part[:, :-1], part[:, 1:], reduction="none").sum(dtype=torch.float64).item()
    return total / rows[:, 1:].numel()


def _options(scheme, own, rise_of, progress) -> list[Choice]:
    """One rule's variants, the published one first: bytes, and the rise of the loss as predicted."""

    def rounded(tensors, variant):
        return quantize(tensors, QuantConfig((Rule(("*",), variant),)), plain_rounding=True)

    def proxies(variant):
        tensors, errors = rounded(sample, variant)
        return _entropy_bytes(tensors, errors), max(_squared_error(errors), 1e-30)

    sample = {name: t[::ROWS_APART] for name, t in own.items()}
    published, _ = rounded(own, scheme)
    published_bytes, published_rise = artifact.estimate_bytes(published), max(rise_of(dequantize(published)), LEAST_RISE)
    entropy, squared_error = proxies(scheme)
    variants = [scheme, *(v for v in scheme.variants() if v != scheme)]
    found = []
    for i, variant in enumerate(variants):
        own_entropy, own_error = proxies(variant)
        found.append(Choice((variant,), published_bytes * own_entropy / entropy, published_rise * own_error / squared_error))
        progress("searching", i + 1, len(variants))
    return found


def _combine(options: list[list[Choice]], as_published: float, unquantized: float) -> list[Choice]:
    """The frontier of one variant for every rule; the first of a rule's options is the published one."""
    rest_bytes = as_published - sum(of_rule[0].bytes for of_rule in options)
    return _front([
        Choice(tuple(c.schemes[0] for c in picked), rest_bytes + sum(c.bytes for c in picked), unquantized + sum(c.loss for c in picked))
        for picked in itertools.product(*map(_front, options))
    ])


def _squared_error(errors):
    return sum(e.rmse**2 * math.prod(e.shape) for e in errors)


def _entropy_bytes(tensors, errors):
    return sum(e.entropy_bits * math.prod(e.shape) / 8 + 2 * tensors[e.name].scales.numel() for e in errors if isinstance(tensors[e.name], Codes))


def _front(choices: list[Choice]) -> list[Choice]:
    """By rising bytes and falling loss, without those that another beats."""
    kept = []
    for choice in sorted(choices, key=lambda c: (c.bytes, c.loss)):
        if not kept or choice.loss < kept[-1].loss:
            kept.append(choice)
    return kept


def _with(rules: QuantConfig, searched: list[Rule], schemes: tuple[Scheme, ...]) -> QuantConfig:
    chosen = dict(zip(searched, schemes))
    return dataclasses.replace(rules, rules=tuple(dataclasses.replace(r, scheme=chosen.get(r, r.scheme)) for r in rules.rules))
