"""What a run's folder says of the code that made it, and its log after a kill."""

import subprocess

import pgolf_fast
from pgolf_fast import runlog

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
