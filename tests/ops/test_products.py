"""The products of a linear layer: y = x w^T (+ residual), dx = dy w, dw += dy^T x."""

import pytest
import torch

from pgolf_fast.ops.products import add_weight_gradient, project, project_backward, project_residual_rstd
from tests.compare import assert_within, relative_error

# Rows, K and N at the seams of the kernel's tiles: 64 rows a warpgroup, 128 a CTA, 256 a cluster; 64 k a stage, at least 8 stages;
# 256 columns; then the model's.
SHAPES = [
    (1, 64, 64),
    (63, 64, 256),
    (65, 72, 264),
    (127, 512, 8),
    (129, 520, 248),
    (255, 520, 504),
    (256, 504, 520),
    (257, 512, 512),
    (300, 512, 1032),
    (1031, 1032, 512),
    (20000, 512, 1024),
    (20000, 512, 2048),
    (16000, 256, 1792),  # its weight gradient: seven tiles, whose last seven k blocks three clusters share unequally
]


def draw(m, k, n, device, dtype=torch.bfloat16):
    shapes = {"x": (m, k), "weight": (n, k), "residual": (m, n), "dy": (m, n)}
    scale = {"weight": k**-0.5}
    return {name: (scale.get(name, 1.0) * torch.randn(shape)).to(device, dtype) for name, shape in shapes.items()}


def results(t, dweight):
    add_weight_gradient(dweight, t["dy"], t["x"])
    return {
        "y": project(t["x"], t["weight"]),
        "y + residual": project(t["x"], t["weight"], t["residual"]),
        "dx": project_backward(t["dy"], t["weight"]),
        "dweight": dweight,
    }


def test_definition():
    """Against autograd of torch's own linear layer."""
    t = draw(7, 5, 3, "cpu", torch.float64)
    x, weight = (t[name].clone().requires_grad_() for name in ("x", "weight"))
    y = torch.nn.functional.linear(x, weight)
    y.backward(t["dy"])
    before = torch.randn(3, 5, dtype=torch.float64)
    found = results(t, before.clone())
    for name, expected in (("y", y), ("y + residual", y + t["residual"]), ("dx", x.grad), ("dweight", before + weight.grad)):
        torch.testing.assert_close(found[name], expected.detach())


@pytest.mark.parametrize("shape", SHAPES[:7], ids=str)
def test_agreement(device, shape):
    check_agreement(device, shape)


@pytest.mark.cuda
@pytest.mark.parametrize("shape", SHAPES[7:], ids=str)
def test_agreement_at_kernel_sizes(shape):
    check_agreement("cuda", shape)


def check_agreement(device, shape):
    t = draw(*shape, device)
    before = torch.randn(shape[2], shape[1], device=device)
    found = results(t, before.clone())
    truth = results({name: v.double().cpu() for name, v in t.items()}, before.double().cpu())
    peer = {
        "y": t["x"] @ t["weight"].T,
        "y + residual": t["residual"] + t["x"] @ t["weight"].T,
        "dx": t["dy"] @ t["weight"],
        "dweight": before + (t["dy"].T @ t["x"]).float(),
    }
    for name in truth:
        assert_within(found[name], peer[name], truth[name], name, floor=1e-6)


@pytest.mark.parametrize("shape", [*SHAPES[:8], pytest.param(SHAPES[10], marks=pytest.mark.cuda)], ids=str)
def test_rows_of_the_sum_are_measured(device, shape):
    """The sum's bits are those without the measuring, and rstd is that of the rounded sum."""
    t = draw(*shape, device)
    y, rstd = project_residual_rstd(t["x"], t["weight"], t["residual"])
    assert torch.equal(y, project(t["x"], t["weight"], t["residual"]))
    torch.testing.assert_close(rstd.double(), (y.double().square().mean(-1) + 2.0**-23).rsqrt(), rtol=1e-5, atol=0)


def test_no_rows(device):
    t = draw(0, 16, 24, device)
    dweight = torch.ones(24, 16, device=device)
    found = results(t, dweight)
    assert found["y"].shape == (0, 24) and found["dx"].shape == (0, 16) and dweight.eq(1).all()


def test_registration(device):
    t = draw(16, 16, 24, device)
    ops = torch.ops.pgolf_fast
    torch.library.opcheck(ops.product_forward.default, (t["x"], t["weight"], t["residual"]))
    torch.library.opcheck(ops.product_forward.default, (t["x"], t["weight"], None))
    torch.library.opcheck(ops.product_residual_rstd.default, (t["x"], t["weight"], t["residual"]))
    torch.library.opcheck(ops.product_backward.default, (t["dy"], t["weight"]))
    torch.library.opcheck(ops.product_weight.default, (t["dy"], t["x"], torch.zeros(24, 16, device=device)))


@pytest.mark.cuda
def test_two_runs_agree():
    """Bitwise, but for the weight gradient: a sum of float32 additions in no fixed order."""
    t = draw(5000, 512, 1024, "cuda")
    first, second = (results(t, torch.zeros(1024, 512, device="cuda")) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in ("y", "y + residual", "dx"))
    assert relative_error(first["dweight"], second["dweight"]) < 1e-5


def test_identity_weight_adds_up(device):
    t = draw(100, 64, 64, device)
    assert torch.equal(project(t["x"], torch.eye(64, device=device).bfloat16()), t["x"])
    assert torch.equal(project(t["x"], torch.eye(64, device=device).bfloat16(), t["x"]), 2 * t["x"])


def test_bad_input_names_the_argument():
    x, weight = torch.randn(4, 8), torch.randn(12, 8)
    for error, name, call in (
        (ValueError, "x", lambda: project(torch.randn(4, 9), weight)),
        (TypeError, "x", lambda: project(x.double(), weight)),
        (ValueError, "residual", lambda: project(x, weight, torch.randn(4, 8))),
        (ValueError, "dy", lambda: project_backward(x, weight)),
        (TypeError, "dweight", lambda: add_weight_gradient(weight.bfloat16(), torch.randn(4, 12), x)),
    ):
        with pytest.raises(error, match=f"^{name}:"):
            call()


@pytest.mark.cuda
def test_what_the_kernel_does_not_take_is_named():
    t = draw(4, 12, 16, "cuda")
    with pytest.raises(RuntimeError, match="x: the kernel takes widths that are multiples of 8, got 12"):
        project(t["x"], t["weight"])
