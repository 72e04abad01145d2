"""int6: signed 6-bit codes with one fp16 scale per row.

Codes, scales and the bit layout are defined in csrc/kernels/int6_layout.h.
A list of matrices is packed into two flat buffers and unpacked into one, so
that a whole model is one launch each way; callers see views of the buffers.
Reference, kernel and composite give the same bytes.
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
    amax = w.abs().amax(dim=1) if w.shape[1] else w.new_zeros(w.shape[0])
    # NOTE: dividing by a number instead would multiply by its reciprocal on CUDA, and now and then round otherwise.
    scales = (amax / torch.full_like(amax, 31) if scales is None else scales).to(torch.float16)
    scales = torch.where(torch.isfinite(amax), scales, torch.inf)
    s = scales.to(torch.float32)[:, None]
    usable = torch.isfinite(s) & (s > 0)
    codes = torch.where(usable, torch.round(w / torch.where(usable, s, 1.0)).clamp(-32, 31), 0.0)
    u = (codes + 32).to(torch.int32)
    u = torch.nn.functional.pad(u, (0, -u.shape[1] % 4))
    u = u.view(u.shape[0], u.shape[1] // 4, 4)
    group = u[..., 0] | u[..., 1] << 6 | u[..., 2] << 12 | u[..., 3] << 18
    packed = torch.stack([group & 255, group >> 8 & 255, group >> 16], dim=-1).to(torch.uint8)
    return packed.flatten(1)[:, : row_bytes(w.shape[1])].contiguous(), scales


def unpack_int6_ref(packed, scales, columns, dtype=torch.bfloat16):
    """(uint8 [rows, row_bytes], fp16 [rows]) to [rows, columns]."""
    b = torch.nn.functional.pad(packed, (0, -packed.shape[1] % 3)).to(torch.int32)
    b = b.view(b.shape[0], b.shape[1] // 3, 3)
    group = b[..., 0] | b[..., 1] << 8 | b[..., 2] << 16
    u = torch.stack([group & 63, group >> 6 & 63, group >> 12 & 63, group >> 18], dim=-1).flatten(1)
    return ((u[:, :columns] - 32).to(torch.float32) * scales.to(torch.float32)[:, None]).to(dtype)


# The matrices' bytes, scales and weights lie one after the other in the flat results.
library.define("int6_pack(Tensor[] weights, Tensor[] given_scales) -> (Tensor packed, Tensor scales)")
library.define("int6_unpack(Tensor[] packed, Tensor[] scales, int[] columns, ScalarType dtype) -> Tensor")


@torch.library.impl(library, "int6_pack", "CPU")
def _pack_cpu(weights, given_scales):
    pairs = [pack_int6_ref(w, given_scales[i] if given_scales else None) for i, w in enumerate(weights)]
    return torch.cat([p.flatten() for p, _ in pairs]), torch.cat([s for _, s in pairs])


@torch.library.impl(library, "int6_unpack", "CPU")
def _unpack_cpu(packed, scales, columns, dtype):
    return torch.cat([unpack_int6_ref(p, s, c, dtype).flatten() for p, s, c in zip(packed, scales, columns)])


@torch.library.impl(library, "int6_pack", "CUDA")
def _pack_cuda(weights, given_scales):
    outputs = _pack_fake(weights, given_scales)
    weights = [w if w.stride(1) == 1 else w.contiguous() for w in weights]
    given_scales = [s.contiguous() for s in given_scales]
    if _library.uses_kernel("int6_pack", weights[0].device):
        torch.ops.pgolf_fast_sm90.int6_pack(weights, given_scales, *outputs)
    else:
        from pgolf_fast.ops import int6_pack_triton

        int6_pack_triton.pack(weights, given_scales, *outputs)
    return outputs


@torch.library.impl(library, "int6_unpack", "CUDA")
def _unpack_cuda(packed, scales, columns, dtype):
    weights = _unpack_fake(packed, scales, columns, dtype)
    packed, scales = [p.contiguous() for p in packed], [s.contiguous() for s in scales]
    if _library.uses_kernel("int6_unpack", weights.device):
        torch.ops.pgolf_fast_sm90.int6_unpack(packed, scales, columns, weights)
    else:
        from pgolf_fast.ops import int6_pack_triton

        int6_pack_triton.unpack(packed, scales, columns, weights)
    return weights


@torch.library.register_fake(f"{_library.NAMESPACE}::int6_pack")
def _pack_fake(weights, given_scales):
    first = weights[0]
    num_bytes = sum(w.shape[0] * row_bytes(w.shape[1]) for w in weights)
    return first.new_empty(num_bytes, dtype=torch.uint8), first.new_empty(sum(w.shape[0] for w in weights), dtype=torch.float16)


@torch.library.register_fake(f"{_library.NAMESPACE}::int6_unpack")
def _unpack_fake(packed, scales, columns, dtype):
    return packed[0].new_empty(sum(p.shape[0] * c for p, c in zip(packed, columns)), dtype=dtype)


def _views(flat, shapes):
    """The matrices of a flat buffer."""
    return [part.view(shape) for part, shape in zip(flat.split([rows * width for rows, width in shapes]), shapes)]


def pack_int6(weights, scales=None):
    """Quantise to 6 bits and pack.

    weights  [rows, columns], bfloat16, float16 or float32; or a list of such matrices of one dtype on one device.
             Rows may be strided; weights that are not neighbours in a row are copied first
    scales   [rows] per matrix (stored as fp16), or None for each row's largest magnitude over 31
    Returns (packed uint8 [rows, ceil(6 columns / 8)], scales fp16 [rows]), or two lists of them.
    A row that holds an inf or nan gets the scale inf.
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
    packed = _views(flat_packed, [(w.shape[0], row_bytes(w.shape[1])) for w in weights])
    return packed, list(flat_scales.split([w.shape[0] for w in weights]))


def unpack_int6(packed, scales, columns, dtype=torch.bfloat16):
    """Inverse of `pack_int6` up to rounding to `dtype`: code times scale.

    packed   uint8 [rows, ceil(6 columns / 8)], or a list
    scales   fp16 [rows], or a list
    columns  columns of the matrix, or a list of them
    Returns [rows, columns] in `dtype`, which is bfloat16, float16 or float32; or a list of such matrices.
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
    flat = torch.ops.pgolf_fast.int6_unpack(list(packed), list(scales), list(columns), dtype)
    return _views(flat, [(p.shape[0], c) for p, c in zip(packed, columns)])
