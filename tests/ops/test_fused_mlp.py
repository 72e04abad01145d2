"""fused_mlp: down(act(up(x)))."""

import pytest
import torch

from pgolf_fast import fused_mlp
from pgolf_fast.ops.fused_mlp import ACTIVATIONS, fused_mlp_ref
from tests.compare import assert_within, relative_error

# Rows at the seams of the kernel's tiles (64 a warpgroup, 128 a CTA, 256 a cluster), widths at those of its columns
# (64 a swizzled block, 256 a tile) and of the least K of its products (512; of down 1024, of dx through the norm 1536), and at neither.
SHAPES = [
    (1, 64, 64, 64),
    (63, 64, 256, 64),
    (64, 128, 192, 64),
    (65, 72, 264, 40),
    (127, 64, 248, 128),
    (255, 504, 1032, 520),
    (256, 520, 1544, 504),
    (129, 512, 1536, 512),
    (257, 512, 2048, 512),
    (1031, 136, 520, 264),
    (20000, 64, 320, 64),
]
LARGE = [SHAPES[8], (18000, 512, 1536, 64)]  # the second: several tiles a cluster, results under the products of the next


def explicit(x, w_up, w_down, slope):
    """Written out element by element, independent of the op's reference."""
    out = torch.zeros(x.shape[0], w_down.shape[0], dtype=x.dtype)
    for i in range(x.shape[0]):
        for h in range(w_up.shape[0]):
            u = (x[i] * w_up[h]).sum().item()
            out[i] += (u if u > 0 else slope * u) ** 2 * w_down[:, h]
    return out


def draw(m, d, h, d_out, device="cpu", dtype=torch.bfloat16):
    x, up, down = torch.randn(m, d), torch.randn(h, d) / d**0.5, torch.randn(d_out, h) / h**0.5
    return [t.to(device, dtype) for t in (x, up, down)]


def gradients(function, inputs, dy, activation):
    inputs = [t.detach().requires_grad_() for t in inputs]
    y = function(*inputs, activation)
    return [y.detach(), *torch.autograd.grad(y, inputs, dy)]


@pytest.mark.parametrize("activation,slope", [("relu2", 0.0), ("leaky_relu2", 0.5)])
def test_definition(activation, slope):
    x, up, down = draw(5, 7, 11, 3, dtype=torch.float64)
    torch.testing.assert_close(fused_mlp(x, up, down, activation), explicit(x, up, down, slope))
    inputs = [t.requires_grad_() for t in (x, up, down)]
    assert torch.autograd.gradcheck(lambda *t: fused_mlp(*t, activation), inputs)


@pytest.mark.parametrize("shape", SHAPES[:7], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_agreement(device, activation, shape):
    check_agreement(device, activation, shape)


@pytest.mark.cuda
@pytest.mark.parametrize("shape", SHAPES[7:], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_agreement_at_kernel_sizes(activation, shape):
    check_agreement("cuda", activation, shape)


def check_agreement(device, activation, shape):
    inputs = draw(*shape, device)
    dy = torch.randn(shape[0], shape[3]).to(device, torch.bfloat16)
    ours = gradients(fused_mlp, inputs, dy, activation)
    peer = gradients(fused_mlp_ref, inputs, dy, activation)
    truth = gradients(fused_mlp_ref, [t.double() for t in inputs], dy.double(), activation)
    for name, o, p, t in zip(("y", "dx", "dw_up", "dw_down"), ours, peer, truth):
        assert_within(o, p, t, name)


SCALE = 0.7


def normed(x, up, down, residual, dy, dx_residual, before):
    """Result and gradients of the norm and the MLP together; those of the weights are added to `before`."""
    ops, sums = torch.ops.pgolf_fast, [b.clone() for b in before]
    rstd = torch.rsqrt(x.to(before[0].dtype).square().mean(-1) + 2.0**-23)
    y, u = ops.norm_mlp_fwd(x, rstd, SCALE, residual, up, down, 1)
    return y, ops.norm_mlp_bwd(dy, x, dx_residual, rstd, SCALE, u, up, down, 1, *sums), *sums


def normed_by_autograd(x, up, down, residual, dy, dx_residual, before):
    def function(x, up, down, activation):
        return fused_mlp_ref(SCALE * torch.nn.functional.rms_norm(x, x.shape[-1:], eps=2.0**-23), up, down, activation)

    y, dx, dw_up, dw_down = gradients(function, [x, up, down], dy, "leaky_relu2")
    return y if residual is None else residual + y, dx_residual + dx, before[0] + dw_up, before[1] + dw_down


def draw_normed(m, d, h, d_out, device="cpu", dtype=torch.bfloat16, with_residual=True):
    wide = torch.promote_types(dtype, torch.float32)
    residual, dy, dx_residual = (torch.randn(m, width).to(device, dtype) for width in (d_out, d_out, d))
    before = [torch.randn(h, d).to(device, wide), torch.randn(d_out, h).to(device, wide)]
    return *draw(m, d, h, d_out, device, dtype), residual if with_residual else None, dy, dx_residual, before


@pytest.mark.parametrize("with_residual", [False, True])
def test_normed_definition(with_residual):
    inputs = draw_normed(5, 7, 11, 3, dtype=torch.float64, with_residual=with_residual)
    for found, expected in zip(normed(*inputs), normed_by_autograd(*inputs)):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("shape", [*SHAPES[:7], *(pytest.param(s, marks=pytest.mark.cuda) for s in LARGE)], ids=str)
def test_normed_agrees(device, shape, with_residual):
    inputs = draw_normed(*shape, device, with_residual=with_residual)

    def wide(t):
        return t if t is None else [wide(b) for b in t] if isinstance(t, list) else t.double().cpu()

    ours, peer, truth = normed(*inputs), normed_by_autograd(*inputs), normed_by_autograd(*(wide(t) for t in inputs))
    for name, o, p, t in zip(("y", "dx", "dw_up", "dw_down"), ours, peer, truth):
        assert_within(o, p, t, name, floor=1e-6)


def test_normed_registration(device):
    x, up, down, residual, dy, dx_residual, before = draw_normed(16, 8, 16, 8, device)
    ops, rstd = torch.ops.pgolf_fast, torch.ones(16, device=device)
    torch.library.opcheck(ops.norm_mlp_fwd.default, (x, rstd, SCALE, residual, up, down, 1))
    _, u = ops.norm_mlp_fwd(x, rstd, SCALE, None, up, down, 1)
    torch.library.opcheck(ops.norm_mlp_bwd.default, (dy, x, dx_residual, rstd, SCALE, u, up, down, 1, *before))


def test_leading_dimensions_and_empty_batch(device):
    _, up, down = draw(1, 8, 16, 8, device)
    assert fused_mlp(torch.randn(2, 3, 8, device=device).bfloat16(), up, down).shape == (2, 3, 8)
    x = torch.randn(0, 8, device=device).bfloat16().requires_grad_()
    y = fused_mlp(x, up, down)
    assert y.shape == (0, 8)
    y.sum().backward()
    assert x.grad.shape == (0, 8)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_weights_that_do_not_learn(device, activation):
    """The input's gradient alone, which spares the products of the weights' gradients, is the same bits."""
    inputs = draw(257, 64, 256, 72, device)
    dy = torch.randn(257, 72).to(device, torch.bfloat16)
    x = inputs[0].detach().requires_grad_()
    (alone,) = torch.autograd.grad(fused_mlp(x, *inputs[1:], activation), x, dy)
    assert torch.equal(alone, gradients(fused_mlp, inputs, dy, activation)[1])
    u = inputs[0] @ inputs[1].T
    torch.library.opcheck(torch.ops.pgolf_fast.fused_mlp_bwd_input.default, (dy, u, *inputs[1:], ACTIVATIONS.index(activation)))


def test_strided_rows(device):
    x, up, down = draw(40, 64, 128, 64, device)
    wide = torch.cat([x, x], dim=1)[:, 64:]
    assert torch.equal(fused_mlp(wide, up, down), fused_mlp(x, up, down))


def test_registration(device):
    x, up, down = draw(16, 8, 16, 8, device)
    inputs = [t.requires_grad_() for t in (x, up, down)]
    torch.library.opcheck(torch.ops.pgolf_fast.fused_mlp_fwd.default, (*inputs, 1))
    compiled = torch.compile(fused_mlp, fullgraph=True)
    assert torch.equal(compiled(x, up, down), fused_mlp(x, up, down))


@pytest.mark.cuda
def test_two_runs_agree():
    """Bitwise, but for the weight gradients: they are sums of float32 additions in no fixed order, rounded to bf16 at the end."""
    inputs = draw(1031, 512, 1536, 512, "cuda")
    dy = torch.randn(1031, 512, device="cuda").bfloat16()
    first, second = (gradients(fused_mlp, inputs, dy, "leaky_relu2") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first[:2], second[:2]))
    for a, b in zip(first[2:], second[2:]):
        assert relative_error(a, b) < 1e-4


@pytest.mark.cuda
def test_graph_replay_sees_changed_inputs():
    x, up, down = draw(300, 64, 256, 64, "cuda")
    fused_mlp(x, up, down)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = fused_mlp(x, up, down)
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert torch.equal(y, fused_mlp(x, up, down))


def test_a_scaled_input_scales_the_output_by_its_square(device):
    x, up, down = draw(50, 64, 128, 64, device)
    for activation in ACTIVATIONS:
        assert torch.equal(fused_mlp(2 * x, up, down, activation), 4 * fused_mlp(x, up, down, activation))


@pytest.mark.parametrize("activation,below_zero", [("relu2", 0.0), ("leaky_relu2", 0.25)])
def test_whole_numbers_are_exact(device, activation, below_zero):
    """Between identities the activation and its slope, of numbers whose squares bfloat16 holds."""
    u = torch.arange(-15.0, 16.0)[:, None].expand(-1, 64)
    identity = torch.eye(64, device=device, dtype=torch.bfloat16)
    x = u.to(device, torch.bfloat16).requires_grad_()
    y = fused_mlp(x, identity, identity, activation)
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    factor = torch.where(u > 0, 1.0, below_zero)
    assert torch.equal(y.float().cpu(), factor * u * u)
    assert torch.equal(dx.float().cpu(), factor * 2 * u)


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


@pytest.mark.cuda
def test_what_the_kernel_does_not_take_is_named():
    x, up, down = draw(4, 8, 16, 8, "cuda")
    for name, arguments in (
        ("w_up: the kernel takes bfloat16, got float32", [t.float() for t in (x, up, down)]),
        ("w_up, w_down: .*multiples of 8", draw(4, 12, 16, 8, "cuda")),
    ):
        with pytest.raises(RuntimeError, match=name):
            fused_mlp(*arguments)


@pytest.mark.cuda
def test_inputs_at_any_address():
    arguments = draw(4, 8, 16, 8, "cuda")
    odd = [torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape) for t in arguments]  # 2-byte aligned
    assert all(t.data_ptr() % 16 for t in odd)
    assert torch.equal(fused_mlp(*odd), fused_mlp(*arguments))
