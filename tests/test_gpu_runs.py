"""Whole runs on GPUs, of a model of the least width that the kernels serve: the same bits twice, killed and resumed, on two GPUs."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from pgolf_fast import checkpoint, recipe
from pgolf_fast.train import Trainer
from tests import test_train
from tests.test_train import data, losses, weights, without_a_tokenizer  # noqa: F401  fixtures

SETTINGS = (*test_train.MINI, "model.model_dim=128", "model.num_heads=2", "model.num_kv_heads=1", "model.rope_dims=16", "schedule.iterations=12")
EXACT = ("train.deterministic=true", "train.checkpoint_every=1")

pytestmark = [pytest.mark.gpu, pytest.mark.cuda]


@pytest.fixture(autouse=True)
def deterministic_off_again():
    yield
    torch.use_deterministic_algorithms(False)


def make(data, folder, *overrides, resume=False):
    resolved = recipe.resolve("tiny", (*SETTINGS, f"train.data={data}", *overrides), environ={})
    return Trainer(resolved, Path(folder), "cuda", echo=lambda text: None, resume=resume)


def command(data, folder, *overrides, resume=False, gpus=1):
    """A process, or one a GPU, that trains."""
    code = (
        "import sys; from tests import test_gpu_runs as t; import pgolf_fast.train; from pgolf_fast import dist\n"
        "pgolf_fast.train.load_validation = t.test_train.bytes_validation\n"
        f"t.make(*sys.argv[1:], resume={resume}).run(); dist.stop()\n"
    )
    ranks = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={gpus}", "--no-python"] if gpus > 1 else []
    return [*ranks, sys.executable, "-c", code, str(data), str(folder), *overrides]


def assert_equal_runs(one, other):
    assert losses(one) == losses(other)
    for name, tensor in weights(one).items():
        assert torch.equal(tensor, weights(other)[name]), name


def test_deterministic_runs_are_the_same_bits(data, tmp_path):
    for name in ("one", "other"):
        make(data, tmp_path / name, *EXACT).run()
    assert_equal_runs(tmp_path / "one", tmp_path / "other")


def test_killed_and_resumed_it_ends_as_if_never(data, tmp_path):
    make(data, tmp_path / "straight", *EXACT).run()
    killed = subprocess.Popen(command(data, tmp_path / "killed", *EXACT, "schedule.iterations=12"))
    deadline = time.monotonic() + 120
    while (kept := checkpoint.latest(tmp_path / "killed" / "checkpoints")) is None or checkpoint.load(kept)[1]["step"] < 4:
        assert killed.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert not (tmp_path / "killed" / "model.safetensors").exists()
    make(data, tmp_path / "killed", *EXACT, resume=True).run()
    assert_equal_runs(tmp_path / "straight", tmp_path / "killed")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_share_the_work_and_not_the_result(data, tmp_path):
    make(data, tmp_path / "one").run()
    subprocess.run(command(data, tmp_path / "two", gpus=2), check=True, timeout=240)
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert one.keys() == two.keys()
    assert two[1] == pytest.approx(one[1], abs=1e-4)
    assert [two[step] for step in two] == pytest.approx([one[step] for step in one], abs=0.03)
