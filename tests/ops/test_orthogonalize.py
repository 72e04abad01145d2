"""orthogonalize: judged against the polynomial of the float64 singular values, on the whole matrix and on the band they land in."""

import pytest
import torch

from pgolf_fast import orthogonalize
from pgolf_fast.ops.orthogonalize import COEFFICIENTS, _iterate_batched, orthogonalize_ref
from tests.compare import assert_within, relative_error

# One layer of the 36M model, and seams: one box of 64 and one tile of 128, a multiple of 8 around each; several tiles; one row of tiles.
MODEL = [(512, 512), (256, 512), (2048, 512), (512, 2048), (1536, 512), (512, 1536)]
SEAMS = [(8, 8), (8, 512), (512, 8), (64, 64), (56, 72), (128, 128), (120, 136), (136, 120), (192, 320), (384, 264), (640, 640)]
COMPOSITE = [(7, 13), (13, 7), (1, 1), (100, 60), (1, 9)]


def table(coefficients, steps):
    rows = COEFFICIENTS.get(coefficients, coefficients) if isinstance(coefficients, str) else coefficients
    return [rows[min(i, len(rows) - 1)] for i in range(steps)]


def truth(matrix, coefficients="polar_express", steps=5):
    """Each step is an odd polynomial of the singular values and leaves the singular vectors alone."""
    u, s, v = torch.linalg.svd(matrix.detach().cpu().double(), full_matrices=False)
    s = s / s.norm(dim=-1, keepdim=True)
    for a, b, c in table(coefficients, steps):
        s = a * s + b * s**3 + c * s**5
    return u @ torch.diag_embed(s) @ v


def assert_orthogonalizes(result, matrix, coefficients="polar_express", steps=5):
    rounded = matrix.detach().cpu().bfloat16()
    peer = orthogonalize_ref(rounded, table(coefficients, steps))
    assert result.dtype == torch.bfloat16 and result.shape == matrix.shape and result.is_contiguous()
    assert_within(result, peer, truth(rounded, coefficients, steps), f"{list(matrix.shape)}")


# ---- definition ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (5, 5), (2, 3, 4)])
@pytest.mark.parametrize("coefficients", COEFFICIENTS)
def test_definition_in_float64(shape, coefficients):
    m = torch.randn(shape, dtype=torch.float64)
    (result,) = orthogonalize([m], coefficients)
    torch.testing.assert_close(result, truth(m, coefficients))


def test_composite_is_the_definition():
    batch = torch.randn(3, 10, 6, dtype=torch.float64)
    steps = COEFFICIENTS["polar_express"]
    torch.testing.assert_close(_iterate_batched(batch, steps), orthogonalize_ref(batch, steps))


# ---- agreement, seams, switches -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_agreement(device, dtype):
    shapes = (MODEL if device.type == "cuda" else MODEL[1:2]) + SEAMS + COMPOSITE
    matrices = [torch.randn(s, device=device).to(dtype) for s in shapes]
    for result, m in zip(orthogonalize(matrices), matrices):
        assert_orthogonalizes(result, m)


@pytest.mark.parametrize("steps", [1, 2, 5, 7])
@pytest.mark.parametrize("coefficients", [*COEFFICIENTS, ((1.5, -0.5, 0.0),), ((3.0, -3.0, 1.0), (2.0, -1.5, 0.5))])
def test_every_step_and_table(device, coefficients, steps):
    matrices = [torch.randn(s, device=device) for s in ((192, 256), (256, 192), (128, 128))]
    for result, m in zip(orthogonalize(matrices, coefficients, steps), matrices):
        assert_orthogonalizes(result, m, coefficients, steps)


def test_more_steps_than_the_kernel_has_room_for(device):
    m = torch.randn(64, 64, device=device)
    (result,) = orthogonalize([m], ((1.5, -0.5, 0.0),), steps=20)
    assert_orthogonalizes(result, m, ((1.5, -0.5, 0.0),), 20)


def test_batches_strides_and_mixed_lists(device):
    base = torch.randn(300, 300, device=device)
    matrices = [
        torch.randn(2, 3, 64, 128, device=device),
        base[:128, :64].t(),
        base[1:129, 1:65].bfloat16(),
        torch.randn(0, 16, device=device),
        torch.randn(2, 0, 8, 8, device=device),
        base[:5, :3],
        torch.randn(64, 128, device=device, requires_grad=True),
        torch.randn(16, 24, device=device, dtype=torch.float64),
    ]
    results = orthogonalize(matrices)
    assert [r.shape for r in results] == [m.shape for m in matrices] and results[-1].dtype == torch.float64
    assert not any(r.requires_grad for r in results)
    for i in (1, 2, 5, 6):
        assert_orthogonalizes(results[i], matrices[i])
    for result, m in zip(results[0].flatten(0, 1), matrices[0].flatten(0, 1)):
        assert_orthogonalizes(result, m)
    torch.testing.assert_close(results[-1].cpu(), truth(matrices[-1]))


def test_many_shapes_and_many_matrices(device):
    # More shapes than one launch has room for, and more matrices than one launch of the norm.
    shapes = [(8 * i, 8 * j) for i in range(1, 6) for j in range(1, 6)] + 150 * [(16, 16)]
    matrices = [torch.randn(s, device=device) for s in shapes]
    for result, m in zip(orthogonalize(matrices), matrices):
        assert_orthogonalizes(result, m)


@pytest.mark.parametrize("shape", [(64, 128), (256, 128), (100, 7)])
def test_extreme_matrices(device, shape):
    zero = torch.zeros(shape, device=device)
    plain = torch.randn(shape, device=device)
    rank_one = torch.randn(shape[0], 1, device=device) * torch.randn(1, shape[1], device=device)
    one_entry = torch.zeros(shape, device=device)
    one_entry[3, 5] = -2
    with_nan = plain.clone()
    with_nan[0, 0] = torch.nan
    results = orthogonalize([zero, rank_one, one_entry, plain * 1e-20, plain * 1e20, plain * 1e-38, plain * 3e37, with_nan, plain])
    assert not results[0].any() and results[7].isnan().all()
    assert_orthogonalizes(results[1], rank_one)
    assert relative_error(results[2], truth(one_entry)) < 0.15  # in bf16, 8.16 - 22.48 + 15.88 loses digits
    for i, factor in ((3, 1e-20), (4, 1e20), (6, 3e37), (8, 1.0)):
        assert_orthogonalizes(results[i], plain * factor)
    assert torch.isfinite(results[5]).all() and results[5].any()


@pytest.mark.parametrize("coefficients", COEFFICIENTS)
@pytest.mark.parametrize("shape", [(128, 1024), (768, 256), (192, 192)])
def test_ill_conditioned_matrices(device, shape, coefficients):
    """A Gram matrix squares the condition number. Two steps on one stand that in float16; three diverge on the first two of these."""
    small = min(shape)
    u, v = (torch.linalg.qr(torch.randn(n, small))[0] for n in shape)
    matrices = [
        torch.rand(shape),
        u / torch.arange(1, small + 1) @ v.mT,
        u * (torch.arange(small) < small // 2) @ v.mT,
        torch.randn(shape) * 1e-4 ** torch.rand(shape[1]),
        torch.randn(shape) * 1e-4 ** torch.rand(shape[0], 1),
    ]
    for result, m in zip(orthogonalize([m.to(device) for m in matrices], coefficients), matrices):
        assert_orthogonalizes(result, m, coefficients)


# ---- property: where the singular values land ------------------------------------------------------------------


def test_singular_values_in_the_promised_band(device):
    for shape in MODEL if device.type == "cuda" else MODEL[1:2]:
        m = torch.randn(shape, device=device)
        (result,) = orthogonalize([m])
        ideal = torch.linalg.svdvals(truth(m))
        ours, peer = (torch.linalg.svdvals(r.double().cpu()) for r in (result, orthogonalize_ref(m.cpu(), COEFFICIENTS["polar_express"])))
        off, peer_off = (ours - ideal).abs().max(), (peer - ideal).abs().max()
        assert off <= 1.5 * peer_off + 0.005, f"{shape}: singular values off by {off:.4f}, peer by {peer_off:.4f}"


# ---- registration, repeat, streams ------------------------------------------------------------------------------


def test_opcheck(device):
    matrices = [torch.randn(1, 8, 16, device=device), torch.randn(2, 3, 5, device=device), torch.randn(3, 8, 16, device=device)]
    torch.library.opcheck(torch.ops.pgolf_fast.orthogonalize, (matrices, [3.0, -3.0, 1.0]))


def test_compiles_whole(device):
    m = torch.randn(24, 16, device=device)
    compiled = torch.compile(lambda m: orthogonalize([m, 2 * m]), fullgraph=True)(m)
    for c, e in zip(compiled, orthogonalize([m, 2 * m])):
        assert torch.equal(c, e)


def test_repeats_bitwise(device):
    copies = 12 if device.type == "cuda" else 1
    matrices = [torch.randn(s, device=device) for s in copies * ((256, 512), (512, 256), (128, 128))]
    first = orthogonalize(matrices)
    for _ in range(20 if device.type == "cuda" else 2):
        assert all(torch.equal(a, b) for a, b in zip(first, orthogonalize(matrices)))


@pytest.mark.cuda
def test_repeats_bitwise_while_memory_is_busy():
    """Loads arrive late and out of step then, which once let a warpgroup multiply by what a slot held before."""
    matrices = [torch.randn(s, device="cuda").bfloat16() for s in ((22, 512, 512), (22, 256, 512), (11, 2048, 512), (11, 512, 2048))]
    first = orthogonalize(matrices)
    source, target = torch.ones(2, 2**27, device="cuda").unbind(0)
    copies = torch.cuda.Stream()
    different = 0
    for _ in range(30):
        with torch.cuda.stream(copies):
            for _ in range(40):
                target.copy_(source)
        different += sum(not torch.equal(a, b) for _ in range(20) for a, b in zip(first, orthogonalize(matrices)))
        copies.synchronize()
    assert different == 0


@pytest.mark.cuda
def test_graph_replay_and_other_stream():
    matrices = [torch.randn(s, device="cuda") for s in MODEL]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        orthogonalize(matrices)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            results = orthogonalize(matrices)
        for _ in range(3):
            for m in matrices:
                m.copy_(torch.randn_like(m))
            graph.replay()
            again = orthogonalize(matrices)
            assert all(torch.equal(r, a) for r, a in zip(results, again))
    stream.synchronize()


# ---- bad input -----------------------------------------------------------------------------------------------------


def test_bad_input_names_the_argument():
    m = torch.randn(4, 8)
    assert orthogonalize([]) == []
    for error, name, call in (
        (ValueError, "matrices", lambda: orthogonalize([torch.randn(4)])),
        (TypeError, "matrices", lambda: orthogonalize([m.half()])),
        (ValueError, "coefficients", lambda: orthogonalize([m], "newton")),
        (ValueError, "coefficients", lambda: orthogonalize([m], [])),
        (ValueError, "coefficients", lambda: orthogonalize([m], [(1.0, 2.0)])),
        (ValueError, "steps", lambda: orthogonalize([m], steps=0)),
    ):
        with pytest.raises(error, match=f"^{name}:"):
            call()
