"""Run folders read back, and the page that `pgolf report` makes of them."""

import dataclasses
import json
import re
import subprocess
import sys
import xml.etree.ElementTree as xml

import pytest

from pgolf_fast import run_report
from pgolf_fast.errors import UserError
from pgolf_fast.run_record import read_record


def step(number, loss=None, ms=100.0):
    return {"event": "step", "step": number, "train_loss": loss or 2 + 4 / number, "lr_factor": 1.0, "train_s": number * ms / 1e3}


def write_run(folder, events, name="tiny", seed=1):
    folder.mkdir()
    (folder / "events.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events))
    settings = {
        "train.seed": {"value": seed, "source": "command line", "meaning": "of the weights"},
        "model.num_layers": {"value": 4, "source": "tiny", "meaning": "blocks"},
        "model.ve_dim": {"value": 77777, "source": "default", "meaning": "width"},
    }
    (folder / "recipe.json").write_text(json.dumps({"name": name, "note": "a small one", "settings": settings}))
    (folder / "machine.json").write_text(json.dumps({"device": "a CPU", "torch": "2.13.0", "commit": "1abc", "command": ["x", "train"]}))
    return folder


def finished(steps=100, ms=100.0):
    validation = {"event": "validation", "step": steps, "val_loss": 2.5, "val_bpb": 1.25}
    end = {
        "event": "end",
        "steps": steps,
        "weights": "last",
        "val_loss": 2.25,
        "val_bpb": 1.125,
        "ledger_s": {"train": 10.0, "validate": 1.5},
    }
    return [*(step(i, ms=ms) for i in range(1, steps + 1)), validation, end]


def test_a_resumed_run_has_each_step_once_and_as_it_counted(tmp_path):
    events = [step(1), step(2), step(3, loss=9.0), {"event": "resume", "step": 2}, step(3, loss=5.0), step(4)]
    run = read_record(write_run(tmp_path / "run", events))
    assert [e["step"] for e in run.steps] == [1, 2, 3, 4]
    assert run.steps[2]["train_loss"] == 5.0
    assert run.end is None and run.sizes == {}


def test_a_run_that_goes_on_from_its_end_has_not_finished(tmp_path):
    events = [*finished(4), {"event": "resume", "step": 4}, step(5)]
    assert read_record(write_run(tmp_path / "on", events)).end is None
    assert read_record(write_run(tmp_path / "to_its_end", [*events, *finished(5)[-2:]])).end["steps"] == 5


def test_a_line_cut_off_by_a_kill_is_left_out(tmp_path):
    folder = write_run(tmp_path / "run", [step(1), step(2)])
    with open(folder / "events.jsonl", "a") as file:
        file.write('{"event": "step", "st')
    assert len(read_record(folder).steps) == 2


def test_validations_get_the_clock_of_their_step(tmp_path):
    before = {"event": "validation", "step": 0, "val_loss": 7.0, "val_bpb": 4.0}
    run = read_record(write_run(tmp_path / "run", [before, *finished(20)]))
    assert [v["train_s"] for v in run.validations] == [0.0, 2.0]


def test_time_per_step_is_that_of_the_steps_between_two_points(tmp_path):
    """Slow in the second half: a mean from the start would say 150."""
    events = [step(i) if i <= 100 else {**step(i), "train_s": 10 + (i - 100) * 0.2} for i in range(1, 201)]
    times = dict(run_report.ms_per_step(read_record(write_run(tmp_path / "run", events))))
    assert times[100] == pytest.approx(100) and times[200] == pytest.approx(200)


def test_spans_cover_everything_once():
    for count in (1, 7, 400, 401, 20000):
        parts = run_report.spans(count)
        assert [i for s in parts for i in range(count)[s]] == list(range(count)) and len(parts) <= run_report.MAX_POINTS


def test_running_mean():
    assert run_report.running_mean([1.0, 3.0, 5.0, 7.0], 2) == [1.0, 2.0, 4.0, 6.0]
    assert run_report.running_mean([1.0, 3.0], 1) == [1.0, 3.0]


def test_evaluations_are_in_the_page_with_their_three_clocks(tmp_path):
    folder = write_run(tmp_path / "run", finished())
    (folder / "artifact.eval").mkdir()
    row = {"weights": "artifact", "evaluator": "sliding", "nats_per_token": 2.125, "bits_per_byte": 1.0625}
    row |= {"strict_s": 31.0, "practice_s": 22.5, "scoring_s": 20.25}
    (folder / "artifact.eval" / "artifact-sliding.json").write_text(json.dumps(row))
    run = read_record(folder)
    page = run_report.page([run], run_report.draw([run]))
    for said in ("<h2>Scores</h2>", "sliding", "2.1250", "1.0625", "31.0 s", "22.5 s", "20.2 s"):
        assert said in page, said


@pytest.fixture
def two_runs(tmp_path):
    ledger = {"weights": {"tok_emb": 5000, "rest": 300}, "metadata": 40, "code": {"wrapped": 2000, "strict": 9000}, "count": "wrapped"}
    folders = [write_run(tmp_path / name, finished(ms=ms), seed=seed) for name, seed, ms in (("one", 1, 100.0), ("two", 2, 110.0))]
    for folder in folders:
        (folder / "ledger.json").write_text(json.dumps(ledger))
    return [read_record(folder) for folder in folders], 7340


def test_the_page_needs_nothing_else_and_says_what_the_runs_were(two_runs, tmp_path):
    runs, total_bytes = two_runs
    paths = run_report.write(runs, tmp_path / "report")
    page = (tmp_path / "report" / "report.html").read_text()
    assert [p.name for p in paths if p.suffix == ".svg"] == [f"{name}.svg" for name in run_report.CAPTIONS]
    assert page.count("<svg") == page.count("</svg>") == len(run_report.CAPTIONS)
    assert "<h2>Scores</h2>" not in page, "nothing was evaluated"
    assert "<script" not in page and "<link" not in page and "@import" not in page
    assert not re.search(r"""(src|href)\s*=\s*["'](?!#)""", page), "something is loaded from elsewhere"
    for said in (
        "one",
        "two",
        "2.2500",
        "1.1250",
        f"{total_bytes:,}",
        "1.5 s",
        "110.0",
        "1abc",
        "pgolf train",
        "model.num_layers",
        "a small one",
    ):
        assert said in page, said
    assert "77777" not in page, "a default is not what the run is about"
    for path in paths:
        data = path.read_bytes()
        if path.suffix == ".svg":
            assert xml.fromstring(data).tag.endswith("svg")
        assert path.suffix != ".png" or data.startswith(b"\x89PNG")


def test_the_curves_are_the_events(two_runs):
    matplotlib, figure_class = run_report._matplotlib()
    runs, _ = two_runs
    with matplotlib.rc_context(run_report.STYLE):
        by_step = run_report._loss(figure_class, runs, "step", "step").axes[0]
        by_clock = run_report._loss(figure_class, runs, "train_s", "s").axes[0]
    logged, smooth, held, *_ = by_step.lines
    assert list(logged.get_ydata()) == [e["train_loss"] for e in runs[0].steps]
    assert smooth.get_ydata()[-1] == pytest.approx(2 + sum(4 / number for number in range(96, 101)) / 5), "of a twentieth of the run"
    assert list(held.get_xydata()[0]) == [100, 2.5]
    assert list(by_clock.lines[0].get_xdata()) == [e["train_s"] for e in runs[0].steps]
    assert [line.get_text() for line in by_step.get_legend().get_texts()] == ["one", "two"]
    low, high = by_step.get_ylim()
    assert low < 2.04 and 2.6 < high < 6, "the frame shows the run, not its first steps"
    worse = dataclasses.replace(runs[1], steps=[e | {"train_loss": e["train_loss"] + 3} for e in runs[1].steps])
    for both in ([runs[0], worse], [worse, runs[0]]):
        low, high = run_report._loss(figure_class, both, "step", "step").axes[0].get_ylim()
        assert low < 2.04 and 5.6 < high, "the frame shows every run"


def test_the_bars_are_the_bytes_of_the_ledger(two_runs):
    _, figure_class = run_report._matplotlib()
    axes = run_report._sizes(figure_class, two_runs[0]).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["metadata", "scales, unquantized", "code, wrapped", "tok_emb"]
    for bars, name in zip(axes.containers, ("one", "two"), strict=True):
        assert bars.get_label() == name and [bar.get_width() for bar in bars] == [40, 300, 2000, 5000]
        rows = [bar.get_y() + bar.get_height() / 2 for bar in bars]
        assert [round(row) for row in rows] == [0, 1, 2, 3]
    unpacked = dataclasses.replace(two_runs[0][0], sizes={})
    assert "sizes" in run_report.draw([unpacked, two_runs[0][1]])


def test_the_same_runs_give_the_same_bytes(two_runs):
    runs, _ = two_runs
    assert run_report.draw(runs) == run_report.draw(runs)


def test_text_of_a_run_is_text_in_the_page(tmp_path):
    run = read_record(write_run(tmp_path / "run", finished(), name="<script>alert(1)</script>"))
    assert "<script" not in run_report.page([run], run_report.draw([run]))


def test_a_run_of_one_step_has_a_page(tmp_path):
    run = read_record(write_run(tmp_path / "run", [step(1)]))
    assert "1, unfinished" in run_report.page([run], run_report.draw([run]))


def test_more_runs_than_colours_are_refused(tmp_path):
    run = read_record(write_run(tmp_path / "run", finished()))
    with pytest.raises(UserError, match="at most 6"):
        run_report.draw([run] * 7)


def test_without_matplotlib_the_message_says_what_to_install(tmp_path, monkeypatch):
    run = read_record(write_run(tmp_path / "run", finished()))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match=r"pip install 'pgolf-fast\[report\]'"):
        run_report.draw([run])


def broken(tmp_path, kind):
    folder = tmp_path / "run"
    if kind == "no folder":
        return folder, "no events.jsonl"
    if kind == "no step":
        return write_run(folder, [{"event": "validation", "step": 0, "val_loss": 7.0, "val_bpb": 3.0}]), "holds no training step"
    write_run(folder, finished())
    if kind == "no recipe":
        (folder / "recipe.json").unlink()
        return folder, "recipe.json: cannot be read"
    if kind == "a list for a machine":
        (folder / "machine.json").write_text("[]")
        return folder, "machine.json: cannot be read"
    (folder / "ledger.json").write_text("{not json" if kind == "a damaged ledger" else "{}")
    return folder, "ledger.json: cannot be read" if kind == "a damaged ledger" else "ledger.json: is no ledger; `pgolf pack"


@pytest.mark.parametrize("kind", ["no folder", "no step", "no recipe", "a list for a machine", "a damaged ledger", "an empty ledger"])
def test_a_broken_run_folder_is_one_clear_sentence(tmp_path, kind):
    folder, message = broken(tmp_path, kind)
    with pytest.raises(UserError, match=re.escape(message)):
        read_record(folder)


def test_the_command(two_runs, tmp_path):
    runs, _ = two_runs
    command = [sys.executable, "-m", "pgolf_fast", "report", "--out", str(tmp_path / "out"), "--json"]
    done = subprocess.run([*command, *(str(run.folder) for run in runs)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["page"] == str(tmp_path / "out" / "report.html")
    done = subprocess.run([*command, str(tmp_path / "none")], capture_output=True, text=True)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "no events.jsonl" in done.stderr
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "give one or more run folders" in done.stderr
