"""Quantized tensors <-> one file. The byte count is decided here.

    head      4 bytes "PGLF", u16 version, u16 codec, u32 bytes of index, u32 the same decoded, u32 streams; all little-endian
    lengths   u32 per stream
    index     brotli over JSON: what the tensors are, and the caller's metadata
    streams   as the codec gave them
    digests   16 bytes BLAKE2b of the decoded content, 16 of everything before

The decoded content is flat: all code matrices role by role, then all scales, then the float tensors; multi-byte
values of one width as byte planes, the most significant first. No pickle: nothing in a file is ever executed.
"""

import hashlib
import itertools
import json
import math
import re
import struct
from dataclasses import dataclass

import numpy as np
import torch

from pgolf_fast.codecs import CODECS, DEFAULT, Matrix, Shape, brotli_compress, brotli_decompress
from pgolf_fast.errors import UserError
from pgolf_fast.quantize import Codes, LowRank, QuantizedTensors

MAGIC = b"PGLF"
VERSION = 1
HEAD = struct.Struct("<4sHHIII")
DIGEST_BYTES = 16
# Refused before anything is allocated. The decoded bound is a byte for every bit that the challenge's cap allows.
MAX_INDEX_BYTES = 2**20
MAX_STREAMS = 2**12
MAX_DECODED_BYTES = 2**27

FLOATS = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


class ArtifactError(UserError):
    """The file is not an artifact that this version can load; nothing of it was used."""


@dataclass(frozen=True)
class Artifact:
    tensors: QuantizedTensors
    metadata: dict
    codec: str


def role(name: str) -> str:
    """What a tensor is, whichever block it is in: "blocks.3.attn.c_q.weight" is an "attn.c_q"."""
    return re.sub(r"^blocks\.\d+\.|\.weight$", "", name)


# --- writing ----------------------------------------------------------------------------------------------------------


def pack(tensors: QuantizedTensors, codec: str = DEFAULT, metadata: dict | None = None, **progress) -> bytes:
    """One file, decoded again and compared before it is returned.

    metadata  anything JSON can hold: how to rebuild the model
    progress  progress=function, for the codec
    """
    if codec not in CODECS:
        raise UserError(f"codec: no {codec!r}; there are {', '.join(CODECS)}")
    number, coder = CODECS[codec]
    index, matrices, rest = _content(tensors, metadata)
    streams = coder.encode(matrices, rest, **progress)
    packed_index = brotli_compress(index)
    head = HEAD.pack(MAGIC, VERSION, number, len(packed_index), len(index), len(streams)) + struct.pack(
        f"<{len(streams)}I", *map(len, streams)
    )
    body = head + packed_index + b"".join(streams) + _content_digest(index, [m.codes for m in matrices], rest)
    data = body + _digest(body)
    if not same(unpack(data).tensors, tensors):
        raise RuntimeError(f"codec {codec}: the packed file does not decode to what was packed; this is a defect, please report it")
    return data


def estimate_bytes(tensors: QuantizedTensors, metadata: dict | None = None) -> int:
    """What `pack` with the default codec would give, from histograms, without coding."""
    index, matrices, rest = _content(tensors, metadata)
    return round(CODECS[DEFAULT][1].estimate(matrices, rest)) + HEAD.size + len(brotli_compress(index)) + 2 * DIGEST_BYTES


def _content(tensors, metadata) -> tuple[bytes, list[Matrix], bytes]:
    """Index, matrices of codes, and the bytes of everything else."""
    entries = [_entry(name, t) for name, t in tensors.items()]
    index = json.dumps({"metadata": metadata or {}, "tensors": [e.row() for e in entries]}, sort_keys=True, separators=(",", ":")).encode()
    layout = _Layout(entries)
    if len(index) > MAX_INDEX_BYTES or layout.total_bytes > MAX_DECODED_BYTES:
        raise UserError(f"tensors: {layout.total_bytes} bytes and an index of {len(index)} are more than an artifact may hold")
    return index, *_flatten(tensors, layout)


def stream_bytes(data: bytes) -> dict[str, int]:
    """Compressed bytes by role of weights ("all" for a codec with one stream), "rest" for scales and floats, "metadata"."""
    _, index, streams, _ = _open(data)
    roles = [s.role for s in _Layout(_parse_index(index)[0]).shapes()]
    labels = [*dict.fromkeys(roles), "rest"] if len(streams) > 1 else ["all"]
    sizes = dict(zip(labels, map(len, streams), strict=True))
    return sizes | {"metadata": len(data) - sum(sizes.values())}


def same(one: QuantizedTensors, other: QuantizedTensors) -> bool:
    """Equal names, kinds, shapes, dtypes and bits."""
    return list(one) == list(other) and all(_equal(one[n], other[n]) for n in one)


def _equal(a, b):
    if isinstance(a, Codes) and isinstance(b, Codes):
        pairs = [(a.codes, b.codes), (a.scales, b.scales)]
        if (a.low_rank is None) != (b.low_rank is None):
            return False
        if a.low_rank:
            pairs += [(getattr(a.low_rank, f), getattr(b.low_rank, f)) for f in ("a", "a_scale", "b", "b_scales")]
        return all(_equal(x, y) for x, y in pairs)
    if isinstance(a, Codes) or isinstance(b, Codes) or a.dtype != b.dtype or a.shape != b.shape:
        return False
    return _bytes(a).tobytes() == _bytes(b).tobytes()  # bits, so that nan equals itself


# --- reading ----------------------------------------------------------------------------------------------------------


def unpack(data: bytes) -> Artifact:
    """The tensors, on the CPU, exactly as packed; ArtifactError for anything else."""
    try:
        return _unpack(data)
    except UserError:
        raise
    except Exception as error:  # the codecs' libraries raise what they like on hostile streams
        raise ArtifactError(f"artifact: damaged or hostile content: {type(error).__name__}: {error}") from None


def _refuse_unless(condition: bool, message: str) -> None:
    if not condition:
        raise ArtifactError(f"artifact: {message}")


def _unpack(data: bytes) -> Artifact:
    number, index, streams, digest = _open(data)
    names = [name for name, (n, _) in CODECS.items() if n == number]
    _refuse_unless(names, f"codec {number} is unknown to this version")
    entries, metadata = _parse_index(index)
    layout = _Layout(entries)
    _refuse_unless(
        layout.total_bytes <= MAX_DECODED_BYTES, f"declares {layout.total_bytes} bytes of tensors, more than {MAX_DECODED_BYTES}"
    )
    codes, rest = CODECS[names[0]][1].decode(streams, layout.shapes(), layout.rest_bytes)
    _refuse_unless(_content_digest(index, codes, rest) == digest, "decoded content does not match its checksum")
    return Artifact(_assemble(layout, codes, rest), metadata, names[0])


def _open(data: bytes) -> tuple[int, bytes, list[bytes], bytes]:
    """The container: codec number, index, streams, digest of the content."""
    _refuse_unless(len(data) >= HEAD.size + 2 * DIGEST_BYTES, f"{len(data)} bytes are too few for a file of this kind")
    magic, version, number, packed_size, index_size, num_streams = HEAD.unpack_from(data)
    _refuse_unless(magic == MAGIC, "not a pgolf artifact (wrong first bytes)")
    _refuse_unless(version == VERSION, f"version {version}, this program reads version {VERSION}")
    _refuse_unless(num_streams <= MAX_STREAMS, f"declares {num_streams} streams")
    _refuse_unless(index_size <= MAX_INDEX_BYTES, f"declares an index of {index_size} bytes, more than {MAX_INDEX_BYTES}")
    place = HEAD.size + 4 * num_streams
    _refuse_unless(len(data) >= place + packed_size + 2 * DIGEST_BYTES, "the file is cut short")
    lengths = struct.unpack_from(f"<{num_streams}I", data, HEAD.size)
    expected = place + packed_size + sum(lengths) + 2 * DIGEST_BYTES
    _refuse_unless(len(data) == expected, f"{len(data)} bytes, but its head declares {expected}: cut short or extended")
    _refuse_unless(_digest(data[:-DIGEST_BYTES]) == data[-DIGEST_BYTES:], "checksum mismatch: the file is damaged")
    index = brotli_decompress(data[place : place + packed_size], index_size)
    places = itertools.accumulate(lengths, initial=place + packed_size)
    streams = [data[begin : begin + length] for begin, length in zip(places, lengths)]
    return number, index, streams, data[-2 * DIGEST_BYTES : -DIGEST_BYTES]


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=DIGEST_BYTES).digest()


def _content_digest(index, codes, rest):
    digest = hashlib.blake2b(index, digest_size=DIGEST_BYTES)
    for part in (*codes, rest):
        digest.update(part)
    return digest.digest()


# --- the index --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Entry:
    name: str
    kind: str  # "rows" or "one" (codes with a scale per row, or one scale), or the dtype of floats
    shape: tuple[int, ...]
    low_rank: tuple[int, int] | None = None  # rank, group

    def row(self) -> list:
        return [self.name, self.kind, list(self.shape)] + ([list(self.low_rank)] if self.low_rank else [])


def _entry(name, t) -> _Entry:
    if isinstance(t, Codes):
        low_rank = (t.low_rank.a.shape[1], t.low_rank.group) if t.low_rank else None
        return _Entry(name, "rows" if t.scales.dim() else "one", tuple(t.codes.shape), low_rank)
    kind = str(t.dtype).removeprefix("torch.")
    if kind not in FLOATS:
        raise UserError(f"tensor {name}: an artifact holds codes or {', '.join(FLOATS)}, not {kind}")
    return _Entry(name, kind, tuple(t.shape))


def _parse_index(index: bytes) -> tuple[list[_Entry], dict]:
    try:
        parsed = json.loads(index)
    except (ValueError, RecursionError):
        raise ArtifactError("artifact: the index is not JSON") from None
    _refuse_unless(isinstance(parsed, dict) and parsed.keys() == {"metadata", "tensors"}, "the index lacks its two parts")
    _refuse_unless(isinstance(parsed["metadata"], dict) and isinstance(parsed["tensors"], list), "the index has parts of a wrong type")
    entries = [_parse_entry(row) for row in parsed["tensors"]]
    _refuse_unless(len({e.name for e in entries}) == len(entries), "two tensors have one name")
    return entries, parsed["metadata"]


def _parse_entry(row) -> _Entry:
    def sizes(value, least):
        return isinstance(value, list) and all(type(v) is int and least <= v <= MAX_DECODED_BYTES for v in value)

    ok = isinstance(row, list) and len(row) in (3, 4) and isinstance(row[0], str) and isinstance(row[1], str)
    ok = ok and sizes(row[2], 0) and len(row[2]) <= 8 and (row[1] in FLOATS or (row[1] in ("rows", "one") and len(row[2]) == 2))
    if ok and len(row) == 4:
        ok = row[1] == "rows" and sizes(row[3], 1) and len(row[3]) == 2 and row[3][0] * row[2][1] % row[3][1] == 0
    _refuse_unless(ok, f"the index has a wrong entry: {str(row)[:80]}")
    return _Entry(row[0], row[1], tuple(row[2]), tuple(row[3]) if len(row) == 4 else None)


# --- the flat content -------------------------------------------------------------------------------------------------


class _Layout:
    """Where every part of every tensor lies: matrices of codes in the order of roles, then 2-byte and 4-byte values."""

    def __init__(self, entries: list[_Entry]):
        self.entries = entries
        parts = [(role(e.name), i, "codes", e.shape) for i, e in enumerate(entries) if e.kind in ("rows", "one")]
        for i, e in enumerate(entries):
            if e.low_rank:
                parts += [("lqer.a", i, "a", (e.shape[0], e.low_rank[0])), ("lqer.b", i, "b", (e.low_rank[0], e.shape[1]))]
        first_seen = {}
        for part in parts:
            first_seen.setdefault(part[0], len(first_seen))
        self.matrices = sorted(parts, key=lambda part: first_seen[part[0]])
        self.scales, self.floats = [], []  # (entry, field, shape, dtype)
        for i, e in enumerate(entries):
            if e.kind in FLOATS:
                self.floats.append((i, "floats", e.shape, FLOATS[e.kind]))
                continue
            self.scales.append((i, "scales", (e.shape[0],) if e.kind == "rows" else (), torch.float16))
            if e.low_rank:
                num_groups = e.low_rank[0] * e.shape[1] // e.low_rank[1]
                self.scales += [(i, "a_scale", (), torch.float16), (i, "b_scales", (num_groups,), torch.float16)]
        self.rest_bytes = sum(math.prod(shape) * dtype.itemsize for _, _, shape, dtype in self.scales + self.floats)
        self.total_bytes = sum(math.prod(shape) for *_, shape in self.matrices) + self.rest_bytes

    def shapes(self) -> list[Shape]:
        return [Shape(name, *shape) for name, _, _, shape in self.matrices]

    def planes(self) -> list[tuple[int, list]]:
        """(bytes per value, parts) of each group of byte planes."""
        two, four = ([f for f in self.floats if f[3].itemsize == width] for width in (2, 4))
        return [(2, self.scales), (2, two), (4, four)]


def _bytes(t: torch.Tensor) -> np.ndarray:
    """The tensor's values as little-endian unsigned integers."""
    t = t.detach().cpu().contiguous()
    return t.view({1: torch.uint8, 2: torch.uint16, 4: torch.uint32}[t.element_size()]).numpy().reshape(-1)


def _part(t, field: str) -> torch.Tensor:
    if field == "floats":
        return t
    return getattr(t if field in ("codes", "scales") else t.low_rank, field)


def _flatten(tensors, layout) -> tuple[list[Matrix], bytes]:
    items = list(tensors.values())
    matrices = [Matrix(name, _part(items[i], field).cpu().contiguous().numpy()) for name, i, field, _ in layout.matrices]
    rest = b""
    for width, parts in layout.planes():
        values = [_bytes(_part(items[i], field)) for i, field, *_ in parts]
        flat = np.concatenate([np.empty(0, f"u{width}"), *values])
        rest += np.ascontiguousarray(flat.astype(f">u{width}").view(np.uint8).reshape(-1, width).T).tobytes()
    return matrices, rest


def _assemble(layout, codes, rest) -> QuantizedTensors:
    fields = [{} for _ in layout.entries]
    for (_, i, field, _), matrix in zip(layout.matrices, codes):
        fields[i][field] = torch.from_numpy(np.array(matrix))
    place = 0
    for width, parts in layout.planes():
        size = sum(math.prod(shape) for _, _, shape, _ in parts)
        planes = np.frombuffer(rest, np.uint8, size * width, place).reshape(width, size)
        values = np.ascontiguousarray(planes.T).view(f">u{width}").reshape(-1).astype(f"u{width}")
        place, begin = place + size * width, 0
        for i, field, shape, dtype in parts:
            end = begin + math.prod(shape)
            fields[i][field] = torch.from_numpy(values[begin:end].copy()).view(dtype).reshape(shape)
            begin = end
    return {e.name: _tensor(f) for e, f in zip(layout.entries, fields)}


def _tensor(f):
    if "floats" in f:
        return f["floats"]
    return Codes(f["codes"], f["scales"], LowRank(f["a"], f["a_scale"], f["b"], f["b_scales"]) if "a" in f else None)
