"""Each evaluator against an implementation written here from the specification (sections 6.1 to 6.3), plain and unbatched."""

import copy
import dataclasses
import itertools
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pgolf_fast import checkpoint, dist
from pgolf_fast.errors import UserError
from pgolf_fast.evaluation import evaluate as evaluate_module
from pgolf_fast.evaluation.evaluate import EvalConfig, SavedState, evaluate
from pgolf_fast.evaluation.referee import OrderError, Referee
from pgolf_fast.evaluation.score_first_sgd import ScoreFirstSgd, TttConfig
from pgolf_fast.evaluation.sliding import SlidingWindow
from pgolf_fast.ops import _library
from tests.evaluation import stream

N, WINDOW, STRIDE = 256, 32, 8
TTT = TttConfig(chunk_tokens=64, epochs=2, lr=0.05, momentum=0.9, grad_clip=1.0, freeze_blocks=0)
# Tensors with a part per block, and how many stacks of blocks each holds.
PER_BLOCK = dict.fromkeys("resid_mix q_gain attn_scale mlp_up mlp_down star_scale star_shift mlp_scale".split(), 1) | {"qo": 2, "kv": 2}
# The two published evaluators in small: #691's, and #598's ten epochs with two frozen blocks.
PUBLISHED = {"691": TTT, "598": dataclasses.replace(TTT, epochs=10, freeze_blocks=2, lr=0.02)}


def losses_of(evaluator, gpt, validation, **options):
    referee = Referee(gpt, validation, **options)
    for _ in evaluator.chunks(referee):
        pass
    return referee.ledger.losses, referee.result()


def plain_sgd(gpt, validation, config):
    """6.3 on one device, in words of its own: torch.optim.SGD, tensors frozen by their published names."""
    gpt, tokens, n = copy.deepcopy(gpt), validation.tokens, len(validation)
    num_chunks = math.ceil(n / config.chunk_tokens)
    prefixes = tuple(f"blocks.{i}." for i in range(config.freeze_blocks))
    frozen = [view for name, view in gpt.published_tensors().items() if name.startswith(prefixes)]
    kept = [v.clone() for v in frozen]
    sgd = torch.optim.SGD(gpt.parameters(), lr=config.lr, momentum=config.momentum)
    losses = []
    for c in range(num_chunks):
        begin, end = c * config.chunk_tokens, min((c + 1) * config.chunk_tokens, n)
        losses.append(stream.sliding_losses(gpt, tokens, WINDOW, STRIDE, begin, end))
        if c == num_chunks - 1:
            break
        text = torch.from_numpy(tokens[begin : end + 1].astype(np.int64))
        x, y = text[:-1].view(-1, WINDOW), text[1:].view(-1, WINDOW)
        sgd.param_groups[0]["lr"] = config.lr * 0.5 * (1 + math.cos(math.pi * c / (num_chunks - 1)))
        for _ in range(config.epochs):
            sgd.zero_grad()
            F.cross_entropy(gpt(x).flatten(0, 1), y.flatten()).backward()
            gradients = [p.grad for p in gpt.parameters()]
            norms = []
            for name, g in zip((name for name, _ in gpt.named_parameters()), gradients):
                if name in PER_BLOCK:  # qo and kv: queries or keys of all 4 blocks, then outputs or values of all
                    g.view(PER_BLOCK[name], 4, -1)[:, : config.freeze_blocks] = 0
                norms.append(g.double().square().sum())
            total = math.sqrt(sum(norms))
            for g in gradients:
                g *= min(1.0, config.grad_clip / (total + 1e-6))
            sgd.step()
    assert all(torch.equal(v, k) for v, k in zip(frozen, kept))
    return np.concatenate(losses)


# -- fixed weights


def test_plain():
    gpt, validation = stream.model(), stream.validation(N)
    losses, result = losses_of(SlidingWindow(gpt, WINDOW, WINDOW, 96), gpt, validation)
    expected = np.concatenate([stream.window_losses(gpt, validation.tokens, s, s + WINDOW, WINDOW) for s in range(0, N, WINDOW)])
    np.testing.assert_allclose(losses, expected, atol=3e-5)
    assert result.score.bits_per_byte == pytest.approx(expected.sum() / math.log(2) / validation.target_bytes.sum(), rel=1e-6)


@pytest.mark.parametrize("fused", [False, True], ids=["plain blocks", "fused blocks"])
@pytest.mark.parametrize("stride", [1, 8, 32])
def test_sliding(stride, fused):
    """The fused blocks make the last visit of the scored positions alone."""
    gpt, validation = stream.model(), stream.validation(96)
    gpt.use_fused_blocks = fused
    losses, result = losses_of(SlidingWindow(gpt, WINDOW, stride, 160), gpt, validation)
    gpt.use_fused_blocks = False
    np.testing.assert_allclose(losses, stream.sliding_losses(gpt, validation.tokens, WINDOW, stride), atol=3e-5)
    assert result.again.tokens == 0


@pytest.mark.parametrize("make", [SlidingWindow, lambda gpt, *shape: ScoreFirstSgd(gpt, *shape[:3], TTT, shape[3])])
def test_published_tail(make):
    """Windows start at 0, 8, ... N - 8; the 3 that the end cuts off score its last 8 positions again."""
    gpt, validation = stream.model(), stream.validation(128)
    _, result = losses_of(make(gpt, WINDOW, STRIDE, 96, True), gpt, validation, allow_published_tail=True)
    tails = [stream.window_losses(gpt, validation.tokens, s, 128, WINDOW)[-8:].sum() for s in (104, 112, 120)]
    assert result.again.tokens == 24 and result.again.bytes == 3 * validation.target_bytes[-8:].sum()
    assert result.published.nats == pytest.approx(result.score.nats + sum(tails), rel=1e-6)


@pytest.mark.parametrize("positions", [20, 32, 100])
def test_windows_side_by_side_have_no_tail(positions):
    gpt, validation = stream.model(), stream.validation(positions)
    _, result = losses_of(SlidingWindow(gpt, WINDOW, WINDOW, 96, True), gpt, validation, allow_published_tail=True)
    assert result.again.tokens == 0 and result.score.tokens == positions


def test_a_stream_shorter_than_a_window():
    gpt, validation = stream.model(), stream.validation(20)
    losses, _ = losses_of(SlidingWindow(gpt, WINDOW, STRIDE, 96), gpt, validation)
    np.testing.assert_allclose(losses, stream.window_losses(gpt, validation.tokens, 0, 20, WINDOW), atol=3e-5)


# -- score first, then learn


@pytest.mark.parametrize("name", PUBLISHED)
def test_score_first_sgd(name):
    gpt, validation = stream.model(), stream.validation(N)
    expected = plain_sgd(gpt, validation, PUBLISHED[name])
    fixed = stream.sliding_losses(gpt, validation.tokens, WINDOW, STRIDE)
    assert np.abs(fixed - expected)[64:].mean() > 1e-2  # learning moves the losses far more than the tolerance below
    losses, result = losses_of(ScoreFirstSgd(gpt, WINDOW, STRIDE, 96, PUBLISHED[name]), gpt, validation)
    np.testing.assert_allclose(losses, expected, atol=3e-5)
    np.testing.assert_allclose(losses[:64], fixed[:64], atol=3e-5)
    assert result.versions == 4  # four chunks, of which the last teaches nothing


def test_tensors_that_no_forward_reads():
    gpt, validation = stream.model(num_layers=1, ve_layers=()), stream.validation(N)
    before = {name: p.detach().clone() for name, p in gpt.named_parameters()}
    _, result = losses_of(ScoreFirstSgd(gpt, WINDOW, STRIDE, 96, TTT), gpt, validation)
    same = {name for name, p in gpt.named_parameters() if torch.equal(p, before[name])}
    assert result.versions == 4 and same == {"ve_embed", "ve_proj", "ve_scale", "ve_layer_scales", "skip_weights", "skip_gates"}


@pytest.mark.parametrize(
    "change",
    [
        dict(epochs=3),
        dict(lr=0.04),
        dict(momentum=0.8),
        dict(grad_clip=0.0),
        dict(freeze_blocks=1),
        dict(fake_quant=True),
        dict(batch_rows=1),
    ],
)
def test_every_setting_of_it_matters(change):
    validation = stream.validation(N)
    one, other = (
        losses_of(ScoreFirstSgd(gpt, WINDOW, STRIDE, 96, config), gpt, validation)[0]
        for gpt, config in ((stream.model(), TTT), (stream.model(), dataclasses.replace(TTT, **change)))
    )
    assert np.abs(one - other).max() > 1e-3


def test_a_chunk_is_scored_with_the_weights_before_it():
    gpt = stream.model()
    referee = Referee(gpt, stream.validation(N))
    for _ in ScoreFirstSgd(gpt, WINDOW, STRIDE, 96, TTT).chunks(referee):
        pass
    referee.ledger.drain()
    assert referee.ledger.versions.tolist() == [c for c in range(4) for _ in range(64)]


@pytest.mark.parametrize("kind", ["plain", "sliding", "sgd"])
def test_the_future_changes_nothing(kind):
    """Other tokens from 150 on: every loss before is the same to the bit (position 149 predicts token 150, so it changes)."""

    def run(validation):
        gpt = stream.model()
        makers = dict(plain=lambda: SlidingWindow(gpt, WINDOW, WINDOW, 96), sliding=lambda: SlidingWindow(gpt, WINDOW, STRIDE, 96))
        makers["sgd"] = lambda: ScoreFirstSgd(gpt, WINDOW, STRIDE, 96, TTT)
        return losses_of(makers[kind](), gpt, validation)[0]

    validation = stream.validation(N)
    tokens = validation.tokens.copy()
    tokens[150:] = 2 + (tokens[150:] + 7) % 46
    one, other = run(validation), run(dataclasses.replace(validation, tokens=tokens))
    assert np.array_equal(one[:149], other[:149]) and (one[149:] != other[149:]).mean() > 0.9


def test_the_ways_that_the_referee_closes():
    """An evaluator that learns first, and one whose windows are off by one."""
    gpt, validation = stream.model(), stream.validation(N)
    referee = Referee(gpt, validation)
    with pytest.raises(OrderError, match="has not been scored"):
        referee.reveal(0, 64)
    evaluator = SlidingWindow(gpt, WINDOW, STRIDE, 96)
    referee = Referee(gpt, validation)
    list(itertools.islice(evaluator.chunks(referee), 1))
    with pytest.raises(OrderError, match="scored already"):
        list(SlidingWindow(gpt, WINDOW, STRIDE - 1, 96).chunks(referee))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda gpt: EvalConfig(seq_len=32, stride=33), "eval.stride: expected 1 to eval.seq_len 32, got 33"),
        (lambda gpt: EvalConfig(stride=0), "eval.stride: expected at least 1, got 0"),
        (lambda gpt: TttConfig(chunk_tokens=0), "ttt.chunk_tokens: expected at least 1, got 0"),
        (lambda gpt: TttConfig(batch_rows=0), "ttt.batch_rows: expected at least 1, got 0"),
        (lambda gpt: TttConfig(momentum=1.0), "ttt.momentum: expected less than 1, got 1.0"),
        (lambda gpt: EvalConfig(batch_tokens=0), "eval.batch_tokens: expected at least 1, got 0"),
        (lambda gpt: SlidingWindow(gpt, 32, 7, 96, True), "eval.published_tail: needs a stride that divides"),
        (lambda gpt: ScoreFirstSgd(gpt, 32, 8, 96, dataclasses.replace(TTT, chunk_tokens=48)), "ttt.chunk_tokens: 48 is no multiple"),
        (lambda gpt: ScoreFirstSgd(gpt, 32, 8, 96, dataclasses.replace(TTT, freeze_blocks=5)), "ttt.freeze_blocks: 5 of a model with 4"),
    ],
)
def test_impossible_settings(build, message):
    with pytest.raises(UserError, match=message):
        build(stream.model())


# -- stopping and going on, warm-up


def make(kind):
    """Three chunks of four rows, the last chunk half."""
    gpt = stream.model()
    ttt = dataclasses.replace(TTT, chunk_tokens=4 * WINDOW)
    evaluator = ScoreFirstSgd(gpt, WINDOW, STRIDE, 96, ttt) if kind == "sgd" else SlidingWindow(gpt, WINDOW, STRIDE, 96)
    return gpt, evaluator, Referee(gpt, stream.validation(320), allow_published_tail=True)


@pytest.mark.parametrize("kind", ["sliding", "sgd"])
@pytest.mark.parametrize("chunks", [1, 2])
def test_stopped_and_gone_on_is_the_same(tmp_path, kind, chunks):
    _, evaluator, referee = make(kind)
    whole = evaluate(evaluator, referee).result

    countdown = iter(range(chunks - 1, -1, -1))
    _, evaluator, referee = make(kind)
    assert evaluate(evaluator, referee, SavedState(tmp_path, {"artifact": 1}, 1e9), must_stop=lambda: next(countdown) == 0) is None
    assert [p.suffix for p in tmp_path.rglob("*") if p.is_file()] == [".safetensors"]

    _, evaluator, referee = make(kind)
    outcome = evaluate(evaluator, referee, SavedState(tmp_path, {"artifact": 1}, 1e9))
    assert outcome.result == whole  # to the bit, the digest too
    assert outcome.scoring_s <= outcome.practice_s


def test_ranks_go_on_from_the_newest_state_that_all_have(tmp_path, monkeypatch):
    """Another one was killed before it had saved the last one, and all save under the same numbers again."""
    countdown = iter((1, 0))
    _, evaluator, referee = make("sgd")
    evaluate(evaluator, referee, SavedState(tmp_path, {}, 0.0), must_stop=lambda: next(countdown) == 0)
    monkeypatch.setattr(dist, "gather_objects", lambda newest: [newest, newest - 1])
    _, evaluator, referee = make("sgd")
    saved = SavedState(tmp_path, {}, 0.0)
    saved.restore(evaluator, referee)
    assert (evaluator.done, saved.number) == (1, 1) and referee.ledger.is_scored.sum() == 4 * WINDOW


def test_ranks_save_and_stop_together(tmp_path, monkeypatch):
    """Here another one is the one whose time to save comes, and then the one that is asked to stop; it is asked about that first."""
    others = iter((False, True, False, False, True, False))
    monkeypatch.setattr(dist, "any_rank", lambda claim, device: claim or next(others))
    _, evaluator, referee = make("sgd")
    saved = SavedState(tmp_path, {}, 1e9)
    assert evaluate(evaluator, referee, saved) is None
    assert (evaluator.done, saved.number) == (3, 2)


def test_saving_is_no_scoring(tmp_path, monkeypatch):
    seconds = [0.0]
    monkeypatch.setattr(evaluate_module.time, "perf_counter", lambda: seconds[0])
    monkeypatch.setattr(SavedState, "save", lambda *_: seconds.__setitem__(0, seconds[0] + 10))
    _, evaluator, referee = make("sliding")
    outcome = evaluate(evaluator, referee, SavedState(tmp_path, {}, every_s=-1.0))
    assert (outcome.scoring_s, outcome.practice_s) == (0, 40)  # four chunks
    _, evaluator, referee = make("sliding")
    seconds_of_asking = iter(range(1, 5))
    outcome = evaluate(evaluator, referee, must_stop=lambda: seconds.__setitem__(0, seconds[0] + next(seconds_of_asking)))
    assert (outcome.scoring_s, outcome.practice_s) == (10, 10)  # nothing is saved


def test_a_state_of_another_evaluation_is_refused(tmp_path):
    _, evaluator, referee = make("sgd")
    evaluate(evaluator, referee, SavedState(tmp_path, {"artifact": "one"}, 1e9), must_stop=lambda: True)
    _, evaluator, referee = make("sgd")
    with pytest.raises(UserError, match="unfinished evaluation with another artifact \\(one, now two\\)"):
        evaluate(evaluator, referee, SavedState(tmp_path, {"artifact": "two"}, 1e9))


def test_killed_at_any_moment_the_last_state_is_whole(tmp_path):
    """SIGKILL while states are written after every chunk; what is left is gone on from to the same result."""
    code = (
        "import sys; from pathlib import Path; import torch; torch.set_num_threads(1)\n"
        "from tests.evaluation import test_evaluators as t\n"
        "from pgolf_fast.evaluation.evaluate import SavedState, evaluate\n"
        "while True:\n"
        "    _, evaluator, referee = t.make('sgd')\n"
        "    evaluate(evaluator, referee, SavedState(Path(sys.argv[1]), {}, 0.0))\n"
        "    print('round', flush=True)\n"
    )
    child = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, cwd=Path(__file__).parents[2])
    child.stdout.readline()
    child.send_signal(signal.SIGKILL)
    child.wait()
    left = checkpoint.latest(tmp_path / "rank0of1")
    assert left is not None and checkpoint.load(left)[1]["evaluator"]["done"] >= 1
    _, evaluator, referee = make("sgd")
    resumed = evaluate(evaluator, referee, SavedState(tmp_path, {}, 1e9)).result
    _, evaluator, referee = make("sgd")
    assert resumed == evaluate(evaluator, referee).result


@pytest.mark.parametrize("kind", ["sliding", "sgd"])
def test_warm_up_leaves_no_trace(kind):
    gpt, evaluator, referee = make(kind)
    expected = evaluate(evaluator, referee).result
    gpt, evaluator, _ = make(kind)
    before = copy.deepcopy(gpt.state_dict())
    evaluator.warm_up(num_documents=0)
    assert all(torch.equal(before[name], p) for name, p in gpt.state_dict().items())
    assert evaluate(evaluator, Referee(gpt, stream.validation(320))).result == expected


def test_losses_that_are_not_finite_are_no_score():
    gpt = stream.model()
    evaluator = ScoreFirstSgd(gpt, WINDOW, STRIDE, 96, dataclasses.replace(TTT, lr=1e30))
    with pytest.raises(UserError, match="the losses add up to nan: what learned from the text diverged"):
        evaluate(evaluator, Referee(gpt, stream.validation(N)))


# -- a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["sliding", "sgd"])
def test_on_a_gpu(kind):
    """Recorded optimizer steps and all, in float32, which no kernel takes: what the CPU finds."""
    _, evaluator, referee = make(kind)
    evaluate(evaluator, referee)
    device = torch.device("cuda")
    gpt = stream.model().to(device)
    ttt = dataclasses.replace(TTT, chunk_tokens=4 * WINDOW)
    evaluator = ScoreFirstSgd(gpt, WINDOW, STRIDE, 96, ttt) if kind == "sgd" else SlidingWindow(gpt, WINDOW, STRIDE, 96)
    with _library.composite():
        evaluator.warm_up(num_documents=0)  # before the referee: it moves the weights and puts them back
        found = Referee(gpt, stream.validation(320), device)
        evaluate(evaluator, found)
    np.testing.assert_allclose(found.ledger.losses, referee.ledger.losses, atol=5e-3)


# -- ranks


def run_rank(folder: Path):
    """What each process of the next test does."""
    from pgolf_fast import dist

    dist.start("cpu")
    for kind in ("sliding", "sgd"):
        gpt, evaluator, referee = make(kind)
        evaluator.published_tail = True
        outcome = evaluate(evaluator, referee, SavedState(folder / kind, {}, 0.0))
        losses = referee.ledger.merged(referee.device).losses
        np.savez(folder / f"{kind}{dist.rank()}.npz", losses=losses, score=dataclasses.astuple(outcome.result.published))
    dist.stop()


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_share_the_work_and_not_the_score(tmp_path, ranks):
    code = f"from pathlib import Path; from tests.evaluation.test_evaluators import run_rank; run_rank(Path({str(tmp_path)!r}))"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", "--no-python"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [*torchrun, sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=Path(__file__).parents[2], env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    for kind in ("sliding", "sgd"):
        _, evaluator, referee = make(kind)
        evaluator.published_tail = True
        alone = evaluate(evaluator, referee).result.published
        for rank in range(ranks):
            found = np.load(tmp_path / f"{kind}{rank}.npz")
            np.testing.assert_allclose(found["losses"], referee.ledger.losses, atol=3e-5 if kind == "sgd" else 1e-5)
            assert found["score"][0] == pytest.approx(alone.nats, rel=1e-5) and found["score"][1:].tolist() == [alone.tokens, alone.bytes]
