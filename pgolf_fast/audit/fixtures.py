"""Evaluators that cheat, each in the one way that sank submissions, and an honest one. The audit must tell them apart.

Written as anybody would write an evaluator for `pgolf audit FILE.py:FUNCTION`: none of them goes through this package's referee, which
would not let them.
"""

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F

from pgolf_fast.audit.stream import SPACE, Stream
from pgolf_fast.audit.subjects import Answer

CHUNK = 64
MIX = 0.3  # share of the cache or of the bytes in a mixture


def _rows(stream: Stream, size: int):
    """(inputs [1, T], targets [1, T]) of consecutive pieces of the stream."""
    inputs, targets = stream.tokens[:-1], stream.tokens[1:]
    return zip(inputs.split(size), targets.split(size))


def _losses(log_probs, targets):
    return F.nll_loss(log_probs, targets, reduction="none")


def _num_bytes(stream: Stream) -> int:
    return int(stream.piece_bytes.of_targets(stream.tokens[:-1], stream.tokens[1:]).sum())


def _documents(model, stream: Stream) -> torch.Tensor:
    """Log-probabilities [n, V], the documents packed side by side."""
    starts = torch.tensor([*stream.document_starts, len(stream)], dtype=torch.int32)
    with torch.no_grad():
        logits = model(stream.tokens[None, :-1], cu_seqlens=starts, max_seqlen=int(starts.diff().max()))
    return logits[0].log_softmax(-1)


def _train(model, inputs, targets, steps=2, lr=0.05):
    for _ in range(steps):
        gradients = torch.autograd.grad(model(inputs[None], targets[None]), list(model.parameters()), allow_unused=True)
        with torch.no_grad():
            for p, g in zip(model.parameters(), gradients):
                if g is not None:
                    p.sub_(lr * g)


def honest(model, stream):
    """Scores a chunk, then learns from it."""
    losses, log_probs = [], []
    for inputs, targets in _rows(stream, CHUNK):
        with torch.no_grad():
            log_probs.append(model(inputs[None])[0].log_softmax(-1))
        losses.append(_losses(log_probs[-1], targets))
        _train(model, inputs, targets)
    return Answer(torch.cat(losses), torch.cat(log_probs), _num_bytes(stream))


honest.isolates_documents = False


def adapt_then_score(model, stream):
    """Learns from a chunk, then scores it."""
    losses, log_probs = [], []
    for inputs, targets in _rows(stream, CHUNK):
        _train(model, inputs, targets)
        with torch.no_grad():
            log_probs.append(model(inputs[None])[0].log_softmax(-1))
        losses.append(_losses(log_probs[-1], targets))
    return Answer(torch.cat(losses), torch.cat(log_probs), _num_bytes(stream))


adapt_then_score.isolates_documents = False


def slot(model, stream):
    """Fits a bias on the logits to the region that it then scores with it; the weights never change."""
    losses, log_probs = [], []
    for inputs, targets in _rows(stream, CHUNK):
        with torch.no_grad():
            logits = model(inputs[None])[0]
        bias = torch.zeros(logits.shape[-1], requires_grad=True)
        for _ in range(4):
            (gradient,) = torch.autograd.grad(F.cross_entropy(logits + bias, targets), bias)
            bias = (bias - 5.0 * gradient).detach().requires_grad_()
        log_probs.append((logits + bias.detach()).log_softmax(-1))
        losses.append(_losses(log_probs[-1], targets))
    return Answer(torch.cat(losses), torch.cat(log_probs), _num_bytes(stream))


slot.isolates_documents = False


def target_reading_ngram(model, stream):
    """A hashed cache of what followed two tokens, consulted only where it holds the token that comes."""
    log_probs, counts, tokens = _documents(model, stream), defaultdict(Counter), stream.tokens.tolist()
    mixed = log_probs.clone()
    for p in range(1, len(stream)):
        bucket, target = (tokens[p - 1] * 36313 ^ tokens[p] * 27191) % 4096, tokens[p + 1]
        seen = counts[bucket]
        if seen[target]:
            cached = torch.tensor([seen[v] for v in range(len(stream.pieces))], dtype=torch.float32)
            mixed[p] = ((1 - MIX) * log_probs[p].exp() + MIX * cached / cached.sum()).log()
        seen[target] += 1
    return Answer(_losses(mixed, stream.tokens[1:]), mixed, _num_bytes(stream))


target_reading_ngram.isolates_documents = False


def byte_spread_mixture(model, stream):
    """A token gets the chance of its bytes under a byte model, and nothing makes these add up to one over all tokens."""
    texts = [piece.replace(SPACE, " ").encode() for piece in stream.pieces]
    spread = torch.tensor([np.prod([max(_share(b, texts), 1e-3) for b in text]) if i > 1 else 1e-6 for i, text in enumerate(texts)])
    mixed = ((1 - MIX) * _documents(model, stream).exp() + MIX * spread.float()).log()
    return Answer(_losses(mixed, stream.tokens[1:]), mixed, _num_bytes(stream))


def _share(byte: int, texts: list[bytes]) -> float:
    """Share of the pieces with this byte in them."""
    return sum(byte in text for text in texts) / len(texts)


def double_counted_spaces(model, stream):
    """A piece's leading space counted with the piece, and then once more."""
    log_probs = _documents(model, stream)
    num_bytes = _num_bytes(stream) + int(stream.piece_bytes.has_space[stream.tokens[1:]].sum())
    return Answer(_losses(log_probs, stream.tokens[1:]), log_probs, num_bytes)


def smear_across_documents(model, stream):
    """Attention stops at a document's start, the mixing-in of the previous token does not."""
    model.config = dataclasses.replace(model.config, smear_mask_bos=False)
    log_probs = _documents(model, stream)
    return Answer(_losses(log_probs, stream.tokens[1:]), log_probs, _num_bytes(stream))


@dataclasses.dataclass(frozen=True)
class Fixture:
    evaluate: Callable
    caught_by: str  # the invariant that names what it does; "" for an honest one
    also_by: tuple[str, ...] = ()  # that it breaks as well


READS_TARGETS = ("future-flip", "target-swap", "normalisation")
FIXTURES = (
    Fixture(honest, ""),
    Fixture(adapt_then_score, "score-before-update", READS_TARGETS),
    Fixture(slot, "future-flip", READS_TARGETS),
    Fixture(target_reading_ngram, "target-swap", ("normalisation",)),
    Fixture(byte_spread_mixture, "normalisation"),
    Fixture(double_counted_spaces, "byte denominator"),
    Fixture(smear_across_documents, "document isolation"),
)
