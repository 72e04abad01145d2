"""`pgolf doctor`: what this machine has, which path each op takes, and what mends what is missing."""

import dataclasses
import platform
import re
import shutil
import subprocess
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table

import pgolf_fast
from pgolf_fast.ops import _library
from pgolf_fast.ops.embed_norm import embed_norm_ref
from pgolf_fast.ops.embedding import embedding_ref
from pgolf_fast.ops.fused_mlp import fused_mlp_ref
from pgolf_fast.ops.int6_pack import pack_int6_ref, unpack_int6_ref
from pgolf_fast.ops.linear_softcap_ce import linear_softcap_cross_entropy_ref
from pgolf_fast.ops.mix_norm import mix_norm_ref
from pgolf_fast.ops.orthogonalize import COEFFICIENTS, orthogonalize_ref
from pgolf_fast.ops.products import project
from pgolf_fast.ops.softcap_ce import softcap_cross_entropy_ref
from pgolf_fast.ops.xsa_attention import xsa_attention_ref

READY, LIMITED, BROKEN = 0, 1, 2
VERDICTS = {
    READY: "ready: every op runs on its kernel",
    LIMITED: "works with limits: see the lines marked !",
    BROKEN: "broken: see the lines marked x",
}


@dataclasses.dataclass(frozen=True)
class Doctor:
    """Check this machine: versions, devices, and each op called on a tiny input.

    Exit code 0: ready for training at full speed; 1: works, with limits; 2: something is broken.
    """

    json: bool = False
    """Print the findings as JSON."""


@dataclasses.dataclass
class Finding:
    name: str
    status: int
    found: str
    remedy: str = ""


@dataclasses.dataclass(frozen=True)
class Probe:
    """One call of a public op on a tiny input, and the same in float64 by its definition."""

    op: str
    kernel: str
    call: Callable[[torch.device], torch.Tensor]
    truth: Callable[[], torch.Tensor]
    tolerance: float = 0.02


def _probes() -> list[Probe]:
    generator = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(*shape, generator=generator).bfloat16()  # noqa: E731
    n, v, d, t = 32, 64, 64, 24
    logits, x, head = 3 * draw(n, v), draw(n, d), draw(v, d)
    targets = torch.randint(v, (n,), generator=generator)
    q, k, w = draw(1, t, 8, 64), draw(1, t, 4, 64), draw(1, t, 4, 64)
    matrix, up, down = draw(64, 128), draw(256, d), draw(d, 256)
    streams, table_of_tokens = [draw(n, 512), draw(n, 512)], draw(v, 512)
    wide = lambda *tensors: [m.double() for m in tensors]  # noqa: E731
    on = lambda device, *tensors: [m.to(device) for m in tensors]  # noqa: E731
    table = [*COEFFICIENTS["polar_express"]]

    def int6_round_trip(device):
        packed, scales = pgolf_fast.pack_int6(matrix.to(device))
        return pgolf_fast.unpack_int6(packed, scales, matrix.shape[1], torch.float32)

    return [
        Probe(
            "softcap_cross_entropy",
            "softcap_ce_fwd",
            lambda device: pgolf_fast.softcap_cross_entropy(*on(device, logits, targets)),
            lambda: softcap_cross_entropy_ref(logits.double(), targets),
        ),
        Probe(
            "linear_softcap_cross_entropy",
            "softcap_ce_fwd",
            lambda device: pgolf_fast.linear_softcap_cross_entropy(*on(device, x, head, targets)),
            lambda: linear_softcap_cross_entropy_ref(*wide(x, head), targets),
        ),
        Probe(
            "orthogonalize",
            "orthogonalize",
            # Singular values: bf16 noise turns the matrix itself by a few percent.
            lambda device: torch.linalg.svdvals(pgolf_fast.orthogonalize(on(device, matrix))[0].float()),
            lambda: torch.linalg.svdvals(orthogonalize_ref(matrix.double(), table)),
            0.05,
        ),
        Probe(
            "xsa_attention",
            "xsa_attention_fwd",
            lambda device: pgolf_fast.xsa_attention(*on(device, q, k, w)),
            lambda: xsa_attention_ref(*wide(q, k, w)),
        ),
        Probe(
            "pack_int6 / unpack_int6",
            "int6_pack",
            int6_round_trip,
            lambda: unpack_int6_ref(*pack_int6_ref(matrix), 128, torch.float32),
            0.0,
        ),
        Probe(
            "fused_mlp",
            "fused_mlp_fwd",
            lambda device: pgolf_fast.fused_mlp(*on(device, x, up, down)),
            lambda: fused_mlp_ref(*wide(x, up, down)),
        ),
        Probe(
            "mix_norm",
            "mix_norm_fwd",
            lambda device: pgolf_fast.mix_norm(on(device, *streams), norm_scale=0.5)[1],
            lambda: mix_norm_ref(wide(*streams), norm_scale=0.5)[1],
        ),
        Probe(
            "embed_norm",
            "embed_norm_fwd",
            lambda device: pgolf_fast.embed_norm(*on(device, targets[None], table_of_tokens)),
            lambda: embed_norm_ref(targets[None], table_of_tokens.double(), dtype=torch.float64),
        ),
        Probe(
            "embedding",
            "embedding_fwd",
            lambda device: pgolf_fast.embedding(*on(device, targets, table_of_tokens)),
            lambda: embedding_ref(targets, table_of_tokens.double(), torch.float64),
        ),
        Probe(
            "project (a block's products)",
            "product_forward",
            lambda device: project(*on(device, x, head)),
            lambda: x.double() @ head.double().T,
        ),
    ]


def _call(probe: Probe, device: torch.device) -> Finding:
    path = "reference (torch on the CPU)"
    try:
        if device.type == "cuda":
            path = "kernel" if _library.uses_kernel(probe.kernel, device) else "composite (torch)"
        value, truth = probe.call(device).double().cpu(), probe.truth().double()
    except Exception as error:  # whatever it is, the doctor reports it instead of dying of it
        return Finding(f"{probe.op} on {device}", BROKEN, f"{type(error).__name__}: {error}".splitlines()[0], _library.HOW_TO_BUILD)
    error = ((value - truth).norm() / truth.norm()).item()
    if not error <= probe.tolerance:
        remedy = "rebuild the kernels, then run `make test`" if path == "kernel" else "reinstall torch, then run `make test`"
        return Finding(f"{probe.op} on {device}", BROKEN, f"{path}, but wrong: relative error {error:.1e}", remedy)
    status = LIMITED if path.startswith("composite") else READY
    remedy = "" if status == READY else "no kernel for this op and GPU yet; it works, slower"
    return Finding(f"{probe.op} on {device}", status, f"{path}, relative error {error:.1e}", remedy)


def _tool_version(*command: str) -> str | None:
    if shutil.which(command[0]) is None:
        return None
    text = subprocess.run(command, capture_output=True, text=True).stdout
    match = re.search(r"release (\d+\.\d+)|(\d+\.\d+\.\d+)", text)
    return (match.group(1) or match.group(2)) if match else "found"


def _software() -> list[Finding]:
    compiler, nvcc = _tool_version("g++", "--version"), _tool_version("nvcc", "--version")
    try:
        from pgolf_fast import _host

        host = Finding("_host module", READY, _host.__doc__.strip())
    except ImportError as error:
        # The GPU path does not need it; packing, CaseOps and data building do.
        host = Finding("_host module", LIMITED, str(error), "pip install --no-build-isolation . with a C++17 compiler")
    built = _library.build_info()
    remedy = "" if built else f"to build it: {_library.HOW_TO_BUILD}"
    return [
        Finding("pgolf_fast", READY, pgolf_fast.__version__),
        Finding("Python", READY, platform.python_version()),
        Finding("torch", READY, f"{torch.__version__}, CUDA {torch.version.cuda or 'not in this build'}"),
        Finding(
            "C++ compiler", READY if compiler else LIMITED, compiler or "none", "" if compiler else "needed only to build: apt install g++"
        ),
        Finding("nvcc", READY if nvcc or built else LIMITED, nvcc or "none", "" if nvcc or built else "needed only to build the kernels"),
        host,
        Finding("kernel library", READY if built else LIMITED, built or "not built", remedy),
    ]


def _gpus() -> list[Finding]:
    if not torch.cuda.is_available():
        remedy = "training at speed needs a Hopper GPU (H100, H200) and a CUDA build of torch; everything works on the CPU, slower"
        return [Finding("GPU", LIMITED, "none visible", remedy)]
    import pynvml

    pynvml.nvmlInit()
    driver = pynvml.nvmlSystemGetDriverVersion()
    findings = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        text = f"{properties.name}, sm_{properties.major}{properties.minor}, {properties.total_memory / 2**30:.0f} GiB, driver {driver}"
        hopper = (properties.major, properties.minor) == (9, 0)
        findings.append(Finding(f"GPU {index}", READY if hopper else LIMITED, text, "" if hopper else "kernels are for sm_90 (H100, H200)"))
    return findings


def run(config: Doctor, console: Console) -> tuple[dict, int]:
    begin = time.perf_counter()
    devices = [torch.device("cpu")] + [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    findings = _software() + _gpus() + [_call(probe, device) for device in devices for probe in _probes()]
    verdict = max(f.status for f in findings)
    table = Table(show_header=False, box=None, padding=(0, 1))
    for f in findings:
        mark = {READY: "[green]ok", LIMITED: "[yellow]!", BROKEN: "[red]x"}[f.status]
        table.add_row(mark, f.name, f.found + (f"\n[dim]{f.remedy}[/dim]" if f.remedy else ""))
    console.print(table)
    console.print(f"\n{VERDICTS[verdict]}   ({time.perf_counter() - begin:.1f} s)")
    result = {
        "verdict": VERDICTS[verdict],
        "findings": [dataclasses.asdict(f) | {"status": ("ok", "limited", "broken")[f.status]} for f in findings],
    }
    return result, verdict
