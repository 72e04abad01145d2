"""`pgolf eval`, from an artifact's path to its table: what it writes, what it refuses, and what a stop leaves behind."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from pgolf_fast import checkpoint, export, recipe
from pgolf_fast.__main__ import main
from pgolf_fast.artifact import pack
from pgolf_fast.data import load_validation
from pgolf_fast.errors import UserError
from pgolf_fast.evaluation.evaluate import Outcome, SavedState, evaluate, make_evaluator
from pgolf_fast.evaluation.referee import Referee
from pgolf_fast.model import GPT
from pgolf_fast.quantize import PUBLISHED, quantize
from pgolf_fast.runlog import RunLog
from pgolf_fast.shards import shard_name, write_shard
from pgolf_fast.step import Step
from tests import corpus

SMALL = ("model.model_dim=32", "model.num_heads=2", "model.num_kv_heads=1", "model.num_layers=2", "model.mlp_mult=2")
SMALL += (f"model.vocab_size={corpus.VOCAB_SIZE}", "model.ve_layers=1", "model.bigram_buckets=64", "model.rope_dims=8")
SMALL += ("model.xsa_last_n=1", "train.seq_len=64")
SMALL += ("eval.seq_len=64", "eval.stride=16", "eval.batch_tokens=1024", "ttt.chunk_tokens=256", "ttt.epochs=2", "ttt.lr=0.02")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A validation split of 2,048 positions, and its tokenizer."""
    folder = tmp_path_factory.mktemp("data")
    tokenizer = corpus.tokenizer(False)
    ids = np.concatenate([np.asarray([1, *tokenizer.encode(text)], np.uint16) for text in corpus.texts()])[:2049]
    write_shard(folder / shard_name("val", 0), ids)
    tokenizer.save(folder / "tokenizer.model")
    return folder


@pytest.fixture(scope="module")
def artifact(tmp_path_factory) -> Path:
    settings = recipe.resolve("legal-ttt-691", SMALL, {}).recipe
    torch.manual_seed(0)
    model = GPT(settings.model, seed=1, stream_dtype=torch.float32)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn(p.shape)
    tensors, _ = quantize(model.published_tensors(), PUBLISHED["legal-ttt-691"], plain_rounding=True)
    path = tmp_path_factory.mktemp("artifact") / "small.pglf"
    path.write_bytes(pack(tensors, "none", export.metadata("legal-ttt-691", settings)))
    return path


@pytest.fixture
def pgolf(monkeypatch, capsys):
    """The command line in this process: exit code, standard output, standard error."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["pgolf", "eval", *map(str, arguments), "--device", "cpu"])
        with pytest.raises(SystemExit) as done:
            main()
        return done.value.code, *capsys.readouterr()

    return call


def test_all_evaluators(pgolf, artifact, data, tmp_path):
    """The scores are those of the model in the file; every one is in the table, in the JSON and in a file of its own."""
    code, out, err = pgolf(artifact, "--data", data, "--out", tmp_path / "out", "--evaluator", "all", "--json")
    assert code == 0, err
    rows = {row["evaluator"]: row for row in json.loads(out)["rows"]}
    assert list(rows) == ["plain", "sliding", "score-first-sgd"]
    for name, row in rows.items():
        settings, model = export.load_model(artifact)
        validation = load_validation(data, 64)
        expected = evaluate(make_evaluator(name, model, settings), Referee(model, validation)).result
        assert (row["bits_per_byte"], row["tokens"], row["ledger"]) == (expected.score.bits_per_byte, 2048, expected.digest)
        assert 0 < row["scoring_s"] <= row["practice_s"] < row["strict_s"]
        assert f"{row['bits_per_byte']:.6f}" in err
        written = json.loads((tmp_path / "out" / f"artifact-{name}.json").read_text())
        assert written["bits_per_byte"] == row["bits_per_byte"] and written["of"]["settings"]["eval.stride"] == 16
    assert rows["sliding"]["bits_per_byte"] != rows["plain"]["bits_per_byte"] != rows["score-first-sgd"]["bits_per_byte"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(f"artifact-{name}.json" for name in rows)


def test_all_of_a_run_begins_with_its_weights_before_quantization(pgolf, artifact, data, tmp_path):
    """And needs not be told on which data."""
    resolved = recipe.resolve("legal-ttt-691", (*SMALL, "eval.evaluator=sliding", f"train.data={data}"), {})
    trained = GPT(resolved.recipe.model, seed=5, stream_dtype=torch.float32)
    log = RunLog(tmp_path / "run", writes=True)
    log.document("recipe.json", resolved.record())
    log.event("end", weights="of the last step", ledger_s={"train": 1.0})
    log.close()
    checkpoint.write(tmp_path / "run" / "model.safetensors", trained.published_tensors(), {})
    (tmp_path / "run" / "artifact.pglf").write_bytes(artifact.read_bytes())
    code, out, err = pgolf(tmp_path / "run", "eval.evaluator=sliding", "--evaluator", "all", "--json")
    rows = json.loads(out)["rows"]
    assert [(row["weights"], row["evaluator"]) for row in rows] == [
        ("before quantization", "plain"),
        ("artifact", "plain"),
        ("artifact", "sliding"),
    ], err
    referee = Referee(trained, load_validation(data, 64))
    expected = evaluate(make_evaluator("plain", trained, resolved.recipe), referee).result.score
    assert rows[0]["bits_per_byte"] == expected.bits_per_byte != rows[1]["bits_per_byte"]


def test_the_recipes_own_evaluator_and_overrides(pgolf, artifact, data, tmp_path):
    code, out, err = pgolf(artifact, "ttt.epochs=1", "eval.published_tail=true", "--data", data, "--out", tmp_path, "--json")
    (row,) = json.loads(out)["rows"]
    assert code == 0 and row["evaluator"] == "score-first-sgd" and row["published_bits_per_byte"] != row["bits_per_byte"]
    assert "published count" in err


def test_the_negative_control_is_marked(pgolf, artifact, data, tmp_path):
    code, out, _ = pgolf(artifact, "sdttt.enabled=true", "--data", data, "--out", tmp_path, "--evaluator", "plain", "--json")
    (row,) = json.loads(out)["rows"]
    assert code == 0 and "not legal" in row["weights"]
    assert [p.name for p in tmp_path.glob("*.json")] == ["artifact-after-SDTTT-not-legal-plain.json"]


@pytest.mark.parametrize("fails", [False, True])
def test_graphs_go_before_the_end(pgolf, artifact, data, tmp_path, monkeypatch, fails):
    """NCCL would wait for them; here that the steps are told, once, whatever happens."""
    closed = []
    monkeypatch.setattr(Step, "close", lambda step: closed.append(step))
    if fails:
        monkeypatch.setattr(Referee, "result", lambda referee: (_ for _ in ()).throw(UserError("no result")))
    code, *_ = pgolf(artifact, "--data", data, "--out", tmp_path / "out", "--evaluator", "score-first-sgd")
    assert (code != 0) == fails
    assert len(closed) == 1


def short(data, folder, num_tokens):
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes((data / "tokenizer.model").read_bytes())
    write_shard(folder / shard_name("val", 0), np.ones(num_tokens, np.uint16))
    return folder


def test_clear_errors(pgolf, artifact, data, tmp_path):
    damaged = tmp_path / "damaged.pglf"
    damaged.write_bytes(artifact.read_bytes()[:-1])
    (tmp_path / "run").mkdir()
    other = tmp_path / "caseops"
    other.mkdir()
    corpus.tokenizer(True).save(other / "tokenizer.model")
    write_shard(other / shard_name("val", 0), np.ones(300, np.uint16))
    cases = [
        ((tmp_path / "none.pglf", "--data", data), "source: no file"),
        ((tmp_path / "run", "--data", data), "`pgolf quantize .*run` and `pgolf pack .*run` make one"),
        ((artifact,), "data: give the folder of the validation shards"),
        ((damaged, "--data", data), "artifact: .*cut short"),
        ((artifact, "--data", tmp_path / "nowhere"), "no such folder"),
        ((artifact, "--data", data, "--recipe", "gepa-598"), "an artifact of recipe legal-ttt-691, whose model"),
        ((artifact, "--data", other), "no fineweb_val_bytes_000000.bin; CaseOps scores count original bytes"),
        ((artifact, "--data", short(data, tmp_path / "short", 64)), "64 validation tokens make no row of 64"),
        ((artifact, "--data", short(data, tmp_path / "empty", 0)), "0 validation tokens make no row|empty|no tokens"),
        ((artifact, "eval.strid=3", "--data", data), "there is no setting 'eval.strid'; the nearest are eval.stride"),
        (
            (artifact, "model.num_layers=3", "--data", data),
            "model.num_layers=3: an evaluation takes eval..*, ttt..*; the rest is the artifact's",
        ),
        ((artifact, "eval.stride=65", "--data", data), "eval.stride: expected 1 to eval.seq_len 64, got 65"),
    ]
    for arguments, message in cases:
        code, out, err = pgolf(*arguments, "--out", tmp_path / "out")
        assert code == 2 and re.search(message, err) and err.count("\n") == 1, (arguments, err)
    assert not (tmp_path / "out").exists()


def test_an_artifact_older_than_what_it_is_packed_from_is_told(pgolf, artifact, data, tmp_path):
    (tmp_path / "artifact.pglf").write_bytes(artifact.read_bytes())
    (tmp_path / "quantized.pglf").write_bytes(b"")
    for seconds, is_told in ((1, True), (-1, False)):
        os.utime(tmp_path / "quantized.pglf", ns=2 * (tmp_path.joinpath("artifact.pglf").stat().st_mtime_ns + seconds * 10**9,))
        code, out, err = pgolf(tmp_path, "--data", data, "--evaluator", "plain")
        assert code == 0 and ("quantized.pglf is newer than" in " ".join(out.split())) == is_told, out + err


def test_a_tokenizer_of_another_size(pgolf, data, tmp_path):
    settings = recipe.resolve("legal-ttt-691", (*SMALL, "model.vocab_size=96"), {}).recipe
    model = GPT(settings.model, seed=1)
    tensors, _ = quantize(model.published_tensors(), PUBLISHED["legal-ttt-691"], plain_rounding=True)
    (tmp_path / "a.pglf").write_bytes(pack(tensors, "none", export.metadata("legal-ttt-691", settings)))
    code, _, err = pgolf(tmp_path / "a.pglf", "--data", data)
    assert code == 2 and f"its tokenizer has {corpus.VOCAB_SIZE} pieces, the model 96" in err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_stopped_in_the_middle(pgolf, artifact, data, tmp_path, number):
    """No result is left; the same command ends with the score of an undisturbed one."""
    slow = ("ttt.epochs=8", "ttt.lr=0.001", "eval.save_seconds=0")
    command = [sys.executable, "-m", "pgolf_fast", "eval", artifact, *slow, "--data", data, "--out", tmp_path / "out", "--device", "cpu"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    child = subprocess.Popen(list(map(str, command)), env=environment, cwd=Path(__file__).parents[1], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 100
    while not list(tmp_path.rglob("step_*.safetensors")) and child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    child.send_signal(number)
    assert child.wait(60) == (130 if number == signal.SIGTERM else -signal.SIGKILL)
    assert not list(tmp_path.rglob("*.json"))
    code, out, err = pgolf(artifact, *slow, "--data", data, "--out", tmp_path / "out", "--json")
    _, whole, _ = pgolf(artifact, *slow, "--data", data, "--out", tmp_path / "other", "--json")
    assert code == 0, err
    one, other = (json.loads(text)["rows"][0] for text in (out, whole))
    assert (one["ledger"], one["bits_per_byte"]) == (other["ledger"], other["bits_per_byte"])


def test_the_strict_clock_counts_earlier_sittings_too(pgolf, artifact, data, tmp_path, monkeypatch):
    monkeypatch.setattr("pgolf_fast.commands.eval.process_age_s", lambda: 10.0)
    monkeypatch.setattr(SavedState, "restore", lambda *_: Outcome(None, scoring_s=1000.0, practice_s=2000.0))
    _, out, _ = pgolf(artifact, "--data", data, "--out", tmp_path, "--evaluator", "plain", "--json")
    (row,) = json.loads(out)["rows"]
    assert 1000 < row["scoring_s"] < 2000 < row["practice_s"] and row["practice_s"] + 10 < row["strict_s"] < 2100


def test_another_evaluation_in_its_place_is_refused(pgolf, artifact, data, tmp_path, monkeypatch):
    monkeypatch.setattr("pgolf_fast.evaluation.evaluate.SavedState.remove", lambda self: None)
    pgolf(artifact, "eval.save_seconds=0", "--data", data, "--out", tmp_path)
    code, _, err = pgolf(artifact, "eval.save_seconds=0", "eval.stride=32", "--data", data, "--out", tmp_path)
    assert code == 2 and "holds an unfinished evaluation with other settings (eval.stride=16, now 32); " in err and "--fresh" in err
    monkeypatch.undo()
    code, *_ = pgolf(artifact, "eval.stride=32", "--data", data, "--out", tmp_path, "--fresh")
    assert code == 0 and not list(tmp_path.rglob("step_*"))
