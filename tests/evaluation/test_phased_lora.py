"""The phased LoRA evaluator against a plain one, written from the specification: a document at a time, no batches, no ranks' tricks."""

import dataclasses
import itertools
import math
import socket

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pgolf_fast import recipe
from pgolf_fast.data import Validation
from pgolf_fast.errors import UserError
from pgolf_fast.evaluation.phased_lora import PhasedLora, PhasedLoraConfig, chunk_windows, plan, tokens_read
from pgolf_fast.evaluation.referee import Referee
from tests import model_oracle as oracle
from tests.test_model import LOOPED_ORDER, random_model, small

LENGTHS = [9, 4, 17, 1, 30, 4, 12, 7, 3, 22, 5]  # predictions of each document: short, whole chunks, more than a window
CONFIG = PhasedLoraConfig(
    lanes=2, window_tokens=14, chunk_tokens=4, batch_documents=2, row_multiple=3, rank=3, alpha=4.5, lr=0.01, prefix_documents=6, phases=2,
    global_chunk_tokens=12, global_lr=0.02,
)  # fmt: skip


def model_of(seed=7, dtype=torch.float64):
    config = small("caseops-1934", model_dim=24, num_heads=3, num_kv_heads=3, vocab_size=29, mlp_hidden=16)
    return random_model(config, dtype)


def validation_of(lengths=LENGTHS, seed=3):
    rng = np.random.default_rng(seed)
    documents = [np.concatenate([[1], rng.integers(2, 29, length - 1)]) for length in lengths]
    tokens = np.concatenate([*documents, [1]]).astype(np.uint16)
    starts = np.flatnonzero(tokens[:-1] == 1)
    return Validation(tokens, rng.integers(0, 9, len(tokens) - 1).astype(np.uint16), starts, True)


def evaluate(validation, config=CONFIG, model=None):
    evaluator = PhasedLora(model or model_of(), config)
    referee = Referee(evaluator.model, validation)
    for _ in evaluator.chunks(referee):
        pass
    return referee.result(), referee, evaluator


# --- the plain one ------------------------------------------------------------------------------------------------------


class PlainAdapters:
    """Per product a pair of leaves; `pairs` maps (visit, product) to [down, up]."""

    def __init__(self, downs, widths, rank, scale):
        self.scale = scale
        self.pairs = {key: [down.clone(), torch.zeros(widths[key[1]], rank, dtype=down.dtype)] for key, down in downs.items()}
        self.moments = {key: [torch.zeros_like(x) for x in pair] for key, pair in self.pairs.items()}
        self.steps = 0

    def correct(self, visit, product, x):
        down, up = self.pairs[visit, product]
        return self.scale * ((x @ down.T) @ up.T)

    def leaves(self):
        return [x for pair in self.pairs.values() for x in pair]

    def step(self, gradients, lr, beta2, epsilon, weight_decay):
        self.steps += 1
        gradients = iter(gradients)
        for key, pair in self.pairs.items():
            for i, x in enumerate(pair):
                g = next(gradients)
                moment = self.moments[key][i] = beta2 * self.moments[key][i] + (1 - beta2) * g**2
                pair[i] = x * (1 - lr * weight_decay) - lr * g / (torch.sqrt(moment / (1 - beta2**self.steps)) + epsilon)


PRODUCTS = ("q", "k", "v", "o", "mlp")


def split_downs(adapters, row):
    """The evaluator's first values of one document, by (visit, product)."""
    found = {}
    for visit, of_visit in enumerate(adapters.visits):
        found |= {(visit, product): part.clone() for product, part in zip(PRODUCTS, of_visit.attention_down[row].detach().T.chunk(4))}
        found[visit, "mlp"] = of_visit.mlp_down[row].detach().T.clone()
    return found | {(None, "head"): adapters.leaves[None, "down"][row].detach().T.clone()}


def plain_losses(p, inputs, targets, segment, correct=oracle.uncorrected):
    settings = dict(looped=True, head_dim=8, rope_dims=4, gate_scale=1.0, order=LOOPED_ORDER, first_lane=8)
    return oracle.caseops(p, inputs, targets, segment, correct=correct, **settings)


def score_document(p, tokens, downs, widths, config, num_steps):
    """Steps 1 to 4 of section 8.3 for one document. `num_steps` updates are taken in its batch, its own or its longer neighbours'."""
    adapters = PlainAdapters(downs, widths, config.rank, config.alpha / config.rank)
    predictions = len(tokens) - 1
    losses, size = [], config.chunk_tokens
    for chunk in range(math.ceil(predictions / size)):
        first, end = chunk * size, min((chunk + 1) * size, predictions)
        window = max(0, end - config.window_tokens)
        leaves = [x.requires_grad_() for x in adapters.leaves()]
        row = plain_losses(
            p, tokens[window:end], tokens[window + 1 : end + 1], torch.zeros(end - window, dtype=torch.long), adapters.correct
        )
        of_chunk = row[first - window :]
        losses += of_chunk.tolist()
        if end < predictions:
            gradients = torch.autograd.grad(of_chunk.mean(), leaves)
            with torch.no_grad():
                adapters.step(gradients, config.lr, config.beta2, config.epsilon, config.weight_decay)
    with torch.no_grad():
        while adapters.steps < num_steps:
            adapters.step([torch.zeros_like(x) for x in adapters.leaves()], config.lr, config.beta2, config.epsilon, config.weight_decay)
    return losses, {key: pair[0].detach() for key, pair in adapters.pairs.items()}


def plain_sgd(p, texts, config, rows):
    """Section 8.4: one pass over the documents one after the other."""
    stream = torch.cat(texts)
    momentum = {}
    num_chunks = math.ceil((len(stream) - 1) / config.global_chunk_tokens)
    for chunk in range(num_chunks - 1):
        leaves = {name: x.clone().requires_grad_() for name, x in p.items()}
        total = 0.0
        length = config.global_chunk_tokens // rows
        for row in range(rows):
            start = chunk * config.global_chunk_tokens + row * length
            inputs, targets = stream[start : start + length], stream[start + 1 : start + length + 1]
            segment, begin, number = [], 0, 0
            for t, token in enumerate(inputs.tolist()):
                if t and (token == 1 or t - begin == config.window_tokens):
                    begin, number = t, number + 1
                segment.append(number)
            total = total + plain_losses(leaves, inputs, targets, torch.tensor(segment)).mean() / rows
        gradients = dict(zip(leaves, torch.autograd.grad(total, list(leaves.values()), allow_unused=True, materialize_grads=True)))
        norm = torch.sqrt(sum((g**2).sum() for g in gradients.values()))
        clip = min(1.0, config.global_clip / (norm.item() + 1e-6))
        lr = config.global_lr * 0.5 * (1 + math.cos(math.pi * chunk / (num_chunks - 1)))
        for name, g in gradients.items():
            momentum[name] = config.global_momentum * momentum.get(name, 0.0) + clip * g
            p[name] = p[name] - lr * momentum[name]


def plain_evaluation(model, validation, config, first_downs):
    """All of sections 8.3 and 8.4. `first_downs[phase, lane or None]` holds new adapters' values by row; the order is that of `plan`."""
    p = {name: x.clone() for name, x in model.published_tensors().items()}
    dim, kv = model.config.model_dim, model.config.kv_dim
    widths = {"q": dim, "k": kv, "v": kv, "o": dim, "mlp": dim, "head": model.config.vocab_size}
    tokens = torch.from_numpy(validation.tokens.astype(np.int64))
    bounds = [*validation.document_starts.tolist(), len(validation)]
    lengths = np.diff(bounds)
    texts = [tokens[a : b + 1] for a, b in zip(bounds, bounds[1:])]
    losses = np.full(len(validation), np.nan)
    batches, phases = plan(lengths, config)
    for number, phase in enumerate(phases):
        carried = {}
        for lane, batch in phase.turns:
            documents = batches[batch]
            is_whole = len(documents) == config.batch_documents
            num_steps = math.ceil(lengths[documents].max() / config.chunk_tokens) - 1
            for slot, d in enumerate(documents):
                downs = carried.get((lane, slot)) if is_whole else None
                downs = downs or first_downs[number, lane, len(documents)][slot]
                of_document, after = score_document(p, texts[d], downs, widths, config, num_steps)
                losses[bounds[d] : bounds[d + 1]] = of_document
                if is_whole:
                    carried[lane, slot] = after
        if len(phase.learned):
            plain_sgd(p, [texts[d] for d in phase.learned], config, rows=config.lanes)
    return losses


@pytest.fixture
def first_downs(monkeypatch):
    """What the evaluator draws for new adapters, for the plain one to start from."""
    seen = {}
    original = PhasedLora.adapters_for

    def adapters_for(self, lane, num_documents):
        adapters = original(self, lane, num_documents)
        if num_documents != self.config.batch_documents or lane not in self.lane_down:
            seen[self.phase, lane, num_documents] = [split_downs(adapters, row) for row in range(num_documents)]
        return adapters

    monkeypatch.setattr(PhasedLora, "adapters_for", adapters_for)
    return seen


@pytest.mark.parametrize("changes", [
    {},
    {"weight_decay": 20.0, "global_momentum": 0.7, "global_chunk_tokens": 8},  # the first pause has 40 predictions, five whole chunks
    {"batch_documents": 1, "global_chunk_tokens": 26},  # and here 53: two chunks and one prediction
    {"prefix_documents": 0},
], ids=str)  # fmt: skip
def test_equals_the_plain_evaluation(changes, first_downs):
    config, validation = dataclasses.replace(CONFIG, **changes), validation_of()
    result, referee, _ = evaluate(validation, config)
    expected = plain_evaluation(model_of(), validation, config, first_downs)
    assert np.abs(referee.ledger.losses - expected).max() < 1e-5  # the ledger's and the adapters' float32
    assert math.isclose(result.score.nats, expected.sum(), rel_tol=1e-6)


def test_the_recipe_has_the_published_values():
    published = dict(
        TTT_LORA_RANK="96", TTT_LORA_ALPHA="144", TTT_WARM_START_A="1", TTT_LORA_LR="0.0001", TTT_GRAD_STEPS="1",
        TTT_BETA1="0", TTT_BETA2="0.999", TTT_WEIGHT_DECAY="1.0", TTT_CHUNK_SIZE="48", TTT_BATCH_SIZE="64", TTT_EVAL_SEQ_LEN="2048",
        PHASED_TTT_NUM_PHASES="3", PHASED_TTT_PREFIX_DOCS="2000", GLOBAL_TTT_LR="0.001", GLOBAL_TTT_MOMENTUM="0.9", GLOBAL_TTT_EPOCHS="1",
        GLOBAL_TTT_CHUNK_TOKENS="32768", GLOBAL_TTT_GRAD_CLIP="1.0", GLOBAL_TTT_WARMUP_CHUNKS="0", GLOBAL_TTT_RESPECT_DOC_BOUNDARIES="1",
    )  # fmt: skip
    assert recipe.resolve("caseops-1934", environ=published).values() == recipe.resolve("caseops-1934", environ={}).values()
    settings = recipe.resolve("caseops-1934", environ={}).recipe
    assert settings.eval.evaluator == "phased-lora" and (settings.lora.epsilon, settings.lora.lanes) == (1e-10, 8)


# --- the plan -----------------------------------------------------------------------------------------------------------

BIG = PhasedLoraConfig()


@given(
    st.lists(st.integers(1, 6000), min_size=1, max_size=400), st.integers(1, 9), st.integers(1, 5), st.integers(0, 60), st.integers(1, 4)
)
def test_every_document_has_one_turn(lengths, size, lanes, prefix, phases):
    config = dataclasses.replace(BIG, batch_documents=size, lanes=lanes, prefix_documents=prefix, phases=phases, global_chunk_tokens=60)
    lengths = np.array(lengths)
    batches, found = plan(lengths, config)
    turns = [turn for phase in found for turn in phase.turns]
    assert sorted(np.concatenate([batches[turn.batch] for turn in turns])) == list(range(len(lengths)))
    assert [turn.batch for turn in turns] == sorted((turn.batch for turn in turns), reverse=True)  # longest first
    ordered = lengths[np.concatenate(batches)]
    assert (np.diff(ordered) >= 0).all()
    scored, boundaries = [], iter(b for b in (prefix * (k + 1) // phases for k in range(phases)) if b)
    for phase in found:
        scored += [d for turn in phase.turns for d in batches[turn.batch]]
        if len(phase.learned):
            boundary = next(boundaries)
            assert len(phase.learned) == boundary <= len(scored)
            shortest = sorted(scored, key=lambda d: (lengths[d], d))[:boundary]
            assert phase.learned.tolist() == shortest  # of what is scored, never anything else
    assert sum(len(phase.learned) > 0 for phase in found) <= phases


def test_a_pause_waits_for_batches_that_have_begun():
    """Three lanes; the first pause falls when two of the longest documents are scored, and then all three lanes' have been."""
    config = dataclasses.replace(BIG, batch_documents=1, lanes=3, prefix_documents=4, phases=2, chunk_tokens=10, global_chunk_tokens=60)
    batches, phases = plan(np.array([10, 20, 30, 40, 50, 60, 70, 80]), config)
    assert [[tuple(turn) for turn in phase.turns] for phase in phases] == [
        [(0, 7), (1, 6), (2, 5), (2, 4)],  # lane 2 is free first, at 210 tokens read; then lane 1, at 280, is the second: pause
        [],
        [(0, 3), (1, 2), (2, 1), (2, 0)],
    ]
    assert [phase.learned.tolist() for phase in phases] == [[4, 5], [4, 5, 6, 7], []]


def test_a_batch_reads_the_rows_of_its_longest_document():
    config = dataclasses.replace(BIG, chunk_tokens=10, window_tokens=25)
    assert [tokens_read(np.array(lengths), config) for lengths in ([10], [11], [23, 4], [50, 23, 1])] == [10, 30, 2 * 55, 3 * (30 + 3 * 25)]


@given(st.lists(st.integers(1, 200), min_size=1, max_size=12), st.integers(1, 20), st.integers(20, 90))
def test_windows_cover_each_prediction_once(lengths, chunk_tokens, window_tokens):
    config = dataclasses.replace(BIG, chunk_tokens=chunk_tokens, window_tokens=window_tokens)
    ends = np.cumsum(lengths)
    starts = ends - lengths
    times = np.zeros(ends[-1], int)
    for number in range(-(-max(lengths) // chunk_tokens)):
        windows = chunk_windows(starts, ends, number, config)
        times[windows.positions()] += 1
        reads = windows.end > windows.start
        assert (windows.start >= starts)[reads].all() and (windows.end <= ends).all()  # inside its document
        assert windows.row_tokens <= min(window_tokens, chunk_tokens * (number + 1))
        assert ((windows.start == starts) | (windows.end - windows.start == window_tokens))[reads].all()  # and as much of it as fits
    assert (times == 1).all()


# --- legality, stopping, ranks --------------------------------------------------------------------------------------------


def test_the_future_does_not_move_a_score():
    """Changed tokens move no earlier loss of their document, and none of documents that were scored before it began."""
    validation = validation_of()
    _, before, _ = evaluate(validation)
    document = 6  # in the last batch before the first pause, which learns from it
    start, end = validation.document_starts[document], validation.document_starts[document + 1]
    changed = validation.tokens.copy()
    changed[start + 6 : end] = np.random.default_rng(1).integers(2, 29, end - start - 6)
    _, after, _ = evaluate(dataclasses.replace(validation, tokens=changed))
    same = before.ledger.losses == after.ledger.losses
    assert same[start : start + 5].all() and not same[start + 6 : end].any()
    bounds = [*validation.document_starts, len(validation)]
    batches, phases = plan(np.diff(bounds), CONFIG)
    assert document in batches[phases[0].turns[-1].batch] and document in phases[0].learned
    for phase in phases[:2]:
        for d in np.concatenate([batches[turn.batch] for turn in phase.turns]):
            if d != document:
                assert same[bounds[d] : bounds[d + 1]].all() == (phase is phases[0])


def test_losses_come_before_the_update_that_they_cause():
    """With no learning rate at all the losses are those of the bare model; the first chunk's are so at any rate."""
    validation = validation_of()
    _, still, _ = evaluate(validation, dataclasses.replace(CONFIG, lr=0.0, prefix_documents=0))
    _, learning, _ = evaluate(validation, dataclasses.replace(CONFIG, prefix_documents=0))
    ends = np.append(validation.document_starts[1:], len(validation))
    for start, end in zip(validation.document_starts, ends):
        first_chunk = slice(start, min(start + CONFIG.chunk_tokens, end))
        assert np.array_equal(still.ledger.losses[first_chunk], learning.ledger.losses[first_chunk])
        assert end - start <= CONFIG.chunk_tokens or not np.allclose(
            still.ledger.losses[start:end], learning.ledger.losses[start:end], atol=1e-4
        )


def test_rows_are_as_long_as_their_chunk_needs():
    model, lengths = model_of(), []
    model.register_forward_hook(lambda _, arguments, logits: lengths.append(arguments[0].shape[1]))
    evaluate(validation_of([30]), model=model)
    assert lengths == [6, 9, 12, 15, 15, 15, 15, 15]  # 4, 8, 12, then the window's 14, in multiples of 3


def test_by_the_adapted_blocks_it_is_the_same():
    """Updates, pauses and all, in float64: the node that serves a GPU, by its formulas."""
    validation = validation_of()
    _, plain, _ = evaluate(validation)
    fused = model_of()
    fused.use_fused_blocks = True
    _, by_node, _ = evaluate(validation, model=fused)
    np.testing.assert_allclose(by_node.ledger.losses, plain.ledger.losses, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("prefix_documents", [6, 0], ids=["pauses between batches", "a lane with two batches"])
def test_stopped_anywhere_it_goes_on_with_the_same_result(prefix_documents):
    config = dataclasses.replace(CONFIG, prefix_documents=prefix_documents)
    validation = validation_of([9, 7, 14, 5, 6, 6])
    expected, _, _ = evaluate(validation, config)
    straight = PhasedLora(model_of(), config)
    num_stops = sum(1 for _ in straight.chunks(Referee(straight.model, validation)))
    for stop in range(1, num_stops):
        first = PhasedLora(model_of(), config)
        referee = Referee(first.model, validation)
        for _ in itertools.islice(first.chunks(referee), stop):
            pass
        tensors, state = first.state()
        saved = {name: t.clone() for name, t in tensors.items()}
        second = PhasedLora(model_of(), config)
        referee_again = Referee(second.model, validation)
        second.load_state(saved, state)
        referee_again.load_state(*referee.state())
        for _ in second.chunks(referee_again):
            pass
        assert referee_again.result() == expected, stop


FOUR_LANES = dataclasses.replace(CONFIG, lanes=4)


def evaluate_as_rank(rank, folder, ports):
    torch.set_num_threads(1)
    for world, port in ports.items():
        if rank < world:
            torch.distributed.init_process_group("gloo", init_method=f"tcp://localhost:{port}", rank=rank, world_size=world)
            _, referee, _ = evaluate(validation_of(), FOUR_LANES)
            losses = referee.ledger.merged(torch.device("cpu")).losses
            if rank == 0:
                np.save(f"{folder}/{world}.npy", losses)
            torch.distributed.destroy_process_group()


def free_port():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def test_any_number_of_ranks_gives_the_same_score(tmp_path):
    """Up to the first pause bit for bit; the pauses' gradients are added up in another order."""
    validation = validation_of()
    alone, referee, _ = evaluate(validation, FOUR_LANES)
    bounds = [*validation.document_starts, len(validation)]
    batches, phases = plan(np.diff(bounds), FOUR_LANES)
    before_pause = np.concatenate([np.arange(bounds[d], bounds[d + 1]) for turn in phases[0].turns for d in batches[turn.batch]])
    torch.multiprocessing.spawn(evaluate_as_rank, (tmp_path, {world: free_port() for world in (2, 4)}), 4)
    for world in (2, 4):
        together = np.load(tmp_path / f"{world}.npy")
        assert np.array_equal(together[before_pause], referee.ledger.losses[before_pause])
        assert np.abs(together - referee.ledger.losses).max() < 1e-5
        assert math.isclose(together.sum(dtype=np.float64), alone.score.nats, rel_tol=1e-7)


def test_lanes_that_the_ranks_cannot_share(monkeypatch):
    monkeypatch.setattr("pgolf_fast.dist.world_size", lambda: 3)
    with pytest.raises(UserError, match="lora.lanes: 2 lanes cannot be shared by 3 ranks"):
        PhasedLora(model_of(), CONFIG)


@pytest.mark.parametrize("field,value", [("lanes", 0), ("chunk_tokens", 15), ("global_chunk_tokens", 13), ("beta2", 1.0), ("epsilon", 0.0)])
def test_bad_settings_are_named(field, value):
    with pytest.raises(UserError, match=f"^lora.{field}: "):
        dataclasses.replace(CONFIG, **{field: value})


@pytest.mark.cuda
@pytest.mark.parametrize("fused", [False, True])
def test_replayed_graphs_equal_the_model_launched_kernel_by_kernel(fused):
    """Losses of all chunks, so of all updates, of documents long enough to slide the window: bit for bit before the first pause,
    whose weight gradients are sums in no fixed order."""
    config = dataclasses.replace(CONFIG, window_tokens=96, chunk_tokens=24, row_multiple=32, batch_documents=3, rank=8, lr=1e-3)
    config = dataclasses.replace(config, global_chunk_tokens=64)
    gpt = small("caseops-1934", model_dim=128, num_heads=2, num_kv_heads=1, vocab_size=64, mlp_hidden=64)
    validation, losses = validation_of([130, 61, 24, 200, 95, 40, 33]), {}
    for is_replayed in (True, False):
        model = random_model(gpt).cuda()
        model.stream_dtype, model.use_fused_blocks = torch.bfloat16, fused
        evaluator = PhasedLora(model, config)
        if not is_replayed:
            evaluator.model = model
        referee = Referee(evaluator.model, validation, "cuda")
        for _ in evaluator.chunks(referee):
            pass
        referee.result()
        losses[is_replayed] = referee.ledger.losses
    apart = np.abs(losses[True] - losses[False])
    bounds = [*validation.document_starts, len(validation)]
    batches, phases = plan(np.diff(bounds), config)
    before_pause = np.concatenate([np.arange(bounds[d], bounds[d + 1]) for turn in phases[0].turns for d in batches[turn.batch]])
    assert apart[before_pause].max() == 0
    assert apart.mean() < 0.05 and abs(losses[True].mean() - losses[False].mean()) < 5e-3
