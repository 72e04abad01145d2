"""What a run's folder says of the code that made it, and its log after a kill."""

import contextlib
import json
import resource
import subprocess

import pytest

import pgolf_fast
from pgolf_fast import export, recipe, run_record, runlog
from pgolf_fast.errors import UserError

INSTALLED = f"pgolf_fast {pgolf_fast.__version__}"


def test_the_commit_is_the_checkouts_own(tmp_path, monkeypatch):
    """Not that of a checkout around an installed package, and none where there is no git."""
    git = ["git", "-C", tmp_path, "-c", "user.name=a", "-c", "user.email=a@b"]
    for arguments in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "somebody's"]):
        subprocess.run([*git, *arguments], check=True)
    theirs = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True).stdout.strip()
    monkeypatch.delenv("PGOLF_COMMIT", raising=False)
    for place, said in (("pgolf_fast", theirs), ("venv/site-packages/pgolf_fast", INSTALLED)):
        monkeypatch.setattr(pgolf_fast, "__file__", str(tmp_path / place / "__init__.py"))
        (tmp_path / place).mkdir(parents=True)
        assert runlog.commit() == said
    monkeypatch.setattr(pgolf_fast, "__file__", str(tmp_path / "pgolf_fast" / "__init__.py"))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert runlog.commit() == INSTALLED


def test_a_line_cut_off_costs_only_itself(tmp_path):
    """The resumed run's first event says which steps do not count."""
    (tmp_path / "events.jsonl").write_text('{"event": "step", "step": 3}\n{"event": "step", "st')
    (tmp_path / "log.txt").write_text("step:3/8 train_lo")
    for _ in range(2):
        log = runlog.RunLog(tmp_path, writes=True, echo=lambda text: None)
        log.event("resume", step=2)
        log.line("step:3/8")
        log.close()
    assert [event["event"] for event in runlog.events(tmp_path)] == ["step", "resume", "resume"]
    assert (tmp_path / "log.txt").read_text() == "step:3/8 train_lo\nstep:3/8\nstep:3/8\n"


DAMAGES = {
    "an empty file": lambda record: None,
    "a list": lambda record: [record],
    "no name": lambda record: record.pop("name") and record,
    "no settings": lambda record: record.pop("settings") and record,
    "a bare value": lambda record: record["settings"].update({"train.seed": 7}) or record,
    "no value": lambda record: record["settings"]["train.seed"].pop("value") and record,
    "no source": lambda record: record["settings"]["train.seed"].pop("source") and record,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_recipe_that_a_hand_damaged_is_named(tmp_path, damage):
    """By whatever reads a run: these were a KeyError."""
    record = DAMAGES[damage](recipe.resolve("tiny", environ={}).record())
    (tmp_path / "recipe.json").write_text(json.dumps(record) if record else "")
    (tmp_path / "machine.json").write_text("{}")
    (tmp_path / "events.jsonl").write_text('3\n{"event": "step", "step": 1, "train_s": 1}\n{"event": "end"}\n')
    for read in (export.read_run, run_record.read_record):
        with pytest.raises(UserError, match=r"recipe.json: (damaged: .*pgolf recipes NAME .*--json|cannot be read)"):
            read(tmp_path)


@contextlib.contextmanager
def disk_full_after(path, more):
    """Files of this process may grow to `more` bytes beyond what `path` has: a write that does not fit is done in part, then refused."""
    limit, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + more, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))


def test_a_full_disk_does_not_end_a_run(tmp_path):
    """What could not be written is written once there is room; the user hears of it once."""
    shown = []
    log = runlog.RunLog(tmp_path, writes=True, echo=shown.append)
    log.event("step", step=1)
    with disk_full_after(tmp_path / "events.jsonl", 5):
        log.event("step", step=2)
        log.event("step", step=3)
        (told,) = shown
        assert "File too large" in told and "the run goes on" in told
        assert [event["step"] for event in runlog.events(tmp_path)] == [1]
    log.event("step", step=4)
    log.close()
    assert [event["step"] for event in runlog.events(tmp_path)] == [1, 2, 3, 4] and len(shown) == 1


def test_an_end_that_could_not_be_logged_is_an_error(tmp_path):
    log = runlog.RunLog(tmp_path, writes=True, echo=lambda text: None)
    log.event("step", step=1)
    with disk_full_after(tmp_path / "events.jsonl", 5), pytest.raises(UserError, match="the last .. bytes of its log .*--resume"):
        log.event("end", steps=1)
        log.close()


def test_a_run_goes_on_when_nobody_reads(tmp_path):
    def closed(text):
        raise BrokenPipeError

    log = runlog.RunLog(tmp_path, writes=True, echo=closed)
    log.line("step:1/2")
    log.close()
    assert (tmp_path / "log.txt").read_text() == "step:1/2\n"
