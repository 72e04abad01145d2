"""SentencePiece tokenizers as the recipes use them: loading, the contract, bytes per token, training.

A document is BOS and its pieces, no EOS. The text of a CaseOps tokenizer goes through `caseops.encode` first; which kind a model is
shows in its pieces, so no flag says it.

NOTE: normalisation (nmt_nfkc) is not lossless. It turns runs of white space into one space, drops white space at a document's ends,
control and zero-width characters, and rewrites compatibility characters. `encode_counted` therefore counts the *original* bytes that
each token covers.
"""

import functools
import hashlib
import io
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import sentencepiece
import torch

from pgolf_fast import caseops
from pgolf_fast.bpb import PieceBytes
from pgolf_fast.errors import UserError
from pgolf_fast.host import host
from pgolf_fast.shards import BOS

PAD, EOS, UNKNOWN = 0, 2, 3  # with BOS, the first four ids
SPACE = "\u2581"  # how SentencePiece writes a space
MAX_VOCAB_SIZE = 2**16  # a shard's tokens are uint16


class Tokenizer:
    def __init__(self, model: str | Path | bytes):
        """`model`: a SentencePiece model, its path or its bytes."""
        self.path = None if isinstance(model, bytes) else Path(model)
        if self.path is not None and not self.path.is_file():
            raise UserError(f"{self.path}: no such file; give a SentencePiece .model (`pgolf data train-tokenizer` makes one)")
        self.model = model if isinstance(model, bytes) else self.path.read_bytes()
        self.sha256 = hashlib.sha256(self.model).hexdigest()
        self.processor = sentencepiece.SentencePieceProcessor()
        try:
            self.processor.LoadFromSerializedProto(self.model)
        except RuntimeError:
            raise UserError(f"{self.name}: not a SentencePiece model; train one with `pgolf data train-tokenizer`") from None
        self.vocab_size = self.processor.vocab_size()
        self.pieces = [self.processor.id_to_piece(i) for i in range(self.vocab_size)]
        self.is_byte = np.array([self.processor.is_byte(i) for i in range(self.vocab_size)])
        self.is_control = np.array(
            [self.processor.is_control(i) or self.processor.is_unknown(i) or self.processor.is_unused(i) for i in range(self.vocab_size)]
        )
        self.operators = [i for i, piece in enumerate(self.pieces) if piece in caseops.OPERATORS]
        self.is_caseops = bool(self.operators)
        self._check_contract()

    @property
    def name(self) -> str:
        return str(self.path) if self.path else "tokenizer"

    def _check_contract(self) -> None:
        """What the shards and the byte rule take for granted; each clause has cost somebody a wrong score."""

        def require(condition, problem):
            if not condition:
                raise UserError(f"{self.name}: {problem}; train one that fits with `pgolf data train-tokenizer`")

        ids = [self.processor.pad_id(), self.processor.bos_id(), self.processor.eos_id(), self.processor.unk_id()]
        require(self.vocab_size <= MAX_VOCAB_SIZE, f"{self.vocab_size} pieces do not fit the shards' uint16")
        require(ids == [PAD, BOS, EOS, UNKNOWN], f"pad, BOS, EOS, unknown are {ids}, expected [0, 1, 2, 3]")
        require(SPACE in self.pieces, "no piece is a space alone, so bytes would be undercounted")
        require(self.is_byte.sum() == 256, f"{self.is_byte.sum()} byte pieces instead of 256, so some text has no tokens")
        inside = next((p for p in self.pieces if SPACE in p[1:]), None)
        require(inside is None, f"piece {inside!r} holds a space after its start, which the byte rule does not count")
        require(SPACE not in "".join(self.processor.encode("a", out_type=str)), "it puts a space before every text, which has none there")
        if self.is_caseops:
            require("".join(self.pieces[4:8]) == caseops.OPERATORS, "the CaseOps operators are not ids 4 to 7")
            cased = next((p for p, b in zip(self.pieces[8:], self.is_byte[8:]) if not b and caseops.encode(p) != p), None)
            require(cased is None, f"piece {cased!r} holds a capital or an operator, which encoded text never has inside a piece")

    def encode(self, text: str) -> np.ndarray:
        """The uint16 tokens of one document: BOS and the pieces of its text."""
        return np.array([BOS, *self.processor.encode(self._prepare(text), out_type=int)], np.uint16)

    def encode_counted(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """`encode`, and the int64 original UTF-8 bytes of each token: 0 for BOS; white space at the ends belongs to no token."""
        prepared = self._prepare(text).encode()
        ids, begin, ends = host.piece_spans(self.processor.encode(prepared, out_type="serialized_proto"))
        counts = caseops.span_bytes(prepared, begin, ends) if self.is_caseops else np.diff(ends, prepend=begin)
        return np.concatenate([[BOS], ids]).astype(np.uint16), np.concatenate([[0], counts])

    def _prepare(self, text: str) -> str:
        return caseops.encode(text) if self.is_caseops else text

    def decode(self, tokens: np.ndarray | list[int]) -> str:
        """The text of some tokens as normalisation left it, its case restored; control tokens have no text."""
        text = self.processor.decode(np.asarray(tokens).tolist())
        return caseops.decode_lenient(text) if self.is_caseops else text

    @functools.cached_property
    def piece_bytes(self) -> PieceBytes:
        """The byte rule's tables: a control token has no bytes, a byte piece one, an operator none, another its UTF-8 length."""
        own = [len(piece.removeprefix(SPACE).encode()) for piece in self.pieces]
        own = np.where(self.is_control, 0, np.where(self.is_byte, 1, own))
        own[self.operators] = 0
        has_space = np.array([piece.startswith(SPACE) for piece in self.pieces]) & ~self.is_control
        return PieceBytes(torch.from_numpy(own), torch.from_numpy(has_space), torch.from_numpy(self.is_control))

    def save(self, path: str | Path) -> None:
        """Writes the model, and beside it the pieces as text: id order, piece, score."""
        path = Path(path)
        path.write_bytes(self.model)
        lines = (f"{piece}\t{self.processor.get_score(i):g}\n" for i, piece in enumerate(self.pieces))
        path.with_suffix(".vocab").write_text("".join(lines), encoding="utf-8")


def train(texts: Iterable[str], vocab_size: int, is_caseops: bool) -> Tokenizer:
    """A BPE tokenizer with the recipes' settings; the same texts give the same model."""

    def sentences():
        for text in texts:
            text = text.replace("\0", " ").strip()
            if text:
                yield caseops.encode(text) if is_caseops else text

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=sentences(),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            pad_id=PAD,
            bos_id=BOS,
            eos_id=EOS,
            unk_id=UNKNOWN,
            user_defined_symbols=list(caseops.OPERATORS) if is_caseops else [],
            normalization_rule_name="nmt_nfkc",
            add_dummy_prefix=False,
            split_digits=True,
            byte_fallback=True,
            character_coverage=0.999,
            hard_vocab_limit=False,
            max_sentence_length=1 << 30,  # bytes; the default drops long documents without a word
            minloglevel=2,
        )
    except RuntimeError as error:
        raise UserError(f"training the tokenizer failed: {str(error).strip()}; give more text or a smaller vocabulary") from None
    return Tokenizer(model.getvalue())
