"""Checkpoints: one safetensors file each, written whole or not at all, so that a kill at any moment leaves the last good one.

A file holds the tensors by name and one JSON document (step, loader position, clock) in the header. No pickle.
"""

import json
import re
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes

from pgolf_fast.errors import UserError
from pgolf_fast.files import write_whole

NAME = re.compile(r"step_(\d{8})\.safetensors")
KEEP = 2


def path_of(folder: Path, step: int) -> Path:
    return folder / f"step_{step:08d}.safetensors"


def latest(folder: Path) -> Path | None:
    """The newest whole checkpoint of a folder."""
    return max(_all(folder), default=None)


def _all(folder: Path) -> list[Path]:
    """The folder's checkpoints and nothing that somebody laid beside them."""
    return [p for p in folder.glob("step_*.safetensors") if NAME.fullmatch(p.name)]


def require_room(folder: Path, size: int) -> None:
    """Refuses a disk that cannot hold a run's checkpoints of `size` bytes: KEEP, and the one that is being written."""
    missing = (KEEP + 1) * size - sum(path.stat().st_size for path in _all(folder))
    disk = next(place for place in (folder, *folder.parents) if place.exists())
    free = shutil.disk_usage(disk).free
    if free < missing:
        raise UserError(
            f"run folder: {free / 1e9:.2f} GB are free at {disk}, the run's checkpoints take {missing / 1e9:.2f}; "
            "free space or choose another place with --runs"
        )


def write(target: Path, tensors: dict[str, torch.Tensor], state: dict) -> Path:
    """One file, whole or not at all.

    tensors  any device; views of one storage are stored one by one
    state    JSON values
    """
    # safetensors refuses tensors that share memory, such as views of one bank
    own = {name: t.detach().cpu().clone(memory_format=torch.contiguous_format) for name, t in tensors.items()}
    write_whole(target, to_bytes(own, metadata={"state": json.dumps(state)}))
    return target


def save(folder: Path, step: int, tensors: dict[str, torch.Tensor], state: dict) -> Path:
    """Write the checkpoint of a step; drop all but the last KEEP, and what a kill left half written."""
    target = write(path_of(folder, step), tensors, state)
    for old in [*sorted(_all(folder))[:-KEEP], *folder.glob("step_*.writing")]:
        old.unlink()
    return target


def load(path: Path) -> tuple[dict[str, torch.Tensor], dict]:
    """(tensors, state) of one checkpoint, on the CPU."""
    try:
        with safe_open(path, framework="pt") as file:
            state = json.loads((file.metadata() or {})["state"])
            return {name: file.get_tensor(name) for name in file.keys()}, state
    except FileNotFoundError:
        raise UserError(f"checkpoint: no file at {path}") from None
    except OSError as error:
        raise UserError(f"checkpoint: cannot read {path} ({error})") from None
    except (SafetensorError, KeyError, ValueError) as error:
        raise UserError(f"checkpoint: {path} is damaged or not one of ours ({error}); resume from another one in its folder") from None
