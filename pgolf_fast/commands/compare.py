"""`pgolf compare`: is one set of seeds better than another?"""

import dataclasses
import math
from typing import Annotated, Literal

import tyro
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pgolf_fast.errors import UserError
from pgolf_fast.scores import TRAINED, SeedScore, changed_settings, flags, read_scores
from pgolf_fast.significance import CHAIN_P, MAX_SEEDS, RECORD_NATS, RECORD_P, Sample, Welch, more_seeds

BETWEEN = "vs"  # how __main__ passes on the "--" of the command line
UNITS = {"bpb": "bits per byte", "nats": "nats per token"}


@dataclasses.dataclass(frozen=True)
class Compare:
    """OLD... -- NEW...: Welch's t-test over seeds, both readings of the 0.005-nat rule, and how many more seeds would decide."""

    scores: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="OLD... -- NEW...")] = ()
    """Run folders, result files (a submission.json counts as all its seeds) or plain numbers; lower is better."""
    score: str = TRAINED
    """What counts of a run's folder: `trained`, its final weights, or one of its evaluations, such as artifact-sliding."""
    metric: Literal[tuple(UNITS)] = "bpb"
    """What plain numbers are: bits per byte, or nats per token."""
    bytes_per_token: float = 0.0
    """Of the validation text, where the scores do not tell: about 2.44 for sp1024, 3.72 for sp8192, 3.16 for CaseOps-8192."""
    json: bool = False
    """Print the result as JSON."""


@dataclasses.dataclass(frozen=True)
class Claim:
    name: str
    margin: float | None  # in the unit of the test; None where it cannot be told
    needs_p: float


def _sides(scores: tuple[str, ...], metric: str, which: str) -> dict[str, list[SeedScore]]:
    if scores.count(BETWEEN) != 1:
        raise UserError("scores: give OLD... -- NEW..., with one -- between the two sides")
    middle = scores.index(BETWEEN)
    sides = {"old": scores[:middle], "new": scores[middle + 1 :]}
    read = {name: [score for text in side for score in read_scores(text, metric, which)] for name, side in sides.items()}
    for name, side in read.items():
        if len(side) < 2:
            raise UserError(f"scores: {len(side)} on the {name} side; a spread needs at least 2 seeds on each")
    return read


def _unit(scores: list[SeedScore]) -> str:
    for unit in UNITS:
        if all(getattr(score, unit) for score in scores):
            return unit
    raise UserError("scores: some are in bits per byte only and some in nats per token only; give them in one unit")


def _bytes_per_token(scores: list[SeedScore], told: float) -> float | None:
    """One number if all scores that know it agree to a thousandth; None if they differ, as tokenizers do, or if nobody knows."""
    known = [told] if told else [s.bytes_per_token for s in scores if s.bytes_per_token]
    return known[0] if known and max(known) < 1.001 * min(known) else None


def claims(unit: str, bytes_per_token: float | None) -> list[Claim]:
    per_byte = 1 / math.log(2) if unit == "bpb" else bytes_per_token
    per_token = (1 / (math.log(2) * bytes_per_token) if bytes_per_token else None) if unit == "bpb" else 1.0
    return [
        Claim("better at all (chain rule)", 0.0, CHAIN_P),
        Claim("better at all", 0.0, RECORD_P),
        Claim("by 0.005 nats per token", RECORD_NATS * per_token if per_token else None, RECORD_P),
        Claim("by 0.005 nats per byte", RECORD_NATS * per_byte if per_byte else None, RECORD_P),
    ]


def judge(claim: Claim, old: Sample, new: Sample, test: Welch) -> dict:
    row = {"claim": claim.name, "margin": claim.margin, "needs_p": claim.needs_p}
    if claim.margin is None:
        return row | {"p": None, "holds": None, "more_seeds": None}
    p = test.p(claim.margin)
    holds = p < claim.needs_p
    return row | {"p": p, "holds": holds, "more_seeds": 0 if holds else more_seeds(old, new, claim.margin, claim.needs_p)}


def _advice(row: dict, gain: float) -> str:
    if row["holds"] is None:
        return "unknown: say --bytes-per-token"
    if row["holds"]:
        return "[green]yes"
    if gain <= row["margin"]:
        return "[red]no[/red], and at this gain no number of seeds would"
    if row["more_seeds"] is None:
        return f"not yet; more than {MAX_SEEDS} further seeds a side"
    return f"not yet; about {row['more_seeds']} more a side"


def show(result: dict, console: Console) -> None:
    unit = UNITS[result["unit"]]
    table = Table(title=unit, title_justify="left", box=box.SIMPLE)
    for heading in ("side", "seeds", "mean", "sample sd", "scores"):
        table.add_column(heading, justify="left" if heading in ("side", "scores") else "right")
    for name in ("old", "new"):
        side = result[name]
        table.add_row(name, str(side["n"]), f"{side['mean']:.5f}", f"{side['sd']:.5f}", ", ".join(f"{s:.5f}" for s in side["scores"]))
    console.print(table)
    low, high = result["interval_95"]
    console.print(f"gain {result['gain']:+.5f}, 95 % of [{low:+.5f}, {high:+.5f}]   Welch's t {result['t']:.2f}, df {result['df']:.2f}")
    verdicts = Table(box=box.SIMPLE)
    for heading in ("is new", "margin", "one-sided p", "needed", "verdict"):
        verdicts.add_column(
            heading, justify="right" if heading in ("margin", "one-sided p", "needed") else "left", no_wrap=heading != "verdict"
        )
    for row in result["claims"]:
        margin, p = ("-", "-") if row["margin"] is None else (f"{row['margin']:.5f}", f"{row['p']:.2g}")
        verdicts.add_row(row["claim"], margin, p, f"< {row['needs_p']}", _advice(row, result["gain"]))
    console.print(verdicts)
    for key, (old, new) in result["changed_settings"].items():
        console.print(f"changed: {key}  {escape(old)} -> {escape(new)}")
    for sentence in result["flags"]:
        console.print(f"[yellow]! {escape(sentence)}")


def run(config: Compare, console: Console) -> tuple[dict, int]:
    if config.bytes_per_token < 0:
        raise UserError(f"bytes_per_token: expected a positive number, got {config.bytes_per_token}")
    sides = _sides(config.scores, config.metric, config.score)
    everything = sides["old"] + sides["new"]
    unit = _unit(everything)
    values = {name: [getattr(score, unit) for score in side] for name, side in sides.items()}
    old, new = (Sample.of(values[name]) for name in ("old", "new"))
    if old.sd == new.sd == 0:
        raise UserError("scores: no spread on either side; these are the same run several times, not seeds")
    test = Welch.of(old, new)
    result = {
        "unit": unit,
        "old": dataclasses.asdict(old) | {"scores": values["old"], "sources": [s.source for s in sides["old"]]},
        "new": dataclasses.asdict(new) | {"scores": values["new"], "sources": [s.source for s in sides["new"]]},
        "gain": test.gain,
        "interval_95": test.interval(),
        "t": test.t,
        "df": test.df,
        "claims": [judge(c, old, new, test) for c in claims(unit, _bytes_per_token(everything, config.bytes_per_token))],
        "changed_settings": changed_settings(sides["old"], sides["new"]),
        "flags": flags(sides),
    }
    show(result, console)
    return result, 0
