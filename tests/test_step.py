"""Replayed steps against steps launched kernel by kernel."""

import pytest
import torch

from pgolf_fast import recipe
from pgolf_fast.data import Batch, pack_segments
from pgolf_fast.model import GPT
from pgolf_fast.optim import Optimizer
from pgolf_fast.schedule import StepPlan
from pgolf_fast.step import GraphedStep, Step

TOKENS, SEQ_LEN = 1024, 256
HEADS = ("model.num_heads=2", "model.num_kv_heads=1")  # of width 64, as the kernels serve
SMALL = (
    *HEADS,
    "model.num_layers=6",
    "model.model_dim=128",
    "model.loop_start=1",
    "model.loop_end=2",
    "model.parallel_start=5",
    "model.vocab_size=256",
)


def batches(count, packed):
    generator = torch.Generator().manual_seed(0)
    for number in range(count):
        tokens = torch.randint(2, 256, (TOKENS + 1,), generator=generator)
        # Every third batch has so many documents that its cu_seqlens are longer than the others'.
        tokens[torch.randperm(TOKENS, generator=generator)[: 40 if number % 3 == 2 else 8]] = 1
        segments = torch.from_numpy(pack_segments(tokens[:-1].numpy(), SEQ_LEN, 32)).cuda() if packed else None
        yield Batch(tokens[:-1].cuda(), tokens[1:].cuda(), segments, number)


def losses(kind, name, packed):
    settings = recipe.resolve(name, SMALL if name == "caseops-1934" else HEADS, environ={}).recipe
    model = GPT(settings.model, 0, "cuda")
    optimizer = Optimizer(model, settings.optim, 2)
    step = kind(model, optimizer, SEQ_LEN)
    stream = batches(24, packed)
    # The rate, the momentum, the loop and the quantised weights change on the way.
    plans = [StepPlan(1 - i / 16, 0.9 + i / 200, i > 3, i > 8, False) for i in range(12)]
    found = [step.run([next(stream), next(stream)], plan) for plan in plans]
    return torch.stack(found).tolist(), {n: p.detach().clone() for n, p in model.named_parameters()}


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "packed"), [("tiny", False), ("caseops-1934", True)])
def test_replayed_steps_are_the_launched_ones(name, packed):
    (launched, weights), (replayed, replayed_weights) = (losses(kind, name, packed) for kind in (Step, GraphedStep))
    (again, _) = losses(Step, name, packed)
    noise = max(abs(a - b) for a, b in zip(launched, again))  # kernels that add in an order that varies
    assert replayed == pytest.approx(launched, abs=max(2 * noise, 2e-3))
    assert launched[-1] != launched[0]
    for key, weight in weights.items():
        assert (weight.float() - replayed_weights[key].float()).norm() <= 0.05 * weight.float().norm() + 1e-3, key


def test_a_step_is_the_mean_loss_and_an_update_under_its_plan():
    """Against the model and the optimizer driven by hand; the plans' rate, momentum, loop and quantised weights all change."""
    settings = recipe.resolve("caseops-1934", SMALL, environ={}).recipe
    model, twin = (GPT(settings.model, 0, stream_dtype=torch.float32).float() for _ in range(2))
    step, alone = Step(model, Optimizer(model, settings.optim, 2), 32), Optimizer(twin, settings.optim, 2)
    generator = torch.Generator().manual_seed(0)
    for i in range(3):
        plan = StepPlan(1 - i / 4, 0.9 + i / 50, i > 0, i > 1, False)
        rows = torch.randint(2, 256, (2, 2, 33), generator=generator)
        micro_batches = [(part[:, :-1], part[:, 1:]) for part in rows]
        expected = [twin(*pair, looped=plan.looped, fake_quant=plan.fake_quant) for pair in micro_batches]
        found = step.run([Batch(inputs.flatten(), targets.flatten(), None, i) for inputs, targets in micro_batches], plan)
        assert not found.requires_grad, "it would keep the activations"
        assert found.item() == pytest.approx(sum(loss.item() for loss in expected) / 2, rel=1e-6)
        for loss in expected:
            loss.backward()
            alone.collect()
        alone.set(plan)
        alone.step()
        for name, p in model.named_parameters():
            assert torch.equal(p, twin.get_parameter(name)), name


AWKWARD = {
    "one document": [0, 256],
    "documents of one token": range(257),
    "a tail without a document": [0, 90, 91, 91, 200],
    "nothing but a tail": [0, 0],
}
FUSED = (
    *("model.num_layers=4", "model.loop_start=1", "model.loop_end=1", "model.parallel_start=3"),
    *("model.vocab_size=1024", "model.mlp_mult=1.0"),
)


def awkward_losses(kind, stream_dtype, device, rounds=2):
    settings = recipe.resolve("caseops-1934", FUSED, environ={}).recipe
    model = GPT(settings.model, 0, device, stream_dtype)
    model.use_fused_blocks = device == "cuda"  # deterministic algorithms, which fill memory here, would choose the plain ones
    step = kind(model, Optimizer(model, settings.optim, 1), 256)
    tokens = torch.randint(2, 1024, (257,), generator=torch.Generator().manual_seed(0)).to(device)
    found = []
    for starts in [*AWKWARD.values()] * rounds:
        padded = torch.tensor([*starts, *[starts[-1]] * (288 - len(starts))], dtype=torch.int32, device=device)
        found.append(step.run([Batch(tokens[:-1], tokens[1:], padded, 0)], StepPlan(0.1, 0.9, True, False, False)))
    assert all(p.isfinite().all() for p in model.parameters())
    return torch.stack(found).double().cpu()


@pytest.mark.cuda
def test_awkward_batches_take_the_steps_of_plain_torch():
    """Replayed from one graph; every loss is at most twice as far from float32's as that of plain torch in bfloat16."""
    ours = awkward_losses(GraphedStep, torch.bfloat16, "cuda")
    peer, truth = (awkward_losses(Step, dtype, "cpu") for dtype in (torch.bfloat16, torch.float32))
    assert ours.isfinite().all() and (truth[-len(AWKWARD) :] < truth[: len(AWKWARD)] - 0.05).all()
    torch.testing.assert_close(ours, truth, rtol=0, atol=2 * (peer - truth).abs().max().item() + 2e-3)
