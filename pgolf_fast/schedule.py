"""What a step is run with, as a pure function of the step and of the training clock.

The clock counts training only: no warm-up, no compilation, no validation. Ranks must agree, so
the elapsed time that goes in here is one rank's, given to all.
"""

from dataclasses import dataclass
from typing import NamedTuple

from pgolf_fast.settings import requirer, setting


@dataclass(frozen=True)
class ScheduleConfig:
    iterations: int = setting(20000, "steps at most; the length of the schedule where there is no time limit", "ITERATIONS")
    max_wallclock_seconds: float = setting(600.0, "seconds of training at most; 0: no limit", "MAX_WALLCLOCK_SECONDS")
    reserve_seconds: float = setting(0.0, "seconds of that kept for calibrating the quantizer", "GPTQ_RESERVE_SECONDS")

    warmdown_iters: int = setting(
        3500, "steps over which the learning rate falls to 0; under a time limit, as many steps of the mean length so far", "WARMDOWN_ITERS"
    )
    warmdown_frac: float = setting(0.0, "the same as a share of the run (then warmdown_iters is 0)", "WARMDOWN_FRAC")
    min_lr: float = setting(0.0, "the factor on the learning rates stops falling here", "MIN_LR")

    muon_momentum: float = setting(0.99, "after its warm-up", "MUON_MOMENTUM")
    muon_momentum_start: float = setting(0.92, "at step 0", "MUON_MOMENTUM_WARMUP_START")
    muon_momentum_warmup_steps: int = setting(1500, "steps from there to muon_momentum, linear", "MUON_MOMENTUM_WARMUP_STEPS")

    loop_from_frac: float = setting(0.0, "share of the run after which the model's loop is on", "ENABLE_LOOPING_AT")
    late_qat: bool = setting(False, "train through int6 weights at the end of the run", "LATE_QAT")
    qat_below_lr: float = setting(
        0.15, "late_qat begins when the learning-rate factor is below this", ("LATE_QAT_THRESHOLD", "QAT_THRESHOLD")
    )
    swa_every: int = setting(50, "steps between the snapshots of tight stochastic weight averaging", "SWA_EVERY")
    swa_below_lr: float = setting(0.2, "snapshots are taken where the learning-rate factor is below this")

    def __post_init__(self):
        require = requirer("schedule")
        require(self.iterations > 0, "iterations", f"expected at least 1, got {self.iterations}")
        require(self.swa_every > 0, "swa_every", f"expected at least 1, got {self.swa_every}")
        limit, reserve = self.max_wallclock_seconds, self.reserve_seconds
        require(limit == 0 or limit > reserve, "max_wallclock_seconds", f"{limit} leaves no time beside reserve_seconds {reserve}")
        require(0 <= self.warmdown_frac <= 1, "warmdown_frac", f"expected 0 to 1, got {self.warmdown_frac}")
        require(0 <= self.min_lr <= 1, "min_lr", f"expected 0 to 1, got {self.min_lr}")
        both = self.warmdown_iters and self.warmdown_frac
        require(not both, "warmdown_frac", "set this or schedule.warmdown_iters and make the other 0")


class StepPlan(NamedTuple):
    lr_factor: float
    muon_momentum: float
    looped: bool
    fake_quant: bool
    snapshot: bool  # take one after this step


def limit_s(config) -> float:
    """Seconds that steps may take; 0 or less: no limit."""
    return config.max_wallclock_seconds - config.reserve_seconds


def progress(config, step, elapsed_s) -> float:
    """Share of the run that is over before this step, by the clock if there is a limit, else by steps."""
    return elapsed_s / limit_s(config) if config.max_wallclock_seconds else step / config.iterations


def lr_factor(config, step, elapsed_s) -> float:
    if config.warmdown_frac:
        left, window = 1 - progress(config, step, elapsed_s), config.warmdown_frac
    elif config.max_wallclock_seconds:
        left, window = limit_s(config) - elapsed_s, config.warmdown_iters * elapsed_s / max(step, 1)
    else:
        left, window = config.iterations - step, config.warmdown_iters
    return 1.0 if window == 0 or left >= window else max(left / window, config.min_lr)


def muon_momentum(config, step) -> float:
    done = min(step / config.muon_momentum_warmup_steps, 1.0) if config.muon_momentum_warmup_steps else 1.0
    return config.muon_momentum_start + done * (config.muon_momentum - config.muon_momentum_start)


def plan(config, step, elapsed_s, before: StepPlan | None = None) -> StepPlan:
    """Plan of step `step` (from 0). `before` is the step before's: the loop and late_qat stay on once they are."""
    factor = lr_factor(config, step, elapsed_s)
    return StepPlan(
        lr_factor=factor,
        muon_momentum=muon_momentum(config, step),
        looped=progress(config, step, elapsed_s) >= config.loop_from_frac or (before is not None and before.looped),
        fake_quant=config.late_qat and (factor < config.qat_below_lr or (before is not None and before.fake_quant)),
        snapshot=factor < config.swa_below_lr and (step + 1) % config.swa_every == 0,
    )
