"""`pgolf train`: run a recipe."""

import dataclasses
import os
import sys
import time
from pathlib import Path
from typing import Annotated

import torch
import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from pgolf_fast import dist, recipe
from pgolf_fast.errors import UserError
from pgolf_fast.train import Trainer


@dataclasses.dataclass(frozen=True)
class Train:
    """Train a recipe; with several GPUs or processes through torchrun, or through --gpus."""

    overrides: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """stage.setting=value, e.g. train.data=FOLDER schedule.iterations=500."""
    recipe: str = "tiny"
    """A recipe's name or a TOML file; `pgolf recipes` lists them."""
    runs: Annotated[Path, tyro.conf.arg(metavar="DIR")] = Path("runs")
    """Where the run's folder goes."""
    gpus: int = 0
    """Run on this many GPUs of this machine; 0: as launched."""
    device: str = "auto"
    """cpu, cuda, or auto: GPUs if there are any."""
    resume: bool = False
    """Go on from the last checkpoint of the run's folder (needs train.run_id)."""
    json: bool = False
    """Print the result as JSON."""


def under_torchrun(gpus: int):
    """Runs this command in one process a GPU, which have a LOCAL_RANK and so do not come here again, and exits when they have.

    torchrun is called and not started: a process of its own would import torch once more before its workers do.
    """
    if gpus > torch.cuda.device_count():
        raise UserError(f"gpus: {gpus} asked for, {torch.cuda.device_count()} visible here")
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # torchrun's own choice, which it would announce
    try:
        torchrun.main(["--standalone", f"--nproc_per_node={gpus}", "-m", "pgolf_fast", *sys.argv[1:]])
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        print(f"pgolf: rank {rank} was the first to end with an error ({failure.exitcode}); what it said is above", file=sys.stderr)
        raise SystemExit(failure.exitcode if failure.exitcode > 0 else 1) from None
    except SignalException as stopped:
        raise SystemExit(128 + stopped.sigval) from None
    raise SystemExit(0)


def run(config: Train, console: Console) -> tuple[dict, int]:
    if config.gpus > 1 and "LOCAL_RANK" not in os.environ:
        under_torchrun(config.gpus)
    resolved = recipe.resolve(config.recipe, config.overrides)
    run_id = resolved.recipe.train.run_id or f"{resolved.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    if config.resume and not resolved.recipe.train.run_id:
        raise UserError("resume: say which run with train.run_id=NAME")
    folder = config.runs / run_id
    events = folder / "events.jsonl"
    if not config.resume and events.exists() and events.stat().st_size:
        raise UserError(f"train.run_id: {folder} holds a run already; choose another name, remove it, or go on with --resume")
    device = ("cuda" if torch.cuda.is_available() else "cpu") if config.device == "auto" else config.device
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
    task = bar.add_task("steps", total=resolved.recipe.schedule.iterations, text="")

    def progress(step, loss, ms_per_step):
        bar.update(task, completed=step, text=f"loss {loss:.4f}  {ms_per_step:.1f} ms/step")

    if first and console.is_terminal:
        with bar:
            result = trainer.run(progress)
    else:
        result = trainer.run()
    dist.stop()
    return {
        "folder": str(result.folder),
        "steps": result.steps,
        "train_loss": result.train_loss,
        "val_loss": result.validation.nats_per_token,
        "val_bpb": result.validation.bits_per_byte,
        "weights": result.weights,
    }, 0
