"""`pgolf data` as its users meet it: arguments, printed result, exit code."""

import contextlib
import dataclasses
import io
import json
import sys
from unittest import mock

import pytest

from pgolf_fast import __main__, shards
from tests import corpus


@dataclasses.dataclass
class Done:
    returncode: int
    stdout: str
    stderr: str


def pgolf_data(*arguments) -> Done:
    """The command in this process: importing torch again for each would take most of the time."""
    out, error = io.StringIO(), io.StringIO()
    with mock.patch.object(sys, "argv", ["pgolf", "data", *map(str, arguments)]), pytest.raises(SystemExit) as exit:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
            __main__.main()
    return Done(exit.value.code, out.getvalue(), error.getvalue())


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Documents, and from them through the command line: a tokenizer and a data set."""
    folder = tmp_path_factory.mktemp("made")
    documents = corpus.write_jsonl(folder / "documents.jsonl", corpus.texts())
    trained = pgolf_data("train-tokenizer", folder / "t.model", "--documents", documents, "--vocab-size", 700, "--caseops", "--json")
    assert trained.returncode == 0, trained.stderr
    arguments = ("--documents", documents, "--tokenizer", folder / "t.model", "--val-documents", 20, "--processes", 1)
    built = pgolf_data("build", folder / "set", *arguments, "--json")
    assert built.returncode == 0, built.stderr
    return folder, json.loads(trained.stdout), json.loads(built.stdout)


def test_train_and_build_say_what_they_made(made):
    folder, trained, built = made
    assert trained["vocab_size"] == 700 and trained["is_caseops"] and (folder / "t.vocab").exists()
    assert trained["sha256"] == corpus.tokenizer(True).sha256
    assert built["splits"]["val"]["documents"] == 20 and built["splits"]["train"]["documents"] == len(corpus.texts()) - 20
    arguments = ("--documents", folder / "documents.jsonl", "--tokenizer", folder / "t.model", "--val-documents", 20)
    assert "already there" in pgolf_data("build", folder / "set", *arguments).stdout
    assert [shard["name"] for shard in built["shards"]] == [shards.shard_name(split, 0) for split in ("val", "val_bytes", "train")]


def test_verify_prints_a_certificate_and_its_verdict_is_the_exit_code(made, tmp_path):
    folder = made[0]
    done = pgolf_data("verify", folder / "set", "--documents", folder / "documents.jsonl", "--processes", 1)
    assert done.returncode == 0 and "data certificate" in done.stdout and "every check passed" in done.stdout
    for path in (folder / "set").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    shards.write_shard(tmp_path / "fineweb_train_000001.bin", [1, 500])
    done = pgolf_data("verify", tmp_path, "--json", "--processes", 1)
    result = json.loads(done.stdout)
    assert done.returncode == 1 and not result["ok"]
    assert any("fineweb_train_000001.bin" in finding["where"] and finding["remedy"] for finding in result["findings"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("verify", "/no/such/folder"), "/no/such/folder: no such folder"),
        (("build", "out", "--documents", "/no/such/file", "--tokenizer", "/no/t.model"), "/no/t.model: no such file"),
        (("train-tokenizer", "t.bin", "--documents", "."), "ends in .model"),
        (("get", "out", "--variant", "sp7"), "'sp7' is none of sp1024, caseops8192"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if arguments[0] == "get":
        pytest.importorskip("huggingface_hub", reason="the [data] extra is not installed")
    done = pgolf_data(*arguments)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1 and not done.stdout


def test_without_the_native_module_only_what_needs_it_is_refused(made, tmp_path, monkeypatch):
    from pgolf_fast import caseops, host, tokenizers

    for module in (caseops, tokenizers):
        monkeypatch.setattr(module, "host", host._NotBuilt())
    done = pgolf_data("build", tmp_path / "set", "--documents", made[0] / "documents.jsonl", "--tokenizer", made[0] / "t.model")
    assert done.returncode == 2 and "the _host module is not built" in done.stderr and "pip install" in done.stderr
    corpus.tokenizer(False).save(tmp_path / "plain.model")
    documents = ("--documents", made[0] / "documents.jsonl", "--tokenizer", tmp_path / "plain.model", "--val-documents", 20)
    assert pgolf_data("build", tmp_path / "plain", *documents, "--processes", 1).returncode == 0
    assert pgolf_data("verify", tmp_path / "plain", "--processes", 1).returncode == 0
