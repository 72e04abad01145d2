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


def test_parity_is_of_the_mean_to_the_nearest_seed(tmp_path):
    published = {"a": {"25": 4.862, "50": 4.0}, "b": {"25": 4.822, "50": 4.1}}
    for seed, losses in ((2, {"25": 4.85, "50": 4.01}), (1, {"25": 4.83})):
        run = {"recipe": "r", "seed": seed, "train_loss": losses, "published_script": published}
        (tmp_path / f"parity_r_seed{seed}.json").write_text(json.dumps(run))
    table = report.parity_table(tmp_path)
    assert "| r | 25 | 4.830, 4.850 | 4.862, 4.822 | +0.018 |" in table
    assert "| r | 50 | 4.010 | 4.000, 4.100 | +0.010 |" in table


def test_steps_stand_beside_the_published_script_on_as_many_gpus(tmp_path):
    row = {"recipe": "caseops-1934", "contestant": "ours", "visits": 11, "gpus": 1, "ms": 42.65, "tokens_per_s": 2.3e6, "mfu": 0.5, "memory_gib": 20.0}
    rows = [row, row | {"gpus": 2}, row | {"contestant": "torch.compile", "ms": 99.9}]
    (tmp_path / "train_step_1x.json").write_text(json.dumps({"environment": ENVIRONMENT, "steps": rows}))
    table = report.step_table(tmp_path)
    assert "| caseops-1934 | 11 | 1 | 42.6 | 85.3 | 0.50 | 2.30 | 50.0% | 20.0 | abc |" in table
    assert "| caseops-1934 | 11 | 2 | 42.6 | - | - |" in table and "99.9" not in table


def test_scores_stand_under_what_quantization_cost(tmp_path):
    both = {"trained": 2.5, "quantized": 2.6}
    (tmp_path / "quantize_r.json").write_text(json.dumps({"recipe": "r", "loss": both, "bpb": both, "bytes": {"artifact": 1234567}}))
    scores = [{"evaluator": name, "nats_per_token": 2.4, "bits_per_byte": 1.4, "scoring_s": 3.0} for name in ("plain", "sliding")]
    (tmp_path / "scores_r.json").write_text(json.dumps({"tokens": 1000, "scores": scores}))
    table = report.score_table(tmp_path)
    assert "| r | quantized, plain | 2.6000 | 2.6000 | all | - | 1,234,567 |" in table
    assert "| r | quantized, sliding | 2.4000 | 1.4000 | 1,000 | 3.0 | |" in table and table.count("plain") == 2


def test_only_the_text_between_the_markers_changes(monkeypatch):
    monkeypatch.setattr(report, "TABLES", {"kernels": lambda: "new"})
    assert report.rewrite("a <!-- table:kernels -->\nold\n<!-- /table:kernels --> b") == "a <!-- table:kernels -->\nnew\n<!-- /table:kernels --> b"
    with pytest.raises(SystemExit, match="markers"):
        report.rewrite("no markers")


def test_the_readme_says_what_the_results_say():
    assert report.rewrite(report.README.read_text()) == report.README.read_text()
