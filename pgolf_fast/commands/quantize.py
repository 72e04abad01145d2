"""`pgolf quantize`: a checkpoint to integers, and what that cost."""

import dataclasses
import math
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich import box
from rich.console import Console
from rich.table import Table
from safetensors import SafetensorError
from safetensors.torch import load_file

from pgolf_fast import artifact
from pgolf_fast.errors import UserError
from pgolf_fast.quantize import PUBLISHED, TensorError, quantize


@dataclasses.dataclass(frozen=True)
class Quantize:
    """Quantize a checkpoint by a published table; prints the error table and the forecast of the packed size."""

    checkpoint: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="CHECKPOINT")]
    """A safetensors file with the published tensor names."""
    table: Literal[tuple(PUBLISHED)]
    """Whose schemes to use."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Write the result there, uncompressed, for `pgolf pack`."""
    hessians: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """A safetensors file with one Hessian per matrix that GPTQ rounds, under the matrix's name."""
    plain_rounding: bool = False
    """Round those matrices to nearest, without Hessians."""
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
    """One line per role and scheme: all blocks together."""
    table = Table(title="quantization error", title_justify="left", box=box.SIMPLE)
    for heading in ("tensors", "scheme", "number", "values", "bits", "entropy", "rmse", "clipped"):
        table.add_column(heading, justify="left" if heading in ("tensors", "scheme") else "right", no_wrap=True)
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
    state = load_tensors(config.checkpoint, "checkpoint")
    hessians = load_tensors(config.hessians, "hessians") if config.hessians else None
    with console.status(f"quantizing {len(state)} tensors"):
        tensors, errors = quantize(state, PUBLISHED[config.table], hessians, config.plain_rounding)
        forecast = artifact.estimate_bytes(tensors)
    console.print(error_table(errors))
    console.print(f"forecast of the packed size: {forecast:,} bytes, code not counted")
    if config.out:
        config.out.write_bytes(artifact.pack(tensors, "none", {"table": config.table}))
        console.print(f"written: {config.out} (uncompressed; next: pgolf pack {config.out})")
    return {"forecast_bytes": forecast, "tensors": [dataclasses.asdict(e) for e in errors]}, 0
