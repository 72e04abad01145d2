"""A corpus from what every machine has: the Python standard library's documentation topics and sources.

Built without network in well under half a minute: documents, a tokenizer trained on them, shards. The same Python gives the same
corpus. It is English prose mixed with code, good for showing that everything works and for nothing else.
"""

import hashlib
import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

from pgolf_fast import tokenizers
from pgolf_fast.data_build import BuildConfig, Progress, build
from pgolf_fast.dataset import Record
from pgolf_fast.errors import UserError

VAL_SHARE = 20  # one document in so many is for validation
TOKENIZER_TEXT_BYTES = 2_000_000
MAX_TEXT_BYTES = 120_000  # of one document; the few longer modules are tables
# Installed packages, tests, and modules that are tables of characters or vendored archives.
LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "ensurepip", "encodings", "pydoc_data", "__pycache__"}


def documents() -> list[tuple[str, str]]:
    """(name, text) of every document, in an order that mixes them and depends on the names only."""
    found = {f"topic {name}": text for name, text in topics.items()}
    root = Path(sysconfig.get_path("stdlib"))
    for path in root.rglob("*.py"):
        name = path.relative_to(root)
        if not LEFT_OUT & set(name.parts) and 400 <= path.stat().st_size <= MAX_TEXT_BYTES:
            found[name.as_posix()] = path.read_text(encoding="utf-8", errors="ignore")
    return sorted(found.items(), key=lambda item: hashlib.sha256(item[0].encode()).digest())


def make(
    out: str | Path,
    vocab_size: int = 1024,
    is_caseops: bool = False,
    processes: int = 1,
    progress: Progress = lambda done, total: None,
) -> Record:
    """The demo data set in folder `out`; one that is there already is kept."""
    out = Path(out)
    texts = [text for _, text in documents()]
    if len(texts) < 2 * VAL_SHARE:
        raise UserError(f"only {len(texts)} documents in this Python's library; install it with its sources, or use `pgolf data build`")
    source = out / "documents"
    source.mkdir(parents=True, exist_ok=True)
    num_val = len(texts) // VAL_SHARE
    for name, part in (("val", texts[:num_val]), ("train", texts[num_val:])):
        lines = (json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in part)
        (source / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    model = source / f"tokenizer{vocab_size}{'_caseops' if is_caseops else ''}.model"
    if not model.exists():
        tokenizers.train(_prefix(texts[num_val:]), vocab_size, is_caseops).save(model)
    config = BuildConfig((source / "train.jsonl",), model, val=(source / "val.jsonl",), processes=processes)
    return build(config, out, progress)


def _prefix(texts: list[str]) -> Iterator[str]:
    size = 0
    for text in texts:
        if size >= TOKENIZER_TEXT_BYTES:
            return
        size += len(text)
        yield text
