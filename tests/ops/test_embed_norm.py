"""embed_norm: token rows, addend, smear of the previous token in both published variants, RMSNorm."""

import pytest
import torch

from pgolf_fast.model import BOS, GPT, ModelConfig
from pgolf_fast.ops import _library, embed_norm
from pgolf_fast.ops.embed_norm import SMEARS, embed_norm_ref
from tests.compare import assert_within

OPS = torch.ops.pgolf_fast
WIDTH = 512  # of the kernel


def draw(b, t, device, smear, width=WIDTH, num_rows=50, dtype=torch.bfloat16, table_dtype=None, addend=True, bos=BOS, window=12):
    wide = torch.promote_types(dtype, torch.float32)
    tokens = torch.randint(num_rows, (b, t))
    tokens[:, ::5] = BOS
    normal = lambda *shape, to=wide: torch.randn(*shape, dtype=torch.float64).to(to).to(device)  # noqa: E731
    return {
        "tokens": tokens.to(device),
        "table": normal(num_rows, width, to=table_dtype or dtype),
        "addend": normal(b, t, width, to=dtype) if addend else None,
        "smear": smear,
        "gate": {"none": None, "token": normal(min(window, width)), "channel": normal(width)}[smear],
        "smear_lambda": normal(1) if smear == "token" else None,
        "bos": bos,
        "dtype": dtype,
    }


TRAINED = ("table", "addend", "gate", "smear_lambda")


def output_and_gradients(function, inputs, dy):
    inputs = dict(inputs)
    names = [name for name in TRAINED if inputs[name] is not None]
    for name in names:
        inputs[name] = inputs[name].detach().requires_grad_()
    y = function(**inputs)
    return {"y": y.detach()} | dict(zip((f"d_{n}" for n in names), torch.autograd.grad(y, [inputs[name] for name in names], dy)))


def assert_agrees(b, t, device, smear, **how):
    inputs = draw(b, t, device, smear, **how)
    dy = torch.randn(b, t, inputs["table"].shape[1]).bfloat16()

    def on_cpu(dtype):
        wide = torch.promote_types(dtype, torch.float32)
        moved = {k: x.cpu() if isinstance(x, torch.Tensor) else x for k, x in inputs.items()}
        # float64 begins with the rows that the bfloat16 stream has
        table = moved["table"].bfloat16().double() if dtype == torch.float64 else moved["table"]
        gates = {k: None if moved[k] is None else moved[k].to(wide) for k in ("gate", "smear_lambda")}
        addend = None if moved["addend"] is None else moved["addend"].to(dtype)
        return output_and_gradients(embed_norm_ref, moved | gates | {"table": table, "addend": addend, "dtype": dtype}, dy.to(dtype))

    ours, peer, truth = output_and_gradients(embed_norm, inputs, dy.to(device)), on_cpu(torch.bfloat16), on_cpu(torch.float64)
    for name, value in ours.items():
        # d_e is rounded once before it is summed over the places of a token
        assert_within(value, peer[name], truth[name], name, floor=2**-8 if name in ("d_table", "d_addend") else 1e-5)


# ---- definition -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("smear", SMEARS)
@pytest.mark.parametrize("mask", [False, True])
def test_definition(smear, mask):
    """The model's own embedding, in float64, and the backward through it."""
    shape = {"vocab_size": 30, "num_layers": 2, "model_dim": 16, "num_heads": 2, "num_kv_heads": 1, "rope_dims": 8}
    config = ModelConfig(**shape, smear=smear, smear_mask_bos=mask)
    model = GPT(config, seed=1, stream_dtype=torch.float64).double()
    inputs = draw(2, 11, "cpu", smear, 16, 30, torch.float64, addend=False, bos=BOS if mask else None)
    with torch.no_grad():
        model.tok_emb.copy_(inputs["table"])
        if smear != "none":
            model.smear_gate.copy_(inputs["gate"].view(model.smear_gate.shape))
        if smear == "token":
            model.smear_lambda.copy_(inputs["smear_lambda"])
    torch.testing.assert_close(embed_norm(**inputs), model._embed(inputs["tokens"], False).detach())
    inputs = draw(2, 7, "cpu", smear, 5, 4, torch.float64, bos=BOS if mask else None, window=3)
    names = [name for name in TRAINED if inputs[name] is not None]
    function = lambda *values: embed_norm(**inputs | dict(zip(names, values)))  # noqa: E731
    assert torch.autograd.gradcheck(function, [inputs[name].requires_grad_() for name in names])


# ---- agreement, seams -------------------------------------------------------------------------------------------


# 1: nothing before. 15 to 17: a warp's run of rows and one to either side. 63 to 65: a block's. 3 x 43: runs across sequences.
@pytest.mark.parametrize("b,t", [(1, 1), (5, 1), (1, 15), (1, 16), (1, 17), (1, 63), (1, 64), (1, 65), (3, 43), (2, 16)])
@pytest.mark.parametrize("smear", SMEARS)
def test_shapes(device, b, t, smear):
    assert_agrees(b, t, device, smear)


@pytest.mark.cuda
@pytest.mark.parametrize("smear", SMEARS)
@pytest.mark.parametrize("num_rows,table_dtype", [(8192, torch.bfloat16), (1024, torch.float32)])
def test_real_shape(smear, num_rows, table_dtype):
    assert_agrees(12, 2048, "cuda", smear, num_rows=num_rows, table_dtype=table_dtype)


@pytest.mark.parametrize("width", [8, 520])
@pytest.mark.parametrize("smear", SMEARS)
def test_other_widths(device, width, smear):
    assert_agrees(2, 20, device, smear, width=width)


# ---- switches -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("smear", SMEARS)
@pytest.mark.parametrize("addend", [False, True])
@pytest.mark.parametrize("table_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bos", [None, BOS])
def test_switches(device, smear, addend, table_dtype, bos):
    assert_agrees(2, 37, device, smear, addend=addend, table_dtype=table_dtype, bos=bos)


@pytest.mark.parametrize("window", [1, 8, 12, 300, 512])
def test_windows(device, window):
    assert_agrees(2, 37, device, "token", window=window)


@pytest.mark.parametrize("smear", SMEARS)
def test_no_tokens(device, smear):
    inputs = draw(2, 0, device, smear)
    results = output_and_gradients(embed_norm, inputs, torch.empty(2, 0, WIDTH, device=device).bfloat16())
    assert results["y"].shape == (2, 0, WIDTH)
    assert all((x == 0).all() for name, x in results.items())


# ---- registration ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("smear", SMEARS)
@pytest.mark.parametrize("width", [WIDTH, 24])
def test_opcheck(device, smear, width):
    inputs = draw(2, 9, device, smear, width=width)
    arguments = [inputs[k] for k in ("tokens", "table", "addend", "gate", "smear_lambda")]
    torch.library.opcheck(OPS.embed_norm_fwd, (*arguments, SMEARS.index(smear), BOS, torch.bfloat16))
    trained = [None if x is None else x.clone().requires_grad_(x.is_floating_point()) for x in arguments]
    torch.library.opcheck(OPS.embed_norm_fwd, (*trained, SMEARS.index(smear), BOS, torch.bfloat16))
    dy = torch.randn(2, 9, width, device=device).bfloat16()
    torch.library.opcheck(OPS.embed_norm_bwd, (dy, *arguments, SMEARS.index(smear), None))


@pytest.mark.parametrize("smear", SMEARS)
def test_compiles_whole(device, smear):
    inputs = draw(2, 33, device, smear)
    dy = torch.randn(2, 33, WIDTH, device=device).bfloat16()
    got, expected = (output_and_gradients(f, inputs, dy) for f in (torch.compile(embed_norm, fullgraph=True), embed_norm))
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value)


# ---- repeat, property -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("smear", SMEARS)
def test_repeats_bitwise(device, smear):
    inputs = draw(8, 2048 if device.type == "cuda" else 20, device, smear)
    dy = torch.randn(*inputs["tokens"].shape, WIDTH, device=device).bfloat16()
    first = output_and_gradients(embed_norm, inputs, dy)
    for _ in range(20 if device.type == "cuda" else 2):
        for name, value in output_and_gradients(embed_norm, inputs, dy).items():
            assert torch.equal(first[name], value), name


@pytest.mark.parametrize("smear", ["token", "channel"])
def test_documents_do_not_mix_at_bos(device, smear):
    """What precedes BOS changes nothing behind it, and receives nothing from it."""
    inputs = draw(1, 40, device, smear)
    inputs["tokens"][:] = inputs["tokens"].clamp_min(2)
    inputs["tokens"][0, 19] = BOS
    dy = torch.randn(1, 40, WIDTH, device=device).bfloat16()
    together = output_and_gradients(embed_norm, inputs, dy)
    for rows in (slice(0, 19), slice(19, 40)):
        alone = inputs | {"tokens": inputs["tokens"][:, rows].contiguous(), "addend": inputs["addend"][:, rows].contiguous()}
        alone = output_and_gradients(embed_norm, alone, dy[:, rows])
        assert torch.equal(alone["y"], together["y"][:, rows]) and torch.equal(alone["d_addend"], together["d_addend"][:, rows])


# ---- bad input ------------------------------------------------------------------------------------------------


def test_bad_input_names_the_argument():
    token, channel, none = (draw(2, 5, "cpu", smear, 16) for smear in ("token", "channel", "none"))
    for error, name, inputs in (
        (ValueError, "tokens", none | {"tokens": none["tokens"][0]}),
        (TypeError, "tokens", none | {"tokens": none["tokens"].int()}),
        (IndexError, "tokens", none | {"tokens": none["tokens"] + 50}),
        (ValueError, "table", none | {"table": none["table"][0]}),
        (ValueError, "dtype", none | {"dtype": torch.int32, "addend": None}),
        (ValueError, "addend", none | {"addend": none["addend"][:, 1:]}),
        (TypeError, "addend", none | {"addend": none["addend"].float()}),
        (ValueError, "smear", none | {"smear": "both"}),
        (ValueError, "gate", none | {"gate": channel["gate"]}),
        (ValueError, "gate", channel | {"gate": None}),
        (ValueError, "gate", channel | {"gate": channel["gate"][1:]}),
        (ValueError, "gate", token | {"gate": torch.zeros(17)}),
        (TypeError, "gate", token | {"gate": token["gate"].bfloat16()}),
        (ValueError, "smear_lambda", token | {"smear_lambda": None}),
        (ValueError, "smear_lambda", token | {"smear_lambda": torch.zeros(2)}),
        (ValueError, "smear_lambda", channel | {"smear_lambda": torch.zeros(1)}),
    ):
        with pytest.raises(error, match=f"^{name}: "):
            embed_norm(**inputs)


@pytest.mark.cuda
def test_token_out_of_range():
    inputs = draw(2, 100, "cuda", "none")
    good = embed_norm(**inputs)
    inputs["tokens"][1, 7] = 50
    y = embed_norm(**inputs)
    torch.cuda.synchronize()
    with pytest.raises(IndexError, match=r"^tokens: row 107 .* held 50, outside \[0, 50\)"):
        embed_norm(**inputs)
    _library.check_device_errors()  # reported once
    assert y[1, 7].isnan().all() and torch.equal(y[0], good[0]) and torch.equal(y[1, 8:], good[1, 8:])
