"""fused_mlp: down(act(up(x)))."""

import pytest
import torch

from pgolf_fast import fused_mlp
from pgolf_fast.ops.fused_mlp import ACTIVATIONS, fused_mlp_ref
from tests.compare import assert_within


def explicit(x, w_up, w_down, slope):
    """Written out element by element, independent of the op's reference."""
    out = torch.zeros(x.shape[0], w_down.shape[0], dtype=x.dtype)
    for i in range(x.shape[0]):
        for h in range(w_up.shape[0]):
            u = (x[i] * w_up[h]).sum().item()
            out[i] += (u if u > 0 else slope * u) ** 2 * w_down[:, h]
    return out


@pytest.mark.parametrize("activation,slope", [("relu2", 0.0), ("leaky_relu2", 0.5)])
def test_definition(activation, slope):
    x, up, down = torch.randn(5, 7, dtype=torch.float64), torch.randn(11, 7, dtype=torch.float64), torch.randn(3, 11, dtype=torch.float64)
    torch.testing.assert_close(fused_mlp(x, up, down, activation), explicit(x, up, down, slope))
    inputs = [m.requires_grad_() for m in (x, up, down)]
    assert torch.autograd.gradcheck(lambda *m: fused_mlp(*m, activation), inputs)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_agreement(device, activation):
    x, up, down = (torch.randn(*s, device=device, dtype=torch.bfloat16) for s in ((100, 64), (192, 64), (64, 192)))
    truth = fused_mlp_ref(*(m.double().cpu() for m in (x, up, down)), activation)
    assert_within(fused_mlp(x, up, down, activation), fused_mlp_ref(x.cpu(), up.cpu(), down.cpu(), activation), truth, "out")


def test_leading_dimensions_and_empty_batch():
    up, down = torch.randn(12, 8), torch.randn(8, 12)
    assert fused_mlp(torch.randn(2, 3, 8), up, down).shape == (2, 3, 8)
    assert fused_mlp(torch.randn(0, 8), up, down).shape == (0, 8)


def test_compiles_whole():
    x, up, down = torch.randn(4, 8), torch.randn(12, 8), torch.randn(8, 12)
    torch.testing.assert_close(torch.compile(fused_mlp, fullgraph=True)(x, up, down), fused_mlp(x, up, down))


def test_bad_input_names_the_argument():
    x, up, down = torch.randn(4, 8), torch.randn(12, 8), torch.randn(8, 12)
    for error, name, arguments in (
        (ValueError, "w_up", (x, torch.randn(12, 9), down)),
        (ValueError, "w_down", (x, up, torch.randn(8, 13))),
        (TypeError, "w_up", (x, up.double(), down)),
        (ValueError, "x", (x.long(), up, down)),
        (ValueError, "activation", (x, up, down, "gelu")),
    ):
        with pytest.raises(error, match=f"^{name}:"):
            fused_mlp(*arguments)
