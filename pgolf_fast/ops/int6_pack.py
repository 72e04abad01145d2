"""int6: signed 6-bit codes with one fp16 scale per row.

Codes, scales and the bit layout are defined in csrc/kernels/int6_pack.h.
A list of matrices is packed into two flat buffers, and unpacked from views of
them, so that the kernel serves a whole model in one launch each way.
"""

import torch

from pgolf_fast.ops import _library
from pgolf_fast.ops._library import library, require, require_device, require_dtype

FLOATS = (torch.bfloat16, torch.float16, torch.float32)


def row_bytes(columns: int) -> int:
    return (6 * columns + 7) // 8


def pack_int6_ref(weights, scales=None):
    """[rows, columns] to (uint8 [rows, row_bytes], fp16 [rows])."""
    w = weights.to(torch.float32)
    if scales is None:
        scales = w.abs().amax(dim=1) / 31 if w.shape[1] else w.new_zeros(w.shape[0])
    scales = scales.to(torch.float16)
    s = scales.to(torch.float32)[:, None]
    usable = torch.isfinite(s) & (s > 0)
    codes = torch.where(usable, torch.round(w / torch.where(usable, s, 1.0)).clamp(-32, 31), 0.0)
    u = (codes.nan_to_num() + 32).to(torch.int32)
    u = torch.nn.functional.pad(u, (0, -u.shape[1] % 4)).view(u.shape[0], -1, 4)
    group = u[..., 0] | u[..., 1] << 6 | u[..., 2] << 12 | u[..., 3] << 18
    packed = torch.stack([group & 255, group >> 8 & 255, group >> 16], dim=-1).to(torch.uint8)
    return packed.view(w.shape[0], -1)[:, : row_bytes(w.shape[1])].contiguous(), scales


def unpack_int6_ref(packed, scales, columns, dtype=torch.bfloat16):
    """(uint8 [rows, row_bytes], fp16 [rows]) to [rows, columns]."""
    b = torch.nn.functional.pad(packed, (0, -packed.shape[1] % 3)).view(packed.shape[0], -1, 3).to(torch.int32)
    group = b[..., 0] | b[..., 1] << 8 | b[..., 2] << 16
    u = torch.stack([group & 63, group >> 6 & 63, group >> 12 & 63, group >> 18], dim=-1).view(packed.shape[0], -1)
    return ((u[:, :columns] - 32).to(torch.float32) * scales.to(torch.float32)[:, None]).to(dtype)


# `packed` and `scales` are the matrices' bytes and scales one after the other.
library.define("int6_pack(Tensor[] weights, Tensor[] given_scales) -> (Tensor packed, Tensor scales)")
library.define("int6_unpack(Tensor[] packed, Tensor[] scales, int[] columns, ScalarType dtype) -> Tensor[]")


def _pack_each(weights, given_scales):
    pairs = [pack_int6_ref(w, given_scales[i] if given_scales else None) for i, w in enumerate(weights)]
    return torch.cat([p.reshape(-1) for p, _ in pairs]), torch.cat([s for _, s in pairs])


def _unpack_each(packed, scales, columns, dtype):
    return [unpack_int6_ref(p, s, c, dtype) for p, s, c in zip(packed, scales, columns)]


library.impl("int6_pack", _pack_each, "CPU")
library.impl("int6_unpack", _unpack_each, "CPU")


@torch.library.impl(library, "int6_pack", "CUDA")
def _pack_cuda(weights, given_scales):
    if not _library.uses_kernel("int6_pack", weights[0].device):
        return _pack_each(weights, given_scales)
    raise NotImplementedError


@torch.library.impl(library, "int6_unpack", "CUDA")
def _unpack_cuda(packed, scales, columns, dtype):
    if not _library.uses_kernel("int6_unpack", packed[0].device):
        return _unpack_each(packed, scales, columns, dtype)
    raise NotImplementedError


@torch.library.register_fake(f"{_library.NAMESPACE}::int6_pack")
def _pack_fake(weights, given_scales):
    num_bytes = sum(w.shape[0] * row_bytes(w.shape[1]) for w in weights)
    first = weights[0]
    return first.new_empty(num_bytes, dtype=torch.uint8), first.new_empty(sum(w.shape[0] for w in weights), dtype=torch.float16)


@torch.library.register_fake(f"{_library.NAMESPACE}::int6_unpack")
def _unpack_fake(packed, scales, columns, dtype):
    return [p.new_empty((p.shape[0], c), dtype=dtype) for p, c in zip(packed, columns)]


def pack_int6(weights, scales=None):
    """Quantise to 6 bits and pack.

    weights  [rows, columns], bfloat16, float16 or float32; or a list of such matrices on one device
    scales   [rows] per matrix (stored as fp16), or None for each row's largest magnitude over 31
    Returns (packed uint8 [rows, ceil(6 columns / 8)], scales fp16 [rows]), or two lists of them.
    """
    if isinstance(weights, torch.Tensor):
        packed, row_scales = pack_int6([weights], None if scales is None else [scales])
        return packed[0], row_scales[0]
    require(scales is None or len(scales) == len(weights), "scales", f"expected {len(weights)} of them, one per matrix")
    if not weights:
        return [], []
    for i, w in enumerate(weights):
        require(w.dim() == 2, "weights", f"matrix {i}: expected [rows, columns], got shape {list(w.shape)}")
        require_dtype(w, "weights", FLOATS)
        require_device(w, "weights", weights[0].device)
        require(w.dtype == weights[0].dtype, "weights", f"matrix {i}: {w.dtype}, where the first is {weights[0].dtype}")
        if scales is not None:
            require(scales[i].shape == w.shape[:1], "scales", f"matrix {i}: expected shape [{w.shape[0]}], got {list(scales[i].shape)}")
            require_dtype(scales[i], "scales", FLOATS)
            require_device(scales[i], "scales", w.device)
    given = [] if scales is None else [s.to(torch.float16) for s in scales]
    flat_packed, flat_scales = torch.ops.pgolf_fast.int6_pack(list(weights), given)
    rows = [w.shape[0] for w in weights]
    widths = [row_bytes(w.shape[1]) for w in weights]
    packed = [p.view(r, b) for p, r, b in zip(flat_packed.split([r * b for r, b in zip(rows, widths)]), rows, widths)]
    return packed, list(flat_scales.split(rows))


def unpack_int6(packed, scales, columns, dtype=torch.bfloat16):
    """Inverse of `pack_int6` up to rounding to `dtype`: code times scale.

    packed   uint8 [rows, ceil(6 columns / 8)], or a list
    scales   fp16 [rows], or a list
    columns  columns of the matrix, or a list of them
    """
    if isinstance(packed, torch.Tensor):
        return unpack_int6([packed], [scales], [columns], dtype)[0]
    require(len(scales) == len(packed), "scales", f"expected {len(packed)} of them, one per matrix")
    require(len(columns) == len(packed), "columns", f"expected {len(packed)} of them, one per matrix")
    require(dtype in FLOATS, "dtype", f"expected bfloat16, float16 or float32, got {dtype}")
    if not packed:
        return []
    for i, (p, s, c) in enumerate(zip(packed, scales, columns)):
        require(p.dim() == 2, "packed", f"matrix {i}: expected [rows, bytes], got shape {list(p.shape)}")
        require_dtype(p, "packed", (torch.uint8,))
        require_dtype(s, "scales", (torch.float16,))
        require_device(p, "packed", packed[0].device)
        require_device(s, "scales", packed[0].device)
        require(s.shape == p.shape[:1], "scales", f"matrix {i}: expected shape [{p.shape[0]}], got {list(s.shape)}")
        require(c >= 0 and row_bytes(c) == p.shape[1], "columns", f"matrix {i}: {c} columns do not fill rows of {p.shape[1]} bytes")
    return torch.ops.pgolf_fast.int6_unpack(list(packed), list(scales), list(columns), dtype)
