"""`pgolf quantize`: a run's weights, or a checkpoint, to integers, and what that cost."""

import dataclasses
import functools
import math
import time
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich import box
from rich.console import Console
from rich.table import Table
from safetensors import SafetensorError
from safetensors.torch import load_file

from pgolf_fast import artifact, export, fit
from pgolf_fast.commands.devices import choose_device
from pgolf_fast.commands.progress import shown
from pgolf_fast.errors import UserError
from pgolf_fast.files import write_json, write_whole
from pgolf_fast.ledger import CAP_BYTES, count_code, own_sources
from pgolf_fast.quantize import PUBLISHED, TensorError, quantize

QUANTIZED = "quantized.pglf"  # in the run's folder, uncompressed
REPORT = "quantize.json"


@dataclasses.dataclass(frozen=True)
class Quantize:
    """Quantize a run by its recipe's table, or a checkpoint by a published one; prints the errors and the forecast of the packed size."""

    source: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
    """A run's folder, which receives the result; or a safetensors file with the published tensor names."""
    data: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")] = None
    """Shards to calibrate on, for GPTQ; the run's own if left out. Only training shards are read."""
    device: str = "auto"
    """cpu, cuda, or auto: a GPU if there is one."""
    fit: Annotated[int | None, tyro.conf.arg(metavar="BYTES")] = None
    """Of a run: search clips, steps and bits for the least loss on training text under so many bytes, code and all; 16000000 is the cap."""
    strict: bool = False
    """Of a fit: leave room for every source file as it is, not for the one script that wraps them."""
    plain_rounding: bool = False
    """Round to nearest what GPTQ would round, without calibration."""
    table: Literal[tuple(PUBLISHED)] | None = None
    """Of a checkpoint: whose schemes to use."""
    hessians: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Of a checkpoint: a safetensors file with one Hessian per matrix that GPTQ rounds, under the matrix's name."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Of a checkpoint: write the result there, uncompressed, for `pgolf pack`."""
    json: bool = False
    """Print every tensor's errors as JSON."""


def load_tensors(path: Path, argument: str) -> dict:
    try:
        return load_file(path)
    except FileNotFoundError:
        raise UserError(f"{argument}: no file at {path}") from None
    except (SafetensorError, OSError) as error:
        raise UserError(f"{argument}: {path} is not a safetensors file ({error})") from None


def error_table(errors: list[TensorError]) -> Table:
    """One line per role and scheme; --json has every tensor."""
    table = Table(title="quantization", title_justify="left", box=box.SIMPLE)
    for heading in ("tensors", "scheme"):
        table.add_column(heading, no_wrap=True)
    for heading in ("count", "values", "bits", "entropy", "rmse", "clipped"):
        table.add_column(heading, justify="right", no_wrap=True)
    groups = {}
    for e in errors:
        groups.setdefault((artifact.role(e.name), e.scheme, e.bits), []).append(e)
    for (role, scheme, bits), group in groups.items():
        sizes = [math.prod(e.shape) for e in group]
        num = max(1, sum(sizes))
        entropy = sum(e.entropy_bits * n for e, n in zip(group, sizes)) / num
        rmse = math.sqrt(sum(e.rmse**2 * n for e, n in zip(group, sizes)) / num)
        clipped = sum(e.clipped_frac * n for e, n in zip(group, sizes)) / num
        cells = (len(group), f"{sum(sizes):,}", bits, f"{entropy:.3f}", f"{rmse:.3g}", f"{clipped:.4%}")
        table.add_row(role, scheme, *map(str, cells))
    return table


def run(config: Quantize, console: Console) -> tuple[dict, int]:
    if not config.source.exists():
        raise UserError(f"source: nothing at {config.source}; give a run's folder or a checkpoint")
    return quantize_run(config, console) if config.source.is_dir() else quantize_checkpoint(config, console)


def quantize_run(config, console):
    for argument in ("table", "hessians", "out"):
        if getattr(config, argument):
            raise UserError(f"{argument}: of a checkpoint only; a run is quantized as its recipe says, into its own folder")
    source = export.read_run(config.source)
    if config.strict and config.fit is None:
        raise UserError("strict: of a fit only: say how many bytes with --fit; pgolf pack --strict gates an artifact as it is")
    if config.fit is not None and config.plain_rounding:
        raise UserError("fit: searches with GPTQ, not with plain rounding; leave one of the two out")
    searched = {}
    with shown(console) as progress:
        if config.fit is not None:
            made, searched = fit_run(config, source, progress, console)
        else:
            made = export.quantize_run(source, choose_device(config.device), config.data, config.plain_rounding, progress)
    metadata = export.metadata(source.name, source.recipe)
    write_whole(config.source / QUANTIZED, artifact.pack(made.tensors, "none", metadata))
    forecast = artifact.estimate_bytes(made.tensors, metadata)
    cap_s = source.recipe.schedule.max_wallclock_seconds
    report = {
        "weights": source.weights,
        "forecast_bytes": forecast,
        "seconds": {"train": source.train_s, "calibrate": made.calibrate_s, "cap": cap_s, "quantize": made.quantize_s},
        "fit": searched,
        "tensors": [dataclasses.asdict(e) for e in made.errors],
    }
    write_json(config.source / REPORT, report)
    console.print(error_table(made.errors))
    console.print(f"{source.name}, {source.weights}: quantized in {made.quantize_s:.1f} s; forecast of the packed size: {forecast:,} bytes")
    if made.calibrate_s:
        total = source.train_s + made.calibrate_s
        of_cap = f" of {cap_s:.0f} s" if cap_s else ""
        late = "; [red]past the cap: keep more time free (schedule.reserve_seconds)" if cap_s and total > cap_s else ""
        console.print(
            f"training {source.train_s:.1f} s + calibration on training text {made.calibrate_s:.1f} s = {total:.1f} s{of_cap}{late}"
        )
    console.print(f"written: {config.source / QUANTIZED} (uncompressed; next: pgolf pack {config.source})")
    return report, 0


def fit_run(config, source, progress, console) -> tuple[export.Quantized, dict]:
    """The search's outcome as a quantization, and its record; prints the frontier."""
    code = count_code(own_sources())
    code_bytes = code.strict if config.strict else code.wrapped
    if code_bytes >= config.fit:
        raise UserError(f"fit: the code alone takes {code_bytes:,} bytes of {config.fit:,}; the challenge's cap is {CAP_BYTES}")
    begin = time.perf_counter()
    search = fit.Search(source, choose_device(config.device), config.data, progress)
    found = search.fit(config.fit - code_bytes)
    seconds = time.perf_counter() - begin
    console.print(frontier_table(search, found, code_bytes))
    console.print(f"searched and measured in {seconds:.1f} s, on training text")
    record = {"cap_bytes": config.fit, "code_bytes": code_bytes, "seconds": seconds, **fit_record(search, found)}
    return export.Quantized(found.chosen.tensors, found.chosen.errors, calibrate_s=seconds, quantize_s=0.0), record


def fit_record(search: fit.Search, found: fit.Fit) -> dict:
    def row(choice):
        schemes = {name: scheme.short() for name, scheme in zip(search.searched, choice.schemes)}
        return {"bytes": round(choice.bytes), "loss": choice.loss, "schemes": schemes}

    record = {"artifact_bytes": len(found.artifact), "unquantized_loss": search.unquantized_loss, "chosen": row(found.chosen.choice)}
    return record | {"measured": list(map(row, found.tried)), "frontier": [(round(c.bytes), c.loss) for c in search.frontier]}


def frontier_table(search: fit.Search, found: fit.Fit, code_bytes: int, predictions: int = 10) -> Table:
    """Some of the predicted frontier, evenly spread, and what was measured."""
    title = f"bytes with {code_bytes:,} of code, rise of the loss"
    table = Table(title=title, title_justify="left", box=box.SIMPLE)
    for heading in ("", "bytes", "nats per token"):
        table.add_column(heading, justify="right", no_wrap=True)
    step = max(1, len(search.frontier) // predictions)
    labels = {found.tried[0]: "published", found.chosen.choice: "chosen"}
    rows = [("predicted", c) for c in search.frontier[step - 1 :: step]] + [(labels.get(c, "measured"), c) for c in found.tried]
    for label, choice in sorted(rows, key=lambda row: row[1].bytes):
        table.add_row(label, f"{choice.bytes + code_bytes:,.0f}", f"{choice.loss - search.unquantized_loss:+.5f}")
    return table


def quantize_checkpoint(config, console):
    if config.fit is not None or config.strict:
        raise UserError("fit: of a run's folder only: the search measures losses on its training text")
    if config.table is None:
        raise UserError(f"table: say whose schemes to use for a checkpoint: {', '.join(PUBLISHED)}; a run's folder says it itself")
    state = load_tensors(config.source, "checkpoint")
    hessians = load_tensors(config.hessians, "hessians") if config.hessians else None
    with shown(console) as progress:
        advance = functools.partial(progress, "quantizing")
        tensors, errors = quantize(state, PUBLISHED[config.table], hessians, config.plain_rounding, advance)
    forecast = artifact.estimate_bytes(tensors)
    console.print(error_table(errors))
    console.print(f"forecast of the packed size: {forecast:,} bytes, code not counted")
    if config.out:
        write_whole(config.out, artifact.pack(tensors, "none", {"table": config.table}))
        console.print(f"written: {config.out} (uncompressed; next: pgolf pack {config.out})")
    return {"forecast_bytes": forecast, "tensors": [dataclasses.asdict(e) for e in errors]}, 0
