"""Rows of a table by index, and the gradient of the table without atomics.

    out_m = table[index_m]                       dtable[v] = sum of dout_m over the places m where index v stands

The backward adds to a gradient that exists already (the tied head adds to the same one), in float32 and in the order of a stable
sort of the indices, made once per batch (`embedding_plan`); rows that stand in many places are shared by many blocks.
"""

import torch

from pgolf_fast.ops import _library
from pgolf_fast.ops._library import accumulation_dtype, aligned, library, require, require_device, require_dtype

MAX_WIDTH = 4096
RANGE = 64  # kEmbeddingRange


def embedding_ref(indices, table, dtype=torch.bfloat16):
    """The definition, differentiable.  indices [..] int64, table [V, C]"""
    return table[indices].to(dtype)


# out [.., C] in `dtype`
library.define("embedding_fwd(Tensor indices, Tensor table, ScalarType dtype) -> Tensor")

# gradient       [V, C], any float dtype, added to: gradient[v] += sum of d_out over v's places, with one rounding
# d_out          [M, C]
# sorted, order  of embedding_plan
library.define("embedding_bwd_(Tensor(a!) gradient, Tensor d_out, Tensor sorted, Tensor order) -> ()")


def embedding_plan(indices, num_rows):
    """(sorted, order): indices in ascending order, int32 [M], and the place of each, int64 [M]; equal indices keep their order."""
    # NOTE: a radix sort takes a pass per byte of the key.
    key = torch.int16 if num_rows <= 2**15 else torch.int32
    ordered, order = torch.sort(indices.flatten().to(key), stable=True)
    return ordered.to(torch.int32), order


def check_indices(indices, num_rows, argument="indices"):
    outside = (indices < 0) | (indices >= num_rows)
    if bool(outside.any()):
        row = int(outside.flatten().nonzero()[0])
        raise IndexError(f"{argument}: row {row} holds {int(indices.flatten()[row])}, outside [0, {num_rows})")


@torch.library.impl(library, "embedding_fwd", "CPU")
def _fwd_cpu(indices, table, dtype):
    check_indices(indices, table.shape[0])
    return embedding_ref(indices, table, dtype)


@torch.library.impl(library, "embedding_bwd_", "CPU")
def _backward_formula(gradient, d_out, sorted, order):
    wide = accumulation_dtype(gradient.dtype)
    total = gradient.new_zeros(gradient.shape, dtype=wide).index_add_(0, sorted, d_out[order].to(wide))
    gradient.copy_(gradient + total)


def _kernel_serves(name, table, dtype):
    width = table.shape[1]
    fits = dtype == torch.bfloat16 and table.dtype in (torch.float32, torch.bfloat16) and width % 8 == 0 and width <= MAX_WIDTH
    return fits and _library.uses_kernel(name, table.device)


@torch.library.impl(library, "embedding_fwd", "CUDA")
def _fwd_cuda(indices, table, dtype):
    if indices.numel() == 0:
        return table.new_empty(*indices.shape, table.shape[1], dtype=dtype)
    if not _kernel_serves("embedding_fwd", table, dtype):
        return embedding_ref(indices, table, dtype)
    _library.check_device_errors()
    out = table.new_empty(indices.numel(), table.shape[1], dtype=dtype)
    torch.ops.pgolf_fast_sm90.embedding_fwd(indices.flatten(), aligned(table), out, _library.device_report("indices"))
    return out.view(*indices.shape, table.shape[1])


@torch.library.impl(library, "embedding_bwd_", "CUDA")
def _bwd_cuda(gradient, d_out, sorted, order):
    if d_out.numel() == 0:
        return
    if not _kernel_serves("embedding_bwd", gradient, d_out.dtype) or not gradient.is_contiguous():
        return _backward_formula(gradient, d_out, sorted, order)
    m, width = d_out.shape
    partial_sums = gradient.new_empty(2 * -(-m // RANGE) * width, dtype=torch.float32)
    torch.ops.pgolf_fast_sm90.embedding_bwd(aligned(d_out), sorted, order, gradient, partial_sums)


@torch.library.register_fake(f"{_library.NAMESPACE}::embedding_fwd")
def _fwd_fake(indices, table, dtype):
    return table.new_empty(*indices.shape, table.shape[1], dtype=dtype)


@torch.library.register_fake(f"{_library.NAMESPACE}::embedding_bwd_")
def _bwd_fake(gradient, d_out, sorted, order):
    pass


def _save(ctx, inputs, output):
    indices, table, _ = inputs
    ctx.save_for_backward(indices)
    ctx.table_shape, ctx.table_dtype = table.shape, table.dtype


def _backward(ctx, d_out):
    (indices,) = ctx.saved_tensors
    gradient = d_out.new_zeros(ctx.table_shape, dtype=ctx.table_dtype)
    torch.ops.pgolf_fast.embedding_bwd_(gradient, d_out.flatten(0, -2), *embedding_plan(indices, ctx.table_shape[0]))
    return None, gradient, None


torch.library.register_autograd(f"{_library.NAMESPACE}::embedding_fwd", _backward, setup_context=_save)


def embedding(indices, table, dtype=torch.bfloat16):
    """`table[indices]` in `dtype`.

    indices  [..] int64, each in [0, V)
    table    [V, C], float; the kernel serves float32 and bfloat16 tables, bfloat16 results and widths that are multiples of 8
    Returns [.., C] in `dtype`.

    A training step that keeps the gradient in a buffer of its own calls `torch.ops.pgolf_fast.embedding_bwd_` with `embedding_plan`.

    An index out of range raises IndexError: at once on the CPU; on a GPU its row becomes nan and the next call raises.
    """
    require(table.dim() == 2 and table.shape[0] > 0 and table.shape[1] > 0, "table", f"expected [V, C], got shape {list(table.shape)}")
    require(table.is_floating_point(), "table", f"expected a float dtype, got {table.dtype}")
    require(dtype.is_floating_point, "dtype", f"expected a float dtype, got {dtype}")
    require_dtype(indices, "indices", (torch.int64,))
    require_device(indices, "indices", table.device)
    require(indices.dim() >= 1, "indices", "expected at least one dimension, got a scalar")
    return torch.ops.pgolf_fast.embedding_fwd(indices, table, dtype)
