"""The model against the published figures and against tests/model_oracle.py.

Small dimensions keep every part: 11 blocks, loops, lanes, two key/value heads, gates narrower than the width.
"""

import dataclasses
import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from pgolf_fast import recipe
from pgolf_fast.errors import UserError
from pgolf_fast.model import GPT, ModelConfig, bigram_bucket, rms, rotary_table, straight_through_int6, visits
from pgolf_fast.tensor_names import published_views
from tests import model_oracle as oracle
from tests.compare import relative_error

RECIPES = ("gptq-lite-379", "gepa-598", "legal-ttt-691", "caseops-1934")
PARAMETERS = {"gptq-lite-379": 26_993_756, "gepa-598": 27_030_108, "legal-ttt-691": 26_993_756, "caseops-1934": 35_945_671}
LOOPED_ORDER = [0, 1, 2, 3, 4, 5, 3, 4, 5, 3, 4, 5, 6, 7, 8, 9, 10]


def published(name) -> ModelConfig:
    return recipe.resolve(name, environ={}).recipe.model


def small(name, **changes) -> ModelConfig:
    config = dataclasses.replace(published(name), vocab_size=61, model_dim=48, num_heads=6, num_kv_heads=3, rope_dims=4, bf16_tensors=())
    if name != "caseops-1934":
        config = dataclasses.replace(config, bigram_buckets=37, bigram_dim=20, ve_dim=12, rope_train_seq_len=16)
    return dataclasses.replace(config, **changes)


def random_model(config, dtype=torch.float32) -> GPT:
    """Every parameter random, so that no zero or one of the initial values hides a part."""
    model = GPT(config, stream_dtype=dtype).to(dtype)
    rng = torch.Generator().manual_seed(7)
    for name, p in model.named_parameters():
        scale = p.shape[-1] ** -0.5 if name in ("qo", "kv", "mlp_up", "mlp_down") else 0.5
        centre = 1.0 if name in ("resid_mix", "lane_resid", "q_gain") else 0.0
        p.data = (centre + scale * torch.randn(p.shape, generator=rng, dtype=torch.float64)).to(dtype)
    return model


def tokens_of(config, batch, length, seed=11):
    rng = torch.Generator().manual_seed(seed)
    stream = torch.randint(0, config.vocab_size, (batch, length + 1), generator=rng)
    return stream[:, :-1].contiguous(), stream[:, 1:].contiguous()


def oracle_loss(name, config, p, tokens, targets, segment, looped):
    if name == "caseops-1934":
        settings = dict(gate_scale=config.attn_gate_scale, order=LOOPED_ORDER, first_lane=8, looped=looped)
        return oracle.caseops(p, tokens, targets, segment, head_dim=8, rope_dims=4, **settings).mean()
    window = int(segment.bincount().max())
    base = 10000.0 * (max(window, 16) / 16) ** (4 / 2)
    settings = dict(gepa=name == "gepa-598", xsa_from=7, ve_layers=[9, 10], base=base)
    return oracle.sp1024(p, tokens, targets, segment, head_dim=8, rope_dims=4, **settings)


# --- published figures -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RECIPES)
def test_parameter_count(name):
    assert sum(p.numel() for p in GPT(published(name), device="meta").parameters()) == PARAMETERS[name]


FAMILY_S = {
    "tok_emb.weight": (1024, 512),
    "bigram.embed.weight": (2048, 128),
    "bigram.proj.weight": (512, 128),
    "bigram.scale": (),
    "smear.gate": (512,),
    "skip_weights": (5, 512),
    "ve_shared.embed.weight": (1024, 128),
    "ve_shared.proj.weight": (256, 128),
    "ve_shared.scale": (),
    "ve_layer_scales.0": (1,),
    "ve_layer_scales.1": (1,),
}
BLOCK_S = {
    "attn.c_q.weight": (512, 512),
    "attn.c_k.weight": (256, 512),
    "attn.c_v.weight": (256, 512),
    "attn.proj.weight": (512, 512),
    "attn.q_gain": (8,),
    "mlp.fc.weight": (1536, 512),
    "mlp.proj.weight": (512, 1536),
    "attn_scale": (512,),
    "mlp_scale": (512,),
    "resid_mix": (2, 512),
}
GEPA_RENAMED = {
    "bigram.": "bigram_emb.",
    "smear.gate": "smear_gate.gate",
    "mlp.fc": "mlp.up_proj",
    "mlp.proj": "mlp.down_proj",
}
CASEOPS = {
    "tok_emb.weight": (8192, 512),
    "skip_weights": (8, 512),
    "skip_gates": (8, 512),
    "parallel_post_lambdas": (11, 2, 2),
    "parallel_resid_lambdas": (11, 2),
    "smear_gate.weight": (1, 12),
    "smear_lambda": (1,),
}


def expected_shapes(name):
    block = dict(BLOCK_S)
    whole = dict(FAMILY_S)
    if name == "caseops-1934":
        whole = dict(CASEOPS)
        block |= {"mlp.fc.weight": (2048, 512), "mlp.proj.weight": (512, 2048), "attn.attn_gate_w": (8, 12)}
    shapes = whole | {f"blocks.{i}.{part}": shape for i in range(11) for part, shape in block.items()}
    if name == "gepa-598":
        for old, new in GEPA_RENAMED.items():
            shapes = {key.replace(old, new): shape for key, shape in shapes.items()}
        shapes["skip_gates"] = (5, 512)
        shapes |= {f"blocks.{i}.mlp.{part}": (1536,) for i in range(11) for part in ("scale", "bias")}
    return shapes


@pytest.mark.parametrize("name", RECIPES)
def test_published_names_and_shapes(name):
    tensors = GPT(published(name), device="meta").published_tensors()
    assert {key: tuple(t.shape) for key, t in tensors.items()} == expected_shapes(name)


def test_storage_dtypes():
    stored = {name: {k for k, p in GPT(published(name), device="meta").named_parameters() if p.dtype == torch.bfloat16} for name in RECIPES}
    assert stored["legal-ttt-691"] == {"tok_emb", "bigram_embed", "ve_embed"}
    assert stored["gepa-598"] == stored["caseops-1934"] == {"tok_emb"}


def test_published_views_share_storage_and_order():
    """q and o halves of one bank are not swapped, and loading writes into the parameters."""
    model = random_model(small("caseops-1934"))
    views = model.published_tensors()
    assert torch.equal(views["blocks.3.attn.c_q.weight"], model.qo[3]) and torch.equal(views["blocks.3.attn.proj.weight"], model.qo[14])
    assert torch.equal(views["blocks.3.attn.c_k.weight"], model.kv[3]) and torch.equal(views["blocks.3.attn.c_v.weight"], model.kv[14])
    other = GPT(model.config, seed=0, stream_dtype=torch.float32)
    other.load_published(views)
    assert all(torch.equal(a, b) for a, b in zip(other.parameters(), model.parameters()))
    del views["blocks.3.attn.c_q.weight"]
    with pytest.raises(UserError, match="lacks 1 tensors, the first is blocks.3.attn.c_q.weight"):
        other.load_published(views)


# --- initial state -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, factor", [("legal-ttt-691", 6.0), ("gepa-598", 1.0)])
def test_blocks_start_as_the_identity(name, factor):
    config = small(name)
    model = GPT(config, seed=3, stream_dtype=torch.float32)
    tokens, _ = tokens_of(config, 2, 12)
    x0 = model._embed(tokens, fake_quant=False)
    torch.testing.assert_close(model.stream(tokens), factor * x0, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("looped", [False, True])
def test_lanes_start_with_the_published_factor(looped):
    """Gates of one half and unit weights make every merge of equal streams the identity; lanes grow by bf16(1.1)."""
    config = small("caseops-1934")
    model = GPT(config, seed=3, stream_dtype=torch.float32)
    tokens, _ = tokens_of(config, 2, 12)
    grow = 1.1015625
    lane0 = grow * (0.5 * grow + 0.5) * grow
    x0 = model._embed(tokens, fake_quant=False)
    torch.testing.assert_close(model.stream(tokens, looped=looped), 0.5 * (lane0 + grow**3) * x0, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name, loss", [("legal-ttt-691", 6.947), ("gepa-598", 6.947), ("caseops-1934", math.log(8192))])
def test_initial_loss_on_random_tokens(name, loss):
    config = published(name)
    model = GPT(config, seed=1337, stream_dtype=torch.float32)
    tokens, targets = tokens_of(config, 8, 64)
    with torch.no_grad():
        assert model(tokens, targets, looped=False).item() == pytest.approx(loss, abs=0.015)


def test_initial_values():
    config = published("legal-ttt-691")
    model = GPT(config, seed=0)
    p = {name: t.float() for name, t in model.published_tensors().items()}

    def is_orthogonal(w, gain=1.0):
        gram = w @ w.T if w.shape[0] <= w.shape[1] else w.T @ w
        return torch.allclose(gram, gain**2 * torch.eye(len(gram)), atol=1e-4)

    for layer in (0, 10):
        for part in ("attn.c_q", "attn.c_k", "attn.c_v", "mlp.fc"):
            assert is_orthogonal(p[f"blocks.{layer}.{part}.weight"]), part
        assert not p[f"blocks.{layer}.attn.proj.weight"].any() and not p[f"blocks.{layer}.mlp.proj.weight"].any()
        assert p[f"blocks.{layer}.resid_mix"][0].eq(1).all() and not p[f"blocks.{layer}.resid_mix"][1].any()
        assert p[f"blocks.{layer}.attn.q_gain"].eq(1.5).all()
    assert is_orthogonal(p["bigram.proj.weight"], 22**-0.5) and is_orthogonal(p["ve_shared.proj.weight"], 22**-0.5)
    assert p["tok_emb.weight"].std().item() == pytest.approx(0.005, rel=0.01)
    assert p["ve_shared.embed.weight"].std().item() == pytest.approx(0.01, rel=0.01)
    assert not p["bigram.embed.weight"].any() and p["bigram.scale"].item() == pytest.approx(0.05)
    assert p["ve_shared.scale"].item() == pytest.approx(0.1) and p["skip_weights"].eq(1).all() and not p["smear.gate"].any()


def test_caseops_initial_values_are_rounded_to_bf16():
    model = GPT(small("caseops-1934"), seed=0)
    assert all(torch.equal(p, p.bfloat16().to(p.dtype)) for p in model.parameters())
    assert model.lane_resid.eq(1.1015625).all() and model.q_gain.eq(5.0).all()
    assert not GPT(small("legal-ttt-691"), seed=0).qo.bfloat16().float().equal(GPT(small("legal-ttt-691"), seed=0).qo)


def test_same_seed_same_weights():
    config = small("gepa-598")
    first, second, other = (GPT(config, seed=s) for s in (5, 5, 6))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters()))
    assert not torch.equal(first.qo, other.qo)


# --- against the oracle --------------------------------------------------------------------------------------------------


def check_against_oracle(name, config, dtype, tolerance, looped, segments=None):
    """`segments`: start of every packed document, None for a dense batch of two rows."""
    model = random_model(config, dtype)
    if segments is None:
        tokens, targets = tokens_of(config, 2, 24)
        rows = [(tokens[b], targets[b], torch.zeros(24, dtype=torch.int64)) for b in range(2)]
        loss = model(tokens, targets, looped=looped)
    else:
        tokens, targets = tokens_of(config, 1, 40)
        tokens[tokens == 1] = 2
        tokens[0, [s for s in segments if s != 0]] = 1  # every document but the first begins with BOS
        segment = torch.zeros(40, dtype=torch.int64)
        for start in segments[1:]:
            segment[start:] += 1
        rows = [(tokens[0], targets[0], segment)]
        # Padded with empty documents to a fixed length, as in training.
        cu_seqlens = torch.tensor([*segments, *[40] * (10 - len(segments))], dtype=torch.int32)
        loss = model(tokens, targets, looped=looped, cu_seqlens=cu_seqlens, max_seqlen=int(segment.bincount().max()))
    loss.backward()

    p = {key: t.clone().requires_grad_() for key, t in model.published_tensors().items()}
    expected = torch.stack([oracle_loss(name, config, p, *row, looped) for row in rows]).mean()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=tolerance)
    grads = {key: q.grad if q.grad is not None else torch.zeros_like(q) for key, q in model.named_parameters()}
    seen = 0
    for key, grad in published_views(config, grads).items():
        truth = p[key].grad if p[key].grad is not None else torch.zeros_like(p[key])
        if truth.norm() == 0:
            assert grad.norm() == 0, key
            continue
        seen += 1
        assert relative_error(grad, truth) <= tolerance, f"{key}: relative error {relative_error(grad, truth):.2e}"
    assert seen > 0.9 * len(p), "most parameters must receive a gradient, or the comparison says nothing"


# A head without BOS, a one-token document, one longer than the others, and a document that begins at the last position.
SEGMENTS = [0, 5, 6, 30, 39]


@pytest.mark.parametrize("name, looped", [*((name, False) for name in RECIPES), ("caseops-1934", True)])
@pytest.mark.parametrize("segments", [None, SEGMENTS], ids=["dense", "packed"])
def test_loss_and_every_gradient(name, looped, segments):
    check_against_oracle(name, small(name), torch.float32, 1e-4, looped, segments)


@pytest.mark.parametrize("name", ["gepa-598", "caseops-1934"])
def test_loss_and_every_gradient_in_float64(name):
    """The difference above is rounding only."""
    check_against_oracle(name, small(name), torch.float64, 1e-9, True, SEGMENTS)


def test_gate_scale_and_narrow_window_reach_the_forward():
    check_against_oracle("caseops-1934", small("caseops-1934", attn_gate_scale=0.5, gate_window=5), torch.float32, 1e-4, True)


@pytest.mark.parametrize("name", RECIPES[1:])
def test_bf16_stream_stays_near_float32(name):
    """Initial weights but for the output matrices, whose zeros would leave most gradients at zero."""
    config = small(name)
    exact, rounded = (GPT(config, seed=4, stream_dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    rng = torch.Generator().manual_seed(5)
    for p, q in zip(exact.parameters(), rounded.parameters()):
        p.data += 0.05 * torch.randn(p.shape, generator=rng)
        q.data.copy_(p)
    tokens, targets = tokens_of(config, 2, 24)
    assert rounded.stream(tokens).dtype == torch.bfloat16
    losses = [model(tokens, targets) for model in (exact, rounded)]
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=0.01)
    for loss in losses:
        loss.backward()
    for key in ("tok_emb", "qo", "kv", "mlp_up", "mlp_down", "resid_mix", "skip_weights"):
        error = relative_error(rounded.get_parameter(key).grad, exact.get_parameter(key).grad)
        assert error < 0.1, f"{key}: {error:.3f}"


# --- pieces --------------------------------------------------------------------------------------------------------------


GAINS = ("skip_weights", "skip_gates", "resid_mix", "q_gain", "attn_scale", "mlp_scale")


@pytest.mark.parametrize(
    "recipe_name, name",
    [("caseops-1934", name) for name in (*GAINS, "smear_lambda", "lane_resid", "lane_post")]
    + [("legal-ttt-691", name) for name in ("smear_gate", "bigram_scale", "ve_scale", "ve_layer_scales")],
)
def test_gains_are_not_rounded_to_the_stream(recipe_name, name):
    """A change of a gain by a quarter of a bfloat16 step reaches a bfloat16 stream."""
    config = small(recipe_name)
    model = random_model(config)
    model.stream_dtype = torch.bfloat16
    gain = getattr(model, name).data
    gain.copy_(gain.bfloat16())
    tokens, _ = tokens_of(config, 2, 40)
    before = model.stream(tokens)
    nearly = gain * (1 + 2**-10)
    assert torch.equal(nearly.bfloat16(), gain.bfloat16())
    gain.copy_(nearly)
    assert not torch.equal(model.stream(tokens), before)


def test_bigram_buckets():
    """Figures of the specification: pairs as (previous, current); the first position has a row of its own."""
    pairs = {(0, 0): 0, (1, 1): 11, (1023, 1023): 977, (7, 5): 704}
    for pair, bucket in pairs.items():
        assert bigram_bucket(torch.tensor([pair]), 2048).tolist() == [[2047, bucket]]


def test_rms_epsilon_is_float32_machine_epsilon():
    x = torch.full((1, 512), 1e-5, dtype=torch.float64)
    assert rms(x)[0, 0].item() == pytest.approx(1e-5 / math.sqrt(1e-10 + 1.1920929e-7), rel=1e-6)
    assert rms(x.bfloat16()).dtype == torch.bfloat16


def test_rotary_frequencies():
    """NTK: the specification's frequencies at a window of 2048, the plain ones up to 1024. YaRN: by its formula."""
    config = published("legal-ttt-691")

    def frequencies(window, **changes):
        cos, sin = rotary_table(dataclasses.replace(config, **changes), 2, window, "cpu", torch.float64)
        return torch.atan2(sin[1, 0], cos[1, 0])

    at_2048 = [1, 0.28641497, 0.08203354, 0.02349563, 0.00672950, 0.00192743, 0.00055204, 0.00015811]
    torch.testing.assert_close(frequencies(2048), torch.tensor(at_2048, dtype=torch.float64), rtol=1e-4, atol=1e-8)
    plain = torch.tensor([10000 ** (-j / 8) for j in range(8)], dtype=torch.float64)
    torch.testing.assert_close(frequencies(1024), plain)
    torch.testing.assert_close(frequencies(2048, rope_train_seq_len=0), plain)
    ramp = torch.tensor([min(max((2 * j / 16 - 0.25) / 0.75, 0), 1) for j in range(8)], dtype=torch.float64)
    torch.testing.assert_close(frequencies(2048, rope_yarn=True), plain / (1 + 3 * ramp))


def test_visits_pair_as_published():
    """Section 1.6 of the CaseOps specification, by replaying the stack."""
    config = published("caseops-1934")

    def pairs(looped):
        stack, found = [], []
        for i, visit in enumerate(visits(config, looped)):
            if visit.skip is not None:
                found.append((visit.skip, visit.block, stack.pop()))
            if visit.first_half:
                stack.append(visit.block)
        return found

    assert pairs(False) == [(0, 5, 4), (1, 6, 3), (2, 7, 2), (3, 8, 1), (4, 9, 0)]
    assert pairs(True) == [(0, 5, 4), (1, 3, 3), (2, 4, 5), (3, 5, 4), (4, 6, 3), (5, 7, 2), (6, 8, 1), (7, 9, 0)]
    assert [v.block for v in visits(config, True)] == LOOPED_ORDER
    assert [v.block for v in visits(config, True) if v.two_lanes] == [8, 9, 10]


def test_documents_do_not_see_each_other():
    """Changing the first document leaves the second's logits bit for bit; without the BOS mask it does not."""

    def second_document(mask_bos, first_token):
        model = random_model(small("caseops-1934", smear_mask_bos=mask_bos))
        tokens = torch.tensor([[1, first_token, first_token, first_token, 1, 9, 8, 7]])
        with torch.no_grad():
            return model(tokens, cu_seqlens=torch.tensor([0, 4, 8], dtype=torch.int32), max_seqlen=4)[0, 4:]

    assert torch.equal(second_document(True, 5), second_document(True, 6))
    assert not torch.equal(second_document(False, 5), second_document(False, 6))


def test_fake_quant_is_the_published_map_with_a_straight_through_gradient():
    w = torch.tensor([[3.1, -0.04, 0.02, 1.0], [0.5, -0.9, 0.016, 0.2]], requires_grad=True)
    quantised = straight_through_int6(w)
    # Row 0: step 3.1 / 31. Row 1: the floor of 1/31.
    expected = torch.tensor([[3.1, 0.0, 0.0, 1.0], [16 / 31, -28 / 31, 0.0, 6 / 31]])
    torch.testing.assert_close(quantised, expected)
    upstream = torch.randn(2, 4)
    quantised.backward(upstream)
    assert torch.equal(w.grad, upstream)


def test_fake_quant_in_the_forward_quantises_the_matrices_and_nothing_else():
    config = small("gepa-598")
    model, quantised = random_model(config), random_model(config)
    matrices = {"qo", "kv", "mlp_up", "mlp_down", "bigram_proj", "ve_proj"}
    with torch.no_grad():
        for name, p in quantised.named_parameters():
            if name in matrices:
                p.copy_(straight_through_int6(p))
    tokens, targets = tokens_of(config, 2, 12)
    loss, expected, plain = model(tokens, targets, fake_quant=True), quantised(tokens, targets), model(tokens, targets)
    assert loss.item() == expected.item() != plain.item()
    grads = torch.autograd.grad(loss, list(model.parameters()))
    for grad, truth in zip(grads, torch.autograd.grad(expected, list(quantised.parameters()))):
        torch.testing.assert_close(grad, truth)


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("shape", [(0, 5), (2, 0), (2, 1)])
def test_empty_and_single_token_batches(name, shape):
    config = small(name)
    tokens = torch.full(shape, 3)
    model = random_model(config)
    assert model(tokens).shape == (*shape, config.vocab_size)
    assert model(tokens, tokens, reduction="none").shape == shape


@pytest.mark.parametrize("name", ["legal-ttt-691", "caseops-1934"])
def test_scores_logits_and_training_loss_agree(name):
    config = small(name)
    model = random_model(config)
    tokens, targets = tokens_of(config, 2, 12)
    with torch.no_grad():
        each, mean, logits = model(tokens, targets, reduction="none"), model(tokens, targets), model(tokens)
    assert each.shape == tokens.shape and each.dtype == logits.dtype == torch.float32
    assert each.mean().item() == pytest.approx(mean.item(), rel=1e-5)
    picked = torch.log_softmax(logits, -1).gather(-1, targets[..., None])[..., 0]
    torch.testing.assert_close(each, -picked)
    assert logits.abs().max() < 30


def test_scores_are_float32_on_a_bf16_stream():
    model = GPT(small("legal-ttt-691"), seed=0)
    tokens, targets = tokens_of(model.config, 2, 12)
    assert model(tokens, targets, reduction="none").dtype == torch.float32


def test_scoring_in_inference_mode_does_not_break_a_later_backward():
    """The rotary table made while scoring serves training (it could not be saved for backward if it were an inference tensor)."""
    model = random_model(small("legal-ttt-691"))
    tokens, targets = tokens_of(model.config, 1, 12)
    with torch.inference_mode():
        model(tokens, targets, reduction="none")
    model(tokens, targets).backward()


@pytest.mark.parametrize("name", RECIPES)
def test_no_host_synchronisation(name):
    """Under fake tensors, forward and backward have shapes but no data: reading one back would raise."""
    with FakeTensorMode():
        config = small(name)
        model = GPT(config)
        tokens = torch.empty(1, 32, dtype=torch.int64)
        cu_seqlens = torch.empty(9, dtype=torch.int32)
        model(tokens, tokens, cu_seqlens=cu_seqlens, max_seqlen=16, fake_quant=True).backward()
        assert model(tokens, tokens, reduction="none").shape == tokens.shape


def test_forward_is_one_graph():
    config = small("caseops-1934", num_layers=4, loop_start=1, loop_end=1, num_loops=1, parallel_start=3)
    model = random_model(config)
    tokens, targets = tokens_of(config, 1, 16)
    cu_seqlens = torch.tensor([0, 6, 16, 16], dtype=torch.int32)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    loss = compiled(tokens, targets, cu_seqlens=cu_seqlens, max_seqlen=10)
    assert loss.item() == pytest.approx(model(tokens, targets, cu_seqlens=cu_seqlens, max_seqlen=10).item(), rel=1e-5)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(num_heads=7), "model.num_heads: 7 does not divide model_dim 512"),
        (dict(num_kv_heads=3), "model.num_kv_heads: 3 does not divide"),
        (dict(num_layers=0), "model.num_layers: expected at least 1"),
        (dict(vocab_size=0), "model.vocab_size: expected at least 1"),
        (dict(mlp_mult=0.001), "model.mlp_mult: the MLP would have no hidden unit"),
        (dict(rope_dims=15), "model.rope_dims: expected an even number up to the head width 64"),
        (dict(rope_dims=66), "model.rope_dims: expected an even number up to the head width 64"),
        (dict(rope_dims=2, rope_train_seq_len=1024), "model.rope_dims: the NTK rule needs more than 2 rotating dimensions"),
        (dict(rope_yarn=True), "model.rope_yarn: needs rope_train_seq_len"),
        (dict(logit_softcap=0.0), "model.logit_softcap: expected > 0"),
        (dict(ve_layers=(-1,), value_embed=True), "model.ve_layers: there is no block -1"),
        (dict(ve_layers=(11,), value_embed=True), "model.ve_layers: there is no block 11"),
        (dict(num_loops=2, loop_start=5, loop_end=3), "model.loop_end: there is no loop from block 5 to 3"),
        (dict(parallel_start=2), "model.parallel_start: block 2 lies in the loop or in the first half"),
        (dict(num_loops=1, loop_start=7, loop_end=9, parallel_start=8), "model.parallel_start: block 8 lies in the loop"),
        (dict(bigram_buckets=1), "model.bigram_buckets: needs at least 2"),
        (dict(gate_window=0), "model.gate_window: expected 1 to 512"),
        (dict(gate_window=513), "model.gate_window: expected 1 to 512"),
    ],
)
def test_impossible_models_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        ModelConfig(**changes)


@pytest.mark.parametrize(
    "changes",
    [
        dict(rope_dims=64, gate_window=512),
        dict(rope_dims=2),
        dict(num_loops=1, loop_start=10, loop_end=10),
        dict(num_loops=1, loop_start=4, loop_end=4, parallel_start=5),
    ],
)
def test_the_last_possible_value_is_accepted(changes):
    ModelConfig(**changes)
