"""Which tokens the model reads, and at which of them it is scored.

    start            first               end
      |---- context ----|---- scored ----|          a row: tokens start..end-1 are read, positions first..end-1 scored

Position p reads token p and predicts token p + 1. Windows are numbers of positions only; they hold no token.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Windows:
    """A batch of windows; a row with start = first = end reads and scores nothing (a document that is finished before its neighbours)."""

    start: np.ndarray  # int64 [B]
    first: np.ndarray  # int64 [B]
    end: np.ndarray  # int64 [B]

    def __post_init__(self):
        for name in ("start", "first", "end"):
            object.__setattr__(self, name, np.asarray(getattr(self, name), dtype=np.int64).reshape(-1))
        if not len(self.start) == len(self.first) == len(self.end):
            raise ValueError(f"windows: {len(self.start)} starts, {len(self.first)} first positions and {len(self.end)} ends")
        if not ((0 <= self.start) & (self.start <= self.first) & (self.first <= self.end)).all():
            raise ValueError("windows: expected 0 <= start <= first <= end in every row")
        if ((self.first == self.end) & (self.start < self.end)).any():
            raise ValueError("windows: a row reads tokens and scores none; drop it, or make it empty (start = first = end)")

    def __len__(self) -> int:
        return len(self.start)

    def __getitem__(self, rows: slice) -> "Windows":
        return Windows(self.start[rows], self.first[rows], self.end[rows])

    @property
    def row_tokens(self) -> int:
        """Tokens of the longest row."""
        return int((self.end - self.start).max(initial=0))

    @property
    def row_scored(self) -> int:
        """Scored positions of the row with most."""
        return int((self.end - self.first).max(initial=0))

    def positions(self) -> np.ndarray:
        """int64, every scored position, row by row."""
        counts = self.end - self.first
        return np.repeat(self.first - (np.cumsum(counts) - counts), counts) + np.arange(counts.sum())

    def batches(self, rows: int) -> Iterator["Windows"]:
        """Parts of at most so many rows, in order; the rows of a part score equally many positions, so that none is padded."""
        counts = self.end - self.first
        breaks = [0, *(np.flatnonzero(counts[1:] != counts[:-1]) + 1), len(self)]
        for begin, end in zip(breaks, breaks[1:]):
            for row in range(begin, end, rows):
                yield self[row : min(row + rows, end)]


def sliding(num_positions: int, window: int, stride: int, start: int = 0, stop: int | None = None) -> Windows:
    """The windows whose first scored position lies in [start, stop): the first of the stream is scored whole, every other one at its last
    `stride` positions, each position once."""
    stop = num_positions if stop is None else min(stop, num_positions)
    first = np.concatenate([np.zeros(min(num_positions, 1), np.int64), np.arange(window, num_positions, stride, dtype=np.int64)])
    end = np.minimum(np.where(first == 0, window, first + stride), num_positions)
    chosen = (first >= start) & (first < stop)
    return Windows(np.maximum(end - window, 0)[chosen], first[chosen], end[chosen])
