"""The command line as its users meet it: another process, its output and its exit code."""

import errno
import io
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

import pgolf_fast
from pgolf_fast import commands, files
from pgolf_fast.__main__ import VERBS
from pgolf_fast.commands import demo, doctor
from pgolf_fast.commands import progress as commands_progress
from pgolf_fast.errors import UserError


def pgolf(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", "pgolf_fast", *arguments], capture_output=True, text=True, timeout=120, env={**os.environ, **environment}
    )


def test_no_verb_and_wrong_verb_say_what_there_is():
    for arguments in ((), ("nonsense",)):
        done = pgolf(*arguments)
        assert done.returncode == 2
        assert "doctor" in done.stdout + done.stderr
        assert "Traceback" not in done.stderr


def test_help_lists_every_verb_and_version_is_told():
    done = pgolf("--help")
    assert done.returncode == 0
    listed = {line.split()[0]: " ".join(line.split()[1:]) for line in done.stdout.splitlines()[2:]}
    assert listed == {verb: does for verb, (_, _, does) in VERBS.items()}
    assert {path.stem for path in Path(commands.__file__).parent.glob("*.py")} >= {module for module, _, _ in VERBS.values()}
    done = pgolf("--version")
    assert (done.returncode, done.stdout) == (0, f"pgolf_fast {pgolf_fast.__version__}\n")


def test_settings_may_stand_on_either_side_of_an_option(tmp_path):
    done = pgolf(
        "train",
        "schedule.iterations=2",
        "--recipe",
        "tiny",
        "train.data=/nowhere",
        "--device",
        "cpu",
        "--runs",
        str(tmp_path),
        "train.seed=3",
    )
    assert done.returncode == 2 and "/nowhere" in done.stderr and "Unrecognized" not in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("train", "--device", "cdua", "train.data=/nowhere"), "device: 'cdua' is not here; choose cpu, cuda"),
        (("train", "--device", "cuda", "train.data=/nowhere"), "device: 'cuda' is not here"),
        (("eval", "pyproject.toml", "--data", "/nowhere", "--device", "cuda"), "device: 'cuda' is not here"),
        (("bench", "int6_pack", "--device", "foo"), "device: 'foo' is not here"),
        (("train", "--gpus", "-1", "train.data=/nowhere"), "gpus: expected a number of at least 0, got -1"),
    ],
)
def test_a_device_that_is_not_here(arguments, message):
    done = pgolf(*arguments, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr


def test_a_full_disk_is_one_sentence(tmp_path):
    """Here: a limit on the size of files."""
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))  # noqa: E731
    command = [sys.executable, "-m", "pgolf_fast", "data", "demo", str(tmp_path / "data")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, preexec_fn=limit)
    assert done.returncode == 2 and "File too large; free space or choose another place" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    files.write_whole(tmp_path / "made" / "file", b"before")

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="cannot write .*file .No space left on device"):
        files.write_whole(tmp_path / "made" / "file", b"after")
    with pytest.raises(UserError, match="cannot write"):
        files.write_whole(tmp_path / "made" / "file" / "below", b"after")
    assert {path.name: path.read_bytes() for path in (tmp_path / "made").iterdir()} == {"file": b"before"}
    # A file system that flushes files and not folders.
    monkeypatch.setattr(os, "fsync", lambda descriptor: full(descriptor) if os.path.isdir(f"/proc/self/fd/{descriptor}") else None)
    files.write_whole(tmp_path / "made" / "file", b"after")
    assert (tmp_path / "made" / "file").read_bytes() == b"after"


def test_a_demo_removes_only_what_a_demo_made(tmp_path):
    for path in ("mine/data/shards", "mine/runs/tiny/model"):
        (tmp_path / path).mkdir(parents=True)
    with pytest.raises(UserError, match="mine holds something else than an earlier demo"):
        demo.make_room(tmp_path / "mine")
    assert (tmp_path / "mine/data/shards").exists()
    demo.make_room(tmp_path / "new")
    for path in ("new/data", "new/runs/tiny", "new/runs/other", "new/report"):
        (tmp_path / path).mkdir(parents=True)
    demo.make_room(tmp_path / "new")
    assert sorted(path.name for path in (tmp_path / "new").rglob("*")) == sorted([demo.MARK, "runs", "other"])


def test_one_of_several_processes_prints_the_result():
    assert json.loads(pgolf("recipes", "--json", RANK="0").stdout).keys() >= {"tiny"}
    assert pgolf("recipes", "--json", RANK="1").stdout == ""


def test_on_several_gpus_it_ends_as_its_processes_do(tmp_path):
    """Two processes on the CPU, for which nobody counts GPUs."""
    arguments = ["pgolf", "train", "--gpus", "2", "--device", "cpu", "--runs", str(tmp_path), "train.data=/nowhere"]
    code = f"import sys, torch; torch.cuda.device_count = lambda: 2; sys.argv = {arguments}; from pgolf_fast.__main__ import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and done.stdout == "", done.stderr
    assert "/nowhere" in done.stderr and "was the first to end with an error (2)" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("arguments", [("recipes", "caseops-1934", "--json"), ("recipes", "tiny"), ("train", "--help")], ids=" ".join)
def test_a_reader_that_stops_early_is_no_error(arguments):
    command = [sys.executable, "-m", "pgolf_fast", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    assert "Error" not in process.stderr.read()
    assert process.wait(timeout=120) == 0


def test_doctor_without_a_gpu_is_limited_and_quick():
    done = pgolf("doctor", "--json", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == doctor.LIMITED, done.stdout + done.stderr
    findings = {f["name"]: f for f in json.loads(done.stdout)["findings"]}
    assert findings["GPU"]["status"] == "limited" and findings["GPU"]["remedy"]
    calls = [f for name, f in findings.items() if name.endswith(" on cpu")]
    assert all(f["status"] == "ok" and f["found"].startswith("reference") for f in calls)
    called = " ".join(f["name"] for f in calls).split()
    assert set(pgolf_fast.ops.__all__) - {"embedding_plan"} <= set(called)  # which is no op but what one takes


@pytest.mark.cuda
def test_doctor_on_hopper_calls_every_op():
    done = pgolf("doctor", "--json")
    findings = {f["name"]: f for f in json.loads(done.stdout)["findings"]}
    calls = [f for name, f in findings.items() if name.endswith(" on cuda:0")]
    assert len(calls) == len(doctor._probes()) and all(f["status"] != "broken" for f in calls), done.stdout


def test_doctor_reports_a_wrong_op_as_broken():
    good = doctor._probes()[0]
    wrong = doctor.Probe(good.op, good.kernel, lambda device: good.call(device) * 1.1, good.truth)
    assert doctor._call(wrong, torch.device("cpu")).status == doctor.BROKEN
    raising = doctor.Probe(good.op, good.kernel, lambda device: 1 / 0, good.truth)
    found = doctor._call(raising, torch.device("cpu"))
    assert found.status == doctor.BROKEN and "ZeroDivisionError" in found.found


def test_a_library_that_does_not_load_says_why_and_how_to_build_it(tmp_path):
    """As one of another torch."""
    (tmp_path / "other.so").write_bytes(b"no library, but as long as the head of one is" * 9)
    done = pgolf("doctor", PGOLF_LIBRARY=str(tmp_path / "other.so"))
    last = done.stderr.splitlines()[-1]
    assert last.startswith("ImportError: ") and "invalid ELF header" in last and f"torch {torch.__version__}" in last and "nvcc 13" in last


def test_a_library_path_that_does_not_exist_is_named():
    done = pgolf("doctor", PGOLF_LIBRARY="/no/such/library.so")
    assert done.returncode != 0
    assert "PGOLF_LIBRARY: no file at /no/such/library.so" in done.stderr


def test_bench_names_the_ops_it_knows():
    done = pgolf("bench", "nonsense")
    assert done.returncode == 2
    assert "softcap_ce" in done.stderr


def test_package_import_is_light():
    heavy = ("rich", "tyro", "sentencepiece", "zstandard", "safetensors", "torch._dynamo")
    code = f"import sys, pgolf_fast; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]"


def test_off_a_terminal_progress_is_a_line_now_and_then(monkeypatch):
    told = io.StringIO()
    seconds = iter(range(0, 1000, 20))
    monkeypatch.setattr(commands_progress.time, "perf_counter", lambda: next(seconds))
    with commands_progress.shown(Console(file=told, width=80)) as progress:
        for done in range(6):
            progress("packing", done, 5, f"part {done}")
    assert told.getvalue() == "packing: 20%, 80 s left, part 1\npacking: 60%, 40 s left, part 3\npacking: 100%, 0 s left, part 5\n"
