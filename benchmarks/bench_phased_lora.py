"""Seconds of one chunk step of phased LoRA TTT (score 48 predictions of 64 documents, adapt), by row length.

    python -m benchmarks.bench_phased_lora                               steps on random ids, of replayed graphs
        --eager      also of the model launched kernel by kernel
        --kernels    where the longest step's time goes
    python -m benchmarks.bench_phased_lora --artifact FILE --data FOLDER scores of the shorter documents, without and with adaptation
        --save       keep either in benchmarks/results

PR #1934's pass: 18,100 steps, 1.02 G tokens read, 518 s on 8 H100, which is 0.246 M tokens/s a GPU; at its steady rate, without waiting
for the longest documents, 0.52 M.
"""

import argparse
import dataclasses
import json
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks import run as bench
from benchmarks.bench_evaluate import random_model
from pgolf_fast import recipe
from pgolf_fast.data import Validation, load_validation
from pgolf_fast.evaluation.phased_lora import PhasedLora, PhasedLoraConfig, plan, tokens_read
from pgolf_fast.evaluation.referee import Referee
from pgolf_fast.export import load_model

# Tokens read a second and GPU by the published pass: in all, and at its steady rate.
PUBLISHED = {"published_tokens_read_per_s": 1.02e9 / (518 * 8), "published_steady_tokens_read_per_s": 0.52e6, "published_gpu": "H100"}


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


def show(name, times, rows) -> list[dict]:
    found = []
    for row, ms in times.items():
        found.append({"form": name, "rows": rows, "row_tokens": row, "ms": ms, "million_tokens_per_s": rows * row / ms / 1e3})
    for step in found:
        print(f"{name:16} rows {rows:3} x {step['row_tokens']:5}: {step['ms']:8.2f} ms, {step['million_tokens_per_s']:.3f} M tokens/s")
    return found


def save(name, content, device):
    command = " ".join(["python -m benchmarks.bench_phased_lora", *sys.argv[1:]])
    environment = bench.environment(device) | {"command": command}
    bench.result_path(name, device).write_text(json.dumps({"environment": environment} | content, indent=1) + "\n")


def documents_up_to(length, validation, at_most) -> Validation:
    """The first `at_most` validation documents of up to `length` predictions, one after the other."""
    starts = validation.document_starts
    ends = np.append(starts[1:], len(validation))
    chosen = [(start, end) for start, end in zip(starts, ends) if end - start <= length][:at_most]
    tokens = np.concatenate([validation.tokens[start:end] for start, end in chosen] + [validation.tokens[:1]])  # ends with a BOS
    target_bytes = np.concatenate([validation.target_bytes[start:end] for start, end in chosen])
    lengths = np.array([end - start for start, end in chosen])
    return Validation(tokens, target_bytes, np.cumsum(lengths) - lengths, validation.has_sidecar)


def score_text(artifact, data, config, length, at_most, prefix_documents, device) -> dict:
    """Bits per byte as quantized (adapters that do not learn), with adapters, and with adapters and pauses; the same windows each time."""
    validation = documents_up_to(length, load_validation(data, 1), at_most)
    lengths = np.diff(np.append(validation.document_starts, len(validation)))
    if not any(len(phase.learned) for phase in plan(lengths, dataclasses.replace(config, prefix_documents=prefix_documents)).phases):
        raise SystemExit(f"--prefix-documents {prefix_documents}: no pause comes before the last of {len(lengths)} documents; give fewer")
    read = sum(tokens_read(lengths[batch], config) for batch in plan(lengths, config).batches)
    print(f"{len(lengths)} documents of up to {length} predictions, {len(validation):,} in all, {read:,} tokens to read")
    still = dataclasses.replace(config, lr=0.0, prefix_documents=0)
    variants = {
        "as quantized": still,
        "adapters": dataclasses.replace(config, prefix_documents=0),
        "adapters and pauses": dataclasses.replace(config, prefix_documents=prefix_documents),
    }
    scores = []
    for name, variant in variants.items():
        evaluator = PhasedLora(load_model(artifact, device)[1], variant)
        evaluator.warm_up(len(validation.document_starts))
        referee = Referee(evaluator.model, validation, device)
        referee.running()  # waits for the device
        begin = time.perf_counter()
        for _ in evaluator.chunks(referee):
            pass
        result = referee.result()
        seconds, score = time.perf_counter() - begin, result.score
        figures = f"{score.nats_per_token:.6f} nats/token, {score.bits_per_byte:.6f} bpb, {seconds:.1f} s"
        print(f"{name:20} {figures}, {result.versions} versions of the weights", flush=True)
        row = {"weights": "artifact", "evaluator": f"phased-lora, {name}", "nats_per_token": score.nats_per_token}
        row |= {"bits_per_byte": score.bits_per_byte, "scoring_s": seconds, "versions": result.versions}
        scores.append(row | {"tokens_read_per_s": read / seconds} | PUBLISHED)
        del evaluator, referee  # before the next one takes as much memory
    return {"recipe": "caseops-1934", "documents": len(lengths), "longest": length, "tokens": len(validation), "scores": scores}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernels", action="store_true")
    parser.add_argument("--documents", type=int, default=64)
    parser.add_argument("--length", type=int, default=2400, help="predictions of each document")
    parser.add_argument("--row-multiple", type=int, default=512)
    parser.add_argument("--lanes", type=int, default=8, help="1: a pause can come after every batch")
    parser.add_argument("--eager", action="store_true", help="also the model without graphs and compilation")
    parser.add_argument("--artifact")
    parser.add_argument("--data")
    parser.add_argument("--device", default="cuda", help="with --artifact: cpu or cuda")
    parser.add_argument("--first", type=int, default=10**9, help="with --artifact: so many documents")
    parser.add_argument("--prefix-documents", type=int, default=64, help="with --artifact: documents of the pauses")
    parser.add_argument(
        "--run", default="", help="with --artifact: which run it is of, as the README's table shall say; else the file's name"
    )
    parser.add_argument("--save", action="store_true")
    options = parser.parse_args()
    config = PhasedLoraConfig(batch_documents=options.documents, row_multiple=options.row_multiple, lanes=options.lanes)
    if options.artifact:
        found = score_text(options.artifact, options.data, config, options.length, options.first, options.prefix_documents, options.device)
        found["run"] = options.run or Path(options.artifact).name
        return save("scores_caseops-1934", found, torch.device(options.device)) if options.save else None
    model, steps = random_model(recipe.resolve("caseops-1934", environ={}).recipe, "cuda"), []
    if options.eager:
        evaluator = PhasedLora(model, config)
        evaluator.model = model
        steps += show("kernel by kernel", step_times(evaluator, model, options.length), options.documents)
        del evaluator
    evaluator = PhasedLora(model, config)
    torch.cuda.synchronize()
    begin = time.perf_counter()
    evaluator.warm_up(options.documents)
    torch.cuda.synchronize()
    warm_up_s = time.perf_counter() - begin
    print(f"warm-up with {len(evaluator.model.recordings)} shapes to record: {warm_up_s:.1f} s")
    steps += show("replayed", step_times(evaluator, evaluator.model, options.length), options.documents)
    allocated, reserved = torch.cuda.max_memory_allocated() / 2**30, torch.cuda.max_memory_reserved() / 2**30
    print(f"peak memory {allocated:.1f} GiB, reserved {reserved:.1f}")
    if options.save:
        memory = {"peak_memory_gib": allocated, "reserved_memory_gib": reserved}
        found = {"steps": steps, "warm_up_s": warm_up_s, "recorded_shapes": len(evaluator.model.recordings)}
        save("phased_lora", found | memory | PUBLISHED, torch.device("cuda", 0))
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
