"""The README's tables come from the stored results, losing rows included."""

import json

import pytest
import torch

from benchmarks import report
from benchmarks import run as bench

ENVIRONMENT = {"device": "NVIDIA H200", "torch": "2.11.0", "commit": "abc"}


def run(ours, peer):
    timings = {"ours": {"median_us": ours}, "torch": {"median_us": peer}, "slow": {"median_us": 10 * peer}}
    return {"environment": ENVIRONMENT, "ceilings": {}, "rows": [{"op": "op", "case": "case", "floor_us": 50.0, "timings": timings}]}


def test_a_row_names_the_best_peer_and_the_share_of_the_floor():
    assert "| op | case | 100.0 | - | 250.0 (torch) | 2.50x | 0.50 | abc |" in report.kernel_table([run(100.0, 250.0)])


def test_losing_rows_stay():
    assert "| 0.50x |" in report.kernel_table([run(100.0, 50.0)])


def test_parity_is_of_the_mean_to_the_nearest_seed(tmp_path):
    published = {"a": {"25": 4.862, "50": 4.0}, "b": {"25": 4.822, "50": 4.1}}
    for seed, losses in ((2, {"25": 4.85, "50": 4.01}), (1, {"25": 4.83})):
        run = {"recipe": "r", "seed": seed, "train_loss": losses, "published_script": published}
        (tmp_path / f"parity_r_seed{seed}.h200.json").write_text(json.dumps(run))
    table = report.parity_table(tmp_path)
    assert "| r | 25 | 4.830, 4.850 | 4.862, 4.822 | +0.018 |" in table
    assert "| r | 50 | 4.010 | 4.000, 4.100 | +0.010 |" in table


def test_steps_stand_beside_the_published_script_on_as_many_gpus_and_torch_compile(tmp_path):
    row = {
        "recipe": "caseops-1934",
        "contestant": "ours",
        "visits": 11,
        "gpus": 1,
        "ms": 42.65,
        "tokens_per_s": 2.3e6,
        "mfu": 0.5,
        "memory_gib": 20.0,
    }
    rows = [row, row | {"contestant": "torch.compile", "ms": 106.625}]
    (tmp_path / "train_step_1x.h200.json").write_text(json.dumps({"environment": ENVIRONMENT, "steps": rows}))
    (tmp_path / "train_step_2x.h200.json").write_text(json.dumps({"environment": ENVIRONMENT, "steps": [row | {"gpus": 2}]}))
    table = report.step_table(tmp_path)
    assert "| caseops-1934 | 11 | 1 | 42.6 | 49 | 85.3 | 0.50 | 106.6 | 0.40 | 2.30 | 50.0% | 20.0 | abc |" in table
    assert "| caseops-1934 | 11 | 2 | 42.6 | - | - | - | - | - |" in table and len(table.splitlines()) == 4


def test_quantization_stands_beside_the_published_rise(tmp_path):
    run = {
        "recipe": "r",
        "train_s": 54.3,
        "bpb": {"trained": 1.25, "quantized": 1.2575},
        "published_gap_bpb": 0.0081,
        "bytes": {"artifact": 1234567},
    }
    rooms = [{"room": "strict", "bpb": 9.0, "total": 1}, {"room": "wrapped", "bpb": 1.2515, "total": 15_900_000}]
    (tmp_path / "quantize_r.h200.json").write_text(json.dumps(run | {"fit": {"rooms": rooms}}))
    (tmp_path / "quantize_s.h200.json").write_text(json.dumps(run | {"recipe": "s", "published_gap_bpb": None}))
    table = report.quantization_table(tmp_path)
    assert "| r | 54 | 1.2500 | 1.2575 | 0.0075 | 0.0081 | 1,234,567 | 0.0015 | 15,900,000 |" in table
    assert "| s | 54 | 1.2500 | 1.2575 | 0.0075 | not logged | 1,234,567 | - | - |" in table


def test_scores_name_their_run(tmp_path):
    scores = [{"weights": "artifact", "evaluator": "sliding", "nats_per_token": 2.4, "bits_per_byte": 1.4, "scoring_s": 3.0}]
    run = {"recipe": "r", "run": "300 steps, as another", "tokens": 1000, "scores": scores}
    (tmp_path / "scores_r.h200.json").write_text(json.dumps(run))
    (tmp_path / "scores_r.cpu.json").write_text(json.dumps(run | {"run": "another device's"}))
    table = report.score_table(tmp_path)
    assert "| r | 300 steps | artifact, sliding | 2.4000 | 1.4000 | 1,000 | 3.0 |" in table and len(table.splitlines()) == 3


def test_only_the_text_between_the_markers_changes(monkeypatch):
    monkeypatch.setattr(report, "TABLES", {"kernels": lambda: "new"})
    assert (
        report.rewrite("a <!-- table:kernels -->\nold\n<!-- /table:kernels --> b")
        == "a <!-- table:kernels -->\nnew\n<!-- /table:kernels --> b"
    )
    with pytest.raises(SystemExit, match="markers"):
        report.rewrite("no markers")


def test_the_readme_says_what_the_results_say():
    assert report.rewrite(report.README.read_text()) == report.README.read_text()


def test_results_are_kept_by_device(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    names = [bench.result_path("scores", torch.device(kind), tmp_path / "new").name for kind in ("cpu", "cuda")]
    assert names == ["scores.cpu.json", "scores.h100-80gb-hbm3.json"] and (tmp_path / "new").is_dir()
