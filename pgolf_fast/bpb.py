"""Bits per byte: the score, and the two ways to count its bytes.

    bits per byte = sum of nats / (ln 2 * sum of bytes)      both over the same target tokens

Where the bytes of a target come from:
  the byte rule   its piece's own UTF-8 bytes, and one for the space that it starts with, unless the token before it is a boundary (BOS
                  and the other control tokens). This counts the text as the tokenizer's normalisation left it: white space collapsed,
                  compatibility characters rewritten, so a little less than the original text.
  the sidecar     the original bytes that each token covers, written beside the validation shards when they were built.

Sums are float64 for nats and int64 for counts, whatever the loss came in.
"""

import dataclasses
import math

import torch
from torch import Tensor

from pgolf_fast import dist


@dataclasses.dataclass(frozen=True)
class PieceBytes:
    """The byte rule as three tables by token id; `pgolf_fast.tokenizers.Tokenizer.piece_bytes` makes them."""

    own: Tensor  # int64 [V], bytes without the leading space
    has_space: Tensor  # bool [V], the piece starts with a space
    is_boundary: Tensor  # bool [V], a space right after this token is not counted

    def to(self, device) -> "PieceBytes":
        return PieceBytes(self.own.to(device), self.has_space.to(device), self.is_boundary.to(device))

    def of_targets(self, previous: Tensor, targets: Tensor) -> Tensor:
        """int64 bytes of each target, `previous` being the token before it (the model's input at that position)."""
        return self.own[targets] + (self.has_space[targets] & ~self.is_boundary[previous])


@dataclasses.dataclass(frozen=True)
class Score:
    nats: float
    tokens: int
    bytes: int

    @property
    def nats_per_token(self) -> float:
        return self.nats / self.tokens if self.tokens else math.nan

    @property
    def bits_per_byte(self) -> float:
        return self.nats / (math.log(2) * self.bytes) if self.bytes else math.nan

    @property
    def bytes_per_token(self) -> float:
        return self.bytes / self.tokens if self.tokens else math.nan


class BitsPerByte:
    """Running sums on the device of the losses: `add` never waits for it, `score` does."""

    def __init__(self, device: torch.device | str = "cpu"):
        self.nats = torch.zeros((), dtype=torch.float64, device=device)
        self.counts = torch.zeros(2, dtype=torch.int64, device=device)  # tokens, bytes

    def add(self, nats: Tensor, target_bytes: Tensor) -> None:
        """The loss of each scored target, in nats, and that target's bytes; two tensors of one shape."""
        if nats.shape != target_bytes.shape:
            raise ValueError(f"target_bytes: shape {tuple(target_bytes.shape)} is not that of nats, {tuple(nats.shape)}")
        if target_bytes.is_floating_point():
            raise ValueError(f"target_bytes: expected an integer dtype, got {target_bytes.dtype}")
        self.nats += nats.sum(dtype=torch.float64)
        self.counts[0] += nats.numel()
        self.counts[1] += target_bytes.sum(dtype=torch.int64)

    def all_reduce(self) -> None:
        """Adds up the ranks' sums."""
        for tensor in (self.nats, self.counts):
            dist.sum_(tensor).wait()

    def score(self) -> Score:
        tokens, num_bytes = self.counts.tolist()
        return Score(self.nats.item(), tokens, num_bytes)
