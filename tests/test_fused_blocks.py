"""The blocks as one hand-written node, against the plain torch blocks of model.py."""

import dataclasses
from collections import Counter, defaultdict

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pgolf_fast.model import GPT
from tests.compare import relative_error
from tests.test_model import RECIPES, SEGMENTS, published, random_model, small, tokens_of

RECIPES_AND_LOOPS = [*((name, False) for name in RECIPES), ("caseops-1934", True)]


def loss_and_gradients(model, batches, **how):
    """Of the sum over `batches`, as micro-batches add up."""
    for p in model.parameters():
        p.grad = None
    losses = []
    for tokens, targets in batches:
        loss = model(tokens, targets, **how)
        loss.backward()
        losses.append(loss.item())
    return losses, {name: p.grad for name, p in model.named_parameters()}


def both_ways(model, batches, **how):
    for fused in (False, True):
        model.use_fused_blocks = fused
        yield loss_and_gradients(model, batches, **how)


def packed_documents(tokens_in_all):
    return {"cu_seqlens": torch.tensor([*SEGMENTS, *[tokens_in_all] * 4], dtype=torch.int32), "max_seqlen": 24}


@pytest.mark.parametrize("name, looped", RECIPES_AND_LOOPS)
@pytest.mark.parametrize("documents", [False, True], ids=["dense", "packed"])
def test_every_gradient_is_that_of_autograd(name, looped, documents):
    """In float64, over two micro-batches; equal but for the order of additions."""
    config = small(name)
    how = {"looped": looped} | (packed_documents(40) if documents else {})
    batches = [tokens_of(config, 1, 40)] * 2 if documents else [tokens_of(config, 2, 24), tokens_of(config, 3, 8)]
    (losses, truth), (found_losses, found) = both_ways(random_model(config, torch.float64), batches, **how)
    assert found_losses == pytest.approx(losses, rel=1e-12)
    for key, gradient in truth.items():
        assert (gradient is None) == (found[key] is None), key
        if gradient is not None:
            assert relative_error(found[key], gradient) < 1e-11 or gradient.norm() == found[key].norm() == 0, key


CHANGES = {
    "late QAT": ({}, {"fake_quant": True}),
    "gate scale and narrow window": ({"attn_gate_scale": 0.5, "gate_window": 5}, {}),
    "no depth scale": ({"ln_scale": False}, {}),
    "two values blocks that loop": ({"value_embed": True, "ve_layers": (4, 9), "ve_dim": 8}, {}),
    "XSA nowhere": ({"xsa_last_n": 0}, {}),
    "two lanes from the second half's first block": ({"num_loops": 0, "parallel_start": 5}, {}),
    "even number of blocks": ({"num_layers": 10}, {}),
    "two lanes in the last visit alone": ({"parallel_start": 10}, {}),
    "and a skip into it": ({"num_layers": 10, "num_loops": 0, "parallel_start": 9}, {}),
    "a skip into the last of several such": ({"num_layers": 10, "num_loops": 0, "parallel_start": 7}, {}),
    "one block": ({"num_layers": 1, "num_loops": 0, "parallel_start": 0, "loop_start": 0, "loop_end": 0}, {}),
    "no rotation": ({"rope_dims": 0}, {}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_every_switch(change):
    changes, how = CHANGES[change]
    config = small("caseops-1934", **changes)
    model = random_model(config, torch.float64)
    batches = [tokens_of(config, 2, 16)]
    (losses, truth), (found_losses, found) = both_ways(model, batches, **how)
    assert found_losses == pytest.approx(losses, rel=1e-12)
    for key, gradient in truth.items():
        if gradient is not None:
            assert relative_error(found[key], gradient) < 1e-11 or gradient.norm() == found[key].norm() == 0, key


def test_matrices_stored_in_bf16_still_sum_their_gradients_in_float32():
    config = small("legal-ttt-691", bf16_tensors=("qo", "mlp_up"))
    model = GPT(config, seed=0, stream_dtype=torch.float32)
    (losses, truth), (found_losses, found) = both_ways(model, [tokens_of(config, 2, 16)])
    assert found_losses == pytest.approx(losses, rel=1e-5) and found["qo"].dtype == torch.bfloat16
    assert relative_error(found["qo"], truth["qo"]) < 1e-2


class MixedTensors(TorchDispatchMode):
    """How often each tensor stands in each mix of a forward and a backward."""

    def __init__(self):
        super().__init__()
        self.counts = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.name() in ("pgolf_fast::mix_norm_fwd", "pgolf_fast::mix_norm_bwd"):
            tensors = args[0] if func.name().endswith("fwd") else args[4]
            self.counts.append(Counter(t.data_ptr() for t in tensors))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name, looped", RECIPES_AND_LOOPS)
def test_no_mix_reads_a_tensor_twice(name, looped):
    """The first visit's stream is x0, the first skip is the stream that the visit before left."""
    config = small(name)
    model = random_model(config, torch.float64)
    model.use_fused_blocks = True
    with MixedTensors() as mixed:
        model(*tokens_of(config, 1, 8), looped=looped).backward()
    assert len(mixed.counts) >= 2 * config.num_layers
    assert all(count == 1 for counts in mixed.counts for count in counts.values())


def test_scoring_keeps_nothing_and_gives_the_same():
    config = small("caseops-1934")
    model = random_model(config, torch.float64)
    tokens, targets = tokens_of(config, 2, 16)
    scores = []
    for fused in (False, True):
        model.use_fused_blocks = fused
        with torch.inference_mode():
            scores.append(model(tokens, targets, reduction="none"))
    torch.testing.assert_close(scores[1], scores[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", [*RECIPES, "a skip into the last visit"])
@pytest.mark.parametrize("learns", [False, True], ids=["scoring", "learning"])
@pytest.mark.parametrize("positions", [[[15, 3, 0], [2, 2, 7], [14, 15, 1]], 3, 16], ids=["any, in any order", "the last", "all"])
def test_some_positions(name, learns, positions):
    """The rows of the whole stream."""
    config = small("caseops-1934", num_layers=10, num_loops=0, parallel_start=7) if name not in RECIPES else small(name)
    model = random_model(config, torch.float64)
    tokens, _ = tokens_of(config, 3, 16)
    columns = torch.tensor(positions if isinstance(positions, list) else [list(range(16 - positions, 16))] * 3)
    positions = columns if isinstance(positions, list) else positions
    model.use_fused_blocks = False
    expected = model(tokens)[torch.arange(3)[:, None], columns]
    for fused in (False, True):
        model.use_fused_blocks = fused
        with torch.set_grad_enabled(learns):
            torch.testing.assert_close(model(tokens, positions=positions), expected, rtol=1e-9, atol=1e-9)


def test_positions_are_not_of_packed_documents():
    model = random_model(small("caseops-1934"))
    tokens, _ = tokens_of(model.config, 1, 40)
    with pytest.raises(ValueError, match="^cu_seqlens: positions and adapters are of rows"):
        model(tokens, positions=torch.zeros(1, 1, dtype=torch.long), **packed_documents(40))


def test_a_second_backward_says_why_it_cannot():
    config = small("legal-ttt-691")
    model = random_model(config)
    model.use_fused_blocks = True
    loss = model(*tokens_of(config, 1, 8))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="run the forward again"):
        loss.backward()


def test_plain_blocks_where_no_kernel_serves():
    model = random_model(small("legal-ttt-691"))
    tokens, _ = tokens_of(model.config, 1, 8)
    automatic = model.stream(tokens)
    model.use_fused_blocks = False
    assert torch.equal(automatic, model.stream(tokens))


# --- on the kernels


def trained_like(config, device, dtype, seed=4):
    """Initial weights, moved a little: output matrices that start at zero would hide most gradients."""
    model = GPT(config, seed=seed, stream_dtype=dtype)
    rng = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=rng) * (0.02 if p.dim() == 3 and name != "resid_mix" else 0.1)
            p.copy_((p + noise).bfloat16())
    return model.to(device)


DRAWS = 8  # of tokens: in one draw the error of a gradient of a single number is large or nearly nothing by chance


@pytest.mark.cuda
@pytest.mark.parametrize("name, looped", [("legal-ttt-691", False), ("gepa-598", False), ("caseops-1934", False), ("caseops-1934", True)])
def test_agreement_on_the_device(name, looped):
    """Every gradient is at most twice as far from float32 as the plain blocks' in bfloat16, in the root mean square over the draws."""
    config = dataclasses.replace(published(name), bf16_tensors=())
    cu_seqlens = torch.tensor([0, 40, 41, 200, 333, 333], dtype=torch.int32)
    how = {"looped": looped, "max_seqlen": 160}
    exact, model = trained_like(config, "cpu", torch.float32), trained_like(config, "cuda", torch.bfloat16)
    squares = defaultdict(lambda: torch.zeros(3, dtype=torch.float64))  # of the truth, of the plain blocks' error, of ours
    for seed in range(DRAWS):
        tokens, targets = tokens_of(config, 1, 333, seed)
        (truth_loss,), truth = loss_and_gradients(exact, [(tokens, targets)], cu_seqlens=cu_seqlens, **how)
        batch = [(tokens.cuda(), targets.cuda())]
        (peer_loss, peer), (loss, ours) = both_ways(model, batch, cu_seqlens=cu_seqlens.cuda(), **how)
        squares["loss"] += torch.tensor([1.0, peer_loss[0] - truth_loss, loss[0] - truth_loss], dtype=torch.float64).square()
        for key, gradient in truth.items():
            if gradient is not None and gradient.any():
                parts = gradient, *(found[key].float().cpu() - gradient for found in (peer, ours))
                squares[key] += torch.stack([part.double().square().sum() for part in parts])
    for key, sums in squares.items():
        size, of_peer, error = sums.sqrt().tolist()
        allowed = 2 * of_peer + (2e-3 if key == "loss" else 5e-3) * size
        assert error <= allowed, f"{key}: error {error / size:.3e}, allowed {allowed / size:.3e}"


AWKWARD_BATCHES = {
    "one document": [0, 200],
    "documents of one token": list(range(201)),
    "a tail without a document": [0, 90, 120, 120],
    "nothing but a tail": [0, 0],
}


@pytest.mark.cuda
@pytest.mark.parametrize("batch", AWKWARD_BATCHES)
def test_awkward_batches_on_the_device(batch):
    """As above; a gradient that should vanish may be as large as the rounding of the largest."""
    config = dataclasses.replace(published("caseops-1934"), bf16_tensors=())
    tokens, targets = tokens_of(config, 1, 200)
    how = {"cu_seqlens": torch.tensor(AWKWARD_BATCHES[batch], dtype=torch.int32), "max_seqlen": 200}
    _, truth = loss_and_gradients(trained_like(config, "cpu", torch.float32), [(tokens, targets)], **how)
    model = trained_like(config, "cuda", torch.bfloat16)
    (_, peer), (_, ours) = both_ways(model, [(tokens.cuda(), targets.cuda())], **how | {"cu_seqlens": how["cu_seqlens"].cuda()})
    rounding = 2**-9 * max(g.norm().item() for g in truth.values() if g is not None)
    for key, gradient in truth.items():
        if gradient is None:
            continue
        error, allowed = ((g[key].float().cpu() - gradient).norm().item() for g in (ours, peer))
        allowed = 2 * allowed + 1e-2 * gradient.norm().item() + rounding
        assert error <= allowed, f"{key}: error {error:.3e}, allowed {allowed:.3e}"


@pytest.mark.cuda
@pytest.mark.parametrize("name", RECIPES)
def test_the_last_positions_on_the_device(name):
    """Scoring makes the last visit of the wanted positions alone."""
    config = published(name)
    model = trained_like(config, "cuda", torch.bfloat16)
    tokens = tokens_of(config, 3, 300)[0].cuda()
    exact = trained_like(config, "cpu", torch.float32)
    with torch.no_grad():
        truth = exact(tokens.cpu())[:, -64:]
        model.use_fused_blocks = True
        whole, ours = model(tokens)[:, -64:], model(tokens, positions=64)
    assert relative_error(ours, truth) <= 1.2 * relative_error(whole, truth) + 1e-4


@pytest.mark.cuda
def test_a_captured_step_repeats():
    """Forward and backward replay from a CUDA graph on other tokens, and add to the gradients they find."""
    config = published("caseops-1934")
    model = trained_like(config, "cuda", torch.bfloat16)
    model.use_fused_blocks = True  # deterministic algorithms, which fill memory here, would choose the plain ones
    tokens, targets = (t.cuda() for t in tokens_of(config, 2, 128))
    other = torch.randint_like(tokens, config.vocab_size)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)

    def step():
        loss = model(tokens, targets)
        loss.backward()
        return loss

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()
    buffers = {name: p.grad for name, p in model.named_parameters()}
    tokens.copy_(other)
    for gradient in buffers.values():
        gradient.zero_()
    graph.replay()
    replayed = {name: g.clone() for name, g in buffers.items()}
    for gradient in buffers.values():
        gradient.zero_()
    assert step().item() == pytest.approx(loss.item(), rel=1e-5)
    for name, p in model.named_parameters():
        assert p.grad is buffers[name], name
        if p.grad.norm() > 0:
            assert relative_error(replayed[name], p.grad) < 2e-2, name
