"""The model of all recipes: a looped, U-shaped transformer with tied embeddings. Recipes differ by configuration only.

    tokens -> embed (bigram, smear) -> visits of blocks (skips, loops, two lanes) -> norm -> tied, softcapped head

Matrices of all blocks that share a shape are one parameter, [blocks, out, in], and so are the small
tensors: Muon, the kernels and the collectives handle a few large tensors. `published_tensors` gives
the same storage under the names of the published checkpoints (tensor_names.py).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from pgolf_fast import adapted_blocks, fused_blocks
from pgolf_fast.adapters import VisitAdapter
from pgolf_fast.errors import UserError
from pgolf_fast.ops import embed_norm, embedding, fused_mlp, linear_softcap_cross_entropy, mix_norm, xsa_attention
from pgolf_fast.ops._library import RMS_EPSILON
from pgolf_fast.ops.fused_mlp import activation_ref
from pgolf_fast.ops.xsa_attention import documents_of
from pgolf_fast.settings import requirer, setting
from pgolf_fast.tensor_names import published_views

BOS = 1
BIGRAM_FACTORS = (36313, 27191)  # of the hash, for the current and the previous token
INT6_LIMIT = 31
SCORED_ROWS = 16384  # whose float32 logits exist at a time while scoring: those of a whole batch would be gigabytes


@dataclass(frozen=True)
class ModelConfig:
    vocab_size: int = setting(1024, "pieces of the tokenizer", "VOCAB_SIZE")
    num_layers: int = setting(11, "blocks", "NUM_LAYERS")
    model_dim: int = setting(512, "width of the residual stream", "MODEL_DIM")
    num_heads: int = setting(8, "query heads", "NUM_HEADS")
    num_kv_heads: int = setting(4, "key and value heads; divides num_heads", "NUM_KV_HEADS")
    mlp_mult: float = setting(3.0, "hidden units of the MLP per unit of width", "MLP_MULT")
    mlp_hidden: int = setting(0, "hidden units of the MLP; 0: mlp_mult x model_dim", "MLP_HIDDEN")
    activation: Literal["relu2", "leaky_relu2", "star_relu2"] = setting(
        "relu2", "of the MLP, squared; star has a learned scale and shift per hidden unit"
    )
    embed_init_std: float = setting(0.005, "of the token table", "TIED_EMBED_INIT_STD")
    logit_softcap: float = setting(30.0, "logits are cap x tanh(logits / cap)", "LOGIT_SOFTCAP")

    rope_base: float = setting(10000.0, "period base of the rotary embedding", "ROPE_BASE")
    rope_dims: int = setting(16, "leading dimensions of each head that rotate", "ROPE_DIMS")
    rope_train_seq_len: int = setting(
        0, "tokens; windows longer than this raise the base by the NTK rule; 0: the base is fixed", "ROPE_TRAIN_SEQ_LEN"
    )
    rope_yarn: bool = setting(False, "slow the low frequencies by the YaRN ramp instead of changing the base", "ROPE_YARN")
    rope_yarn_seq_len: int = setting(4096, "tokens the YaRN ramp extends rope_train_seq_len to")
    qk_gain_init: float = setting(1.5, "of the learned factor on each normalised query head", "QK_GAIN_INIT")
    xsa_last_n: int = setting(0, "last blocks whose attention drops each token's own value direction", ("XSA_LAST_N", "XSA_LAYERS"))
    attn_gate: bool = setting(False, "a gate per head and token, from the first gate_window channels", "SPARSE_ATTN_GATE_ENABLED")
    attn_gate_scale: float = setting(1.0, "inside that gate's sigmoid", "SPARSE_ATTN_GATE_SCALE")
    gate_window: int = setting(12, "channels (not tokens) that the attention and smear gates read", "GATE_WINDOW")
    ln_scale: bool = setting(True, "block i scales its normalised inputs by 1 / sqrt(i + 1)", "LN_SCALE")

    bigram_buckets: int = setting(0, "rows of the hashed bigram table; 0: none", ("BIGRAM_VOCAB_SIZE", "BIGRAM_BUCKETS"))
    bigram_dim: int = setting(128, "width of that table", ("BIGRAM_DIM", "BIGRAM_EMBED_DIM"))
    smear: Literal["none", "channel", "token"] = setting(
        "none",
        "mix in the previous token: learned per channel after the norm, or gated by the token's own channels before it",
        {"SMEAR_GATE_ENABLED": {"0": "none", "1": "token"}},
    )
    smear_mask_bos: bool = setting(False, "a document's first token takes nothing from the document before it")
    value_embed: bool = setting(False, "add a second token embedding to the values of ve_layers", "VE_ENABLED")
    ve_dim: int = setting(128, "width of that table", "VE_DIM")
    ve_layers: tuple[int, ...] = setting((9, 10), "blocks whose values receive it", "VE_LAYERS")

    skip_gates: bool = setting(False, "gate each U-Net skip against the stream instead of adding it", "SKIP_GATES_ENABLED")
    loop_start: int = setting(0, "first block of the loop", "LOOP_START")
    loop_end: int = setting(0, "last block of the loop", "LOOP_END")
    num_loops: int = setting(0, "extra passes over loop_start..loop_end once looping is on", "NUM_LOOPS")
    parallel_start: int = setting(0, "first block that runs attention and MLP on two lanes; 0: none", "PARALLEL_START_LAYER")
    lane_resid_init: float = setting(1.1, "of the factor that carries each lane past a two-lane block")

    bf16_tensors: tuple[str, ...] = setting(("tok_emb",), "parameters stored, and so optimised, in bfloat16; empty: float32 masters")
    init_in_bf16: bool = setting(False, "round every initial value to bfloat16, as the published script's casts do")
    tensor_names: Literal["standard", "gepa"] = setting("standard", "naming of the published checkpoint")

    def __post_init__(self):
        require = requirer("model")
        for field in ("vocab_size", "num_layers", "model_dim", "num_heads", "num_kv_heads", "bigram_dim", "ve_dim"):
            require(getattr(self, field) > 0, field, f"expected at least 1, got {getattr(self, field)}")
        require(self.model_dim % self.num_heads == 0, "num_heads", f"{self.num_heads} does not divide model_dim {self.model_dim}")
        require(self.num_heads % self.num_kv_heads == 0, "num_kv_heads", f"{self.num_kv_heads} does not divide num_heads {self.num_heads}")
        require(self.hidden_dim > 0, "mlp_mult", "the MLP would have no hidden unit")
        even = self.rope_dims % 2 == 0 and 0 <= self.rope_dims <= self.head_dim
        require(even, "rope_dims", f"expected an even number up to the head width {self.head_dim}, got {self.rope_dims}")
        require(self.rope_dims != 2 or not self.rope_train_seq_len, "rope_dims", "the NTK rule needs more than 2 rotating dimensions")
        require(self.rope_train_seq_len or not self.rope_yarn, "rope_yarn", "needs rope_train_seq_len")
        require(self.logit_softcap > 0, "logit_softcap", f"expected > 0, got {self.logit_softcap}")
        require(self.bigram_buckets != 1, "bigram_buckets", "needs at least 2, the last is kept for the first token; 0 turns the table off")
        require(0 < self.gate_window <= self.model_dim, "gate_window", f"expected 1 to {self.model_dim}, got {self.gate_window}")
        for layer in self.ve_layers if self.value_embed else ():
            require(0 <= layer < self.num_layers, "ve_layers", f"there is no block {layer} among {self.num_layers}")
        loop_fits = 0 <= self.loop_start <= self.loop_end < self.num_layers
        loop = f"from block {self.loop_start} to {self.loop_end} of {self.num_layers}"
        require(self.num_loops == 0 or loop_fits, "loop_end", f"there is no loop {loop}")
        # A lane pair cannot return to one stream, so nothing before the second half may have two lanes.
        first_lane_fits = self.parallel_start == 0 or min(v.block for v in visits(self, False) if not v.first_half) <= self.parallel_start
        fits = first_lane_fits and (self.num_loops == 0 or self.parallel_start == 0 or self.loop_end < self.parallel_start)
        require(fits, "parallel_start", f"block {self.parallel_start} lies in the loop or in the first half of the model")

    @property
    def head_dim(self):
        return self.model_dim // self.num_heads

    @property
    def kv_dim(self):
        return self.num_kv_heads * self.head_dim

    @property
    def hidden_dim(self):
        return self.mlp_hidden or int(self.mlp_mult * self.model_dim)

    @property
    def num_skips(self):
        return len(visits(self, looped=True)) // 2


class Visit(NamedTuple):
    """One execution of a block; a looped block is visited several times."""

    block: int
    first_half: bool  # its output is kept for a skip
    skip: int | None  # row of the skip parameters with which the last kept output is merged before the block
    two_lanes: bool


def visits(config, looped) -> tuple[Visit, ...]:
    """The blocks in execution order. The first half keeps its outputs on a stack, the second half pops them."""
    order = list(range(config.num_layers))
    if looped:
        loop = order[config.loop_start : config.loop_end + 1]
        order[config.loop_end + 1 : config.loop_end + 1] = loop * config.num_loops
    half = len(order) // 2
    return tuple(
        Visit(
            block,
            first_half=i < half,
            skip=i - half if half <= i < 2 * half else None,
            two_lanes=0 < config.parallel_start <= block,
        )
        for i, block in enumerate(order)
    )


# --- parameters ------------------------------------------------------------------------------------------------------


def _normal(std):
    return lambda w, rng: w.normal_(0.0, std, generator=rng)


def _constant(value):
    return lambda w, rng: w.fill_(value)


def _orthogonal(gain=1.0, zero_from=None):
    """Every matrix of the stack semi-orthogonal, those from `zero_from` on zero."""

    def fill(w, rng):
        w.zero_()
        for matrix in w.view(-1, *w.shape[-2:])[:zero_from]:
            nn.init.orthogonal_(matrix, gain, generator=rng)

    return fill


def _keep_stream(w, rng):
    """Residual mix: the stream in row 0, the embedding in row 1."""
    w.zero_()[:, 0] = 1.0


def parameter_table(config):
    """Name to (shape, initial value) of every parameter, in the order of the data flow."""
    layers, dim, heads = config.num_layers, config.model_dim, config.num_heads
    zero, one = _constant(0.0), _constant(1.0)
    # The published depth factor of the two embedding projections; the block's own output matrices start at zero.
    small = 1 / math.sqrt(2 * layers)
    table = {"tok_emb": ((config.vocab_size, dim), _normal(config.embed_init_std))}
    if config.bigram_buckets:
        table["bigram_embed"] = (config.bigram_buckets, config.bigram_dim), zero
        table["bigram_proj"] = (dim, config.bigram_dim), _orthogonal(small)
        table["bigram_scale"] = (), _constant(0.05)
    if config.smear == "channel":
        table["smear_gate"] = (dim,), zero
    if config.smear == "token":
        table["smear_gate"] = (1, config.gate_window), zero
        table["smear_lambda"] = (1,), zero
    if config.value_embed:
        table["ve_embed"] = (config.vocab_size, config.ve_dim), _normal(0.01)
        table["ve_proj"] = (config.kv_dim, config.ve_dim), _orthogonal(small)
        table["ve_scale"] = (), _constant(0.1)
        table["ve_layer_scales"] = (len(config.ve_layers), 1), one
    table["skip_weights"] = (config.num_skips, dim), one
    if config.skip_gates:
        table["skip_gates"] = (config.num_skips, dim), zero
    table["resid_mix"] = (layers, 2, dim), _keep_stream
    table["qo"] = (2 * layers, dim, dim), _orthogonal(zero_from=layers)  # queries of every block, then outputs
    table["kv"] = (2 * layers, config.kv_dim, dim), _orthogonal()  # keys of every block, then values
    table["q_gain"] = (layers, heads), _constant(config.qk_gain_init)
    if config.attn_gate:
        table["attn_gate"] = (layers, heads, config.gate_window), zero
    table["attn_scale"] = (layers, dim), one
    table["mlp_up"] = (layers, config.hidden_dim, dim), _orthogonal()
    table["mlp_down"] = (layers, dim, config.hidden_dim), zero
    if config.activation == "star_relu2":
        table["star_scale"] = (layers, config.hidden_dim), one
        table["star_shift"] = (layers, config.hidden_dim), zero
    table["mlp_scale"] = (layers, dim), one
    if config.parallel_start:
        table["lane_resid"] = (layers, 2), _constant(config.lane_resid_init)  # [block, lane]
        table["lane_post"] = (layers, 2, 2), one  # [block, attention or MLP, lane]
    return table


# --- pieces ----------------------------------------------------------------------------------------------------------


def rms(x):
    """x / sqrt(mean(x^2) + epsilon) over the last dimension, statistics in float32."""
    return F.rms_norm(x, x.shape[-1:], eps=RMS_EPSILON)


def linear(x, weight):
    # NOTE: cast at each use, so that the gradients of a block's visits are summed in the weight's float32.
    return F.linear(x, weight.to(x.dtype))


def straight_through_int6(weight):
    """int6 values of each row in the forward, the identity in the backward (late quantisation-aware training)."""
    row_max = weight.detach().abs().amax(dim=-1, keepdim=True)
    scale = (row_max / INT6_LIMIT).clamp_min(1 / INT6_LIMIT)
    codes = (weight.detach() / scale).round().clamp(-INT6_LIMIT - 1, INT6_LIMIT)
    return codes * scale + (weight - weight.detach())


def _matrix(weight, fake_quant):
    return straight_through_int6(weight) if fake_quant else weight


def capped(logits, cap):
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return cap * torch.tanh(logits / cap)


def bigram_bucket(tokens, buckets):
    """Row of the bigram table for [B, T] tokens; the last row is the first position's."""
    current, previous = BIGRAM_FACTORS
    pairs = (tokens[:, 1:] * current) ^ (tokens[:, :-1] * previous)
    return F.pad(pairs % (buckets - 1), (1, 0), value=buckets - 1)[:, : tokens.shape[1]]


def rotary_table(config, num_positions, window, device, dtype):
    """cos and sin, [num_positions, 1, rope_dims / 2] each.  `window` is the longest context, in tokens"""
    dims = config.rope_dims
    j = torch.arange(dims // 2, dtype=torch.float64, device=device)
    base, trained = config.rope_base, config.rope_train_seq_len
    if trained and window > trained and not config.rope_yarn:
        base *= (window / trained) ** (dims / (dims - 2))
    frequency = base ** (-2 * j / dims)
    if config.rope_yarn:
        ramp = ((2 * j / dims - 0.25) / 0.75).clamp(0, 1)
        frequency = frequency / (1 + ramp * (config.rope_yarn_seq_len / trained - 1))
    angle = torch.arange(num_positions, dtype=torch.float64, device=device)[:, None, None] * frequency
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(x, cos, sin):
    """Rotate the leading dimensions of every head, dimension i with i + half.  x [B, T, H, D]"""
    half = cos.shape[-1]
    a, b, rest = x.split([half, half, x.shape[-1] - 2 * half], dim=-1)
    return torch.cat([a * cos + b * sin, b * cos - a * sin, rest], dim=-1)


class Block(NamedTuple):
    """One block's tensors; those that the configuration leaves out are None."""

    index: int
    w_q: torch.Tensor
    w_k: torch.Tensor
    w_v: torch.Tensor
    w_o: torch.Tensor
    w_up: torch.Tensor
    w_down: torch.Tensor
    w_value: torch.Tensor | None
    q_gain: torch.Tensor
    attn_scale: torch.Tensor
    mlp_scale: torch.Tensor
    resid_mix: torch.Tensor
    attn_gate: torch.Tensor | None
    star_scale: torch.Tensor | None
    star_shift: torch.Tensor | None
    lane_resid: torch.Tensor | None
    lane_post: torch.Tensor | None


class Context(NamedTuple):
    """What every block reads beside the stream."""

    x0: torch.Tensor  # embedded tokens, mixed in again by each block
    cos: torch.Tensor
    sin: torch.Tensor
    value_rows: torch.Tensor | None  # [B, T, ve_dim], of which the blocks of ve_layers make a summand of their values
    cu_seqlens: torch.Tensor | None
    max_seqlen: int | None
    observe: Callable[[int, str, torch.Tensor], None] | None  # see GPT.stream
    adapter: VisitAdapter | None = None  # this visit's


# --- model -----------------------------------------------------------------------------------------------------------


class GPT(nn.Module):
    def __init__(self, config: ModelConfig, seed: int | None = None, device="cpu", stream_dtype=torch.bfloat16):
        """Parameters are uninitialised without a seed. `stream_dtype` is that of activations and products."""
        super().__init__()
        self.config = config
        self.stream_dtype = stream_dtype
        self.visits = {looped: visits(config, looped) for looped in (False, True)}
        self.use_fused_blocks: bool | None = None  # None: where the kernels serve the stream
        self._rotary = {}
        for name, (shape, _) in parameter_table(config).items():
            dtype = torch.bfloat16 if name in config.bf16_tensors else torch.float32
            self.register_parameter(name, nn.Parameter(torch.empty(shape, dtype=dtype, device=device)))
        if seed is not None:
            self.initialize(seed)

    @torch.no_grad()
    def initialize(self, seed):
        """The same values on every rank and device: drawn on the CPU in float32."""
        rng = torch.Generator().manual_seed(seed)
        for name, (shape, fill) in parameter_table(self.config).items():
            value = torch.empty(shape)
            fill(value, rng)
            getattr(self, name).copy_(value.bfloat16() if self.config.init_in_bf16 else value)

    def published_tensors(self) -> dict[str, torch.Tensor]:
        """Views of the parameters, without gradient, under the published names."""
        return published_views(self.config, {name: p.detach() for name, p in self.named_parameters()})

    @torch.no_grad()
    def load_published(self, tensors: dict[str, torch.Tensor]):
        """Copy in a checkpoint that names and shapes its tensors as the published ones do."""
        mine = self.published_tensors()
        for kind, names in (("lacks", mine.keys() - tensors.keys()), ("has unknown", tensors.keys() - mine.keys())):
            if names:
                raise UserError(f"checkpoint {kind} {len(names)} tensors, the first is {min(names)}: is it of this recipe?")
        for name, view in mine.items():
            if view.shape != tensors[name].shape:
                raise UserError(f"checkpoint tensor {name}: expected shape {list(view.shape)}, got {list(tensors[name].shape)}")
            view.copy_(tensors[name])

    def forward(self, tokens, targets=None, *, reduction="mean", positions=None, adapters=None, **how):
        """Loss of predicting `targets`, or the softcapped logits.

        tokens     [B, T] int64
        targets    [B, S] int64, or None for logits [B, S, V] in float32
        reduction  "mean": the training loss, by the fused head; "none": each token's loss [B, S] in plain
                   float32, which is what a score is made of, so that no kernel can move the ruler
        positions  [B, S] int64, the positions of each row whose predictions are wanted; S: the last so many; None: all, S = T
        adapters   low-rank corrections of this batch's products (adapters.py)
        how        see `stream`
        """
        _, normed = mix_norm([self.stream(tokens, positions=positions, adapters=adapters, **how)])
        return self._head(normed, targets, reduction, adapters)

    def stream(
        self, tokens, *, positions=None, cu_seqlens=None, max_seqlen=None, looped=True, fake_quant=False, observe=None, adapters=None
    ):
        """The residual stream after the last block, [B, T, C] or at some positions [B, S, C].

        cu_seqlens  int32 [documents + 1] for packed documents (then B = 1): they confine attention; what
                    the embedding takes from the previous token stops at BOS only (smear_mask_bos)
        max_seqlen  longest document, a host number; fixed for a training run
        looped      run the loop (always, after training); without loops in the recipe it changes nothing
        fake_quant  late quantisation-aware training
        observe     called as observe(block, "qkv", "o", "up" or "down", input) with what those matrices multiply, at every visit
        positions, adapters    see `forward`; neither goes with packed documents
        """
        if cu_seqlens is not None and (positions is not None or adapters is not None):
            raise ValueError("cu_seqlens: positions and adapters are of rows; give a document as a row")
        x0 = self._embed(tokens, fake_quant)
        cos, sin = self._rotary_for(tokens, max_seqlen)
        value_rows = embedding(tokens, self.ve_embed, self.stream_dtype) if self.config.value_embed else None
        context = Context(x0, cos, sin, value_rows, cu_seqlens, max_seqlen, observe)
        fused = fused_blocks.serve(self.config, x0) if self.use_fused_blocks is None else self.use_fused_blocks
        # What the matrices multiply is not to be seen in the fused blocks, and they learn with or without adapters, not both.
        if fused and observe is None and not (adapters and any(p.requires_grad for p in self.parameters())):
            return self._fused_visits(context, looped, fake_quant, adapters, positions)
        x = self._visits(context, looped, fake_quant, adapters)
        return x if positions is None else fused_blocks.rows_at(x, positions)

    def _visits(self, context, looped, fake_quant, adapters):
        """The definition of the blocks, for any device and dtype."""
        x, blocks = context.x0, self._blocks(fake_quant)
        skip_weights = self.skip_weights.unbind(0)
        skip_gates = self.skip_gates.unbind(0) if self.config.skip_gates else [None] * len(skip_weights)

        kept, lane1 = [], None
        for number, visit in enumerate(self.visits[looped]):
            block = blocks[visit.block]
            context = context._replace(adapter=adapters.visits[number] if adapters else None)
            if visit.two_lanes and lane1 is None:
                lane1 = x
            if visit.skip is not None:
                x = self._merge(x, kept.pop(), skip_weights[visit.skip], skip_gates[visit.skip])
            if visit.two_lanes:
                x, lane1 = self._two_lanes(block, x, lane1, context)
            else:
                x = self._sequential(block, x, context)
            if visit.first_half:
                kept.append(x)
        return x if lane1 is None else 0.5 * (x + lane1)

    # -- embedding

    def _embed(self, tokens, fake_quant):
        config, dtype = self.config, self.stream_dtype
        bigrams = None
        if config.bigram_buckets:
            pairs = embedding(bigram_bucket(tokens, config.bigram_buckets), self.bigram_embed, dtype)
            bigrams = linear(pairs, self.bigram_scale * _matrix(self.bigram_proj, fake_quant))
        gate = self.smear_gate.flatten() if config.smear != "none" else None
        share = self.smear_lambda if config.smear == "token" else None
        return embed_norm(tokens, self.tok_emb, bigrams, config.smear, gate, share, BOS if config.smear_mask_bos else None, dtype)

    def _value_matrices(self, fake_quant):
        """[ve_layers, kv_dim, ve_dim]"""
        return (self.ve_scale * self.ve_layer_scales)[..., None] * _matrix(self.ve_proj, fake_quant)

    def _rotary_for(self, tokens, max_seqlen):
        """Constant tables, made at the first forward of a shape."""
        key = (tokens.shape[1], max_seqlen or tokens.shape[1], tokens.device, self.stream_dtype)
        if key not in self._rotary:
            # NOTE: a table made while scoring in inference mode must serve a later backward.
            with torch.inference_mode(False):
                self._rotary[key] = rotary_table(self.config, *key)
        return self._rotary[key]

    # -- blocks

    def _blocks(self, fake_quant):
        """Every block's tensors, as views of the stacks.

        Unbound once per forward: indexing a stack at each visit would give each visit a zero-filled gradient of the whole stack.
        """
        layers = self.config.num_layers

        def per_block(name):
            return getattr(self, name).unbind(0) if name in self._parameters else (None,) * layers

        qo, kv, up, down = ([_matrix(w, fake_quant) for w in per_block(name)] for name in ("qo", "kv", "mlp_up", "mlp_down"))
        values = dict(zip(self.config.ve_layers, self._value_matrices(fake_quant).unbind(0))) if self.config.value_embed else {}
        small = (per_block(name) for name in Block._fields[Block._fields.index("q_gain") :])  # named as the parameters are
        rows = zip(range(layers), qo[:layers], kv[:layers], kv[layers:], qo[layers:], up, down, map(values.get, range(layers)), *small)
        return [Block(*row) for row in rows]

    def _merge(self, x, skip, weight, gate):
        if gate is None:
            return (x + weight * skip).to(x.dtype)
        gate = torch.sigmoid(gate)
        return (gate * x + (1 - gate) * weight * skip).to(x.dtype)

    def _normed(self, block, x):
        return rms(x) / math.sqrt(block.index + 1) if self.config.ln_scale else rms(x)

    def _remixed(self, block, x, context):
        stream, embedded = block.resid_mix
        return (stream * x + embedded * context.x0).to(x.dtype)

    def _sequential(self, block, x, context):
        x = self._remixed(block, x, context)
        x = (x + block.attn_scale * self._attention(block, self._normed(block, x), context)).to(x.dtype)
        return (x + block.mlp_scale * self._mlp(block, self._normed(block, x), context)).to(x.dtype)

    def _two_lanes(self, block, lane0, lane1, context):
        """Attention reads lane 0, the MLP lane 1; both write both."""
        attention = self._attention(block, self._normed(block, self._remixed(block, lane0, context)), context)
        mlp = self._mlp(block, self._normed(block, lane1), context)
        resid, post_attention, post_mlp = block.lane_resid[:, None], block.lane_post[0, :, None], block.lane_post[1, :, None]
        post_attention, post_mlp = post_attention * block.attn_scale, post_mlp * block.mlp_scale
        lane0, lane1 = (
            (resid[i] * lane + post_attention[i] * attention + post_mlp[i] * mlp).to(lane.dtype) for i, lane in enumerate((lane0, lane1))
        )
        return lane0, lane1

    def _attention(self, block, n, context):
        config = self.config
        q, k, v = (linear(n, w) for w in (block.w_q, block.w_k, block.w_v))
        if context.adapter:
            q, k, v, correct_output = context.adapter.correct_attention(q, k, v, n)
        q = q.unflatten(-1, (config.num_heads, config.head_dim))  # [B, T, H, D]
        k = k.unflatten(-1, (config.num_kv_heads, config.head_dim))
        if block.w_value is not None:
            v = v + linear(context.value_rows, block.w_value)
        v = v.unflatten(-1, (config.num_kv_heads, config.head_dim))
        q = (block.q_gain[:, None] * rotate(rms(q), context.cos, context.sin)).to(q.dtype)
        k = rotate(rms(k), context.cos, context.sin)
        gate = None
        if config.attn_gate:
            gate = torch.sigmoid(config.attn_gate_scale * linear(n[..., : config.gate_window], block.attn_gate))  # [B, T, H]
        xsa = block.index >= config.num_layers - config.xsa_last_n
        y = xsa_attention(q, k, v, xsa=xsa, gate=gate, cu_seqlens=context.cu_seqlens, max_seqlen=context.max_seqlen)
        if context.observe:
            context.observe(block.index, "qkv", n)
            context.observe(block.index, "o", y.flatten(-2))
        y = linear(y.flatten(-2), block.w_o)
        return correct_output(y) if context.adapter else y

    def _mlp(self, block, m, context):
        if context.observe:
            context.observe(block.index, "up", m)
            context.observe(block.index, "down", self._hidden(block, m))
        y = self._plain_mlp(block, m)
        return context.adapter.correct_mlp(y, m) if context.adapter else y

    def _plain_mlp(self, block, m):
        if self.config.activation != "star_relu2":
            return fused_mlp(m, block.w_up.to(m.dtype), block.w_down.to(m.dtype), self.config.activation)
        # W (a relu^2 + c) = (W diag(a)) relu^2 + W c: the learned scale and shift cost no pass over the hidden units.
        scaled_down = (block.w_down * block.star_scale).to(m.dtype)
        shift = block.w_down @ block.star_shift
        return fused_mlp(m, block.w_up.to(m.dtype), scaled_down, "relu2") + shift.to(m.dtype)

    def _hidden(self, block, m):
        """The hidden units as the second matrix sees them; the fused op keeps them to itself."""
        if self.config.activation != "star_relu2":
            return activation_ref(linear(m, block.w_up), self.config.activation)
        return block.star_scale * activation_ref(linear(m, block.w_up), "relu2") + block.star_shift

    # -- the same by fused_blocks.py

    def _fused_visits(self, context, looped, fake_quant, adapters, positions):
        visits = self.visits[looped]
        plan = fused_blocks.Plan(
            visits,
            self.config,
            tokens=context.x0.shape[:2],
            cos=context.cos.squeeze(1),
            sin=context.sin.squeeze(1),
            value_blocks=self.config.ve_layers if self.config.value_embed else (),
            documents=documents_of(context.cu_seqlens, context.x0.shape[1], self.config.num_heads // self.config.num_kv_heads),
        )
        packed, coefficients = self._packed(fake_quant), self._coefficients(visits)
        q_gain = self.q_gain * fused_blocks.score_gain(self.config)
        weights = fused_blocks.Weights(**packed, q_gain=q_gain, **coefficients)
        if not adapters:
            return fused_blocks.run(plan, weights, context.x0, context.value_rows, positions)
        scales = [(self.attn_scale[visit.block], self.mlp_scale[visit.block]) for visit in visits]
        columns = fused_blocks.as_columns(positions, context.x0)
        return adapted_blocks.run(plan, weights, scales, context.x0, context.value_rows, adapters.visits, columns)

    def _packed(self, fake_quant):
        """The matrices as the fused blocks multiply by them. Scales of a product's channels are folded into its matrix."""
        config = self.config
        qo, kv, up, down = (_matrix(w, fake_quant) for w in (self.qo, self.kv, self.mlp_up, self.mlp_down))
        # NOTE: chunks, not slices, each of whose gradients would be a stack of its own, full of zeros.
        (q, o), (k, v) = qo.chunk(2), kv.chunk(2)
        shift = None
        if config.activation == "star_relu2":
            # As in _plain_mlp.
            shift = self.mlp_scale * (down @ self.star_shift[..., None])[..., 0]
            down = down * self.star_scale[:, None]
        return {
            "qkv": torch.cat([q, k, v], dim=1),
            "gate": self.attn_gate if config.attn_gate else None,
            "o": self.attn_scale[..., None] * o,
            "up": up,
            "down": self.mlp_scale[..., None] * down,
            "shift": shift,
            "value": self._value_matrices(fake_quant) if config.value_embed else None,
        }

    def _coefficients(self, visits):
        """What enters and leaves the blocks of all visits, a row of channels for each summand (fused_blocks.Weights)."""

        def of_blocks(stack):
            rows = stack.unbind(0)
            return torch.stack([rows[visit.block] for visit in visits])

        # A merge before the block, keep * stream + take * skip, is part of the mix and of what lane 0 carries past it.
        keep, take = torch.ones_like(self.skip_weights), self.skip_weights
        if self.config.skip_gates:
            keep = torch.sigmoid(self.skip_gates)
            take = (1 - keep) * self.skip_weights
        half = len(visits) // 2
        before, after = self.skip_weights.new_ones(half, 1), self.skip_weights.new_ones(len(visits) - 2 * half, 1)
        around = [rows.expand(-1, self.config.model_dim) for rows in (before, after)]
        keep, take = (torch.cat([around[0], rows[:half], around[1]]) for rows in (keep, take))
        stream, embedded = of_blocks(self.resid_mix).unbind(1)
        found = {"mix": torch.stack([stream * keep, embedded, stream * take], dim=1), "lane0": None, "lane1": None, "mean": None}
        if self.config.parallel_start:
            resid = of_blocks(self.lane_resid)
            post = of_blocks(self.lane_post)[..., None].expand(-1, -1, -1, self.config.model_dim)  # [visit, attention or MLP, lane, C]
            carried = resid[:, 0, None]
            found["lane0"] = torch.stack([carried * keep, post[:, 0, 0], post[:, 1, 0], carried * take], dim=1)
            found["lane1"] = torch.stack([resid[:, 1, None].expand_as(keep), post[:, 0, 1], post[:, 1, 1]], dim=1)
            (lane0, attention0, mlp0, skip), (lane1, attention1, mlp1) = found["lane0"][-1], found["lane1"][-1]
            found["mean"] = 0.5 * torch.stack([lane0, attention0 + attention1, mlp0 + mlp1, lane1, skip])[None]
        return found

    # -- head

    def _head(self, h, targets, reduction, adapters=None):
        cap, table = self.config.logit_softcap, self.tok_emb.to(h.dtype)
        if targets is None or adapters:
            logits = linear(h, table)
            logits = capped(adapters.correct_head(logits, h) if adapters else logits, cap)
            return logits if targets is None else F.cross_entropy(logits.mT, targets, reduction=reduction)
        if reduction == "mean":
            return linear_softcap_cross_entropy(h.flatten(0, 1), table, targets.flatten(), cap)
        if reduction != "none":
            raise ValueError(f"reduction: expected mean or none, got {reduction!r}")
        rows = zip(h.flatten(0, 1).split(SCORED_ROWS), targets.flatten().split(SCORED_ROWS))
        losses = [F.cross_entropy(capped(linear(h_rows, table), cap), t_rows, reduction="none") for h_rows, t_rows in rows]
        return torch.cat(losses).view(targets.shape)
