"""Finds the kernel library and decides which path a tensor takes.

The device decides, never a caught exception:

    CPU tensor                                  reference, in plain torch
    CUDA sm_90, library loaded                  kernel
    CUDA of another architecture                composite, in torch and Triton (named once in the log)
    CUDA sm_90, library missing                 an error that says how to build it

The library registers its kernels as `torch.ops.pgolf_fast_sm90.<name>`; they
write into tensors that the op allocated, so every allocation is torch's own.
"""

import contextlib
import functools
import logging
import os
from pathlib import Path

import torch

log = logging.getLogger("pgolf_fast")

NAMESPACE = "pgolf_fast"
# Of every RMSNorm, in the kernels too.
# NOTE: torch's own default for bfloat16 was 2**-7 in some versions, which flattens the first norm at init (its mean square is 2.5e-5).
RMS_EPSILON = 2.0**-23
HOW_TO_BUILD = "install with nvcc 13 on PATH (`pip install --no-build-isolation .`) or set PGOLF_LIBRARY to a built _C.abi3.so"

library = torch.library.Library(NAMESPACE, "DEF")


def library_file() -> Path | None:
    """The kernel library that this process uses, if there is one."""
    chosen = os.environ.get("PGOLF_LIBRARY")
    if chosen and not Path(chosen).exists():
        raise FileNotFoundError(f"PGOLF_LIBRARY: no file at {chosen}; unset it or point it at a built _C.abi3.so")
    path = Path(chosen) if chosen else Path(__file__).parent.parent / "_C.abi3.so"
    return path if path.exists() else None


_file = library_file()
if _file is not None:
    try:
        torch.ops.load_library(str(_file))
    except OSError as error:
        why = f"{_file}: torch {torch.__version__} cannot load it ({error.__cause__ or error})"
        raise ImportError(f"{why}; build it for this torch: {HOW_TO_BUILD}") from None


def build_info() -> str | None:
    """What the loaded library was built with."""
    return None if _file is None else torch.ops.pgolf_fast_sm90.build_info()


def has_kernel(name: str) -> bool:
    return hasattr(torch.ops.pgolf_fast_sm90, name)


@functools.cache
def _capability(device_index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device_index)


@functools.cache
def _say_composite(name: str, device_index: int, reason: str) -> None:
    log.warning("%s: composite torch path on %s (%s)", name, torch.cuda.get_device_name(device_index), reason)


_allowed: tuple[str, ...] | None = None  # what the names of the kernels that may run begin with; None: all may


@contextlib.contextmanager
def composite(but: tuple[str, ...] = ()):
    """Inside, every GPU takes the composite path: what kernels are compared with. Kernels whose names begin as one of `but` still run."""
    global _allowed
    before, _allowed = _allowed, but
    try:
        yield
    finally:
        _allowed = before


def uses_kernel(name: str, device: torch.device) -> bool:
    """Whether `torch.ops.pgolf_fast_sm90.<name>` serves tensors on `device`; False: the composite path does."""
    if _allowed is not None and not name.startswith(_allowed):
        return False
    index = device.index if device.index is not None else torch.cuda.current_device()
    if _capability(index) != (9, 0):
        major, minor = _capability(index)
        _say_composite(name, index, f"no kernel for sm_{major}{minor}")
        return False
    if _file is None:
        raise RuntimeError(f"{name}: this GPU is sm_90 but the kernel library is not built; {HOW_TO_BUILD}")
    if not has_kernel(name):
        _say_composite(name, index, "the library holds no such kernel")
        return False
    return True


# NOTE: what torch.compiler.assume_constant_result does, which would also import the compiler: 1.5 s of every process's start.
uses_kernel._dynamo_marked_constant = True


# A kernel cannot raise. Where it meets an index out of range it leaves (row + 1, index, bound) in pinned host
# memory, nobody waits for it, and the next call of an op on a GPU raises.
_reports: dict[str, torch.Tensor] = {}


def device_report(argument: str) -> torch.Tensor:
    """The int64 [3], host memory that kernels can write, where they report a bad index in `argument`."""
    if argument not in _reports:
        _reports[argument] = torch.zeros(3, dtype=torch.int64, pin_memory=True)
    return _reports[argument]


def check_device_errors() -> None:
    """Raises what kernels have reported so far; after `torch.cuda.synchronize()`, all that they had to report."""
    for argument, report in _reports.items():
        row, index, bound = report.tolist()
        if row:
            report.zero_()
            raise IndexError(f"{argument}: row {row - 1} of an earlier call held {index}, outside [0, {bound})")


def require(condition: bool, argument: str, message: str) -> None:
    """Input check of the public functions; the error names the argument."""
    if not condition:
        raise ValueError(f"{argument}: {message}")


def require_dtype(tensor: torch.Tensor, argument: str, allowed: tuple[torch.dtype, ...]) -> None:
    if tensor.dtype not in allowed:
        names = ", ".join(str(d).removeprefix("torch.") for d in allowed)
        raise TypeError(f"{argument}: expected {names}, got {str(tensor.dtype).removeprefix('torch.')}")


def require_device(tensor: torch.Tensor, argument: str, device: torch.device) -> None:
    if tensor.device != device:
        raise ValueError(f"{argument}: expected on {device}, got {tensor.device}")


def aligned(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` where kernels can read it, 16 bytes at a time; else a contiguous copy. A gradient may arrive as a slice at any offset."""
    is_readable = tensor.is_contiguous() and tensor.data_ptr() % 16 == 0
    return tensor if is_readable else tensor.clone(memory_format=torch.contiguous_format)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Arithmetic of the references: float64 stays, everything narrower is computed in float32."""
    return torch.promote_types(dtype, torch.float32)
