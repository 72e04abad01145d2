"""Seconds to score a stream, with and without test-time training, beside the published evaluators' logged times per GPU.

    python -m benchmarks.bench_evaluate --save
    python -m benchmarks.bench_evaluate --recipe gepa-598 --evaluator score-first-sgd --profile
    python -m benchmarks.bench_evaluate --recipe gepa-598 --artifact model.pglf --data FOLDER --positions 62021632 --save

The evaluators are those of `pgolf eval`, after their warm-up; loading is not in it. Without an artifact the model has random weights;
without data the tokens follow Zipf's law. Kept are scores_RECIPE, of an artifact and a text, or evaluate_RECIPE, of which only the times
mean something; the README's table of scores is made of the former.
A published time is that of the whole split of 62,023,616 scores; its rate per GPU is the scores over seconds times GPUs.
"""

import dataclasses
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
import tyro
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks import run as bench
from pgolf_fast import recipe
from pgolf_fast.data import Validation, load_validation
from pgolf_fast.evaluation.evaluate import evaluate, make_evaluator
from pgolf_fast.evaluation.referee import Referee
from pgolf_fast.export import load_model
from pgolf_fast.model import GPT

SPLIT_SCORES = 62_023_616
# (recipe, evaluator): seconds and GPUs of the published log; the sliding time beside #691 is that of PR #414, the same model
PUBLISHED = {
    ("gptq-lite-379", "sliding"): (190.3, 8, "H100"),
    ("legal-ttt-691", "sliding"): (73.1, 8, "H100"),
    ("legal-ttt-691", "score-first-sgd"): (617.0, 8, "H100"),
    ("gepa-598", "score-first-sgd"): (2193.8, 4, "A100"),
}


@dataclasses.dataclass(frozen=True)
class Evaluate:
    """Benchmark the evaluators."""

    recipe: str = "legal-ttt-691"
    """Whose model and settings."""
    artifact: Path | None = None
    """A model of that recipe, instead of random weights."""
    run: str = ""
    """Which run the artifact is of, as the README's table shall say; its file's name if left out."""
    data: Path | None = None
    """Validation text, instead of random tokens."""
    evaluator: tuple[str, ...] = ()
    """Evaluators, in turn; plain, sliding and the recipe's own if left out."""
    positions: int = 1 << 20
    """Positions of the stream."""
    batch_tokens: tuple[int, ...] = (262144,)
    """Tokens per forward, in turn."""
    profile: bool = False
    """Add the table of kernels."""
    save: bool = False
    """Keep the results in benchmarks/results."""


def synthetic(num_positions: int, vocab_size: int) -> Validation:
    rng = np.random.default_rng(1)
    weights = 1 / np.arange(3, vocab_size + 1)
    tokens = 2 + rng.choice(vocab_size - 2, num_positions + 1, p=weights / weights.sum()).astype(np.uint16)
    return Validation(tokens, np.full(num_positions, 2, np.uint16), np.zeros(0, np.int64), False)


def first(text: Validation, num_positions: int) -> Validation:
    n = min(num_positions, len(text))
    starts = text.document_starts[text.document_starts < n]
    return Validation(text.tokens[: n + 1], text.target_bytes[:n], starts, text.has_sidecar)


def random_model(settings, device) -> GPT:
    """No tensor is zero."""
    model = GPT(settings.model, 0, device, torch.bfloat16)
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.02 * torch.randn(p.shape, generator=generator, device=device)
    return model


def measure(config: Evaluate, name: str, batch_tokens: int, device) -> dict:
    settings = recipe.resolve(config.recipe, [f"eval.batch_tokens={batch_tokens}"]).recipe
    model = load_model(config.artifact, device, expect=settings)[1] if config.artifact else random_model(settings, device)
    text = load_validation(config.data, settings.eval.seq_len) if config.data else synthetic(config.positions, settings.model.vocab_size)
    text = first(text, config.positions)
    evaluator = make_evaluator(name, model, settings)
    torch.cuda.synchronize()
    begin = time.perf_counter()
    evaluator.warm_up(len(text.document_starts))
    torch.cuda.synchronize()
    warm_up_s = time.perf_counter() - begin
    torch.cuda.reset_peak_memory_stats()
    outcome = evaluate(evaluator, Referee(evaluator.model, text, device))
    score, seconds = outcome.result.score, outcome.scoring_s
    row = {"weights": "artifact" if config.artifact else "random", "evaluator": name, "batch_tokens": batch_tokens}
    row |= {"nats_per_token": score.nats_per_token, "bits_per_byte": score.bits_per_byte, "tokens": score.tokens}
    row |= {"warm_up_s": warm_up_s, "scoring_s": seconds, "tokens_per_s": score.tokens / seconds}
    row["memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
    if published := PUBLISHED.get((config.recipe, name)):
        seconds, gpus, kind = published
        row |= {"published_tokens_per_s": SPLIT_SCORES / (seconds * gpus), "published_gpu": kind}
    return row


def profile(config: Evaluate, name: str, device) -> str:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found:
        measure(dataclasses.replace(config, positions=1 << 17), name, config.batch_tokens[0], device)
    return found.key_averages().table(sort_by="cuda_time_total", row_limit=40, max_name_column_width=90)


def main() -> None:
    config, console = tyro.cli(Evaluate), Console(width=140)
    device = torch.device("cuda", 0)
    evaluators = config.evaluator or tuple(dict.fromkeys(("plain", "sliding", recipe.resolve(config.recipe).recipe.eval.evaluator)))
    rows = [measure(config, name, tokens, device) for name in evaluators for tokens in config.batch_tokens]
    table = Table(title=f"{config.recipe}, one {torch.cuda.get_device_name()}", title_justify="left", box=box.SIMPLE)
    headings = "evaluator", "tokens a batch", "tokens", "seconds", "tokens/s", "published, a GPU"
    headings += "ratio", "bits/byte", "GiB", "warm-up s"
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "evaluator" else "right")
    for r in rows:
        theirs = r.get("published_tokens_per_s")
        beside = (f"{theirs:,.0f} ({r['published_gpu']})", f"{r['tokens_per_s'] / theirs:.2f}") if theirs else ("-", "-")
        cells = f"{r['batch_tokens']:,}", f"{r['tokens']:,}", f"{r['scoring_s']:.2f}", f"{r['tokens_per_s']:,.0f}", *beside
        table.add_row(r["evaluator"], *cells, f"{r['bits_per_byte']:.5f}", f"{r['memory_gib']:.1f}", f"{r['warm_up_s']:.1f}")
    console.print(table)
    if config.profile:
        for name in evaluators:
            console.print(profile(config, name, device), highlight=False, soft_wrap=True)
    if config.save:
        command = " ".join(["python -m benchmarks.bench_evaluate", *sys.argv[1:]])
        kept = {"environment": bench.environment(device) | {"command": command}, "recipe": config.recipe, "tokens": rows[0]["tokens"]}
        kept["run"] = config.run or (config.artifact.name if config.artifact else "random weights")
        kind = "scores" if config.artifact and config.data else "evaluate"
        bench.result_path(f"{kind}_{config.recipe}", device).write_text(json.dumps(kept | {"scores": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
