"""`pgolf quantize` and `pgolf pack`, from a checkpoint file to a packed one."""

import dataclasses
import json
import sys

import pytest
import torch
from safetensors.torch import save_file

from benchmarks.states import synthetic_state
from pgolf_fast.__main__ import main
from pgolf_fast.artifact import pack, unpack
from pgolf_fast.ledger import CAP_BYTES
from pgolf_fast.quantize import PUBLISHED, dequantize, quantize


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


def test_wrong_input_is_one_sentence(pgolf, tmp_path):
    (tmp_path / "text").write_text("hello")
    for arguments, message in (
        (("quantize", tmp_path / "none", "--table", "caseops-1934"), "checkpoint: no file at"),
        (("quantize", tmp_path / "text", "--table", "caseops-1934"), "is not a safetensors file"),
        (("pack", tmp_path / "none"), "source: cannot read"),
        (("pack", tmp_path / "text"), "artifact: 5 bytes are too few"),
    ):
        done = pgolf(*arguments)
        assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1, done.stderr
