"""Evaluators of any make behind one interface: run(stream) -> Run.

An evaluator of somebody else is a function of a Python file or module, and does not know of this package's referee:

    def evaluate(model, stream):            stream.tokens int64 [n + 1]; position p reads token p and predicts token p + 1
        return losses                       float [n], nats, in the order of the stream
        return losses, log_probs            and the distributions they were taken from, [n, vocabulary]
        return Answer(...)                  and the bytes it divides by, and the order in which it scored

    evaluate.isolates_documents = False     says that a document's score may depend on the text of earlier ones
    def make_model(vocab_size): ...         beside it: the model to audit it with, instead of a small one of ours
"""

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from pgolf_fast import recipe
from pgolf_fast.audit.stream import VOCAB_SIZE, Stream
from pgolf_fast.audit.watch import Forward, Watch, no_network
from pgolf_fast.errors import UserError
from pgolf_fast.evaluation.evaluate import make_evaluator
from pgolf_fast.evaluation.referee import Referee
from pgolf_fast.evaluation.self_distillation import self_distill
from pgolf_fast.evaluation.windows import Windows
from pgolf_fast.model import GPT

# A recipe's model and evaluator at a size that runs hundreds of times in a minute; its parts stay.
SMALL = (
    f"model.vocab_size={VOCAB_SIZE}",
    "model.model_dim=32",
    "model.num_heads=4",
    "model.num_kv_heads=2",
    "model.mlp_mult=2",
    "model.mlp_hidden=0",
    "model.rope_dims=4",
    "model.bf16_tensors=",
    "eval.seq_len=32",
    "eval.stride=8",
    "eval.batch_tokens=128",
    "ttt.chunk_tokens=64",
    "ttt.epochs=2",
    "ttt.lr=0.05",
    "lora.lanes=2",
    "lora.window_tokens=32",
    "lora.chunk_tokens=8",
    "lora.batch_documents=2",
    "lora.row_multiple=8",
    "lora.rank=2",
    "lora.lr=0.05",
    "lora.prefix_documents=2",
    "lora.phases=2",
    "lora.global_chunk_tokens=32",
    "lora.global_lr=0.05",
)
ISOLATING = ("phased-lora",)  # evaluators whose windows stop at a document's start
WEIGHT_NOISE = 0.2  # a fresh model's blocks give zero, so that it would not see its context


@dataclass(frozen=True)
class Answer:
    losses: Tensor  # float [n] nats, of token p + 1 at position p
    log_probs: Tensor | None = None  # float [n, V], each row the distribution that its loss was taken from
    num_bytes: int | None = None  # what the sum of losses is divided by
    order: np.ndarray | None = None  # int64 [n]; positions with a smaller number were scored earlier, with equal ones in stream order


@dataclass(frozen=True)
class Run:
    answer: Answer
    forwards: list[Forward]
    network: list[str]  # attempts


@dataclass(frozen=True)
class Subject:
    name: str
    make_model: Callable[[], nn.Module]  # a fresh copy of the same one each time
    evaluate: Callable[[nn.Module, Stream], Answer]
    isolates_documents: bool
    vocab_size: int = VOCAB_SIZE

    def run(self, stream: Stream, forget: bool = False) -> Run:
        """From the artifact's weights; nothing is kept from one run to the next. `forget`: see Watch."""
        model = self.make_model()
        watch = Watch(model, forget)
        with no_network() as attempts:
            answer = self.evaluate(model, stream)
        return Run(answer, watch.forwards, attempts)


# --- ours ------------------------------------------------------------------------------------------------------------


class _RecordingReferee(Referee):
    """Keeps the order of scoring and the distributions; changes nothing."""

    def __init__(self, model, validation):
        super().__init__(model, validation, allow_published_tail=True)
        self.order = np.zeros(self.num_positions, np.int64)
        self.log_probs = torch.full((self.num_positions, VOCAB_SIZE), torch.nan)
        self._logits, self._calls = None, 0
        model.register_forward_hook(self._keep_logits)

    def _keep_logits(self, model, args, output):
        self._logits = output.detach()

    def score(self, windows: Windows, **options):
        scored = super().score(windows, **options)
        positions = windows.positions()
        self._calls += 1
        self.order[positions] = self._calls
        self.log_probs[positions] = self._logits.log_softmax(-1)[scored.is_kept]
        return scored


def _through_referee(make_evaluator: Callable, before: Callable) -> Callable[[nn.Module, Stream], Answer]:
    def evaluate(model, stream):
        validation = stream.validation()
        before(model, validation)
        evaluator = make_evaluator(model)
        referee = _RecordingReferee(model, validation)
        for _ in evaluator.chunks(referee):
            pass
        result = referee.result()
        return Answer(torch.from_numpy(referee.ledger.losses), referee.log_probs, result.score.bytes, referee.order)

    return evaluate


def small_model(settings: recipe.Recipe) -> GPT:
    model = GPT(settings.model, 0, stream_dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(WEIGHT_NOISE * torch.randn(p.shape, generator=generator))
    return model


def of_recipe(name: str, settings: recipe.Recipe) -> Subject:
    """What `pgolf eval` does with the recipe, on its model made small."""
    small = recipe.overridden(settings, SMALL)
    evaluator = small.eval.evaluator

    def before(model, validation):
        if small.sdttt.enabled:
            self_distill(model, validation, small.eval.seq_len, small.sdttt)

    title = f"{name}: {evaluator}" + (" after self-distillation" if small.sdttt.enabled else "")
    return of_strategy(title, lambda model: make_evaluator(evaluator, model, small), small, evaluator in ISOLATING, before)


def of_strategy(
    name: str, make_evaluator: Callable, settings: recipe.Recipe, isolates=False, before=lambda model, validation: None
) -> Subject:
    """make_evaluator(model) gives a strategy against the referee; before(model, validation) is what is done without one."""
    return Subject(name, lambda: small_model(settings), _through_referee(make_evaluator, before), isolates)


# --- anybody's -------------------------------------------------------------------------------------------------------


def of_function(name: str, evaluate: Callable, make_model: Callable[[int], nn.Module] | None = None) -> Subject:
    def checked(model, stream):
        return _answer(name, evaluate(model, stream), stream)

    def fresh():
        torch.manual_seed(0)
        return make_model(VOCAB_SIZE)

    settings = default_settings()
    return Subject(name, fresh if make_model else lambda: small_model(settings), checked, getattr(evaluate, "isolates_documents", True))


def default_settings() -> recipe.Recipe:
    """The small model for evaluators that bring none: four blocks, with a smear that stops at documents."""
    layers = ("model.num_layers=4", "model.smear=token", "model.smear_mask_bos=true", "model.bigram_buckets=0", "model.value_embed=false")
    return recipe.resolve("tiny", (*SMALL, *layers), environ={}).recipe


def _answer(name: str, returned, stream: Stream) -> Answer:
    answer = returned if isinstance(returned, Answer) else Answer(*returned) if isinstance(returned, tuple) else Answer(returned)
    if not isinstance(answer.losses, Tensor) or answer.losses.dim() != 1:
        raise UserError(f"{name}: expected a tensor of one loss per position, got {type(answer.losses).__name__}")
    expected = (len(stream), len(stream.pieces))
    if answer.log_probs is not None and tuple(answer.log_probs.shape) != expected:
        raise UserError(f"{name}: log_probs: expected shape {list(expected)}, got {list(answer.log_probs.shape)}")
    log_probs = None if answer.log_probs is None else answer.log_probs.detach().float()
    order = None if answer.order is None else np.asarray(answer.order)
    return Answer(answer.losses.detach().float(), log_probs, answer.num_bytes, order)


def load_function(place: str) -> Subject:
    """FILE.py:FUNCTION or MODULE:FUNCTION."""
    source, _, function = place.rpartition(":")
    try:
        if source.endswith(".py"):
            spec = importlib.util.spec_from_file_location(Path(source).stem, source)
            module = importlib.util.module_from_spec(spec)
            sys.modules[spec.name] = module  # where dataclasses of the file look for their module
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(source)
    except Exception as error:  # whatever the file raises while it is imported
        raise UserError(f"evaluator: cannot import {source} ({type(error).__name__}: {error})") from None
    evaluate = getattr(module, function, None)
    if not callable(evaluate):
        functions = [n for n, f in vars(module).items() if inspect.isfunction(f) and f.__module__ == module.__name__]
        raise UserError(f"evaluator: {source} has no function {function!r}; it has {', '.join(functions) or 'none'}")
    return of_function(place, evaluate, getattr(module, "make_model", None))
