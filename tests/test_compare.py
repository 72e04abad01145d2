"""`pgolf compare`, from a command line to its verdicts."""

import json
import math
import sys

import pytest

from pgolf_fast.__main__ import main
from tests.test_run_report import write_run
from tests.test_significance import PR_549, PR_1019


@pytest.fixture
def compare(monkeypatch, capsys):
    """The result as a dict if all is well; the message if not."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["pgolf", "compare", *map(str, arguments), "--json"])
        with pytest.raises(SystemExit) as done:
            main()
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return json.loads(out) if done.value.code == 0 else err

    return call


@pytest.fixture
def run(tmp_path):
    def make(name, bpb, nats, seed, **changes):
        end = {"event": "end", "val_loss": nats, "val_bpb": bpb, "ledger_s": {}}
        step = {"event": "step", "step": 1, "train_loss": 2.0, "lr_factor": 1.0, "train_s": 1.0}
        folder = write_run(tmp_path / name, [step, end], seed=seed)
        for file in ("machine.json", "recipe.json"):
            content = json.loads((folder / file).read_text())
            place = content if file == "machine.json" else {}
            place.update({k: v for k, v in changes.items() if k != "layers"})
            if file == "recipe.json" and "layers" in changes:
                content["settings"]["model.num_layers"]["value"] = changes["layers"]
            (folder / file).write_text(json.dumps(content))
        return folder

    return make


def claims(result):
    return {row["claim"]: row for row in result["claims"]}


def test_the_published_comparison_with_both_readings(compare):
    result = compare(*PR_549, "--", *PR_1019, "--bytes-per-token", 2.435)
    assert (result["t"], result["df"]) == pytest.approx((-11.834, 3.306), abs=1e-3)
    found = claims(result)
    assert found["better at all"]["holds"] and found["better at all (chain rule)"]["holds"]
    assert found["by 0.005 nats per token"]["margin"] == pytest.approx(0.00296, abs=1e-5) and found["by 0.005 nats per token"]["holds"]
    per_byte = found["by 0.005 nats per byte"]
    assert per_byte["margin"] == pytest.approx(0.00721, abs=5e-6) and per_byte["holds"] is False and per_byte["more_seeds"] is None


def test_the_other_way_round_is_a_loss(compare):
    result = compare(*PR_1019, "--", *PR_549)
    assert result["t"] > 0 and not any(row["holds"] for row in result["claims"])


def test_without_bytes_per_token_one_reading_is_unknown(compare):
    found = claims(compare(*PR_549, "--", *PR_1019))
    assert found["by 0.005 nats per token"]["holds"] is None and found["by 0.005 nats per byte"]["holds"] is False


def test_plain_numbers_in_nats(compare):
    found = claims(compare(2.01, 2.011, 2.012, "--", 2.0, 2.001, 2.002, "--metric", "nats", "--bytes-per-token", 3.0))
    assert found["by 0.005 nats per token"]["margin"] == 0.005
    assert found["by 0.005 nats per byte"]["margin"] == pytest.approx(0.015)


def test_run_folders_know_their_bytes_per_token(compare, run):
    """val_loss = ln 2 * bytes per token * val_bpb; here 2.5 bytes per token."""
    nats = math.log(2) * 2.5
    folders = [run(f"r{i}", b, nats * b, i) for i, b in enumerate((1.12, 1.121, 1.10, 1.101))]
    result = compare(*folders[:2], "--", *folders[2:])
    assert result["unit"] == "bpb" and result["gain"] == pytest.approx(0.02)
    assert claims(result)["by 0.005 nats per token"]["margin"] == pytest.approx(0.005 / nats)
    assert result["flags"] == []


def test_tokenizers_do_not_compare_per_token(compare, run):
    scores = [("a", 1.12, 2.0), ("b", 1.121, 2.001), ("c", 1.10, 2.9), ("d", 1.101, 2.901)]
    folders = [run(name, bpb, nats, i) for i, (name, bpb, nats) in enumerate(scores)]
    assert claims(compare(*folders[:2], "--", *folders[2:]))["by 0.005 nats per token"]["holds"] is None


def test_what_changed_is_named_and_what_must_not_is_flagged(compare, run):
    old = [run(f"o{i}", 1.12 + i / 1000, 2.0, i) for i in range(2)]
    new = [run("n0", 1.10, 2.0, 7, layers=5, torch="2.11.0"), run("n1", 1.101, 2.0, 7, layers=5, torch="2.11.0", commit="9f-dirty")]
    result = compare(*old, "--", *new)
    assert result["changed_settings"] == {"model.num_layers": ["4", "5"]}
    said = "\n".join(result["flags"])
    assert "torch differs: old 2.13.0; new 2.11.0" in said
    assert "new: a seed occurs twice (7, 7)" in said
    assert "new: its runs come from different code: 1abc, 9f-dirty" in said
    assert "changes that no commit holds" in said
    assert "old:" not in said


def test_a_plain_number_beside_a_run_differs_in_no_setting(compare, run):
    assert compare(run("o0", 1.12, 2.0, 0), 1.121, "--", 1.10, 1.101)["flags"] == []


def test_a_side_of_several_experiments_is_flagged(compare, run):
    old = [run("o0", 1.12, 2.0, 0), run("o1", 1.121, 2.0, 1, layers=9)]
    result = compare(*old, "--", 1.10, 1.101)
    assert any("old: its runs differ in model.num_layers" in flag for flag in result["flags"])
    assert result["changed_settings"] == {}


def test_a_submission_counts_as_its_seeds(compare, tmp_path):
    rows = {str(s): {"val_bpb": b, "val_loss": 1.69 * b} for s, b in zip((314, 42, 999), PR_1019)}
    path = tmp_path / "submission.json"
    path.write_text(json.dumps({"val_bpb": 1.1147, "seed_results": rows}))
    result = compare(*PR_549, "--", path)
    assert result["new"]["n"] == 3 and result["t"] == pytest.approx(-11.834, abs=1e-3)


def test_one_result_file_is_one_score(compare, tmp_path):
    for name, bpb in (("a", 1.10), ("b", 1.101)):
        (tmp_path / name).write_text(json.dumps({"val_bpb": bpb, "steps": 3}))
    assert compare(1.12, 1.121, "--", tmp_path / "a", tmp_path / "b")["new"]["scores"] == [1.10, 1.101]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["1.1", "1.2"], "with one -- between"),
        (["1.1", "1.2", "--", "1.0", "--", "1.0"], "with one -- between"),
        (["1.1", "1.2", "--", "1.0"], "1 on the new side"),
        (["1.1", "1.1", "--", "1.0", "1.0"], "no spread"),
        (["1.1", "nan", "--", "1.0", "1.01"], "positive number, got nan"),
        (["1.1", "inf", "--", "1.0", "1.01"], "positive number, got inf"),
        (["1.1", "0", "--", "1.0", "1.01"], "positive number, got 0"),
        (["1.1", "1.2", "--", "1.0", "nowhere"], "'nowhere' is no number"),
        (["1.1", "1.2", "--", "1.0", "1.01", "--bytes-per-token", "-1"], "bytes_per_token"),
    ],
)
def test_bad_input_is_one_sentence(compare, arguments, message):
    said = compare(*arguments)
    assert message in said and len(said.splitlines()) == 1


def test_units_do_not_mix(compare, tmp_path):
    (tmp_path / "nats").write_text('{"val_loss": 2.0}')
    assert "give them in one unit" in compare(1.1, 1.2, "--", 1.0, tmp_path / "nats")


def test_files_without_a_score_are_named(compare, tmp_path):
    for content in ("[]", "{}", '{"val_bpb": true}', "not json"):
        (tmp_path / "x").write_text(content)
        assert str(tmp_path / "x") in compare(1.1, 1.2, "--", 1.0, tmp_path / "x")


def test_a_run_that_has_not_finished_has_no_score(compare, tmp_path):
    step = {"event": "step", "step": 1, "train_loss": 2.0, "lr_factor": 1.0, "train_s": 1.0}
    folder = write_run(tmp_path / "run", [step])
    assert "has not finished" in compare(1.1, 1.2, "--", 1.0, folder)


def test_an_evaluation_of_a_run_counts_where_it_is_asked_for(compare, run):
    folders = [run(f"r{i}", 1.12 + i / 1000, 2.0, i) for i in range(4)]
    for i, folder in enumerate(folders):
        (folder / "artifact.eval").mkdir()
        row = {"bits_per_byte": round(1.05 - i / 1000, 3), "nats_per_token": 1.9}
        (folder / "artifact.eval" / "artifact-sliding.json").write_text(json.dumps(row))
    result = compare(*folders[:2], "--", *folders[2:], "--score", "artifact-sliding")
    assert result["old"]["scores"] == [1.05, 1.049] and result["gain"] == pytest.approx(0.002)
    assert compare(*folders[:2], "--", *folders[2:])["old"]["scores"] == [1.12, 1.121]
    assert "no evaluation 'sliding'; there is artifact-sliding" in compare(*folders[:2], "--", *folders[2:], "--score", "sliding")
    files = [folder / "artifact.eval" / "artifact-sliding.json" for folder in folders]
    assert compare(*files[:2], "--", *files[2:])["new"]["scores"] == [1.048, 1.047]
