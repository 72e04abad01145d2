"""What quantization costs a run, in bits per byte, bytes and seconds.

    python -m benchmarks.bench_quantize RUN... [--data FOLDER] [--fit] [--save]

For each run of `pgolf train`: validation of the weights as trained, as quantized, and as read back from the packed artifact, which must
agree with the quantized ones in every bit. All three in the same pass over the same rows, plain float32 losses. Seconds are wall time;
quantizing is timed twice, the first time with whatever a process does once. Artifacts are left in the runs' folders.

--fit: also the search for the least loss, at the published table's own bytes, and under the cap with the code counted wrapped and strict.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.run import environment, result_path
from pgolf_fast import artifact, export
from pgolf_fast.bpb import BitsPerByte, Score
from pgolf_fast.commands.devices import choose_device
from pgolf_fast.commands.pack import ARTIFACT
from pgolf_fast.data import Validation, load_validation, pack_segments
from pgolf_fast.errors import UserError
from pgolf_fast.fit import Search
from pgolf_fast.ledger import CAP_BYTES, count_code, forecast_bytes, ledger, own_sources

# Bits per byte after quantization minus before, of runs of full length.
PUBLISHED_GAP = {
    "legal-ttt-691": (0.0081, "PR #414, the stack under it: 1.13850 to 1.14656"),
    "gptq-lite-379": (0.0078, "1.14170 to 1.14948"),
    "gepa-598": (None, "not logged"),
    "caseops-1934": (0.0086, "PR #1855, its lineage"),
}


@torch.no_grad()
def score(model, validation: Validation, train, rows_at_a_time: int = 64) -> Score:
    device, row = model.tok_emb.device, train.seq_len
    total = BitsPerByte(device)
    for start in range(0, len(validation), row * rows_at_a_time):
        inputs, targets, target_bytes = validation.slice(start, min(start + row * rows_at_a_time, len(validation)))
        documents = {}
        if train.layout == "documents":
            segments = torch.from_numpy(pack_segments(inputs.numpy(), row, train.cu_seqlens_entries)).to(device)
            documents = {"cu_seqlens": segments, "max_seqlen": row}
        shape = (1, -1) if documents else (-1, row)
        losses = model(inputs.view(shape).to(device), targets.view(shape).to(device), reduction="none", **documents)
        total.add(losses.flatten(), target_bytes.to(device))
    return total.score()


def timed(action):
    begin = time.perf_counter()
    result = action()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return result, time.perf_counter() - begin


def measure(folder: Path, data: Path | None, device: torch.device) -> dict:
    run = export.read_run(folder)
    validation = load_validation(data or run.recipe.train.data, run.recipe.train.seq_len)
    first, made = (export.quantize_run(run, device, data) for _ in range(2))
    on_device = {name: t.to(device) for name, t in run.state.items()}
    timed(lambda: forecast_bytes(on_device, run.recipe.quantize.rules()))
    forecast, forecast_s = timed(lambda: forecast_bytes(on_device, run.recipe.quantize.rules()))
    packed, pack_s = timed(lambda: artifact.pack(made.tensors, metadata=export.metadata(run.name, run.recipe)))
    path = folder / ARTIFACT
    path.write_bytes(packed)
    _, unpack_s = timed(lambda: artifact.unpack(packed))
    (_, loaded), load_s = timed(lambda: export.load_model(path, device, expect=run.recipe))

    as_trained = export.model_of(run.recipe, device)
    as_trained.load_published(run.state)
    quantized = export.build_model(run.recipe, made.tensors, device)
    same_bits = all(torch.equal(a, b) for a, b in zip(quantized.parameters(), loaded.parameters()))
    scores = {
        name: score(m, validation, run.recipe.train)
        for name, m in (("trained", as_trained), ("quantized", quantized), ("unpacked", loaded))
    }
    if not same_bits or scores["quantized"] != scores["unpacked"]:
        raise RuntimeError(f"{folder}: the unpacked model is not the quantized one: {scores}")

    found = ledger(packed, count_code(own_sources()))
    gap, source = PUBLISHED_GAP.get(run.name, (None, "no such published run"))
    bpb = {name: s.bits_per_byte for name, s in scores.items()}
    return {
        "recipe": run.name,
        "weights": run.weights,
        "parameters": sum(t.numel() for t in run.state.values()),
        "train_s": run.train_s,
        "bpb": bpb,
        "loss": {name: s.nats_per_token for name, s in scores.items()},
        "gap_bpb": bpb["quantized"] - bpb["trained"],
        "published_gap_bpb": gap,
        "published_gap_source": source,
        "unpacked_is_quantized_exactly": same_bits,
        "quantizing_repeats_exactly": artifact.same(first.tensors, made.tensors),
        "bytes": {
            "artifact": len(packed),
            "forecast": forecast,
            "cap": CAP_BYTES,
            "code": vars(found.code),
            "weights": found.weights,
            "metadata": found.metadata,
        },
        "seconds": {
            "calibrate_first": first.calibrate_s,
            "calibrate": made.calibrate_s,
            "quantize_first": first.quantize_s,
            "quantize": made.quantize_s,
            "forecast": forecast_s,
            "pack": pack_s,
            "unpack": unpack_s,
            "load_model": load_s,
        },
    }


def measure_fits(folder: Path, data: Path | None, device: torch.device, published_bytes: int) -> Iterator[dict]:
    """The search's seconds, and per room what it found, scored on validation, which it has not seen; after each room, all so far."""
    run = export.read_run(folder)
    validation = load_validation(data or run.recipe.train.data, run.recipe.train.seq_len)
    search, search_s = timed(lambda: Search(run, device, data))
    predicted = [(round(c.bytes), c.loss - search.unquantized_loss) for c in search.frontier[::20]]
    code = count_code(own_sources())
    fits = []
    rooms = (("wrapped", code.wrapped, CAP_BYTES), ("as published", 0, published_bytes), ("strict", code.strict, CAP_BYTES))
    for room, code_bytes, cap in rooms:
        try:
            found, fit_s = timed(lambda: search.fit(cap - code_bytes))
        except UserError as error:
            print(f"  fit, {room}: {error}")
            continue
        (folder / f"fit-{room.replace(' ', '-')}.pglf").write_bytes(found.artifact)
        size, chosen = len(found.artifact), found.chosen.choice
        row = {"room": room, "artifact": size, "code": code_bytes, "total": size + code_bytes, "published_table": chosen == found.tried[0]}
        row["bpb"] = score(export.build_model(run.recipe, found.chosen.tensors, device), validation, run.recipe.train).bits_per_byte
        row["train_rise"] = chosen.loss - search.unquantized_loss
        row["tried"] = [{"bytes": round(c.bytes), "train_rise": c.loss - search.unquantized_loss} for c in found.tried]
        fits.append(row | {"schemes": {name: s.short() for name, s in zip(search.searched, chosen.schemes)}, "seconds": fit_s})
        rise = f"rise on training text {row['train_rise']:.5f}, published table {row['tried'][0]['train_rise']:.5f}"
        print(f"  fit, {room}: {size:,} + {code_bytes:,} = {row['total']:,}  bpb {row['bpb']:.5f}  {rise}")
        print(f"  in {fit_s:.1f} s after {search_s:.1f} s", flush=True)
        yield {"search_s": search_s, "rooms": fits, "predicted": predicted}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--fit", action="store_true")
    parser.add_argument("--save", action="store_true")
    arguments = parser.parse_args()
    device = choose_device(arguments.device)
    for folder in arguments.runs:
        row = measure(folder, arguments.data, device)
        seconds = "  ".join(f"{name} {value:.2f}" for name, value in row["seconds"].items())
        print(f"{row['recipe']}, {row['weights']}: {row['bytes']['artifact']:,} bytes (forecast {row['bytes']['forecast']:,})")
        print(f"  quantizing twice gives the same bits: {row['quantizing_repeats_exactly']}")
        print(f"  bpb {row['bpb']}  gap {row['gap_bpb']:.4f} (published {row['published_gap_bpb']})\n  seconds: {seconds}", flush=True)
        if arguments.save:
            save(row, folder, device)
        if arguments.fit:
            for fits in measure_fits(folder, arguments.data, device, row["bytes"]["artifact"]):
                row["fit"] = fits
                if arguments.save:
                    save(row, folder, device)


def save(row: dict, folder: Path, device: torch.device) -> None:
    command = " ".join(["python -m benchmarks.bench_quantize", *sys.argv[1:]])
    trained = json.loads((folder / "machine.json").read_text())["command"]
    record = {"environment": environment(device) | {"command": command}, "train_command": " ".join(["pgolf", *trained[1:]]), **row}
    result_path(f"quantize_{row['recipe']}", device).write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
