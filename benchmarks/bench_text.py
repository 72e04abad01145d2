"""Text to tokens on one core, MB/s of UTF-8: python -m benchmarks.bench_text [--documents FILE] [--json]"""

import dataclasses
import itertools
import json
import statistics
import time
from pathlib import Path

import tyro
from rich import box
from rich.console import Console
from rich.table import Table

from pgolf_fast import caseops, demo_corpus, tokenizers
from pgolf_fast.documents import find_files, parse_chunk, read_chunks


@dataclasses.dataclass(frozen=True)
class Bench:
    documents: Path | None = None
    """Documents to use; the embedded corpus otherwise."""
    max_mb: float = 4.0
    rounds: int = 5
    json: bool = False


def read_texts(bench: Bench) -> list[str]:
    if bench.documents is None:
        everything = (text for _, text in demo_corpus.documents())
    else:
        everything = itertools.chain.from_iterable(parse_chunk(chunk) for chunk in read_chunks(find_files([bench.documents])))
    texts, size = [], 0
    for text in everything:
        texts.append(text)
        size += len(text)
        if size >= bench.max_mb * 1e6:
            break
    return texts


def main() -> None:
    bench = tyro.cli(Bench, config=(tyro.conf.FlagCreatePairsOff,))
    texts = read_texts(bench)
    encoded = [caseops.encode(text) for text in texts]
    if [caseops.decode(text) for text in encoded] != texts or encoded != [caseops.encode_ref(text) for text in texts]:
        raise SystemExit("wrong results, so no figures")
    plain, cased = (tokenizers.train(texts, vocab_size, is_caseops) for vocab_size, is_caseops in ((1024, False), (8192, True)))
    work = {
        "CaseOps encode, C++": (caseops.encode, texts),
        "CaseOps decode, C++": (caseops.decode, encoded),
        "CaseOps encode, Python reference": (caseops.encode_ref, texts),
        "CaseOps decode, Python reference": (caseops.decode_ref, encoded),
        "tokenize, 1,024 pieces": (plain.encode, texts),
        "tokenize, CaseOps 8,192 pieces": (cased.encode, texts),
        "the same with bytes per token": (cased.encode_counted, texts),
    }
    mb = sum(len(text.encode()) for text in texts) / 1e6
    seconds = {name: [] for name in work}
    for _ in range(bench.rounds):
        for name, (function, inputs) in work.items():
            begin = time.process_time()  # of this process: a busy machine does not count
            for text in inputs:
                function(text)
            seconds[name].append(time.process_time() - begin)
    rates = {name: mb / statistics.median(times) for name, times in seconds.items()}
    if bench.json:
        print(json.dumps({"mb": mb, "documents": len(texts), "mb_per_s": rates}))
        return
    table = Table(title=f"{mb:.1f} MB of text, {len(texts):,} documents, one core", title_justify="left", box=box.SIMPLE)
    table.add_column("work")
    table.add_column("MB/s", justify="right")
    for name, rate in rates.items():
        table.add_row(name, f"{rate:.1f}")
    Console().print(table)


if __name__ == "__main__":
    main()
