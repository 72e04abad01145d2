"""`pgolf train`: run a recipe."""

import dataclasses
import os
import time
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from pgolf_fast import dist, recipe, runlog
from pgolf_fast.commands.devices import choose_device, under_torchrun
from pgolf_fast.errors import UserError
from pgolf_fast.interrupts import asked_to_stop
from pgolf_fast.train import Trainer


@dataclasses.dataclass(frozen=True)
class Train:
    """Train a recipe; with several GPUs or processes through torchrun, or through --gpus."""

    overrides: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="[SETTING=VALUE ...]")] = ()
    """train.data=FOLDER schedule.iterations=500 ..., over the recipe's settings."""
    recipe: str = ""
    """A recipe's name or a TOML file; `pgolf recipes` lists them. If left out: tiny, or that of the run to resume."""
    runs: Annotated[Path, tyro.conf.arg(metavar="DIR")] = Path("runs")
    """Where the run's folder goes."""
    gpus: int = 0
    """Run on this many GPUs of this machine; 0: as launched."""
    device: str = "auto"
    """cpu, cuda, or auto: GPUs if there are any."""
    resume: bool = False
    """Go on from the last checkpoint of the run that train.run_id names, with the settings that it began with; from the beginning where
    a kill came before the first. There is one every train.checkpoint_seconds of training, and every train.checkpoint_every steps."""
    json: bool = False
    """Print the result as JSON."""


def _to_begin(config) -> tuple[Path, recipe.Resolved]:
    resolved = recipe.resolve(config.recipe or "tiny", config.overrides)
    folder = config.runs / (resolved.recipe.train.run_id or f"{resolved.name}-{time.strftime('%Y%m%d-%H%M%S')}")
    if runlog.has_run(folder):
        raise UserError(f"train.run_id: {folder} holds a run already; choose another name, remove it, or go on with --resume")
    return folder, resolved


def _to_resume(config, say) -> tuple[Path, recipe.Resolved]:
    """The run's folder and the recipe that it began with, unless another is given; says what is not as it was."""
    named = [override for override in config.overrides if override.startswith("train.run_id=")]
    run_id = named[-1].partition("=")[2] if named else os.environ.get("RUN_ID", "")
    if not run_id:
        raise UserError("resume: say which run with train.run_id=NAME")
    folder = config.runs / run_id
    if not runlog.has_run(folder):
        raise UserError(f"resume: no run in {folder}; correct train.run_id or --runs, or start it without --resume")
    record, source = runlog.read_recipe(folder), str(folder / "recipe.json")
    began = recipe.recorded(record, source).values()
    resolved = recipe.resolve(config.recipe, config.overrides) if config.recipe else recipe.recorded(record, source, config.overrides)
    for key, now in resolved.values().items():
        if now != began[key] and key != "train.run_id":
            say(f"[yellow]! {key} was {escape(str(began[key]))} when the run began and is {escape(str(now))} now")
    return folder, resolved


def run(config: Train, console: Console) -> tuple[dict, int]:
    under_torchrun(config.gpus)
    first = int(os.environ.get("RANK", 0)) == 0
    echo = console.print if first else lambda text: None
    folder, resolved = _to_resume(config, echo) if config.resume else _to_begin(config)
    device = choose_device(config.device).type
    bar = Progress(
        TextColumn(resolved.name),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[text]}"),
        TimeRemainingColumn(),
        console=console,
    )
    trainer = Trainer(resolved, folder, device, echo=echo, resume=config.resume)
    if first:  # whoever is killed must know what to resume
        console.print(f"run: {folder}", soft_wrap=True)
    task = bar.add_task("steps", total=resolved.recipe.schedule.iterations, text="")

    def progress(step, loss, ms_per_step):
        bar.update(task, completed=step, text=f"loss {loss:.4f}  {ms_per_step:.1f} ms/step")

    with asked_to_stop() as must_stop:
        if first and console.is_terminal:
            with bar:
                result = trainer.run(progress, must_stop)
        else:
            result = trainer.run(must_stop=must_stop)
    dist.stop()
    if result is None:
        if first:
            console.print(f"stopped after step {trainer.step}; --resume train.run_id={folder.name} goes on from here")
        return {"folder": str(folder), "steps": trainer.step, "is_complete": False}, 130
    if first:
        console.print(f"written: {result.folder} (next: pgolf quantize {result.folder})", soft_wrap=True)
    return {
        "folder": str(result.folder),
        "steps": result.steps,
        "train_loss": result.train_loss if result.steps else None,  # nan is no JSON
        "val_loss": result.validation.nats_per_token,
        "val_bpb": result.validation.bits_per_byte,
        "weights": result.weights,
        "is_complete": True,
    }, 0
