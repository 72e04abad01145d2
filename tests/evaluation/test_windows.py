"""Windows cover the stream once, and count as the specification does."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgolf_fast.evaluation.windows import Windows, sliding

VAL_POSITIONS = 62_021_632  # of the official split


@given(n=st.integers(0, 300), window=st.integers(1, 40), stride=st.integers(1, 40), rows=st.integers(1, 9))
def test_each_position_once_in_order_with_the_whole_context(n, window, stride, rows):
    stride = min(stride, window)
    windows = sliding(n, window, stride)
    assert windows.positions().tolist() == list(range(n))
    assert (windows.end - windows.start <= window).all()
    for start, first in zip(windows.start, windows.first):
        assert start == 0 or first - start >= window - stride
    batches = list(windows.batches(rows))
    assert all(len(b) <= rows and len(set(b.end - b.first)) == 1 for b in batches)
    assert [p for b in batches for p in b.positions()] == list(range(n))
    alike = [len(list(group)) for _, group in itertools.groupby(windows.end - windows.first)]
    assert len(batches) == sum(math.ceil(number / rows) for number in alike)


@given(n=st.integers(1, 400), chunk=st.integers(1, 6), stride=st.sampled_from([2, 4, 8]))
def test_chunks_divide_the_same_windows(n, chunk, stride):
    """A window belongs to the chunk of its first scored position; none straddles when the chunk is a multiple of the stride."""
    length, whole = chunk * 16, sliding(n, 16, stride)
    parts = [sliding(n, 16, stride, start, start + length) for start in range(0, n, length)]
    assert np.concatenate([p.start for p in parts]).tolist() == whole.start.tolist()
    for start, part in zip(range(0, n, length), parts):
        assert part.positions().tolist() == list(range(start, min(start + length, n)))


def test_counts_of_the_official_split():
    assert len(sliding(VAL_POSITIONS, 2048, 64)) == 969_057
    last = VAL_POSITIONS // 32768 * 32768
    assert last // 32768 == 1892 and VAL_POSITIONS - last == 24_576
    assert [len(sliding(VAL_POSITIONS, 2048, 64, c, c + 32768)) for c in (0, 32768, last)] == [481, 512, 384]


@pytest.mark.parametrize("bad", [([0], [2], [1]), ([3], [2], [4]), ([-1], [0], [1]), ([0, 1], [0], [1]), ([0], [4], [4])])
def test_impossible_windows(bad):
    with pytest.raises(ValueError, match="windows: "):
        Windows(*bad)


def test_an_empty_row_is_possible():
    windows = Windows([0, 0, 5], [0, 0, 6], [4, 0, 9])
    assert windows.positions().tolist() == [0, 1, 2, 3, 6, 7, 8] and windows.row_tokens == 4 and windows.row_scored == 4
