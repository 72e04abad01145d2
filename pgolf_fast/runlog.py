"""A run's folder and what is written in it while the run goes on.

    recipe.json     the resolved recipe, with the source of each value
    machine.json    versions, commit, device, ranks, command
    events.jsonl    one JSON object per event, appended and flushed; survives a kill up to the last line
    log.txt         the challenge's text lines
    checkpoints/    see checkpoint.py
    evidence/       what a run that stopped on a non-finite loss leaves behind

Only rank 0 writes.
"""

import contextlib
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
            self._events, self._text = _Lines(folder / "events.jsonl"), _Lines(folder / "log.txt")
        except OSError as error:
            raise UserError(f"run folder: cannot write {folder} ({error}); choose another with --runs") from None

    def document(self, name: str, content: dict) -> None:
        """A whole JSON file of the run folder."""
        if self._writes:
            write_json(self.folder / name, content)

    def event(self, kind: str, **values) -> None:
        if self._writes:
            self._append(self._events, json.dumps({"event": kind, "time": time.time(), **values}))

    def line(self, text: str) -> None:
        """One line of the challenge's text log, shown too."""
        if self._writes:
            self._append(self._text, text)
            self._show(text)

    def _append(self, lines, text):
        if problem := lines.append(text):
            self._show(f"run folder: cannot write {self.folder} ({problem}); the run goes on, and what it says is kept until there is room")

    def _show(self, text):
        with contextlib.suppress(OSError):  # nobody reads any more, or into a file on a full disk: no reason to end a run
            self._echo(text)

    def close(self) -> None:
        """UserError if the end of the log could not be written."""
        if self._writes:
            lost = self._events.close() + self._text.close()
            if lost:
                raise UserError(
                    f"run folder: the last {lost:,} bytes of its log could not be written; free space, and --resume ends the run again"
                )


class _Lines:
    """A file that lines are appended to. What a disk without room does not take is tried again with the next line."""

    def __init__(self, path: Path):
        self._file, self._owed, self._is_full = open(path, "ab", buffering=0), bytearray(), False
        if self._file.tell() and not path.read_bytes().endswith(b"\n"):
            self._owed += b"\n"  # what follows a line that a kill cut off begins a line of its own

    def append(self, text: str) -> str | None:
        """Why the disk does not take it, when that is news."""
        self._owed += text.encode() + b"\n"
        before, self._is_full = self._is_full, False
        try:
            while self._owed:
                del self._owed[: self._file.write(self._owed)]
        except OSError as error:
            self._is_full = True
            return None if before else error.strerror
        return None

    def close(self) -> int:
        """How many bytes were never written."""
        self._file.close()
        return len(self._owed)


def has_run(folder: Path) -> bool:
    log = folder / "events.jsonl"
    return log.is_file() and log.stat().st_size > 0


def events(folder: Path) -> list[dict]:
    """Events of a run. A line cut off by a kill is left out."""
    found = []
    for line in (folder / "events.jsonl").read_text(errors="replace").splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            found.append(json.loads(line))
    return [event for event in found if isinstance(event, dict)]


def read_document(folder: Path, name: str) -> dict:
    """A JSON file of a run's folder."""
    try:
        found = json.loads((folder / name).read_text())
        if not isinstance(found, dict):
            raise ValueError("no JSON object")
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / name}: cannot be read ({error}); `pgolf train`, `pack` and `eval` write such files") from None
    return found


def read_recipe(folder: Path) -> dict:
    """recipe.json: name, note, settings."""
    record = read_document(folder, "recipe.json")
    name, rows = record.get("name"), record.get("settings")
    whole = isinstance(rows, dict) and all(isinstance(row, dict) and {"value", "source"} <= row.keys() for row in rows.values())
    if not whole or not isinstance(name, str):
        problem = "damaged: no name, or settings without value or source"
        raise UserError(f"{folder / 'recipe.json'}: {problem}; `pgolf recipes NAME SETTING=VALUE... --json` prints such a file")
    return record
