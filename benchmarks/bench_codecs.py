"""Every codec on full-size models: bytes, and processor seconds to pack and to unpack.

    python -m benchmarks.bench_codecs                                              synthetic models, all codecs
    python -m benchmarks.bench_codecs --artifact FILE...                           the content of artifacts, of whatever codec
    python -m benchmarks.bench_codecs --save ...                                   keep the rows in benchmarks/CODECS.md

Synthetic weights are Gaussian (benchmarks/states.py says how): they rank the coders' speed and their plain coding
efficiency, and say nothing about structure that a context-mixing coder might find in real weights.
Packing is codec.encode, unpacking codec.decode, each result compared with what went in. Seconds are of processor time,
child processes included, summed over cores: what a busy machine does not blur. ZPAQ in process is measured as a peer
where the `zpaq` package is installed.
"""

import argparse
import importlib.util
import os
import platform
import resource
import shutil
from pathlib import Path

import numpy as np

from benchmarks.states import synthetic_state
from pgolf_fast import artifact
from pgolf_fast.codecs import CODECS, Flat, Shape
from pgolf_fast.quantize import PUBLISHED, quantize

TABLE_FILE = Path(__file__).parent / "CODECS.md"
HEADING = f"""# Codecs

Written by `python -m benchmarks.bench_codecs --save`, on {os.cpu_count()} cores of {platform.machine()}; scales and float tensors included.
SYNTHETIC: Gaussian weights. The others are trained models, by the artifacts of `benchmarks/bench_quantize.py`: briefly, so that the rows of
the SP1024 ones lie on the scale's floor and take fewer bits than a full run's. The default codec is the smallest and the fastest to pack.

"""
COLUMNS = ["| model | codec | bytes | bits per weight | pack, CPU s | unpack, CPU s |", "|---|---|---:|---:|---:|---:|"]
MODELS = (("sp1024-s", "legal-ttt-691"), ("caseops", "caseops-1934"))  # one of each family; the other tables differ little in bytes


class Zpaq(Flat):
    """libzpaq at level 5 in process, one block per core: what the lrzip pipeline uses inside."""

    def compress(self, data):
        import zpaq

        return zpaq.compress(data, level=5)

    def decompress(self, stream, size):
        import zpaq

        return zpaq.decompress(stream)


def contestants() -> dict[str, object]:
    codecs = {name: codec for name, (_, codec) in CODECS.items() if name != "none" and (name != "lrzip" or shutil.which("lrzip"))}
    return codecs | ({"zpaq (peer)": Zpaq()} if importlib.util.find_spec("zpaq") else {})


def processor_seconds() -> float:
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in usages)


def measure(codec, matrices, rest) -> tuple[int, float, float]:
    begin = processor_seconds()
    streams = codec.encode(matrices, rest)
    packed = processor_seconds()
    codes, tail = codec.decode(streams, [Shape(m.role, *m.codes.shape) for m in matrices], len(rest))
    done = processor_seconds()
    if tail != rest or not all(np.array_equal(c, m.codes) for c, m in zip(codes, matrices)):
        raise RuntimeError(f"{codec}: decoded content differs")
    return sum(map(len, streams)), packed - begin, done - packed


def models(arguments):
    """(label, quantized tensors)"""
    for path in arguments.artifact:
        loaded = artifact.unpack(path.read_bytes())
        yield path.stem, loaded.tensors
    for family, table in () if arguments.artifact else MODELS:
        tensors, _ = quantize(synthetic_state(family), PUBLISHED[table], plain_rounding=True)
        yield f"SYNTHETIC {family}, {table}", tensors


def save(lines: list[str]) -> None:
    """The rows of the file, without those that were measured again, and the new ones."""

    def measured(line):
        return line.split("|")[1:3]

    old = [line for line in TABLE_FILE.read_text().splitlines() if line.startswith("| ") and not line.startswith("| model")]
    kept = [line for line in old if measured(line) not in map(measured, lines)]
    TABLE_FILE.write_text(HEADING + "\n".join([*COLUMNS, *kept, *lines]) + "\n")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--artifact", type=Path, nargs="+", default=[])
    parser.add_argument("--codec", action="append", choices=list(contestants()))
    parser.add_argument("--save", action="store_true")
    arguments = parser.parse_args()
    lines = []
    for label, tensors in models(arguments):
        _, matrices, rest = artifact._content(tensors, None)
        num_codes = sum(m.codes.size for m in matrices)
        for name, codec in contestants().items():
            if arguments.codec and name not in arguments.codec:
                continue
            size, pack_s, unpack_s = measure(codec, matrices, rest)
            lines.append(f"| {label} | {name} | {size:,} | {8 * size / num_codes:.3f} | {pack_s:.1f} | {unpack_s:.1f} |")
            print(lines[-1], flush=True)
    if arguments.save:
        save(lines)


if __name__ == "__main__":
    main()
