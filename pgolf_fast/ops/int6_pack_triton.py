"""int6 on GPUs without a kernel of ours: the same bytes, one launch per matrix."""

import torch
import triton
import triton.language as tl

GROUPS = 128  # of four codes, that a program handles at a time


@triton.jit
def _magnitude(weights, row, stride, columns, GROUPS: tl.constexpr):
    """Largest magnitude of a row; inf where the row holds an inf or nan."""
    largest = 0.0
    for start in range(0, columns, 4 * GROUPS):
        column = start + tl.arange(0, 4 * GROUPS)
        w = tl.abs(tl.load(weights + row * stride + column, mask=column < columns, other=0.0).to(tl.float32))
        largest = tl.maximum(largest, tl.max(tl.where(w < float("inf"), w, float("inf"))))
    return largest


@triton.jit
def _pack_kernel(weights, given_scales, packed, scales, stride, columns, row_bytes, HAS_SCALES: tl.constexpr, GROUPS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    magnitude = _magnitude(weights, row, stride, columns, GROUPS)
    scale = tl.math.div_rn(magnitude, 31.0).to(tl.float16)
    if HAS_SCALES:
        scale = tl.load(given_scales + row)
    scale = tl.where(magnitude < float("inf"), scale, float("inf")).to(tl.float16)
    tl.store(scales + row, scale)
    s = scale.to(tl.float32)
    usable = (s > 0) & (s < float("inf"))
    divisor = tl.where(usable, s, 1.0)
    for start in range(0, columns, 4 * GROUPS):
        group = start // 4 + tl.arange(0, GROUPS)[:, None]
        column = 4 * group + tl.arange(0, 4)[None, :]
        w = tl.load(weights + row * stride + column, mask=column < columns, other=0.0).to(tl.float32)
        w = tl.minimum(tl.maximum(w, -32 * divisor), 31 * divisor)  # commutes with rounding: the bounds are whole codes
        # Adding 1.5 * 2^23 rounds to a whole number, half to even.
        q = tl.math.div_rn(w, tl.zeros_like(w) + divisor) + 12582912.0 - 12582912.0
        u = tl.where(column < columns, tl.where(usable, q, 0.0).to(tl.int32) + 32, 0)
        bits = tl.sum(u << (6 * tl.arange(0, 4)[None, :]), axis=1)[:, None]
        byte = tl.arange(0, 4)[None, :]
        at = 3 * group + byte
        tl.store(packed + row * row_bytes + at, (bits >> (8 * byte) & 255).to(tl.uint8), mask=(byte < 3) & (at < row_bytes))


@triton.jit
def _unpack_kernel(packed, scales, weights, columns, row_bytes, GROUPS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    scale = tl.load(scales + row).to(tl.float32)
    for start in range(0, columns, 4 * GROUPS):
        column = start + tl.arange(0, 4 * GROUPS)
        bit = 6 * (column % 4)
        first = column // 4 * 3 + bit // 8
        low = tl.load(packed + row * row_bytes + first, mask=column < columns, other=0).to(tl.int32)
        # The second byte of a code that one byte holds may lie past the row; its bits are not used.
        high = tl.load(packed + row * row_bytes + first + 1, mask=(column < columns) & (first + 1 < row_bytes), other=0).to(tl.int32)
        q = ((low | high << 8) >> (bit % 8) & 63) - 32
        tl.store(weights + row * columns + column, (q.to(tl.float32) * scale).to(weights.dtype.element_ty), mask=column < columns)


def pack(weights, given_scales, packed, scales):
    bytes_used = rows_used = 0
    with torch.cuda.device(packed.device):
        for i, w in enumerate(weights):
            rows, columns = w.shape
            row_bytes = (6 * columns + 7) // 8
            given = given_scales[i] if given_scales else scales
            if rows:
                out = packed[bytes_used:], scales[rows_used:]
                _pack_kernel[(rows,)](w, given, *out, w.stride(0), columns, row_bytes, bool(given_scales), GROUPS)
            bytes_used += rows * row_bytes
            rows_used += rows


def unpack(packed, scales, columns, weights):
    used = 0
    with torch.cuda.device(weights.device):
        for p, s, c in zip(packed, scales, columns):
            if p.shape[0] and c:
                _unpack_kernel[(p.shape[0],)](p, s, weights[used:], c, p.shape[1], GROUPS)
            used += p.shape[0] * c
