"""Fixed weights: windows that overlap (`sliding`) or lie side by side (`plain`, a stride of a whole window)."""

from collections.abc import Iterator

import numpy as np
from torch import Tensor

from pgolf_fast import dist
from pgolf_fast.errors import UserError
from pgolf_fast.evaluation.referee import Referee
from pgolf_fast.evaluation.rehearsal import rehearse
from pgolf_fast.evaluation.windows import Windows, sliding

STOP_BATCHES = 4  # of every rank, between two places where the evaluation can stop


class SlidingWindow:
    def __init__(self, model, seq_len: int, stride: int, batch_tokens: int, published_tail: bool = False):
        """seq_len         tokens of a window
        stride          positions scored per window, at its end; the first window of the stream is scored whole
        batch_tokens    tokens per forward
        published_tail  end as the published evaluators do, see `score_published_tail`
        """
        if published_tail and seq_len % stride:
            raise UserError(f"eval.published_tail: needs a stride that divides eval.seq_len {seq_len}, got {stride}")
        self.model, self.seq_len, self.stride, self.published_tail = model, seq_len, stride, published_tail
        self.batch_rows = max(1, batch_tokens // seq_len)
        self.done = 0  # windows

    def warm_up(self, num_documents: int) -> None:
        rehearse(self, self.seq_len + 3 * self.batch_rows * self.stride)

    def close(self) -> None:
        """It records no graphs."""

    def chunks(self, referee: Referee) -> Iterator[None]:
        windows = sliding(referee.num_positions, self.seq_len, self.stride)
        step = STOP_BATCHES * self.batch_rows * dist.world_size()
        while self.done < len(windows):
            share_out(referee, windows[self.done : self.done + step], self.batch_rows, self.seq_len)
            self.done += step
            yield
        if self.published_tail:
            score_published_tail(referee, self.seq_len, self.stride)

    def state(self) -> tuple[dict[str, Tensor], dict]:
        return {}, {"done": self.done}

    def load_state(self, tensors: dict[str, Tensor], state: dict) -> None:
        self.done = state["done"]


def share_out(referee: Referee, windows: Windows, batch_rows: int, seq_len: int) -> None:
    """Scores this rank's contiguous part."""
    # NOTE: short windows are padded to seq_len, because the rotary base follows the row's length.
    begin, end = (len(windows) * part // dist.world_size() for part in (dist.rank(), dist.rank() + 1))
    for batch in windows[begin:end].batches(batch_rows):
        referee.score(batch, row_tokens=seq_len)


def score_published_tail(referee: Referee, seq_len: int, stride: int) -> None:
    """The published evaluators go on behind the last whole window: those that the end of the stream cuts off score its last `stride`
    positions again, with ever less context (31 times at 2048 and 64)."""
    referee.meet()
    if dist.rank() == 0:
        n = referee.num_positions
        start = np.arange(max(n - seq_len, 0) + stride, n, stride, dtype=np.int64)
        if len(start):
            referee.score_again(Windows(start, np.maximum(n - stride, start), np.full(len(start), n)), row_tokens=seq_len)
