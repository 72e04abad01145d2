"""Codecs: matrices of small integers and a tail of other bytes, to compressed streams and back, exactly.

    codec.encode(matrices, rest)             -> streams
    codec.decode(streams, shapes, rest_size) -> the codes, and rest

Flat codecs see one run of bytes: every matrix, then the tail. The others see roles: "attn.c_q" of all blocks
is one stream. Values lie one to a byte; entropy coding does the packing, which denser bytes would hide from it.
Decoders take nothing on trust: sizes come from the caller, and a stream that does not fit them raises ValueError.
"""

import lzma
import os
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import brotli
import constriction
import numpy as np
import zstandard

from pgolf_fast.errors import UserError
from pgolf_fast.host import host


class Matrix(NamedTuple):
    role: str
    codes: np.ndarray  # int8 [rows, columns]


class Shape(NamedTuple):
    role: str
    rows: int
    columns: int


Progress = Callable[[int, int], None]  # called with what is done, and of how much; one stream alone cannot tell


def _quiet(done: int, total: int) -> None:
    pass


def _workers() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max_workers=os.cpu_count())


def _expect(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def brotli_decompress(stream: bytes, size: int) -> bytes:
    decoder = brotli.Decompressor()
    data = decoder.process(stream, output_buffer_limit=size + 1)
    # The limit may hold back a few bytes that are already decoded.
    while len(data) <= size and not decoder.is_finished():
        more = decoder.process(b"", output_buffer_limit=size + 1 - len(data))
        _expect(len(more) > 0, "brotli stream ends early")
        data += more
    _expect(len(data) == size and decoder.is_finished(), f"brotli stream does not hold {size} bytes")
    return data


def brotli_compress(data: bytes) -> bytes:
    return brotli.compress(data, quality=11, lgwin=24)


# --- flat codecs ------------------------------------------------------------------------------------------------------


class Flat:
    """One stream for everything; subclasses bring compress(data) and decompress(stream, size)."""

    def encode(self, matrices: list[Matrix], rest: bytes, progress: Progress = _quiet) -> list[bytes]:
        return [self.compress(b"".join(m.codes.tobytes() for m in matrices) + rest)]

    def decode(self, streams: list[bytes], shapes: list[Shape], rest_size: int) -> tuple[list[np.ndarray], bytes]:
        _expect(len(streams) == 1, f"expected 1 stream, found {len(streams)}")
        size = sum(s.rows * s.columns for s in shapes)
        data = self.decompress(streams[0], size + rest_size)
        _expect(len(data) == size + rest_size, f"expected {size + rest_size} bytes, decoded {len(data)}")
        return _split(np.frombuffer(data, np.int8, size), shapes), data[size:]


def _split(flat: np.ndarray, shapes: list[Shape]) -> list[np.ndarray]:
    ends = np.cumsum([s.rows * s.columns for s in shapes])
    return [part.reshape(s.rows, s.columns) for part, s in zip(np.split(flat, ends[:-1]), shapes)]


@dataclass(frozen=True)
class Stored(Flat):
    """No compression."""

    def compress(self, data):
        return data

    def decompress(self, stream, size):
        return stream


@dataclass(frozen=True)
class Zstd(Flat):
    """The smallest of several (level, minimum match) settings.

    Level 22 alone is unsteady on weights: its parser can lock on to chance matches of three bytes.
    """

    settings: tuple[tuple[int, int | None], ...]

    def compress(self, data):
        def one(setting):
            level, min_match = setting
            extra = {} if min_match is None else {"min_match": min_match}
            parameters = zstandard.ZstdCompressionParameters.from_level(level, source_size=len(data), **extra)
            return zstandard.ZstdCompressor(compression_params=parameters).compress(data)

        with _workers() as pool:
            return min(pool.map(one, self.settings), key=len)

    def decompress(self, stream, size):
        # NOTE: the decoder allocates what the frame announces, so that is checked first.
        announced = zstandard.get_frame_parameters(stream)
        _expect(announced.content_size == size, f"zstd frame announces {announced.content_size} bytes, expected {size}")
        _expect(announced.window_size <= 2**27, f"zstd window of {announced.window_size} bytes is beyond level 22's")
        return zstandard.ZstdDecompressor().decompress(stream, allow_extra_data=False)


@dataclass(frozen=True)
class Brotli(Flat):
    """Quality 11, window 2^24."""

    def compress(self, data):
        return brotli_compress(data)

    def decompress(self, stream, size):
        return brotli_decompress(stream, size)


@dataclass(frozen=True)
class Lzma(Flat):
    preset: int

    def compress(self, data):
        return lzma.compress(data, preset=self.preset)

    def decompress(self, stream, size):
        decoder = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=2**28)
        data = decoder.decompress(stream, max_length=size + 1)
        _expect(decoder.eof and not decoder.unused_data, "xz stream is cut short or followed by other bytes")
        return data


# --- codecs by role ---------------------------------------------------------------------------------------------------


class ByRole:
    """A stream per role, in order of appearance, then the tail by brotli; subclasses code one role's matrices."""

    def encode(self, matrices: list[Matrix], rest: bytes, progress: Progress = _quiet) -> list[bytes]:
        roles, streams = _by_role(matrices), []
        with _workers() as pool:
            for stream in pool.map(self.encode_role, roles, roles.values()):
                streams.append(stream)
                progress(len(streams), len(roles))
        return [*streams, brotli_compress(rest)]

    def decode(self, streams: list[bytes], shapes: list[Shape], rest_size: int) -> tuple[list[np.ndarray], bytes]:
        roles = _by_role(shapes)
        _expect(len(streams) == len(roles) + 1, f"expected {len(roles) + 1} streams, found {len(streams)}")
        with _workers() as pool:
            decoded = dict(zip(roles, map(iter, pool.map(self.decode_role, roles, streams, roles.values()))))
        return [next(decoded[s.role]) for s in shapes], brotli_decompress(streams[-1], rest_size)


def _by_role(items: list[Matrix] | list[Shape]) -> dict[str, list]:
    """Role to its matrices' codes, or to their (rows, columns)."""
    roles = {}
    for item in items:
        roles.setdefault(item.role, []).append(item.codes if isinstance(item, Matrix) else (item.rows, item.columns))
    return roles


@dataclass(frozen=True)
class Lrzip(ByRole):
    """PR #1855's pipeline: rows of some roles in similarity order, columns first, then the `lrzip` program's ZPAQ.

    The stream of a sorted role carries its permutations in front. Beyond the published options, one thread makes
    the bytes repeatable, and -T keeps lrzip from storing what its quick test takes for incompressible.
    """

    sorted_roles: tuple[str, ...] = ("tok_emb", "attn.c_q", "mlp.fc")

    def encode_role(self, role, matrices):
        _expect(all(len(m) <= 2**16 for m in matrices), f"role {role}: a row's place must fit 16 bits")
        orders = []
        if role in self.sorted_roles:
            orders = [host.similarity_order(m) for m in matrices]
            matrices = [m[order] for m, order in zip(matrices, orders)]
        permutations = brotli_compress(b"".join(order.astype("<u2").tobytes() for order in orders))
        data = b"".join(np.ascontiguousarray(m.T).tobytes() for m in matrices)
        return struct.pack("<I", len(permutations)) + permutations + _lrzip(["-z", "-L", "9", "-T", "-p", "1"], data)

    def decode_role(self, role, stream, shapes):
        """The codes of each (rows, columns)."""
        _expect(len(stream) >= 4, "lrzip stream is cut short")
        (length,) = struct.unpack_from("<I", stream)
        num_rows = sum(rows for rows, _ in shapes) if role in self.sorted_roles else 0
        permutations = np.frombuffer(brotli_decompress(stream[4 : 4 + length], 2 * num_rows), "<u2")
        flat = np.frombuffer(_lrzip(["-d"], stream[4 + length :], sum(rows * columns for rows, columns in shapes)), np.int8)
        matrices, row, place = [], 0, 0
        for rows, columns in shapes:
            m = flat[place : place + rows * columns].reshape(columns, rows).T
            if num_rows:
                order = permutations[row : row + rows]
                _expect(np.array_equal(np.sort(order), np.arange(rows)), f"role {role}: the row order is not a permutation")
                m = m[np.argsort(order)]
            matrices.append(np.ascontiguousarray(m))
            row, place = row + rows, place + rows * columns
        return matrices


def _lrzip(options: list[str], data: bytes, expected_size: int | None = None) -> bytes:
    """The program on a file; when decoding, it can neither write beyond the expected size nor run for long."""
    if not data and expected_size in (None, 0):
        return b""
    for program, package in (("lrzip", "lrzip"), ("prlimit", "util-linux")):
        if shutil.which(program) is None:
            raise UserError(f"codec lrzip needs the program {program}: apt install {package}; or choose another codec")
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "in.lrz", Path(folder) / "out"
        source.write_bytes(data)
        limit = [] if expected_size is None else ["prlimit", f"--fsize={expected_size + 1}"]
        try:
            done = subprocess.run([*limit, "lrzip", "-q", "-f", *options, "-o", target, source], capture_output=True, timeout=900)
        except subprocess.TimeoutExpired:
            raise ValueError("lrzip took longer than 900 s") from None
        _expect(
            done.returncode == 0 and target.exists(), f"lrzip failed: {(done.stderr + done.stdout).decode(errors='replace').strip()[:200]}"
        )
        _expect(expected_size in (None, target.stat().st_size), f"lrzip stream does not hold {expected_size} bytes")
        return target.read_bytes()


# --- the range codec --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Range(ByRole):
    """A range coder under static histograms, one per context; a context is how large the codes of the row and the column are.

    Sizes are levels on a logarithmic scale, six to an octave, of the mean magnitude: of each row (or of the whole
    matrix), plus that of each column relative to the matrix (or none). Per role the encoder takes what is smallest,
    levels and histograms counted. The stream: a head, its side information by brotli, the coder's words.
    """

    HEAD = struct.Struct("<BbbBBI")  # mode, lowest code, highest code, first context, contexts, bytes of side information

    def encode_role(self, role, matrices):
        return self._plan(matrices).encode()

    def estimate(self, matrices: list[Matrix], rest: bytes) -> float:
        """Bytes that encode would give, to a few hundredths of a percent, without coding."""
        with _workers() as pool:
            plans = pool.map(self._plan, _by_role(matrices).values())
        return sum(self.HEAD.size + plan.bits / 8 for plan in plans) + len(brotli_compress(rest))

    def _plan(self, matrices):
        plans = [_RangePlan(matrices, by_row, by_column) for by_row in (False, True) for by_column in (False, True)]
        return min(plans, key=lambda plan: plan.bits)

    def decode_role(self, role, stream, shapes):
        _expect(len(stream) >= self.HEAD.size, "range stream is cut short")
        mode, lowest, highest, first, num_contexts, side_size = self.HEAD.unpack_from(stream)
        _expect(mode < 4 and lowest < highest and num_contexts > 0, "range stream has a wrong head")
        alphabet = highest - lowest + 1
        num_rows = sum(rows if mode & 1 else 1 for rows, _ in shapes)
        num_columns = sum(columns for _, columns in shapes) if mode & 2 else 0
        tables_size = num_contexts * alphabet
        side = stream[self.HEAD.size : self.HEAD.size + side_size]
        side = np.frombuffer(brotli_decompress(side, tables_size + num_rows + num_columns), np.uint8)
        tables = np.cumsum(side[:tables_size].reshape(num_contexts, alphabet), axis=1, dtype=np.uint8)
        _expect(int(tables.max()) < len(SHARES), "range stream has a wrong histogram")
        rows_left, columns_left = side[tables_size : tables_size + num_rows], side[tables_size + num_rows :]
        contexts = []
        for rows, columns in shapes:
            row_levels, rows_left = np.split(rows_left, [rows if mode & 1 else 1])
            column_levels, columns_left = np.split(columns_left, [columns if mode & 2 else 0])
            contexts.append(_contexts(rows, columns, row_levels, column_levels, first, num_contexts))
        contexts = np.concatenate(contexts)
        words = stream[self.HEAD.size + side_size :]
        _expect(len(words) % 4 == 0, "range stream is not made of whole words")
        decoder = constriction.stream.queue.RangeDecoder(np.frombuffer(words, "<u4").astype(np.uint32))
        codes = np.empty(len(contexts), np.int8)
        for k in range(num_contexts):
            here = contexts == k
            count = int(here.sum())
            if count:
                _expect(tables[k].any(), f"range stream: context {k} is used and has no histogram")
                codes[here] = decoder.decode(_model(tables[k]), count) + lowest
        _expect(decoder.maybe_exhausted(), "range stream goes on after its last value")
        return _split(codes, [Shape(role, *shape) for shape in shapes])


STEPS_PER_OCTAVE = 6
# Fixed point, so that every machine sorts a magnitude into the same level: 2^-10 up to 2^8.
THRESHOLDS = np.array([round(2 ** (k / STEPS_PER_OCTAVE) * 65536) for k in range(-60, 49)], np.int64)
LEVEL_OF_ONE = 60
# A histogram's entry is a byte: 0 for a value that does not occur, else a share of 2^24 in twelfths of an octave, which
# costs less than a ten-thousandth of the size and makes tables that compress well.
SHARES = np.array([0] + [round(2 ** (4 + k / 12)) for k in range(241)], np.int64)
SHARE_BOUNDS = np.array([round(2 ** (4 + (k + 0.5) / 12)) for k in range(240)], np.int64)


def _levels(sums: np.ndarray, counts) -> np.ndarray:
    """Logarithmic levels of sums / counts."""
    return np.searchsorted(THRESHOLDS, sums * 65536 // np.maximum(counts, 1)).astype(np.uint8)


def _contexts(rows, columns, row_levels, column_levels, first, num_contexts) -> np.ndarray:
    """uint8 [rows * columns]; `column_levels` may be empty and `row_levels` may be one for all."""
    levels = row_levels.astype(np.int16)[:, None]
    if len(column_levels):
        levels = levels + column_levels.astype(np.int16)[None, :] - LEVEL_OF_ONE
    clipped = np.clip(levels - first, 0, num_contexts - 1).astype(np.uint8)
    return np.broadcast_to(clipped, (rows, columns)).reshape(-1)


def _tables(counts: np.ndarray) -> np.ndarray:
    """Histograms [contexts, alphabet] as indices into SHARES, the nearest in proportion."""
    shares = counts * 2**24 // np.maximum(counts.sum(axis=1, keepdims=True), 1)
    return np.where(counts > 0, np.searchsorted(SHARE_BOUNDS, shares, side="right") + 1, 0).astype(np.uint8)


def _model(table: np.ndarray):
    shares = SHARES[table].astype(np.float64)
    return constriction.stream.model.Categorical(shares / shares.sum(), perfect=False)


def _entropy_bits(counts: np.ndarray) -> float:
    """Bits that `counts` occurrences cost under their own shares, per row summed."""
    counts = counts.reshape(-1, counts.shape[-1]).astype(np.float64)
    totals = counts.sum(axis=1)
    return float((totals * np.log2(np.maximum(totals, 1))).sum() - (counts * np.log2(np.maximum(counts, 1))).sum())


class _RangePlan:
    """One choice of contexts for a role: its histograms and side information, and what they cost."""

    def __init__(self, matrices: list[np.ndarray], by_row: bool, by_column: bool):
        self.mode = by_row | 2 * by_column
        self.codes = np.concatenate([m.reshape(-1) for m in matrices])
        self.lowest = int(self.codes.min(initial=0))
        self.highest = max(int(self.codes.max(initial=0)), self.lowest + 1)
        row_levels, column_levels = [], []
        for m in matrices:
            magnitudes = np.abs(m.astype(np.int16))
            of_rows, of_columns = magnitudes.sum(axis=1, dtype=np.int64), magnitudes.sum(axis=0, dtype=np.int64)
            total = of_rows.sum(keepdims=True)
            row_levels.append(_levels(of_rows, m.shape[1]) if by_row else _levels(total, m.size))
            column_levels.append(_levels(of_columns * m.shape[1], total) if by_column else np.empty(0, np.uint8))
        parts = [_contexts(*m.shape, r, c, 0, 256) for m, r, c in zip(matrices, row_levels, column_levels)]
        contexts = np.concatenate(parts)
        alphabet = self.highest - self.lowest + 1
        cells = contexts.astype(np.int32) * alphabet + (self.codes - np.int16(self.lowest))
        counts = np.bincount(cells, minlength=256 * alphabet).reshape(256, alphabet)
        # A histogram costs some hundred bytes: the outermost contexts, a thousandth of the values, join their neighbours.
        below, spare = counts.sum(axis=1).cumsum(), len(contexts) // 1000
        self.first = int((below <= spare).sum()) % 256
        last = max(self.first, int((below < len(contexts) - spare).sum()))
        kept = np.stack([counts[k] for k in range(self.first, last + 1)])
        kept[0] += counts[: self.first].sum(axis=0)
        kept[-1] += counts[last + 1 :].sum(axis=0)
        self.contexts = np.clip(contexts.astype(np.int16) - self.first, 0, len(kept) - 1).astype(np.uint8)
        self.tables = _tables(kept)
        differences = np.diff(self.tables, axis=1, prepend=np.uint8(0))  # histograms are smooth
        self.side = brotli_compress(b"".join(a.tobytes() for a in (differences, *row_levels, *column_levels)))
        self.bits = _entropy_bits(kept) + 8 * len(self.side)

    def encode(self) -> bytes:
        encoder = constriction.stream.queue.RangeEncoder()
        for k, table in enumerate(self.tables):
            if table.any():
                encoder.encode(self.codes[self.contexts == k].astype(np.int32) - self.lowest, _model(table))
        words = encoder.get_compressed().astype("<u4").tobytes()
        return Range.HEAD.pack(self.mode, self.lowest, self.highest, self.first, len(self.tables), len(self.side)) + self.side + words


# ----------------------------------------------------------------------------------------------------------------------

# Name to (number in the artifact's header, codec). The published pipelines keep their settings.
CODECS = {
    "none": (0, Stored()),
    "zstd": (1, Zstd(((1, None), (2, None), (19, 7)))),
    "zstd-22": (1, Zstd(((22, None),))),
    "brotli-11": (2, Brotli()),
    "lzma-6": (3, Lzma(6)),
    "lrzip": (4, Lrzip()),
    "range": (5, Range()),
}
DEFAULT = "range"
