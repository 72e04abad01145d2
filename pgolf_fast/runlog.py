"""A run's folder and what is written in it while the run goes on.

    recipe.json     the resolved recipe, with the source of each value
    machine.json    versions, commit, device, ranks, command
    events.jsonl    one JSON object per event, appended and flushed; survives a kill up to the last line
    log.txt         the challenge's text lines
    checkpoints/    see checkpoint.py
    evidence/       what a run that stopped on a non-finite loss leaves behind

Only rank 0 writes.
"""

import json
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

import pgolf_fast
from pgolf_fast.errors import UserError
from pgolf_fast.files import write_json
from pgolf_fast.ops import _library


def commit() -> str:
    """Commit of the source checkout, or the version of the installed package; PGOLF_COMMIT says it where sources travel without history."""
    if told := os.environ.get("PGOLF_COMMIT"):
        return told
    root, described = Path(pgolf_fast.__file__).parent.parent, ""
    if (root / ".git").exists() and shutil.which("git"):  # an installed package may lie in somebody else's checkout
        git = subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=12"], cwd=root, capture_output=True, text=True)
        described = git.stdout.strip()
    return described or f"pgolf_fast {pgolf_fast.__version__}"


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU, {os.cpu_count()} cores"


def machine(device: torch.device, world_size: int) -> dict:
    return {
        "pgolf_fast": pgolf_fast.__version__,
        "commit": commit(),
        "command": sys.argv,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "library": _library.build_info(),
        "device": device_name(device),
        "world_size": world_size,
    }


class RunLog:
    """The open log of one run. On ranks other than 0 every call does nothing."""

    def __init__(self, folder: Path, writes: bool, echo=print):
        self.folder, self._writes, self._echo = folder, writes, echo
        if not writes:
            return
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._events, self._text = (_open_to_append(folder / name) for name in ("events.jsonl", "log.txt"))
        except OSError as error:
            raise UserError(f"run folder: cannot write {folder} ({error}); choose another with --runs") from None

    def document(self, name: str, content: dict) -> None:
        """A whole JSON file of the run folder."""
        if self._writes:
            write_json(self.folder / name, content)

    def event(self, kind: str, **values) -> None:
        if self._writes:
            self._events.write(json.dumps({"event": kind, "time": time.time(), **values}) + "\n")
            self._events.flush()

    def line(self, text: str) -> None:
        """One line of the challenge's text log, shown too."""
        if self._writes:
            self._text.write(text + "\n")
            self._text.flush()
            self._echo(text)

    def close(self) -> None:
        if self._writes:
            self._events.close()
            self._text.close()


def _open_to_append(path: Path):
    """What follows a line that a kill cut off begins a line of its own."""
    file = open(path, "a")  # noqa: SIM115  (open as long as the run)
    if file.tell() and not path.read_bytes().endswith(b"\n"):
        file.write("\n")
    return file


def events(folder: Path) -> list[dict]:
    """Events of a run. A line cut off by a kill is left out."""
    found = []
    for line in (folder / "events.jsonl").read_text().splitlines():
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return found
