"""Checkpoints: one safetensors file each, written whole or not at all.

A file holds the tensors by name and one JSON document (step, loader position, clock) in the header. It is written beside its final name,
flushed to the disk, and renamed; a kill at any moment leaves the last good one. No pickle.
"""

import json
import os
import re
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from pgolf_fast.errors import UserError

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


def write(target: Path, tensors: dict[str, torch.Tensor], state: dict) -> Path:
    """One file, whole or not at all.

    tensors  any device; views of one storage are stored one by one
    state    JSON values
    """
    draft = target.with_suffix(".writing")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # safetensors refuses tensors that share memory, such as views of one bank
        own = {name: t.detach().cpu().clone(memory_format=torch.contiguous_format) for name, t in tensors.items()}
        save_file(own, draft, metadata={"state": json.dumps(state)})
        with open(draft, "rb") as file:
            os.fsync(file.fileno())
        os.replace(draft, target)
        directory = os.open(target.parent, os.O_RDONLY)
        os.fsync(directory)
        os.close(directory)
    except (OSError, SafetensorError) as error:
        if draft.exists():
            draft.unlink()
        kept = latest(target.parent)
        rescue = f"the last whole one is {kept}" if kept else "there is no earlier one"
        raise UserError(f"checkpoint: cannot write {target} ({error}); free space or choose another folder; {rescue}") from None
    return target


def save(folder: Path, step: int, tensors: dict[str, torch.Tensor], state: dict) -> Path:
    """Write the checkpoint of a step and drop all but the last KEEP."""
    target = write(path_of(folder, step), tensors, state)
    for old in sorted(_all(folder))[:-KEEP]:
        old.unlink()
    return target


def load(path: Path, device: torch.device | str = "cpu") -> tuple[dict[str, torch.Tensor], dict]:
    """(tensors, state) of one checkpoint."""
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            state = json.loads((file.metadata() or {})["state"])
            return {name: file.get_tensor(name) for name in file.keys()}, state  # noqa: SIM118  (not a dict)
    except FileNotFoundError:
        raise UserError(f"checkpoint: no file at {path}") from None
    except (SafetensorError, KeyError, ValueError) as error:
        raise UserError(f"checkpoint: {path} is damaged or not one of ours ({error}); resume from another one in its folder") from None
