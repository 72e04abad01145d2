"""The trainer on a model of a few thousand parameters: what must hold of any run."""

import io
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from rich.console import Console

from pgolf_fast import checkpoint, dist, export, recipe, run_record, runlog, schedule, shards, train
from pgolf_fast.artifact import pack
from pgolf_fast.commands import train as train_command
from pgolf_fast.data import Validation
from pgolf_fast.errors import UserError
from pgolf_fast.train import Trainer, flops_per_token

MINI = (
    "model.vocab_size=64",
    "model.model_dim=32",
    "model.num_heads=4",
    "model.num_kv_heads=2",
    "model.rope_dims=4",
    "model.bigram_buckets=32",
    "model.bigram_dim=8",
    "model.ve_dim=8",
    "train.batch_tokens=256",
    "train.micro_batches=4",
    "train.seq_len=32",
    "train.val_batch_tokens=256",
    "train.val_every=0",
    "train.warmup_steps=1",
    "schedule.iterations=8",
    "schedule.warmdown_iters=4",
)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Several small runs at a time: threads would only wait for each other. Also what makes forking safe here."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Random documents over 64 tokens in which each token makes the next one likely."""
    folder = tmp_path_factory.mktemp("data")
    generator = np.random.default_rng(0)
    for split, documents in (("train", 60), ("val", 6)):
        tokens = []
        for _ in range(documents):
            walk = generator.integers(2, 64, size=1)
            steps = generator.integers(1, 3, size=200)
            tokens += [1, *(2 + (walk[0] + np.cumsum(steps)) % 62)]
        shards.write_shard(folder / f"fineweb_{split}_000000.bin", np.array(tokens, np.uint16))
    return folder


def bytes_validation(folder, row, tokenizer=None, vocab_size=None):
    """Validation of a token stream that no tokenizer made: one byte a token."""
    tokens = shards.read_split(shards.require_shards(folder, "val"))
    n = (len(tokens) - 1) // row * row
    return Validation(tokens[: n + 1], np.ones(n, np.uint16), np.flatnonzero(tokens[:n] == 1), False)


@pytest.fixture(autouse=True)
def without_a_tokenizer(monkeypatch):
    monkeypatch.setattr("pgolf_fast.train.load_validation", bytes_validation)


def make(data, folder, *overrides, resume=False):
    resolved = recipe.resolve("tiny", (*MINI, f"train.data={data}", *overrides), environ={})
    return Trainer(resolved, folder, "cpu", echo=lambda text: None, resume=resume)


def losses(folder):
    return {e["step"]: e["train_loss"] for e in runlog.events(folder) if e["event"] == "step"}


def weights(folder):
    return checkpoint.load(folder / "model.safetensors")[0]


def assert_equal_runs(one, other):
    assert losses(one) == losses(other)
    for name, tensor in weights(one).items():
        assert torch.equal(tensor, weights(other)[name]), name


def test_the_loss_falls_and_the_folder_tells_the_run(data, tmp_path):
    result = make(data, tmp_path / "run", "schedule.iterations=40", "schedule.warmdown_iters=10", "train.val_every=20").run()
    seen = losses(tmp_path / "run")
    assert list(seen) == list(range(1, 41))
    assert seen[1] == pytest.approx(math.log(64), abs=0.1)
    assert seen[40] < seen[1] - 0.5
    assert result.steps == 40 and result.validation.tokens == (6 * 201 - 1) // 32 * 32
    settings = json.loads((tmp_path / "run" / "recipe.json").read_text())["settings"]
    assert settings["model.vocab_size"] == {"value": 64, "source": "command line", "meaning": settings["model.vocab_size"]["meaning"]}
    assert {"commit", "torch", "device"} <= json.loads((tmp_path / "run" / "machine.json").read_text()).keys()
    text = (tmp_path / "run" / "log.txt").read_text()
    for line in ("warmup_step:1/1", "model_params:", "world_size:1 grad_accum_steps:4", "step:0/40 val_loss:", "step:40/40 train_loss:"):
        assert line in text
    assert set(weights(tmp_path / "run")) == set(make(data, tmp_path / "names").model.published_tensors())


def test_forecasts_of_the_size_beside_the_training_clock(data, tmp_path):
    """The last one is the size that the final weights pack to."""
    make(data, tmp_path / "run", "train.forecast_every=4", "optim.ema=false").run()
    run = export.read_run(tmp_path / "run")
    told = {e["step"]: e["bytes"] for e in runlog.events(tmp_path / "run") if e["event"] == "forecast"}
    assert list(told) == [4, 8] and run.weights == "weights of the last step"
    assert told[8] == pytest.approx(len(pack(export.quantize_run(run, "cpu").tensors)), rel=0.01)
    (end,) = [e for e in runlog.events(tmp_path / "run") if e["event"] == "end"]
    assert end["ledger_s"]["forecast"] > 0


def test_documents_packed_side_by_side(data, tmp_path):
    make(data, tmp_path / "run", "train.layout=documents", "train.cu_seqlens_entries=8").run()
    assert losses(tmp_path / "run")[8] < losses(tmp_path / "run")[1]


LOOP = ("model.num_layers=5", "model.loop_start=1", "model.loop_end=2", "model.num_loops=1", "schedule.loop_from_frac=0.5")


def moved(trainer):
    """Its model with random weights: blocks start as the identity, which would hide how they are run."""
    with torch.no_grad():
        for p in trainer.model.parameters():
            p += 0.2 * torch.randn_like(p)
    return trainer.model


def test_validation_runs_the_loop_once_training_does(data, tmp_path):
    trainer = make(data, tmp_path / "run", *LOOP)
    model, n = moved(trainer), len(trainer.validation)
    inputs, targets, _ = trainer.validation.slice(0, n)
    on, off = (schedule.StepPlan(1.0, 0.9, looped, False, False) for looped in (True, False))
    found = []
    for plan, looped in ((None, False), (off, False), (on, True)):
        trainer.plan = plan
        found.append(trainer.validate().nats_per_token)
        with torch.no_grad():
            rows = model(inputs.view(-1, 32), targets.view(-1, 32), reduction="none", looped=looped)
        assert found[-1] == pytest.approx(rows.double().mean().item(), rel=1e-6)
    assert abs(found[2] - found[0]) > 1e-4


def test_ranks_share_validation_out(data, tmp_path, monkeypatch):
    """37 rows over 3 ranks, in batches of 5: every row once."""
    trainer = make(data, tmp_path / "run", "train.val_batch_tokens=480")
    whole, parts = trainer.validate(), []
    monkeypatch.setattr(dist, "world_size", lambda: 3)
    monkeypatch.setattr(dist, "sum_", lambda tensor: dist.DONE)
    for rank in range(3):
        monkeypatch.setattr(dist, "rank", lambda rank=rank: rank)
        parts.append(trainer.validate())
    assert whole.tokens == 37 * 32 and {part.tokens for part in parts} == {12 * 32, 13 * 32}
    assert (sum(part.tokens for part in parts), sum(part.bytes for part in parts)) == (whole.tokens, whole.bytes)
    assert sum(part.nats for part in parts) == pytest.approx(whole.nats, rel=1e-6)


def test_validation_keeps_documents_apart(data, tmp_path):
    """Every one alone, cut at seq_len and where a batch of val_batch_tokens ends."""
    apart = ("train.layout=documents", "model.smear=none", "model.bigram_buckets=0")  # these two reach over a document's start
    trainer = make(data, tmp_path / "run", *apart)
    model, n, losses = moved(trainer), len(trainer.validation), []
    inputs, targets, _ = trainer.validation.slice(0, n)
    begin = 0
    for end in range(1, n + 1):
        if end == n or inputs[end] == 1 or end - begin == 32 or end % 256 == 0:
            with torch.no_grad():
                losses.append(model(inputs[None, begin:end], targets[None, begin:end], reduction="none", looped=False).flatten())
            begin = end
    assert trainer.validate().nats_per_token == pytest.approx(torch.cat(losses).double().mean().item(), rel=1e-6)


@pytest.mark.parametrize("loop", [(), LOOP])
def test_warm_up_meets_every_mode_of_the_run(data, tmp_path, loop):
    """What a mode needs once (graphs to capture, libraries to start) is not to be paid for on the training clock."""
    trainer = make(data, tmp_path / "run", "schedule.late_qat=true", "schedule.qat_below_lr=0.6", *loop)
    met, take_step = [], trainer.take_step

    def noted(batches, plan):
        met.append((plan.looped, plan.fake_quant))
        return take_step(batches, plan)

    trainer.take_step = noted
    trainer.warm_up()
    warmed = set(met)
    met.clear()
    trainer.train()
    assert len(set(met)) >= 2 and set(met) <= warmed


def test_warm_up_leaves_everything_as_it_was(data, tmp_path):
    warm, cold = (make(data, tmp_path / name, f"train.warmup_steps={n}") for name, n in (("warm", 3), ("cold", 0)))
    warm.warm_up()
    for (name, p), q in zip(warm.model.named_parameters(), cold.model.parameters()):
        assert torch.equal(p, q), name
    for (name, a), b in zip(warm.optimizer.state_dict().items(), cold.optimizer.state_dict().values()):
        assert torch.equal(a, b), name
    assert warm.loader.state() == cold.loader.state()
    warm.run(), cold.run()
    assert losses(tmp_path / "warm") == losses(tmp_path / "cold")


SWA = ("optim.ema=false", "optim.swa=true", "schedule.swa_every=1", "schedule.swa_below_lr=1")


@pytest.mark.parametrize(
    "changes, averaged",
    [((), "exponential moving average, decay 0.98"), (SWA, "mean of 3 snapshots"), (LOOP, "exponential moving average, decay 0.98")],
    ids=["ema", "swa", "loop"],
)
def test_resuming_is_exact(data, tmp_path, changes, averaged):
    settings = ("train.checkpoint_every=3", "schedule.late_qat=true", "schedule.qat_below_lr=0.6", *changes)
    assert make(data, tmp_path / "straight", *settings).run().weights == averaged
    stopped = make(data, tmp_path / "stopped", *settings)
    take_step = stopped.take_step
    stopped.take_step = lambda batches, plan: take_step(batches, plan) if stopped.step < 7 else 1 / 0
    with pytest.raises(ZeroDivisionError):
        stopped.run()
    resumed = make(data, tmp_path / "stopped", *settings, resume=True).run()
    assert_equal_runs(tmp_path / "straight", tmp_path / "stopped")
    assert make(data, tmp_path / "stopped", *settings, resume=True).run() == resumed  # from its end on
    assert [e["step"] for e in runlog.events(tmp_path / "stopped") if e["event"] == "resume"] == [6, 8]


def test_a_run_killed_before_its_first_checkpoint_begins_again(data, tmp_path):
    """By the command that resumes any other."""
    assert make(data, tmp_path / "straight").run()
    killed = make(data, tmp_path / "killed")
    take_step = killed.take_step
    killed.take_step = lambda batches, plan: take_step(batches, plan) if killed.step < 3 else 1 / 0
    with pytest.raises(ZeroDivisionError):
        killed.run()
    make(data, tmp_path / "killed", resume=True).run()
    assert_equal_runs(tmp_path / "straight", tmp_path / "killed")
    assert [step["step"] for step in run_record.read_record(tmp_path / "killed").steps] == list(range(1, 9))
    assert sum(event["event"] == "step" for event in runlog.events(tmp_path / "killed")) == 3 + 8


@pytest.mark.parametrize("after", [0, 1, 5, 8])
def test_asked_to_stop_it_leaves_a_checkpoint_of_that_step(data, tmp_path, after):
    make(data, tmp_path / "straight").run()
    asked = make(data, tmp_path / "asked")
    assert asked.run(must_stop=lambda: asked.step >= after) is None and asked.step == after
    assert checkpoint.load(checkpoint.latest(tmp_path / "asked" / "checkpoints"))[1]["step"] == after
    make(data, tmp_path / "asked", resume=True).run()
    assert_equal_runs(tmp_path / "straight", tmp_path / "asked")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_command_stops_on_a_signal_and_says_how_to_go_on(data, tmp_path, number):
    """A cluster that wants its machine back sends SIGTERM some seconds before SIGKILL."""
    settings = (*MINI, f"train.data={data}", "schedule.iterations=100000", "train.run_id=a", "train.checkpoint_seconds=0")
    code = "from pgolf_fast.__main__ import main; from tests import test_train as t; t.train.load_validation = t.bytes_validation; main()"
    command = [sys.executable, "-c", code, "train", "--recipe", "tiny", "--runs", tmp_path, "--device", "cpu", *settings]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    child = subprocess.Popen(list(map(str, command)), env=environment, stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while child.poll() is None and time.monotonic() < deadline and not (tmp_path / "a" / "events.jsonl").exists():
        time.sleep(0.02)
    while child.poll() is None and time.monotonic() < deadline and len(losses(tmp_path / "a")) < 3:
        time.sleep(0.02)
    child.send_signal(number)
    out = child.communicate(timeout=60)[0]
    assert child.returncode == 130 and "--resume train.run_id=a goes on from here" in " ".join(out.split())
    step = checkpoint.load(checkpoint.latest(tmp_path / "a" / "checkpoints"))[1]["step"]
    assert step >= 3 and list(losses(tmp_path / "a")) == list(range(1, step + 1)) and f"stopped after step {step};" in " ".join(out.split())


def test_what_a_run_began_with_need_not_be_said_again(data, tmp_path):
    """A setting forgotten where a run is resumed went on as the recipe has it: another run under the same name."""
    shown = io.StringIO()

    def command(*overrides, **how):
        shown.truncate(0)
        wanted = train_command.Train((*overrides, "train.run_id=a"), runs=tmp_path, device="cpu", **how)
        return train_command.run(wanted, Console(file=shown, width=300))[0]

    begun = command(*MINI, f"train.data={data}")
    assert command(resume=True) == begun and "when the run began" not in shown.getvalue()
    assert command("schedule.iterations=9", resume=True)["steps"] == 9
    assert "! schedule.iterations was 8 when the run began and is 9 now" in shown.getvalue()
    assert command(resume=True)["steps"] == 9
    with pytest.raises(UserError, match="other model settings"):
        command(f"train.data={data}", *MINI[-8:], "model.model_dim=64", recipe="tiny", resume=True)
    assert "! model.vocab_size was 64 when" in shown.getvalue()
    with pytest.raises(UserError, match="holds a run already"):
        command(*MINI, f"train.data={data}")
    (tmp_path / "a").rename(tmp_path / "b")
    with pytest.raises(UserError, match="resume: no run in .*a; correct train.run_id"):
        command(resume=True)


def test_checkpoints_follow_the_training_clock(data, tmp_path, monkeypatch):
    """Whoever says nothing loses two minutes to a kill, not the run."""
    seconds, steps, save = [0.0], [], checkpoint.save

    def make_slow(*overrides, **how):
        trainer = make(data, tmp_path / "run", "train.warmup_steps=0", *overrides, **how)
        trainer.clock._now, take_step = lambda: seconds[0], trainer.take_step

        def take_slowly(batches, plan):
            seconds[0] += 50
            return take_step(batches, plan)

        trainer.take_step = take_slowly
        return trainer

    def slow_save(folder, step, tensors, state):
        seconds[0] += 1000  # off the training clock
        steps.append(step)
        return save(folder, step, tensors, state)

    monkeypatch.setattr(checkpoint, "save", slow_save)
    make_slow().run()
    assert steps == [3, 6, 8]  # 150 s after the last, and at the end
    make_slow("schedule.iterations=12", resume=True).run()
    assert steps == [3, 6, 8, 11, 12]  # 150 s after the one that it resumed
    make(data, tmp_path / "none", "train.checkpoint_seconds=0").run()
    assert steps == [3, 6, 8, 11, 12, 8]


def test_a_resumed_run_has_the_time_that_is_left(data, tmp_path):
    make(data, tmp_path / "run", "schedule.iterations=2").run()
    kept = checkpoint.latest(tmp_path / "run" / "checkpoints")
    tensors, state = checkpoint.load(kept)
    state["clock"]["ledger_s"]["train"] = 99.0
    checkpoint.write(kept, tensors, state)
    resumed = make(data, tmp_path / "run", "schedule.max_wallclock_seconds=99", resume=True)
    assert resumed.run().steps == 2 and resumed.clock.ledger_s["train"] >= 99


def test_a_run_draws_no_random_numbers(data, tmp_path):
    """But the initial weights, from a generator of their own: so checkpoints hold no generator's state."""
    before = torch.get_rng_state()
    make(data, tmp_path / "run").run()
    assert torch.equal(torch.get_rng_state(), before)


def test_killed_twenty_times_it_ends_as_if_never(data, tmp_path):
    settings = ("train.checkpoint_every=1", "schedule.iterations=40", "train.deterministic=true")
    make(data, tmp_path / "straight", *settings).run()
    generator, kills = random.Random(0), 0
    folder = tmp_path / "killed"
    while not (folder / "model.safetensors").exists():
        child = os.fork()
        if child == 0:
            make(data, folder, *settings, resume=checkpoint.latest(folder / "checkpoints") is not None).run()
            os._exit(0)
        if kills < 20:
            before = checkpoint.latest(folder / "checkpoints")
            while checkpoint.latest(folder / "checkpoints") == before:  # so that it gets on
                time.sleep(0.001)
            time.sleep(generator.random() * 0.03)
            os.kill(child, signal.SIGKILL)
            kills += 1
        os.waitpid(child, 0)
    assert kills == 20
    assert_equal_runs(tmp_path / "straight", folder)


def test_no_run_ends_past_its_cap(data, tmp_path):
    settings = (
        "schedule.iterations=100000",
        "schedule.max_wallclock_seconds=4",
        "train.stop_reserve_seconds=2",
        "schedule.warmdown_iters=20",
    )
    result = make(data, tmp_path / "run", *settings).run()
    end = runlog.events(tmp_path / "run")[-1]
    assert 3 < result.steps < 100000 and 1.0 < end["ledger_s"]["train"] <= 4
    assert "stopping_early: wallclock_cap" in (tmp_path / "run" / "log.txt").read_text()


def test_a_step_slower_than_the_warm_ups_counts_for_the_next(data, tmp_path, monkeypatch):
    limit = ("schedule.max_wallclock_seconds=7", "train.stop_reserve_seconds=0", "train.warmup_steps=0")
    trainer, seconds = make(data, tmp_path / "run", *limit), [0.0]
    trainer.clock._now = lambda: seconds[0]
    monkeypatch.setattr(train.time, "perf_counter", trainer.clock._now)
    take_step = trainer.take_step

    def take_slowly(batches, plan):
        seconds[0] += 2
        return take_step(batches, plan)

    trainer.take_step = take_slowly
    assert trainer.run().steps == 3 and trainer.clock.ledger_s["train"] == 6


def test_ranks_follow_the_slowest_clock(data, tmp_path, monkeypatch):
    """Another rank's; from one agreement to the next it goes on at the mean pace so far. Steps not received yet take their time too."""
    trainer = make(data, tmp_path / "run", "schedule.iterations=99", "schedule.max_wallclock_seconds=100", "train.stop_reserve_seconds=0")
    other = torch.zeros(3, dtype=torch.float64)  # its clock, its slowest step, and whether it was asked to stop
    monkeypatch.setattr(dist, "world_size", lambda: 2)
    monkeypatch.setattr(dist, "max_", lambda times: times.copy_(torch.maximum(times, other)))
    assert trainer.agree() == 1
    trainer.step = 4
    other += torch.tensor([40.0, 12.0, 0.0])
    assert trainer.agree() == 5  # of 12 s in the 60 that are left
    trainer.step = 6
    assert trainer.elapsed_s == 60
    trainer.losses.queue.extend(3 * [None])
    assert trainer.agree() == 2 and not trainer.stopped
    other[2] = 1
    assert trainer.agree() == 0 and trainer.stopped


def test_what_only_rank_0_does_is_no_training_time_of_the_others(data, tmp_path, monkeypatch):
    """They wait for it in the same phase; else the next collective would, on the training clock, which is the slowest rank's."""
    trainer, phases = make(data, tmp_path / "run", "train.checkpoint_every=4", "train.forecast_every=8"), []
    monkeypatch.setattr(dist, "meet", lambda device: phases.append(trainer.clock._open[0]))
    trainer.run()
    assert phases == ["checkpoint", "forecast", "checkpoint"]


def test_steps_still_on_the_device_are_training_time(data, tmp_path):
    """On a clock that only waiting for a loss and validation move: whatever the loop is about to do, the wait is training's."""
    settings = ("train.val_every=3", "train.checkpoint_every=2", "train.warmup_steps=0", "schedule.iterations=7")
    trainer, told = make(data, tmp_path / "run", *settings), []
    seconds, get, validate = [0.0], trainer.losses.get, trainer.validate
    trainer.clock._now, trainer.run_ahead = lambda: seconds[0], 2

    def wait():
        seconds[0] += 1
        return get()

    def validate_slowly():
        seconds[0] += 50
        return validate()

    trainer.losses.get, trainer.validate = wait, validate_slowly
    trainer.run(lambda *progress: told.append(progress))
    assert {name: s for name, s in trainer.clock.ledger_s.items() if name != "set-up" and s} == {"train": 7, "validate": 250}
    events = runlog.events(tmp_path / "run")
    speeds = [(e["ms_per_step"], e["tokens_per_s"]) for e in events if e["event"] == "speed"]
    assert speeds == [(0.0, 0.0)] + 6 * [(1000.0, 256.0)]
    assert told == [(step, loss, 1000.0 * (step > 1)) for step, loss in losses(tmp_path / "run").items()]
    text = (tmp_path / "run" / "log.txt").read_text()
    for step, kind in ((3, "train"), (3, "val"), (7, "train"), (7, "val")):
        assert re.search(rf"^step:{step}/7 {kind}_loss:.* train_time:{step}000ms step_avg:1000.00ms$", text, re.MULTILINE)
    plans = [schedule.lr_factor(trainer.recipe.schedule, step, 0.0) for step in range(7)]
    assert [e["lr_factor"] for e in events if e["event"] == "step"] == plans and plans[-1] < plans[0]


def test_a_loss_that_is_not_finite_stops_the_run_and_leaves_evidence(data, tmp_path):
    trainer = make(data, tmp_path / "run")
    take_step = trainer.take_step
    trainer.take_step = lambda batches, plan: take_step(batches, plan) * (math.inf if trainer.step == 4 else 1)
    with pytest.raises(UserError, match="the loss of step 5 is inf; the weights as they were after step 5 .*no checkpoint"):
        trainer.run()
    assert checkpoint.load(tmp_path / "run" / "evidence" / "weights.safetensors")[1]["step"] == 5
    last = runlog.events(tmp_path / "run")[-1]
    assert (last["event"], last["step"], last["train_loss"]) == ("not_finite", 5, "inf")


@pytest.mark.parametrize("changes, of", [(("optim.ema=false",), "weights of the last step"), ((), "exponential moving average.*")])
def test_a_last_update_that_ruins_the_weights_is_no_success(data, tmp_path, changes, of):
    """No training loss sees it, and neither its weights nor its checkpoint replace what was good before."""
    trainer = make(data, tmp_path / "run", "train.checkpoint_every=5", *changes)
    ruined = trainer.optimizer.ema["tok_emb"] if trainer.optimizer.ema else trainer.model.tok_emb
    take_step = trainer.take_step

    def take_ruinous_step(batches, plan):
        loss = take_step(batches, plan)
        with torch.no_grad():
            ruined[7] *= math.nan if trainer.step == 7 else 1
        return loss

    trainer.take_step = take_ruinous_step
    with pytest.raises(
        UserError, match=f"the validation loss of the {of} is nan; .* after step 8 are in .*, the last checkpoint is .*_0000000[58]"
    ):
        trainer.run()
    assert not (tmp_path / "run" / "model.safetensors").exists()
    assert runlog.events(tmp_path / "run")[-1]["event"] == "not_finite"


def test_evidence_that_cannot_be_written_is_not_promised(data, tmp_path):
    trainer = make(data, tmp_path / "run")
    (tmp_path / "run" / "evidence").write_text("in the way")
    with pytest.raises(UserError, match="the loss of step 3 is nan; the weights could not be kept .*cannot write.*no checkpoint"):
        trainer.keep_evidence("the loss of step 3 is nan")


def test_a_checkpoint_that_does_not_fit_costs_only_itself(data, tmp_path, monkeypatch):
    def full(*args):
        raise UserError("cannot write")

    monkeypatch.setattr(checkpoint, "save", full)
    make(data, tmp_path / "run", "train.checkpoint_every=3").run()
    assert set(weights(tmp_path / "run")) and runlog.events(tmp_path / "run")[-1]["event"] == "end"
    assert (tmp_path / "run" / "log.txt").read_text().count("checkpoint: cannot write") == 3


def test_final_weights_that_do_not_fit_can_be_had_by_resuming(data, tmp_path):
    folder = tmp_path / "run" / "model.safetensors"
    folder.mkdir(parents=True)
    with pytest.raises(UserError, match="cannot write .*model.*, then --resume; the last checkpoint is .*_00000008"):
        make(data, tmp_path / "run").run()
    folder.rmdir()
    make(data, tmp_path / "run", resume=True).run()
    assert weights(tmp_path / "run")


def test_what_is_wrong_with_a_run_is_said(data, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="train.data: no data folder"):
        make("", tmp_path / "a")
    with pytest.raises(UserError, match="train.stop_reserve_seconds: 4.0 leaves no time of 3.0 s"):
        make(data, tmp_path / "a", "schedule.max_wallclock_seconds=5", "schedule.reserve_seconds=2", "train.stop_reserve_seconds=4")
    parameters = sum(p.numel() for p in make(data, tmp_path / "room").model.parameters())
    with monkeypatch.context() as full, pytest.raises(UserError, match="run folder: 0.00 GB are free"):
        # A byte less than three checkpoints of four float32 numbers a parameter.
        full.setattr(checkpoint.shutil, "disk_usage", lambda place: SimpleNamespace(free=3 * 4 * 4 * parameters - 1))
        make(data, tmp_path / "a")
    with pytest.raises(UserError, match="resume: no run in .*b; correct train.run_id"):
        make(data, tmp_path / "b", resume=True)
    make(data, tmp_path / "c").run()
    before = {path: path.read_bytes() for path in (tmp_path / "c").glob("*.*")}
    with pytest.raises(UserError, match="other optim settings"):
        make(data, tmp_path / "c", "optim.matrix_lr=0.5", resume=True)
    with pytest.raises(UserError, match="loader state: of another stream"):
        make(data, tmp_path / "c", "train.batch_tokens=512", resume=True)
    with pytest.raises(UserError, match="step_00000008.safetensors is past schedule.iterations 7; resume with at least 8"):
        make(data, tmp_path / "c", "schedule.iterations=7", resume=True)
    assert {path: path.read_bytes() for path in (tmp_path / "c").glob("*.*")} == before
    assert not any((tmp_path / refused).exists() for refused in "ab")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="run folder: cannot write"):
        make(data, tmp_path / "file" / "run")


def train_rank(make, data, folder, *overrides, resume=False, lost=None):
    """The whole run in this process. The second rank may be `lost` before its sixth step: "killed", or "failed" by an error of its own."""
    torch.set_num_threads(1)
    train.load_validation = bytes_validation
    trainer = make(data, Path(folder), *overrides, resume=resume)
    take_step = trainer.take_step

    def take_step_or_leave(batches, plan):
        if dist.rank() == 1 and trainer.step == 5:
            os.kill(os.getpid(), signal.SIGKILL) if lost == "killed" else 1 / 0
        return take_step(batches, plan)

    if lost:
        trainer.take_step = take_step_or_leave
    trainer.run()
    dist.stop()


def command(module, data, folder, *overrides, ranks, **how):
    """What runs a test module's `make` and train_rank in one process a rank."""
    code = f"import sys; from tests import {module}, test_train as t; t.train_rank({module}.make, *sys.argv[1:], **{how})"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", "--no-python"]
    return [*(launcher if ranks > 1 else []), sys.executable, "-c", code, str(data), str(folder), *overrides]


def run_ranks(*args, module="test_train", **how):
    done = subprocess.run(command(module, *args, **how), capture_output=True, text=True, timeout=240)
    assert (done.returncode == 0) == ("lost" not in how), done.stderr[-2000:]
    return done


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_share_the_work_and_not_the_result(data, tmp_path, world_size):
    make(data, tmp_path / "one").run()
    run_ranks(data, tmp_path / "many", ranks=world_size)
    one, many = losses(tmp_path / "one"), losses(tmp_path / "many")
    assert one.keys() == many.keys()
    # The first loss differs by the order of one float32 sum. From then on Newton-Schulz, which rounds to bfloat16, makes more of it.
    assert many[1] == pytest.approx(one[1], abs=1e-5)
    for step, loss in one.items():
        assert many[step] == pytest.approx(loss, abs=2e-3), step
    final = [next(e for e in runlog.events(tmp_path / name) if e["event"] == "end")["val_loss"] for name in ("one", "many")]
    assert final[0] == pytest.approx(final[1], abs=2e-3)


def test_ranks_save_together_by_the_clock_they_agree_on(data, tmp_path):
    """By its own clock one of them would wait for the other's collective, which is another one."""
    run_ranks(data, tmp_path / "run", "schedule.iterations=40", "train.checkpoint_seconds=0.05", ranks=2)
    saved = [event["step"] for event in runlog.events(tmp_path / "run") if event["event"] == "checkpoint"]
    assert len(saved) > 2 and saved == sorted(saved) and saved[-1] == 40


def a_lost_rank_ends_the_run_and_resuming_is_exact(data, tmp_path, lost, ranks=2, module="test_train"):
    settings, how = ("train.deterministic=true", "train.checkpoint_every=1"), {"ranks": ranks, "module": module}
    with ThreadPoolExecutor() as beside:
        straight = beside.submit(run_ranks, data, tmp_path / "straight", *settings, **how)
        done = run_ranks(data, tmp_path / "lost", *settings, lost=lost, **how)
    straight.result()
    assert ("ZeroDivisionError" in done.stderr) == (lost == "failed")
    assert not (tmp_path / "lost" / "model.safetensors").exists()
    assert checkpoint.load(checkpoint.latest(tmp_path / "lost" / "checkpoints"))[1]["step"] <= 5
    run_ranks(data, tmp_path / "lost", *settings, resume=True, **how)
    assert_equal_runs(tmp_path / "straight", tmp_path / "lost")


@pytest.mark.parametrize("lost", ["killed", "failed"])
def test_a_lost_rank_ends_the_run_and_resuming_is_exact(data, tmp_path, lost):
    a_lost_rank_ends_the_run_and_resuming_is_exact(data, tmp_path, lost)


def test_flops_match_the_published_arithmetic():
    """MFLOP per token of the two families, dense 2048 (design notes: 228.1, of which 69.2 attention)."""
    config = recipe.resolve("base", environ={}).recipe.model
    assert flops_per_token(config, 1024, False) / 1e6 == pytest.approx(228.1, abs=0.5)
    caseops = recipe.resolve("caseops-1934", environ={}).recipe.model
    assert flops_per_token(caseops, 670, False) / 1e6 == pytest.approx(260.8, abs=0.5)
    assert flops_per_token(caseops, 670, True) / 1e6 == pytest.approx(389.3, abs=0.5)
