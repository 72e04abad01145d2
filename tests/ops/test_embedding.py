"""embedding: rows of a table by index, and the table's gradient as a segmented sum over sorted indices."""

import pytest
import torch

from pgolf_fast.ops import _library, embedding, embedding_plan
from pgolf_fast.ops.embedding import RANGE, embedding_ref
from tests.compare import assert_within

OPS = torch.ops.pgolf_fast

# Places: one; a range of 64 and one to either side; more ranges than a block holds groups.
SEAMS = [1, RANGE - 1, RANGE, RANGE + 1, 1000]


def zipf(m, num_rows):
    """Indices as words fall: a few stand in a tenth of all places each, most hardly anywhere."""
    weight = 1 / torch.arange(1, num_rows + 1, dtype=torch.float64)
    return torch.multinomial(weight, m, replacement=True)[torch.randperm(m)]


def gradient_of(indices, d_out, start, device):
    gradient = start.to(device, copy=True)
    indices = indices.to(device)
    OPS.embedding_bwd_(gradient, d_out.to(device), *embedding_plan(indices, start.shape[0]))
    return gradient


def assert_agrees(indices, num_rows, width, device, dtype=torch.float32):
    start = torch.randn(num_rows, width).to(dtype)
    d_out = torch.randn(len(indices), width).bfloat16()
    truth = start.double().index_add(0, indices, d_out.double())
    peer = (start.float().index_add(0, indices, d_out.float())).to(dtype)
    assert_within(gradient_of(indices, d_out, start, device), peer, truth, "gradient", floor=1e-6)


# ---- definition -----------------------------------------------------------------------------------------------


def test_definition():
    table = torch.randn(7, 3, dtype=torch.float64, requires_grad=True)
    indices = torch.tensor([[0, 6, 2], [2, 2, 0]])
    assert torch.equal(embedding(indices, table, torch.float64), torch.stack([torch.stack([table[i] for i in row]) for row in indices]))
    assert torch.autograd.gradcheck(lambda t: embedding(indices, t, torch.float64), [table])


def test_plan_is_a_stable_sort(device):
    indices = zipf(500, 40).to(device)
    ordered, order = embedding_plan(indices, 40)
    assert torch.equal(indices[order], ordered.long()) and (ordered.diff() >= 0).all()
    assert (order.diff()[ordered.diff() == 0] > 0).all()
    ordered, _ = embedding_plan(torch.tensor([70_000, 5], device=device), 70_001)  # more rows than 16 bits count
    assert ordered.tolist() == [5, 70_000]


# ---- agreement, seams -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("m", SEAMS)
@pytest.mark.parametrize("width", [8, 128, 512, 1032])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients(device, m, width, dtype):
    assert_agrees(zipf(m, 50), 50, width, device, dtype)


# Runs of one index against the borders of ranges: within, up to, from, across one, across several, everything, and none twice.
@pytest.mark.parametrize(
    "counts",
    [
        *([10, 20, 34], [64, 64], [64, 65], [60, 8, 60], [1, 63, 1, 63], [63, 130, 63], [65, 64, 63], [1000], [1] * 200),
        [64 * 12, 1, 64 * 12 - 1],
    ],
)
@pytest.mark.parametrize("width", [128, 512])
def test_runs_across_borders(device, counts, width):
    indices = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    assert_agrees(indices[torch.randperm(len(indices))], len(counts), width, device)


@pytest.mark.cuda
@pytest.mark.parametrize("num_rows,width", [(8192, 512), (1024, 512), (2048, 128)])
def test_real_shape(num_rows, width):
    assert_agrees(zipf(98_304, num_rows), num_rows, width, "cuda")


@pytest.mark.parametrize("table_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [8, 128, 512, 2048, 12])
@pytest.mark.parametrize("shape", [(1,), (3, 41), (2, 1000)])
def test_rows(device, table_dtype, width, shape):
    """12: not a multiple of 8, so the formula."""
    table = torch.randn(30, width).to(table_dtype).to(device)
    indices = torch.randint(30, shape, device=device)
    assert torch.equal(embedding(indices, table), embedding_ref(indices, table))


def test_autograd(device):
    table = torch.randn(50, 512).bfloat16().to(device).requires_grad_()
    indices = zipf(300, 50).view(3, 100).to(device)
    d = torch.randn(3, 100, 512, device=device).bfloat16()
    (gradient,) = torch.autograd.grad(embedding(indices, table), table, d)
    truth = torch.zeros(50, 512, dtype=torch.float64).index_add(0, indices.flatten().cpu(), d.flatten(0, 1).double().cpu())
    assert ((gradient.double().cpu() - truth).abs() <= 2**-8 * truth.abs() + 1e-4).all()


def test_rows_that_stand_nowhere_are_left_alone(device):
    start = torch.randn(20, 512)
    got = gradient_of(torch.full((100,), 3), torch.randn(100, 512).bfloat16(), start, device).cpu()
    untouched = torch.arange(20) != 3
    assert torch.equal(got[untouched], start[untouched]) and not torch.equal(got[3], start[3])


def test_no_places(device):
    table = torch.randn(20, 512, device=device, requires_grad=True)
    out = embedding(torch.empty(0, 4, dtype=torch.int64, device=device), table)
    assert out.shape == (0, 4, 512)
    (gradient,) = torch.autograd.grad(out.sum(), table)
    assert (gradient == 0).all()


# ---- registration ---------------------------------------------------------------------------------------------


def test_opcheck(device):
    table = torch.randn(20, 16, device=device)
    indices = zipf(100, 20).to(device)
    torch.library.opcheck(OPS.embedding_fwd, (indices, table, torch.bfloat16))
    torch.library.opcheck(OPS.embedding_fwd, (indices, table.clone().requires_grad_(), torch.bfloat16))
    d_out = torch.randn(100, 16, device=device).bfloat16()
    torch.library.opcheck(OPS.embedding_bwd_, (torch.zeros_like(table), d_out, *embedding_plan(indices, 20)))


def test_compiles_whole(device):
    table = torch.randn(20, 512, device=device, requires_grad=True)
    indices = zipf(100, 20).to(device)
    compiled = torch.compile(embedding, fullgraph=True)
    d = torch.randn(100, 512, device=device).bfloat16()
    out, expected = compiled(indices, table), embedding(indices, table)
    assert torch.equal(out, expected)
    assert torch.equal(torch.autograd.grad(out, table, d)[0], torch.autograd.grad(expected, table, d)[0])


@pytest.mark.cuda
def test_graph_replay_with_new_indices():
    indices, d_out = zipf(5000, 100).cuda(), torch.randn(5000, 512, device="cuda").bfloat16()
    gradient = torch.zeros(100, 512, device="cuda")

    def step():
        gradient.zero_()
        OPS.embedding_bwd_(gradient, d_out, *embedding_plan(indices, 100))

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    indices.copy_(zipf(5000, 100))
    graph.replay()
    replayed = gradient.clone()
    step()
    assert torch.equal(replayed, gradient)


# ---- repeat, property -----------------------------------------------------------------------------------------


def test_repeats_bitwise(device):
    m = 20_000 if device.type == "cuda" else 500
    indices, d_out, start = zipf(m, 64), torch.randn(m, 512).bfloat16(), torch.randn(64, 512)
    first = gradient_of(indices, d_out, start, device)
    for _ in range(20 if device.type == "cuda" else 2):
        assert torch.equal(gradient_of(indices, d_out, start, device), first)


def test_ones_count_the_places(device):
    """Sums of ones are exact: the gradient is each index's count."""
    m = 30_000 if device.type == "cuda" else 700
    indices = zipf(m, 90)
    counts = gradient_of(indices, torch.ones(m, 128).bfloat16(), torch.zeros(90, 128), device)
    assert torch.equal(counts.cpu(), torch.bincount(indices, minlength=90)[:, None].float().expand(90, 128))


# ---- bad input ------------------------------------------------------------------------------------------------


def test_bad_input_names_the_argument():
    table, indices = torch.randn(5, 8), torch.tensor([0, 4])
    for error, name, arguments in (
        (ValueError, "table", (indices, table[0])),
        (ValueError, "table", (indices, table.long())),
        (TypeError, "indices", (indices.int(), table)),
        (ValueError, "indices", (indices[0], table)),
        (ValueError, "dtype", (indices, table, torch.int32)),
        (IndexError, "indices", (indices + 1, table)),
        (IndexError, "indices", (indices - 1, table)),
    ):
        with pytest.raises(error, match=f"^{name}: "):
            embedding(*arguments)


@pytest.mark.cuda
def test_index_out_of_range():
    table, indices = torch.randn(50, 512, device="cuda"), zipf(100, 50).cuda()
    good = embedding(indices, table)
    indices[77] = 50
    out = embedding(indices, table)
    torch.cuda.synchronize()
    with pytest.raises(IndexError, match=r"^indices: row 77 .* held 50, outside \[0, 50\)"):
        embedding(indices, table)
    _library.check_device_errors()  # reported once
    others = torch.arange(100, device="cuda") != 77
    assert out[77].isnan().all() and torch.equal(out[others], good[others])
    gradient = torch.zeros_like(table)
    OPS.embedding_bwd_(gradient, torch.ones_like(out), *embedding_plan(indices, 50))
    assert gradient.sum() == 99 * 512
