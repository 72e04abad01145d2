"""The adapted blocks as one hand-written node, against the plain torch blocks of model.py."""

import dataclasses

import pytest
import torch

from pgolf_fast.adapters import Adapters
from tests.compare import relative_error
from tests.test_fused_blocks import trained_like
from tests.test_model import published, random_model, small, tokens_of

MODELS = {
    "caseops-1934": ("caseops-1934", {}),
    "legal-ttt-691": ("legal-ttt-691", {}),
    "gepa-598": ("gepa-598", {}),
    "no gate, no depth scale, XSA nowhere": ("caseops-1934", {"attn_gate": False, "ln_scale": False, "xsa_last_n": 0}),
    "a skip into the last visit": ("caseops-1934", {"num_layers": 10, "num_loops": 0, "parallel_start": 0}),
    "a skip into the last visit, two lanes": ("caseops-1934", {"num_layers": 10, "num_loops": 0, "parallel_start": 7}),
    "two lanes in the last visit alone": ("caseops-1934", {"parallel_start": 10}),
    "and a skip into it": ("caseops-1934", {"num_layers": 10, "num_loops": 0, "parallel_start": 9}),
    "one block": ("caseops-1934", {"num_layers": 1, "num_loops": 0, "parallel_start": 0, "loop_start": 0, "loop_end": 0}),
}


def random_adapters(model, rows, rank=3):
    adapters = Adapters(model, rows, rank, scale=1.5)
    with torch.no_grad():
        adapters.working.copy_(0.1 * torch.randn(adapters.working.shape, generator=torch.Generator().manual_seed(2)))
    return adapters


def random_positions(rows, length, count=5):
    """Of each row any, in any order, one of them twice."""
    positions = torch.stack([torch.randperm(length)[:count] for _ in range(rows)])
    positions[:, -1] = positions[:, 0]
    return positions


def both_ways(model, adapters, tokens, weight, **how):
    """Logits and the adapters' gradients, by the plain blocks and by the node."""
    for fused in (False, True):
        model.use_fused_blocks = fused
        for leaf in adapters.leaves.values():
            leaf.grad = None
        logits = model(tokens, adapters=adapters, **how)
        (logits * weight).sum().backward()
        yield logits.detach(), {name: leaf.grad for name, leaf in adapters.leaves.items()}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("chosen", [0, 5, 16], ids=["all positions", "some positions", "as many as there are, in another order"])
def test_logits_and_every_gradient_are_those_of_autograd(name, chosen):
    """In float64; equal but for the order of additions."""
    recipe, changes = MODELS[name]
    config = small(recipe, **changes)
    model = random_model(config, torch.float64).requires_grad_(False)
    adapters, (tokens, _) = random_adapters(model, 3), tokens_of(config, 3, 16)
    how = {"positions": random_positions(3, 16, chosen)} if chosen else {}
    weight = torch.randn(3, chosen or 16, config.vocab_size, dtype=torch.float64)
    (expected, truth), (found_logits, found) = both_ways(model, adapters, tokens, weight, **how)
    torch.testing.assert_close(found_logits, expected, rtol=1e-9, atol=1e-9)
    for key, gradient in truth.items():
        assert gradient.norm() > 0 and relative_error(found[key], gradient) < 1e-9, key


def test_weights_that_learn_are_never_left_without_gradients():
    """With adapters beside them they take the plain blocks."""
    model = random_model(small("caseops-1934"), torch.float64)
    adapters, (tokens, _) = random_adapters(model, 2), tokens_of(model.config, 2, 8)
    model.use_fused_blocks = True
    model(tokens, adapters=adapters).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_a_second_backward_says_why_it_cannot():
    model = random_model(small("caseops-1934")).requires_grad_(False)
    model.use_fused_blocks = True
    loss = model(tokens_of(model.config, 2, 8)[0], adapters=random_adapters(model, 2)).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="run the forward again"):
        loss.backward()


@pytest.mark.cuda
@pytest.mark.parametrize("chosen", [False, True], ids=["all positions", "some positions"])
def test_agreement_on_the_device(chosen):
    """Logits and every gradient are at most twice as far from float32 as the plain blocks' in bfloat16."""
    config = dataclasses.replace(published("caseops-1934"), bf16_tensors=())
    tokens, _ = tokens_of(config, 2, 200)
    how = {"positions": random_positions(2, 200)} if chosen else {}
    weight = torch.randn(2, 5 if chosen else 200, config.vocab_size)
    exact = trained_like(config, "cpu", torch.float32).requires_grad_(False)
    truth = next(both_ways(exact, random_adapters(exact, 2, rank=32), tokens, weight, **how))
    model = trained_like(config, "cuda", torch.bfloat16).requires_grad_(False)
    how = {name: positions.cuda() for name, positions in how.items()}
    peer, ours = both_ways(model, random_adapters(model, 2, rank=32), tokens.cuda(), weight.cuda(), **how)
    assert relative_error(ours[0], truth[0]) <= 2 * relative_error(peer[0], truth[0]) + 1e-3
    for key, gradient in truth[1].items():
        error, allowed = relative_error(ours[1][key], gradient), 2 * relative_error(peer[1][key], gradient) + 1e-2
        assert error <= allowed, f"{key}: relative error {error:.3e}, allowed {allowed:.3e}"
