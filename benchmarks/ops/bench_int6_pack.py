"""int6 quantise + pack and unpack + dequantise: one large matrix, and a whole model as a list.

Fewest bytes: the weights once, 6 bits of code per weight once, and an fp16 scale per row.
"""

import torch

from benchmarks.shapes import model_matrices
from benchmarks.timing import Case, rotations_for
from pgolf_fast import pack_int6, unpack_int6
from pgolf_fast.ops.int6_pack import pack_int6_ref, unpack_int6_ref


def _bytes(shapes, weight_bytes):
    return sum(rows * columns * (weight_bytes + 0.75) + 2 * rows for rows, columns in shapes)


def _each(function):
    """One call per matrix, as one composes it in torch."""
    return lambda *lists: [function(*arguments) for arguments in zip(*lists)]


def cases(device):
    weights = 2**28 if device.type == "cuda" else 2**20
    size = f"{weights / 1e6:.0f} M weights"
    for name, shapes, dtype in (
        (f"{size}, 512 columns", [(weights // 512, 512)], torch.bfloat16),
        (f"{size}, 2048 columns", [(weights // 2048, 2048)], torch.bfloat16),
        ("27M model, 66 matrices", model_matrices("sp1024"), torch.float32),
        ("36M model, 66 matrices", model_matrices("caseops8192"), torch.float32),
    ):
        torch.compiler.reset()  # else the shapes of all cases together pass torch.compile's limit of variants
        # dynamic=False: a kernel for each shape, the strongest form of the peer
        compiled_pack = _each(torch.compile(pack_int6_ref, dynamic=False))
        compiled_unpack = _each(torch.compile(unpack_int6_ref, dynamic=False))
        rotations = rotations_for(_bytes(shapes, 2))
        matrices = [[torch.randn(s, device=device).to(dtype) for s in shapes] for _ in range(rotations)]
        packed, scales = zip(*(pack_int6(m) for m in matrices))
        columns = [c for _, c in shapes]
        pack = {"ours": pack_int6, "torch.compile": compiled_pack, "torch": _each(pack_int6_ref)}
        unpack = {"ours": unpack_int6, "torch.compile": compiled_unpack, "torch": _each(unpack_int6_ref)}
        kind = str(dtype).removeprefix("torch.")
        yield Case(
            f"pack {name}, from {kind}",
            {k: lambda i, f=f: f(matrices[i]) for k, f in pack.items()},
            _bytes(shapes, dtype.itemsize),
            rotations=rotations,
        )
        yield Case(
            f"unpack {name}, to bfloat16",
            {k: lambda i, f=f: f(packed[i], scales[i], columns) for k, f in unpack.items()},
            _bytes(shapes, 2),
            rotations=rotations,
        )
