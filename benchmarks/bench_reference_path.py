"""Does the fast path train as the reference path does: python -m benchmarks.bench_reference_path --data FOLDER [--save]

Each seed's run twice, by the trainer itself: as it is, and on the composite path, which is torch alone and no kernel of ours. The same
weights, the same batches of 98,304 tokens, the same schedule to its end. The first seed runs on the fast path once more: what repeating
a run changes. How much a difference means, the seeds say.
"""

import contextlib
import dataclasses
import json
import math
import sys
import tempfile
import time
from pathlib import Path

import torch
import tyro

from benchmarks.run import RESULTS, environment
from pgolf_fast import recipe
from pgolf_fast.ops import _library
from pgolf_fast.train import Trainer

SETTLED = 30  # steps after which differences are looked at: before, the losses fall by steps of a whole nat


@dataclasses.dataclass(frozen=True)
class ReferencePath:
    data: Path
    recipe: str = "legal-ttt-691"
    seeds: tuple[int, ...] = (42, 1337, 3)
    steps: int = 300
    settings: tuple[str, ...] = ("schedule.warmdown_iters=105", "optim.ema_decay=0.95")
    """Of the recipe, in other words: model.num_layers=4 and the like."""
    save: bool = False
    """Keep the losses in benchmarks/results."""


def train(config: ReferencePath, seed: int, path) -> dict:
    """Every step's training loss and the validation at the end, inside the context `path`."""
    settings = (
        *("train.batch_tokens=98304", "train.micro_batches=1", "train.val_every=0", "train.warmup_steps=2"),
        *(f"train.data={config.data}", f"train.seed={seed}", f"schedule.iterations={config.steps}", "schedule.max_wallclock_seconds=0"),
    )
    resolved = recipe.resolve(config.recipe, (*settings, *config.settings), environ={})
    losses, begun = [], time.perf_counter()
    with path, tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(resolved, Path(folder), "cuda" if torch.cuda.is_available() else "cpu", echo=lambda line: None)
        with contextlib.closing(trainer.steps), contextlib.closing(trainer.loader), contextlib.closing(trainer.log):
            trainer.warm_up()
            trainer.train(lambda step, loss, ms: losses.append(loss))
            validation = trainer.validate().nats_per_token
    return {"train_loss": [round(x, 4) for x in losses], "validation_loss": round(validation, 4), "seconds": time.perf_counter() - begun}


def difference(losses, others) -> str:
    apart = [b - a for a, b in zip(losses, others)][min(SETTLED, len(losses) // 2) :]
    rms = math.sqrt(sum(d * d for d in apart) / len(apart))
    return f"largest {max(map(abs, apart)):.4f}, rms {rms:.4f}, mean {sum(apart) / len(apart):+.4f}"


def run(config: ReferencePath):
    runs = []
    kinds = [(seed, kind) for seed in config.seeds for kind in ("reference", "fast")]
    for seed, kind in [*kinds, (config.seeds[0], "fast again")]:
        path = _library.composite() if kind == "reference" else contextlib.nullcontext()
        runs.append({"seed": seed, "path": kind} | train(config, seed, path))
        print(f"seed {seed}, {kind}: validation {runs[-1]['validation_loss']:.4f}, {runs[-1]['seconds']:.1f} s", flush=True)
        if config.save:
            keep(config, runs)
    losses = {(run["seed"], run["path"]): run["train_loss"] for run in runs}
    for seed in config.seeds:
        print(f"seed {seed}, fast less reference: {difference(losses[seed, 'reference'], losses[seed, 'fast'])}")
    print(f"seed {config.seeds[0]}, fast path twice: {difference(losses[config.seeds[0], 'fast'], losses[config.seeds[0], 'fast again'])}")
    for kind in ("reference", "fast"):
        for a, b in zip(config.seeds, config.seeds[1:]):
            print(f"seed {b} less {a}, {kind} path: {difference(losses[a, kind], losses[b, kind])}")


def keep(config, runs):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    told = environment(device)
    command = "python -m benchmarks.bench_reference_path " + " ".join(sys.argv[1:]).replace(str(config.data), "DATA")
    slug = told["device"].lower().replace("nvidia ", "").replace(" ", "-")
    head = json.dumps({"environment": told | {"command": command}, "recipe": config.recipe}, indent=1)
    lines = ",\n".join("  " + json.dumps(run) for run in runs)  # one run a line
    text = head.removesuffix("\n}") + f',\n "runs": [\n{lines}\n ]\n}}\n'
    (RESULTS / f"curve_{config.recipe}_reference_path.{slug}.json").write_text(text)


if __name__ == "__main__":
    run(tyro.cli(ReferencePath, description=__doc__))
