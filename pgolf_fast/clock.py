"""The training clock: what counts against the cap, what does not, and when to stop so that no run ends past it."""

import collections
import os
import time
from collections.abc import Callable
from contextlib import contextmanager

WINDOW_STEPS = 50  # the slowest of this many steps is what the next one is assumed to take

_LOADED_AT = time.perf_counter()


def process_age_s() -> float:
    """Seconds since this process or the torchrun above it was started; since this module was loaded where the system does not say."""
    launched = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else os.getpid()
    try:
        with open(f"/proc/{launched}/stat") as stat, open("/proc/uptime") as uptime:
            started = int(stat.read().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
            return float(uptime.read().split()[0]) - started
    except (OSError, ValueError, IndexError):
        return time.perf_counter() - _LOADED_AT


class TrainingClock:
    """Elapsed training seconds, with a ledger of every phase.

    Only the time inside `phase("train")` counts against the cap; set-up, warm-up, validation and checkpoints are
    in the ledger beside it.

    cap_s      seconds of training allowed; 0 means no cap
    reserve_s  seconds left unused before the cap, for a step slower than any in the window
    now        source of time in seconds
    """

    def __init__(self, cap_s: float, reserve_s: float = 0.0, now: Callable[[], float] = time.perf_counter):
        self.cap_s, self.reserve_s, self._now = cap_s, reserve_s, now
        self.ledger_s: dict[str, float] = collections.defaultdict(float)
        self._step_s: collections.deque[float] = collections.deque(maxlen=WINDOW_STEPS)
        self._open: tuple[str, float] | None = None

    @contextmanager
    def phase(self, name: str):
        """Time from here to the end of the block goes to `name`; a phase inside another pauses the outer one."""
        outer = self._close()
        self._open = (name, self._now())
        try:
            yield
        finally:
            self._close()
            if outer:
                self._open = (outer, self._now())

    def _close(self) -> str | None:
        if self._open is None:
            return None
        name, since = self._open
        self.ledger_s[name] += self._now() - since
        self._open = None
        return name

    @property
    def elapsed_s(self) -> float:
        """Training seconds so far."""
        running = self._now() - self._open[1] if self._open and self._open[0] == "train" else 0.0
        return self.ledger_s["train"] + running

    def observe_steps(self, count: int, seconds: float) -> None:
        """`count` steps took `seconds` together."""
        self._step_s.append(seconds / count)

    @property
    def slowest_step_s(self) -> float:
        return max(self._step_s, default=0.0)

    def steps_left(self, elapsed_s: float, slowest_step_s: float, at_most: int) -> int:
        """How many more steps fit under the cap, if none is slower than `slowest_step_s`; the arguments may be a maximum over ranks."""
        if self.cap_s <= 0:
            return at_most
        if slowest_step_s <= 0:
            return min(at_most, 1)
        room = self.cap_s - self.reserve_s - elapsed_s
        return max(0, min(at_most, int(room / slowest_step_s)))

    def state(self) -> dict:
        """For a checkpoint: a resumed run goes on from these times. The open phase is counted up to now."""
        ledger = dict(self.ledger_s)
        if self._open:
            name, since = self._open
            ledger[name] = ledger.get(name, 0.0) + self._now() - since
        return {"ledger_s": ledger, "step_s": list(self._step_s)}

    def restore(self, state: dict) -> None:
        self.ledger_s.clear()
        self.ledger_s.update(state["ledger_s"])
        self._step_s.clear()
        self._step_s.extend(state["step_s"])
