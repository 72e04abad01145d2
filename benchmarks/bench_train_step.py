"""Milliseconds of a whole training step, of one GPU's share (98,304 tokens) or of several GPUs.

    pgolf bench step --profile --save --peer legal-ttt-691
    pgolf bench step --recipe legal-ttt-691 --gpus 8 --save

The step is the trainer's own: forward, backward, collectives, update, averaged weights, from batches that lie on the device; the
loader is not in it. Tokens follow Zipf's law, documents are log-normal. `--peer RECIPE` adds, in the same process, the same step in plain
torch: model and optimizer under torch.compile, torch's attention by cuDNN or flash. Torch packs no documents, so there its attention pads
them to the longest. Its first steps' seconds are those of the compilation.

Milliseconds are of the slowest rank. On several GPUs a second contestant is the same step with every GPU for itself, all of them at
once: what lies between the two is what sharing costs, less what it saves of Muon.
"""

import contextlib
import dataclasses
import json
import statistics
import time
from unittest import mock

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import run as bench
from benchmarks import shapes
from benchmarks.power import PowerMeter, millijoules_of
from pgolf_fast import dist, recipe
from pgolf_fast import model as model_module
from pgolf_fast import optim as optim_module
from pgolf_fast.clock import process_age_s
from pgolf_fast.commands.devices import under_torchrun
from pgolf_fast.data import Batch
from pgolf_fast.errors import UserError
from pgolf_fast.model import GPT
from pgolf_fast.ops import _library
from pgolf_fast.ops.embed_norm import embed_norm_ref
from pgolf_fast.ops.embedding import embedding_ref
from pgolf_fast.ops.fused_mlp import fused_mlp_ref
from pgolf_fast.ops.linear_softcap_ce import linear_softcap_cross_entropy_ref
from pgolf_fast.ops.mix_norm import mix_norm_ref
from pgolf_fast.ops.orthogonalize import COEFFICIENTS, _iterate_batched
from pgolf_fast.optim import Optimizer
from pgolf_fast.schedule import StepPlan
from pgolf_fast.step import GraphedStep, Step
from pgolf_fast.train import PEAK_FLOPS, flops_per_token

BATCHES = 4
PROFILED_STEPS = 3


@dataclasses.dataclass(frozen=True)
class TrainStep:
    """Benchmark whole training steps."""

    recipe: tuple[str, ...] = ("legal-ttt-691", "caseops-1934")
    """Recipes, in turn."""
    gpus: int = 0
    """Run on this many GPUs of this machine; 0: as launched."""
    steps: int = 30
    """Timed steps of each phase."""
    peer: tuple[str, ...] = ()
    """Of these recipes, also time the same step in plain torch under torch.compile."""
    profile: bool = False
    """Add the table of kernels."""
    save: bool = False
    """Keep the results in benchmarks/results."""


def synthetic_batches(settings, device) -> list[Batch]:
    """Zipf-distributed tokens; documents of log-normal length where the recipe packs them."""
    generator = torch.Generator().manual_seed(dist.rank())
    vocabulary = settings.model.vocab_size
    weights = 1 / torch.arange(3, vocabulary + 1, dtype=torch.float64)  # of the pieces after 0 and BOS
    found = []
    for number in range(BATCHES):
        tokens = 2 + torch.multinomial(weights, shapes.TOKENS + 1, replacement=True, generator=generator)
        segments = None
        if settings.train.layout == "documents":
            lengths = shapes.document_lengths(shapes.TOKENS, seed=number + BATCHES * dist.rank())
            segments = shapes.cu_seqlens(lengths, device, pad_to=settings.train.cu_seqlens_entries)
            tokens[segments[:-1].long().cpu().clamp(max=shapes.TOKENS)] = 1
        found.append(Batch(tokens[:-1].to(device), tokens[1:].to(device), segments, number))
    return found


def first_steps(step: Step, batches, plan) -> float:
    """Seconds of the two steps that initialise and capture and of one more."""
    begin = time.perf_counter()
    for i in range(3):
        step.run([batches[i % BATCHES]], plan)
    torch.cuda.synchronize()
    return time.perf_counter() - begin


def time_steps(step: Step, batches, plan, count, device) -> tuple[list[float], float | None]:
    """Milliseconds of each of `count` steps, and the GPU's power during them in watts."""
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    with PowerMeter(millijoules_of(device)) as meter:
        for i, mark in enumerate(marks):
            mark.record()
            if i < count:
                step.run([batches[i % BATCHES]], plan)
        torch.cuda.synchronize()
    return [begin.elapsed_time(end) for begin, end in zip(marks, marks[1:])], meter.watts


def profiled_steps(step: Step, batches, plan):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for i in range(PROFILED_STEPS):
            step.run([batches[i % BATCHES]], plan)
        torch.cuda.synchronize()
    return profile


def kernel_table(profile) -> list[dict]:
    """Milliseconds and launches of each kernel in a step, the largest first."""
    found = [(e.key, e.self_device_time_total / 1e3 / PROFILED_STEPS, e.count / PROFILED_STEPS) for e in profile.key_averages()]
    return [{"kernel": key, "ms": ms, "launches": count} for key, ms, count in sorted(found, key=lambda row: -row[1]) if ms > 0]


def collectives(profile) -> list[tuple[str, float]]:
    """Name and milliseconds of every launch of NCCL, in the order of the launches."""
    launches = sorted((e for e in profile.events() if e.name.startswith("nccl")), key=lambda e: e.time_range.start)
    return [(e.name, e.self_device_time_total / 1e3) for e in launches]


def plain_orthogonalize(matrices, coefficients, steps):
    table = COEFFICIENTS[coefficients]
    rows = [table[min(i, len(table) - 1)] for i in range(steps)]
    return [_iterate_batched(m, rows) for m in matrices]


@contextlib.contextmanager
def plain_torch():
    """Inside, model and optimizer are made of the ops' definitions and torch's attention: nothing that torch.compile cannot see through."""
    definitions = {
        "embedding": embedding_ref,
        "embed_norm": embed_norm_ref,
        "fused_mlp": fused_mlp_ref,
        "linear_softcap_cross_entropy": linear_softcap_cross_entropy_ref,
        "mix_norm": mix_norm_ref,
    }
    attention = sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION], set_priority=True)
    with contextlib.ExitStack() as stack:
        stack.enter_context(_library.composite())
        stack.enter_context(mock.patch.multiple(model_module, **definitions))
        stack.enter_context(mock.patch.object(optim_module, "orthogonalize", plain_orthogonalize))
        stack.enter_context(attention)
        yield


def build_step(settings, device) -> Step:
    """As the trainer has it."""
    model = GPT(settings.model, settings.train.seed, device)
    kind = GraphedStep if device.type == "cuda" else Step
    return kind(model, Optimizer(model, settings.optim, 1), settings.train.seq_len)


def build_compiled_step(settings, device) -> Step:
    """The same mathematics by torch.compile; to be built and run inside `plain_torch`. Not replayed: a step's launches take the host
    less time than the GPU has work."""
    model = GPT(settings.model, settings.train.seed, device)
    optimizer = Optimizer(model, settings.optim, 1)
    # NOTE: a table that the first step made would have the second one compiled again.
    length = settings.train.seq_len
    model._rotary_for(torch.empty(1, shapes.TOKENS if settings.train.layout == "documents" else length, device=device), length)
    model.forward = torch.compile(model.forward, fullgraph=True, dynamic=False)
    optimizer.step = torch.compile(optimizer.step, dynamic=False)
    return Step(model, optimizer, length)


def contestants(peer: bool):
    """Name to what builds a step of a recipe and what makes the context it is built and run in; ours first."""
    found = {"ours": (build_step, contextlib.nullcontext)}
    if dist.world_size() > 1:
        found["each GPU alone"] = (build_step, lambda: mock.patch.object(dist, "world_size", lambda: 1))
    if peer:
        found["torch.compile"] = (build_compiled_step, plain_torch)
    return found


def measure(name, config, device) -> list[dict]:
    settings = recipe.resolve(name, environ={}).recipe
    batches = synthetic_batches(settings, device)
    peak = next((f for gpu, f in PEAK_FLOPS.items() if torch.cuda.get_device_name().startswith(gpu)), None)
    context = (settings.train.seq_len - 1) / 2
    if batches[0].cu_seqlens is not None:
        lengths = torch.cat([batch.cu_seqlens.diff() for batch in batches]).double()
        context = ((lengths * (lengths - 1)).sum() / 2 / lengths.sum()).item()
    rows = []
    for contestant, (build, surroundings) in contestants(name in config.peer).items():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        with surroundings():
            step = build(settings, device)
            for looped in (False, True) if settings.model.num_loops else (False,):
                plan = StepPlan(1.0, 0.95, looped, False, False)
                first_steps_s, ready_s = first_steps(step, batches, plan), process_age_s()
                samples, watts = time_steps(step, batches, plan, config.steps, device)
                ms, tokens = statistics.median(samples), shapes.TOKENS * dist.world_size()
                row = {
                    "recipe": name,
                    "contestant": contestant,
                    "visits": len(step.model.visits[looped]),
                    "gpus": dist.world_size(),
                    "tokens": tokens,
                    "mean_context": context,
                    "ms": ms,
                    "ms_p80": sorted(samples)[int(0.8 * len(samples))],
                    "launch_to_timed_step_s": ready_s,
                    "first_steps_s": first_steps_s,
                    "watts": watts,
                    "tokens_per_s": tokens / ms * 1e3,
                    "memory_gib": torch.cuda.max_memory_allocated() / 2**30,
                    "reserved_gib": torch.cuda.max_memory_reserved() / 2**30,
                }
                if peak:
                    row["mfu"] = flops_per_token(settings.model, context, looped) * shapes.TOKENS / ms * 1e3 / peak
                if config.profile or (contestant == "ours" and dist.world_size() > 1):
                    profile = profiled_steps(step, batches, plan)
                    row |= {"kernels": kernel_table(profile), "collectives": collectives(profile)}
                rows.append(row)
            step.close()
            del step
    return [across_ranks(same) for same in zip(*dist.gather_objects(rows))]


def across_ranks(same) -> dict:
    """One row of every rank's: the slowest one's, with the times of all. Of each collective the rank counts that came last and had nobody
    to wait for."""
    row = max(same, key=lambda row: row["ms"]) | {"ms_by_rank": [row["ms"] for row in same]}
    launches = list(zip(*(r["collectives"] for r in same), strict=True)) if row.pop("collectives", None) else []
    row["nccl_ms"] = sum(min(ms for _, ms in launch) for launch in launches) / PROFILED_STEPS
    return row


def show(rows, profile, console):
    table = Table(title="training step", title_justify="left", box=box.SIMPLE)
    for heading in ("recipe", "contestant", "visits", "GPUs", "ms/step", "NCCL, ms", "W", "M tokens/s", "MFU", "GiB", "first steps, s"):
        table.add_column(heading, justify="left" if heading in ("recipe", "contestant") else "right", no_wrap=True)
    for row in rows:
        mfu = f"{row['mfu']:.1%}" if "mfu" in row else "-"
        nccl = f"{row['nccl_ms']:.2f}" if row["nccl_ms"] else "-"
        watts = f"{row['watts']:.0f}" if row["watts"] else "-"
        speed = (f"{row['ms']:.2f}", nccl, watts, f"{row['tokens_per_s'] / 1e6:.2f}", mfu)
        rest = (f"{row['memory_gib']:.1f}", f"{row['first_steps_s']:.1f}")
        table.add_row(row["recipe"], row["contestant"], str(row["visits"]), str(row["gpus"]), *speed, *rest)
    console.print(table)
    console.print(f"first timed step {rows[0]['launch_to_timed_step_s']:.1f} s after launch")
    for row in rows:
        if not profile or "kernels" not in row:
            continue
        total = sum(kernel["ms"] for kernel in row["kernels"])
        console.print(f"{row['recipe']}, {row['contestant']}, {row['visits']} visits: {total:.2f} ms of kernels in {row['ms']:.2f} ms")
        for kernel in row["kernels"][:40]:
            console.print(f"  {kernel['ms']:8.3f} ms {kernel['launches']:6.0f} x  {kernel['kernel'][:110]}", highlight=False, markup=False)


def run(config: TrainStep, console: Console) -> list[dict]:
    under_torchrun(config.gpus)
    if not torch.cuda.is_available():
        raise UserError("bench step: no CUDA GPU is visible here")
    device = dist.start("cuda")
    rows = [row for name in config.recipe for row in measure(name, config, device)]
    if dist.rank() == 0:
        show(rows, config.profile, console)
        if config.save:
            path = bench.result_path(f"train_step_{dist.world_size()}x", device)
            path.write_text(json.dumps({"environment": bench.environment(device), "steps": rows}, indent=1) + "\n")
    dist.stop()
    return rows
