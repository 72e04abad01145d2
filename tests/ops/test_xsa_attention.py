import math

import pytest
import torch
import torch.nn.functional as F

from pgolf_fast.ops.xsa_attention import NOT_OF_RAW, _composite, documents_of, xsa_attention, xsa_attention_ref
from tests.compare import assert_within, relative_error

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]
# 0, 1 and the neighbours of one, two and three 64-token tiles; padding entries in the middle and at the end.
AWKWARD = [65, 0, 1, 64, 193, 0, 63, 127, 192, 1, 129, 191, 128, 0, 0, 0]


def inputs(lengths, heads=(8, 4), batch=1, tail=0, gate=None, dtype=torch.bfloat16, device="cuda", width=64, spread=1.0):
    """q, k, v as slices of one packed buffer, gate, cu_seqlens, and an incoming gradient."""
    tokens = sum(lengths) + tail
    hq, hk = heads
    packed = torch.randn(batch, tokens, hq + 2 * hk, width, dtype=torch.float64)
    packed[:, :, :hq] *= spread
    q, k, v = packed.to(device, dtype).split([hq, hk, hk], dim=2)
    gate = None if gate is None else torch.rand(batch, tokens, hq, dtype=torch.float64).to(device, gate)
    cu_seqlens = None
    if batch == 1 and (len(lengths) > 1 or tail):
        cu_seqlens = torch.tensor([0, *lengths], device=device).cumsum(0).int()
    grad = torch.randn(batch, tokens, hq, width, dtype=torch.float64).to(device, dtype)
    return q, k, v, gate, cu_seqlens, grad


def plain_torch(q, k, v, xsa=True, gate=None, scale=None, cu_seqlens=None):
    """Torch's attention in the input dtype, one document at a time, and the projection in float32."""
    group = q.shape[2] // k.shape[2]
    ends = [0, q.shape[1]] if cu_seqlens is None else cu_seqlens.tolist()
    pieces = [torch.zeros_like(q[:, : ends[0]])]
    for start, end in zip(ends, ends[1:]):
        if start == end:
            continue
        qd, kd, vd = (x[:, start:end].transpose(1, 2) for x in (q, k, v))
        kd, vd = (x.repeat_interleave(group, dim=1) for x in (kd, vd))
        y = F.scaled_dot_product_attention(qd, kd, vd, is_causal=True, scale=scale).float()
        if xsa:
            direction = F.normalize(vd.float(), dim=-1)
            y = y - (y * direction).sum(-1, keepdim=True) * direction
        y = y.transpose(1, 2)
        pieces.append((y if gate is None else y * gate[:, start:end, :, None].float()).to(q.dtype))
    return torch.cat([*pieces, torch.zeros_like(q[:, ends[-1] :])], dim=1)


def outcome(fn, q, k, v, gate, cu_seqlens, grad, dtype=None, **options):
    """out, dq, dk, dv[, dgate] of `fn`, computed in `dtype`."""
    leaves = [x if x is None else x.detach().to(dtype or x.dtype).requires_grad_() for x in (q, k, v, gate)]
    out = fn(*leaves[:3], gate=leaves[3], cu_seqlens=cu_seqlens, **options)
    wanted = [x for x in leaves if x is not None]
    names = ("dq", "dk", "dv", "dgate")
    return {"out": out.detach(), **dict(zip(names, torch.autograd.grad(out, wanted, grad.to(out.dtype))))}


def assert_agrees(case, **options):
    q, k, v, gate, cu_seqlens, grad = case
    ours = outcome(xsa_attention, *case, **options)
    peer = outcome(plain_torch, *case, **options)
    truth = outcome(xsa_attention_ref, *case, dtype=torch.float64, **options)
    for name in truth:
        if truth[name].abs().max() < 1e-12:  # a token that sees only itself: out, dq and dk are 0, and dv two terms that cancel
            assert ours[name].abs().max() <= 2**-5 * case[-1].abs().max(), name
        else:
            assert_within(ours[name], peer[name], truth[name], name, floor=3e-4)


# ---- definition (CPU) -------------------------------------------------------------------------------


@pytest.mark.parametrize("xsa", [True, False])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("packed", [True, False])
def test_backward_matches_autograd_through_the_definition(xsa, gated, packed):
    shape = {"lengths": [3, 0, 1, 6, 0], "tail": 2} if packed else {"lengths": [7], "batch": 2}
    case = inputs(**shape, heads=(4, 2), gate=torch.float64 if gated else None, dtype=torch.float64, device="cpu", width=5)
    ours = outcome(xsa_attention, *case, xsa=xsa, scale=0.7)
    truth = outcome(xsa_attention_ref, *case, xsa=xsa, scale=0.7)
    for name in truth:
        torch.testing.assert_close(ours[name], truth[name], rtol=1e-10, atol=1e-12, msg=name)


def test_gradcheck():
    q, k, v, gate, cu_seqlens, _ = inputs([2, 3], tail=1, heads=(2, 1), gate=torch.float64, dtype=torch.float64, device="cpu", width=3)
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v, gate)]
    assert torch.autograd.gradcheck(lambda q, k, v, gate: xsa_attention(q, k, v, gate=gate, cu_seqlens=cu_seqlens), leaves)


def test_definition_matches_plain_torch():
    q, k, v, gate, cu_seqlens, grad = inputs([5, 0, 9], tail=2, gate=torch.float64, dtype=torch.float64, device="cpu", width=8)
    ours = xsa_attention_ref(q, k, v, gate=gate, cu_seqlens=cu_seqlens)
    # plain_torch projects in float32
    torch.testing.assert_close(ours, plain_torch(q, k, v, gate=gate, cu_seqlens=cu_seqlens), rtol=1e-5, atol=1e-5)


# ---- agreement and seams ------------------------------------------------------------------------------


@pytest.mark.cuda
@pytest.mark.parametrize("heads", [(8, 4), (4, 4), (4, 1), (3, 1)], ids=lambda h: f"{h[0]}to{h[1]}")
@pytest.mark.parametrize("lengths", [AWKWARD, [2048], [2047, 1, 2048], [300]], ids=["awkward", "2048", "long", "300"])
def test_agreement(lengths, heads):
    assert_agrees(inputs(lengths, heads))


@pytest.mark.cuda
@pytest.mark.parametrize("heads", [(8, 4), (3, 1)], ids=lambda h: f"{h[0]}to{h[1]}")
@pytest.mark.parametrize("lengths", [AWKWARD, [2047, 1, 2048]], ids=["awkward", "long"])
def test_scores_in_powers_of_2(lengths, heads):
    """A scale of ln 2, as the fused blocks have it: the kernels multiply no score."""
    assert_agrees(inputs(lengths, heads, gate=torch.bfloat16, spread=0.125 / math.log(2)), scale=math.log(2))


@pytest.mark.cuda
@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 191, 192, 193, 517])
def test_dense_batch_of_any_length(tokens):
    assert_agrees(inputs([tokens], batch=3))


@pytest.mark.cuda
@pytest.mark.parametrize("heads", [(8, 4), (3, 1)], ids=lambda h: f"{h[0]}to{h[1]}")
@pytest.mark.parametrize("batch", [1, 2, 4, 5, 8])
def test_dense_batch_of_any_size(batch, heads):
    """Four rows' blocks take turns in the grid."""
    assert_agrees(inputs([193], heads, batch, gate=torch.bfloat16))


@pytest.mark.cuda
@pytest.mark.parametrize("tail", [1, 200])
def test_tokens_after_the_last_document_are_zero(tail):
    case = inputs([100, 70, 0], tail=tail, gate=torch.float32)
    assert_agrees(case)
    for name, value in outcome(xsa_attention, *case).items():
        assert not value[:, 170:].any(), name


@pytest.mark.cuda
def test_no_document_at_all():
    q, k, v, _, _, grad = inputs([130])
    for cu_seqlens in (torch.zeros(1, dtype=torch.int32, device="cuda"), torch.zeros(5, dtype=torch.int32, device="cuda")):
        for name, value in outcome(xsa_attention, q, k, v, None, cu_seqlens, grad).items():
            assert not value.any(), name


@pytest.mark.cuda
def test_many_one_token_documents():
    assert_agrees(inputs([1] * 1500 + [70]), xsa=False)


@pytest.mark.cuda
def test_values_of_zero():
    q, k, v, gate, cu_seqlens, grad = inputs([200, 56])
    v = v.clone()
    v[:, ::3] = 0
    assert_agrees((q, k, v, gate, cu_seqlens, grad))


@pytest.mark.cuda
@pytest.mark.parametrize("spread", [5.0, 30.0])
@pytest.mark.parametrize("xsa", [True, False])
def test_large_scores(spread, xsa):
    assert_agrees(inputs([300, 77], spread=spread), xsa=xsa)


@pytest.mark.cuda
def test_huge_scores_stay_finite():
    # p is 0 or 1, so dq and dk are zero but for ties: what is left of them is rounding, in torch as here
    case = inputs([300, 77], spread=1e4)
    ours, peer, truth = outcome(xsa_attention, *case), outcome(plain_torch, *case), outcome(xsa_attention_ref, *case, dtype=torch.float64)
    for name in ("out", "dv"):
        assert_within(ours[name], peer[name], truth[name], name, floor=3e-4)
    assert all(torch.isfinite(value).all() for value in ours.values())


@pytest.mark.cuda
@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("score", [110, -110])
@pytest.mark.parametrize("heads", [(8, 4), (4, 4)], ids=lambda h: f"{h[0]}to{h[1]}")
@pytest.mark.parametrize("lengths", [[300], [70, 0, 257, 130]], ids=["dense", "packed"])
def test_rows_that_need_a_shift(lengths, heads, score, every):
    """All scores of some rows lie around `score`: beyond 2^80 or below 2^-80, where exponentials are not taken as they are."""
    q, k, v, gate, cu_seqlens, grad = inputs(lengths, heads)
    push = math.sqrt(8 * abs(score)) / 8  # times itself in 64 dimensions, times the scale of 1 / 8
    q[:, ::every] += push
    k += math.copysign(push, score)
    group = heads[0] // heads[1]
    own = 0.125 * (q.float() * k.float().repeat_interleave(group, 2)).sum(-1) / math.log(2)
    assert (own * math.copysign(1, score) > 80)[:, ::every].float().mean() > 0.9, "the case does not leave the range"
    assert_agrees((q, k, v, gate, cu_seqlens, grad))


@pytest.mark.cuda
def test_gradients_into_slices_of_a_packed_buffer():
    """The launching op writes dq, dk and dv where it is told, strides and all."""
    q, k, v, _, cu_seqlens, grad = inputs([100, 65])
    expected = outcome(xsa_attention, q, k, v, None, cu_seqlens, grad)
    documents = documents_of(cu_seqlens, 165, 2)
    out, lse, own = torch.ops.pgolf_fast.xsa_attention_fwd(q, k, v, None, documents, True, 0.125)
    packed = torch.full((1, 165, 16, 64), math.nan, dtype=torch.bfloat16, device="cuda")
    dq, dk, dv = packed.split([8, 4, 4], dim=2)
    scratch = torch.empty_like(out), torch.empty(8, 2, 168 + 4 * len(documents[1]), device="cuda")
    torch.ops.pgolf_fast_sm90.xsa_attention_bwd(
        grad, q, k, v, None, out, lse, own, *documents, dq, dk, dv, None, *scratch, *NOT_OF_RAW, True, 0.125
    )
    for name, value in (("dq", dq), ("dk", dk), ("dv", dv)):
        assert torch.equal(value, expected[name]), name


# ---- every switch -------------------------------------------------------------------------------------


@pytest.mark.cuda
@pytest.mark.parametrize("gate", [None, torch.bfloat16, torch.float32], ids=["ungated", "bf16", "fp32"])
@pytest.mark.parametrize("xsa", [True, False])
def test_switches(xsa, gate):
    assert_agrees(inputs([257, 190], gate=gate), xsa=xsa, scale=0.2)


@pytest.mark.cuda
@pytest.mark.parametrize("xsa", [True, False])
def test_gates_of_exactly_zero_have_a_gradient(xsa):
    q, k, v, gate, cu_seqlens, grad = inputs([70, 65], gate=torch.float32)
    gate[:, ::5] = 0
    gate[:, 1::7] *= -1
    assert_agrees((q, k, v, gate, cu_seqlens, grad), xsa=xsa)


@pytest.mark.cuda
def test_inputs_of_any_layout():
    q, k, v, gate, cu_seqlens, grad = inputs([150], gate=torch.float32)
    expected = outcome(xsa_attention, q, k, v, gate, cu_seqlens, grad)
    odd = torch.zeros(q.numel() + 1, dtype=q.dtype, device="cuda")[1:].view(q.shape).copy_(q)  # 2-byte aligned
    transposed = k.transpose(2, 3).contiguous().transpose(2, 3)  # last dimension not contiguous
    gate_t = gate.transpose(1, 2).contiguous().transpose(1, 2)
    spread_grad = grad.new_zeros(*grad.shape, 2).copy_(grad[..., None])[..., 0]
    for name, value in outcome(xsa_attention, odd, transposed, v, gate_t, cu_seqlens, spread_grad).items():
        assert torch.equal(value, expected[name]), name
    # an expanded incoming gradient, as of out.sum(), has strides of 0
    leaf = q.detach().requires_grad_()
    (dq,) = torch.autograd.grad(xsa_attention(leaf, k, v).sum(), [leaf])
    (same,) = torch.autograd.grad(xsa_attention(leaf, k, v), [leaf], torch.ones_like(q))
    assert torch.equal(dq, same)


# ---- property: no reference needed ------------------------------------------------------------------------


def test_output_is_orthogonal_to_its_own_value(device):
    q, k, v, _, cu_seqlens, _ = inputs([130, 1, 61], device=device)
    out = xsa_attention(q, k, v, cu_seqlens=cu_seqlens).float()
    v = v.float().repeat_interleave(2, dim=2)
    # each of 64 products carries the rounding of out, 2^-9 of it; where little is left of y, float32's of y itself
    assert ((out * v).sum(-1).abs() <= 2**-9 * (out.abs() * v.abs()).sum(-1) + 1e-6 * (v * v).sum(-1)).all()


@pytest.mark.parametrize("device", DEVICES)
def test_a_document_sees_no_other(device):
    case = inputs([70, 129, 5, 64], gate=torch.float32, device=device)
    q, k, v, gate, cu_seqlens, grad = case
    before = outcome(xsa_attention, *case)
    changed = [x.clone() for x in (q, k, v, gate, grad)]
    for x in changed:
        x[:, 70:199] = torch.randn_like(x[:, 70:199])
    after = outcome(xsa_attention, *changed[:4], cu_seqlens, changed[4])
    for name in before:
        for others in (slice(0, 70), slice(199, None)):
            assert torch.equal(before[name][:, others], after[name][:, others]), name
        assert not torch.equal(before[name][:, 70:199], after[name][:, 70:199]), name


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("heads", [(8, 4), (3, 1)], ids=lambda h: f"{h[0]}to{h[1]}")
@pytest.mark.parametrize("tokens, queries", [(200, 1), (200, 63), (200, 64), (200, 65), (256, 64), (256, 192), (130, 129), (333, 140)])
def test_last_queries_of_longer_keys_are_the_end_of_all(device, heads, tokens, queries):
    """Tiles are counted from the first key, so on the GPU even the order of the sums is the same."""
    q, k, v, gate, _, _ = inputs([tokens], heads, batch=2, gate=torch.float32, device=device)
    for xsa in (True, False):
        whole = torch.ops.pgolf_fast.xsa_attention_fwd(q, k, v, gate, [], xsa, 0.125)
        ends = q[:, -queries:], k, v, gate[:, -queries:]
        part = torch.ops.pgolf_fast.xsa_attention_fwd(*ends, [], xsa, 0.125)
        for name, x, expected in zip(("out", "lse", "own"), part, (whole[0][:, -queries:], *(x[:, :, -queries:] for x in whole[1:]))):
            if device == "cuda":
                assert torch.equal(x, expected), name
            else:
                torch.testing.assert_close(x, expected, msg=name)
        reference = xsa_attention_ref(*(x.double() for x in ends[:3]), gate=ends[3].double(), xsa=xsa)
        peer = xsa_attention_ref(*ends[:3], gate=ends[3], xsa=xsa)
        # In the norm only: the worst of so few elements says little, and on the GPU they are the whole forward's, bit for bit.
        assert relative_error(part[0], reference) <= 2 * relative_error(peer, reference) + 1e-7


def test_composite_of_last_queries():
    q, k, v, gate, _, _ = inputs([70], batch=2, gate=torch.float32, device="cpu")
    found = _composite(q[:, -9:], k, v, True, gate[:, -9:], 0.125, None, 70)
    torch.testing.assert_close(found, xsa_attention_ref(q, k, v, gate=gate)[:, -9:], rtol=0.02, atol=0.02)


# ---- registration -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("gated", [True, False])
def test_opcheck(device, gated):
    q, k, v, gate, cu_seqlens, _ = inputs([20, 0, 50], gate=torch.float32 if gated else None, device=device)
    leaves = [x if x is None else x.detach().clone().requires_grad_() for x in (q, k, v, gate)]
    for documents in (documents_of(cu_seqlens, 70, 2), []):
        torch.library.opcheck(torch.ops.pgolf_fast.xsa_attention_fwd, (*leaves, documents, True, 0.125))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("gated", [False, True])
def test_packed_gradients_are_the_same_side_by_side(device, gated):
    q, k, v, gate, cu_seqlens, grad = inputs([20, 0, 50], gate=torch.float32 if gated else None, device=device)
    ops = torch.ops.pgolf_fast
    documents = documents_of(cu_seqlens, 70, 2)
    forward = ops.xsa_attention_fwd(q, k, v, gate, documents, True, 0.125)
    arguments = (grad, q, k, v, gate, *forward, documents, True, 0.125)
    *apart, dgate = ops.xsa_attention_bwd(*arguments)
    dqkv, same_dgate = ops.xsa_attention_bwd_packed(*arguments)
    assert torch.equal(dqkv, torch.cat(apart, dim=2)) and torch.equal(dgate, same_dgate)
    torch.library.opcheck(ops.xsa_attention_bwd_packed, arguments)


@pytest.mark.parametrize("device", DEVICES)
def test_fullgraph_compile(device):
    case = inputs([20, 0, 50], gate=torch.float32, device=device)
    expected = outcome(xsa_attention, *case)
    backend = "inductor" if device == "cuda" else "aot_eager"
    for name, value in outcome(torch.compile(xsa_attention, fullgraph=True, backend=backend), *case).items():
        torch.testing.assert_close(value, expected[name], msg=name)


@pytest.mark.cuda
def test_graph_replay_follows_cu_seqlens():
    q, k, v, gate, cu_seqlens, grad = inputs([100, 200, 212], gate=torch.bfloat16)
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v, gate)]

    def step():
        out = xsa_attention(*leaves[:3], gate=leaves[3], cu_seqlens=cu_seqlens)
        return out, *torch.autograd.grad(out, leaves, grad)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for ends in ([0, 100, 300, 512], [0, 512, 512, 512], [0, 1, 65, 500]):
        cu_seqlens.copy_(torch.tensor(ends))
        graph.replay()
        for value, expected in zip(captured, step()):
            assert torch.equal(value, expected), ends


@pytest.mark.cuda
def test_runs_on_the_current_stream():
    case = inputs([500, 30])
    expected = outcome(xsa_attention, *case)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        late = [x.clone() if x is not None else None for x in case]
        values = outcome(xsa_attention, *late)
    stream.synchronize()
    for name in expected:
        assert torch.equal(values[name], expected[name]), name


# ---- repeatability ------------------------------------------------------------------------------------------


@pytest.mark.cuda
def test_same_bits_every_run():
    case = inputs(AWKWARD * 3, gate=torch.bfloat16)
    first = outcome(xsa_attention, *case)
    for _ in range(20):
        for name, value in outcome(xsa_attention, *case).items():
            assert torch.equal(value, first[name]), name


# ---- bad input ------------------------------------------------------------------------------------------------


def test_bad_input_names_the_argument():
    q, k, v, gate, cu_seqlens, _ = inputs([4, 3], gate=torch.float32, device="cpu")
    with pytest.raises(ValueError, match="k: expected"):
        xsa_attention(q, k[:, :5], v)
    with pytest.raises(TypeError, match="v: expected bfloat16, got float32"):
        xsa_attention(q, k, v.float())
    with pytest.raises(ValueError, match="q: 8 heads are not a multiple of k's 3"):
        xsa_attention(q, k[:, :, :3], v[:, :, :3])
    with pytest.raises(ValueError, match="gate: expected"):
        xsa_attention(q, k, v, gate=gate[:, :, :2])
    with pytest.raises(TypeError, match="cu_seqlens: expected int32, got int64"):
        xsa_attention(q, k, v, cu_seqlens=cu_seqlens.long())
    with pytest.raises(ValueError, match="cu_seqlens: packed documents need B = 1"):
        xsa_attention(*(x.repeat(2, 1, 1, 1) for x in (q, k, v)), cu_seqlens=cu_seqlens)
    with pytest.raises(ValueError, match="v: expected .* like k"):
        xsa_attention(q[:, :5], k, v[:, :6])
    with pytest.raises(ValueError, match="q: shorter than k, which serves the forward only"):
        xsa_attention(q[:, :5].requires_grad_(), k, v)
    with pytest.raises(ValueError, match="cu_seqlens: packed documents need as many queries as keys"):
        xsa_attention(q[:, :5], k, v, cu_seqlens=cu_seqlens)
    with pytest.raises(ValueError, match="scale: expected > 0"):
        xsa_attention(q, k, v, scale=0.0)


@pytest.mark.cuda
def test_other_head_widths_take_the_composite():
    q, k, v, *_ = inputs([8], width=32)
    assert_within(xsa_attention(q, k, v), xsa_attention_ref(q, k, v), xsa_attention_ref(q.double(), k.double(), v.double()), "out")


@pytest.mark.cuda
def test_kernel_limits_are_said():
    with pytest.raises(TypeError, match="q: expected bfloat16, got float16"):
        xsa_attention(*inputs([8], dtype=torch.float16)[:3])


@pytest.mark.parametrize("device", DEVICES)
def test_empty_input(device):
    q, k, v, *_ = inputs([0], device=device)
    assert xsa_attention(q, k, v).shape == (1, 0, 8, 64)
