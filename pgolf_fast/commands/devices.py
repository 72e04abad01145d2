"""Where a command runs: its device, or one process a GPU."""

import os
import sys

import torch
from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from pgolf_fast.errors import UserError


def choose_device(name: str) -> torch.device:
    """Of --device: cpu, cuda, or auto, a GPU if there is one."""
    has_gpu = torch.cuda.is_available()
    if name not in ("cpu", "cuda", "auto") or (name == "cuda" and not has_gpu):
        raise UserError(f"device: {name!r} is not here; choose cpu, cuda (if there is a GPU) or auto")
    return torch.device(("cuda" if has_gpu else "cpu") if name == "auto" else name)


def under_torchrun(gpus: int):
    """Runs this command in one process a GPU, and exits when they have; returns in such a process, and where one is enough.

    torchrun is called and not started: a process of its own would import torch once more before its workers do.
    """
    if gpus < 0:
        raise UserError(f"gpus: expected a number of at least 0, got {gpus}")
    if gpus <= 1 or "LOCAL_RANK" in os.environ:
        return
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
