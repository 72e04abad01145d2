"""Runs the benchmarks of ops and stores what they found: the body of `pgolf bench`."""

import datetime
import importlib
import json
import platform
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks.power import management_handle
from benchmarks.timing import Ceilings, measure_ceilings, time_contestants  # noqa: F401  (pgolf bench takes all it needs from here)
from pgolf_fast.ops import _library
from pgolf_fast.runlog import commit, device_name

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def op_names() -> list[str]:
    return sorted(p.stem.removeprefix("bench_") for p in (ROOT / "benchmarks" / "ops").glob("bench_*.py"))


def tests_pass(op: str) -> bool:
    test = ROOT / "tests" / "ops" / f"test_{op}.py"
    return subprocess.run([sys.executable, "-m", "pytest", "-q", "-x", str(test)], cwd=ROOT, stdout=sys.stderr).returncode == 0


def gpu_state(device: torch.device) -> dict:
    """Driver, clocks now and power limit, from the management library."""
    import pynvml

    handle = management_handle(device)
    return {
        "driver": pynvml.nvmlSystemGetDriverVersion(),
        "sm_clock_mhz": pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM),
        "memory_clock_mhz": pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_MEM),
        "power_limit_w": pynvml.nvmlDeviceGetEnforcedPowerLimit(handle) / 1e3,
    }


def environment(device: torch.device) -> dict:
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": device_name(device),
        **(gpu_state(device) if device.type == "cuda" else {}),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "library": _library.build_info(),
        "commit": commit(),
        "command": " ".join(["pgolf", *sys.argv[1:]]),
    }


def run_op(op: str, device: torch.device, ceilings: Ceilings, budget_s: float, without: tuple[str, ...] = ()) -> list[dict]:
    """Rows of one op: a row is one case, with every contestant's timing."""
    rows = []
    for case in importlib.import_module(f"benchmarks.ops.bench_{op}").cases(device):
        case.contestants = {name: run for name, run in case.contestants.items() if name not in without}
        timings = time_contestants(case, device, budget_s)
        rows.append(
            {
                "op": op,
                "case": case.name,
                "bytes": case.bytes,
                "flops": case.flops,
                "floor_us": ceilings.floor_us(case),
                "timings": {name: asdict(t) for name, t in timings.items()},
            }
        )
    return rows


def result_path(name: str, device: torch.device, folder: Path = RESULTS) -> Path:
    """Where a result goes; one of another kind of device never in its place."""
    slug = "cpu" if device.type == "cpu" else torch.cuda.get_device_name(device).lower().replace("nvidia ", "").replace(" ", "-")
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{name}.{slug}.json"


def save(name: str, device: torch.device, ceilings: Ceilings, rows: list[dict], folder: Path) -> Path:
    path = result_path(name, device, folder)
    path.write_text(json.dumps({"environment": environment(device), "ceilings": asdict(ceilings), "rows": rows}, indent=1) + "\n")
    return path
