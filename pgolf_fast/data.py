"""Shards to batches: the two recipes' training streams, prefetched, and the validation stream with its bytes.

A training stream is a pure function of (shards, batch tokens, world size): window(batch, rank) is known without reading what came
before. Nothing is shuffled and no seed takes part, so a position is one integer and resuming is exact.

One micro-batch takes world_size windows of tokens + 1 from the stream, rank r the r-th; inputs are a window without its last token, targets
without its first. The token that two windows could share is used once.
"""

import dataclasses
import hashlib
import queue
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pgolf_fast import dataset, shards
from pgolf_fast.denominator import check_byte_rule, check_sidecar, num_scored, rule_bytes
from pgolf_fast.errors import UserError
from pgolf_fast.shards import BOS, ShardError
from pgolf_fast.tokenizers import Tokenizer

MAX_SEGMENT = 2048  # tokens; the recipes cut longer documents
CHECKED_DOCUMENTS = 1000  # whose decoded text every run compares with its byte count; `pgolf data verify` takes all
TOO_SMALL = "build a larger set or use smaller batches"
NUM_SLOTS = 4  # pinned buffers: one being filled, one ready, one on its way to the device, one just delivered


class Stream:
    """The shards of the training split, and how windows are laid over them."""

    def __init__(self, folder: str | Path, tokens: int, world_size: int = 1, vocab_size: int | None = None):
        """`tokens` are those of one rank's micro-batch."""
        if tokens < 1 or world_size < 1:
            raise UserError(f"tokens, world_size: {tokens} and {world_size} are not both at least 1")
        self.tokens, self.world_size, self.vocab_size = tokens, world_size, vocab_size
        self.paths = shards.require_shards(folder, "train")
        self.maps = [shards.open_shard(path) for path in self.paths]
        self.window_tokens = tokens + 1
        self.micro_batch_tokens = world_size * self.window_tokens

    def window(self, batch: int, rank: int) -> np.ndarray:
        """The uint16 [tokens + 1] that `rank` takes in micro-batch `batch` (from 0, without end)."""
        raise NotImplementedError

    def state(self) -> dict:
        """What two streams must share for a position in one to mean the same in the other."""
        names = ";".join(f"{path.name} {len(tokens)}" for path, tokens in zip(self.paths, self.maps))
        return {
            "stream": type(self).__name__,
            "shards": hashlib.sha256(names.encode()).hexdigest()[:16],
            "tokens": self.tokens,
            "world_size": self.world_size,
        }

    def _read(self, shard: int, start: int, stop: int) -> np.ndarray:
        part = self.maps[shard][start:stop]
        if self.vocab_size is not None and len(part) and part.max() >= self.vocab_size:
            shards.check_vocabulary(self.paths[shard], self.maps[shard], self.vocab_size)
        return part


class ContinuousStream(Stream):
    """The SP1024 recipes': one stream over all shards, across their ends, around at the last."""

    def __init__(self, folder: str | Path, tokens: int, world_size: int = 1, vocab_size: int | None = None):
        super().__init__(folder, tokens, world_size, vocab_size)
        self.ends = np.cumsum([len(tokens) for tokens in self.maps])
        if self.ends[-1] < self.window_tokens:
            raise UserError(f"{folder}: {self.ends[-1]:,} training tokens are fewer than one window of {self.window_tokens:,}; {TOO_SMALL}")

    def window(self, batch: int, rank: int) -> np.ndarray:
        position = (batch * self.micro_batch_tokens + rank * self.window_tokens) % int(self.ends[-1])
        parts, missing = [], self.window_tokens
        shard = int(np.searchsorted(self.ends, position, side="right"))
        start = position - int(self.ends[shard] - len(self.maps[shard]))
        while missing:
            parts.append(self._read(shard, start, start + missing))
            missing -= len(parts[-1])
            shard, start = (shard + 1) % len(self.maps), 0
        return parts[0] if len(parts) == 1 else np.concatenate(parts)


class ShardStream(Stream):
    """The CaseOps recipe's: each shard from its first BOS; what is left at its end and too little for a micro-batch is never used."""

    def __init__(self, folder: str | Path, tokens: int, world_size: int = 1, vocab_size: int | None = None):
        super().__init__(folder, tokens, world_size, vocab_size)
        self.first = [_first_bos(path, tokens) for path, tokens in zip(self.paths, self.maps)]
        num_micro_batches = [(len(tokens) - first) // self.micro_batch_tokens for tokens, first in zip(self.maps, self.first)]
        self.ends = np.cumsum(num_micro_batches)
        if self.ends[-1] == 0:
            raise UserError(f"{folder}: no shard holds a micro-batch of {world_size} x {self.window_tokens:,} tokens; {TOO_SMALL}")

    def window(self, batch: int, rank: int) -> np.ndarray:
        batch %= int(self.ends[-1])
        shard = int(np.searchsorted(self.ends, batch, side="right"))
        within = batch - (int(self.ends[shard - 1]) if shard else 0)
        start = self.first[shard] + within * self.micro_batch_tokens + rank * self.window_tokens
        return self._read(shard, start, start + self.window_tokens)


def _first_bos(path: Path, tokens: np.ndarray, block: int = 1 << 16) -> int:
    for start in range(0, len(tokens), block):
        found = np.flatnonzero(tokens[start : start + block] == BOS)
        if len(found):
            return start + int(found[0])
    problem = f"no BOS (id {BOS}) anywhere, so documents cannot be told apart"
    raise ShardError(path, problem, "build the shards again with BOS before each document")


def pack_segments(inputs: np.ndarray, max_segment: int = MAX_SEGMENT, multiple: int = 1) -> np.ndarray:
    """The attention segments of a flat batch as int32 `cu_seqlens`: their starts, then the batch's length.

    A segment starts at 0, at every BOS, and every `max_segment` tokens from there. Repeating the last entry (segments without tokens)
    brings the array to a multiple of `multiple` entries: one size for nearly every batch, so that a CUDA graph can replay.
    """
    starts = np.flatnonzero(inputs == BOS)
    if len(inputs) and (len(starts) == 0 or starts[0] != 0):
        starts = np.concatenate([[0], starts])
    lengths = np.diff(starts, append=len(inputs))
    num_cuts = -(-lengths // max_segment)
    within = np.arange(num_cuts.sum()) - np.repeat(np.cumsum(num_cuts) - num_cuts, num_cuts)  # number of each segment in its document
    num_entries = len(within) + 1
    cu_seqlens = np.full(-(-num_entries // multiple) * multiple, len(inputs), np.int32)
    cu_seqlens[: num_entries - 1] = np.repeat(starts, num_cuts) + within * max_segment
    return cu_seqlens


@dataclasses.dataclass(frozen=True)
class Batch:
    """One rank's micro-batch on its device. A recipe with rows takes `inputs.view(-1, row)`."""

    inputs: Tensor  # int64 [tokens]
    targets: Tensor  # int64 [tokens]
    cu_seqlens: Tensor | None  # int32, of a packing loader; see pack_segments
    number: int  # of the micro-batch in the stream


@dataclasses.dataclass
class _Slot:
    """Host memory for one batch, and the copy that reads it."""

    tokens: Tensor  # int64 [2, tokens]: inputs, targets
    cu_seqlens: Tensor  # int32
    batch: int = 0
    copied: torch.cuda.Event | None = None


class Loader:
    """Batches of one rank, prefetched: a thread fills pinned memory, a side stream carries it to the device one batch ahead.

    The thread makes no CUDA call, so it cannot disturb a graph capture. `stalls` counts the batches that were not ready when asked for
    (the first excepted) and `stall_s` the seconds waited for them; both belong in the run's log.
    """

    def __init__(
        self,
        stream: Stream,
        rank: int = 0,
        device: torch.device | str = "cpu",
        is_packed: bool = False,
        max_segment: int = MAX_SEGMENT,
        cu_seqlens_multiple: int = 256,
    ):
        """`is_packed` adds `cu_seqlens`, padded to a multiple of `cu_seqlens_multiple` entries."""
        if not 0 <= rank < stream.world_size:
            raise UserError(f"rank: {rank} is not in [0, {stream.world_size})")
        self.stream, self.rank, self.device = stream, rank, torch.device(device)
        self.is_packed, self.max_segment, self.cu_seqlens_multiple = is_packed, max_segment, cu_seqlens_multiple
        self.side = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self.stalls, self.stall_s = 0, 0.0
        self.thread = None
        self.seek(0)

    def seek(self, batch: int) -> None:
        """The next batch will be this one."""
        self.close()
        self.position = batch  # of the next batch to deliver
        self.free, self.filled = queue.SimpleQueue(), queue.SimpleQueue()
        self.ahead: tuple[_Slot, Batch] | None = None
        self.delivered: _Slot | None = None
        self.is_starting = True
        is_pinned = self.side is not None
        for _ in range(NUM_SLOTS):
            tokens = torch.empty(2, self.stream.tokens, dtype=torch.int64, pin_memory=is_pinned)
            self.free.put(_Slot(tokens, torch.empty(self.cu_seqlens_multiple, dtype=torch.int32, pin_memory=is_pinned)))
        self.thread = threading.Thread(target=self._fill, args=(batch, self.free, self.filled), daemon=True, name="pgolf-loader")
        self.thread.start()

    def close(self) -> None:
        if self.thread is not None:
            self.free.put(None)
            self.thread.join()
            self.thread = None

    def state(self) -> dict:
        return {**self.stream.state(), "position": self.position}

    def load_state(self, state: dict) -> None:
        own = self.stream.state()
        different = [f"{key} {state.get(key)!r} there, {own[key]!r} here" for key in own if state.get(key) != own[key]]
        if different:
            raise UserError(f"loader state: of another stream ({'; '.join(different)}); resume with the same data, batch and world size")
        self.seek(state["position"])

    def _fill(self, batch: int, free: queue.SimpleQueue, filled: queue.SimpleQueue) -> None:
        try:
            while (slot := free.get()) is not None:
                window = self.stream.window(batch, self.rank)
                host = slot.tokens.numpy()
                host[0], host[1] = window[:-1], window[1:]
                if self.is_packed:
                    cu_seqlens = pack_segments(window[:-1], self.max_segment, self.cu_seqlens_multiple)
                    if len(cu_seqlens) != len(slot.cu_seqlens):  # more segments than usual, or the usual number again
                        slot.cu_seqlens = torch.empty(len(cu_seqlens), dtype=torch.int32)
                    slot.cu_seqlens.numpy()[:] = cu_seqlens
                slot.batch = batch
                filled.put(slot)
                batch += 1
        except Exception as error:
            filled.put(error)

    def _upload(self, slot: _Slot | Exception) -> tuple[_Slot, Batch]:
        if isinstance(slot, Exception):
            self.filled.put(slot)  # for the next call too
            raise slot
        with torch.cuda.stream(self.side):
            tokens = slot.tokens.to(self.device, non_blocking=True, copy=True)
            cu_seqlens = slot.cu_seqlens.to(self.device, non_blocking=True, copy=True) if self.is_packed else None
            if self.side is not None:
                slot.copied = self.side.record_event()
        return slot, Batch(tokens[0], tokens[1], cu_seqlens, slot.batch)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self.delivered is not None:
            if self.delivered.copied is not None:
                self.delivered.copied.synchronize()  # issued a step ago
            self.free.put(self.delivered)
            self.delivered = None
        slot, batch = self.ahead or self._upload(self._wait())
        if self.side is not None:
            consumer = torch.cuda.current_stream(self.device)
            consumer.wait_event(slot.copied)
            batch.inputs.record_stream(consumer)  # and so the targets, of the same memory
            if self.is_packed:
                batch.cu_seqlens.record_stream(consumer)
        self.delivered, self.ahead, self.is_starting = slot, None, False
        self.position = batch.number + 1
        if not self.filled.empty():
            following = self.filled.get()
            if isinstance(following, Exception):
                self.filled.put(following)  # it belongs to the next call
            else:
                self.ahead = self._upload(following)
        return batch

    def _wait(self) -> _Slot | Exception:
        begin, was_ready = time.perf_counter(), not self.filled.empty()
        slot = self.filled.get()
        if not was_ready and not self.is_starting:
            self.stalls += 1
            self.stall_s += time.perf_counter() - begin
        return slot


@dataclasses.dataclass(frozen=True)
class Validation:
    """The validation stream, cut to whole rows and one token, and the bytes of every target."""

    tokens: np.ndarray  # uint16 [n + 1]
    target_bytes: np.ndarray  # uint16 [n]
    document_starts: np.ndarray  # int64, positions of BOS in tokens
    has_sidecar: bool

    def __len__(self) -> int:
        return len(self.target_bytes)

    def slice(self, start: int, stop: int) -> tuple[Tensor, Tensor, Tensor]:
        """int64 inputs, targets and bytes of the targets at positions start to stop: position p predicts token p + 1."""
        window = torch.from_numpy(self.tokens[start : stop + 1].astype(np.int64))
        return window[:-1], window[1:], torch.from_numpy(self.target_bytes[start:stop].astype(np.int64))


def load_validation(folder: str | Path, row: int, tokenizer: str | Path | None = None, vocab_size: int | None = None) -> Validation:
    """The validation split of a folder. Bytes come from the sidecar where there is one, from the byte rule otherwise; the denominator is
    checked against decoded text before anything is scored with it.

    vocab_size  of the model that will read it; another tokenizer's data is refused
    """
    paths = shards.require_shards(folder, "val")
    model = dataset.find_tokenizer(folder, tokenizer)
    if model is None:
        raise UserError(f"{folder}: no {dataset.TOKENIZER_NAME} there; give the tokenizer that made these shards")
    tokenizer = Tokenizer(model)
    if vocab_size not in (None, tokenizer.vocab_size):
        sizes = f"its tokenizer has {tokenizer.vocab_size:,} pieces, the model {vocab_size:,}"
        raise UserError(f"{folder}: {sizes}; give the data set of its recipe")
    tokens = shards.read_split(paths, tokenizer.vocab_size)
    sidecar = shards.find_shards(folder, "val_bytes")
    if tokenizer.is_caseops and not sidecar:
        missing = shards.shard_name("val_bytes", 0)
        raise UserError(f"{folder}: no {missing}; CaseOps scores count original bytes, so fetch or build the sidecar too")
    check_byte_rule(tokenizer, tokens, max_documents=CHECKED_DOCUMENTS)
    if sidecar:
        counts = shards.read_split(sidecar)
        check_sidecar(tokenizer, tokens, counts)
    else:
        counts = rule_bytes(tokenizer, tokens)
    n = num_scored(len(tokens), row)
    if n == 0:
        raise UserError(f"{folder}: {len(tokens):,} validation tokens make no row of {row:,}; use shorter rows or a larger split")
    return Validation(tokens[: n + 1], counts[1 : n + 1], np.flatnonzero(tokens[:n] == BOS), bool(sidecar))
