"""softcap_ce: logsumexp(z) - z_target with z = cap tanh(x / cap), and its gradient made in the forward."""

import pytest
import torch

from pgolf_fast import softcap_cross_entropy
from pgolf_fast.ops import _library
from pgolf_fast.ops.softcap_ce import REDUCTIONS, softcap_cross_entropy_ref
from tests.compare import assert_within

IGNORED = -100

# 1 and 7: less than a 16-byte vector. 8: one vector. 1000: the last of a warp's vectors cut. 1023 to 1025, 2056, 4096, 8191 to
# 8193: a warp, two, four and eight warps per row and one column to either side. 50304: longer than the registers hold.
SEAMS = [1, 7, 8, 9, 63, 64, 65, 1000, 1023, 1024, 1025, 1032, 2048, 2056, 4096, 8191, 8192, 8193, 8200, 50304]


def draw(n, v, device, spread=5.0):
    """Logits, and targets that hold the first column, the last and an ignored row."""
    logits = (spread * torch.randn(n, v)).bfloat16()
    targets = torch.randint(v, (n,))
    for row, target in enumerate((0, v - 1, IGNORED)[:n]):
        targets[row] = target
    return logits.to(device), targets.to(device)


def loss_and_grad(function, logits, targets, *arguments, grad_loss=None, **named):
    logits = logits.detach().requires_grad_()
    loss = function(logits, targets, *arguments, **named)
    return loss.detach(), torch.autograd.grad(loss, logits, grad_loss)[0]


def assert_loss(loss, peer, truth, cap=30.0, *_):
    """Twice plain torch's error, and the float32 noise of lse - z, which are as large as the cap."""
    error, peer_error = ((x.double().cpu() - truth).abs().max().item() for x in (loss, peer))
    assert error <= 2 * peer_error + cap * 2**-22 + 2**-22 * truth.abs().max(), f"loss off by {error:.3e}, torch by {peer_error:.3e}"


def assert_agrees(logits, targets, *arguments, **named):
    """Loss and gradient within twice plain torch's error; each gradient element within its bf16 roundings and float32 noise.

    One rounding; two where an incoming gradient scales what the forward has rounded already, which torch does not.
    """
    roundings = 1 if named.get("grad_loss") is None else 2
    on_cpu = (logits.cpu(), targets.cpu())
    grad_loss = named.pop("grad_loss", None)
    loss, grad = loss_and_grad(softcap_cross_entropy, logits, targets, *arguments, grad_loss=grad_loss, **named)
    grad_loss = None if grad_loss is None else grad_loss.cpu()
    peer = loss_and_grad(softcap_cross_entropy_ref, *on_cpu, *arguments, grad_loss=grad_loss, **named)
    truth_grad_loss = None if grad_loss is None else grad_loss.double()
    truth = loss_and_grad(softcap_cross_entropy_ref, on_cpu[0].double(), on_cpu[1], *arguments, grad_loss=truth_grad_loss, **named)
    assert loss.dtype == torch.float32 and grad.dtype == logits.dtype
    assert_loss(loss, peer[0], truth[0], *arguments)
    assert_within(grad, peer[1], truth[1], "grad", floor=1e-7 if roundings == 1 else roundings * 2**-8)
    noise = 1e-6 * truth[1].abs().max() + 1e-37
    assert ((grad.double().cpu() - truth[1]).abs() <= roundings * 2**-8 * truth[1].abs() + noise).all()


# ---- definition -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_definition(reduction):
    logits = (20 * torch.randn(6, 11, dtype=torch.float64)).requires_grad_()
    targets = torch.tensor([0, 10, IGNORED, 3, 3, 7])
    by_hand = []
    for row, target in zip(logits, targets.tolist()):
        z = 15 * torch.tanh(row / 15)
        by_hand.append(-torch.log(torch.exp(z[target]) / torch.exp(z).sum()) if target != IGNORED else torch.zeros(()))
    by_hand = torch.stack(by_hand)
    by_hand = {"none": by_hand, "sum": by_hand.sum(), "mean": by_hand.sum() / 5}[reduction]
    loss = softcap_cross_entropy(logits, targets, 15.0, reduction)
    torch.testing.assert_close(loss, by_hand)
    assert torch.autograd.gradcheck(lambda x: softcap_cross_entropy(x, targets, 15.0, reduction), [logits])


# ---- agreement, seams -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("v", SEAMS)
def test_vocabularies(device, v):
    assert_agrees(*draw(37, v, device))


@pytest.mark.parametrize("v", [1000, 1024, 2048, 8192, 8200])
@pytest.mark.parametrize("start,extra", [(0, 8), (8, 8), (1, 7), (0, 3)])
def test_rows_apart(device, v, start, extra):
    """Sliced logits: aligned and unaligned first column, row stride a multiple of 8 or not."""
    wide, targets = draw(19, v + start + extra, device)
    assert_agrees(wide[:, start : start + v], targets.clamp(max=v - 1))


def test_columns_apart(device):
    logits, targets = draw(64, 136, device)
    assert_agrees(logits.T[:64], targets[:64].clamp(max=63))


@pytest.mark.parametrize("n", [1, 2, 7, 8, 9, 131, 132, 133, 397, 3169, 6000])
@pytest.mark.parametrize("v", [64, 1024])
def test_row_counts(device, n, v):
    """Fewer rows than groups of threads, one more than a full grid, several rounds."""
    assert_agrees(*draw(n, v, device))


@pytest.mark.cuda
def test_more_than_two_to_the_31_elements():
    n, v = 98_304, 32_768
    logits = torch.empty(n, v, device="cuda", dtype=torch.bfloat16)
    logits.normal_(0, 5)
    targets = torch.randint(v, (n,), device="cuda")
    loss, grad = loss_and_grad(softcap_cross_entropy, logits, targets, reduction="none", grad_loss=torch.ones(n, device="cuda"))
    for rows in (slice(0, 3), slice(65_535, 65_538), slice(n - 3, n)):
        truth = loss_and_grad(softcap_cross_entropy_ref, logits[rows].double().cpu(), targets[rows].cpu(), reduction="sum")
        torch.testing.assert_close(loss[rows].sum().double().cpu(), truth[0], rtol=1e-6, atol=0)
        torch.testing.assert_close(grad[rows].double().cpu(), truth[1], rtol=2**-8, atol=1e-7)


# ---- switches -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("v", [9, 1024, 4096, 8192, 10000])
@pytest.mark.parametrize(
    "cap,spread",
    [(1e-3, 1e-3), (0.5, 5.0), (15.0, 5.0), (30.0, 20.0), (64.0, 5.0), (65.0, 5.0), (64.0, 300.0), (1000.0, 5.0), (1e4, 300.0)],
)
def test_caps(device, v, cap, spread):
    """Either side of the largest cap without a shift; most logits beyond the cap, and all far below it."""
    assert_agrees(*draw(21, v, device, spread), cap)


@pytest.mark.parametrize("v", [8, 1024, 8192, 8191])
@pytest.mark.parametrize("cap", [15.0, 100.0])
@pytest.mark.parametrize("low,high", [(1e4, 1e4), (-1e4, -1e4), (-1e4, 1e4), (0.0, 0.0), (-30.0, 30.0), (-3e38, 3e38), (20.0, 20.0)])
def test_extreme_logits(device, v, cap, low, high):
    logits = torch.where(torch.rand(12, v) < 0.5, low, high).bfloat16().to(device)
    assert_agrees(logits, torch.randint(v, (12,)).to(device), cap)


@pytest.mark.parametrize("v", [64, 1024, 8192, 8193])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_reductions(device, v, reduction):
    logits, targets = draw(50, v, device)
    assert_agrees(logits, targets, reduction=reduction, grad_loss=torch.ones(50 if reduction == "none" else (), device=device))


@pytest.mark.parametrize("v", [65, 1024, 8192])
def test_incoming_gradient(device, v):
    logits, targets = draw(50, v, device)
    assert_agrees(logits, targets, grad_loss=torch.tensor(-2.5, device=device))
    rows = torch.randn(50, device=device)
    rows[::3] = 1
    assert_agrees(logits, targets, reduction="none", grad_loss=rows)
    assert_agrees(logits, targets, reduction="none", grad_loss=torch.tensor(0.3, device=device).expand(50))
    assert_agrees(logits, targets, reduction="none", grad_loss=torch.randn(100, device=device)[::2])


@pytest.mark.parametrize("v", [65, 1024, 8192])
def test_ignored_rows(device, v):
    logits, targets = draw(40, v, device)
    targets = targets.masked_fill(targets == IGNORED, 0)
    targets[10:30] = 5
    logits[10] = float("nan")  # what an ignored row holds does not matter
    loss, grad = loss_and_grad(softcap_cross_entropy, logits, targets, ignore_index=5)
    kept = targets != 5
    expected = loss_and_grad(softcap_cross_entropy, logits[kept], targets[kept], ignore_index=5)
    torch.testing.assert_close(loss, expected[0])
    torch.testing.assert_close(grad[kept], expected[1])
    assert (grad[~kept] == 0).all()


def test_ignored_rows_all(device):
    logits, _ = draw(5, 64, device)
    targets = torch.full((5,), IGNORED, device=device)
    loss, grad = loss_and_grad(softcap_cross_entropy, logits, targets)
    assert loss.isnan() and (grad == 0).all()
    assert softcap_cross_entropy(logits, targets, reduction="sum") == 0


@pytest.mark.parametrize("v", [65, 1024, 2048, 4096, 8192, 9000])
@pytest.mark.parametrize("cap", [30.0, 100.0])
def test_without_gradient(device, v, cap):
    logits, targets = draw(40, v, device)
    with torch.no_grad():
        loss = softcap_cross_entropy(logits.requires_grad_(), targets, cap)
    assert not loss.requires_grad
    assert torch.equal(loss, softcap_cross_entropy(logits, targets, cap).detach())


def test_no_rows(device):
    for reduction, expected in (("sum", 0.0), ("mean", float("nan"))):
        logits = torch.empty(0, 64, device=device, dtype=torch.bfloat16, requires_grad=True)
        loss = softcap_cross_entropy(logits, torch.empty(0, device=device, dtype=torch.int64), reduction=reduction)
        torch.testing.assert_close(loss.item(), expected, equal_nan=True)
        loss.backward()
        assert logits.grad.shape == (0, 64)
    loss = softcap_cross_entropy(logits, torch.empty(0, device=device, dtype=torch.int64), reduction="none")
    assert loss.shape == (0,)


# ---- registration ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", range(3))
def test_opcheck(device, reduction):
    for v in (16, 21):
        logits, targets = draw(6, v, device)
        for x, with_grad in ((logits, False), (logits, True), (logits.requires_grad_(), True)):
            torch.library.opcheck(torch.ops.pgolf_fast.softcap_ce_fwd, (x, targets, 30.0, reduction, IGNORED, with_grad))
    grad = torch.randn(6, 16, device=device).bfloat16()
    for scale in (torch.tensor(2.0, device=device), torch.randn(6, device=device)):
        torch.library.opcheck(torch.ops.pgolf_fast.softcap_ce_scale_, (grad, scale))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_compiles_whole(device, reduction):
    logits, targets = draw(33, 1024, device)
    grad_loss = torch.randn(33, device=device) if reduction == "none" else torch.tensor(2.0, device=device)
    compiled = torch.compile(softcap_cross_entropy, fullgraph=True)
    loss, grad = loss_and_grad(compiled, logits, targets, 30.0, reduction, grad_loss=grad_loss)
    expected = loss_and_grad(softcap_cross_entropy, logits, targets, 30.0, reduction, grad_loss=grad_loss)
    torch.testing.assert_close(loss, expected[0])
    torch.testing.assert_close(grad, expected[1])


@pytest.mark.cuda
@pytest.mark.parametrize("v", [1024, 8192, 8191])
def test_graph_replay_with_new_inputs(v):
    logits, targets = draw(500, v, "cuda")
    logits.requires_grad_()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        loss_and_grad(softcap_cross_entropy, logits, targets)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = softcap_cross_entropy(logits, targets)
        (grad,) = torch.autograd.grad(loss, logits)
    for kept in (500, 100):
        new_logits, new_targets = draw(500, v, "cuda")
        new_targets[kept:] = IGNORED
        logits.data.copy_(new_logits)
        targets.copy_(new_targets)
        graph.replay()
        expected = loss_and_grad(softcap_cross_entropy, new_logits, new_targets)
        assert torch.equal(loss, expected[0]) and torch.equal(grad, expected[1])


@pytest.mark.cuda
def test_captured_without_warm_up():
    """In a process of its own: nothing the first call sets up may disturb a capture."""
    import subprocess
    import sys

    program = """
import torch
from pgolf_fast import softcap_cross_entropy
x, y = torch.randn(64, 1024, device="cuda").bfloat16(), torch.randint(1024, (64,), device="cuda")
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    loss = softcap_cross_entropy(x, y)
graph.replay()
torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(30 * torch.tanh(x.float() / 30), y))
"""
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr


@pytest.mark.cuda
def test_other_stream():
    logits, targets = draw(4000, 8192, "cuda")
    expected = loss_and_grad(softcap_cross_entropy, logits, targets)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        later = logits * 1
        got = loss_and_grad(softcap_cross_entropy, later, targets)
    stream.synchronize()
    assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])


# ---- repeat, property -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("v", [64, 1024, 8192, 8193])
def test_repeats_bitwise(device, v):
    logits, targets = draw(1000, v, device)
    first = loss_and_grad(softcap_cross_entropy, logits, targets)
    for _ in range(20 if device.type == "cuda" else 1):
        again = loss_and_grad(softcap_cross_entropy, logits, targets)
        assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])


@pytest.mark.parametrize("v", [1024, 8192, 8191])
def test_gradient_of_z_sums_to_zero(device, v):
    logits, targets = draw(50, v, device)
    _, grad = loss_and_grad(softcap_cross_entropy, logits, targets, reduction="sum")
    slope = 1 - torch.tanh(logits.double() / 30) ** 2
    of_z = grad.double() / slope
    # Each element is one bf16 rounding off, in either direction.
    assert (of_z.sum(1).abs() <= 2**-9 * of_z.abs().sum(1)).all()
    assert (softcap_cross_entropy(logits, targets, reduction="none") >= 0).all()


# ---- bad input ------------------------------------------------------------------------------------------------


def test_bad_input_names_the_argument():
    x, y = torch.randn(4, 8), torch.zeros(4, dtype=torch.int64)
    for error, name, arguments in (
        (ValueError, "logits", (x[0], y)),
        (ValueError, "logits", (torch.empty(4, 0), y)),
        (ValueError, "logits", (x.long(), y)),
        (ValueError, "targets", (x, y[:3])),
        (TypeError, "targets", (x, y.int())),
        (ValueError, "cap", (x, y, 0.0)),
        (ValueError, "cap", (x, y, float("inf"))),
        (ValueError, "cap", (x, y, float("nan"))),
        (ValueError, "reduction", (x, y, 30.0, "average")),
        (IndexError, "targets", (x, y + 8)),
        (IndexError, "targets", (x, y - 1)),
    ):
        with pytest.raises(error, match=f"^{name}: "):
            softcap_cross_entropy(*arguments)


@pytest.mark.cuda
def test_float32_is_refused_on_the_kernel_path():
    with pytest.raises(TypeError, match="^logits: .*pass logits.bfloat16"):
        softcap_cross_entropy(torch.randn(4, 8, device="cuda"), torch.zeros(4, dtype=torch.int64, device="cuda"))


@pytest.mark.cuda
@pytest.mark.parametrize("v", [1024, 8192, 8191])
@pytest.mark.parametrize("bad", [-1, "v", 2**40])
def test_target_out_of_range(v, bad):
    logits, targets = draw(100, v, "cuda")
    good = loss_and_grad(softcap_cross_entropy, logits, targets, reduction="none", grad_loss=torch.ones(100, device="cuda"))
    bad = v if bad == "v" else bad
    targets[77] = bad
    loss, grad = loss_and_grad(softcap_cross_entropy, logits, targets, reduction="none", grad_loss=torch.ones(100, device="cuda"))
    torch.cuda.synchronize()
    with pytest.raises(IndexError, match=rf"^targets: row 77 .* held {bad}, outside \[0, {v}\)"):
        softcap_cross_entropy(logits, targets)
    _library.check_device_errors()  # reported once
    others = torch.arange(100, device="cuda") != 77
    assert loss[77].isnan() and grad[77].isnan().all()
    assert torch.equal(loss[others], good[0][others]) and torch.equal(grad[others], good[1][others])
    assert softcap_cross_entropy(logits, targets).isnan()
    torch.cuda.synchronize()
    with pytest.raises(IndexError, match="^targets: row 77"):
        _library.check_device_errors()


@pytest.mark.cuda
def test_second_backward_is_refused():
    logits, targets = draw(10, 64, "cuda")
    loss = softcap_cross_entropy(logits.requires_grad_(), targets)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# ---- the composite of other GPUs ----------------------------------------------------------------------------------


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("v", [2, 9, 1000, 1024, 5000, 8192])
@pytest.mark.parametrize("cap,reduction", [(30.0, "mean"), (15.0, "sum"), (1000.0, "none")])
def test_triton_composite(dtype, v, cap, reduction):
    from pgolf_fast.ops.softcap_ce_triton import softcap_ce_triton

    logits, targets = draw(20, v, "cuda")
    logits = logits.to(dtype)
    loss, grad = softcap_ce_triton(logits, targets, cap, reduction, IGNORED, True)
    grad_loss = torch.ones(20 if reduction == "none" else (), dtype=torch.float64)
    peer = loss_and_grad(softcap_cross_entropy_ref, logits.cpu(), targets.cpu(), cap, reduction, grad_loss=grad_loss.float())
    truth = loss_and_grad(softcap_cross_entropy_ref, logits.cpu().double(), targets.cpu(), cap, reduction, grad_loss=grad_loss)
    assert_loss(loss, peer[0], truth[0], cap)
    assert_within(grad, peer[1], truth[1], "grad", floor=1e-6)
