"""qk_norm_rope: RMSNorm, rotation and gain of packed queries and keys, and the value embedding."""

import pytest
import torch

from pgolf_fast.model import ModelConfig, rms, rotary_table, rotate
from pgolf_fast.ops import qk_norm_rope
from pgolf_fast.ops.qk_norm_rope import qk_norm_rope_ref
from tests.compare import assert_within

OPS = torch.ops.pgolf_fast
D = 64  # of the kernel
# Rows: one, less than a block walks over at a time (8), one more, more than one round of a full grid.
SEAMS = [1, 7, 9, 40_000]


def draw(m, device, heads=8, kv_heads=4, half=8, positions=13, extra=0, head_dim=D, dtype=torch.bfloat16, value_add=False):
    wide = torch.promote_types(dtype, torch.float32)
    angle = torch.rand(positions, half, dtype=torch.float64) * 6.28
    return {
        "qkv": torch.randn(m, (heads + 2 * kv_heads) * head_dim + extra, dtype=torch.float64).to(dtype).to(device),
        "gain": (1 + torch.randn(heads, dtype=torch.float64)).to(wide).to(device),
        "cos": angle.cos().to(dtype).to(device),
        "sin": angle.sin().to(dtype).to(device),
        "num_kv_heads": kv_heads,
        "head_dim": head_dim,
        "value_add": torch.randn(m, kv_heads * head_dim, dtype=torch.float64).to(dtype).to(device) if value_add else None,
    }


def outputs_and_gradients(function, inputs, gradients):
    inputs = dict(inputs)
    names = ["qkv", "gain"] + (["value_add"] if inputs["value_add"] is not None else [])
    for name in names:
        inputs[name] = inputs[name].detach().requires_grad_()
    outputs = function(**inputs)
    grads = torch.autograd.grad(outputs, [inputs[name] for name in names], gradients)
    return dict(zip("qkv", (y.detach() for y in outputs))) | {f"d_{name}": g for name, g in zip(names, grads)}


def assert_agrees(device, m, **shape):
    inputs = draw(m, device, **shape)
    d_outputs = [torch.randn(y.shape).bfloat16().to(device) for y in qk_norm_rope(**inputs)]

    def on_cpu(dtype):
        wide = torch.promote_types(dtype, torch.float32)
        moved = {k: x.cpu().to(wide if k == "gain" else dtype) if isinstance(x, torch.Tensor) else x for k, x in inputs.items()}
        return outputs_and_gradients(qk_norm_rope_ref, moved, [d.cpu().to(dtype) for d in d_outputs])

    ours, peer, truth = outputs_and_gradients(qk_norm_rope, inputs, d_outputs), on_cpu(torch.bfloat16), on_cpu(torch.float64)
    for name, value in ours.items():
        assert_within(value, peer[name], truth[name], name, floor=1e-6)


# ---- definition -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rope_dims", [0, 2, 16, 64])
def test_definition(rope_dims):
    """The model's own pieces, in float64, and the backward through them."""
    config = ModelConfig(rope_dims=rope_dims)
    inputs = draw(10, "cpu", 2, 1, rope_dims // 2, positions=4, dtype=torch.float64, value_add=True)
    cos, sin = rotary_table(config, 4, 4, "cpu", torch.float64)
    inputs |= {"cos": cos[:, 0], "sin": sin[:, 0]}
    q, k, v = qk_norm_rope(**inputs)
    position = torch.arange(10) % 4
    heads = inputs["qkv"].view(10, 4, D)
    expected = rotate(rms(heads[:, :3]), cos[position], sin[position])
    torch.testing.assert_close(q.view(10, 2, D), inputs["gain"][:, None] * expected[:, :2])
    torch.testing.assert_close(k, expected[:, 2])
    torch.testing.assert_close(v, heads[:, 3] + inputs["value_add"])
    small = draw(3, "cpu", 2, 1, min(rope_dims // 2, 3), positions=2, head_dim=6, extra=1, dtype=torch.float64)

    def function(qkv, gain, value_add):
        return qk_norm_rope(**small | {"qkv": qkv, "gain": gain, "value_add": value_add})

    value_add = torch.randn(3, 6, dtype=torch.float64)
    assert torch.autograd.gradcheck(function, [x.requires_grad_() for x in (small["qkv"], small["gain"], value_add)])
    assert torch.autograd.gradcheck(lambda qkv, gain: function(qkv, gain, None), [small["qkv"], small["gain"]])


# ---- agreement, seams -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("m", SEAMS[:3])
@pytest.mark.parametrize("value_add", [False, True])
def test_row_counts(device, m, value_add):
    assert_agrees(device, m, value_add=value_add)


@pytest.mark.cuda
@pytest.mark.parametrize("value_add", [False, True])
def test_many_rows(value_add):
    assert_agrees(torch.device("cuda"), SEAMS[3], positions=2048, value_add=value_add)


# 1, 1: a warp holds heads of several rows. 3, 5: heads not a multiple of a warp's four. 16, 4: the most. 20, 4: more than the kernel takes.
@pytest.mark.parametrize("heads,kv_heads", [(1, 1), (3, 3), (5, 1), (16, 4), (20, 4)])
@pytest.mark.parametrize("value_add", [False, True])
def test_head_counts(device, heads, kv_heads, value_add):
    assert_agrees(device, 50, heads=heads, kv_heads=kv_heads, value_add=value_add)


# 8 is the kernel's; the others take the formula.
@pytest.mark.parametrize("half", [0, 1, 4, 8, 16, 24, 32])
@pytest.mark.parametrize("positions", [1, 7, 100])
def test_rotations(device, half, positions):
    assert_agrees(device, 30, half=half, positions=positions)


def test_other_head_width(device):
    assert_agrees(device, 30, head_dim=32, half=8)


@pytest.mark.parametrize("extra", [8, 64, 3])
def test_columns_that_are_not_read(device, extra):
    """3: rows that 16-byte accesses cannot reach are copied."""
    assert_agrees(device, 30, extra=extra)
    inputs = draw(30, device, extra=extra)
    inputs["qkv"][:, 16 * D :] = float("nan")
    assert all(y.isfinite().all() for y in qk_norm_rope(**inputs))


@pytest.mark.parametrize("shift", [8, 3])
def test_slices(device, shift):
    inputs = draw(30, device, value_add=True)
    wide = torch.randn(30, 16 * D + 40).bfloat16().to(device)
    got = qk_norm_rope(**inputs | {"qkv": wide[:, shift : 16 * D + shift]})
    expected = qk_norm_rope(**inputs | {"qkv": wide[:, shift : 16 * D + shift].contiguous()})
    assert all(torch.equal(a, b) for a, b in zip(got, expected))


# ---- the raw backward ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_values", [False, True])
@pytest.mark.parametrize("in_place", [False, True])
def test_backward_writes_its_columns_only(device, with_values, in_place):
    """In place: the incoming gradients lie where the results go."""
    inputs = draw(50, device, extra=16)
    del inputs["value_add"]
    width = inputs["qkv"].shape[1]
    incoming = torch.randn(50, width).bfloat16().to(device)
    dq, dk, dv, _ = incoming.split([8 * D, 4 * D, 4 * D, 16], dim=1)
    expected = torch.full((50, width), 7.0).bfloat16().to(device)
    d_gain = OPS.qk_norm_rope_bwd_(expected, dq.clone(), dk.clone(), dv.clone() if with_values else None, *inputs.values())
    assert (expected[:, 16 * D :] == 7).all()
    assert torch.equal(expected[:, 12 * D : 16 * D], dv) if with_values else (expected[:, 12 * D :] == 7).all()
    if in_place:
        kept = incoming.clone()
        again = OPS.qk_norm_rope_bwd_(incoming, dq, dk, dv if with_values else None, *inputs.values())
        assert torch.equal(incoming[:, : 12 * D], expected[:, : 12 * D]) and torch.equal(again, d_gain)
        assert torch.equal(incoming[:, 12 * D :], kept[:, 12 * D :])


def test_no_rows(device):
    inputs = draw(0, device, value_add=True)
    leaves = [inputs["qkv"].requires_grad_(), inputs["gain"].requires_grad_()]
    q, k, v = qk_norm_rope(**inputs)
    assert q.shape == (0, 8 * D) and k.shape == v.shape == (0, 4 * D)
    d_qkv, d_gain = torch.autograd.grad(q.sum() + k.sum() + v.sum(), leaves)
    assert d_qkv.shape == (0, 16 * D) and (d_gain == 0).all()


def test_zero_heads_stay_finite(device):
    inputs = draw(20, device)
    inputs["qkv"].zero_()
    results = outputs_and_gradients(qk_norm_rope, inputs, [torch.ones(20, w * D, device=device).bfloat16() for w in (8, 4, 4)])
    assert all(x.isfinite().all() for x in results.values())


# ---- registration ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value_add", [False, True])
@pytest.mark.parametrize("half", [8, 3])
def test_opcheck(device, value_add, half):
    inputs = draw(6, device, 2, 1, half, value_add=value_add)
    torch.library.opcheck(OPS.qk_norm_rope_fwd, tuple(inputs.values()))
    trained = inputs | {"qkv": inputs["qkv"].clone().requires_grad_(), "gain": inputs["gain"].clone().requires_grad_()}
    torch.library.opcheck(OPS.qk_norm_rope_fwd, tuple(trained.values()))
    value_add = inputs.pop("value_add")
    dq, dk = (torch.randn(6, h * D, device=device).bfloat16() for h in (2, 1))
    torch.library.opcheck(OPS.qk_norm_rope_bwd_, (torch.zeros_like(inputs["qkv"]), dq, dk, value_add, *inputs.values()))


def test_compiles_whole(device):
    inputs = draw(33, device, value_add=True)
    gradients = [torch.randn(33, w * D, device=device).bfloat16() for w in (8, 4, 4)]
    compiled = torch.compile(qk_norm_rope, fullgraph=True)
    got, expected = (outputs_and_gradients(f, inputs, gradients) for f in (compiled, qk_norm_rope))
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value)


# ---- repeat, property -----------------------------------------------------------------------------------------


def test_repeats_bitwise(device):
    m = 20_000 if device.type == "cuda" else 50
    inputs = draw(m, device, value_add=True)
    gradients = [torch.randn(m, w * D, device=device).bfloat16() for w in (8, 4, 4)]
    first = outputs_and_gradients(qk_norm_rope, inputs, gradients)
    for _ in range(20 if device.type == "cuda" else 2):
        for name, value in outputs_and_gradients(qk_norm_rope, inputs, gradients).items():
            assert torch.equal(first[name], value), name


@pytest.mark.parametrize("half", [8, 32])
def test_scores_depend_on_the_distance_alone(device, half):
    """A rotation keeps each head's length, and the product of a query and a key depends on how far apart they stand."""
    inputs = draw(40, device, 1, 1, half, positions=40)
    angle = torch.arange(40, dtype=torch.float64)[:, None] * torch.rand(half, dtype=torch.float64)
    inputs |= {"cos": angle.cos().bfloat16().to(device), "sin": angle.sin().bfloat16().to(device)}
    inputs["qkv"][:] = inputs["qkv"][:1]
    inputs["gain"][:] = 1
    q, k, _ = (y.double() for y in qk_norm_rope(**inputs))
    torch.testing.assert_close(q.square().sum(-1), torch.full((40,), float(D), device=device, dtype=torch.float64), rtol=2e-2, atol=0)
    scores = q @ k.T
    assert (scores[1:, 1:] - scores[:-1, :-1]).abs().max() <= 0.02 * D


# ---- bad input ------------------------------------------------------------------------------------------------


def test_bad_input_names_the_argument():
    good = draw(4, "cpu", 2, 1, value_add=True)
    for error, name, change in (
        (ValueError, "qkv", good["qkv"][0]),
        (ValueError, "qkv", good["qkv"][:, 1:]),
        (ValueError, "qkv", good["qkv"].long()),
        (ValueError, "gain", good["gain"][None]),
        (TypeError, "gain", good["gain"].bfloat16()),
        (ValueError, "num_kv_heads", 0),
        (ValueError, "cos", torch.zeros(5, 33).bfloat16()),
        (ValueError, "sin", good["sin"][1:]),
        (TypeError, "cos", good["cos"].float()),
        (ValueError, "value_add", good["value_add"][1:]),
    ):
        with pytest.raises(error, match=f"^{name}: "):
            qk_norm_rope(**good | {name: change})
