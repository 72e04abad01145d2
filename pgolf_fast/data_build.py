"""Documents to shards: `pgolf data build`.

Validation comes first: either all documents of `val`, or the first `val_documents` of `documents`. Everything after is training; a
training document whose tokens equal a validation document's is left out, so the two splits never overlap. The record is saved each
time a shard is finished, and the same command takes up there.
"""

import contextlib
import dataclasses
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from pgolf_fast import dataset
from pgolf_fast.dataset import CHALLENGE_VAL_DOCUMENTS, Record, Split
from pgolf_fast.documents import Chunk, Tokenized, Workers, find_files, read_chunks
from pgolf_fast.errors import UserError
from pgolf_fast.shards import SHARD_TOKENS, SPLITS, ShardWriter, count_tokens, find_shards, hash_tokens, read_split, split_documents
from pgolf_fast.tokenizers import Tokenizer

Progress = Callable[[int, int], None]  # bytes of input done, bytes in all


@dataclasses.dataclass(frozen=True)
class BuildConfig:
    documents: tuple[Path, ...]
    """Files or folders of documents: JSON lines, text, Parquet; .zst and .gz too."""
    tokenizer: Path
    """A SentencePiece model; one with the CaseOps operators gets the case transform and a byte sidecar."""
    val: tuple[Path, ...] = ()
    """Validation documents; all of them are used. Without any, the first `val_documents` of the documents are."""
    val_documents: int = CHALLENGE_VAL_DOCUMENTS
    """The challenge's own number, by which scores compare; fewer would put its other validation documents into training."""
    text_field: str = "text"
    """Of JSON lines and Parquet."""
    shard_tokens: int = SHARD_TOKENS
    """Of every shard but a split's last; the challenge's own size."""
    max_train_tokens: int | None = None
    """Stop after the training document that reaches this many tokens."""
    processes: int = os.cpu_count() or 1
    """That tokenize; their number does not change the result."""


def cut_chunks(chunks: Iterator[Chunk], start: int, stop: int | None) -> Iterator[Chunk]:
    """The documents numbered start to stop."""
    for chunk in chunks:
        if stop is not None and chunk.first >= stop:
            return
        low = max(0, start - chunk.first)
        high = len(chunk.raw) if stop is None else min(len(chunk.raw), stop - chunk.first)
        if low < high:
            yield dataclasses.replace(chunk, first=chunk.first + low, numbers=chunk.numbers[low:high], raw=chunk.raw[low:high])


def build(config: BuildConfig, out: str | Path, progress: Progress = lambda done, total: None) -> Record:
    """Builds or takes up again the data set in folder `out`, and returns its record."""
    out = Path(out)
    tokenizer = Tokenizer(config.tokenizer)
    val_files, documents = find_files(list(config.val)), find_files(list(config.documents))
    if not documents:
        raise UserError("documents: none given; name at least one file or folder")
    for name in ("val_documents", "shard_tokens", "max_train_tokens", "processes"):
        if getattr(config, name) is not None and getattr(config, name) < 1:
            raise UserError(f"{name}: {getattr(config, name)} is not at least 1")
    made_from = {
        "documents": _describe(documents),
        "val": _describe(val_files),
        "val_documents": None if val_files else config.val_documents,
        "text_field": config.text_field,
        "shard_tokens": config.shard_tokens,
        "max_train_tokens": config.max_train_tokens,
        "tokenizer_sha256": tokenizer.sha256,
        "vocab_size": tokenizer.vocab_size,
        "is_caseops": tokenizer.is_caseops,
    }
    out.mkdir(parents=True, exist_ok=True)
    record = _open_record(out, made_from)
    if record.is_complete:
        return record
    tokenizer.save(out / dataset.TOKENIZER_NAME)
    record.save(out)
    val_bytes = sum(path.stat().st_size for path in val_files)
    total_bytes = val_bytes + sum(path.stat().st_size for path in documents)
    num_val = None if val_files else config.val_documents
    with Workers(tokenizer, config.processes) as workers:
        if "val" not in record.splits:
            chunks = cut_chunks(read_chunks(val_files or documents, config.text_field), 0, num_val)
            results = workers.map(chunks, tokenizer.is_caseops, config.text_field)
            _write_val(out, record, _reporting(results, progress, 0, total_bytes), num_val, tokenizer.is_caseops)
        chunks = cut_chunks(read_chunks(documents, config.text_field), record.next_document, None)
        results = workers.map(chunks, False, config.text_field)
        _write_train(out, record, _reporting(results, progress, val_bytes, total_bytes), config)
    if record.splits["train"].documents == 0:
        raise UserError(
            f"all {record.splits['val'].documents} documents went to validation and none is left to train on; "
            "give more documents, or fewer --val-documents, or a --val file"
        )
    record.is_complete = True
    record.save(out)
    return record


def _describe(files: list[Path]) -> list[dict]:
    """Names and sizes, not folders: the same files at another place are the same source."""
    return [{"name": path.name, "bytes": path.stat().st_size} for path in files]


def _open_record(out: Path, made_from: dict) -> Record:
    record = dataset.load_record(out)
    present = [path for split in SPLITS for path in find_shards(out, split)]
    if record is None and present:
        raise UserError(f"{out}: already holds {present[0].name}, not made by this command; choose another folder or remove its shards")
    if record is None or not record.shards:
        for path in present:
            path.unlink()  # of a build that stopped before its validation split was whole
        return Record(made_from)
    if record.made_from != made_from:
        different = ", ".join(key for key in made_from if record.made_from.get(key) != made_from[key])
        raise UserError(f"{out}: holds a build from other settings ({different}); choose another folder or remove this one")
    return record


def _reporting(results: Iterator[Tokenized], progress: Progress, offset: int, total: int) -> Iterator[Tokenized]:
    for result in results:
        yield result
        progress(offset + result.read_bytes, total)


def _finish_shards(out: Path, record: Record, writer: ShardWriter) -> None:
    record.shards += [dataset.Shard(path.name, count_tokens(path), dataset.hash_file(path)) for path in writer.finished]
    writer.finished.clear()


def _write_val(out: Path, record: Record, results: Iterator[Tokenized], num_documents: int | None, is_counted: bool) -> None:
    split = Split(counted_bytes=0 if is_counted else None)
    with contextlib.ExitStack() as stack:
        writer = stack.enter_context(ShardWriter(out, "val", record.made_from["shard_tokens"]))
        sidecar = stack.enter_context(ShardWriter(out, "val_bytes", record.made_from["shard_tokens"])) if is_counted else None
        for result in results:
            writer.append(result.tokens)
            if sidecar:
                sidecar.append(result.counts)
                split.counted_bytes += int(result.counts.sum(dtype=np.int64))
            split.documents += len(result)
            split.tokens += len(result.tokens)
            split.text_bytes += int(result.text_bytes.sum())
        if num_documents is not None and split.documents < num_documents:
            raise UserError(
                f"{split.documents:,} documents in all, but the first {num_documents:,} are for validation; "
                "give more documents, or fewer --val-documents, or a --val file"
            )
    for each in filter(None, (writer, sidecar)):
        _finish_shards(out, record, each)
    record.splits = {"val": split, "train": Split()}
    record.next_document = num_documents or 0
    record.save(out)


def _write_train(out: Path, record: Record, results: Iterator[Tokenized], config: BuildConfig) -> None:
    val_hashes = {hash_tokens(document) for document in split_documents(read_split(find_shards(out, "val")))}
    split = record.splits["train"]
    num_finished = sum(shard.name.startswith("fineweb_train_") for shard in record.shards)
    num_skip = record.next_document_tokens  # of the first document, already in a finished shard
    limit = config.max_train_tokens or math.inf
    with ShardWriter(out, "train", config.shard_tokens, num_finished) as writer:
        for result in results:
            if split.tokens >= limit:
                break
            is_kept = np.array([document_hash not in val_hashes for document_hash in result.hashes])
            ends = np.cumsum(np.where(is_kept, result.lengths, 0))  # in tokens, of every document here
            if split.tokens + ends[-1] >= limit:
                stop = int(np.searchsorted(ends, limit - split.tokens)) + 1
                ends, is_kept = ends[:stop], is_kept[:stop]
            lengths = result.lengths[: len(is_kept)]
            tokens = result.tokens[: lengths.sum()][np.repeat(is_kept, lengths)]
            writer.append(tokens[num_skip:])
            num_skip = 0
            if writer.finished:
                # The record holds what the finished shards hold: whole documents, and so many tokens of the next one.
                _finish_shards(out, record, writer)
                in_shards = writer.number * config.shard_tokens - split.tokens
                num_whole = int(np.searchsorted(ends, in_shards, side="right"))
                record.next_document = result.first + num_whole
                record.next_document_tokens = int(in_shards - (ends[num_whole - 1] if num_whole else 0))
                record.splits["train"] = _add(split, result, is_kept[:num_whole])
                record.save(out)
            split = _add(split, result, is_kept)
    _finish_shards(out, record, writer)
    record.splits["train"] = split
    record.next_document = record.next_document_tokens = 0


def _add(split: Split, result: Tokenized, is_kept: np.ndarray) -> Split:
    """A split with the first documents of a result added, those that are kept."""
    n = len(is_kept)
    return dataclasses.replace(
        split,
        documents=split.documents + int(is_kept.sum()),
        tokens=split.tokens + int(result.lengths[:n][is_kept].sum()),
        text_bytes=split.text_bytes + int(result.text_bytes[:n][is_kept].sum()),
        dropped_documents=split.dropped_documents + int((~is_kept).sum()),
    )
