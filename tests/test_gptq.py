"""GPTQ against a column-by-column float64 transcription of the method, and against llm-compressor where that is installed."""

import numpy as np
import pytest
import torch

from pgolf_fast.gptq import HessianSum, gptq, inverse_factor


def slow_gptq(w, h, scales, level, damping=0.01):
    """One row at a time, no blocks: after each column the whole rest of the row is corrected, from the explicit inverse.

    This is the optimal-brain-surgeon form: quantize the column, spread its error by the inverse Hessian of the columns
    that are left, then eliminate the column from that inverse. The Cholesky form under test is algebraically the same.
    """
    w, h, scales = w.numpy().astype(np.float64).copy(), h.numpy().astype(np.float64).copy(), scales.numpy().astype(np.float64)
    for j in range(len(h)):
        if h[j, j] == 0:
            h[j, j] = 1
            w[:, j] = 0
    h += damping * np.trace(h) / len(h) * np.eye(len(h))
    order = np.argsort(-np.diag(h), kind="stable")
    w, h = w[:, order], h[np.ix_(order, order)]
    codes = np.zeros(w.shape, np.int8)
    for r in range(len(w)):
        if scales[r] == 0:
            continue
        inverse = np.linalg.inv(h)
        for j in range(w.shape[1]):
            codes[r, j] = np.clip(np.rint(w[r, j] / scales[r]), -level, level)
            error = (w[r, j] - codes[r, j] * scales[r]) / inverse[j, j]
            w[r, j + 1 :] -= error * inverse[j, j + 1 :]
            inverse -= np.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    back = np.empty_like(codes)
    back[:, order] = codes
    return back


def problem(rows, columns, seed=0, dead=(), rank=None):
    """Weights, a correlated Hessian with some inputs always zero, and steps of 12 deviations over 31."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(4 * columns, columns, generator=g, dtype=torch.float64)
    mix = torch.randn(columns, columns, generator=g, dtype=torch.float64) / columns**0.5 + torch.diag(
        torch.rand(columns, generator=g).double() + 0.1
    )
    x = x @ mix
    x[:, list(dead)] = 0
    w = torch.randn(rows, columns, generator=g, dtype=torch.float64) * 0.1
    scales = (12 * w.std(dim=1) / 31).half()
    return w, x.T @ x / len(x), scales


def objective(w, codes, scales, h):
    e = w.double() - codes.double() * scales.double()[:, None]
    return torch.einsum("ri,ij,rj->", e, h.double(), e).item()


# Seams: one column, inside a block, the block exactly, one past it, several blocks with a rest.
@pytest.mark.parametrize("columns", [2, 7, 16, 17, 50])
def test_float64_agrees_with_the_slow_form(columns):
    w, h, scales = problem(5, columns, seed=columns, dead=() if columns < 7 else (3, columns - 1))
    ours = gptq(w[None], h[None], scales[None].double(), 31, block=16)[0]
    assert np.array_equal(ours.numpy(), slow_gptq(w, h, scales, 31))


def test_levels_clip_and_zero_scales():
    w, h, scales = problem(6, 40, dead=(0,))
    scales = scales / 6  # the outermost code is now two deviations away
    scales[2] = 0
    for level in (3, 31, 63):
        ours = gptq(w[None], h[None], scales[None].double(), level, block=16)[0]
        assert np.array_equal(ours.numpy(), slow_gptq(w, h, scales, level))
        assert (ours.abs().max() == level) == (level < 63) and not ours[2].any() and not ours[:, 0].any()


def test_float32_at_a_block_of_128():
    """fp32 may flip a code near a tie; a flip changes the rest of its row, so few are allowed and the objective must be the same."""
    w, h, scales = problem(64, 300, dead=(17,))
    truth = gptq(w[None], h[None], scales[None].double(), 31)[0]
    ours = gptq(w.float()[None], h.float()[None], scales[None].float(), 31)[0]
    assert (ours != truth).float().mean() < 2e-3
    assert objective(w, ours, scales, h) == pytest.approx(objective(w, truth, scales, h), rel=1e-3)


def test_batch_is_each_alone():
    problems = [problem(9, 40, seed=s, dead=(s,)) for s in range(3)]
    w, h, s = (torch.stack([p[i] for p in problems]) for i in range(3))
    together = gptq(w, h, s.double(), 31, block=16)
    for i in range(3):
        assert torch.equal(together[i], gptq(w[i : i + 1], h[i : i + 1], s[i : i + 1].double(), 31, block=16)[0])


def test_identity_hessian_is_plain_rounding():
    w, _, scales = problem(20, 130)
    codes = gptq(w.float()[None], torch.eye(130)[None], scales[None].float(), 31)[0]
    assert torch.equal(codes, torch.round(w.float() / scales.float()[:, None]).clamp(-31, 31).to(torch.int8))


def test_objective_is_below_plain_rounding():
    w, h, scales = problem(40, 96)
    codes = gptq(w.float()[None], h.float()[None], scales[None].float(), 31)[0]
    plain = torch.round(w / scales.double()[:, None]).clamp(-31, 31)
    assert objective(w, codes, scales, h) < 0.8 * objective(w, plain, scales, h)


def test_factor_is_the_inverse_in_the_order_of_the_diagonal():
    _, h, _ = problem(1, 30, dead=(4, 9))
    order, upper, dead = inverse_factor(h[None], 0.01)
    assert dead[0].nonzero().flatten().tolist() == [4, 9]
    full = h.clone()
    full[[4, 9], [4, 9]] = 1
    full += 0.01 * full.diagonal().mean() * torch.eye(30)
    assert (full.diagonal()[order[0]].diff() <= 0).all() and order[0].sort().values.tolist() == list(range(30))
    torch.testing.assert_close(upper[0].T @ upper[0], torch.linalg.inv(full[order[0]][:, order[0]]))
    assert not upper[0].tril(-1).any()


def test_hessian_sum():
    total = HessianSum(24)
    batches = [torch.randn(2, 7, 24, dtype=dtype) for dtype in (torch.float32, torch.bfloat16, torch.float32)]
    for x in batches:
        total.add(x)
    truth = sum(x.double().reshape(-1, 24).T @ x.double().reshape(-1, 24) for x in batches) / 2
    torch.testing.assert_close(total.mean(2).double(), truth, rtol=1e-5, atol=1e-5)
    total.add(torch.empty(0, 24))
    with pytest.raises(ValueError, match="x: expected 24 columns"):
        total.add(torch.randn(3, 23))


def test_inputs_stay_and_bad_shapes_are_named():
    w, h, s = (t[None] for t in problem(4, 10, dead=(1,)))
    before = [t.clone() for t in (w, h, s)]
    gptq(w, h, s.double(), 31)
    assert all(torch.equal(a, b) for a, b in zip(before, (w, h, s)))
    for name, arguments in (("hessians", (w, h[:, 1:], s)), ("scales", (w, h, s[:, 1:]))):
        with pytest.raises(ValueError, match=f"^{name}:"):
            gptq(*arguments, 31)
    with pytest.raises(ValueError, match="number 0 is not positive definite"):
        gptq(w, -h, s.double(), 31)


def test_a_gpu_agrees(device):
    w, h, scales = problem(64, 300)
    ours = gptq(w[None].to(device), h[None].to(device), scales[None].double().to(device), 31)[0].cpu()
    assert (ours != gptq(w[None], h[None], scales[None].double(), 31)[0]).float().mean() < 2e-3


def test_against_llm_compressor():
    """An independent, well-kept implementation; it stores values, keeps its own fp32 arithmetic and has -32 as lowest code."""
    peer = pytest.importorskip("llmcompressor.modifiers.gptq.gptq_quantize", reason="llmcompressor is not installed")
    from compressed_tensors.quantization import QuantizationArgs

    w, h, scales = problem(64, 300, dead=(17,))
    w, h, scales = w.float(), h.float(), scales.float()
    arguments = QuantizationArgs(num_bits=6, type="int", symmetric=True, strategy="channel", actorder="weight")
    values, _, fell_back = peer.quantize_weight(
        w[None].clone(), h[None].clone(), scales[None, :, None], torch.zeros(1, 64, 1, dtype=torch.int8), None, arguments
    )
    theirs = torch.round(values[0] / scales[:, None])
    ours = gptq(w[None], h[None], scales[None], 31)[0]
    assert not fell_back.any() and theirs.abs().max() < 31  # nothing clipped, so the lowest code does not matter
    assert (ours != theirs).float().mean() < 2e-3
    assert objective(w, ours, scales, h) == pytest.approx(objective(w, theirs, scales, h), rel=1e-3)
