"""Does each kernel alone train as the reference does: python -m benchmarks.bench_kernel_curves --data FOLDER [--json]

One short run per op with only that op's kernels on, beside runs on the composite path: the reference, the same with two other seeds of
the initial weights, which say how much a difference means, and one with all kernels. Every run reads the same batches.
"""

import dataclasses
import json
import statistics
from pathlib import Path

import torch
import tyro
from rich import box
from rich.console import Console
from rich.table import Table

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
    "xsa_attention": ("xsa_attention",),
    "attn_gate": ("attn_gate",),
    "fused_mlp": ("fused_mlp",),
    "products": ("product_",),
    "softcap_ce": ("softcap_ce", "linear_softcap_ce"),
    "orthogonalize": ("orthogonalize",),
    "optimizer_step": ("gradient_norm", "muon_", "adam_"),
}
LAST = 50  # steps that a run's final loss is the mean of


@dataclasses.dataclass(frozen=True)
class Curves:
    data: Path
    recipe: str = "legal-ttt-691"
    steps: int = 300
    rows: int = 8
    """Of the recipe's seq_len tokens, per step."""
    json: bool = False


def losses(config: Curves, settings, device, seed: int) -> list[float]:
    model = GPT(settings.model, seed, device)
    kind = GraphedStep if device.type == "cuda" else Step
    step = kind(model, Optimizer(model, settings.optim), settings.train.seq_len)
    stream = ContinuousStream(config.data, config.rows * settings.train.seq_len, vocab_size=settings.model.vocab_size)
    plan = StepPlan(1.0, settings.schedule.muon_momentum_start, False, False, False)
    found = []
    for number in range(config.steps):
        tokens = torch.from_numpy(stream.window(number, 0).astype("int64")).to(device)
        found.append(step.run([Batch(tokens[:-1], tokens[1:], None, number)], plan).clone())
    return torch.stack(found).tolist()


def run(config: Curves, console: Console) -> list[dict]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    settings = recipe.resolve(config.recipe, environ={}).recipe
    seed = settings.train.seed
    contestants = [("reference", (), seed), ("another seed", (), seed + 1), ("a third seed", (), seed + 2)]
    contestants += [(f"{op} alone", kernels, seed) for op, kernels in KERNELS.items()] + [("all kernels", ("",), seed)]
    rows = []
    for name, kernels, initial in contestants:
        with _library.composite(but=kernels):
            curve = losses(config, settings, device, initial)
        rows.append({"run": name, "final_loss": statistics.fmean(curve[-LAST:]), "losses": curve})
        console.print(f"{name}: {rows[-1]['final_loss']:.4f}", highlight=False)
    table = Table(title=f"{config.recipe}, {config.steps} steps", title_justify="left", box=box.SIMPLE)
    for heading in ("run", f"mean loss of the last {LAST}", "from reference", "largest difference of a step"):
        table.add_column(heading, justify="left" if heading == "run" else "right")
    reference = rows[0]
    for row in rows:
        largest = max(abs(a - b) for a, b in zip(row["losses"], reference["losses"]))
        table.add_row(row["run"], f"{row['final_loss']:.4f}", f"{row['final_loss'] - reference['final_loss']:+.4f}", f"{largest:.4f}")
    console.print(table)
    return rows


if __name__ == "__main__":
    config = tyro.cli(Curves, description=__doc__)
    found = run(config, Console(stderr=config.json))
    if config.json:
        print(json.dumps(found))
