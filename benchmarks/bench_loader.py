"""Can the loaders feed their ranks: python -m benchmarks.bench_loader [--folder DATASET] [--device cuda] [--json]

Two questions for each stream and number of ranks (one process each, all on this host):
  flat out   how fast batches come when nothing else is done: milliseconds per batch and tokens/s of one rank
  paced      what a rank that trains at `--tokens-per-s` notices: time inside next() and stalls, everything else spent asleep
"""

import dataclasses
import json
import multiprocessing
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import tyro
from rich import box
from rich.console import Console
from rich.table import Table

from pgolf_fast import shards
from pgolf_fast.data import ContinuousStream, Loader, ShardStream

STREAMS = {"sequential": (ContinuousStream, False), "packed": (ShardStream, True)}


@dataclasses.dataclass(frozen=True)
class Bench:
    folder: Path | None = None
    """A data set; without one, random shards with log-normal documents (median 600 tokens) are made."""
    ranks: tuple[int, ...] = (1, 8)
    tokens: int = 98_304
    """Of one rank's batch."""
    tokens_per_s: float = 1.5e6
    """Of one rank's training, for the paced run."""
    batches: int = 100
    device: str = "cpu"
    json: bool = False


def make_shards(folder: Path, num_shards: int = 3, tokens: int = 20_000_000) -> None:
    rng = np.random.default_rng(20240520)
    for number in range(num_shards):
        values = rng.integers(4, 8192, tokens, dtype=np.uint16)
        lengths = np.maximum(1, rng.lognormal(np.log(600), 1.0, tokens // 300)).astype(np.int64)
        starts = np.cumsum(lengths)
        values[starts[starts < tokens]] = 1
        values[0] = 1
        shards.write_shard(folder / shards.shard_name("train", number), values)


def run_rank(bench: Bench, folder: Path, name: str, world_size: int, rank: int, barrier, results) -> None:
    torch.set_num_threads(1)
    stream, is_packed = STREAMS[name]
    device = f"cuda:{rank % torch.cuda.device_count()}" if bench.device == "cuda" else bench.device
    laid_out = stream(folder, bench.tokens, world_size)
    loader = Loader(laid_out, rank, device, is_packed)
    for _ in range(8):
        next(loader)
    barrier.wait()
    begin = time.perf_counter()
    flat_ms = [_timed_next(loader) for _ in range(bench.batches)]
    flat_s = time.perf_counter() - begin
    loader.close()
    barrier.wait()
    step_s = bench.tokens / bench.tokens_per_s
    loader = Loader(laid_out, rank, device, is_packed)
    next(loader)
    paced_ms = []
    for _ in range(max(20, bench.batches // 4)):
        time.sleep(step_s)
        paced_ms.append(_timed_next(loader))
    results.put((flat_s / bench.batches, flat_ms, paced_ms, loader.stalls, loader.stall_s))
    loader.close()


def _timed_next(loader: Loader) -> float:
    begin = time.perf_counter()
    next(loader)
    if loader.side is not None:
        torch.cuda.synchronize(loader.device)
    return 1e3 * (time.perf_counter() - begin)


def measure(bench: Bench, folder: Path, name: str, world_size: int) -> dict:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    barrier, results = context.Barrier(world_size), context.Queue()
    ranks = [context.Process(target=run_rank, args=(bench, folder, name, world_size, rank, barrier, results)) for rank in range(world_size)]
    for process in ranks:
        process.start()
    per_rank = [results.get(timeout=300) for _ in ranks]
    for process in ranks:
        process.join()
    batch_s = max(mean for mean, *_ in per_rank)
    flat, paced = (sorted(ms for row in per_rank for ms in row[k]) for k in (1, 2))
    return {
        "stream": name,
        "ranks": world_size,
        "flat_out_ms_per_batch": 1e3 * batch_s,
        "flat_out_median_ms": statistics.median(flat),
        "tokens_per_s_of_one_rank": bench.tokens / batch_s,
        "tokens_per_s_of_all": world_size * bench.tokens / batch_s,
        "paced_median_ms": statistics.median(paced),
        "paced_p99_ms": paced[int(0.99 * (len(paced) - 1))],
        "paced_batches": len(paced),
        "paced_stalls": sum(row[3] for row in per_rank),
        "paced_stall_s": sum(row[4] for row in per_rank),
    }


def main() -> None:
    bench = tyro.cli(Bench, config=(tyro.conf.FlagCreatePairsOff,))
    with tempfile.TemporaryDirectory() as temporary:
        folder = bench.folder or Path(temporary)
        if bench.folder is None:
            make_shards(folder)
        rows = [measure(bench, folder, name, world_size) for world_size in bench.ranks for name in STREAMS]
    if bench.json:
        print(json.dumps(rows))
        return
    cores = multiprocessing.cpu_count()
    title = f"batches of {bench.tokens:,} tokens a rank, {cores} cores, {bench.device}; paced at {bench.tokens_per_s:,.0f}/s"
    table = Table(title=title, title_justify="left", box=box.SIMPLE)
    for heading in ("stream", "ranks", "ms/batch", "M tok/s a rank", "all", "paced ms", "p99", "stalls"):
        table.add_column(heading, justify="left" if heading == "stream" else "right")
    for row in rows:
        table.add_row(
            row["stream"], str(row["ranks"]), f"{row['flat_out_ms_per_batch']:.2f}", f"{row['tokens_per_s_of_one_rank'] / 1e6:.1f}",
            f"{row['tokens_per_s_of_all'] / 1e6:.1f}", f"{row['paced_median_ms']:.3f}", f"{row['paced_p99_ms']:.3f}",
            f"{row['paced_stalls']} of {row['paced_batches']}")  # fmt: skip
    Console().print(table)


if __name__ == "__main__":
    main()
