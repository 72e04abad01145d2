"""Attention's backward behind its output projection, against autograd through both."""

import pytest
import torch

from pgolf_fast.ops import qkv, xsa_output  # noqa: F401  defines the op
from pgolf_fast.ops.xsa_attention import documents_of, xsa_attention_ref
from tests.compare import assert_within
from tests.ops.test_xsa_attention import AWKWARD, inputs, plain_torch

NAMES = ("dq", "dk", "dv", "dgate")
# Lengths, tokens after the last, rows of the batch: 128 rows are a tile of the product, 256 two neighbours'.
CASES = {
    "one token": ([1], 0, 1),
    "one document": ([257], 0, 1),
    "rows of a dense batch": ([100], 0, 3),
    "documents around the tiles": (AWKWARD, 0, 1),
    "a tail without a document": ([130, 0, 5], 200, 1),
    "documents of one token": ([1] * 150, 0, 1),
}


def draw(lengths, tail=0, batch=1, gated=True, heads=(8, 4), width=512, dtype=torch.bfloat16, device="cuda", head_dim=64):
    case = inputs(lengths, heads, batch, tail, dtype if gated else None, dtype, device, head_dim)
    columns = heads[0] * head_dim
    d_projected = torch.randn(batch * (sum(lengths) + tail), width, dtype=torch.float64).to(device, dtype)
    weight = (width**-0.5 * torch.randn(width, columns, dtype=torch.float64)).to(device, dtype)
    return *case[:5], d_projected, weight


def ours(q, k, v, gate, cu_seqlens, d_projected, weight, xsa=True):
    ops, scale, documents = torch.ops.pgolf_fast, q.shape[-1] ** -0.5, documents_of(cu_seqlens, q.shape[1], q.shape[2] // k.shape[2])
    out, lse, own = ops.xsa_attention_fwd(q, k, v, gate, documents, xsa, scale)
    dqkv, dgate = ops.xsa_output_bwd(d_projected, weight, q, k, v, gate, out, lse, own, documents, xsa, scale)
    return dict(zip(NAMES, (*dqkv.split([q.shape[2], k.shape[2], v.shape[2]], dim=2), *([dgate] if gate is not None else []))))


def by_autograd(attention, q, k, v, gate, cu_seqlens, d_projected, weight, xsa=True, dtype=None):
    leaves = [x if x is None else x.detach().to(dtype or x.dtype).requires_grad_() for x in (q, k, v, gate)]
    out = attention(*leaves[:3], gate=leaves[3], cu_seqlens=cu_seqlens, xsa=xsa)
    projected = out.flatten(0, 1).flatten(1) @ weight.to(out.dtype).T
    return dict(zip(NAMES, torch.autograd.grad(projected, [x for x in leaves if x is not None], d_projected.to(out.dtype))))


def assert_agrees(case, **options):
    found, peer = ours(*case, **options), by_autograd(plain_torch, *case, **options)
    truth = by_autograd(xsa_attention_ref, *case, dtype=torch.float64, **options)
    for name in truth:
        if truth[name].abs().max() < 1e-12:  # tokens that see only themselves, or none
            assert found[name].abs().max() <= 2**-4 * case[5].abs().max(), name
        else:
            assert_within(found[name], peer[name], truth[name], name, floor=3e-4)


RAW_NAMES = ("dq", "dk", "dv", "dgain")


def draw_raw(lengths, tail=0, batch=1, heads=(8, 4), positions=100, rotated=16, **options):
    """A case whose queries, keys and values are still to be made: raw [M, W], gain, cos, sin and the case."""
    case = draw(lengths, tail, batch, heads=heads, gated=False, **options)
    rows, like = batch * (sum(lengths) + tail), dict(dtype=case[0].dtype, device=case[0].device)
    raw = torch.randn(rows, (heads[0] + 2 * heads[1]) * case[0].shape[3], dtype=torch.float64).to(**like)
    gain = (1 + torch.rand(heads[0], dtype=torch.float64)).to(like["device"], torch.promote_types(like["dtype"], torch.float32))
    angle = torch.arange(positions, dtype=torch.float64)[:, None] * 0.7 ** torch.arange(rotated // 2)
    return raw, gain, angle.cos().to(**like), angle.sin().to(**like), case


def of_raw(raw, gain, cos, sin, case):
    ops, (q, k, v, _, cu_seqlens, d_projected, weight) = torch.ops.pgolf_fast, case
    heads, scale = [x.shape[2] for x in (q, k, v)], q.shape[-1] ** -0.5
    documents = documents_of(cu_seqlens, q.shape[1], heads[0] // heads[1])
    made = raw.clone()
    rstd = ops.qkv_normalize(made, gain, cos, sin, heads[1])
    q, k, v = made.view(*q.shape[:2], sum(heads), q.shape[3]).split(heads, dim=2)
    out, lse, own = ops.xsa_attention_fwd(q, k, v, None, documents, True, scale)
    dgain = torch.ones_like(gain)
    rest = q, k, v, None, out, lse, own, documents, True, scale, rstd, gain, cos, sin, dgain
    draw, _ = ops.xsa_output_bwd(d_projected, weight, *rest)
    return dict(zip(RAW_NAMES, (*draw.split(heads, dim=2), dgain - 1)))


def of_raw_by_autograd(attention, raw, gain, cos, sin, case, dtype=None):
    q, k, v, _, cu_seqlens, d_projected, weight = case
    heads, dtype = [x.shape[2] for x in (q, k, v)], dtype or raw.dtype
    raw, gain = raw.detach().to(dtype).requires_grad_(), gain.to(dtype).requires_grad_()
    made = qkv.qkv_ref(raw, torch.eye(raw.shape[1], dtype=dtype, device=raw.device), gain, cos.to(dtype), sin.to(dtype), heads[1])
    shape = *q.shape[:2], sum(heads), q.shape[3]
    out = attention(*made.to(dtype).view(shape).split(heads, dim=2), cu_seqlens=cu_seqlens)
    projected = out.flatten(0, 1).flatten(1) @ weight.to(dtype).T
    draw, dgain = torch.autograd.grad(projected, (raw, gain), d_projected.to(dtype))
    return dict(zip(RAW_NAMES, (*draw.view(shape).split(heads, dim=2), dgain)))


@pytest.mark.parametrize("packed", [True, False])
def test_definition_of_the_raw_gradient(packed):
    shape = {"lengths": [3, 0, 1, 6, 0], "tail": 2} if packed else {"lengths": [7], "batch": 2}
    case = draw_raw(**shape, heads=(4, 2), positions=5, rotated=4, width=6, dtype=torch.float64, device="cpu", head_dim=6)
    truth = of_raw_by_autograd(xsa_attention_ref, *case)
    for name, gradient in of_raw(*case).items():
        torch.testing.assert_close(gradient, truth[name], rtol=1e-9, atol=1e-9)


@pytest.mark.cuda
@pytest.mark.parametrize("heads", [(8, 4), (2, 1), (4, 4)])
@pytest.mark.parametrize("case", CASES)
def test_agreement_of_the_raw_gradient(case, heads):
    lengths, tail, batch = CASES[case]
    case = draw_raw(lengths, tail, batch, heads)
    found, peer = of_raw(*case), of_raw_by_autograd(plain_torch, *case)
    truth = of_raw_by_autograd(xsa_attention_ref, *case, dtype=torch.float64)
    for name in truth:
        if truth[name].abs().max() < 1e-12:  # tokens that see only themselves, or none
            assert found[name].abs().max() <= 2**-4 * case[4][5].abs().max(), name
        else:
            assert_within(found[name], peer[name], truth[name], name, floor=1e-2 if name == "dgain" else 3e-4)


@pytest.mark.parametrize("xsa", [True, False])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("packed", [True, False])
def test_definition(xsa, gated, packed):
    shape = {"lengths": [3, 0, 1, 6, 0], "tail": 2} if packed else {"lengths": [7], "batch": 2}
    case = draw(**shape, gated=gated, heads=(4, 2), width=6, dtype=torch.float64, device="cpu", head_dim=5)
    truth = by_autograd(xsa_attention_ref, *case, xsa=xsa)
    for name, gradient in ours(*case, xsa=xsa).items():
        torch.testing.assert_close(gradient, truth[name], rtol=1e-9, atol=1e-9)


@pytest.mark.cuda
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_agreement_at_the_seams(case, gated):
    """Memory is poisoned here, so an element that is not written shows."""
    lengths, tail, batch = CASES[case]
    assert_agrees(draw(lengths, tail, batch, gated))


@pytest.mark.cuda
def test_nothing_but_a_tail():
    for gradient in ours(*draw([0, 0], 140)).values():
        assert gradient.eq(0).all()


@pytest.mark.cuda
@pytest.mark.parametrize("heads, width", [((2, 1), 64), ((4, 2), 504), ((4, 2), 520), ((16, 8), 1024)])
def test_other_widths(heads, width):
    assert_agrees(draw([90, 200], heads=heads, width=width), xsa=False)


@pytest.mark.cuda
@pytest.mark.parametrize("lengths, batch", [([700, 1, 2000, 0, 64, 1500, 3000], 1), ([1024], 8), ([1024], 18)])
def test_at_the_size_of_many_tiles(lengths, batch):
    """More tiles than clusters, 66: results are computed under the products of the next, and from a cluster's third tile on (256 tokens
    by two heads each) where an earlier one has been staged: 18 rows are 288 tiles."""
    assert_agrees(draw(lengths, batch=batch))


@pytest.mark.cuda
def test_a_gate_of_zero():
    """Passes nothing on, and its own gradient is given as 0."""
    case = draw([200])
    case[3][:, 3:90:2] = 0
    found, truth = ours(*case), by_autograd(xsa_attention_ref, *case, dtype=torch.float64)
    assert found["dgate"][:, 3:90:2].eq(0).all()
    for name in NAMES[:3]:
        assert_within(found[name], by_autograd(plain_torch, *case)[name], truth[name], name, floor=3e-4)


@pytest.mark.cuda
def test_an_identity_projection_is_the_attention_alone():
    q, k, v, gate, cu_seqlens, d_projected, _ = draw([300, 77, 1])
    weight = torch.eye(512, device="cuda", dtype=torch.bfloat16)
    found = ours(q, k, v, gate, cu_seqlens, d_projected, weight)
    ops, scale, documents = torch.ops.pgolf_fast, 64**-0.5, documents_of(cu_seqlens, 378, 2)
    forward = ops.xsa_attention_fwd(q, k, v, gate, documents, True, scale)
    dqkv, dgate = ops.xsa_attention_bwd_packed(d_projected.view(q.shape), q, k, v, gate, *forward, documents, True, scale)
    for name, expected in zip(NAMES, (*dqkv.split([8, 4, 4], dim=2), dgate)):
        torch.testing.assert_close(found[name], expected, rtol=2**-6, atol=2**-6)


@pytest.mark.cuda
def test_two_runs_agree():
    case = draw(AWKWARD)
    first, second = ours(*case), ours(*case)
    assert all(torch.equal(first[name], second[name]) for name in NAMES)


@pytest.mark.cuda
def test_what_the_kernel_does_not_serve_goes_through_two_ops():
    assert_agrees(draw([90], heads=(4, 4)))
    q, k, v, gate, *rest = draw([90])
    assert_agrees((q, k, v, gate.float(), *rest))


def test_registration(device):
    q, k, v, gate, cu_seqlens, d_projected, weight = draw([5, 9], heads=(4, 2), width=64, device=device)
    documents = documents_of(cu_seqlens, 14, 2)
    out, lse, own = torch.ops.pgolf_fast.xsa_attention_fwd(q, k, v, gate, documents, True, 0.125)
    for gate in (gate, None):
        arguments = (d_projected, weight, q, k, v, gate, out, lse, own, documents, True, 0.125)
        torch.library.opcheck(torch.ops.pgolf_fast.xsa_output_bwd.default, arguments)
    gain, table = torch.ones(4, device=device), torch.ones(14, 8, device=device, dtype=torch.bfloat16)
    raw = torch.rand(14, 6, device=device), gain, table, table, torch.zeros_like(gain)
    torch.library.opcheck(torch.ops.pgolf_fast.xsa_output_bwd.default, (*arguments, *raw))
