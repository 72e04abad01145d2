"""The README's tables come from the stored results, losing rows included."""

import json

import pytest

from benchmarks import report

ENVIRONMENT = {"device": "NVIDIA H200", "torch": "2.11.0", "commit": "abc"}


def run(ours, peer):
    timings = {"ours": {"median_us": ours}, "torch": {"median_us": peer}, "slow": {"median_us": 10 * peer}}
    return {"environment": ENVIRONMENT, "ceilings": {}, "rows": [{"op": "op", "case": "case", "floor_us": 50.0, "timings": timings}]}


def test_a_row_names_the_best_peer_and_the_share_of_the_floor():
    assert "| op | case | 100.0 | 250.0 (torch) | 2.50x | 0.50 | abc |" in report.kernel_table([run(100.0, 250.0)])


def test_losing_rows_stay():
    assert "| 0.50x |" in report.kernel_table([run(100.0, 50.0)])


def test_parity_is_judged_against_the_nearest_seed(tmp_path):
    run = {"recipe": "r", "train_loss": {"25": 4.84}, "published_script": {"a": {"25": 4.862}, "b": {"25": 4.822}}}
    (tmp_path / "parity_r.json").write_text(json.dumps(run))
    assert "| r | 25 | 4.840 | 4.862, 4.822 | +0.018 |" in report.parity_table(tmp_path)


def test_only_the_text_between_the_markers_changes(monkeypatch):
    monkeypatch.setattr(report, "TABLES", {"kernels": lambda: "new"})
    assert report.rewrite("a <!-- table:kernels -->\nold\n<!-- /table:kernels --> b") == "a <!-- table:kernels -->\nnew\n<!-- /table:kernels --> b"
    with pytest.raises(SystemExit, match="markers"):
        report.rewrite("no markers")


def test_the_readme_says_what_the_results_say():
    assert report.rewrite(report.README.read_text()) == report.README.read_text()
