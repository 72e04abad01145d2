"""The whole optimizer step of one rank: clip, momentum, Newton-Schulz, AdamW, running average, clearing the gradients.

Fewest bytes, in float32 masters: gradient read twice (norm, use) and cleared, momentum, parameter and average read and written, the
direction and the update written and read once.
"""

import torch

from benchmarks.timing import Case
from pgolf_fast import recipe
from pgolf_fast.model import GPT
from pgolf_fast.ops import _library
from pgolf_fast.optim import Optimizer
from pgolf_fast.schedule import StepPlan

RECIPES = {"27M": "legal-ttt-691", "36M": "caseops-1934"}
CPU_RECIPES = {"tiny": "tiny"}  # seconds instead of minutes


def cases(device):
    for name, recipe_name in (RECIPES if device.type == "cuda" else CPU_RECIPES).items():
        settings = recipe.resolve(recipe_name, environ={}).recipe
        optimizers = {}
        for contestant in ("ours", "torch"):
            model = GPT(settings.model, 0, device)
            optimizers[contestant] = optimizer = Optimizer(model, settings.optim)
            optimizer.set(StepPlan(0.1, 0.95, False, False, False))
            for buffer in optimizer.buffers:
                buffer.copy_(torch.randn(buffer.shape, device=device))
        # NOTE: a step clears the gradients, so each run first puts random ones back; the second case is what that costs.
        sources = [torch.randn(b.shape, device=device).to(b.dtype) for b in optimizers["ours"].buffers]

        def step(contestant, optimizers=optimizers, sources=sources):
            def run(i):
                for buffer, source in zip(optimizers[contestant].buffers, sources):
                    buffer.copy_(source)
                if contestant == "ours":
                    optimizers[contestant].step()
                else:
                    with _library.composite():
                        optimizers[contestant].step()

            return run

        def gradients_alone(i, optimizers=optimizers, sources=sources):
            for buffer, source in zip(optimizers["ours"].buffers, sources):
                buffer.copy_(source)

        muon = sum(b.grad.numel() for b in optimizers["ours"].banks.values())
        adam = sum(m.param.numel() * m.param.element_size() for m in optimizers["ours"].adam.values())
        averages = 8 * sum(t.numel() for t in optimizers["ours"].ema.values())
        state = sum(b.momentum.element_size() for b in optimizers["ours"].banks.values()) / len(optimizers["ours"].banks)
        total = muon * (12 + 4 * state + 4 + 8) + 9 * adam + averages
        yield Case(f"{name} step, gradients put back included", {"ours": step("ours"), "torch": step("torch")}, total)
        yield Case(f"{name} gradients put back alone", {"ours": gradients_alone}, 2 * sum(g.numel() * g.element_size() for g in sources))
