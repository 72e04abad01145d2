"""The referee: the one place that holds the validation tokens. It makes the legal order the only one there is.

    scored = referee.score(windows)             the model is run on the windows' inputs; losses go into the ledger
    with referee.adapt(scored): ...             weights may change in here, and nowhere else

What an evaluator can get hold of: numbers that are public (how many positions there are, where documents start), and tokens that were
targets of positions that are scored already. So whatever it learns, and from whatever it likes, it learns from the past. The model's
forward alone sees the rest of a window, and it is never given a target: it returns logits, and the referee, in plain float32, makes the
losses. One loss per position, forever; a second one is refused.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pgolf_fast import dist
from pgolf_fast.bpb import Score
from pgolf_fast.data import Validation
from pgolf_fast.errors import UserError
from pgolf_fast.evaluation.score_ledger import ScoreLedger
from pgolf_fast.evaluation.windows import Windows


class OrderError(RuntimeError):
    """An evaluator asked for what the rules forbid: a second loss, a token that is not scored yet, weights changed at another time."""


class Evaluator(Protocol):
    """A strategy. It is built with the model and its settings, and meets the text through a referee only."""

    model: Callable[..., Tensor]  # what its referee asks for logits: the model, or what replays it in the evaluator's shapes

    def warm_up(self, num_documents: int) -> None:
        """Before the first chunk of a stream of so many documents, on a GPU: nothing is then left to be initialised or recorded."""

    def chunks(self, referee: "Referee") -> Iterator[None]:
        """Scores every position; yields wherever it can be stopped and, with `state` and `load_state`, go on with the same result.
        All ranks yield equally often."""

    def state(self) -> tuple[dict[str, Tensor], dict]:
        """(tensors, JSON values), all that `chunks` needs to go on from the last yield: its place, changed weights, momentum."""

    def load_state(self, tensors: dict[str, Tensor], state: dict) -> None: ...

    def close(self) -> None:
        """No chunk follows: what dist.stop would wait for goes."""


@dataclass(frozen=True)
class Scored:
    """What has been scored, and so may be learned from. Only a referee makes one."""

    spans: np.ndarray  # int64 [n, 2], first position and end of each
    _referee: "Referee" = field(repr=False)


@dataclass(frozen=True)
class ScoredWindows(Scored):
    """The answer to `score`. Copies: the ledger has its own."""

    columns: Tensor  # int64 [B, S], place in the row of each scored position
    targets: Tensor  # int64 [B, S], 0 where not kept
    losses: Tensor  # float32 [B, S] nats, 0 where not kept; with the graph of the forward if it was asked for
    is_kept: Tensor  # bool [B, S], false past a row's own scored positions


@dataclass(frozen=True)
class ScoredText(Scored):
    """The answer to `reveal`: a run of the stream."""

    tokens: Tensor  # int64 [n + 1]; inputs are tokens[:-1], targets tokens[1:]


@dataclass(frozen=True)
class Result:
    """Exists only of a whole stream."""

    score: Score
    again: Score  # of what was scored again under the published tail; no part of `score`
    versions: int  # of the weights, over the evaluation
    digest: str  # of the ledger, in hexadecimal

    @property
    def published(self) -> Score:
        """The score with every repetition counted, as the published evaluators do."""
        one, more = self.score, self.again
        return Score(one.nats + more.nats, one.tokens + more.tokens, one.bytes + more.bytes)


class Referee:
    """One rank's. `model` is called as a GPT is: model(inputs [B, T], positions=columns [B, S] or S, **how) -> logits [B, S, V]."""

    def __init__(
        self, model: Callable[..., Tensor], validation: Validation, device: torch.device | str = "cpu", allow_published_tail: bool = False
    ):
        if len(validation) == 0:
            raise UserError("validation: no position to score; use a larger validation split")
        self.device = torch.device(device)
        self.num_positions = len(validation)
        self.document_starts = validation.document_starts.copy()  # positions of BOS
        self.version = 0  # of the weights
        self.ledger = ScoreLedger(validation.target_bytes)
        self.allow_published_tail = allow_published_tail
        self._model = model
        self._tokens = torch.from_numpy(validation.tokens.astype(np.int32)).to(self.device)
        self._bytes = validation.target_bytes
        self._claimed = np.zeros(self.num_positions, bool)  # scored by this rank, or by another before the last `meet`
        self._new_spans: list[np.ndarray] = []  # scored by this rank since then
        self._again: list[tuple[np.ndarray, Tensor]] = []
        self._is_adapting = False
        self._weights = self._weight_stamp()

    # -- scoring

    def score(self, windows: Windows, *, row_tokens: int = 0, with_grad: bool = False, **how) -> ScoredWindows:
        """The losses of the windows' scored positions under the present weights.

        row_tokens  every row is padded with id 0 to this many tokens (causal models do not see it); 0: to the longest
        with_grad   keep the graph: the losses can be learned from without another forward
        how         goes to the model's forward: parameters such as adapters, never a function of the tokens
        """
        self._claim(windows)
        scored = self._forward(windows, row_tokens, with_grad, how)
        self.ledger.add(windows, scored.losses, self.version)
        return scored

    def score_again(self, windows: Windows, *, row_tokens: int = 0, **how) -> None:
        """The published evaluators' last windows, which score the end of the stream once more. Counted beside the score, never in it."""
        if not self.allow_published_tail:
            raise OrderError("only a referee with allow_published_tail scores a position again")
        positions = windows.positions()
        if not self._claimed[positions].all():
            raise OrderError("score_again: a position that has no score yet")
        scored = self._forward(windows, row_tokens, False, how)
        self._again.append((positions, scored.losses[scored.is_kept]))

    def _claim(self, windows: Windows) -> None:
        if len(windows) and int(windows.end.max()) > self.num_positions:
            raise OrderError(f"windows end at {int(windows.end.max())}, the stream at {self.num_positions}")
        spans = _joined(np.stack([windows.first, windows.end], 1))
        for first, end in spans:
            if self._claimed[first:end].any():
                position = int(first + np.flatnonzero(self._claimed[first:end])[0])
                raise OrderError(f"position {position} is scored already; a score is never revised")
            self._claimed[first:end] = True
        if dist.world_size() > 1:
            self._new_spans.append(spans)

    def _forward(self, windows: Windows, row_tokens: int, with_grad: bool, how: dict) -> ScoredWindows:
        if self._is_adapting:
            raise OrderError("score inside adapt: the weights are between two versions")
        self._require_unchanged_weights()
        length, width = max(row_tokens, windows.row_tokens), windows.row_scored
        bounds = torch.from_numpy(np.stack([windows.start, windows.first, windows.end])).to(self.device, non_blocking=True)
        start, first, end = bounds[:, :, None]
        place = start + torch.arange(length, device=self.device)
        inputs = torch.where(place < end, self._tokens[place.clamp(max=self.num_positions)], 0).long()
        position = first + torch.arange(width, device=self.device)
        is_kept = position < end
        position = torch.where(is_kept, position, first)
        columns = position - start
        targets = torch.where(is_kept, self._tokens[(position + 1).clamp(max=self.num_positions)], 0).long()
        at_the_end = bool((windows.first - windows.start == length - width).all())
        with torch.set_grad_enabled(with_grad):
            logits = self._model(inputs, positions=width if at_the_end else columns, **how)
            losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape)
            losses = torch.where(is_kept, losses, 0.0)
        self._require_unchanged_weights()
        return ScoredWindows(np.stack([windows.first, windows.end], 1), self, columns, targets, losses, is_kept)

    # -- what is known

    def reveal(self, start: int, stop: int) -> ScoredText:
        """The tokens start..stop, all of which were targets of scored positions (or begin a document, which is public)."""
        if not 0 <= start < stop <= self.num_positions:
            raise OrderError(f"reveal: expected 0 <= start < stop <= {self.num_positions}, got {start} and {stop}")
        if not self._claimed[start:stop].all():
            position = start + int(np.flatnonzero(~self._claimed[start:stop])[0])
            other_ranks = " (or by another rank, since the last `meet`)" if dist.world_size() > 1 else ""
            raise OrderError(f"reveal: position {position} has not been scored{other_ranks}")
        begins = np.searchsorted(self.document_starts, start)
        is_document = begins < len(self.document_starts) and self.document_starts[begins] == start
        if start and not self._claimed[start - 1] and not is_document:
            raise OrderError(f"reveal: token {start} is the target of position {start - 1}, which has not been scored")
        return ScoredText(np.array([[start, stop]]), self, self._tokens[start : stop + 1].long())

    def meet(self) -> None:
        """All ranks, at the same point of their order: what each of them has scored is now known to all."""
        if dist.world_size() == 1:
            return
        mine = np.concatenate(self._new_spans) if self._new_spans else np.empty((0, 2), np.int64)
        for rank, spans in enumerate(dist.gather_objects(mine)):
            if rank == dist.rank():
                continue
            for first, end in spans:
                if self._claimed[first:end].any():
                    raise OrderError(f"position {first} or one soon after it was scored by two ranks")
                self._claimed[first:end] = True
        self._new_spans = []

    # -- learning

    @contextlib.contextmanager
    def adapt(self, *scored: Scored):
        """Inside, the weights may change. Afterwards they are a new version, learned from `scored`."""
        for one in scored:
            if not isinstance(one, Scored) or one._referee is not self:
                raise OrderError("adapt: expected what this referee's score or reveal returned")
        if not scored or self._is_adapting:
            raise OrderError("adapt: nothing to learn from" if not scored else "adapt inside adapt")
        self._require_unchanged_weights()
        self._is_adapting = True
        try:
            yield
        finally:
            self._is_adapting = False
        self.version += 1
        self.ledger.weights_changed(np.concatenate([one.spans for one in scored]), self.version)
        self._weights = self._weight_stamp()

    def _weight_stamp(self):
        # torch counts in-place changes of a tensor. NOTE: replays of a CUDA graph are not counted.
        return [(id(p), p._version) for p in self._model.parameters()] if isinstance(self._model, torch.nn.Module) else []

    def _require_unchanged_weights(self) -> None:
        if self._weight_stamp() != self._weights:
            raise OrderError("the model's weights changed outside adapt")

    # -- the end

    def running(self) -> Score:
        """Of what this rank has scored so far; waits for the device."""
        self.ledger.drain()
        return self.ledger.running

    def result(self) -> Result:
        """Of all ranks together; refused while a position is missing."""
        whole = self.ledger.merged(self.device)
        missing = np.flatnonzero(~whole.is_scored)
        if len(missing):
            raise OrderError(f"{len(missing):,} positions are not scored, the first is {missing[0]}; there is no result")
        again = [(positions, losses.cpu().numpy()) for positions, losses in self._again]
        nats = sum(float(losses.sum(dtype=np.float64)) for _, losses in again)
        counts = [(len(positions), int(self._bytes[positions].sum(dtype=np.int64))) for positions, _ in again]
        sums = np.array(dist.gather_objects((nats, sum(c[0] for c in counts), sum(c[1] for c in counts)))).sum(0)
        return Result(whole.score(), Score(float(sums[0]), int(sums[1]), int(sums[2])), self.version + 1, whole.digest.hex())

    # -- to stop and go on

    def state(self) -> tuple[dict[str, Tensor], dict]:
        tensors, state = self.ledger.state()
        again = np.concatenate([np.empty(0, np.int64), *(positions for positions, _ in self._again)])
        tensors |= {"claimed": torch.from_numpy(self._claimed), "again.positions": torch.from_numpy(again)}
        tensors["again.losses"] = torch.cat([torch.empty(0), *(losses.cpu() for _, losses in self._again)])
        return tensors, state | {"version": self.version}

    def load_state(self, tensors: dict[str, Tensor], state: dict) -> None:
        """After the evaluator's own, which brings the weights back."""
        self.ledger.load_state(tensors, state)
        self._claimed = tensors["claimed"].numpy().copy()
        self._again = [(tensors["again.positions"].numpy(), tensors["again.losses"])] if len(tensors["again.losses"]) else []
        self.version = state["version"]
        self._weights = self._weight_stamp()


def _joined(spans: np.ndarray) -> np.ndarray:
    """Spans that follow each other, as one."""
    spans = spans[spans[:, 0] < spans[:, 1]]
    if len(spans) == 0:
        return spans
    breaks = np.flatnonzero(spans[1:, 0] != spans[:-1, 1])
    return np.stack([spans[np.r_[0, breaks + 1], 0], spans[np.r_[breaks, len(spans) - 1], 1]], 1)
