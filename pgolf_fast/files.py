"""Files written whole or not at all: a full disk or a kill leaves what was there before."""

import contextlib
import json
import os
from pathlib import Path

from pgolf_fast.errors import UserError


def write_whole(path: Path, content: bytes) -> None:
    """Written beside its name, flushed to the disk, and renamed."""
    draft = path.with_name(path.name + ".writing")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(draft, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            draft.unlink()
        raise UserError(f"cannot write {path} ({error.strerror}); free space or choose another place") from None
    with contextlib.suppress(OSError):  # the new name too; not every file system can
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


def write_json(path: Path, content) -> None:
    write_whole(path, (json.dumps(content, indent=1, default=str) + "\n").encode())
