"""Mutated artifacts: each one loads exactly or is refused with ArtifactError, soon and in bounded memory.

    python -m tests.fuzz_artifact --cases 100000 [--seed 0] [--codec range]

Half of the cases are resealed: their checksums are made right again, so that the mutation reaches the parsers and decoders behind them.
"""

import argparse
import collections
import json
import random
import resource
import signal
import struct
import time

import torch

from pgolf_fast import artifact
from pgolf_fast.artifact import DIGEST_BYTES, HEAD, ArtifactError, pack, same, unpack
from pgolf_fast.codecs import CODECS, brotli_compress, brotli_decompress
from pgolf_fast.quantize import Codes, LowRank

SECONDS_PER_CASE = 20
MEMORY_HEADROOM = 2**30  # several times what the declared bound may take
NASTY = [0, 1, -1, 2**7, 2**16, 2**27, 2**31 - 1, 2**31, 2**32 - 1, 2**63, 2**64, 10**30, 1.5, True, None, "x", [], [[]], {}]


def example(seed=0):
    """Every kind of tensor, small."""
    g = torch.Generator().manual_seed(seed)

    def codes(rows, columns, limit=31):
        return (8 * torch.randn(rows, columns, generator=g)).clamp(-limit, limit).to(torch.int8)

    def half(*shape):
        return torch.rand(shape, generator=g).half()

    low_rank = LowRank(codes(24, 4, 1), half(), codes(4, 32, 7), half(2))
    return {
        "tok_emb.weight": Codes(codes(24, 32, 63), half(24), low_rank),
        "blocks.0.attn.c_q.weight": Codes(codes(16, 32), half(16)),
        "blocks.1.attn.c_q.weight": Codes(codes(16, 32), half(16)),
        "ve_shared.embed.weight": Codes(codes(8, 16, 127), half()),
        "skip_weights": torch.randn(3, 5, generator=g).half(),
        "bigram.scale": torch.tensor(0.25),
        "smear.gate": torch.randn(7, generator=g).bfloat16(),
    }


def mutate(data: bytes, others: list[bytes], rng: random.Random) -> tuple[str, bytes]:
    kind = rng.choice(["flip", "cut", "extend", "overwrite", "number", "splice", "delete", "index", "forged"])
    place = rng.randrange(len(data))
    changed = bytearray(data)
    if kind == "flip":
        for _ in range(rng.choice([1, 1, 1, 2, 8])):
            changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif kind == "cut":
        del changed[place:]
    elif kind == "extend":
        changed += rng.randbytes(rng.randint(1, 40))
    elif kind == "overwrite":
        length = rng.randint(1, 16)
        changed[place : place + length] = rng.choice([rng.randbytes(length), bytes(length), b"\xff" * length])
    elif kind == "number":  # a field of the head or a length of a stream
        at = 4 * rng.randrange((HEAD.size + 4 * _num_streams(data)) // 4)
        changed[at : at + 4] = struct.pack("<I", rng.choice([0, 1, 2, 2**16, 2**31, 2**32 - 1, len(data), rng.randrange(len(data))]))
    elif kind == "splice":
        other = rng.choice(others)
        changed[place : place + rng.randint(0, 60)] = other[(b := rng.randrange(len(other))) : b + rng.randint(0, 60)]
    elif kind == "delete":
        del changed[place : place + rng.randint(1, 20)]
    else:
        return kind, _with_mutated_index(data, rng, forged=kind == "forged")
    return kind, bytes(changed)


def _num_streams(data):
    return HEAD.unpack_from(data)[5]


def with_index(data: bytes, index: bytes) -> bytes:
    """The artifact with another index, its lengths right; the checksums stay as they are."""
    magic, version, codec, packed_size, index_size, num_streams = HEAD.unpack_from(data)
    begin = HEAD.size + 4 * num_streams
    packed = brotli_compress(index)
    head = HEAD.pack(magic, version, codec, len(packed), len(index), num_streams)
    return head + data[HEAD.size : begin] + packed + data[begin + packed_size :]


def index_of(data: bytes) -> dict:
    *_, packed_size, index_size, num_streams = HEAD.unpack_from(data)
    begin = HEAD.size + 4 * num_streams
    return json.loads(brotli_decompress(data[begin : begin + packed_size], index_size))


def _with_mutated_index(data: bytes, rng: random.Random, forged: bool) -> bytes:
    """One number, name or kind of the index replaced; forged: the content's digest made right for the same codes and a new index."""
    index = index_of(data)
    target = rng.choice(index["tensors"])
    while isinstance(target[slot := rng.randrange(len(target))], list) and target[slot] and rng.random() < 0.8:
        target = target[slot]
    target[slot] = rng.choice([*NASTY, "rows", "one", "float32", rng.randrange(200), [rng.randrange(70), rng.randrange(70)]])
    text = (json.dumps(index) if rng.random() < 0.95 else "[" * rng.choice([10, 100_000])).encode()
    changed = with_index(data, text)
    if not forged:
        return changed
    _, matrices, rest = artifact._content(example(), None)
    return changed[: -2 * DIGEST_BYTES] + artifact._content_digest(text, [m.codes for m in matrices], rest) + changed[-DIGEST_BYTES:]


def reseal(data: bytes) -> bytes:
    return data[:-DIGEST_BYTES] + artifact._digest(data[:-DIGEST_BYTES])


def fuzz(cases: int, seed: int = 0, codecs=tuple(name for name in CODECS if name != "lrzip")) -> collections.Counter:
    """Outcomes by (mutation, sealed or resealed, loaded or refused); raises on anything else."""
    rng = random.Random(seed)
    tensors = example()
    originals = {name: pack(tensors, name, {"table": "example"}) for name in codecs}
    outcomes = collections.Counter()
    for case in range(cases):
        original = originals[rng.choice(list(codecs))]
        kind, data = mutate(original, list(originals.values()), rng)
        resealed = rng.random() < 0.5
        data = reseal(data) if resealed else data
        try:
            loaded = unpack(data)
        except ArtifactError as error:
            assert str(error).startswith("artifact: "), f"case {case}: unclear refusal {error}"
            outcomes[kind, resealed, "refused"] += 1
            continue
        outcomes[kind, resealed, "loaded"] += 1
        if kind == "forged":  # another index over the same bytes is another artifact; it must be a sound one
            pack(loaded.tensors, "none", loaded.metadata)
            continue
        assert same(loaded.tensors, tensors), f"case {case} ({kind}, resealed {resealed}) loads as something else"
        assert data == original or resealed, f"case {case}: a damaged file passed its checksum"
    return outcomes


def _too_slow(*_):
    raise RuntimeError(f"a case took longer than {SECONDS_PER_CASE} s")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--cases", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--codec", choices=CODECS, action="append")
    arguments = parser.parse_args()
    codecs = tuple(arguments.codec) if arguments.codec else tuple(name for name in CODECS if name != "lrzip")
    fuzz(20, codecs=codecs)  # threads and libraries are loaded before memory is capped
    address_space = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (address_space + MEMORY_HEADROOM,) * 2)
    signal.signal(signal.SIGALRM, _too_slow)
    outcomes, begin, step = collections.Counter(), time.perf_counter(), min(500, arguments.cases)
    for chunk in range(-(-arguments.cases // step)):
        signal.alarm(SECONDS_PER_CASE + step // 5)
        outcomes += fuzz(min(step, arguments.cases - chunk * step), arguments.seed + chunk, codecs)
    signal.alarm(0)
    for (kind, resealed, outcome), count in sorted(outcomes.items()):
        print(f"{kind:10} {'resealed' if resealed else 'as it is':9} {outcome:8} {count:8}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{sum(outcomes.values())} cases in {time.perf_counter() - begin:.0f} s, peak {peak:.0f} MB; no crash, no hang, no wrong content")


if __name__ == "__main__":
    main()
