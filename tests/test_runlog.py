"""What a run's folder says of the code that made it."""

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
