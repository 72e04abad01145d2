"""The text that evaluators are audited on."""

import dataclasses
from functools import cached_property

import numpy as np
import torch

from pgolf_fast.bpb import PieceBytes
from pgolf_fast.data import Validation
from pgolf_fast.model import BOS

SPACE = "▁"  # how a tokenizer writes the space that a piece starts with
WORDS = ["▁the", "▁cat", "▁sat", "▁on", "▁a", "▁mat", "▁naïve", "▁café", "▁straße", "▁日本", "▁", "▁—"]
LETTERS = [*"aeinorst", "é", "ß", "語", "€", ".", ","]
PIECES = ["<pad>", "<bos>", *WORDS, *LETTERS]
VOCAB_SIZE = len(PIECES)
DOCUMENT_TOKENS = (61, 40, 75, 33, 52)  # BOS included; no two alike, no multiple of a window
PHRASE_TOKENS = 7


@dataclasses.dataclass(frozen=True)
class Stream:
    """Position p reads token p and predicts token p + 1, as everywhere."""

    tokens: torch.Tensor  # int64 [n + 1]
    pieces: tuple[str, ...]  # text of each token id; ids 0 and 1 are control tokens without text

    def __len__(self) -> int:
        return len(self.tokens) - 1

    @cached_property
    def document_starts(self) -> np.ndarray:
        return np.flatnonzero(self.tokens[:-1].numpy() == BOS)

    @cached_property
    def texts(self) -> list[str]:
        """What the documents say: the pieces joined, without the space that a tokenizer puts in front of a text."""
        texts = []
        for token in self.tokens.tolist():
            if token == BOS:
                texts.append("")
            else:
                texts[-1] += self.pieces[token]
        return [text.removeprefix(SPACE).replace(SPACE, " ") for text in texts]

    @property
    def text_bytes(self) -> int:
        """UTF-8 bytes of the texts: the only denominator there is."""
        return sum(len(text.encode()) for text in self.texts)

    @cached_property
    def piece_bytes(self) -> PieceBytes:
        is_boundary = torch.tensor([i <= BOS for i in range(len(self.pieces))])
        own = [0 if i <= BOS else len(piece.removeprefix(SPACE).encode()) for i, piece in enumerate(self.pieces)]
        return PieceBytes(torch.tensor(own), torch.tensor([piece.startswith(SPACE) for piece in self.pieces]), is_boundary)

    def validation(self) -> Validation:
        """The stream as the shipped evaluators get theirs, with bytes by the challenge's rule."""
        target_bytes = self.piece_bytes.of_targets(self.tokens[:-1], self.tokens[1:]).numpy().astype(np.uint16)
        return Validation(self.tokens.numpy().astype(np.uint16), target_bytes, self.document_starts, False)

    def with_tokens(self, tokens: torch.Tensor) -> "Stream":
        return Stream(tokens, self.pieces)

    def swapped(self, places: np.ndarray, seed: int) -> "Stream":
        """Every token at `places` replaced by another one; a BOS stays, since where documents start is public."""
        tokens = self.tokens.clone()
        kinds = len(self.pieces) - 2
        places = torch.from_numpy(places)[tokens[places] != BOS]
        shift = torch.from_numpy(np.random.default_rng(seed).integers(1, kinds, len(places)))
        tokens[places] = 2 + (tokens[places] - 2 + shift) % kinds
        return self.with_tokens(tokens)


def make_stream(vocab_size: int = VOCAB_SIZE, seed: int = 0) -> Stream:
    """Documents of random pieces in which one phrase comes again and again, so that whatever looks for repetitions finds some."""
    generator = np.random.default_rng(seed)
    pieces = [PIECES[i] if i < 2 else PIECES[2 + (i - 2) % (VOCAB_SIZE - 2)] for i in range(vocab_size)]
    phrase = generator.integers(2, min(vocab_size, VOCAB_SIZE), PHRASE_TOKENS)
    tokens = []
    for length in DOCUMENT_TOKENS:
        document = generator.integers(2, vocab_size, length)
        document[0] = BOS
        for begin in range(int(generator.integers(1, 12)), length - PHRASE_TOKENS, 19):
            document[begin : begin + PHRASE_TOKENS] = phrase
        tokens += document.tolist()
    return Stream(torch.tensor(tokens), tuple(pieces))


def repeated_positions(stream: Stream) -> np.ndarray:
    """Positions whose last three tokens, and the target too, occurred before in this order."""
    tokens = stream.tokens.tolist()
    seen, found = set(), []
    for p in range(2, len(stream)):
        gram = tuple(tokens[p - 2 : p + 2])
        if gram in seen and BOS not in gram:
            found.append(p)
        seen.add(gram)
    return np.array(found)
