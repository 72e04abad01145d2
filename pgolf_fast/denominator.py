"""Proof that the byte counts under a score are right: each check returns what it found, or raises the UserError that says what is wrong."""

import dataclasses
import itertools

import numpy as np
import torch

from pgolf_fast import caseops
from pgolf_fast.errors import UserError
from pgolf_fast.shards import BOS, split_documents
from pgolf_fast.tokenizers import Tokenizer

# Of the tokens that are no byte pieces, how many must cover just their piece's own bytes. Real text gives 0.98 and source code 0.85 (white
# space and compatibility characters make the rest); counting every space twice gives under 0.6.
MIN_AGREEMENT = 0.75
NO_OPERATORS = dict.fromkeys(map(ord, caseops.OPERATORS))


@dataclasses.dataclass(frozen=True)
class ByteCount:
    documents: int
    tokens: int
    bytes: int


def num_scored(num_tokens: int, row: int) -> int:
    """Targets of a validation stream cut to whole rows: position p predicts token p + 1."""
    return max(0, num_tokens - 1) // row * row


def rule_bytes(tokenizer: Tokenizer, tokens: np.ndarray, block: int = 1 << 22) -> np.ndarray:
    """uint16 bytes of every token by the byte rule; the first one counts as after a boundary."""
    table, counts = tokenizer.piece_bytes, np.empty(len(tokens), np.uint16)
    for start in range(0, len(tokens), block):
        stream = torch.from_numpy(tokens[max(0, start - 1) : start + block].astype(np.int64))
        if start == 0:
            stream = torch.cat([torch.tensor([BOS]), stream])
        counts[start : start + block] = table.of_targets(stream[:-1], stream[1:])
    return counts


def check_byte_rule(tokenizer: Tokenizer, tokens: np.ndarray, max_documents: int | None = None) -> ByteCount:
    """The byte rule against the UTF-8 bytes of the decoded text, document by document."""
    total = ByteCount(0, 0, 0)
    for number, document in enumerate(itertools.islice(split_documents(tokens), max_documents)):
        counted = int(rule_bytes(tokenizer, document).sum(dtype=np.int64))
        text = tokenizer.decode(document)
        if tokenizer.is_caseops:
            text = text.translate(NO_OPERATORS)  # one that was in the text was escaped: only the sidecar counts it
        decoded = len(text.encode())
        if counted != decoded:
            raise UserError(
                f"validation document {number}: the byte rule counts {counted} bytes and its decoded text has {decoded}; "
                "these shards were not made with this tokenizer"
            )
        total = ByteCount(total.documents + 1, total.tokens + len(document), total.bytes + counted)
    return total


def check_sidecar(tokenizer: Tokenizer, tokens: np.ndarray, counts: np.ndarray) -> float:
    """The sidecar against the tokens it belongs to; returns the share of tokens that cover just their piece's own bytes."""
    remedy = "build the validation split again, sidecar and tokens in one go (`pgolf data build`)"
    if len(counts) != len(tokens):
        raise UserError(f"sidecar: {len(counts):,} counts for {len(tokens):,} tokens; {remedy}")
    at_bos = np.flatnonzero((tokens == BOS) & (counts != 0))
    if len(at_bos):
        raise UserError(f"sidecar: token {at_bos[0]} is BOS but counts {counts[at_bos[0]]} bytes, so the two do not line up; {remedy}")
    comparable = ~(tokenizer.is_byte | tokenizer.is_control)[tokens]
    agreement = float((rule_bytes(tokenizer, tokens) == counts)[comparable].mean()) if comparable.any() else 1.0
    if agreement < MIN_AGREEMENT:
        raise UserError(
            f"sidecar: only {agreement:.0%} of the tokens cover just their piece's own bytes (real text: 98 %), "
            f"so it counts something else than original bytes, or other tokens; {remedy}"
        )
    return agreement
