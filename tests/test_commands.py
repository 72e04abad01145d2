"""The command line as its users meet it: another process, its output and its exit code."""

import json
import subprocess
import sys

import pytest
import torch

from pgolf_fast.commands import doctor


def pgolf(*arguments, **environment):
    import os

    return subprocess.run(
        [sys.executable, "-m", "pgolf_fast", *arguments], capture_output=True, text=True, timeout=120, env={**os.environ, **environment}
    )


def test_no_verb_and_wrong_verb_say_what_there_is():
    for arguments in ((), ("nonsense",)):
        done = pgolf(*arguments)
        assert done.returncode == 2
        assert "doctor" in done.stdout + done.stderr
        assert "Traceback" not in done.stderr


def test_help_lists_every_verb():
    done = pgolf("--help")
    assert done.returncode == 0
    for verb in ("bench", "demo", "doctor"):
        assert verb in done.stdout


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


def test_on_several_gpus_it_ends_as_its_processes_do(tmp_path):
    """Two processes on the CPU, for which nobody counts GPUs."""
    arguments = ["pgolf", "train", "--gpus", "2", "--device", "cpu", "--runs", str(tmp_path), "train.data=/nowhere"]
    code = f"import sys, torch; torch.cuda.device_count = lambda: 2; sys.argv = {arguments}; from pgolf_fast.__main__ import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and done.stdout == "", done.stderr
    assert "/nowhere" in done.stderr and "was the first to end with an error (2)" in done.stderr and "Traceback" not in done.stderr


def test_a_reader_that_stops_early_is_no_error():
    command = [sys.executable, "-m", "pgolf_fast", "recipes", "caseops-1934", "--json"]
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
    assert len(calls) == 9 and all(f["status"] == "ok" and f["found"].startswith("reference") for f in calls)


@pytest.mark.cuda
def test_doctor_on_hopper_calls_every_op():
    done = pgolf("doctor", "--json")
    findings = {f["name"]: f for f in json.loads(done.stdout)["findings"]}
    calls = [f for name, f in findings.items() if name.endswith(" on cuda:0")]
    assert len(calls) == 9 and all(f["status"] != "broken" for f in calls), done.stdout


def test_doctor_reports_a_wrong_op_as_broken():
    good = doctor._probes()[0]
    wrong = doctor.Probe(good.op, good.kernel, lambda device: good.call(device) * 1.1, good.truth)
    assert doctor._call(wrong, torch.device("cpu")).status == doctor.BROKEN
    raising = doctor.Probe(good.op, good.kernel, lambda device: 1 / 0, good.truth)
    found = doctor._call(raising, torch.device("cpu"))
    assert found.status == doctor.BROKEN and "ZeroDivisionError" in found.found


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
