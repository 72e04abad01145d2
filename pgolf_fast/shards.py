"""The challenge's token shards: `fineweb_{train,val,val_bytes}_NNNNNN.bin`.

    int32[256] little-endian   [0] magic 20240520, [1] version 1, [2] number of values, the rest 0
    uint16[count] little-endian

The tokens are documents one after the other, each BOS and then its pieces, without EOS; a document may straddle two shards.
A `val_bytes` shard (the byte sidecar) has the same layout, one count of original bytes per token of the `val` shard of the same number.
"""

import hashlib
import itertools
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from pgolf_fast.errors import UserError

MAGIC = 20240520
VERSION = 1
HEADER_INTS = 256
HEADER_BYTES = 4 * HEADER_INTS
TOKEN_BYTES = 2
MAX_VALUE = 2**16 - 1
BOS = 1  # starts every document
SHARD_TOKENS = 100_000_000  # of every shard but the last of its split, in the challenge's own export
SPLITS = ("train", "val", "val_bytes")
# Whole names only: a glob for fineweb_val_* also matches the sidecar.
NAME = re.compile(r"fineweb_(train|val|val_bytes)_(\d{6})\.bin")
REMEDY = "fetch or build it again (`pgolf data get`, `pgolf data build`)"


class ShardError(UserError):
    """A shard file that breaks the format: its path, what is wrong and where, and the remedy."""

    def __init__(self, path: Path, problem: str, remedy: str = REMEDY):
        super().__init__(f"{path}: {problem}; {remedy}")
        self.path, self.problem, self.remedy = Path(path), problem, remedy


def shard_name(split: str, number: int) -> str:
    return f"fineweb_{split}_{number:06d}.bin"


def find_shards(folder: str | Path, split: str) -> list[Path]:
    """The shards of one split, in the order in which they are read."""
    matches = ((path, NAME.fullmatch(path.name)) for path in Path(folder).iterdir())
    return sorted(path for path, match in matches if match and match[1] == split)


def require_shards(folder: str | Path, split: str) -> list[Path]:
    if not Path(folder).is_dir():
        raise UserError(f"{folder}: no such folder; `pgolf data build`, `get` and `demo` make one")
    shards = find_shards(folder, split)
    if not shards:
        raise UserError(f"{folder}: no {shard_name(split, 0)} there; `pgolf data build`, `get` and `demo` make such folders")
    return shards


def count_tokens(path: str | Path) -> int:
    """The number of values in a shard, after every check that needs only the header and the file's size."""
    path = Path(path)
    size = path.stat().st_size if path.exists() else None
    if size is None:
        raise ShardError(path, "no such file")
    if size == 0:
        raise ShardError(path, "zero bytes, probably an interrupted download")
    if size < HEADER_BYTES:
        raise ShardError(path, f"ends at byte {size}, inside the header of {HEADER_BYTES}")
    magic, version, count = (int(value) for value in np.fromfile(path, dtype="<i4", count=3))
    if magic != MAGIC:
        raise ShardError(path, f"byte 0: magic {magic} is not {MAGIC}, so this is no token shard")
    if version != VERSION:
        raise ShardError(path, f"byte 4: version {version} is not {VERSION}", "this program reads uint16 shards of version 1 only")
    if count < 0:
        raise ShardError(path, f"byte 8: a count of {count}")
    expected = HEADER_BYTES + TOKEN_BYTES * count
    if size != expected:
        what = "truncated" if size < expected else "too long"
        raise ShardError(path, f"{what}: ends at byte {size}, but {count:,} tokens end at byte {expected}")
    return count


def open_shard(path: str | Path, vocab_size: int | None = None) -> np.ndarray:
    """The values of a shard as a read-only memory map of uint16; with `vocab_size`, every one is checked against it."""
    count = count_tokens(path)
    if count == 0:
        return np.empty(0, np.uint16)  # nothing to map
    tokens = np.memmap(path, dtype="<u2", mode="r", offset=HEADER_BYTES, shape=(count,))
    if vocab_size is not None:
        check_vocabulary(path, tokens, vocab_size)
    return tokens


def check_vocabulary(path: str | Path, tokens: np.ndarray, vocab_size: int, block: int = 1 << 22) -> None:
    for start in range(0, len(tokens), block):
        part = tokens[start : start + block]
        if int(part.max()) >= vocab_size:
            at = start + int(np.argmax(part >= vocab_size))
            raise ShardError(
                Path(path),
                f"byte {HEADER_BYTES + TOKEN_BYTES * at}: token {int(tokens[at])} is outside the vocabulary of {vocab_size}",
                "use the tokenizer that these shards were made with, or build them again",
            )


def write_shard(path: str | Path, tokens: np.ndarray) -> None:
    """Writes one whole shard; a file of that name exists afterwards only if all of it was written."""
    with ShardFile(path) as shard:
        shard.append(tokens)


class ShardFile:
    """A shard being written. It lies under another name until `close` has put its count in and flushed it to disk."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.partial = self.path.with_name(self.path.name + ".partial")
        self.count = 0
        self.file = open(self.partial, "wb")
        self.file.write(bytes(HEADER_BYTES))

    def append(self, tokens: np.ndarray) -> None:
        tokens = np.asarray(tokens)
        if tokens.dtype != np.uint16 and len(tokens) and not (0 <= int(tokens.min()) and int(tokens.max()) <= MAX_VALUE):
            raise ValueError(f"tokens: a value outside [0, {MAX_VALUE}] does not fit a shard")
        self.file.write(np.ascontiguousarray(tokens, dtype="<u2").data)
        self.count += len(tokens)

    def close(self) -> None:
        header = np.zeros(HEADER_INTS, dtype="<i4")
        header[:3] = MAGIC, VERSION, self.count
        self.file.seek(0)
        self.file.write(header.tobytes())
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        self.partial.replace(self.path)

    def discard(self) -> None:
        self.file.close()
        self.partial.unlink(missing_ok=True)

    def __enter__(self):
        return self

    def __exit__(self, failure, *_):
        self.discard() if failure else self.close()


class ShardWriter:
    """Cuts a stream of tokens into the shards of one split, `shard_tokens` to each; a document may straddle two."""

    def __init__(self, folder: str | Path, split: str, shard_tokens: int = SHARD_TOKENS, first_number: int = 0):
        self.folder, self.split, self.shard_tokens = Path(folder), split, shard_tokens
        self.finished: list[Path] = []
        self.number = first_number
        self.shard: ShardFile | None = None

    def append(self, tokens: np.ndarray) -> None:
        while len(tokens):
            if self.shard is None:
                self.shard = ShardFile(self.folder / shard_name(self.split, self.number))
            room = self.shard_tokens - self.shard.count
            self.shard.append(tokens[:room])
            tokens = tokens[room:]
            if self.shard.count == self.shard_tokens:
                self._finish()

    def _finish(self) -> None:
        self.shard.close()
        self.finished.append(self.shard.path)
        self.number += 1
        self.shard = None

    def close(self) -> None:
        """Ends the split: the last shard may be short. A split without tokens still gets one (empty) shard."""
        if self.shard is None and self.number == 0:
            self.shard = ShardFile(self.folder / shard_name(self.split, 0))
        if self.shard is not None:
            self._finish()

    def __enter__(self):
        return self

    def __exit__(self, failure, *_):
        if not failure:
            self.close()
        elif self.shard is not None:
            self.shard.discard()


def read_split(shards: Iterable[Path], vocab_size: int | None = None) -> np.ndarray:
    """All tokens of some shards in one array in memory (validation sets; a training set is read through its maps)."""
    parts = [open_shard(path, vocab_size) for path in shards]
    return np.concatenate(parts) if parts else np.empty(0, np.uint16)


def split_documents(tokens: np.ndarray) -> Iterator[np.ndarray]:
    """The documents in a stream of tokens, each with its BOS; what stands before the first BOS belongs to none."""
    starts = np.flatnonzero(tokens == BOS)
    return (tokens[start:end] for start, end in itertools.pairwise([*starts.tolist(), len(tokens)]))


def hash_tokens(tokens: np.ndarray) -> bytes:
    """What says that two documents are the same, whatever white space they lost."""
    return hashlib.blake2b(np.ascontiguousarray(tokens, "<u2").data, digest_size=16).digest()
