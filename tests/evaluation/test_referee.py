"""The legal order is the only one: every way around it is tried here, and each loss is compared with its definition."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pgolf_fast import dist
from pgolf_fast.errors import UserError
from pgolf_fast.evaluation.referee import OrderError, Referee, Scored
from pgolf_fast.evaluation.windows import Windows, sliding
from pgolf_fast.fused_blocks import as_columns
from tests.evaluation import stream

N = 200


@pytest.fixture
def gpt():
    return stream.model()


@pytest.fixture
def referee(gpt):
    return Referee(gpt, stream.validation(N))


class Recorder(torch.nn.Module):
    """Keeps what a model is called with, and gives logits that say nothing."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def forward(self, tokens, positions, **how):
        self.calls.append((tokens.clone(), positions, how))
        return torch.zeros(*as_columns(positions, tokens).shape, 48)


def random_windows(seed: int) -> list[Windows]:
    """The stream in pieces of any length, in any order, each with any context, some rows empty."""
    rng = np.random.default_rng(seed)
    cuts = np.unique(np.concatenate([[0, N], rng.integers(1, N, 20)]))
    pieces = [(max(0, first - int(rng.integers(0, 30))), first, end) for first, end in zip(cuts, cuts[1:])]
    pieces += [(7, 7, 7), (0, 0, 0)]
    order = rng.permutation(len(pieces))
    return [Windows(*np.array([pieces[i] for i in part]).T) for part in np.array_split(order, 6)]


@settings(max_examples=6, deadline=None)
@given(st.integers(0, 10**6))
def test_losses_are_those_of_each_window_alone(seed):
    """Whatever shares its batch, and however it is padded."""
    gpt, validation = stream.model(), stream.validation(N)
    referee = Referee(gpt, validation)
    for windows in random_windows(seed):
        scored = referee.score(windows, row_tokens=N)
        assert not scored.losses[~scored.is_kept].any() and not scored.targets[~scored.is_kept].any()
        for row, (start, first, end) in enumerate(zip(windows.start, windows.first, windows.end)):
            if start == end:
                continue
            kept = scored.is_kept[row]
            expected = stream.window_losses(gpt, validation.tokens, start, end, N)[first - start :]
            np.testing.assert_allclose(scored.losses[row][kept].numpy(), expected, atol=3e-5)
            assert scored.targets[row][kept].tolist() == validation.tokens[first + 1 : end + 1].tolist()
            assert (scored.columns[row][kept] + start).tolist() == list(range(first, end))
    result, running = referee.result(), referee.running()
    assert (running.tokens, running.bytes) == (result.score.tokens, result.score.bytes)
    assert running.nats == pytest.approx(result.score.nats, rel=1e-12)
    assert result.score.tokens == N and result.score.bytes == validation.target_bytes.sum()
    assert result.score.nats == pytest.approx(referee.ledger.losses.sum(dtype=np.float64), rel=1e-12)


@settings(max_examples=6, deadline=None)
@given(st.integers(0, 10**6))
def test_the_model_is_given_the_inputs_of_its_windows_and_nothing_else(seed):
    validation, model = stream.validation(N), Recorder()
    referee = Referee(model, validation)
    for windows in random_windows(seed):
        referee.score(windows, adapters="mine")
        tokens, _, how = model.calls[-1]
        assert how == {"adapters": "mine"}
        for row, start, end in zip(tokens, windows.start, windows.end):
            assert row[: end - start].tolist() == validation.tokens[start:end].tolist() and not row[end - start :].any()


@pytest.mark.parametrize(
    "windows, expected",
    [
        (Windows([0, 8], [24, 32], [32, 40]), 8),
        (Windows([0, 32], [0, 32], [32, 64]), 32),
        (Windows([0, 8], [24, 33], [32, 40]), [range(24, 32), [*range(25, 32), 25]]),  # one row scores less
        (Windows([0, 32], [24, 40], [32, 48]), [range(24, 32), range(8, 16)]),  # one row is shorter
        (Windows([0, 40], [24, 40], [32, 40]), [range(24, 32), [0] * 8]),  # one row is empty
    ],
    ids=["the last", "all", "fewer", "shorter", "empty"],
)
def test_positions_are_a_number_where_they_end_each_row(windows, expected):
    model = Recorder()
    Referee(model, stream.validation(N)).score(windows, row_tokens=32)
    positions = model.calls[-1][1]
    assert (positions if isinstance(positions, int) else positions.tolist()) == (
        expected if isinstance(expected, int) else [list(row) for row in expected]
    )


def test_the_model_may_be_any_function():
    referee = Referee(lambda tokens, positions: torch.zeros(len(tokens), positions, 48), stream.validation(N))
    referee.score(Windows([0], [0], [N]))
    assert referee.result().score.nats == pytest.approx(N * np.log(48))


def test_no_position_is_scored_twice(referee):
    referee.score(Windows([0], [0], [10]))
    with pytest.raises(OrderError, match="position 9 is scored already"):
        referee.score(Windows([0], [9], [12]))
    with pytest.raises(OrderError, match="position 14 is scored already"):
        referee.score(Windows([0, 0], [12, 14], [16, 18]))  # within one batch
    with pytest.raises(OrderError, match="windows end at 201, the stream at 200"):
        referee.score(Windows([150, 30], [190, 40], [201, 50]))
    referee.score(Windows([150, 30], [190, 40], [200, 50]))


def test_only_the_named_option_scores_again(gpt, referee):
    referee.score(Windows([0], [0], [10]))
    with pytest.raises(OrderError, match="allow_published_tail"):
        referee.score_again(Windows([0], [0], [10]))
    other = Referee(gpt, stream.validation(N), allow_published_tail=True)
    with pytest.raises(OrderError, match="no score yet"):
        other.score_again(Windows([0], [0], [10]))
    other.score(Windows([0], [0], [N]))
    other.score_again(Windows([N - 20], [N - 10], [N]), row_tokens=32)
    found = other.result()
    assert (found.score.tokens, found.again.tokens, found.published.tokens) == (N, 10, N + 10)
    expected = stream.window_losses(gpt, stream.validation(N).tokens, N - 20, N, 32)[-10:].sum()
    assert found.published.nats - found.score.nats == pytest.approx(expected, rel=1e-5)


def test_what_was_scored_again_is_part_of_the_state(gpt):
    whole, half = (Referee(gpt, stream.validation(N), allow_published_tail=True) for _ in range(2))
    whole.score(Windows([0], [0], [N]))
    whole.score_again(Windows([N - 20], [N - 10], [N]))
    half.load_state(*whole.state())
    assert half.result() == whole.result() and half.result().again.tokens == 10
    assert half.running() == half.result().score


def test_only_scored_text_is_revealed(referee):
    document = int(referee.document_starts[2])
    with pytest.raises(OrderError, match="position 0 has not been scored"):
        referee.reveal(0, 5)
    referee.score(Windows([0], [10], [20]))
    assert referee.document_starts.min() == 0
    with pytest.raises(OrderError, match="token 10 is the target of position 9, which has not been scored"):
        referee.reveal(10, 20)
    with pytest.raises(OrderError, match="position 20 has not been scored"):
        referee.reveal(11, 21)
    assert referee.reveal(11, 20).tokens.tolist() == stream.validation(N).tokens[11:21].tolist()
    if document > 30:
        referee.score(Windows([document], [document], [document + 2]))
        assert referee.reveal(document, document + 2).tokens.tolist() == stream.validation(N).tokens[document : document + 3].tolist()


def test_ranks_share_what_they_know_and_no_position(gpt, monkeypatch):
    monkeypatch.setattr(dist, "world_size", lambda: 2)
    referee = Referee(gpt, stream.validation(N))
    referee.score(Windows([0], [0], [50]))
    monkeypatch.setattr(dist, "gather_objects", lambda mine: [mine, np.array([[50, 60]])])
    with pytest.raises(OrderError, match="position 50 has not been scored .or by another rank, since the last `meet`"):
        referee.reveal(40, 60)
    referee.meet()
    assert len(referee.reveal(40, 60).tokens) == 21
    with pytest.raises(OrderError, match="position 55 is scored already"):
        referee.score(Windows([50], [55], [56]))
    with pytest.raises(OrderError, match="position 50 or one soon after it was scored by two ranks"):
        referee.meet()


@pytest.mark.parametrize("mine", [(50, 51), (59, 60), (40, 70)])
def test_a_position_of_two_ranks_is_found_wherever_it_lies(gpt, monkeypatch, mine):
    monkeypatch.setattr(dist, "world_size", lambda: 2)
    monkeypatch.setattr(dist, "gather_objects", lambda own: [own, np.array([[50, 60]])])
    referee = Referee(gpt, stream.validation(N))
    referee.score(Windows([0], [mine[0]], [mine[1]]))
    with pytest.raises(OrderError, match="position 50 or one soon after it was scored by two ranks"):
        referee.meet()


def test_weights_change_in_adapt_and_nowhere_else(gpt, referee):
    windows = list(sliding(N, 40, 10).batches(4))
    scored = referee.score(windows[0])
    with pytest.raises(OrderError, match="nothing to learn from"), referee.adapt():
        pass
    forged = Scored(scored.spans, Referee(gpt, stream.validation(N)))
    for false in (forged, scored.losses):
        with pytest.raises(OrderError, match="expected what this referee's"), referee.adapt(false):
            pass
    with referee.adapt(scored), torch.no_grad():
        gpt.tok_emb.mul_(1.01)
        with pytest.raises(OrderError, match="score inside adapt"):
            referee.score(windows[1][:0])
    assert referee.version == 1
    referee.score(windows[1])
    with torch.no_grad():
        gpt.tok_emb.mul_(1.01)
    with pytest.raises(OrderError, match="changed outside adapt"):
        referee.score(windows[2])


def test_a_forward_that_changes_weights_is_refused():
    class Sneaky(Recorder):
        def __init__(self):
            super().__init__()
            self.w = torch.nn.Parameter(torch.zeros(1))

        def forward(self, tokens, **how):
            self.w.data.add_(1)
            with torch.no_grad():
                self.w += 1
            return super().forward(tokens, **how)

    with pytest.raises(OrderError, match="changed outside adapt"):
        Referee(Sneaky(), stream.validation(N)).score(Windows([0], [0], [N]))


def test_what_was_handed_out_cannot_change_the_ledger(referee):
    scored = referee.score(Windows([0], [0], [N]))
    expected = float(scored.losses.sum(dtype=torch.float64))
    scored.losses.zero_()
    scored.spans[:] = 0
    assert referee.result().score.nats == pytest.approx(expected)
    with pytest.raises(dataclasses.FrozenInstanceError):
        scored.losses = None


def test_losses_can_carry_the_graph(gpt, referee):
    scored = referee.score(Windows([0], [10], [30]), with_grad=True)
    scored.losses.sum().backward()
    assert gpt.tok_emb.grad.abs().sum() > 0
    assert not referee.score(Windows([0], [30], [31])).losses.requires_grad


def test_no_result_of_a_part(referee):
    referee.score(Windows([0, 60], [0, 61], [60, N]))
    with pytest.raises(OrderError, match="1 positions are not scored, the first is 60"):
        referee.result()


def test_the_digest_depends_on_every_entry_and_on_their_order(gpt):
    def digest(*orders, change=False):
        referee = Referee(gpt, stream.validation(N))
        for first, end in orders:
            scored = referee.score(Windows([0], [first], [end]))
            if change:
                with referee.adapt(scored):
                    pass
                change = False
        return referee.result().digest

    whole = digest((0, 100), (100, N))
    assert whole == digest((0, 100), (100, N)) and len(whole) == 64
    assert len({whole, digest((100, N), (0, 100)), digest((0, 100), (100, N), change=True), digest((0, N))}) == 4


def test_versions_are_recorded(gpt, referee):
    scored = referee.score(Windows([0], [0], [50]))
    with referee.adapt(scored):
        pass
    referee.score(Windows([50], [50], [N]))
    assert referee.result().versions == 2
    assert referee.ledger.versions.tolist() == [0] * 50 + [1] * 150


def test_empty_validation(gpt):
    nothing = dataclasses.replace(stream.validation(10), tokens=np.zeros(1, np.uint16), target_bytes=np.zeros(0, np.uint16))
    with pytest.raises(UserError, match="no position to score"):
        Referee(gpt, nothing)
