"""A run's folder, read back: what the run was, its curves and its score."""

from dataclasses import dataclass
from pathlib import Path

from pgolf_fast import runlog
from pgolf_fast.errors import UserError


@dataclass(frozen=True)
class RunRecord:
    folder: Path
    recipe: dict  # recipe.json: name, note, settings
    machine: dict  # machine.json
    steps: list[dict]  # step, train_loss, lr_factor, train_s; each step once, in order
    validations: list[dict]  # step, val_loss, val_bpb, train_s
    end: dict | None  # the last event of a finished run
    sizes: dict[str, int]  # bytes by part, from the ledger of `pgolf pack`; empty without one
    evaluations: dict[str, dict]  # name of each result of `pgolf eval`, such as "artifact-sliding": what it says

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def seed(self):
        return self.setting("train.seed")

    def setting(self, key: str):
        return self.recipe["settings"].get(key, {}).get("value")


def read_record(folder: Path) -> RunRecord:
    if not (folder / "events.jsonl").is_file():
        raise UserError(f"{folder}: no events.jsonl there; give the folder of a run of `pgolf train`")
    steps, validations, end = {}, {}, None
    for event in runlog.events(folder):
        kind = event.get("event")
        if kind == "resume":  # what the killed run did after its last checkpoint is done again; one that had ended goes on
            end = None
            steps = {s: e for s, e in steps.items() if s <= event["step"]}
            validations = {s: e for s, e in validations.items() if s <= event["step"]}
        elif kind == "step":
            steps[event["step"]] = event
        elif kind == "validation":
            seconds = steps[event["step"]]["train_s"] if event["step"] in steps else 0.0
            validations[event["step"]] = event | {"train_s": seconds}
        elif kind == "end":
            end = event
    if not steps:
        raise UserError(f"{folder}: its events.jsonl holds no training step; the run stopped before its first")
    recipe, machine = runlog.read_recipe(folder), runlog.read_document(folder, "machine.json")
    return RunRecord(folder, recipe, machine, list(steps.values()), list(validations.values()), end, _sizes(folder), _evaluations(folder))


def _sizes(folder: Path) -> dict[str, int]:
    name = "ledger.json"  # written by `pgolf pack RUN`
    if not (folder / name).exists():
        return {}
    ledger = runlog.read_document(folder, name)
    try:
        return ledger["weights"] | {"metadata": ledger["metadata"], f"code, {ledger['count']}": ledger["code"][ledger["count"]]}
    except (KeyError, TypeError):
        raise UserError(f"{folder / name}: is no ledger; `pgolf pack {folder}` writes it anew") from None


def _evaluations(folder: Path) -> dict[str, dict]:
    paths = sorted(folder.glob("*.eval/*.json"), key=lambda path: path.stat().st_mtime)  # in the order in which they were made
    return {path.stem: runlog.read_document(path.parent, path.name) for path in paths}
