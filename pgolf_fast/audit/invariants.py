"""The rules that can be run: each function gives its evidence, and nothing is believed that was not tried.

The stream is changed where a legal evaluator cannot notice, and the scores are compared bit by bit: the shapes stay as they are, so that
nothing but the tokens can make a difference.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from pgolf_fast.audit.stream import Stream, make_stream, repeated_positions
from pgolf_fast.audit.subjects import Answer, Run, Subject
from pgolf_fast.audit.watch import NetworkUse, in_stream
from pgolf_fast.errors import UserError
from pgolf_fast.model import BOS

PASS, FAIL, UNTESTED, DECLARED = "pass", "FAIL", "not tested", "declared"
SUM_TOLERANCE = 1e-4  # of probabilities that must add up to one
SAME_LOSS = 1e-4  # nats between a reported loss and the model's own, if they are to be the same
CUTS = (0.23, 0.48, 0.71, 0.9)  # shares of the stream after which everything is replaced
SWAPS = 8  # targets replaced, one run each
MAX_ENUMERATION_S = 10.0  # for the sums that need a run per word of the vocabulary


@dataclass(frozen=True)
class Finding:
    invariant: str
    source: str  # see SOURCES
    verdict: str
    evidence: str


CHALLENGE = "README"
SOURCES = {  # of the rules: the challenge's README, or the threads that settled them; C1 to C4 are the conditions of #1017
    "size": CHALLENGE,
    "declared tensors": CHALLENGE,
    "no validation text": CHALLENGE,
    "single pass": "C4, #677",
    "future-flip": "C1, #1240",
    "target-swap": "C2, #1420",
    "normalisation": "C2, #886",
    "score-before-update": "C3, #402",
    "document isolation": "#1851",
    "byte denominator": "#1719",
    "no network": CHALLENGE,
}


def finding(invariant: str, verdict: str, evidence: str) -> Finding:
    return Finding(invariant, SOURCES.get(invariant, ""), verdict, evidence)


@dataclass
class Case:
    """What the tests share: the subject, the stream, and the run that the others are compared with."""

    subject: Subject
    stream: Stream
    run: Run

    @property
    def answer(self) -> Answer:
        return self.run.answer

    def time_key(self) -> np.ndarray:
        """int64 [n]: the place of each position in the order in which the evaluator scores."""
        order = self.answer.order if self.answer.order is not None else np.zeros(len(self.stream), np.int64)
        place = np.empty(len(self.stream), np.int64)
        place[np.lexsort((np.arange(len(self.stream)), order))] = np.arange(len(self.stream))
        return place


def _first_difference(a: torch.Tensor, b: torch.Tensor, positions: np.ndarray) -> tuple[int, float] | None:
    """(first position, largest difference) of losses or rows that should be the same bits."""
    x, y = a[positions].reshape(len(positions), -1), b[positions].reshape(len(positions), -1)
    differs = ((x != y) & ~(x.isnan() & y.isnan())).any(1).numpy()
    if not differs.any():
        return None
    return int(positions[differs][0]), float((x - y).abs().nan_to_num(torch.inf).max())


# --- one function per invariant --------------------------------------------------------------------------------------


def repeatable(case: Case) -> Finding:
    found = _first_difference(case.answer.losses, case.subject.run(case.stream).answer.losses, np.arange(len(case.stream)))
    said = "two runs of one stream agree bit by bit"
    if found:
        said = f"two runs of one stream differ from position {found[0]} on, by up to {found[1]:.3g} nats: seed it, the rest compares runs"
    return finding("repeatable", FAIL if found else PASS, said)


def single_pass(case: Case) -> Finding:
    losses, n = case.answer.losses, len(case.stream)
    finite = int(losses.isfinite().sum())
    order = case.answer.order
    if len(losses) != n:
        verdict, said = FAIL, f"{len(losses)} losses for {n} positions"
    elif finite < n:
        verdict, said = FAIL, f"{n - finite} of {n} losses are not finite, the first at position {int((~losses.isfinite()).nonzero()[0])}"
    elif float(losses.min()) < 0:
        verdict, said = FAIL, f"the loss at position {int(losses.argmin())} is {float(losses.min()):.4g}: a probability above one"
    else:
        verdict, said = (
            PASS,
            f"{n} finite losses for {n} positions" + ("" if order is None else f", in {len(set(order.tolist()))} scored batches"),
        )
    return finding("single pass", verdict, said)


def future_flip(case: Case) -> Finding:
    """Everything that is scored later is replaced: what was scored earlier must not move."""
    key = case.time_key()
    checked = 0
    for seed, cut in enumerate(int(share * len(case.stream)) for share in CUTS):
        later, earlier = np.flatnonzero(key >= cut), np.flatnonzero(key < cut)
        other = case.subject.run(case.stream.swapped(later + 1, seed)).answer
        found = _first_difference(case.answer.losses, other.losses, earlier)
        if found:
            said = f"with the {len(later)} tokens scored last replaced, the loss at position {found[0]}, scored before them, moves"
            return finding("future-flip", FAIL, f"{said}; differences up to {found[1]:.3g} nats")
        checked += len(earlier)
    return finding("future-flip", PASS, f"{checked} losses unmoved, bit by bit, under {len(CUTS)} replacements of what is later")


def target_swap(case: Case) -> Finding:
    """One token replaced: the distribution that it is scored with must not move."""
    if case.answer.log_probs is None:
        return finding("target-swap", UNTESTED, "no distributions are returned; normalisation sums over every target instead")
    positions = _probes(case.stream, SWAPS)
    for seed, p in enumerate(positions):
        other = case.subject.run(case.stream.swapped(np.array([p + 1]), seed)).answer
        found = _first_difference(case.answer.log_probs, other.log_probs, np.array([p]))
        if found:
            said = f"the distribution at position {p} depends on the token it predicts: log-probabilities move by up to {found[1]:.3g}"
            return finding("target-swap", FAIL, said)
    return finding("target-swap", PASS, f"{len(positions)} distributions unmoved when their own target is another token")


def _probes(stream: Stream, count: int) -> list[int]:
    """Positions in repeated phrases, where caches and n-grams answer, then others; no document's start is a target."""
    kinds = repeated_positions(stream), np.flatnonzero(stream.tokens[1:].numpy() != BOS)
    shares = np.linspace(0.3, 0.9, count // 2)
    return list(dict.fromkeys(int(kind[int(share * len(kind))]) for kind in kinds for share in shares))


def normalisation(case: Case) -> Finding:
    """The probabilities of all targets add up to one: those of the distributions returned, and those that the evaluator really gives,
    found by running it once for every word of the vocabulary."""
    log_probs, said = case.answer.log_probs, []
    if log_probs is not None:
        sums = log_probs.double().logsumexp(1).exp()
        worst = int((sums - 1).abs().nan_to_num(torch.inf).argmax())
        if not abs(float(sums[worst]) - 1) < SUM_TOLERANCE:
            return finding("normalisation", FAIL, f"the distribution at position {worst} adds up to {float(sums[worst]):.6g}")
        taken = -log_probs[torch.arange(len(case.stream)), case.stream.tokens[1:]]
        found = (taken - case.answer.losses).abs().nan_to_num(torch.inf)
        if not float(found.max()) < SAME_LOSS:
            p = int(found.argmax())
            said = f"the loss at position {p} is {float(case.answer.losses[p]):.4f}, its distribution gives {float(taken[p]):.4f}"
            return finding("normalisation", FAIL, said)
        said.append(f"{len(sums)} distributions add up to 1, within {float((sums - 1).abs().max()):.1g}")
    begin, summed, worst = time.perf_counter(), 0, 0.0
    for p in _probes(case.stream, 4):
        if summed and (time.perf_counter() - begin) * (summed + 1) / summed > MAX_ENUMERATION_S:
            break
        total = _enumerated_sum(case, p)
        if not abs(total - 1) < SUM_TOLERANCE:
            said = f"what the {len(case.stream.pieces)} possible tokens after position {p} are given, one run each, adds up to {total:.6g}"
            return finding("normalisation", FAIL, said)
        summed, worst = summed + 1, max(worst, abs(total - 1))
    said.append(f"at {summed} position{'s' * (summed > 1)}, one run per possible token: within {worst:.1g}")
    return finding("normalisation", PASS, "; ".join(said))


def _enumerated_sum(case: Case, p: int) -> float:
    """Of the stream cut behind position p's target."""
    tokens, total = case.stream.tokens[: p + 2].clone(), 0.0
    for token in range(len(case.stream.pieces)):
        tokens[p + 1] = token
        total += float(case.subject.run(case.stream.with_tokens(tokens.clone())).answer.losses[p].double().neg().exp())
    return total


def score_before_update(case: Case) -> Finding:
    """A reported loss is the model's own under weights that had not learned from it."""
    seen = in_stream(case.run.forwards, case.stream)
    n = len(case.stream)
    reported = case.answer.losses.numpy()
    first_update = np.full(n, np.iinfo(np.int64).max)  # version of the weights that first had learned from a position
    waiting: list[np.ndarray] = []
    before, after, wrong = np.zeros(n, bool), np.zeros(n, bool), {}
    version = 0
    for forward in seen:
        if forward.version > version:
            for positions in waiting:
                first_update[positions] = np.minimum(first_update[positions], forward.version)
            waiting, version = [], forward.version
        if forward.losses is not None and len(forward.positions):
            match = np.abs(forward.losses - reported[forward.positions]) <= SAME_LOSS
            innocent = forward.version < first_update[forward.positions]
            before[forward.positions[match & innocent]] = True
            for p in forward.positions[match & ~innocent]:
                after[p] = True
                wrong.setdefault(int(p), forward.version)
        if forward.with_grad:
            waiting.append(forward.positions)
    guilty = np.flatnonzero(after & ~before)
    updates = version
    if len(guilty):
        p = int(guilty[0])
        said = f"{len(guilty)} of {n} losses are those of weights that had learned from them: at position {p}, of version {wrong[p]}"
        return finding("score-before-update", FAIL, f"{said}, and the weights know it since version {int(first_update[p])}")
    told = int(before.sum())
    if told < n // 2:
        return finding("score-before-update", UNTESTED, f"{n - told} of {n} losses are not the model's own; future-flip judges them")
    said = f"{told} of {n} losses traced to weights that had not seen them; {updates} weight changes watched"
    return finding("score-before-update", PASS, said)


def document_isolation(case: Case) -> Finding:
    """Earlier documents replaced, and learning undone: the last documents' scores must not move."""
    starts = case.stream.document_starts
    cut = int(starts[len(starts) // 2])
    base = case.subject.run(case.stream, forget=True).answer.losses
    other = case.subject.run(case.stream.swapped(np.arange(cut), 1), forget=True).answer.losses
    found = _first_difference(base, other, np.arange(cut, len(case.stream)))
    if not case.subject.isolates_documents:
        moved = "and they do" if found else "though none does here"
        return finding("document isolation", DECLARED, f"windows may reach across documents, as this evaluator says, {moved}")
    if found:
        which = int(np.searchsorted(starts, found[0], "right"))
        said = f"earlier documents replaced, learning undone: position {found[0]} of document {which} moves; up to {found[1]:.3g} nats"
        return finding("document isolation", FAIL, said)
    return finding(
        "document isolation", PASS, f"{len(case.stream) - cut} losses unmoved when the {len(starts) // 2} documents before are replaced"
    )


def byte_denominator(case: Case) -> Finding:
    said, truth = case.answer.num_bytes, case.stream.text_bytes
    if said is None:
        return finding("byte denominator", UNTESTED, "the evaluator does not say what it divides by")
    if said != truth:
        share = f"{100 * (said / truth - 1):+.1f} %"
        return finding("byte denominator", FAIL, f"divides by {said:,} bytes, the text has {truth:,} ({share})")
    return finding("byte denominator", PASS, f"{said:,} bytes, as many as the {len(case.stream.texts)} texts have in UTF-8")


def no_network(case: Case) -> Finding:
    attempts = case.run.network
    if attempts:
        return finding("no network", FAIL, f"tried {attempts[0]}" + (f" and {len(attempts) - 1} more" if len(attempts) > 1 else ""))
    return finding("no network", PASS, "no address looked up, no connection opened from Python")


INVARIANTS: tuple[Callable[[Case], Finding], ...] = (
    single_pass,
    repeatable,
    future_flip,
    target_swap,
    normalisation,
    score_before_update,
    document_isolation,
    byte_denominator,
    no_network,
)


def audit(subject: Subject, invariants=INVARIANTS) -> Iterator[Finding]:
    """Findings as they come. An evaluator that raises on the audit's stream is found wrong, with what it raised."""
    stream = make_stream(subject.vocab_size)
    try:
        case = Case(subject, stream, subject.run(stream))
    except UserError:
        raise
    except NetworkUse as error:
        yield finding("no network", FAIL, str(error))
        return
    except Exception as error:  # whatever the audited code raises
        yield finding("runs", FAIL, f"{type(error).__name__}: {error}")
        return
    yield finding("runs", PASS, f"{len(stream)} positions in {len(stream.document_starts)} documents, {len(case.run.forwards)} forwards")
    for invariant in invariants:
        try:
            found = invariant(case)
        except UserError:
            raise
        except Exception as error:
            found = finding(invariant.__name__.replace("_", " "), FAIL, f"raised {type(error).__name__}: {error}")
        yield found
        if invariant is single_pass and found.verdict == FAIL:
            return  # the others compare losses by position
