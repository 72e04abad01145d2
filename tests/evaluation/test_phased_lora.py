"""The phased LoRA evaluator against a plain one, written from the specification: a document at a time, no batches, no ranks' tricks."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from pgolf_fast.data import Validation
from pgolf_fast.errors import UserError
from pgolf_fast.evaluation import phased_lora
from pgolf_fast.evaluation.phased_lora import PhasedLora, PhasedLoraConfig, chunk_windows, plan
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
        row = plain_losses(p, tokens[window:end], tokens[window + 1 : end + 1], torch.zeros(end - window, dtype=torch.long), adapters.correct)
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
    """All of sections 8.3 and 8.4. `first_downs[phase, lane or None]` holds new adapters' values, row by row; the order is that of `plan`."""
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


@pytest.mark.parametrize("changes", [{}, {"weight_decay": 20.0}, {"batch_documents": 1}, {"prefix_documents": 0}], ids=str)
def test_equals_the_plain_evaluation(changes, first_downs):
    config, validation = dataclasses.replace(CONFIG, **changes), validation_of()
    result, referee, _ = evaluate(validation, config)
    expected = plain_evaluation(model_of(), validation, config, first_downs)
    assert np.abs(referee.ledger.losses - expected).max() < 1e-5  # the ledger's and the adapters' float32
    assert math.isclose(result.score.nats, expected.sum(), rel_tol=1e-6)


@pytest.mark.cuda
def test_replayed_graphs_equal_the_model_launched_kernel_by_kernel():
    """Losses of all chunks, so of all updates, of documents long enough to slide the window; bf16 both."""
    config = dataclasses.replace(CONFIG, window_tokens=96, chunk_tokens=24, row_multiple=32, batch_documents=3, rank=8, lr=1e-3, global_chunk_tokens=64)
    gpt = small("caseops-1934", model_dim=128, num_heads=2, num_kv_heads=1, vocab_size=64, mlp_hidden=64)
    losses = {}
    for is_replayed in (True, False):
        model = random_model(gpt).cuda()
        model.stream_dtype = torch.bfloat16
        evaluator = PhasedLora(model, config)
        if not is_replayed:
            evaluator.model = model
        referee = Referee(evaluator.model, validation_of([130, 61, 24, 200, 95, 40, 33]), "cuda")
        for _ in evaluator.chunks(referee):
            pass
        referee.result()
        losses[is_replayed] = referee.ledger.losses
    apart = np.abs(losses[True] - losses[False])
    assert apart.mean() < 0.05 and np.abs(losses[True].mean() - losses[False].mean()) < 5e-3
