"""qkv: the product that makes queries, keys and values, normalised and rotated."""

import pytest
import torch

from pgolf_fast.ops import qkv as op
from tests.compare import assert_within, relative_error

ops = torch.ops.pgolf_fast
# (rows, width, query heads, KV heads, positions): rows at the seams of the product's tiles (64, 128, 256) and of the backward's
# CTAs (8); widths around the product's least K (512); heads that fill whole tiles of four and that do not; rows that wrap around the
# positions.
SHAPES = [
    (1, 64, 1, 1, 1),
    (65, 64, 2, 1, 65),
    (129, 72, 3, 2, 50),
    (256, 512, 8, 4, 128),
    (255, 504, 3, 1, 100),
    (257, 520, 2, 1, 257),
    (1031, 512, 8, 4, 2048),
    (20000, 512, 8, 8, 2000),
]


def draw(rows, width, q_heads, kv_heads, positions, device, dtype=torch.bfloat16, head=64, rotated=16):
    heads = q_heads + 2 * kv_heads
    angle = torch.arange(positions)[:, None] * torch.tensor([0.7**i for i in range(rotated // 2)])
    t = {
        "n": torch.randn(rows, width).to(dtype),
        "weight": (torch.randn(heads * head, width) / width**0.5).to(dtype),
        "gain": 1 + torch.rand(q_heads, dtype=torch.promote_types(dtype, torch.float32)),
        "cos": angle.cos().to(dtype),
        "sin": angle.sin().to(dtype),
    }
    d = torch.randn(rows, heads * head).to(device, dtype)
    return {name: v.to(device) for name, v in t.items()}, d


def with_gradients(t, d, kv_heads):
    """What the op gives, and the gradients of the raw product and of the gain."""
    qkv, rstd = ops.qkv_forward(*t.values(), kv_heads)
    dgain = torch.zeros_like(t["gain"])
    dqkv = d.clone()
    ops.qkv_backward(dqkv, qkv, rstd, t["gain"], t["cos"], t["sin"], dgain)
    return {"qkv": qkv, "dqkv": dqkv, "dgain": dgain}


def of_autograd(t, d, kv_heads):
    raw = (t["n"] @ t["weight"].T).requires_grad_()
    gain = t["gain"].clone().requires_grad_()
    identity = torch.eye(raw.shape[1], dtype=raw.dtype, device=raw.device)
    qkv = op.qkv_ref(raw, identity, gain, t["cos"], t["sin"], kv_heads).to(t["n"].dtype)
    qkv.backward(d)
    return {"qkv": qkv.detach(), "dqkv": raw.grad, "dgain": gain.grad}


@pytest.mark.parametrize("head, rotated", [(8, 4), (6, 6), (4, 0), (64, 16)])
def test_definition(head, rotated):
    """The backward by what the forward wrote, against autograd through the definition."""
    t, d = draw(7, 5, 3, 2, 4, "cpu", torch.float64, head, rotated)
    for name, expected in of_autograd(t, d, 2).items():
        torch.testing.assert_close(with_gradients(t, d, 2)[name], expected)


@pytest.mark.parametrize("shape", SHAPES[:6], ids=str)
def test_agreement(device, shape):
    check_agreement(device, shape)


@pytest.mark.cuda
@pytest.mark.parametrize("shape", SHAPES[6:], ids=str)
def test_agreement_at_kernel_sizes(shape):
    check_agreement("cuda", shape)


def check_agreement(device, shape):
    t, d = draw(*shape, device)
    wide = {name: v.double().cpu() for name, v in t.items()}
    ours = with_gradients(t, d, shape[3])
    peer = of_autograd({name: v if name != "gain" else v.to(t["n"].dtype) for name, v in t.items()}, d, shape[3])
    truth = of_autograd(wide, d.double().cpu(), shape[3])
    for name in truth:
        assert_within(ours[name], peer[name], truth[name], name, floor=1e-2 if name == "dgain" else 1e-7)


def test_heads_have_the_length_of_their_gain(device):
    """Whatever n is; a property that needs no reference."""
    t, _ = draw(100, 512, 8, 4, 100, device)
    qkv, _ = ops.qkv_forward(*t.values(), 4)
    length = qkv.float().view(100, 16, 64).square().mean(-1).sqrt()
    torch.testing.assert_close(length[:, :8], t["gain"].expand(100, 8), rtol=1e-2, atol=0)
    torch.testing.assert_close(length[:, 8:12], torch.ones(100, 4, device=device), rtol=1e-2, atol=0)


@pytest.mark.parametrize("shape", SHAPES[:7], ids=str)
def test_normalize_is_the_forward_without_its_product(device, shape):
    """In place: of the rounded product it makes what the definition makes of it; values stay as they are."""
    t, _ = draw(*shape, device)
    kv_heads, kept = shape[3], shape[3] * 64
    raw = t["n"] @ t["weight"].T
    qkv = raw.clone()
    rstd = ops.qkv_normalize(qkv, t["gain"], t["cos"], t["sin"], kv_heads)
    identity = torch.eye(raw.shape[1], dtype=torch.float64, device=device)
    wide = {name: t[name].double() for name in ("gain", "cos", "sin")}
    truth = op.qkv_ref(raw.double(), identity, **wide, kv_heads=kv_heads)
    assert relative_error(qkv, truth) < 2**-8 and torch.equal(qkv[:, -kept:], raw[:, -kept:])
    normed = raw.double().unflatten(-1, (-1, 64))[:, : shape[2] + kv_heads]
    torch.testing.assert_close(rstd.double(), normed.square().mean(-1).add(2**-23).rsqrt(), rtol=1e-5, atol=0)


def test_gain_gradient_is_added_and_zero_gain_is_finite(device):
    t, d = draw(70, 64, 2, 1, 70, device)
    t["gain"][1] = 0
    qkv, rstd = ops.qkv_forward(*t.values(), 1)
    sums = [torch.full_like(t["gain"], start) for start in (0.0, 5.0)]
    for total in sums:
        dqkv = d.clone()
        ops.qkv_backward(dqkv, qkv, rstd, t["gain"], t["cos"], t["sin"], total)
        assert dqkv.isfinite().all() and torch.equal(dqkv[:, 192:], d[:, 192:])
    torch.testing.assert_close(sums[1] - 5, sums[0], rtol=1e-3, atol=1e-3)
    assert sums[0][1] == 0 and sums[0][0] != 0


def test_more_heads_than_the_kernel_takes_go_the_composite_way():
    """Refused by the op's own test of fitness, before it asks for a GPU."""
    cos = torch.empty(5, 8)
    for name, q_heads, kv_heads in (("qkv_normalize", 32, 1), ("qkv_backward", 17, 17)):
        heads, normed = q_heads + 2 * kv_heads, q_heads + kv_heads
        assert normed > op.MAX_HEADS and not op._kernel_serves(name, 64 * heads, heads, cos, normed)


def test_no_rows(device):
    t, d = draw(0, 64, 2, 1, 5, device)
    found = with_gradients(t, d, 1)
    assert found["qkv"].shape == found["dqkv"].shape == (0, 256) and not found["dgain"].any()
    assert ops.qkv_normalize(found["qkv"], t["gain"], t["cos"], t["sin"], 1).shape == (0, 3)


def test_registration(device):
    t, d = draw(16, 64, 2, 1, 16, device)
    qkv, rstd = ops.qkv_forward(*t.values(), 1)
    torch.library.opcheck(ops.qkv_forward.default, (*t.values(), 1))
    torch.library.opcheck(ops.qkv_normalize.default, (qkv.clone(), t["gain"], t["cos"], t["sin"], 1))
    torch.library.opcheck(ops.qkv_backward.default, (d.clone(), qkv, rstd, t["gain"], t["cos"], t["sin"], torch.zeros_like(t["gain"])))


@pytest.mark.cuda
def test_two_runs_agree():
    """Bitwise, but for the gain's gradient, a sum in no fixed order."""
    t, d = draw(5000, 512, 8, 4, 5000, "cuda")
    first, second = (with_gradients(t, d, 4) for _ in range(2))
    assert torch.equal(first["qkv"], second["qkv"]) and torch.equal(first["dqkv"], second["dqkv"])
    assert relative_error(first["dgain"], second["dgain"]) < 1e-4
