"""`pgolf train`: run a recipe."""

import dataclasses
import os
import time
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from pgolf_fast import dist, recipe
from pgolf_fast.commands.devices import choose_device, under_torchrun
from pgolf_fast.errors import UserError
from pgolf_fast.train import Trainer


@dataclasses.dataclass(frozen=True)
class Train:
    """Train a recipe; with several GPUs or processes through torchrun, or through --gpus."""

    overrides: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="[SETTING=VALUE ...]")] = ()
    """train.data=FOLDER schedule.iterations=500 ..., over the recipe's settings."""
    recipe: str = "tiny"
    """A recipe's name or a TOML file; `pgolf recipes` lists them."""
    runs: Annotated[Path, tyro.conf.arg(metavar="DIR")] = Path("runs")
    """Where the run's folder goes."""
    gpus: int = 0
    """Run on this many GPUs of this machine; 0: as launched."""
    device: str = "auto"
    """cpu, cuda, or auto: GPUs if there are any."""
    resume: bool = False
    """Go on from the last checkpoint of the run's folder, with the same settings (needs train.run_id); from the beginning where a kill
    came before the first. There is one every train.checkpoint_seconds of training, and every train.checkpoint_every steps."""
    json: bool = False
    """Print the result as JSON."""


def run(config: Train, console: Console) -> tuple[dict, int]:
    under_torchrun(config.gpus)
    resolved = recipe.resolve(config.recipe, config.overrides)
    run_id = resolved.recipe.train.run_id or f"{resolved.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    if config.resume and not resolved.recipe.train.run_id:
        raise UserError("resume: say which run with train.run_id=NAME")
    folder = config.runs / run_id
    events = folder / "events.jsonl"
    if not config.resume and events.exists() and events.stat().st_size:
        raise UserError(f"train.run_id: {folder} holds a run already; choose another name, remove it, or go on with --resume")
    device = choose_device(config.device).type
    first = int(os.environ.get("RANK", 0)) == 0
    bar = Progress(
        TextColumn(resolved.name),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[text]}"),
        TimeRemainingColumn(),
        console=console,
    )
    trainer = Trainer(resolved, folder, device, echo=console.print if first else lambda text: None, resume=config.resume)
    if first:  # whoever is killed must know what to resume
        console.print(f"run: {folder}", soft_wrap=True)
    task = bar.add_task("steps", total=resolved.recipe.schedule.iterations, text="")

    def progress(step, loss, ms_per_step):
        bar.update(task, completed=step, text=f"loss {loss:.4f}  {ms_per_step:.1f} ms/step")

    if first and console.is_terminal:
        with bar:
            result = trainer.run(progress)
    else:
        result = trainer.run()
    dist.stop()
    if first:
        console.print(f"written: {result.folder} (next: pgolf quantize {result.folder})", soft_wrap=True)
    return {
        "folder": str(result.folder),
        "steps": result.steps,
        "train_loss": result.train_loss if result.steps else None,  # nan is no JSON
        "val_loss": result.validation.nats_per_token,
        "val_bpb": result.validation.bits_per_byte,
        "weights": result.weights,
    }, 0
