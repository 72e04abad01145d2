"""mix_norm: a per-channel mix of up to five tensors and its RMSNorm; one gradient per row of coefficients."""

import pytest
import torch

from pgolf_fast.ops import mix_norm
from pgolf_fast.ops.mix_norm import mix_norm_ref, row_rstd
from tests.compare import assert_within

WIDTH = 512  # of the kernels
OPS = torch.ops.pgolf_fast

# Every number of tensors; a row each, shared rows, shared rows that are not neighbours, one row for all.
ROWS = [(0,), (0, 0), (0, 1), (1, 0), (0, 0, 1), (0, 1, 0), (0, 1, 2)]
ROWS += [(0, 0, 1, 2), (0, 1, 2, 3), (0, 0, 0, 0), (0, 0, 1, 2, 2), (0, 1, 2, 3, 4)]
# Rows of the matrix: one, less than a block's, one more than a block's, a prime over a full grid of 528 blocks of four warps.
SEAMS = [1, 3, 9, 4243]


def draw(rows, m, device, width=WIDTH, dtype=torch.bfloat16, scaled=True):
    tensors = [torch.randn(m, width, dtype=torch.float64).to(dtype).to(device) for _ in rows]
    wide = torch.promote_types(dtype, torch.float32)
    coefficients = torch.randn(max(rows) + 1, width, dtype=torch.float64).to(wide).to(device) if scaled else None
    return tensors, coefficients


def outputs_and_gradients(function, tensors, coefficients, rows, norm_scale, d_mixed, d_normed, **how):
    """(mixed, normed, one gradient per tensor, the coefficients' gradient), those not asked for left out."""
    tensors = [t.detach().requires_grad_() for t in tensors]
    leaves = list(tensors)
    if coefficients is not None:
        coefficients = coefficients.detach().requires_grad_(how.get("train_coefficients", True))
        leaves += [coefficients] if coefficients.requires_grad else []
    mixed, normed = function(tensors, coefficients, rows, norm_scale)
    pairs = [(y, d) for y, d in ((mixed, d_mixed), (normed, d_normed)) if d is not None]
    gradients = torch.autograd.grad([y for y, _ in pairs], leaves, [d for _, d in pairs])
    return {"mixed": mixed.detach(), **({"normed": normed.detach()} if norm_scale is not None else {})} | {
        f"gradient {i}": g for i, g in enumerate(gradients)
    }


def peer(tensors, coefficients, rows, norm_scale):
    mixed, normed = mix_norm_ref(tensors, coefficients, rows, 1.0 if norm_scale is None else norm_scale)
    return mixed, normed


def assert_agrees(rows, m, device, width=WIDTH, scaled=True, norm_scale=0.7, with_mixed=True, with_normed=True, **how):
    tensors, coefficients = draw(rows, m, device, width, scaled=scaled)
    d_mixed, d_normed = (torch.randn(m, width).bfloat16().to(device) if wanted else None for wanted in (with_mixed, with_normed))
    ours = outputs_and_gradients(mix_norm, tensors, coefficients, rows, norm_scale, d_mixed, d_normed, **how)

    def on_cpu(dtype):
        move = lambda x, to=dtype: None if x is None else x.cpu().to(to)  # noqa: E731
        wide = torch.promote_types(dtype, torch.float32)
        inputs = [move(t) for t in tensors], move(coefficients, wide), rows, norm_scale, move(d_mixed), move(d_normed)
        return outputs_and_gradients(peer, *inputs, **how)

    torchs, truth = on_cpu(torch.bfloat16), on_cpu(torch.float64)
    for name, value in ours.items():
        # One more rounding than a peer that may have none to make (a gradient that is an input of its).
        assert_within(value, torchs[name], truth[name], name, floor=2**-8)


# ---- definition -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("norm_scale", [None, 0.5])
def test_definition(rows, scaled, norm_scale):
    rows = rows if scaled else (0,) * len(rows)
    tensors, coefficients = draw(rows, 3, "cpu", 10, torch.float64, scaled)
    mixed, normed = mix_norm(tensors, coefficients, rows, norm_scale)
    by_hand = sum((coefficients[r] if scaled else 1) * t for r, t in zip(rows, tensors))
    torch.testing.assert_close(mixed, by_hand)
    if norm_scale is None:
        assert normed is None
    else:
        torch.testing.assert_close(normed, norm_scale * torch.nn.functional.rms_norm(by_hand, (10,), eps=2.0**-23))
    leaves = [t.requires_grad_() for t in tensors] + ([coefficients.requires_grad_()] if scaled else [])

    def function(*leaves):
        results = mix_norm(leaves[: len(rows)], leaves[-1] if scaled else None, rows, norm_scale)
        return tuple(y for y in results if y is not None)

    assert torch.autograd.gradcheck(function, leaves)


def test_rows_left_out():
    tensors, coefficients = draw((0, 1, 2), 5, "cpu")
    assert torch.equal(mix_norm(tensors, coefficients)[0], mix_norm(tensors, coefficients, (0, 1, 2))[0])
    assert torch.equal(mix_norm(tensors)[0], mix_norm(tensors, None, (0, 0, 0))[0])


# ---- agreement, seams -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("m", [9, 200])
def test_mixes(device, rows, m):
    assert_agrees(rows, m, device)


@pytest.mark.parametrize("m", SEAMS)
def test_row_counts(device, m):
    assert_agrees((0, 0, 1), m, device)
    assert_agrees((0, 0), m, device, scaled=False)


@pytest.mark.cuda
@pytest.mark.parametrize("rows,scaled", [((0, 0), False), ((0, 0, 1), True), ((0, 0, 1, 2), True)])
def test_real_shape(rows, scaled):
    assert_agrees(rows, 98_304, "cuda", scaled=scaled)


@pytest.mark.parametrize("width", [8, 504, 520, 1024])
def test_other_widths(device, width):
    """The kernel's width is 512; the formula serves these."""
    assert_agrees((0, 0, 1), 20, device, width)


def test_leading_dimensions_and_strides(device):
    tensors, coefficients = draw((0, 1), 24, device)
    wide = torch.randn(4, 6, WIDTH + 64).bfloat16().to(device)
    sliced = wide[..., 8 : WIDTH + 8]
    mixed, normed = mix_norm([tensors[0].view(4, 6, WIDTH), sliced], coefficients)
    expected = mix_norm([tensors[0], sliced.reshape(24, WIDTH).contiguous()], coefficients)
    assert mixed.shape == normed.shape == (4, 6, WIDTH)
    assert torch.equal(mixed.view(24, WIDTH), expected[0]) and torch.equal(normed.view(24, WIDTH), expected[1])
    shifted = wide[..., 3 : WIDTH + 3]  # not on 16 bytes
    assert torch.equal(mix_norm([shifted], norm_scale=2.0)[1], mix_norm([shifted.clone()], norm_scale=2.0)[1])


# ---- switches -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [(0,), (0, 0), (0, 1), (0, 0, 1), (0, 1, 2, 3, 4)])
@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("with_mixed,with_normed", [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize("train_coefficients", [True, False])
def test_gradients_that_are_missing(device, rows, scaled, with_mixed, with_normed, train_coefficients):
    rows = rows if scaled else (0,) * len(rows)
    assert_agrees(rows, 50, device, scaled=scaled, with_mixed=with_mixed, with_normed=with_normed, train_coefficients=train_coefficients)


@pytest.mark.parametrize("rows,scaled", [((0,), True), ((0, 0), False), ((0, 0, 1), True)])
def test_without_norm(device, rows, scaled):
    assert_agrees(rows, 50, device, scaled=scaled, norm_scale=None, with_normed=False)


@pytest.mark.parametrize("norm_scale", [1.0, 11**-0.5, -2.0, 0.0])
def test_norm_scales(device, norm_scale):
    assert_agrees((0, 0, 1), 50, device, norm_scale=norm_scale)


@pytest.mark.parametrize("scaled,rows", [(True, (0, 0, 1)), (True, (0, 1, 2, 3, 4)), (False, (0, 0, 0))])
@pytest.mark.parametrize("train_coefficients", [True, False])
def test_accumulate(device, scaled, rows, train_coefficients):
    """What is added to a gradient is added before its rounding, to its own row only."""
    tensors, coefficients = draw(rows, 50, device, scaled=scaled)
    mixed, _, rstd = OPS.mix_norm_fwd(tensors, coefficients, rows, 0.5)
    d_mixed, d_normed, incoming = (torch.randn(50, WIDTH).bfloat16().to(device) for _ in range(3))
    trained = scaled and train_coefficients
    given = (None, rstd, tensors) if trained else (mixed, rstd, [])
    none = [None] * (max(rows) + 1)
    wide = [x.cpu().double() if x is not None else None for x in (d_mixed, d_normed, mixed, rstd)]
    c = coefficients.cpu().double() if scaled else None
    plain, _ = OPS.mix_norm_bwd(*wide, [], c, rows, 0.5, none)
    for r in range(len(none)):
        accumulate = none[:r] + [incoming] + none[r + 1 :]
        gradients, d_coefficients = OPS.mix_norm_bwd(d_mixed, d_normed, *given, coefficients, rows, 0.5, accumulate)
        assert len(gradients) == len(none) and d_coefficients.numel() == (len(none) * WIDTH if trained else 0)
        for i, gradient in enumerate(gradients):
            truth = plain[i] + (incoming.cpu().double() if i == r else 0)
            assert ((gradient.cpu().double() - truth).abs() <= 2**-8 * truth.abs() + 1e-5 * truth.abs().max()).all()


def test_shared_rows_share_their_gradient(device):
    """One tensor per coefficient row comes back from the raw backward, not one per input."""
    tensors, coefficients = draw((0, 1, 0), 20, device)
    d = torch.randn(20, WIDTH).bfloat16().to(device)
    gradients, d_coefficients = OPS.mix_norm_bwd(d, None, None, None, tensors, coefficients, (0, 1, 0), 1.0, [None, None])
    assert len(gradients) == 2 and d_coefficients.shape == (2, WIDTH)
    autograd = outputs_and_gradients(mix_norm, tensors, coefficients, (0, 1, 0), None, d, None)
    for i, r in enumerate((0, 1, 0)):
        assert torch.equal(autograd[f"gradient {i}"], gradients[r])


def test_no_rows(device):
    tensors, coefficients = draw((0, 1), 0, device)
    coefficients.requires_grad_()
    mixed, normed = mix_norm([t.requires_grad_() for t in tensors], coefficients)
    assert mixed.shape == normed.shape == (0, WIDTH)
    (mixed.sum() + normed.sum()).backward()
    assert tensors[0].grad.shape == (0, WIDTH) and (coefficients.grad == 0).all()


def test_no_gradient_wanted(device):
    tensors, coefficients = draw((0, 1), 5, device)
    mixed, normed = mix_norm(tensors, coefficients)
    assert not mixed.requires_grad and not normed.requires_grad


# ---- registration ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [WIDTH, 24])
@pytest.mark.parametrize("rows,scaled,norm_scale", [((0, 0, 1), True, 0.5), ((0, 0), False, 0.5), ((0,), False, 1.0), ((0, 1), True, None)])
def test_opcheck(device, width, rows, scaled, norm_scale):
    tensors, coefficients = draw(rows, 6, device, width, scaled=scaled)
    torch.library.opcheck(OPS.mix_norm_fwd, (tensors, coefficients, rows, norm_scale))
    leaves = [t.clone().requires_grad_() for t in tensors]
    trained = coefficients.clone().requires_grad_() if scaled else None
    torch.library.opcheck(OPS.mix_norm_fwd, (leaves, trained, rows, norm_scale))
    if norm_scale is None:
        return
    mixed, _, rstd = OPS.mix_norm_fwd(tensors, coefficients, rows, norm_scale)
    d = torch.randn(6, width, device=device).bfloat16()
    num_rows = coefficients.shape[0] if scaled else 1
    mixed = tensors[0] if len(rows) == 1 else mixed
    torch.library.opcheck(OPS.mix_norm_bwd, (d, d, mixed, rstd, [], coefficients, rows, norm_scale, [d] * num_rows))
    if scaled:
        torch.library.opcheck(OPS.mix_norm_bwd, (None, d, None, rstd, tensors, coefficients, rows, norm_scale, [None] * num_rows))


@pytest.mark.parametrize("rows,scaled,norm_scale", [((0, 0, 1), True, 0.5), ((0, 0), False, 0.5)])
def test_compiles_whole(device, rows, scaled, norm_scale):
    tensors, coefficients = draw(rows, 33, device, scaled=scaled)
    d_mixed, d_normed = (torch.randn(33, WIDTH, device=device).bfloat16() for _ in range(2))
    compiled = torch.compile(mix_norm, fullgraph=True)
    got, expected = (outputs_and_gradients(f, tensors, coefficients, rows, norm_scale, d_mixed, d_normed) for f in (compiled, mix_norm))
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value)


@pytest.mark.cuda
def test_graph_replay_with_new_inputs():
    rows = (0, 0, 1)
    tensors, coefficients = draw(rows, 500, "cuda")
    d_mixed, d_normed = (torch.randn(500, WIDTH, device="cuda").bfloat16() for _ in range(2))
    run = lambda: outputs_and_gradients(mix_norm, tensors, coefficients, rows, 0.5, d_mixed, d_normed)  # noqa: E731
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = run()
    fresh = draw(rows, 500, "cuda")
    for old, new in zip([*tensors, coefficients], [*fresh[0], fresh[1]]):
        old.copy_(new)
    graph.replay()
    for name, value in run().items():
        assert torch.equal(replayed[name], value), name


# ---- repeat, property -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows,scaled", [((0, 0, 1), True), ((0, 1, 2, 3), True), ((0, 0), False)])
def test_repeats_bitwise(device, rows, scaled):
    tensors, coefficients = draw(rows, 5000 if device.type == "cuda" else 50, device, scaled=scaled)
    d_mixed, d_normed = (torch.randn_like(tensors[0]) for _ in range(2))
    first = outputs_and_gradients(mix_norm, tensors, coefficients, rows, 0.5, d_mixed, d_normed)
    for _ in range(20 if device.type == "cuda" else 2):
        for name, value in outputs_and_gradients(mix_norm, tensors, coefficients, rows, 0.5, d_mixed, d_normed).items():
            assert torch.equal(value, first[name]), name


def test_norm_has_its_length_and_its_gradient_none_along_it(device):
    """mean(normed^2) is norm_scale^2, and the gradient of the norm is orthogonal to the mix."""
    tensors, coefficients = draw((0, 0, 1), 100, device)
    d_normed = torch.randn(100, WIDTH, device=device).bfloat16()
    results = outputs_and_gradients(mix_norm, tensors, torch.ones_like(coefficients), (0, 0, 1), 0.5, None, d_normed)
    length = results["normed"].double().square().mean(-1)
    torch.testing.assert_close(length, torch.full_like(length, 0.25), rtol=1e-3, atol=0)
    mixed, gradient = results["mixed"].double(), results["gradient 0"].double()
    assert ((mixed * gradient).sum(-1).abs() <= 2**-8 * (mixed * gradient).abs().sum(-1)).all()


def test_ones_copy_exactly(device):
    """Coefficients of one and zero pass a tensor and a gradient through untouched."""
    tensors, coefficients = draw((0, 1), 50, device)
    coefficients[0], coefficients[1] = 1, 0
    d = torch.randn_like(tensors[0])
    results = outputs_and_gradients(mix_norm, tensors, coefficients, (0, 1), None, d, None)
    assert torch.equal(results["mixed"], tensors[0]) and torch.equal(results["gradient 0"], d) and (results["gradient 1"] == 0).all()


def test_zero_rows_stay_finite(device):
    tensors, coefficients = draw((0, 1), 4, device)
    tensors = [torch.zeros_like(t) for t in tensors]
    d = torch.randn_like(tensors[0])
    for name, value in outputs_and_gradients(mix_norm, tensors, coefficients, (0, 1), 1.0, d, d).items():
        assert value.isfinite().all(), name


# ---- bad input ------------------------------------------------------------------------------------------------


def test_bad_input_names_the_argument():
    (x, y), c = draw((0, 1), 4, "cpu", 8)
    for error, name, arguments in (
        (ValueError, "tensors", ([],)),
        (ValueError, "tensors", ([x] * 6,)),
        (ValueError, "tensors", ([x, y[:2]],)),
        (TypeError, "tensors", ([x, y.float()],)),
        (ValueError, "tensors", ([x.long()],)),
        (ValueError, "coefficients", ([x, y], c[:, :4])),
        (TypeError, "coefficients", ([x, y], c.bfloat16())),
        (ValueError, "rows", ([x, y], c, (0,))),
        (ValueError, "rows", ([x, y], c, (0, 2))),
        (ValueError, "rows", ([x, y], c, (0, 0))),
        (ValueError, "rows", ([x, y], None, (0, 1))),
    ):
        with pytest.raises(error, match=f"^{name}: "):
            mix_norm(*arguments)


# --- for the products that apply a norm themselves


@pytest.mark.parametrize("m", [1, 9, 4243])
def test_rstd_alone(device, m):
    x = torch.randn(m, WIDTH).bfloat16().to(device)
    expected = (x.double().square().mean(-1) + 2.0**-23).rsqrt()
    torch.testing.assert_close(row_rstd(x).double(), expected, rtol=1e-5, atol=0)
    torch.library.opcheck(OPS.mix_norm_fwd, ([x], None, [0], None))


@pytest.mark.parametrize("rows", [(0, 1), (0, 0, 1), (0, 1, 2, 3, 4)])
def test_mix_and_rstd_without_the_norm(device, rows):
    """The same bits as with it."""
    tensors, coefficients = draw(rows, 300, device)
    mixed, normed, rstd = OPS.mix_norm_fwd(tensors, coefficients, rows, 0.7)
    alone = OPS.mix_norm_fwd(tensors, coefficients, rows, None)
    assert torch.equal(alone[0], mixed) and alone[1].numel() == 0 and torch.equal(alone[2], rstd)
