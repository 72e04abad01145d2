"""Documents and tokenizers for the data tests: made here, from Python's own documentation topics, in a second."""

import functools
import json
import os
from pathlib import Path
from pydoc_data.topics import topics

import pytest

from pgolf_fast import tokenizers

VOCAB_SIZE = 700
# What a tokenizer's normalisation changes, and the characters that CaseOps itself uses.
ODD = [
    "",
    "   ",
    "  two  spaces \n\n",
    "\ue001 \ue004\ue003x",
    "ﬁ ½ Ⅷ ＡＢ\u00a0c\u200bD\ufeff",
    "NASA's iPhone\tÉtÉ 𝄞 \x00 Ω",
    "\ufeffstart",
    "▁ a ▁b",
]


@functools.cache
def texts(count: int = 60) -> list[str]:
    """Different documents in a fixed order, the odd ones among them."""
    plain = [text for _, text in sorted(topics.items())][: count - len(ODD)]
    return [*plain[:10], *ODD, *plain[10:]]


@functools.cache
def tokenizer(is_caseops: bool) -> tokenizers.Tokenizer:
    return tokenizers.train(texts(), VOCAB_SIZE, is_caseops)


def write_jsonl(path: Path, documents: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in documents), encoding="utf-8")
    return path


def shared_data() -> Path:
    """The folder of the shared corpus and its tokenizers; the test is skipped where it is not."""
    folder = Path(os.environ.get("PGOLF_SHARED_DATA", Path(__file__).parents[2] / "shared/data"))
    if not (folder / "corpus.val.zst").is_file():
        pytest.skip(f"no shared corpus at {folder} (set PGOLF_SHARED_DATA)")
    return folder
