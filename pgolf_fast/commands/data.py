"""`pgolf data`: make, fetch and check data sets."""

import dataclasses
import functools
import os
import time
from pathlib import Path
from typing import Annotated

import tyro
from rich import box
from rich.console import Console
from rich.table import Table

from pgolf_fast import data_build, data_get, data_verify, demo_corpus, tokenizers
from pgolf_fast.commands.progress import shown
from pgolf_fast.data_build import BuildConfig
from pgolf_fast.data_get import GetConfig
from pgolf_fast.data_verify import VerifyConfig
from pgolf_fast.dataset import Record, load_record
from pgolf_fast.documents import find_files, parse_chunk, read_chunks
from pgolf_fast.errors import UserError

Folder = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")]
OK, WRONG = 0, 1


@dataclasses.dataclass(frozen=True)
class Build:
    """Turn JSON lines, text or Parquet into shards and byte sidecars; the same command resumes."""

    out: Folder
    """The data set folder to make."""
    config: tyro.conf.OmitArgPrefixes[BuildConfig]
    json: bool = False
    """Print the result as JSON."""


@dataclasses.dataclass(frozen=True)
class Get:
    """Fetch the challenge's published shards (needs the [data] extra)."""

    out: Folder
    """The data set folder to make."""
    config: tyro.conf.OmitArgPrefixes[GetConfig] = GetConfig()
    json: bool = False
    """Print the result as JSON."""


@dataclasses.dataclass(frozen=True)
class Verify:
    """Check a data set and print its certificate; exit code 1 if anything is wrong."""

    folder: Folder
    """The data set folder."""
    config: tyro.conf.OmitArgPrefixes[VerifyConfig] = VerifyConfig()
    json: bool = False
    """Print the result as JSON."""


@dataclasses.dataclass(frozen=True)
class Demo:
    """Make a small data set from the Python standard library, without network."""

    out: Folder
    """The data set folder to make."""
    vocab_size: int = 1024
    """Pieces of the tokenizer, which is trained on the same text."""
    caseops: bool = False
    """Use the case transform, with a byte sidecar."""
    processes: int = os.cpu_count() or 1
    """Worker processes."""
    json: bool = False
    """Print the result as JSON."""


@dataclasses.dataclass(frozen=True)
class TrainTokenizer:
    """Train a SentencePiece tokenizer with the recipes' settings."""

    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """The .model file to write; its pieces go to a .vocab file beside it."""
    documents: tuple[Path, ...]
    """Training documents: files or folders."""
    vocab_size: int = 8192
    """Pieces, the 256 bytes and the reserved ones included."""
    caseops: bool = False
    """Train on case-transformed text and reserve its four operators."""
    max_text_mb: float = 100.0
    """Use documents up to this much text."""
    text_field: str = "text"
    """Of JSON lines and Parquet."""
    json: bool = False
    """Print the result as JSON."""


@dataclasses.dataclass(frozen=True)
class Data:
    """Make, fetch and check data sets: build, get, verify, demo, train-tokenizer."""

    verb: Annotated[
        Build | Get | Verify | Demo | TrainTokenizer,
        tyro.conf.OmitSubcommandPrefixes,
        tyro.conf.OmitArgPrefixes,
        tyro.conf.arg(name=""),
    ]

    @property
    def json(self) -> bool:
        return self.verb.json


def run(config: Data, console: Console) -> tuple[dict, int]:
    verb = config.verb
    return {Build: _build, Get: _get, Verify: _verify, Demo: _demo, TrainTokenizer: _train_tokenizer}[type(verb)](verb, console)


def _build(verb: Build, console: Console) -> tuple[dict, int]:
    begin, earlier = time.perf_counter(), load_record(verb.out)
    with shown(console) as progress:
        record = data_build.build(verb.config, verb.out, functools.partial(progress, "tokenizing"))
    seconds = 0.0 if record == earlier else time.perf_counter() - begin
    return _show_record(record, verb.out, seconds, console), OK


def _demo(verb: Demo, console: Console) -> tuple[dict, int]:
    begin = time.perf_counter()
    with shown(console) as progress:
        record = demo_corpus.make(verb.out, verb.vocab_size, verb.caseops, verb.processes, functools.partial(progress, "demo corpus"))
    return _show_record(record, verb.out, time.perf_counter() - begin, console), OK


def _show_record(record: Record, out: Path, seconds: float, console: Console) -> dict:
    table = Table(title=str(out), title_justify="left", box=box.SIMPLE)
    for heading in ("split", "documents", "tokens", "bytes of text", "counted bytes", "left out"):
        table.add_column(heading, justify="left" if heading == "split" else "right")
    for name, split in record.splits.items():
        counted = "" if name == "train" else "by the byte rule" if split.counted_bytes is None else f"{split.counted_bytes:,}"
        figures = (f"{figure:,}" for figure in (split.documents, split.tokens, split.text_bytes))
        table.add_row(name, *figures, counted, f"{split.dropped_documents:,}")
    console.print(table)
    text_mb = sum(split.text_bytes for split in record.splits.values()) / 1e6
    how = f"in {seconds:.1f} s" if seconds else "already there, nothing to do"
    console.print(f"{text_mb:,.1f} MB of text {how}; check it with: pgolf data verify {out}", soft_wrap=True)
    splits = {name: dataclasses.asdict(split) for name, split in record.splits.items()}
    made = [dataclasses.asdict(shard) for shard in record.shards]
    return {"folder": str(out), "seconds": round(seconds, 3), "splits": splits, "shards": made}


def _get(verb: Get, console: Console) -> tuple[dict, int]:
    with shown(console) as progress:
        result = data_get.get(verb.config, verb.out, functools.partial(progress, "downloading"))
    console.print(f"{len(result['files'])} files of {result['variant']} in {verb.out}; check them with: pgolf data verify {verb.out}")
    return result, OK


def _verify(verb: Verify, console: Console) -> tuple[dict, int]:
    with shown(console) as progress:
        report = data_verify.verify(verb.folder, verb.config, functools.partial(progress, "verifying"))
    bad = {finding.check for finding in report.findings}
    for name, seen in report.checks.items():
        console.print(f"{'[red]WRONG[/red]' if name in bad else '[green]ok[/green]   '}  {name}: {seen}", soft_wrap=True, highlight=False)
    for finding in report.findings:
        console.print(f"[red]{finding.check}[/red]  {finding}", soft_wrap=True, highlight=False)
    if report.certificate:
        console.print("\ndata certificate", highlight=False)
        for name, value in report.certificate.items():
            figure = f"{value:,}" if isinstance(value, int) else value
            console.print(f"  {name:<32}  {figure}", soft_wrap=True, highlight=False)
    result = {
        "folder": report.folder,
        "ok": report.is_ok,
        "checks": report.checks,
        "findings": [dataclasses.asdict(finding) for finding in report.findings],
        "certificate": report.certificate,
    }
    return result, OK if report.is_ok else WRONG


def _train_tokenizer(verb: TrainTokenizer, console: Console) -> tuple[dict, int]:
    if verb.out.suffix != ".model":
        raise UserError(f"{verb.out}: a tokenizer's name ends in .model; the pieces go to the .vocab beside it")
    files = find_files(list(verb.documents))
    size = 0

    def texts():
        nonlocal size
        for chunk in read_chunks(files, verb.text_field):
            for text in parse_chunk(chunk, verb.text_field):
                if size >= verb.max_text_mb * 1e6:
                    return
                size += len(text)
                yield text

    begin = time.perf_counter()
    tokenizer = tokenizers.train(texts(), verb.vocab_size, verb.caseops)
    verb.out.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save(verb.out)
    seconds = time.perf_counter() - begin
    console.print(f"{tokenizer.vocab_size} pieces from {size / 1e6:.1f} M characters in {seconds:.1f} s: {verb.out}")
    result = {"model": str(verb.out), "vocab_size": tokenizer.vocab_size, "is_caseops": tokenizer.is_caseops, "sha256": tokenizer.sha256}
    return {**result, "seconds": round(seconds, 3)}, OK
