"""Scores to compare, from wherever they are: run folders, result files, plain numbers."""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path

from pgolf_fast.errors import UserError
from pgolf_fast.run_record import read_record

# Of machine.json: what changes loss or size by itself (torch 2.9 to 2.11 cost one team 0.0042 bits per byte).
ENVIRONMENT = ("device", "world_size", "torch", "cuda", "library", "python")
TRAINED = "trained"  # the validation of the weights that training ended with
NAMES_OF_RUNS = ("train.seed", "train.run_id")  # settings in which two runs of one experiment differ


@dataclass(frozen=True)
class SeedScore:
    source: str
    bpb: float | None = None  # bits per byte
    nats: float | None = None  # per token
    seed: object = None
    machine: dict = field(default_factory=dict)
    settings: dict = field(default_factory=dict)

    @property
    def bytes_per_token(self) -> float | None:
        return self.nats / (math.log(2) * self.bpb) if self.bpb and self.nats else None


def read_scores(text: str, metric: str, which: str) -> list[SeedScore]:
    """`metric` says what a plain number is, "bpb" or "nats"; `which` what counts of a run: TRAINED, or one of its evaluations by name."""
    try:
        value = float(text)
    except ValueError:
        path = Path(text)
        if path.is_dir():
            return [_of_run(path, which)]
        if path.is_file():
            return _of_file(path)
        raise UserError(f"scores: {text!r} is no number, no run folder and no result file") from None
    if not (math.isfinite(value) and value > 0):
        raise UserError(f"scores: expected a positive number, got {text}")
    return [SeedScore(text, **{metric: value})]


def _of_run(folder: Path, which: str) -> SeedScore:
    run = read_record(folder)
    settings = {key: row["value"] for key, row in run.recipe["settings"].items()}
    if which == TRAINED:
        if run.end is None:
            raise UserError(f"{folder}: the run has not finished, so it has no score; go on with `pgolf train --resume`")
        return SeedScore(str(folder), run.end["val_bpb"], run.end["val_loss"], run.seed, run.machine, settings)
    if which not in run.evaluations:
        there = ", ".join(run.evaluations) or "none; `pgolf eval RUN` makes some"
        raise UserError(f"{folder}: no evaluation {which!r}; there is {there}")
    row = run.evaluations[which]
    return SeedScore(f"{folder}: {which}", row["bits_per_byte"], row["nats_per_token"], run.seed, run.machine, settings)


def _of_file(path: Path) -> list[SeedScore]:
    """A result of `pgolf train --json` or `pgolf eval`, or a submission.json, whose `seed_results` are as many scores."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: is not a JSON file ({error})") from None
    seeds = content.get("seed_results") if isinstance(content, dict) else None
    rows = seeds.items() if isinstance(seeds, dict) else [(None, content)]
    found = [_of_row(path, seed, row) for seed, row in rows]
    if not all(found):
        raise UserError(f"{path}: holds no score: neither val_bpb or val_loss, nor bits_per_byte or nats_per_token")
    return found


def _of_row(path, seed, row) -> SeedScore | None:
    def number(*keys):
        values = [row.get(key) for key in keys] if isinstance(row, dict) else []
        return next((float(v) for v in values if isinstance(v, int | float) and not isinstance(v, bool) and v > 0), None)

    bpb, nats = number("val_bpb", "bits_per_byte"), number("val_loss", "nats_per_token")
    return SeedScore(f"{path}" + (f" seed {seed}" if seed else ""), bpb, nats, seed) if bpb or nats else None


def flags(sides: dict[str, list[SeedScore]]) -> list[str]:
    """Why the comparison may not be one of the same thing: one sentence each."""
    found = []
    for name, scores in sides.items():
        runs = [s.settings for s in scores if s.settings]  # a plain number says nothing of its settings
        settings = {key: {str(run.get(key)) for run in runs} for key in dict.fromkeys(k for run in runs for k in run)}
        differing = [key for key, values in settings.items() if len(values) > 1 and key not in NAMES_OF_RUNS]
        commits = {s.machine["commit"] for s in scores if s.machine}
        seeds = [str(s.seed) for s in scores if s.seed is not None]
        if differing:
            found.append(f"{name}: its runs differ in {', '.join(differing)}, so their spread is not one of seeds")
        if len(commits) > 1:
            found.append(f"{name}: its runs come from different code: {', '.join(sorted(commits))}")
        if any(commit.endswith("-dirty") for commit in commits):
            found.append(f"{name}: run from a checkout with changes that no commit holds")
        if len(set(seeds)) < len(seeds):
            found.append(f"{name}: a seed occurs twice ({', '.join(seeds)}); the same run counted twice makes the spread too small")
    for key in ENVIRONMENT:
        values = {name: sorted({str(s.machine[key]) for s in scores if key in s.machine}) for name, scores in sides.items()}
        if len({v for side in values.values() for v in side}) > 1:
            told = "; ".join(f"{name} {' and '.join(v) or 'not said'}" for name, v in values.items())
            found.append(f"environment: {key} differs: {told}")
    return found


def changed_settings(old: list[SeedScore], new: list[SeedScore]) -> dict[str, tuple[str, str]]:
    """What the comparison is of: settings in which every old run differs from every new one."""
    if not (all(s.settings for s in old) and all(s.settings for s in new)):
        return {}
    keys = old[0].settings | new[0].settings
    values = {key: ({str(s.settings.get(key)) for s in old}, {str(s.settings.get(key)) for s in new}) for key in keys}
    apart = {key: (a, b) for key, (a, b) in values.items() if not a & b and key not in NAMES_OF_RUNS}
    return {key: (", ".join(sorted(a)), ", ".join(sorted(b))) for key, (a, b) in apart.items()}
