"""The training run: recipe and shards in, checkpoints and a log out.

    synthetic warm-up, of which nothing is kept -> clock starts -> steps -> averaged weights

Nothing in a step waits for the device: losses come back two steps later through pinned memory, and the host runs no
further ahead than that. The learning rate and the stop are the same on every rank, because they follow one clock, the slowest rank's,
which the ranks agree on every few steps.
"""

import contextlib
import math
import os
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from pgolf_fast import checkpoint, dist, schedule
from pgolf_fast.bpb import BitsPerByte, Score
from pgolf_fast.clock import TrainingClock
from pgolf_fast.data import Batch, ContinuousStream, Loader, ShardStream, load_validation, pack_segments
from pgolf_fast.errors import UserError
from pgolf_fast.model import GPT, ModelConfig, visits
from pgolf_fast.optim import Optimizer
from pgolf_fast.runlog import RunLog, has_run, machine
from pgolf_fast.settings import setting
from pgolf_fast.step import GraphedStep, Step

RUN_AHEAD = 2  # steps that the host may be ahead of a GPU
AGREE_EVERY = 10  # steps between two agreements of several ranks on the clock
PEAK_FLOPS = {"NVIDIA H100": 989.4e12, "NVIDIA H200": 989.4e12, "NVIDIA A100": 312e12}  # dense bf16, by the start of the device's name


@dataclass(frozen=True)
class TrainConfig:
    run_id: str = setting("", "name of the run's folder; empty: made from the recipe and the time", "RUN_ID")
    seed: int = setting(1337, "of the initial weights; the order of the data does not depend on it", "SEED")
    data: str = setting("", "folder of the shards (pgolf data build, get or demo makes one)", "DATA_PATH")
    tokenizer: str = setting("", "model that made them; empty: the one in the folder", "TOKENIZER_PATH")
    layout: Literal["rows", "documents"] = setting(
        "rows", "rows of seq_len that cross documents, or documents packed side by side, cut at seq_len"
    )
    cu_seqlens_entries: int = setting(256, "documents: their starts are padded to a multiple of this, one size for nearly every batch")
    batch_tokens: int = setting(786432, "tokens per step, over all ranks", "TRAIN_BATCH_TOKENS")
    micro_batches: int = setting(8, "parts of a step, each one forward and backward; a multiple of the number of ranks")
    seq_len: int = setting(2048, "tokens of context in training", "TRAIN_SEQ_LEN")
    warmup_steps: int = setting(20, "full steps before the clock starts, of which nothing is kept", "WARMUP_STEPS")
    val_every: int = setting(4000, "steps between validations; 0: only after the last step", "VAL_LOSS_EVERY")
    val_batch_tokens: int = setting(524288, "tokens per validation batch, over all ranks", ("VAL_BATCH_SIZE", "VAL_BATCH_TOKENS"))
    log_every: int = setting(500, "steps between lines of the text log", "TRAIN_LOG_EVERY")
    checkpoint_seconds: float = setting(
        120.0, "of training between checkpoints, which take about half a second each beside the training clock; 0: where the run ends"
    )
    checkpoint_every: int = setting(0, "steps between further checkpoints; 0: none")
    forecast_every: int = setting(
        0, "steps between forecasts of the artifact's size, about a second each beside the training clock; 0: none"
    )
    stop_reserve_seconds: float = setting(0.5, "kept free before the time limit, for a step slower than the last fifty")
    cuda_graphs: bool = setting(True, "on a GPU: the step is captured once per mode and replayed")
    deterministic: bool = setting(
        False,
        "the same bits on every run: torch's deterministic algorithms, and the MLP's weight gradients without the kernel's unordered sums",
    )

    def __post_init__(self):
        for field in ("batch_tokens", "micro_batches", "seq_len", "val_batch_tokens", "log_every", "cu_seqlens_entries"):
            if getattr(self, field) < 1:
                raise UserError(f"train.{field}: expected at least 1, got {getattr(self, field)}")
        if self.seed >= 2**64:
            raise UserError(f"train.seed: expected at most 64 bits, got {self.seed}")
        rows = self.micro_batches * self.seq_len
        if self.batch_tokens % rows:
            raise UserError(f"train.batch_tokens: {self.batch_tokens} is no multiple of micro_batches x seq_len, {rows}")

    @property
    def micro_batch_tokens(self) -> int:
        return self.batch_tokens // self.micro_batches


@dataclass(frozen=True)
class Result:
    steps: int
    train_loss: float  # nats per token, of the last step
    validation: Score  # of the final weights
    weights: str  # which these are
    folder: Path


def flops_per_token(config: ModelConfig, context: float, looped: bool) -> float:
    """Forward and backward, matrix products and causal attention over `context` earlier tokens on average, nothing recomputed."""
    block = 2 * config.model_dim * config.model_dim + 2 * config.kv_dim * config.model_dim + 2 * config.hidden_dim * config.model_dim
    per_visit = 2 * block + 4 * context * config.model_dim
    return 3 * (len(visits(config, looped)) * per_visit + 2 * config.vocab_size * config.model_dim)


class Trainer:
    """One rank's part of a run. Build, then `run()`."""

    def __init__(self, recipe, folder: Path, device_type: str, echo=print, resume: bool = False):
        """`recipe` is a recipe.Resolved; the folder is the run's, shared by all ranks."""
        self.recipe, self.config = recipe.recipe, recipe.recipe.train
        self.folder = folder
        self.device = dist.start(device_type)
        world = dist.world_size()
        if self.config.micro_batches % world:
            raise UserError(
                f"train.micro_batches: {self.config.micro_batches} parts cannot be shared by {world} ranks; use a multiple of {world}"
            )
        limit_s, reserve_s = schedule.limit_s(self.recipe.schedule), self.config.stop_reserve_seconds
        if 0 < limit_s <= reserve_s:
            raise UserError(f"train.stop_reserve_seconds: {reserve_s} leaves no time of {limit_s} s; reserve less or raise the limit")
        if not self.config.data:
            raise UserError("train.data: no data folder; `pgolf data demo FOLDER` makes a small one, then say train.data=FOLDER")
        if self.config.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # torch asks for it; read at the first product
            torch.use_deterministic_algorithms(True)
        self.clock = TrainingClock(limit_s, reserve_s)
        with self.clock.phase("set-up"):
            stream_dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
            self.model = GPT(self.recipe.model, self.config.seed, self.device, stream_dtype)
            self.parts = self.config.micro_batches // world
            self.optimizer = Optimizer(self.model, self.recipe.optim, self.parts)
            graphed = self.config.cuda_graphs and self.device.type == "cuda"
            self.steps = (GraphedStep if graphed else Step)(self.model, self.optimizer, self.config.seq_len)
            packed = self.config.layout == "documents"
            stream = ShardStream if packed else ContinuousStream
            self.loader = Loader(
                stream(self.config.data, self.config.micro_batch_tokens, world, self.recipe.model.vocab_size),
                dist.rank(),
                self.device,
                packed,
                self.config.seq_len,
                self.config.cu_seqlens_entries,
            )
            tokenizer, pieces = self.config.tokenizer or None, self.recipe.model.vocab_size
            self.validation = load_validation(self.config.data, self.config.seq_len, tokenizer, pieces)
            self.resumed = self.last_checkpoint() if resume else None
        self.step, self.plan = 0, None
        self.agreed_s, self.agreed_step, self.mean_step_s, self.saved_s = 0.0, 0, 0.0, 0.0
        self.losses, self.window, self.progress = _Losses(self.device), _Window(), None
        self.must_stop, self.stopped = lambda: False, False
        self.run_ahead = RUN_AHEAD if self.device.type == "cuda" else 0

        # At most four float32 numbers a parameter: its value, one or two moments, an average.
        checkpoint.require_room(folder / "checkpoints", 16 * sum(p.numel() for p in self.model.parameters()))
        # Last: settings that are refused leave no folder behind, and those of a run that is there as they were.
        self.log = RunLog(folder, writes=dist.rank() == 0, echo=echo)
        self.log.document("recipe.json", recipe.record())
        self.log.document("machine.json", machine(self.device, world))
        if resume and not self.resumed:
            self.log.event("resume", step=0, checkpoint=None)

    # -- one step

    def take_step(self, batches, plan):
        """The mean loss stays on the device."""
        return self.steps.run(batches, plan)

    def warm_up(self):
        """Full steps on synthetic tokens in every mode that the run will meet; weights, optimizer and loader are then as before."""
        before = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(2, self.recipe.model.vocab_size, (2, self.config.micro_batch_tokens), generator=generator).to(self.device)
        cu_seqlens = None
        if self.config.layout == "documents":
            segments = pack_segments(tokens[0].cpu().numpy(), self.config.seq_len, self.config.cu_seqlens_entries)
            cu_seqlens = torch.from_numpy(segments).to(self.device)
        modes = {(schedule.plan(self.recipe.schedule, 0, 0.0).looped, False)}
        if self.recipe.model.num_loops:
            modes.add((True, False))
        if self.recipe.schedule.late_qat:
            modes |= {(looped, True) for looped, _ in modes}
        for looped, fake_quant in sorted(modes):
            plan = schedule.StepPlan(1.0, self.recipe.schedule.muon_momentum_start, looped, fake_quant, False)
            for i in range(self.config.warmup_steps):
                begin = time.perf_counter()
                self.take_step([Batch(tokens[0], tokens[1], cu_seqlens, i)] * self.parts, plan)
                if self.device.type == "cuda":
                    torch.cuda.synchronize()
                if i == self.config.warmup_steps - 1:
                    self.clock.observe_steps(1, time.perf_counter() - begin)
                self.log.line(f"warmup_step:{i + 1}/{self.config.warmup_steps}")
        with torch.no_grad():
            for name, p in self.model.named_parameters():
                p.copy_(before[name])
        self.optimizer.reset()

    # -- the clock, the same for all ranks

    def agree(self):
        """Takes the slowest rank's clock as everybody's, and returns how many steps may follow before the next agreement: none if any
        rank was asked to stop."""
        elapsed, slowest, self.stopped = self.clock.elapsed_s, self.clock.slowest_step_s, self.must_stop()
        every = 1
        if dist.world_size() > 1:
            every = AGREE_EVERY
            told = torch.tensor([elapsed, slowest, self.stopped], dtype=torch.float64, device=self.device)
            dist.max_(told)
            elapsed, slowest, self.stopped = told.tolist()
        if self.step > self.agreed_step:
            self.mean_step_s = (elapsed - self.agreed_s) / (self.step - self.agreed_step)
        self.agreed_s, self.agreed_step = elapsed, self.step
        if self.stopped:
            return 0
        # Steps that were issued but have not run yet need their time too.
        return self.clock.steps_left(
            elapsed + self.losses.pending * slowest, slowest, min(every, self.recipe.schedule.iterations - self.step)
        )

    @property
    def elapsed_s(self):
        """The agreed clock, carried on to this step."""
        return self.agreed_s + (self.step - self.agreed_step) * self.mean_step_s

    # -- the run

    def run(self, progress=None, must_stop=lambda: False) -> Result | None:
        """`progress(step, loss, ms_per_step)` is called as losses come in. None if must_stop() came true on any rank: then there is a
        checkpoint of the step that it stopped at."""
        self.progress, self.must_stop = progress, must_stop
        with contextlib.closing(self.steps):  # after an error too: a rank that cannot exit keeps the others waiting
            with self.clock.phase("warm-up"):
                self.warm_up()
            if self.resumed:
                self.restore(*self.resumed)
                self.resumed = None  # as much memory as the weights and the optimizer's state
            self.train()
            if self.stopped:
                self.close()
                return None
            return self.finish()

    def train(self):
        config, iterations = self.config, self.recipe.schedule.iterations
        self.log.line(f"model_params:{sum(p.numel() for p in self.model.parameters())}")
        self.log.line(f"world_size:{dist.world_size()} grad_accum_steps:{self.parts}")
        self.log.line(f"seed:{config.seed}")
        with self.clock.phase("train"):
            self.step_began = time.perf_counter()
            allowed = self.agree()
            while allowed:
                for _ in range(allowed):
                    if config.val_every and self.step % config.val_every == 0:
                        with self.beside_training("validate"):
                            self.report_validation(self.validate())
                    self.plan = schedule.plan(self.recipe.schedule, self.step, self.elapsed_s, self.plan)
                    batches = [next(self.loader) for _ in range(self.parts)]
                    self.losses.put(self.step, self.take_step(batches, self.plan), self.plan.lr_factor)
                    if self.plan.snapshot:
                        self.optimizer.snapshot()
                    self.step += 1
                    if self.losses.pending > self.run_ahead:
                        self.receive()
                    now = time.perf_counter()
                    self.clock.observe_steps(1, now - self.step_began)
                    self.step_began = now
                    if config.forecast_every and self.step % config.forecast_every == 0:
                        with self.beside_training("forecast"):
                            self.report_forecast()
                            dist.meet(self.device)  # waiting for rank 0 is no training either
                    if self.checkpoint_is_due():
                        with self.beside_training("checkpoint"):
                            self.save()
                            dist.meet(self.device)
                allowed = self.agree()
            self.drain()
        if self.stopped:
            with self.clock.phase("checkpoint"):
                self.save()
            self.log.line(f"stopped: step:{self.step}/{iterations}; {self.last_kept()}")
        elif self.step < iterations:
            self.log.line(f"stopping_early: wallclock_cap train_time:{1e3 * self.clock.elapsed_s:.0f}ms step:{self.step}/{iterations}")

    @contextlib.contextmanager
    def beside_training(self, phase):
        """What is done in between is not on the training clock; steps that are still running are."""
        self.drain()
        with self.clock.phase(phase):
            yield
        self.step_began = time.perf_counter()

    def receive(self):
        """The oldest loss still on its way; stops the run if it is not finite."""
        step, loss, lr_factor = self.losses.get()
        if not math.isfinite(loss):
            self.log.event("not_finite", step=step + 1, train_loss=str(loss))
            self.keep_evidence(f"the loss of step {step + 1} is {loss}")
        self.window.add(step, self.clock.elapsed_s)
        if self.progress:
            self.progress(step + 1, loss, self.window.ms_per_step)
        self.log.event("step", step=step + 1, train_loss=loss, lr_factor=lr_factor, train_s=self.clock.elapsed_s)
        if (step + 1) % self.config.log_every == 0 or step < 10:
            train_ms = 1e3 * self.clock.elapsed_s
            self.log.line(
                f"step:{step + 1}/{self.recipe.schedule.iterations} train_loss:{loss:.4f} train_time:{train_ms:.0f}ms "
                f"step_avg:{train_ms / (step + 1):.2f}ms"
            )
            self.log.event("speed", step=step + 1, **self.speed())

    def drain(self):
        while self.losses.pending:
            self.receive()

    def speed(self) -> dict:
        """Of the last steps, not of the whole run: the loop changes the step time."""
        step_s = self.window.ms_per_step / 1e3
        found = {"ms_per_step": self.window.ms_per_step, "tokens_per_s": self.config.batch_tokens / step_s if step_s else 0.0}
        found |= {"loader_stalls": self.loader.stalls, "loader_stall_s": self.loader.stall_s}
        if self.device.type == "cuda":
            found["memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
            peak = next((f for name, f in PEAK_FLOPS.items() if torch.cuda.get_device_name().startswith(name)), None)
            if peak:
                per_token = flops_per_token(self.recipe.model, self.config.seq_len / 2, self.plan.looped)
                found["mfu"] = per_token * found["tokens_per_s"] / (peak * dist.world_size())
        return found

    # -- validation

    @torch.no_grad()
    def validate(self) -> Score:
        """Every whole row of the validation stream once, in plain float32 losses, shared out over the ranks."""
        row, world, rank = self.config.seq_len, dist.world_size(), dist.rank()
        rows = len(self.validation) // row
        first, last = rows * rank // world, rows * (rank + 1) // world
        batch = max(1, self.config.val_batch_tokens // (row * world))
        looped = self.plan.looped if self.plan else self.recipe.schedule.loop_from_frac == 0
        total = BitsPerByte(self.device)
        for start in range(first, last, batch):
            inputs, targets, target_bytes = self.validation.slice(start * row, min(start + batch, last) * row)
            documents = {}
            if self.config.layout == "documents":
                segments = torch.from_numpy(pack_segments(inputs.numpy(), row, self.config.cu_seqlens_entries))
                documents = {"cu_seqlens": segments.to(self.device), "max_seqlen": row}
                inputs, targets = inputs[None], targets[None]
            else:
                inputs, targets = inputs.view(-1, row), targets.view(-1, row)
            losses = self.model(inputs.to(self.device), targets.to(self.device), reduction="none", looped=looped, **documents)
            total.add(losses.flatten(), target_bytes.to(self.device))
        total.all_reduce()
        return total.score()

    def report_validation(self, score: Score):
        train_ms = 1e3 * self.clock.elapsed_s
        self.log.line(
            f"step:{self.step}/{self.recipe.schedule.iterations} val_loss:{score.nats_per_token:.4f} val_bpb:{score.bits_per_byte:.4f} "
            f"train_time:{train_ms:.0f}ms step_avg:{train_ms / max(self.step, 1):.2f}ms"
        )
        self.log.event("validation", step=self.step, val_loss=score.nats_per_token, val_bpb=score.bits_per_byte)

    def report_forecast(self):
        """Of the weights as they are, not of their average, which packs a little smaller."""
        from pgolf_fast.ledger import forecast_bytes  # the codecs' libraries only where a run asks for them

        if dist.rank() == 0:
            size = forecast_bytes(self.model.published_tensors(), self.recipe.quantize.rules())
            self.log.line(f"step:{self.step}/{self.recipe.schedule.iterations} artifact_forecast:{size} bytes")
            self.log.event("forecast", step=self.step, bytes=size)

    # -- the end, and what is kept

    def finish(self) -> Result:
        self.report_validation(self.final_score("weights of the last step"))
        with self.clock.phase("checkpoint"):
            self.save()
            weights = self.optimizer.load_average()
        score = self.final_score(weights)
        self.log.line(f"final_weights {weights} val_loss:{score.nats_per_token:.8f} val_bpb:{score.bits_per_byte:.8f}")
        with self.clock.phase("checkpoint"):
            if dist.rank() == 0:
                try:
                    checkpoint.write(self.folder / "model.safetensors", self.model.published_tensors(), {"weights": weights})
                except UserError as error:
                    raise UserError(f"{error}, then --resume; {self.last_kept()}") from None
        if self.device.type == "cuda":
            allocated, reserved = torch.cuda.max_memory_allocated() / 2**20, torch.cuda.max_memory_reserved() / 2**20
            self.log.line(f"peak memory allocated: {allocated:.0f} MiB reserved: {reserved:.0f} MiB")
        self.log.event(
            "end",
            steps=self.step,
            weights=weights,
            val_loss=score.nats_per_token,
            val_bpb=score.bits_per_byte,
            ledger_s=dict(self.clock.ledger_s),
        )
        self.close()
        return Result(self.step, self.losses.last, score, weights, self.folder)

    def close(self):
        self.loader.close()
        self.log.close()

    def final_score(self, weights) -> Score:
        """No training loss has seen what the last update, or the average, made of the weights."""
        with self.clock.phase("validate"):
            score = self.validate()
        if not math.isfinite(score.nats_per_token):
            self.log.event("not_finite", step=self.step, val_loss=str(score.nats_per_token))
            self.keep_evidence(f"the validation loss of the {weights} is {score.nats_per_token}")
        return score

    def checkpoint_is_due(self) -> bool:
        """On all ranks or on none: they agree on the clock."""
        steps, seconds = self.config.checkpoint_every, self.config.checkpoint_seconds
        return (steps > 0 and self.step % steps == 0) or (seconds > 0 and self.elapsed_s - self.saved_s >= seconds)

    def save(self):
        """All ranks take part; rank 0 writes. A disk without room costs the run its checkpoint, and nothing else."""
        tensors = {f"model.{name}": p for name, p in self.model.named_parameters()}
        tensors |= {f"optim.{name}": t for name, t in self.optimizer.state_dict().items()}
        state = {
            "step": self.step,
            "plan": self.plan._asdict() if self.plan else None,
            "train_loss": self.losses.last,
            "loader": self.loader.state(),
            "clock": self.clock.state(),
            "recipe": self._identity(),
        }
        self.saved_s = self.elapsed_s
        try:
            if dist.rank() == 0:
                checkpoint.save(self.folder / "checkpoints", self.step, tensors, state)
            self.log.event("checkpoint", step=self.step)
        except UserError as error:
            self.log.line(f"checkpoint: {error}; {self.last_kept()}")

    def _identity(self) -> dict:
        """What a checkpoint and the run that resumes it must share: everything that shapes weights and state."""
        return {"model": repr(self.recipe.model), "optim": repr(self.recipe.optim)}

    def last_checkpoint(self) -> tuple[Path, dict, dict] | None:
        """Its path, tensors and state, with the loader at its place; refused where it is not of these settings and this data.

        None for a run that was killed before its first: it begins again.
        """
        path = checkpoint.latest(self.folder / "checkpoints")
        if path is None:
            if not has_run(self.folder):
                raise UserError(f"resume: no run in {self.folder}; correct train.run_id, or start it without --resume")
            return None
        tensors, state = checkpoint.load(path)
        for part, value in self._identity().items():
            if state["recipe"][part] != value:
                raise UserError(
                    f"resume: {path} was trained with other {part} settings; resume with the recipe in {self.folder / 'recipe.json'}"
                )
        if state["step"] > self.recipe.schedule.iterations:
            raise UserError(
                f"resume: {path} is past schedule.iterations {self.recipe.schedule.iterations}; resume with at least {state['step']}"
            )
        self.loader.load_state(state["loader"])
        return path, tensors, state

    def restore(self, path, tensors, state):
        with torch.no_grad():
            for name, p in self.model.named_parameters():
                p.copy_(tensors[f"model.{name}"])
        self.optimizer.load_state_dict({name.removeprefix("optim."): t for name, t in tensors.items() if name.startswith("optim.")})
        self.clock.restore(state["clock"])
        self.losses.last = state["train_loss"]
        self.step, self.plan = state["step"], schedule.StepPlan(**state["plan"]) if state["plan"] else None
        self.agreed_s, self.agreed_step, self.saved_s = self.clock.elapsed_s, self.step, self.clock.elapsed_s
        self.log.event("resume", step=self.step, checkpoint=str(path))

    def keep_evidence(self, problem):
        """A loss that is not finite ends the run; weights, state and the stream's position stay for whoever looks."""
        evidence = self.folder / "evidence"
        weights = f"the weights as they were after step {self.step} are in {evidence}"
        try:
            if dist.rank() == 0:
                tensors = {name: p for name, p in self.model.named_parameters()}
                checkpoint.write(evidence / "weights.safetensors", tensors, {"step": self.step, "loader": self.loader.state()})
        except UserError as error:
            weights = f"the weights could not be kept ({error})"
        raise UserError(f"{problem}; {weights}, {self.last_kept()}")

    def last_kept(self) -> str:
        kept = checkpoint.latest(self.folder / "checkpoints")
        return f"the last checkpoint is {kept}" if kept else "there is no checkpoint yet (train.checkpoint_seconds)"


class _Losses:
    """Losses on their way from the device, oldest first."""

    def __init__(self, device):
        self.device, self.queue, self.last = device, deque(), math.nan

    @property
    def pending(self) -> int:
        return len(self.queue)

    def put(self, step, loss, lr_factor):
        if self.device.type != "cuda":
            self.queue.append((step, loss, lr_factor, None))
            return
        host = torch.empty((), pin_memory=True)
        host.copy_(loss, non_blocking=True)
        self.queue.append((step, host, lr_factor, torch.cuda.current_stream().record_event()))

    def get(self):
        step, loss, lr_factor, event = self.queue.popleft()
        if event is not None:
            event.synchronize()
        self.last = loss.item()
        return step, self.last, lr_factor


class _Window:
    """Mean step time between the losses received last, on the training clock: what stands between two steps is not of them."""

    def __init__(self):
        self.times = deque(maxlen=50)

    def add(self, step, elapsed_s):
        self.times.append((step, elapsed_s))

    @property
    def ms_per_step(self) -> float:
        (first, begin), (last, end) = self.times[0], self.times[-1]
        return 1e3 * (end - begin) / (last - first) if last > first else 0.0
