"""Seconds of one chunk step of phased LoRA TTT (score 48 predictions of 64 documents, adapt), by row length.

    python -m benchmarks.bench_phased_lora [--kernels]     steps on random ids: replayed graphs, and the model as it is, launched kernel by kernel
                                                           --kernels: where the longest step's time goes

PR #1934's pass: 18,100 steps, 1.02 G tokens read, 518 s on 8 H100, which is 0.246 M tokens/s a GPU; at its steady rate, without waiting for the
longest documents, 0.52 M.
"""

import argparse
import dataclasses
import statistics

import numpy as np
import torch

from pgolf_fast import recipe
from pgolf_fast.data import Validation
from pgolf_fast.evaluation.phased_lora import PhasedLora, PhasedLoraConfig
from pgolf_fast.evaluation.referee import Referee
from pgolf_fast.model import GPT


def random_model(device) -> GPT:
    """Full size; no product is zero."""
    model = GPT(recipe.resolve("caseops-1934", environ={}).recipe.model, seed=1, device=device)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.02 * torch.randn_like(p)
    return model


def documents(count, length, vocab_size) -> Validation:
    tokens = np.random.default_rng(0).integers(2, vocab_size, count * length + 1).astype(np.uint16)
    starts = np.arange(count) * length
    tokens[starts] = 1
    return Validation(tokens, np.ones(count * length, np.uint16), starts, False)


def step_times(evaluator, model_called, length) -> dict[int, float]:
    """Milliseconds from one forward to the next, median by row length, over a batch of documents of `length`."""
    marks = []
    original = model_called.forward

    def forward(inputs, **how):
        marks.append((inputs.shape[1], torch.cuda.Event(enable_timing=True)))
        marks[-1][1].record()
        return original(inputs, **how)

    model_called.forward = forward
    config = evaluator.config
    validation = documents(config.batch_documents, length, evaluator.weights.config.vocab_size)
    for _ in evaluator.chunks(Referee(evaluator.model, validation, "cuda")):
        pass
    torch.cuda.synchronize()
    model_called.forward = original
    found = {}
    for (row, begin), (_, end) in zip(marks, marks[1:]):
        found.setdefault(row, []).append(begin.elapsed_time(end))
    return {row: statistics.median(times) for row, times in found.items()}


def show(name, times, rows):
    for row, ms in times.items():
        print(f"{name:10} rows {rows:3} x {row:5}: {ms:8.2f} ms, {rows * row / ms / 1e3:.3f} M tokens/s")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernels", action="store_true")
    parser.add_argument("--documents", type=int, default=64)
    parser.add_argument("--length", type=int, default=2400, help="predictions of each document")
    parser.add_argument("--row-multiple", type=int, default=512)
    parser.add_argument("--eager", action="store_true", help="also the model without graphs and compilation")
    options = parser.parse_args()
    model = random_model("cuda")
    config = PhasedLoraConfig(batch_documents=options.documents, row_multiple=options.row_multiple)
    if options.eager:
        evaluator = PhasedLora(model, dataclasses.replace(config))
        evaluator.model = model
        show("eager", step_times(evaluator, model, options.length), options.documents)
        del evaluator
    evaluator = PhasedLora(model, config)
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    evaluator.record(options.documents)
    end.record()
    torch.cuda.synchronize()
    print(f"recorded {len(evaluator.model.recordings)} shapes in {begin.elapsed_time(end) / 1e3:.1f} s")
    show("replayed", step_times(evaluator, evaluator.model, options.length), options.documents)
    print(f"peak memory {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB, reserved {torch.cuda.max_memory_reserved() / 2**30:.1f}")
    if options.kernels:
        evaluator.phase = evaluator.round = 0
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            # Short documents in a window of their own length: the last three steps are at the longest row.
            evaluator.config = dataclasses.replace(config, row_multiple=config.window_tokens)
            for _ in evaluator.chunks(Referee(evaluator.model, documents(options.documents, 4 * 48, model.config.vocab_size), "cuda")):
                pass
            torch.cuda.synchronize()
        print(profile.key_averages().table(sort_by="cuda_time_total", row_limit=45, max_name_column_width=70))


if __name__ == "__main__":
    main()
