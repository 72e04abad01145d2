"""linear_softcap_ce: softcap_cross_entropy(x @ weight.T, targets), without the logits on the kernel path."""

import pytest
import torch

from pgolf_fast import linear_softcap_cross_entropy
from pgolf_fast.ops.linear_softcap_ce import linear_softcap_cross_entropy_ref
from pgolf_fast.ops.softcap_ce import REDUCTIONS
from tests.compare import assert_within

IGNORED = -100


@pytest.fixture(autouse=True)
def kernel_at_any_vocabulary(monkeypatch):
    """Small vocabularies go through the kernel here; the public function would find two ops faster."""
    monkeypatch.setattr("pgolf_fast.ops.linear_softcap_ce.KERNEL_MIN_VOCABULARY", 256)


def draw(n, v, device, d=512, spread=5.0):
    """Logits of about `spread`; targets with the first column, the last and an ignored row."""
    x, weight = torch.randn(n, d).bfloat16(), (spread * d**-0.5 * torch.randn(v, d)).bfloat16()
    targets = torch.randint(v, (n,))
    for row, target in enumerate((0, v - 1, IGNORED)[:n]):
        targets[row] = target
    return x.to(device), weight.to(device), targets.to(device)


def loss_and_grads(function, x, weight, targets, *arguments, grad_loss=None, **named):
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    loss = function(x, weight, targets, *arguments, **named)
    return loss.detach(), *torch.autograd.grad(loss, (x, weight), grad_loss)


def assert_agrees(x, weight, targets, *arguments, grad_loss=None, **named):
    """Within twice the error of plain torch, which rounds the logits to bfloat16."""
    ours = loss_and_grads(linear_softcap_cross_entropy, x, weight, targets, *arguments, grad_loss=grad_loss, **named)
    x, weight, targets = (t.cpu() for t in (x, weight, targets))
    grad_loss = None if grad_loss is None else grad_loss.cpu()
    peer = loss_and_grads(linear_softcap_cross_entropy_ref, x, weight, targets, *arguments, grad_loss=grad_loss, **named)
    grad_loss = None if grad_loss is None else grad_loss.double()
    truth = loss_and_grads(linear_softcap_cross_entropy_ref, x.double(), weight.double(), targets, *arguments, grad_loss=grad_loss, **named)
    assert_within(ours[0], peer[0], truth[0], "loss", floor=2e-6)
    assert_within(ours[1], peer[1], truth[1], "dx", floor=1e-3)
    assert_within(ours[2], peer[2], truth[2], "dweight", floor=1e-3)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_definition(reduction):
    x, weight = torch.randn(6, 4, dtype=torch.float64), torch.randn(11, 4, dtype=torch.float64)
    targets = torch.tensor([0, 10, IGNORED, 3, 3, 7])
    inputs = (x.requires_grad_(), weight.requires_grad_())
    assert torch.autograd.gradcheck(lambda *m: linear_softcap_cross_entropy(*m, targets, 2.0, reduction), inputs)
    op = torch.ops.pgolf_fast.linear_softcap_ce_fwd
    assert torch.autograd.gradcheck(lambda *m: op(*m, targets, 2.0, REDUCTIONS.index(reduction), IGNORED, True)[0], inputs)


# 256: the least vocabulary, two tiles, half of the least K of dx's product; 512, 768: that K and more. 8192: the record's. 300: no fused
# kernel, the logits are materialised.
@pytest.mark.parametrize("v", [256, 512, 768, 1024, 8192, 300])
def test_vocabularies(device, v):
    assert_agrees(*draw(300, v, device))


# A row tile is 128 rows, a cluster's two of them.
@pytest.mark.parametrize("n", [1, 63, 64, 65, 127, 128, 129, 255, 256, 257, 1000])
def test_row_counts(device, n):
    assert_agrees(*draw(n, 512, device))


@pytest.mark.cuda
def test_several_row_tiles_per_cluster():
    """More row tiles than clusters, so that barriers and the ring go round."""
    x, weight, targets = draw(132 * 128 * 2 + 77, 256, "cuda")
    assert_agrees(x, weight, targets)


def test_every_target(device):
    """Each column once: whichever thread holds it."""
    x, weight, _ = draw(512, 512, device)
    assert_agrees(x, weight, torch.randperm(512, device=device), reduction="none", grad_loss=torch.ones(512, device=device))


def test_confident_rows(device):
    """The target has about 0.8 of a row: an error of its logit in the sum alone, or in the difference alone, would be the loss's error."""
    weight = torch.randn(512, 512)
    x = 8 * weight / weight.square().sum(1, keepdim=True)
    x, weight, targets = x.bfloat16().to(device), weight.bfloat16().to(device), torch.arange(512, device=device)
    losses = linear_softcap_cross_entropy(x, weight, targets, reduction="none")
    truth = linear_softcap_cross_entropy_ref(x.double().cpu(), weight.double().cpu(), targets.cpu(), reduction="none")
    assert 0.1 < truth.mean() < 0.4
    torch.testing.assert_close(losses.cpu().double(), truth, rtol=0, atol=3e-4 if device.type == "cuda" else 2e-2)


def test_other_depth(device):
    assert_agrees(*draw(100, 256, device, d=64))


def test_apart(device):
    """Inputs that are not contiguous."""
    x, weight, targets = draw(100, 256, device, d=1024)
    assert_agrees(x[:, ::2], weight[:, ::2], targets)


@pytest.mark.parametrize("cap,spread", [(5.0, 5.0), (15.0, 5.0), (30.0, 30.0), (30.0, 100.0), (64.0, 5.0), (65.0, 5.0)])
def test_caps(device, cap, spread):
    """30 of 30, 100 of 30: logits beyond the cap, and far beyond it. 65: beyond the fused kernel."""
    assert_agrees(*draw(200, 512, device, spread=spread), cap)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_reductions_and_incoming_gradient(device, reduction):
    x, weight, targets = draw(200, 512, device)
    assert_agrees(x, weight, targets, reduction=reduction, grad_loss=torch.randn(200 if reduction == "none" else (), device=device))


def test_ignored_rows(device):
    x, weight, targets = draw(200, 256, device)
    targets = targets.masked_fill(targets == IGNORED, 0)
    targets[50:150] = 7
    loss, dx, _ = loss_and_grads(linear_softcap_cross_entropy, x, weight, targets, ignore_index=7)
    kept = targets != 7
    expected = loss_and_grads(linear_softcap_cross_entropy, x[kept], weight, targets[kept], ignore_index=7)
    torch.testing.assert_close(loss, expected[0])
    assert (dx[~kept] == 0).all()
    torch.testing.assert_close(dx[kept], expected[1], rtol=2**-7, atol=1e-6)


def test_without_gradient(device):
    x, weight, targets = draw(200, 512, device)
    with torch.no_grad():
        loss = linear_softcap_cross_entropy(x, weight, targets)
    torch.testing.assert_close(loss, loss_and_grads(linear_softcap_cross_entropy, x, weight, targets)[0])


def test_no_rows(device):
    x, weight = torch.empty(0, 512, device=device, dtype=torch.bfloat16), torch.randn(256, 512, device=device).bfloat16()
    assert linear_softcap_cross_entropy(x, weight, torch.empty(0, dtype=torch.int64, device=device), reduction="sum") == 0


@pytest.mark.parametrize("reduction", range(3))
def test_opcheck(device, reduction):
    x, weight, targets = draw(130, 256, device)
    for with_grad in (False, True):
        torch.library.opcheck(torch.ops.pgolf_fast.linear_softcap_ce_fwd, (x, weight, targets, 30.0, reduction, IGNORED, with_grad))
    x, weight = x.requires_grad_(), weight.requires_grad_()
    torch.library.opcheck(torch.ops.pgolf_fast.linear_softcap_ce_fwd, (x, weight, targets, 30.0, reduction, IGNORED, True))


def test_compiles_whole(device):
    x, weight, targets = draw(200, 512, device)
    compiled = loss_and_grads(torch.compile(linear_softcap_cross_entropy, fullgraph=True), x, weight, targets)
    for got, expected in zip(compiled, loss_and_grads(linear_softcap_cross_entropy, x, weight, targets)):
        torch.testing.assert_close(got, expected, rtol=2**-6, atol=1e-5)


@pytest.mark.cuda
def test_graph_replay_with_new_inputs():
    x, weight, targets = draw(500, 1024, "cuda")
    x.requires_grad_(), weight.requires_grad_()
    loss_and_grads(linear_softcap_cross_entropy, x, weight, targets)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = linear_softcap_cross_entropy(x, weight, targets)
        dx, dweight = torch.autograd.grad(loss, (x, weight))
    for _ in range(2):
        new = draw(500, 1024, "cuda")
        x.data.copy_(new[0]), weight.data.copy_(new[1]), targets.copy_(new[2])
        graph.replay()
        expected = loss_and_grads(linear_softcap_cross_entropy, *new)
        assert torch.equal(loss, expected[0]) and torch.equal(dx, expected[1])
        torch.testing.assert_close(dweight, expected[2])


def test_repeats_bitwise(device):
    """Loss and G; the matrix products are torch's."""
    x, weight, targets = draw(1000, 1024, device)
    op = torch.ops.pgolf_fast.linear_softcap_ce_fwd
    first = op(x, weight, targets, 30.0, 1, IGNORED, True)
    for _ in range(20 if device.type == "cuda" else 1):
        assert all(torch.equal(a, b) for a, b in zip(first, op(x, weight, targets, 30.0, 1, IGNORED, True)))


def test_loss_is_not_negative(device):
    x, weight, targets = draw(300, 1024, device)
    assert (linear_softcap_cross_entropy(x, weight, targets, reduction="none") >= 0).all()


def test_bad_input_names_the_argument():
    x, weight, targets = torch.randn(4, 8), torch.randn(16, 8), torch.zeros(4, dtype=torch.int64)
    for error, name, arguments in (
        (ValueError, "x", (x[0], weight, targets)),
        (ValueError, "x", (x.long(), weight, targets)),
        (ValueError, "weight", (x, torch.randn(16, 9), targets)),
        (TypeError, "weight", (x, weight.double(), targets)),
        (ValueError, "targets", (x, weight, targets[:3])),
        (TypeError, "targets", (x, weight, targets.int())),
        (ValueError, "cap", (x, weight, targets, 0.0)),
        (ValueError, "reduction", (x, weight, targets, 30.0, "average")),
        (IndexError, "targets", (x, weight, targets + 16)),
    ):
        with pytest.raises(error, match=f"^{name}: "):
            linear_softcap_cross_entropy(*arguments)


@pytest.mark.cuda
def test_target_out_of_range():
    x, weight, targets = draw(300, 256, "cuda")
    targets[77] = 256
    loss = linear_softcap_cross_entropy(x, weight, targets, reduction="none")
    torch.cuda.synchronize()
    with pytest.raises(IndexError, match=r"^targets: row 77 .* held 256, outside \[0, 256\)"):
        linear_softcap_cross_entropy(x, weight, targets)
    assert loss[77].isnan() and loss.isnan().sum() == 1
