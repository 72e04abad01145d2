"""Source documents: JSON lines, text files or Parquet, in a fixed order, and their tokens from several processes in that same order.

The main process only reads and cuts the input into chunks; workers parse, transform, tokenize and hash. Results come back in the order
of the chunks, so the number of processes never shows in the output.
"""

import contextlib
import dataclasses
import functools
import gzip
import io
import json
import multiprocessing
import zlib
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
import zstandard

from pgolf_fast import caseops
from pgolf_fast.errors import UserError
from pgolf_fast.shards import MAX_VALUE, hash_tokens
from pgolf_fast.tokenizers import Tokenizer

CHUNK_BYTES = 2 << 20  # of input to a worker at a time; a few tenths of a second of work
COMPRESSED = (".zst", ".gz")
KINDS = ".jsonl, .txt, .md (each also .zst or .gz), .parquet, or a folder of those"


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Some adjoining documents of one file, not parsed yet."""

    path: Path
    kind: str  # "json" or "text"
    first: int  # number of the first document in the whole input
    numbers: list[int]  # of each document in its file, from 1: a line, a row
    raw: list[bytes]
    read_bytes: int  # of the input files, up to the end of this chunk


@dataclasses.dataclass(frozen=True)
class Tokenized:
    """The tokens of a chunk's documents, one after the other."""

    first: int
    read_bytes: int
    tokens: np.ndarray  # uint16
    counts: np.ndarray | None  # uint16, original bytes of each token, when asked for
    lengths: np.ndarray  # int64, tokens of each document
    text_bytes: np.ndarray  # int64, UTF-8 bytes of each document
    hashes: list[bytes]  # of each document's tokens

    def __len__(self) -> int:
        return len(self.lengths)


def find_files(sources: list[Path]) -> list[Path]:
    """The files of some sources; a folder stands for the files in it, sorted by their path."""
    files = []
    for source in map(Path, sources):
        if source.is_dir():
            inside = sorted(path for path in source.rglob("*") if path.is_file() and _kind(path))
            if not inside:
                raise UserError(f"{source}: no documents in this folder; expected {KINDS}")
            files += inside
        elif not source.is_file():
            raise UserError(f"{source}: no such file or folder; expected {KINDS}")
        elif not _kind(source):
            raise UserError(f"{source}: cannot tell what this file holds; expected {KINDS}")
        else:
            files.append(source)
    return files


def _kind(path: Path) -> str | None:
    suffixes = [suffix for suffix in path.suffixes if suffix not in COMPRESSED]
    kinds = {".jsonl": "json", ".json": "json", ".txt": "text", ".md": "text", ".parquet": "parquet"}
    # A compressed file that does not name its kind (corpus.train.zst) holds JSON lines.
    return kinds.get(suffixes[-1] if suffixes else "", "json" if path.suffix in COMPRESSED else None)


class _ZstdReader(io.RawIOBase):
    """The text of a .zst file of one or more frames. Unlike zstandard's own reader it does not take a cut-off file for a whole one."""

    def __init__(self, file):
        self.file = file
        self.decompressor = zstandard.ZstdDecompressor(max_window_size=2**31)
        self.frame = self.decompressor.decompressobj()
        self.is_between_frames = True
        self.output = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self.output:
            raw = self.frame.unused_data if self.frame.eof else b""
            if self.frame.eof:
                self.frame, self.is_between_frames = self.decompressor.decompressobj(), True
            raw = raw or self.file.read(1 << 18)
            if not raw:
                if self.is_between_frames:
                    return 0
                raise EOFError("the file is cut off")
            self.is_between_frames = False
            self.output = memoryview(self.frame.decompress(raw))
        count = min(len(buffer), len(self.output))
        buffer[:count] = self.output[:count]
        self.output = self.output[count:]
        return count


@contextlib.contextmanager
def _open(path: Path):
    """The decompressed bytes of a file, and the file itself, whose position says how far reading has come."""
    with open(path, "rb") as file:
        if path.suffix == ".zst":
            yield io.BufferedReader(_ZstdReader(file), 1 << 20), file
        elif path.suffix == ".gz":
            yield io.BufferedReader(gzip.GzipFile(fileobj=file), 1 << 20), file
        else:
            yield file, file


def read_chunks(files: list[Path], text_field: str = "text") -> Iterator[Chunk]:
    """Every document of the files, in order."""
    first = done_bytes = 0
    for path in files:
        kind = _kind(path)
        numbers, raw, size = [], [], 0
        try:
            for number, document, position in _read_documents(path, kind, text_field):
                numbers.append(number)
                raw.append(document)
                size += len(document)
                if size >= CHUNK_BYTES:
                    yield Chunk(path, kind, first, numbers, raw, done_bytes + position)
                    first += len(raw)
                    numbers, raw, size = [], [], 0
        except (EOFError, OSError, zlib.error, zstandard.ZstdError) as error:
            raise UserError(f"{path}: broken after {first + len(raw)} documents ({error}); fetch it again") from None
        done_bytes += path.stat().st_size
        if raw:
            yield Chunk(path, kind, first, numbers, raw, done_bytes)
            first += len(raw)


def _read_documents(path: Path, kind: str, text_field: str) -> Iterator[tuple[int, bytes, int]]:
    """(number in the file, raw document, bytes of the file read so far)."""
    if kind == "parquet":
        yield from _read_parquet(path, text_field)
        return
    with _open(path) as (reader, file):
        if kind == "text":
            yield 1, reader.read(), file.tell()
            return
        for number, line in enumerate(reader, start=1):
            if not line.isspace():
                yield number, line, file.tell()


def _read_parquet(path: Path, text_field: str) -> Iterator[tuple[int, bytes, int]]:
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{path}: reading Parquet needs pyarrow; `pip install pgolf-fast[data]`") from None
    try:
        table = pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowException as error:
        raise UserError(f"{path}: not a whole Parquet file ({error}); fetch it again") from None
    if text_field not in table.schema_arrow.names:
        raise UserError(f"{path}: no column {text_field!r}, only {', '.join(table.schema_arrow.names)}; name it with --text-field")
    number = 0
    for batch in table.iter_batches(batch_size=1024, columns=[text_field]):
        for text in batch.column(0).to_pylist():
            number += 1
            yield number, (text or "").encode(), path.stat().st_size * number // max(1, table.metadata.num_rows)


def parse_chunk(chunk: Chunk, text_field: str = "text") -> list[str]:
    """The texts of a chunk; an error names the file and the line or row."""
    return [_parse(raw, f"{chunk.path}:{number}", chunk.kind, text_field) for number, raw in zip(chunk.numbers, chunk.raw)]


def _parse(raw: bytes, place: str, kind: str, text_field: str) -> str:
    if kind != "json":
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            raise UserError(f"{place}: not UTF-8 at byte {error.start}; convert it first") from None
    try:
        document = json.loads(raw)
    except ValueError as error:
        raise UserError(f"{place}: not a line of JSON ({error}); expected an object with a {text_field!r}") from None
    if not isinstance(document, dict) or not isinstance(document.get(text_field), str):
        have = f"only {', '.join(map(repr, document))}" if isinstance(document, dict) else f"a {type(document).__name__}"
        raise UserError(f"{place}: no text under {text_field!r}, {have}; name the field with --text-field")
    text = document[text_field]
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{place}: a lone surrogate at index {error.start} has no UTF-8 form; replace it first") from None
    return text


def tokenize_chunk(chunk: Chunk, tokenizer: Tokenizer, is_counted: bool, text_field: str = "text") -> Tokenized:
    tokens, counts, text_bytes = [], [], []
    for number, text in zip(chunk.numbers, parse_chunk(chunk, text_field)):
        if tokenizer.is_caseops and caseops.decode(caseops.encode(text)) != text:
            raise AssertionError(f"{chunk.path}:{number}: CaseOps does not return the text; this is a defect of pgolf_fast")
        if is_counted:
            document, document_counts = tokenizer.encode_counted(text)
            if document_counts.max() > MAX_VALUE:
                problem = f"one token covers {document_counts.max():,} bytes and a sidecar holds {MAX_VALUE:,}"
                raise UserError(f"{chunk.path}:{number}: {problem}; drop the document")
            counts.append(document_counts.astype(np.uint16))
        else:
            document = tokenizer.encode(text)
        tokens.append(document)
        text_bytes.append(len(text.encode()))
    return Tokenized(
        first=chunk.first,
        read_bytes=chunk.read_bytes,
        tokens=np.concatenate(tokens),
        counts=np.concatenate(counts) if is_counted else None,
        lengths=np.array([len(document) for document in tokens], np.int64),
        text_bytes=np.array(text_bytes, np.int64),
        hashes=[hash_tokens(document) for document in tokens],
    )


_worker_tokenizer: Tokenizer | None = None  # of this worker process


def _start_worker(model: bytes) -> None:
    global _worker_tokenizer
    _worker_tokenizer = Tokenizer(model)


def _work(chunk: Chunk, is_counted: bool, text_field: str) -> Tokenized:
    return tokenize_chunk(chunk, _worker_tokenizer, is_counted, text_field)


class Workers:
    """Processes that tokenize; with one, everything happens in this process."""

    def __init__(self, tokenizer: Tokenizer, processes: int):
        self.tokenizer, self.processes = tokenizer, processes
        self.pool = None
        if processes > 1:
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload([__name__])
            self.pool = ProcessPoolExecutor(processes, context, initializer=_start_worker, initargs=(tokenizer.model,))

    def map(self, chunks: Iterator[Chunk], is_counted: bool, text_field: str = "text") -> Iterator[Tokenized]:
        """The tokens of every chunk, in the order of the chunks, with a bounded number of them in flight."""
        if self.pool is None:
            yield from (tokenize_chunk(chunk, self.tokenizer, is_counted, text_field) for chunk in chunks)
            return
        work = functools.partial(_work, is_counted=is_counted, text_field=text_field)
        in_flight = deque()
        try:
            for chunk in chunks:
                in_flight.append(self.pool.submit(work, chunk))
                if len(in_flight) > 3 * self.processes:
                    yield in_flight.popleft().result()
            while in_flight:
                yield in_flight.popleft().result()
        except BrokenProcessPool:
            raise UserError("a worker process was killed, probably for memory; run the same command again with fewer --processes") from None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.pool is not None:
            self.pool.shutdown(wait=True, cancel_futures=True)
