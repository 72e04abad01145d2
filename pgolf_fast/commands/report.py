"""`pgolf report`: the figures of runs, in one page."""

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from pgolf_fast import run_report
from pgolf_fast.errors import UserError
from pgolf_fast.run_record import read_record


@dataclasses.dataclass(frozen=True)
class Report:
    """Draw loss, step time, learning rate and sizes of runs as SVG and PNG, and one self-contained HTML page (needs the [report] extra)."""

    runs: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="RUN")] = ()
    """Run folders; several, such as seeds, are drawn into the same figures."""
    out: Annotated[Path, tyro.conf.arg(metavar="DIR")] = Path("report")
    """Where page and figures go."""
    json: bool = False
    """Print the paths as JSON."""


def run(config: Report, console: Console) -> tuple[dict, int]:
    if not config.runs:
        raise UserError("runs: give one or more run folders; `pgolf train` names its own when it ends")
    records = [read_record(folder) for folder in config.runs]
    with console.status(f"drawing {len(records)} runs"):
        written = run_report.write(records, config.out)
    console.print(f"written: {written[0]}, and {len(written) - 1} figures beside it")
    return {"page": str(written[0]), "figures": [str(path) for path in written[1:]]}, 0
