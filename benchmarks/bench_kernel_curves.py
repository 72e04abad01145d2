"""Does each kernel alone train as the reference does: python -m benchmarks.bench_kernel_curves --data FOLDER [--json]

One short run per op with only that op's kernels on, beside runs on the composite path: the reference, the same with two other seeds of
the initial weights, which say how much a difference means; and one with all kernels. Ops that only the blocks written out by hand call
have these, and the blocks by hand without a kernel as one more reference. Every run reads the same batches. On a GPU all runs advance
together, each on a stream of its own, because small batches leave a GPU idle.
"""

import dataclasses
import json
import statistics
import sys
from pathlib import Path
from unittest import mock

import torch
import tyro
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.run import environment
from pgolf_fast import recipe
from pgolf_fast.data import Batch, ContinuousStream
from pgolf_fast.model import GPT
from pgolf_fast.ops import _library
from pgolf_fast.optim import Optimizer
from pgolf_fast.schedule import StepPlan
from pgolf_fast.step import GraphedStep, Step

# Op to what the names of its kernels begin with.
KERNELS = {
    "embedding": ("embedding", "embed_norm"),
    "mix_norm": ("mix_norm",),
    "qkv": ("qkv",),
    "xsa_attention": ("xsa_attention", "xsa_output"),
    "attn_gate": ("attn_gate",),
    "fused_mlp": ("fused_mlp",),
    "products": ("product_",),
    "softcap_ce": ("softcap_ce",),
    "linear_softcap_ce": ("linear_softcap_ce",),
    "orthogonalize": ("orthogonalize",),
    "optimizer_step": ("gradient_norm", "muon_", "adam_"),
}
BY_HAND = ("qkv", "attn_gate", "products")
LAST = 50  # steps that a run's final loss is the mean of


@dataclasses.dataclass(frozen=True)
class Curves:
    data: Path
    recipe: str = "legal-ttt-691"
    settings: tuple[str, ...] = ()
    """Of the recipe, in other words: model.num_layers=4 and the like."""
    steps: int = 300
    rows: int = 2
    """Of the recipe's seq_len tokens, per step."""
    ops: tuple[str, ...] = tuple(KERNELS)
    """Those that get a run of their own."""
    json: bool = False


class Run:
    """A model in training, with the kernels whose names begin as one of `kernels`."""

    def __init__(self, name, settings, device, seed: int, kernels=(), by_hand=False):
        self.name, self.kernels = name, kernels
        model = GPT(settings.model, seed, device)
        model.use_fused_blocks = by_hand
        kind = GraphedStep if device.type == "cuda" else Step
        self.step = kind(model, Optimizer(model, settings.optim), settings.train.seq_len)
        self.stream = torch.cuda.Stream() if device.type == "cuda" else None
        self.losses, self.ran = [], set()

    def advance(self, batch, plan):
        serves = _library.uses_kernel

        def noted(kernel, device):
            found = serves(kernel, device)
            if found:
                self.ran.add(kernel)
            return found

        with torch.cuda.stream(self.stream), _library.composite(but=self.kernels), mock.patch.object(_library, "uses_kernel", noted):
            self.losses.append(self.step.run([batch], plan).clone())


def run(config: Curves, device, console: Console) -> list[dict]:
    settings = recipe.resolve(config.recipe, config.settings, environ={}).recipe
    seed = settings.train.seed
    chosen = {op: KERNELS[op] for op in config.ops}
    runs = [Run("reference", settings, device, seed)]
    runs += [Run(name, settings, device, seed + i) for i, name in ((1, "another seed"), (2, "a third seed"))]
    if set(chosen) & set(BY_HAND):
        runs += [Run("blocks by hand", settings, device, seed, by_hand=True)]
    runs += [Run(f"{op} alone", settings, device, seed, kernels, by_hand=op in BY_HAND) for op, kernels in chosen.items()]
    runs += [Run("all kernels", settings, device, seed, ("",), by_hand=True)]
    data = ContinuousStream(config.data, config.rows * settings.train.seq_len, vocab_size=settings.model.vocab_size)
    windows = [torch.from_numpy(data.window(number, 0).astype("int64")).to(device) for number in range(config.steps)]
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    synchronize()
    plan = StepPlan(1.0, settings.schedule.muon_momentum_start, False, False, False)
    for number, tokens in enumerate(windows):
        for run in runs:
            run.advance(Batch(tokens[:-1], tokens[1:], None, number), plan)
        if number % LAST == 1:
            synchronize()
            console.print(f"step {number}: reference {runs[0].losses[-1].item():.4f}", highlight=False)
    synchronize()
    curves = [torch.stack(run.losses).tolist() for run in runs]

    table = Table(title=" ".join((config.recipe, *config.settings)) + f", {config.steps} steps", title_justify="left", box=box.SIMPLE)
    for heading in ("run", f"mean loss of the last {LAST}", "from reference", "largest difference of a step", "kernels that ran"):
        table.add_column(heading, justify="left" if heading in ("run", "kernels that ran") else "right")
    finals = [statistics.fmean(curve[-LAST:]) for curve in curves]
    for run, curve, final in zip(runs, curves, finals):
        largest = max(abs(a - b) for a, b in zip(curve, curves[0]))
        ran = "all" if run.kernels == ("",) else ", ".join(sorted(run.ran))
        table.add_row(run.name, f"{final:.4f}", f"{final - finals[0]:+.4f}", f"{largest:.4f}", ran)
    console.print(table)
    return [
        {"run": run.name, "kernels": sorted(run.ran), "final_loss": round(final, 4), "losses": [round(loss, 4) for loss in curve]}
        for run, curve, final in zip(runs, curves, finals)
    ]


if __name__ == "__main__":
    config = tyro.cli(Curves, description=__doc__)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = run(config, device, Console(stderr=config.json))
    if config.json:
        command = " ".join(["python -m benchmarks.bench_kernel_curves", *sys.argv[1:]])
        print(json.dumps({"environment": environment(device) | {"command": command}, "runs": found}))
