"""`pgolf pack`: quantized tensors to one file, and the ledger of bytes."""

import dataclasses
import functools
import time
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich import box
from rich.console import Console
from rich.table import Table

from pgolf_fast import artifact, codecs
from pgolf_fast.commands.progress import shown
from pgolf_fast.commands.quantize import QUANTIZED
from pgolf_fast.errors import UserError
from pgolf_fast.files import write_json, write_whole
from pgolf_fast.ledger import CAP_BYTES, CodeBytes, Ledger, code_files, count_code, ledger, own_sources

ARTIFACT = "artifact.pglf"  # in the run's folder
LEDGER = "ledger.json"
COUNTS = tuple(f.name for f in dataclasses.fields(CodeBytes))


@dataclasses.dataclass(frozen=True)
class Pack:
    """Compress an artifact, check that it decodes exactly, and print the ledger of bytes against the cap."""

    source: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
    """A run's folder after `pgolf quantize`, which receives the artifact and the ledger; or any artifact: it is packed again."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Write the packed artifact there; a run's goes into its folder if left out."""
    codec: Literal[tuple(codecs.CODECS)] = codecs.DEFAULT
    """How to compress; the published pipelines have their own names."""
    code: Annotated[Path | None, tyro.conf.arg(metavar="PATH")] = None
    """The submission's folder or script, to be counted; pgolf_fast's own sources if left out."""
    strict: bool = False
    """Every source file as it is decides whether the cap is kept, not the one script that wraps them, as the records count."""
    json: bool = False
    """Print the ledger as JSON."""


def ledger_table(found: Ledger) -> Table:
    table = Table(title="bytes", title_justify="left", box=box.SIMPLE)
    table.add_column("part", no_wrap=True)
    for heading in COUNTS:
        table.add_column(f"code {heading}", justify="right", no_wrap=True)
    rows = [(f"weights: {role}", size) for role, size in found.weights.items()] + [("metadata", found.metadata)]
    for label, size in rows:
        table.add_row(label, *[f"{size:,}"] * len(COUNTS))
    table.add_row("code", *[f"{getattr(found.code, c):,}" for c in COUNTS])
    table.add_section()
    table.add_row("total", *[f"{found.total(c):,}" for c in COUNTS])
    table.add_row(f"headroom to {CAP_BYTES:,}", *[f"[{'red' if found.headroom(c) < 0 else 'green'}]{found.headroom(c):,}" for c in COUNTS])
    return table


def artifact_of(source: Path) -> Path:
    """Of a run's folder its packed artifact, or the file itself."""
    packed = source / ARTIFACT if source.is_dir() else source
    if not packed.is_file():
        remedy = (
            f"`pgolf quantize {source}` and `pgolf pack {source}` make one" if source.is_dir() else "give an artifact or a run's folder"
        )
        raise UserError(f"source: no file {packed}; {remedy}")
    return packed


def run(config: Pack, console: Console) -> tuple[dict, int]:
    of_run = config.source.is_dir()
    source = config.source / QUANTIZED if of_run else config.source
    out = config.out or (config.source / ARTIFACT if of_run else None)
    try:
        data = source.read_bytes()
    except OSError as error:
        remedy = f"; run pgolf quantize {config.source} first" if of_run else ""
        raise UserError(f"source: cannot read {source} ({error.strerror}){remedy}") from None
    loaded = artifact.unpack(data)
    sources = code_files(config.code) if config.code else own_sources()
    code = count_code(sources)
    begin = time.perf_counter()
    with shown(console) as progress:
        advance = functools.partial(progress, f"packing with {config.codec}")
        packed = artifact.pack(loaded.tensors, config.codec, loaded.metadata, progress=advance)
    seconds = time.perf_counter() - begin
    found = ledger(packed, code)
    console.print(ledger_table(found))
    count = "strict" if config.strict else "wrapped"
    fits = found.headroom(count) >= 0
    console.print(f"codec {config.codec}: {len(packed):,} bytes, packed and checked in {seconds:.1f} s")
    if not config.code and "setup.py" not in sources:
        console.print("[yellow]! the kernels' sources are not counted: an installed package has none; pack from a checkout, or give --code")
    console.print(f"[{'green' if fits else 'red'}]{'under' if fits else 'OVER'} the cap with code counted {count}")
    totals = {c: found.total(c) for c in COUNTS}
    report = {"bytes": len(packed), **dataclasses.asdict(found), "totals": totals, "count": count, "fits": fits, "seconds": seconds}
    if out:
        write_whole(out, packed)
        console.print(f"written: {out}")
    if of_run:
        write_json(config.source / LEDGER, report)
    return report, 0 if fits else 1
