"""attn_gate: sigmoid of a narrow product, forward and backward."""

import pytest
import torch

from pgolf_fast.ops import attn_gate  # noqa: F401  defines the ops
from tests.compare import assert_within, relative_error

ops = torch.ops.pgolf_fast
SCALE = 0.6
# (rows, channels, window, heads): rows at the seams of the kernel's blocks of 128 threads and beyond one pass of the backward's grid;
# windows narrower than 16, as wide, and of one channel; heads and windows that only the formula serves.
SHAPES = [(1, 16, 12, 8), (127, 512, 12, 8), (129, 64, 16, 8), (1031, 512, 1, 8), (300, 64, 20, 8), (300, 64, 12, 6), (70000, 512, 12, 8)]


def draw(rows, channels, window, heads, device, dtype=torch.bfloat16):
    wide = torch.promote_types(dtype, torch.float32)
    n, dn, dgate = (torch.randn(rows, width).to(device, dtype) for width in (channels, channels, heads))
    weight, dweight = (torch.randn(heads, window).to(device, wide) for _ in range(2))
    return n, weight, dgate, dn, dweight


def results(n, weight, dgate, dn, dweight):
    gate, dn, dweight = ops.attn_gate_fwd(n, weight, SCALE), dn.clone(), dweight.clone()
    ops.attn_gate_bwd(dgate, gate, n, weight, SCALE, dn, dweight)
    return {"gate": gate, "dn": dn, "dweight": dweight}


def of_autograd(n, weight, dgate, dn, dweight):
    n, weight = n.clone().requires_grad_(), weight.clone().requires_grad_()
    gate = torch.sigmoid(SCALE * (n[:, : weight.shape[1]] @ weight.to(n.dtype).T))
    gate.backward(dgate)
    return {"gate": gate.detach(), "dn": dn + n.grad, "dweight": dweight + weight.grad}


def test_definition():
    inputs = draw(7, 9, 4, 3, "cpu", torch.float64)
    for name, expected in of_autograd(*inputs).items():
        torch.testing.assert_close(results(*inputs)[name], expected)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_agreement(device, shape):
    inputs = draw(*shape, device)
    ours, peer, truth = results(*inputs), of_autograd(*inputs), of_autograd(*(t.double().cpu() for t in inputs))
    for name in truth:
        assert_within(ours[name], peer[name], truth[name], name, floor=1e-5)
    assert torch.equal(ours["dn"][:, shape[2] :], inputs[3][:, shape[2] :])


def test_a_gate_lies_between_0_and_1_and_mirrors(device):
    """sigmoid(-x) = 1 - sigmoid(x); a property that needs no reference."""
    n, weight, *_ = draw(200, 64, 12, 8, device)
    gate, mirrored = (ops.attn_gate_fwd(sign * n, weight, SCALE).float() for sign in (1, -1))
    assert ((gate >= 0) & (gate <= 1)).all()
    torch.testing.assert_close(gate + mirrored, torch.ones_like(gate), rtol=0, atol=4e-3)


def test_large_logits_and_no_rows(device):
    n, weight, *rest = draw(50, 64, 12, 8, device)
    found = results(1000 * n, weight, *rest)
    assert all(t.isfinite().all() for t in found.values())
    assert results(*draw(0, 64, 12, 8, device))["gate"].shape == (0, 8)


def test_registration(device):
    n, weight, dgate, dn, dweight = draw(16, 16, 12, 8, device)
    torch.library.opcheck(ops.attn_gate_fwd.default, (n, weight, SCALE))
    torch.library.opcheck(ops.attn_gate_bwd.default, (dgate, ops.attn_gate_fwd(n, weight, SCALE), n, weight, SCALE, dn, dweight))


@pytest.mark.cuda
def test_two_runs_agree():
    """Bitwise, but for the weight's gradient, a sum in no fixed order."""
    inputs = draw(5000, 512, 12, 8, "cuda")
    first, second = results(*inputs), results(*inputs)
    assert torch.equal(first["gate"], second["gate"]) and torch.equal(first["dn"], second["dn"])
    assert relative_error(first["dweight"], second["dweight"]) < 1e-4
