"""`pgolf bench`: each op beside its peers, in one process, after its tests; `pgolf bench step`: whole training steps."""

import dataclasses
import importlib
import sys
from pathlib import Path
from typing import Annotated

import tyro
from rich import box
from rich.console import Console
from rich.table import Table

import pgolf_fast
from pgolf_fast.commands.devices import choose_device
from pgolf_fast.errors import UserError


@dataclasses.dataclass(frozen=True)
class Bench:
    """Benchmark ops against their peers; speed is printed only after the op's tests pass."""

    ops: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="[OP ...]")] = ()
    """Ops to run; all of them if none is named. `step` alone: the whole training step of recipes."""
    device: str = "auto"
    """cpu, cuda, or auto: the first GPU if there is one."""
    budget_s: float = 0.5
    """Seconds of timing per contestant of a case."""
    skip_tests: bool = False
    """Leave the tests out (they were just run)."""
    without: tuple[str, ...] = ()
    """Contestants to leave out, such as torch.compile, whose compilation takes longer than the rest."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Write one JSON per op there, or to benchmarks/results with `--save`."""
    save: bool = False
    """Keep the results in benchmarks/results."""
    recipe: tuple[str, ...] = ("legal-ttt-691", "caseops-1934")
    """step: recipes, in turn."""
    gpus: int = 0
    """step: run on this many GPUs of this machine; 0: as launched."""
    steps: int = 30
    """step: timed steps of each phase."""
    profile: bool = False
    """step: add the table of kernels."""
    peer: tuple[str, ...] = ()
    """step: of these recipes, also time the same step in plain torch under torch.compile."""
    json: bool = False
    """Print the rows as JSON."""


def _benchmarks():
    """The benchmarks package, which lives in a source checkout and not in the wheel."""
    root = Path(pgolf_fast.__file__).parent.parent
    if not (root / "benchmarks" / "run.py").exists():
        raise UserError("benchmarks: not part of the installed package; run `pgolf bench` from a source checkout with `pip install -e .`")
    sys.path.insert(0, str(root))
    return importlib.import_module("benchmarks.run")


def show_rows(rows: list[dict], ceilings, console: Console) -> None:
    """One table per op: microseconds of ours and each peer, the floor, and our share of it."""
    for op in dict.fromkeys(row["op"] for row in rows):
        own = [row for row in rows if row["op"] == op]
        names = list(dict.fromkeys(name for row in own for name in row["timings"]))
        table = Table(title=f"{op}, microseconds", title_justify="left", box=box.SIMPLE)
        for heading in ("case", *names, "floor", "of floor", "gain"):
            table.add_column(heading, justify="left" if heading == "case" else "right", no_wrap=True)
        for row in own:
            times = {name: t["median_us"] for name, t in row["timings"].items()}
            peers = [t for name, t in times.items() if name != "ours"]
            cells = [f"{times[n]:.1f}" + ("*" if row["timings"][n]["graph"] is False else "") if n in times else "-" for n in names]
            ratio = f"{min(peers) / times['ours']:.2f}x" if peers else "-"
            table.add_row(row["case"], *cells, f"{row['floor_us']:.1f}", f"{row['floor_us'] / times['ours']:.2f}", ratio)
        console.print(table)
    console.print(
        "floor: fewest bytes or operations at this run's ceilings; gain: best peer / ours; *: timed eagerly, refuses a CUDA graph"
    )
    console.print(
        f"ceilings of this run: copy {ceilings.copy_bytes_per_s / 1e12:.2f} TB/s, matrix {ceilings.matmul_flops_per_s / 1e12:.2f} TFLOP/s"
    )


def run(config: Bench, console: Console) -> tuple[dict, int]:
    benchmarks = _benchmarks()
    if config.ops == ("step",):
        step = importlib.import_module("benchmarks.bench_train_step")
        wanted = step.TrainStep(config.recipe, config.gpus, config.steps, config.peer, config.profile, config.save)
        return {"steps": step.run(wanted, console)}, 0
    known = benchmarks.op_names()
    for op in config.ops:
        if op not in known:
            raise UserError(f"ops: no benchmark named {op!r}; there are {', '.join(known)}")
    device = choose_device(config.device)
    ops = config.ops or tuple(known)
    red = [] if config.skip_tests else [op for op in ops if not benchmarks.tests_pass(op)]
    ceilings = benchmarks.measure_ceilings(device)
    rows = []
    for op in ops:
        if op in red:
            continue
        with console.status(f"{op} on {device}"):
            own = benchmarks.run_op(op, device, ceilings, config.budget_s, config.without)
        rows += own
        if config.out or config.save:
            benchmarks.save(op, device, ceilings, own, config.out or benchmarks.RESULTS)
    show_rows(rows, ceilings, console)
    for op in red:
        console.print(f"{op}: its tests fail, so no figure is printed")
    return {"rows": rows, "failed_tests": red}, 1 if red else 0
