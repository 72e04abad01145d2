"""The optimizer's arithmetic against float64 written from the definitions, on awkward lists of tensors."""

import math

import pytest
import torch

from pgolf_fast.ops.optimizer_step import adam_apply_, gradient_norm, muon_apply_, muon_direction_
from tests.compare import relative_error

# Ends within, at and just past a kernel's chunk of 2,048 elements and a vector of 4; one element; two rates in one vector of four.
SHAPES = [(1,), (3,), (2, 3), (2048,), (2049,), (11, 2, 512), (5, 1000, 12), (22, 256, 512)]
MATRICES = [(3, 40, 512), (2, 512, 128), (9, 7, 2048), (1, 1, 4)]


def lists(shapes, device, dtypes=(torch.float32, torch.bfloat16), positive=False):
    tensors = [torch.randn(s, device=device).to(dtypes[i % len(dtypes)]) for i, s in enumerate(shapes)]
    return [t.square() if positive else t for t in tensors]


def scalar(value, device, dtype=torch.float32):
    return torch.tensor(value, dtype=dtype, device=device)


def test_the_norm_is_that_of_all_elements(device):
    grads = lists(SHAPES, device)
    expected = math.sqrt(sum(g.double().square().sum().item() for g in grads))
    # torch's own float32 norm on a CPU drifts with the number of elements.
    assert gradient_norm(grads).item() == pytest.approx(expected, rel=1e-6 if device.type == "cuda" else 2e-4)
    assert gradient_norm([torch.zeros(5, device=device)]).item() == 0
    huge = [torch.full((10,), 1e18, device=device)]
    assert gradient_norm(huge).item() == pytest.approx(math.sqrt(10) * 1e18, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("normalize_rows", [False, True])
def test_the_direction_is_nesterov_momentum(device, dtype, normalize_rows):
    grads, momenta = lists(MATRICES, device, (torch.float32,)), lists(MATRICES, device, (dtype,))
    grads[0][0, 1] = momenta[0][0, 1] = 0  # a zero row stays zero
    before = [m.double() for m in momenta]
    directions = muon_direction_(grads, momenta, scalar(0.3, device), scalar(0.9, device), normalize_rows)
    bound = 2e-6 if dtype == torch.float32 else 2**-6  # three roundings
    for g, m, old, d in zip(grads, momenta, before, directions):
        moved = 0.9 * old + 0.3 * g.double()
        ahead = 0.3 * g.double() + 0.9 * moved
        if normalize_rows:
            ahead = ahead / ahead.norm(dim=-1, keepdim=True).clamp_min(1e-7)
        assert m.dtype == dtype and d.dtype == torch.bfloat16
        assert relative_error(m, moved) < bound and relative_error(d, ahead) < 2**-6
    assert not directions[0][0, 1].any()


@pytest.mark.parametrize("averaged", [True, False])
def test_muon_decays_moves_and_averages(device, averaged):
    shapes = [(1, 3, 4), (3, 40, 512), (22, 256, 512)]
    params, updates = lists(shapes, device, (torch.float32,)), lists(shapes, device, (torch.bfloat16,))
    averages = lists(shapes, device, (torch.float32,)) if averaged else []
    rates = [torch.tensor([0.02], device=device), torch.tensor([0.1, 0.2, 0.3], device=device), torch.rand(22, device=device)]
    decays, factors = [0.04, 0.0, 0.1], [1.0, 2.0, 1.5]
    before, before_average = [p.double() for p in params], [a.double() for a in averages]
    muon_apply_(params, updates, averages, rates, decays, factors, scalar(0.5, device), 0.9)
    for i, (p, old, u) in enumerate(zip(params, before, updates)):
        lr = 0.5 * rates[i].double().view(-1, 1, 1)
        expected = old * (1 - lr * decays[i]) - lr * factors[i] * u.double()
        assert relative_error(p, expected) < 1e-6
        if averaged:
            assert relative_error(averages[i], 0.9 * before_average[i] + 0.1 * expected) < 1e-6


def test_adam_is_decoupled_adamw(device):
    params, grads, means = (lists(SHAPES, device) for _ in range(3))
    squares, averages = lists(SHAPES, device, positive=True), lists(SHAPES, device, (torch.float32,))
    rates = [torch.rand(s[0] if len(s) > 1 else 1, device=device) * 0.1 for s in SHAPES]
    decays = [0.05 * i for i in range(len(SHAPES))]
    old = [[t.double() for t in group] for group in (params, means, squares, averages)]
    step = scalar(7.0, device, torch.float64)
    adam_apply_(
        params, grads, means, squares, averages, rates, decays, scalar(0.25, device), scalar(0.5, device), step, 0.9, 0.95, 1e-8, 0.99
    )
    for i, shape in enumerate(SHAPES):
        g = (0.25 * grads[i].float()).to(grads[i].dtype).double()
        mean, square = 0.9 * old[1][i] + 0.1 * g, 0.95 * old[2][i] + 0.05 * g.square()
        lr = 0.5 * rates[i].double().view(-1, *[1] * (len(shape) - 1))
        update = mean / (1 - 0.9**7) / ((square / (1 - 0.95**7)).sqrt() + 1e-8)
        expected = old[0][i] * (1 - lr * decays[i]) - lr * update
        bound = 2e-6 if params[i].dtype == torch.float32 else 2**-8
        for value, truth in ((params[i], expected), (means[i], mean), (squares[i], square)):
            assert relative_error(value, truth) < bound, (shape, value.dtype)
        assert relative_error(averages[i], 0.99 * old[3][i] + 0.01 * params[i].double()) < 1e-6


@pytest.mark.cuda
def test_kernels_serve_and_repeat_bit_for_bit():
    device = torch.device("cuda")
    found = []
    for _ in range(2):
        torch.manual_seed(1)
        params, updates, averages = (lists(MATRICES, device, (d,)) for d in (torch.float32, torch.bfloat16, torch.float32))
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            norm = gradient_norm(params)
            muon_apply_(params, updates, averages, [torch.ones(1, device=device)] * 4, [0.1] * 4, [1.0] * 4, scalar(0.5, device), 0.9)
        names = " ".join(event.key for event in profile.key_averages())
        assert "squares_kernel" in names and "muon_apply_kernel" in names
        found.append([norm, *params, *averages])
    assert all(torch.equal(a, b) for a, b in zip(*found))


@pytest.mark.cuda
def test_more_tensors_than_a_launch_takes():
    params = [torch.ones(5, device="cuda") for _ in range(60)]
    assert gradient_norm(params).item() == pytest.approx(math.sqrt(300))


def test_an_empty_list_is_refused():
    with pytest.raises(ValueError, match="grads: the list is empty"):
        gradient_norm([])
