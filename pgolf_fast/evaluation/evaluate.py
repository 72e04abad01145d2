"""One evaluation from its first token to its result: which evaluator, warm-up, progress, stopping and going on."""

import contextlib
import dataclasses
import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch

from pgolf_fast import checkpoint, dist
from pgolf_fast.bpb import Score
from pgolf_fast.errors import UserError
from pgolf_fast.evaluation.phased_lora import PhasedLora
from pgolf_fast.evaluation.referee import Evaluator, Referee, Result
from pgolf_fast.evaluation.score_first_sgd import ScoreFirstSgd
from pgolf_fast.evaluation.sliding import SlidingWindow
from pgolf_fast.settings import requirer, setting


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    evaluator: Literal["plain", "sliding", "score-first-sgd", "phased-lora"] = setting("sliding", "how the recipe's reported score is made")
    seq_len: int = setting(2048, "tokens of context", "EVAL_SEQ_LEN")
    stride: int = setting(64, "positions scored per window", "EVAL_STRIDE")
    batch_tokens: int = setting(262144, "tokens per forward of one rank; the published evaluators take 32 windows, 65,536")
    published_tail: bool = setting(False, "give the published count too, which scores the end of the stream several times")
    save_seconds: float = setting(60.0, "between two savings of an evaluation's state")

    def __post_init__(self):
        require = requirer("eval")
        for field in ("seq_len", "stride", "batch_tokens"):
            require(getattr(self, field) > 0, field, f"expected at least 1, got {getattr(self, field)}")
        require(self.stride <= self.seq_len, "stride", f"expected 1 to eval.seq_len {self.seq_len}, got {self.stride}")


def make_evaluator(name: str, model, recipe) -> Evaluator:
    """An evaluator that adapts changes the model's weights. `recipe` has the settings of all stages."""
    config = recipe.eval
    if name == "score-first-sgd":
        return ScoreFirstSgd(model, config.seq_len, config.stride, config.batch_tokens, recipe.ttt, config.published_tail)
    if name == "phased-lora":
        return PhasedLora(model, recipe.lora)
    stride = config.seq_len if name == "plain" else config.stride
    return SlidingWindow(model, config.seq_len, stride, config.batch_tokens, config.published_tail)


@dataclasses.dataclass(frozen=True)
class Outcome:
    result: Result
    scoring_s: float  # in the evaluator's chunks alone
    practice_s: float  # from the first chunk to the reduced result, saving included


@dataclasses.dataclass(frozen=True)
class Progress:
    score: Score  # of this rank, so far
    share: float  # of this rank's positions


def evaluate(
    evaluator: Evaluator,
    referee: Referee,
    saved: "SavedState | None" = None,
    progress: Callable[[Progress], None] | None = None,
    must_stop: Callable[[], bool] = lambda: False,
) -> Outcome | None:
    """Runs the evaluator to its end.

    saved      where the state is kept, and gone on from
    progress   called about once a second on rank 0
    must_stop  asked after each chunk; when it says so the state is saved and there is no outcome. Times are those of all sittings.
    """
    earlier = saved.restore(evaluator, referee) if saved else Outcome(None, 0.0, 0.0)
    begin = shown = time.perf_counter()
    saving_s = 0.0

    def outcome(result):
        passed = time.perf_counter() - begin
        return Outcome(result, earlier.scoring_s + passed - saving_s, earlier.practice_s + passed)

    for _ in evaluator.chunks(referee):
        now = time.perf_counter()
        if progress and dist.rank() == 0 and now - shown > 1:
            progress(_progress(referee))
            shown = now
        stopping = dist.any_rank(must_stop(), referee.device)
        if saved and saved.is_due(stopping, referee.device):
            saved.save(evaluator, referee, outcome(None))
            saving_s += time.perf_counter() - now
        if stopping:
            return None
    if referee.device.type == "cuda":
        torch.cuda.synchronize()
    scored = outcome(None)
    found = outcome(referee.result())
    if not math.isfinite(found.result.score.nats):
        raise UserError(f"the losses add up to {found.result.score.nats}: what learned from the text diverged; try smaller learning rates")
    return dataclasses.replace(found, scoring_s=scored.scoring_s)


def _progress(referee):
    score = referee.running()
    return Progress(score, min(1.0, score.tokens * dist.world_size() / referee.num_positions))


def _other(part: str, before, now) -> str:
    """In what an unfinished evaluation differs from this one."""
    if not (isinstance(before, dict) and isinstance(now, dict)):
        return f"with another {part} ({before}, now {now})"
    changed = (f"{key}={before.get(key)}, now {now.get(key)}" for key in before | now if before.get(key) != now.get(key))
    return f"with other {part} ({'; '.join(changed)})"


class SavedState:
    """The folder of an unfinished evaluation: one file per rank, replaced as a whole; no result is ever in it."""

    def __init__(self, folder: Path, identity: dict, every_s: float):
        """`identity` holds JSON values that two sittings of one evaluation share: artifact, data, evaluator, settings."""
        self.folder, self.identity, self.every_s = folder / f"rank{dist.rank()}of{dist.world_size()}", identity, every_s
        self.number, self.saved_at = 0, time.perf_counter()

    def is_due(self, now_at_once: bool, device) -> bool:
        return dist.any_rank(now_at_once or time.perf_counter() - self.saved_at > self.every_s, device)

    def save(self, evaluator: Evaluator, referee: Referee, so_far: Outcome) -> None:
        tensors, state = evaluator.state()
        of_referee, referee_state = referee.state()
        files = {f"evaluator.{name}": t for name, t in tensors.items()} | {f"referee.{name}": t for name, t in of_referee.items()}
        times = {"scoring_s": so_far.scoring_s, "practice_s": so_far.practice_s}
        self.number += 1
        checkpoint.save(self.folder, self.number, files, {"identity": self.identity, "evaluator": state, "referee": referee_state} | times)
        self.saved_at = time.perf_counter()

    def restore(self, evaluator: Evaluator, referee: Referee) -> Outcome:
        """Of the newest state that every rank has; nothing without one."""
        newest = checkpoint.latest(self.folder)
        numbers = dist.gather_objects(int(checkpoint.NAME.fullmatch(newest.name)[1]) if newest else 0)
        self.number = min(numbers)
        if not self.number:
            return Outcome(None, 0.0, 0.0)
        path = checkpoint.path_of(self.folder, self.number)
        tensors, state = checkpoint.load(path)
        for part, value in self.identity.items():
            if state["identity"].get(part) != value:
                raise UserError(
                    f"{path.parent.parent}: holds an unfinished evaluation {_other(part, state['identity'].get(part), value)}; "
                    "give it back what it began with, begin again with --fresh, or choose another folder"
                )

        def part_of(owner):
            return {name.removeprefix(f"{owner}."): t for name, t in tensors.items() if name.startswith(f"{owner}.")}

        evaluator.load_state(part_of("evaluator"), state["evaluator"])
        referee.load_state(part_of("referee"), state["referee"])
        return Outcome(None, state["scoring_s"], state["practice_s"])

    def remove(self) -> None:
        """Also the folder of all ranks, once it is empty."""
        shutil.rmtree(self.folder, ignore_errors=True)
        with contextlib.suppress(OSError):
            self.folder.parent.rmdir()
