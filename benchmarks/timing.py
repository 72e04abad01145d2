"""Honest timing, and the only place that times.

What it guards against, and how:

- inputs left in the cache     every contestant rotates over `rotations` sets of buffers, sized past the L2
- launch gaps                  each contestant's rotation is captured in a CUDA graph and replayed; a contestant
                               that cannot be captured is timed eagerly and marked so
- drift of clocks and heat     contestants are interleaved, round after round, in one process
- luck                         the median of the rounds, with the 20th and 80th percentile beside it
- compression and dead data    cases draw random data; nothing here fills with zeros
- hopeful ceilings             copy bandwidth and matrix rate are measured in the same run
- wrong results                `pgolf bench` runs the op's tests first and prints no number on red
"""

import dataclasses
import statistics
import time
from collections.abc import Callable

import torch

L2_BYTES = 60e6  # H200; rotations cover at least four times it


@dataclasses.dataclass
class Case:
    """One row of a benchmark table.

    contestants  name -> function of the rotation index; "ours" is the product's public path.
                 Warm-up (compilation included) happens before timing.
    bytes, flops the fewest that any implementation must move and do
    """

    name: str
    contestants: dict[str, Callable[[int], object]]
    bytes: float = 0
    flops: float = 0
    rotations: int = 1


@dataclasses.dataclass
class Timing:
    median_us: float
    p20_us: float
    p80_us: float
    graph: bool | None  # replayed from a CUDA graph; None on the CPU


@dataclasses.dataclass
class Ceilings:
    copy_bytes_per_s: float
    matmul_flops_per_s: float

    def floor_us(self, case: Case) -> float:
        return 1e6 * max(case.bytes / self.copy_bytes_per_s, case.flops / self.matmul_flops_per_s)


def rotations_for(bytes_per_set: float) -> int:
    """Sets of buffers so that a rotation flushes the L2 between two uses of the same set."""
    return max(1, min(64, -(-int(4 * L2_BYTES) // max(1, int(bytes_per_set)))))


def _percentiles(samples_us: list[float], graph: bool | None) -> Timing:
    ordered = sorted(samples_us)
    pick = lambda share: ordered[min(len(ordered) - 1, int(share * len(ordered)))]  # noqa: E731
    return Timing(statistics.median(ordered), pick(0.2), pick(0.8), graph)


def _capture(function, rotations):
    """A CUDA graph of one rotation, or None where the function synchronises or otherwise refuses capture."""
    graph = torch.cuda.CUDAGraph()
    try:
        # NOTE: a capture that fails leaves torch's random generator unusable, so what synchronises is found out before.
        torch.cuda.set_sync_debug_mode("error")
        function(0)
        torch.cuda.set_sync_debug_mode("default")
        with torch.cuda.graph(graph):
            for i in range(rotations):
                function(i)
    except RuntimeError:
        torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
        return None
    return graph


def time_contestants(case: Case, device: torch.device, budget_s: float = 0.5) -> dict[str, Timing]:
    """Median microseconds of one call, per contestant, interleaved."""
    if device.type != "cuda":
        return _time_on_host(case, budget_s)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())  # the case's data may still be being drawn
    replays, graphed = {}, {}
    with torch.cuda.stream(stream):
        for name, function in case.contestants.items():
            for i in range(max(3, case.rotations)):
                function(i % case.rotations)
    torch.cuda.synchronize()
    for name, function in case.contestants.items():
        graph = _capture(function, case.rotations)
        graphed[name] = graph is not None
        replays[name] = graph.replay if graph else lambda f=function: [f(i) for i in range(case.rotations)]
        replays[name]()
    torch.cuda.synchronize()

    def one_round(name):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        replays[name]()
        end.record()
        return begin, end

    pilots = [one_round(name) for name in replays]
    torch.cuda.synchronize()
    round_s = sum(b.elapsed_time(e) for b, e in pilots) / 1e3
    rounds = max(10, min(200, int(budget_s * len(replays) / max(round_s, 1e-6))))
    events = {name: [] for name in replays}
    for _ in range(rounds):
        for name in replays:
            events[name].append(one_round(name))
    torch.cuda.synchronize()
    return {
        name: _percentiles([1e3 * b.elapsed_time(e) / case.rotations for b, e in pairs], graphed[name]) for name, pairs in events.items()
    }


def _time_on_host(case: Case, budget_s: float) -> dict[str, Timing]:
    for function in case.contestants.values():
        function(0)
    samples = {name: [] for name in case.contestants}
    deadline = time.perf_counter() + budget_s * len(samples)
    for i in range(200):
        for name, function in case.contestants.items():
            begin = time.perf_counter()
            function(i % case.rotations)
            samples[name].append(1e6 * (time.perf_counter() - begin))
        if i >= 4 and time.perf_counter() > deadline:
            break
    return {name: _percentiles(values, graph=None) for name, values in samples.items()}


def measure_ceilings(device: torch.device) -> Ceilings:
    """Copy bandwidth (read and write counted) and bf16 matrix rate, on random data."""
    on_gpu = device.type == "cuda"
    num_bytes, edge = (2**31, 8192) if on_gpu else (2**27, 1024)
    source = torch.randn(num_bytes // 4, device=device)
    target = torch.empty_like(source)
    a, b = (torch.randn(edge, edge, device=device, dtype=torch.bfloat16 if on_gpu else torch.float32) for _ in range(2))
    # NOTE: not copy_: replayed from a graph it goes to the copy engine, at two thirds of what the multiprocessors reach.
    copy = time_contestants(Case("copy", {"copy": lambda i: torch.neg(source, out=target)}), device)["copy"]
    matmul = time_contestants(Case("matmul", {"matmul": lambda i: a @ b}), device)["matmul"]
    return Ceilings(2 * num_bytes / copy.median_us * 1e6, 2 * edge**3 / matmul.median_us * 1e6)
