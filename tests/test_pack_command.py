"""`pgolf quantize` and `pgolf pack`, from a checkpoint file to a packed one."""

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import pgolf_fast
from benchmarks.states import synthetic_state
from pgolf_fast import export
from pgolf_fast.__main__ import main
from pgolf_fast.artifact import pack, same, unpack
from pgolf_fast.errors import UserError
from pgolf_fast.ledger import CAP_BYTES
from pgolf_fast.quantize import PUBLISHED, dequantize, quantize
from pgolf_fast.shards import shard_name, write_shard
from tests.finished_run import write_run


@dataclasses.dataclass
class Done:
    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def pgolf(monkeypatch, capsys):
    """The command line in this process: its output and exit code."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["pgolf", *map(str, arguments)])
        with pytest.raises(SystemExit) as done:
            main()
        return Done(done.value.code, *capsys.readouterr())

    return call


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint") / "model.safetensors"
    save_file(synthetic_state("sp1024-s", layers=1), path)
    return path


def test_from_checkpoint_to_packed_file(pgolf, checkpoint, tmp_path):
    done = pgolf("quantize", checkpoint, "--table", "legal-ttt-691", "--out", tmp_path / "q", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    state = synthetic_state("sp1024-s", layers=1)
    assert {t["name"] for t in report["tensors"]} == set(state)
    done = pgolf("pack", tmp_path / "q", "--out", tmp_path / "model.pglf", "--json")
    assert done.returncode == 0, done.stderr
    sizes = json.loads(done.stdout)
    data = (tmp_path / "model.pglf").read_bytes()
    assert sizes["bytes"] == len(data) == sum(sizes["weights"].values()) + sizes["metadata"]
    assert report["forecast_bytes"] == pytest.approx(len(data), rel=0.01)
    assert all(sizes["totals"][c] == len(data) + sizes["code"][c] for c in ("literal", "wrapped", "strict"))
    assert sizes["code"]["wrapped"] < sizes["code"]["strict"] and sizes["fits"]
    loaded = unpack(data)
    assert loaded.metadata == {"table": "legal-ttt-691"}
    expected = dequantize(quantize(state, PUBLISHED["legal-ttt-691"])[0])
    assert all(torch.equal(t, expected[name]) for name, t in dequantize(loaded.tensors).items()) and set(loaded.tensors) == set(state)


def test_over_the_cap_is_exit_code_1(pgolf, tmp_path):
    random = torch.randint(-(2**31), 2**31 - 1, (CAP_BYTES // 4,), dtype=torch.int32).view(torch.float32)
    (tmp_path / "big").write_bytes(pack({"x": random}, "none"))
    done = pgolf("pack", tmp_path / "big", "--codec", "none")
    assert done.returncode == 1 and "OVER the cap" in done.stdout


def test_hessians_decide_gptq(pgolf, tmp_path):
    save_file({"blocks.0.attn.c_q.weight": torch.randn(16, 32)}, tmp_path / "c")
    save_file({"blocks.0.attn.c_q.weight": torch.eye(32)}, tmp_path / "h")
    arguments = ("quantize", tmp_path / "c", "--table", "caseops-1934")
    done = pgolf(*arguments)
    assert done.returncode == 2 and "hessians: none for blocks.0.attn.c_q.weight" in done.stderr
    by_gptq, by_rounding = (pgolf(*arguments, *more, "--json") for more in (("--hessians", tmp_path / "h"), ("--plain-rounding",)))
    assert by_gptq.returncode == 0 and json.loads(by_gptq.stdout) == json.loads(by_rounding.stdout)


@pytest.fixture(scope="module", params=["legal-ttt-691", "caseops-1934"])
def finished(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return folder, write_run(folder, request.param)


def test_a_run_becomes_an_artifact_with_its_ledger(pgolf, finished):
    """Quantized, packed, unpacked: the same bits, so the same loss exactly."""
    folder, settings = finished
    done = pgolf("quantize", folder, "--device", "cpu", "--json")
    assert done.returncode == 0, done.stderr
    report, uses_gptq = json.loads(done.stdout), settings.quantize.table == "caseops-1934"
    assert (report["seconds"]["calibrate"] > 0) == uses_gptq and ("past the cap" in done.stderr) == uses_gptq
    done = pgolf("pack", folder, "--json")
    assert done.returncode == 0, done.stderr
    sizes = json.loads(done.stdout)
    path = folder / "artifact.pglf"
    assert sizes["bytes"] == path.stat().st_size == pytest.approx(report["forecast_bytes"], rel=0.02)
    assert json.loads((folder / "ledger.json").read_text()) == sizes
    assert json.loads((folder / "quantize.json").read_text()) == report

    source = export.read_run(folder)
    loaded_settings, model = export.load_model(path, expect=settings)
    assert loaded_settings.quantize == settings.quantize
    expected = export.build_model(settings, export.quantize_run(source, "cpu").tensors)
    tokens = torch.from_numpy(np.random.default_rng(1).integers(0, 96, (4, 33)))
    losses = [m(tokens[:, :-1], tokens[:, 1:], reduction="none") for m in (model, expected)]
    assert torch.equal(*losses)


def test_gptq_calibrates_on_training_text_alone(finished, tmp_path):
    folder, settings = finished
    if settings.quantize.table != "caseops-1934":
        pytest.skip("its table has no GPTQ")
    source = export.read_run(folder)
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / shard_name("train", 0)).symlink_to(folder / shard_name("train", 0))
    without_validation = export.quantize_run(source, "cpu", data=tmp_path / "train").tensors
    assert same(without_validation, export.quantize_run(source, "cpu").tensors)
    assert not same(without_validation, export.quantize_run(source, "cpu", plain_rounding=True).tensors)
    write_shard(tmp_path / shard_name("train", 0), np.full(9000, 96, np.uint16))
    with pytest.raises(UserError, match="token 96 is outside the vocabulary of 96"):
        export.quantize_run(source, "cpu", data=tmp_path)


def test_the_strict_count_decides_when_asked(pgolf, tmp_path):
    (tmp_path / "small").write_bytes(pack({"x": torch.zeros(8)}))
    (tmp_path / "train_gpt.py").write_text("#" * CAP_BYTES)  # nothing when wrapped
    for options, code, count in (((), 0, "wrapped"), (("--strict",), 1, "strict")):
        done = pgolf("pack", tmp_path / "small", "--code", tmp_path / "train_gpt.py", *options)
        assert done.returncode == code and f"the cap with code counted {count}" in done.stdout


def test_an_installed_package_says_that_its_kernels_are_not_counted(pgolf, tmp_path, monkeypatch):
    (tmp_path / "small").write_bytes(pack({"x": torch.zeros(8)}))
    assert "not counted" not in pgolf("pack", tmp_path / "small").stdout
    (tmp_path / "installed").mkdir()
    (tmp_path / "installed" / "pgolf_fast").symlink_to(Path(pgolf_fast.__file__).parent)
    monkeypatch.setattr(pgolf_fast, "__file__", str(tmp_path / "installed" / "pgolf_fast" / "__init__.py"))
    done = pgolf("pack", tmp_path / "small")
    assert done.returncode == 0 and "the kernels' sources are not counted: an installed package has none" in " ".join(done.stdout.split())


def test_an_unfinished_run_is_refused(pgolf, finished, tmp_path):
    folder, _ = finished
    for name in ("recipe.json", "model.safetensors"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    (tmp_path / "events.jsonl").write_text('{"event": "step", "step": 1}\n{"eve')
    done = pgolf("quantize", tmp_path)
    assert done.returncode == 2 and "did not come to its end" in done.stderr


def test_wrong_input_is_one_sentence(pgolf, tmp_path):
    (tmp_path / "text").write_text("hello")
    for arguments, message in (
        (("quantize", tmp_path / "none", "--table", "caseops-1934"), "source: nothing at"),
        (("quantize", tmp_path / "text"), "table: say whose schemes"),
        (("quantize", tmp_path), "is no run's folder"),
        (("pack", tmp_path), "run pgolf quantize"),
        (("quantize", tmp_path / "text", "--table", "caseops-1934"), "is not a safetensors file"),
        (("pack", tmp_path / "none"), "source: cannot read"),
        (("pack", tmp_path / "text"), "artifact: 5 bytes are too few"),
    ):
        done = pgolf(*arguments)
        assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1, done.stderr
