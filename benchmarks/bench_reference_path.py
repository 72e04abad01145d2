"""Does the fast path train as plain torch does: python -m benchmarks.bench_reference_path --data FOLDER [--save]

Each seed's run twice, through the whole schedule of the recipe: by the trainer's own step, and by one of the ops' definitions and torch's
attention, under torch.compile, with no kernel of ours in it (the two that `pgolf bench step --peer RECIPE` times). The same weights, the
same batches of 98,304 tokens. How much a difference means, the seeds say. With --no-peer once, by the first.
"""

import dataclasses
import json
import math
import sys
import time
from pathlib import Path

import torch
import tyro

from benchmarks.bench_train_step import contestants, first_steps, synthetic_batches
from benchmarks.run import environment, result_path
from benchmarks.shapes import TOKENS
from pgolf_fast import recipe, schedule
from pgolf_fast.data import ContinuousStream, Loader, ShardStream

SETTLED = 30  # steps before losses are compared: in the first they jump by whole nats


@dataclasses.dataclass(frozen=True)
class ReferencePath:
    data: Path
    recipe: str = "legal-ttt-691"
    seeds: tuple[int, ...] = (42, 1337, 3)
    steps: int = 300
    settings: tuple[str, ...] = ("schedule.warmdown_iters=105",)
    """Of the recipe, in other words: model.num_layers=4 and the like."""
    peer: bool = True
    """By plain torch too, which compiles for a minute; without it the fast path's losses alone."""
    save: bool = False
    """Keep the losses in benchmarks/results."""


def train(step, loader, settings, seed) -> dict:
    """Every loss of a run from the weights of `seed`."""
    step.model.initialize(seed)
    step.optimizer.reset()
    loader.seek(0)
    losses, plan, begun = [], None, time.perf_counter()
    for number in range(settings.schedule.iterations):
        plan = schedule.plan(settings.schedule, number, 0.0, plan)
        losses.append(step.run([next(loader)], plan))
    losses = [round(loss, 4) for loss in torch.stack(losses).tolist()]
    return {"seed": seed, "train_loss": losses, "ms_per_step": 1e3 * (time.perf_counter() - begun) / len(losses)}


def run(config: ReferencePath, device) -> list[dict]:
    wanted = (*config.settings, f"schedule.iterations={config.steps}", "schedule.max_wallclock_seconds=0")
    settings = recipe.resolve(config.recipe, wanted, environ={}).recipe
    packed = settings.train.layout == "documents"
    stream = (ShardStream if packed else ContinuousStream)(config.data, TOKENS, vocab_size=settings.model.vocab_size)
    runs = []
    with Loader(stream, 0, device, packed, settings.train.seq_len, settings.train.cu_seqlens_entries) as loader:
        for name, (build, surroundings) in contestants(config.peer).items():
            with surroundings():
                step = build(settings, device)
                for looped in sorted({schedule.plan(settings.schedule, 0, 0.0).looped, True}):
                    ready_s = first_steps(step, synthetic_batches(settings, device), schedule.StepPlan(1.0, 0.9, looped, False, False))
                    print(f"{name}: three steps in {ready_s:.1f} s", flush=True)
                for seed in config.seeds:
                    runs.append({"step": name} | train(step, loader, settings, seed))
                    ms, losses = runs[-1]["ms_per_step"], runs[-1]["train_loss"]
                    print(f"{name}, seed {seed}: {ms:.1f} ms a step, the last loss {losses[-1]:.4f}", flush=True)
                    if config.save:
                        keep(config, runs, device)
            step.close()
            del step
    return runs


def difference(losses, others) -> str:
    apart = [b - a for a, b in zip(losses, others)][SETTLED:]
    rms = math.sqrt(sum(d * d for d in apart) / len(apart))
    return f"largest {max(map(abs, apart)):.4f}, rms {rms:.4f}, mean {sum(apart) / len(apart):+.4f}"


def compare(runs, seeds):
    losses = {(run["step"], run["seed"]): run["train_loss"] for run in runs}
    for seed in seeds if ("torch.compile", seeds[0]) in losses else ():
        print(f"seed {seed}, ours less torch.compile: {difference(losses['torch.compile', seed], losses['ours', seed])}")
    for name in dict.fromkeys(run["step"] for run in runs):
        for a, b in zip(seeds, seeds[1:]):
            print(f"{name}, seed {b} less seed {a}: {difference(losses[name, a], losses[name, b])}")


def keep(config, runs, device):
    told = environment(device)
    told["command"] = "python -m benchmarks.bench_reference_path " + " ".join(sys.argv[1:]).replace(str(config.data), "DATA")
    head = json.dumps({"environment": told, "recipe": config.recipe}, indent=1).removesuffix("\n}")
    lines = ",\n".join("  " + json.dumps(run) for run in runs)  # a run on a line
    name = "plain_torch" if config.peer else "fast_path"
    result_path(f"curve_{config.recipe}_{name}", device).write_text(f'{head},\n "runs": [\n{lines}\n ]\n}}\n')


if __name__ == "__main__":
    config = tyro.cli(ReferencePath, description=__doc__)
    found = run(config, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    compare(found, config.seeds)
