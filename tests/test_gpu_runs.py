"""Whole runs on GPUs, of a model of the least width that the kernels serve: the same bits twice, killed and resumed, on several GPUs."""

import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch

from pgolf_fast import checkpoint, recipe
from pgolf_fast.train import Trainer
from tests import test_train
from tests.test_train import assert_equal_runs, command, data, losses, run_ranks, without_a_tokenizer  # noqa: F401  fixtures

SETTINGS = (
    *test_train.MINI,
    "model.model_dim=128",
    "model.num_heads=2",
    "model.num_kv_heads=1",
    "model.rope_dims=16",
    "schedule.iterations=12",
)
FUSED = (
    *("model.model_dim=512", "model.num_heads=8", "model.num_kv_heads=4"),
    *("train.batch_tokens=16384", "train.micro_batches=8", "train.seq_len=256", "train.warmup_steps=3"),
)
EXACT = ("train.deterministic=true", "train.checkpoint_every=1")

pytestmark = [pytest.mark.gpu, pytest.mark.cuda]


@pytest.fixture(autouse=True)
def deterministic_off_again():
    yield
    torch.use_deterministic_algorithms(False)


def make(data, folder, *overrides, resume=False):
    resolved = recipe.resolve("tiny", (*SETTINGS, f"train.data={data}", *overrides), environ={})
    return Trainer(resolved, Path(folder), "cuda", echo=lambda text: None, resume=resume)


def test_deterministic_runs_are_the_same_bits(data, tmp_path):
    for name in ("one", "other"):
        make(data, tmp_path / name, *EXACT).run()
    assert_equal_runs(tmp_path / "one", tmp_path / "other")


def test_killed_and_resumed_it_ends_as_if_never(data, tmp_path):
    """Each in a process of its own, as users run them: in one that had run other tests before, losses differed by 1e-5 from step 2 on."""
    alone = {"ranks": 1, "module": "test_gpu_runs"}
    run_ranks(data, tmp_path / "straight", *EXACT, **alone)
    killed = subprocess.Popen(command("test_gpu_runs", data, tmp_path / "killed", *EXACT, ranks=1))
    deadline = time.monotonic() + 120
    while (kept := checkpoint.latest(tmp_path / "killed" / "checkpoints")) is None or checkpoint.load(kept)[1]["step"] < 4:
        assert killed.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert not (tmp_path / "killed" / "model.safetensors").exists()
    run_ranks(data, tmp_path / "killed", *EXACT, resume=True, **alone)
    assert_equal_runs(tmp_path / "straight", tmp_path / "killed")


GPUS = min(8, 2 ** torch.cuda.device_count().bit_length() // 2)  # the largest power of two
needs_two_gpus = pytest.mark.skipif(GPUS < 2, reason="needs two GPUs")


@needs_two_gpus
@pytest.mark.parametrize("lost", ["killed", "failed"])
def test_a_lost_rank_ends_the_run_and_resuming_is_exact(data, tmp_path, lost):
    test_train.a_lost_rank_ends_the_run_and_resuming_is_exact(data, tmp_path, lost, min(GPUS, 4), "test_gpu_runs")


@needs_two_gpus
def test_gpus_share_the_work_and_not_the_result(data, tmp_path):
    """Replayed steps of fused blocks, all in processes of their own. Two runs of one GPU say what the order of sums makes of a loss."""
    for name, ranks in (("one", 1), ("again", 1), ("shared", GPUS)):
        run_ranks(data, tmp_path / name, *FUSED, ranks=ranks, module="test_gpu_runs")
    one, again, shared = ([*losses(tmp_path / name).values()] for name in ("one", "again", "shared"))
    noise = max(abs(a - b) for a, b in zip(one, again))
    print(f"{GPUS} GPUs less one: {' '.join(f'{b - a:+.1e}' for a, b in zip(one, shared))}; one less itself at most {noise:.1e}")
    assert len(shared) == len(one) and one[-1] < one[0] - 0.1
    assert shared[0] == pytest.approx(one[0], abs=1e-5)
    assert shared == pytest.approx(one, abs=max(4 * noise, 5e-3))
