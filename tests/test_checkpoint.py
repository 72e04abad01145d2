"""Checkpoints: exact, whole or absent, and clear when they fail."""

import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch

from pgolf_fast import checkpoint, files
from pgolf_fast.errors import UserError


def tensors():
    bank = torch.randn(4, 3, 5)
    return {"bank": bank, "view": bank[1], "half": torch.randn(7).bfloat16(), "count": torch.tensor(3), "empty": torch.empty(0, 2)}


def test_exact_round_trip(tmp_path):
    stored, state = tensors(), {"step": 12, "rng": [1, 2**63], "name": "é"}
    path = checkpoint.save(tmp_path, 12, stored, state)
    loaded, found = checkpoint.load(path)
    assert found == state
    assert loaded.keys() == stored.keys()
    for name, value in stored.items():
        assert loaded[name].dtype == value.dtype and torch.equal(loaded[name], value), name


def test_the_newest_is_found_and_old_ones_go(tmp_path):
    assert checkpoint.latest(tmp_path / "none") is None
    put_aside = tmp_path / "step_00000005-good.safetensors"
    put_aside.touch()
    for step in (5, 10, 100000000 - 1):
        checkpoint.save(tmp_path, step, {"a": torch.zeros(1)}, {})
    assert checkpoint.latest(tmp_path) == checkpoint.path_of(tmp_path, 99999999)
    assert set(tmp_path.iterdir()) == {put_aside, *(checkpoint.path_of(tmp_path, step) for step in (10, 99999999))}


def test_a_disk_without_room_is_refused_beforehand(tmp_path, monkeypatch):
    """Of a folder that is not there yet; a checkpoint that lies in it takes its room no more."""
    folder = tmp_path / "run" / "checkpoints"
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda place: SimpleNamespace(free=25_000_000) if place.exists() else 1 / 0)
    checkpoint.require_room(folder, 8_000_000)
    with pytest.raises(UserError, match=f"0.03 GB are free at {tmp_path}, the run's checkpoints take 0.03; free space"):
        checkpoint.require_room(folder, 9_000_000)
    checkpoint.save(folder, 1, {"a": torch.zeros(1_000_000)}, {})
    checkpoint.require_room(folder, 9_000_000)


def test_what_a_kill_left_half_written_goes(tmp_path):
    half, mine = tmp_path / "step_00000003.safetensors.writing", tmp_path / "thoughts.writing"
    half.write_bytes(b"half a gigabyte")
    mine.touch()
    kept = checkpoint.save(tmp_path, 4, {"a": torch.zeros(1)}, {})
    assert set(tmp_path.iterdir()) == {kept, mine}


def test_others_may_read_it_as_any_other_file(tmp_path):
    (tmp_path / "any").touch()
    kept = checkpoint.save(tmp_path, 4, {"a": torch.zeros(1)}, {})
    assert kept.stat().st_mode == (tmp_path / "any").stat().st_mode


def test_an_unwritable_folder_is_named(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    with pytest.raises(UserError, match="cannot write"):
        checkpoint.save(blocked / "sub", 1, {"a": torch.zeros(1)}, {})


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_leaves_the_last_one_whole(tmp_path, monkeypatch):
    good = checkpoint.save(tmp_path, 1, {"a": torch.ones(3)}, {"step": 1})

    def full(number):
        with open("/dev/full", "wb", buffering=0) as device:
            device.write(b"x")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(UserError, match="cannot write .*No space left"):
        checkpoint.save(tmp_path, 2, {"a": torch.ones(3)}, {"step": 2})
    assert checkpoint.latest(tmp_path) == good and list(tmp_path.iterdir()) == [good]
    assert torch.equal(checkpoint.load(good)[0]["a"], torch.ones(3))


@pytest.mark.parametrize("damage", [b"", b"\xff" * 100, None])
def test_a_damaged_file_is_refused(tmp_path, damage):
    path = checkpoint.save(tmp_path, 1, tensors(), {"step": 1})
    path.write_bytes(path.read_bytes()[:-10] if damage is None else damage)
    with pytest.raises(UserError, match="damaged"):
        checkpoint.load(path)
    with pytest.raises(UserError, match="no file"):
        checkpoint.load(tmp_path / "absent")
    with pytest.raises(UserError, match="cannot read"):
        checkpoint.load(tmp_path)


WRITER = """
import sys, torch
from pathlib import Path
from pgolf_fast import checkpoint
print("ready", flush=True)
for step in range(1, 100000):
    checkpoint.save(Path(sys.argv[1]), step, {"a": torch.full((200_000,), float(step))}, {"step": step})
"""


def test_a_kill_at_any_moment_leaves_a_whole_checkpoint(tmp_path):
    for i in range(3):
        writer = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE)
        writer.stdout.readline()
        while checkpoint.latest(tmp_path) is None:
            time.sleep(0.01)
        time.sleep(0.05 + 0.031 * i)
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        found, state = checkpoint.load(checkpoint.latest(tmp_path))
        assert torch.equal(found["a"], torch.full((200_000,), float(state["step"])))
