"""The stream's first value: token row, addend (the projected bigrams), a share of the previous token (smear), RMSNorm.

    e_t = table[token_t] + addend_t                          norm(x) = x / sqrt(mean(x^2) + 2^-23)
    smear "none"      y_t = norm(e_t)
    smear "token"     y_t = norm(e_t + m_t g_t e_{t-1}),     g_t = smear_lambda * sigmoid(gate . e_t[:window])
    smear "channel"   y_t = (1 - s) n_t + m_t s n_{t-1},     n = norm(e), s = sigmoid(gate) per channel

m_t is 0 at a sequence's first position and, if `bos` is given, where token_t is bos. The backward gives the gradient of e, which is
the addend's too; the table's is a sum over it (`embedding_bwd_`). Everything is made again from tokens, table and addend.
"""

import torch
import torch.nn.functional as F

from pgolf_fast.ops import _library
from pgolf_fast.ops._library import RMS_EPSILON, accumulation_dtype, aligned, library, require, require_device, require_dtype
from pgolf_fast.ops.embedding import check_indices, embedding_plan

SMEARS = ("none", "token", "channel")
KERNEL_WIDTH = 512
MAX_CTAS = 528  # kEmbedNormMaxCtas
SUM_COLUMNS = KERNEL_WIDTH + 4  # of a row of the kernel's partial sums


def _previous(x):
    """Each position's predecessor in [B, T, C]; zero before the first."""
    return F.pad(x, (0, 0, 1, 0))[:, : x.shape[1]]


def _next(x):
    return F.pad(x, (0, 0, 0, 1))[:, 1:]


def embed_norm_ref(tokens, table, addend=None, smear="none", gate=None, smear_lambda=None, bos=None, dtype=torch.bfloat16):
    """The definition, differentiable in any float dtype.  tokens [B, T], table [V, C], addend [B, T, C]"""
    e = table[tokens].to(dtype)
    e = e if addend is None else e + addend
    carries = 1.0 if bos is None else (tokens != bos)[..., None].to(dtype)
    norm = lambda x: F.rms_norm(x, x.shape[-1:], eps=RMS_EPSILON)  # noqa: E731
    if smear == "token":
        g = smear_lambda.to(dtype) * torch.sigmoid(e[..., : gate.shape[0]] @ gate.to(dtype)[:, None])
        return norm(e + carries * g * _previous(e))
    if smear == "channel":
        s, n = torch.sigmoid(gate.to(dtype)), norm(e)
        return (1 - s) * n + carries * s * _previous(n)
    return norm(e)


# tokens        [B, T] int64;  table [V, C];  addend [B, T, C] in `dtype`, or none
# gate          "token": [window], "channel": [C], float32 (float64 for float64 results);  smear_lambda  "token": [1], the same
# smear         index into SMEARS;  bos: the token that takes nothing from its predecessor, or none
# Returns y [B, T, C] in `dtype`.
library.define(
    "embed_norm_fwd(Tensor tokens, Tensor table, Tensor? addend, Tensor? gate, Tensor? smear_lambda, int smear, int? bos, ScalarType dtype)"
    " -> Tensor"
)

# Returns d_e [B, T, C] in dy's dtype, and d_gate and d_lambda, empty where there is no such argument.
library.define(
    "embed_norm_bwd(Tensor dy, Tensor tokens, Tensor table, Tensor? addend, Tensor? gate, Tensor? smear_lambda, int smear, int? bos)"
    " -> (Tensor d_e, Tensor d_gate, Tensor d_lambda)"
)


def _embedded(tokens, table, addend, bos, dtype):
    """e, and 1 where a position takes from its predecessor (nothing lies before the first), in the arithmetic's dtype."""
    wide = accumulation_dtype(dtype)
    e = table[tokens].to(dtype).to(wide)
    carries = torch.ones_like(e[..., :1]) if bos is None else (tokens != bos)[..., None].to(wide)
    return e if addend is None else e + addend.to(wide), carries


def _normed(x):
    rstd = torch.rsqrt(x.square().mean(-1, keepdim=True) + RMS_EPSILON)
    return x * rstd, rstd


def _norm_backward(d, n, rstd):
    return rstd * (d - n * (d * n).mean(-1, keepdim=True))


def _forward_formula(tokens, table, addend, gate, smear_lambda, smear, bos, dtype):
    e, carries = _embedded(tokens, table, addend, bos, dtype)
    if SMEARS[smear] == "token":
        e = e + carries * smear_lambda * torch.sigmoid(e[..., : gate.shape[0]] @ gate[:, None]) * _previous(e)
    y, _ = _normed(e)
    if SMEARS[smear] == "channel":
        s = torch.sigmoid(gate)
        y = (1 - s) * y + carries * s * _previous(y)
    return y.to(dtype)


def _backward_formula(dy, tokens, table, addend, gate, smear_lambda, smear, bos):
    e, carries = _embedded(tokens, table, addend, bos, dy.dtype)
    d, empty = dy.to(e.dtype), e.new_empty(0)
    if SMEARS[smear] == "none":
        return _norm_backward(d, *_normed(e)).to(dy.dtype), empty, torch.empty_like(empty)
    if SMEARS[smear] == "channel":
        s, (n, rstd) = torch.sigmoid(gate), _normed(e)
        dn = (1 - s) * d + _next(carries * s * d)
        d_gate = s * (1 - s) * (d * (carries * _previous(n) - n)).sum((0, 1))
        return _norm_backward(dn, n, rstd).to(dy.dtype), d_gate, empty
    window = e[..., : gate.shape[0]]
    s = torch.sigmoid(window @ gate[:, None])
    g = carries * smear_lambda * s
    dx = _norm_backward(d, *_normed(e + g * _previous(e)))
    dg = carries * (dx * _previous(e)).sum(-1, keepdim=True)
    du = dg * smear_lambda * s * (1 - s)
    d_e = dx + _next(g * dx) + F.pad(du * gate, (0, e.shape[-1] - gate.shape[0]))
    return d_e.to(dy.dtype), (du * window).sum((0, 1)), (dg * s).sum().view(1)


@torch.library.impl(library, "embed_norm_fwd", "CPU")
def _fwd_cpu(tokens, table, addend, gate, smear_lambda, smear, bos, dtype):
    check_indices(tokens, table.shape[0], "tokens")
    return _forward_formula(tokens, table, addend, gate, smear_lambda, smear, bos, dtype)


library.impl("embed_norm_bwd", _backward_formula, "CPU")


def _kernel_serves(name, tokens, table, dtype):
    dtypes_fit = dtype == torch.bfloat16 and table.dtype in (torch.float32, torch.bfloat16)
    return dtypes_fit and table.shape[1] == KERNEL_WIDTH and tokens.numel() > 0 and _library.uses_kernel(name, table.device)


def _as_matrix(x):
    return None if x is None else aligned(x.reshape(-1, KERNEL_WIDTH))


def _vector(x):
    return None if x is None else x.contiguous()


@torch.library.impl(library, "embed_norm_fwd", "CUDA")
def _fwd_cuda(tokens, table, addend, gate, smear_lambda, smear, bos, dtype):
    if not _kernel_serves("embed_norm_fwd", tokens, table, dtype):
        return _forward_formula(tokens, table, addend, gate, smear_lambda, smear, bos, dtype)
    _library.check_device_errors()
    y = table.new_empty(tokens.numel(), KERNEL_WIDTH, dtype=dtype)
    torch.ops.pgolf_fast_sm90.embed_norm_fwd(
        tokens.flatten(), tokens.shape[1], aligned(table), _as_matrix(addend), _vector(gate), _vector(smear_lambda), smear, bos,
        y, _library.device_report("tokens"),
    )  # fmt: skip
    return y.view(*tokens.shape, KERNEL_WIDTH)


@torch.library.impl(library, "embed_norm_bwd", "CUDA")
def _bwd_cuda(dy, tokens, table, addend, gate, smear_lambda, smear, bos):
    if not _kernel_serves("embed_norm_bwd", tokens, table, dy.dtype):
        return _backward_formula(dy, tokens, table, addend, gate, smear_lambda, smear, bos)
    d_e = dy.new_empty(tokens.numel(), KERNEL_WIDTH)
    d_gate, d_lambda = (None if x is None else torch.empty_like(x, memory_format=torch.contiguous_format) for x in (gate, smear_lambda))
    partial_sums = None if gate is None else gate.new_empty(MAX_CTAS, SUM_COLUMNS)
    torch.ops.pgolf_fast_sm90.embed_norm_bwd(
        _as_matrix(dy), tokens.flatten(), tokens.shape[1], aligned(table), _as_matrix(addend), _vector(gate), _vector(smear_lambda),
        smear, bos,
        d_e, d_gate, d_lambda, partial_sums,
    )  # fmt: skip
    none = [dy.new_empty(0, dtype=torch.float32) if x is None else x for x in (d_gate, d_lambda)]
    return d_e.view(*tokens.shape, KERNEL_WIDTH), *none


@torch.library.register_fake(f"{_library.NAMESPACE}::embed_norm_fwd")
def _fwd_fake(tokens, table, addend, gate, smear_lambda, smear, bos, dtype):
    return table.new_empty(*tokens.shape, table.shape[1], dtype=dtype)


@torch.library.register_fake(f"{_library.NAMESPACE}::embed_norm_bwd")
def _bwd_fake(dy, tokens, table, addend, gate, smear_lambda, smear, bos):
    wide = accumulation_dtype(dy.dtype)
    d_gate, d_lambda = (dy.new_empty(0 if x is None else x.shape, dtype=wide) for x in (gate, smear_lambda))
    return dy.new_empty(*tokens.shape, table.shape[1]), d_gate, d_lambda


def _save(ctx, inputs, output):
    tokens, table, addend, gate, smear_lambda, ctx.smear, ctx.bos, _ = inputs
    ctx.save_for_backward(tokens, table, addend, gate, smear_lambda)


def _backward(ctx, dy):
    tokens, table, addend, gate, smear_lambda = ctx.saved_tensors
    d_e, d_gate, d_lambda = torch.ops.pgolf_fast.embed_norm_bwd(dy, tokens, table, addend, gate, smear_lambda, ctx.smear, ctx.bos)
    d_table = torch.zeros_like(table)
    torch.ops.pgolf_fast.embedding_bwd_(d_table, d_e.flatten(0, 1), *embedding_plan(tokens, table.shape[0]))
    gradients = [None if x is None else d for x, d in ((addend, d_e), (gate, d_gate), (smear_lambda, d_lambda))]
    return None, d_table, *gradients, None, None, None


torch.library.register_autograd(f"{_library.NAMESPACE}::embed_norm_fwd", _backward, setup_context=_save)


def embed_norm(tokens, table, addend=None, smear="none", gate=None, smear_lambda=None, bos=None, dtype=torch.bfloat16):
    """Normalised embedding of `tokens`, mixed with the previous token's.

    tokens        [B, T] int64, each in [0, V)
    table         [V, C], float; the kernel serves float32 and bfloat16 tables of C = 512 with results in bfloat16
    addend        [B, T, C] in `dtype`, added to the rows; or None
    smear         "none", "token" (gate [window] and smear_lambda [1]) or "channel" (gate [C]); both float32, float64 for float64 results
    bos           token at which nothing is taken from the token before; None: only at the start of each row of T
    Returns [B, T, C] in `dtype`.

    A token out of range raises IndexError: at once on the CPU; on a GPU its row becomes nan and the next call raises.
    """
    require(tokens.dim() == 2, "tokens", f"expected [B, T], got shape {list(tokens.shape)}")
    require_dtype(tokens, "tokens", (torch.int64,))
    require(table.dim() == 2 and table.shape[0] > 0 and table.shape[1] > 0, "table", f"expected [V, C], got shape {list(table.shape)}")
    require(table.is_floating_point(), "table", f"expected a float dtype, got {table.dtype}")
    require(dtype.is_floating_point, "dtype", f"expected a float dtype, got {dtype}")
    require_device(tokens, "tokens", table.device)
    width = table.shape[1]
    if addend is not None:
        shape = [*tokens.shape, width]
        require(list(addend.shape) == shape, "addend", f"expected {shape}, got shape {list(addend.shape)}")
        require_dtype(addend, "addend", (dtype,))
        require_device(addend, "addend", table.device)
    require(smear in SMEARS, "smear", f"expected one of {', '.join(SMEARS)}, got {smear!r}")
    for tensor, argument, users in ((gate, "gate", ("token", "channel")), (smear_lambda, "smear_lambda", ("token",))):
        require((tensor is not None) == (smear in users), argument, f"{'needed' if tensor is None else 'not used'} with smear {smear!r}")
    if gate is not None:
        fits = gate.dim() == 1 and (gate.shape[0] == width if smear == "channel" else 0 < gate.shape[0] <= width)
        require(fits, "gate", f"expected {[width] if smear == 'channel' else f'[1 to {width}]'}, got shape {list(gate.shape)}")
        require(smear_lambda is None or smear_lambda.shape == (1,), "smear_lambda", "expected shape [1]")
        for tensor, argument in ((gate, "gate"), *(((smear_lambda, "smear_lambda"),) if smear_lambda is not None else ())):
            require_dtype(tensor, argument, (accumulation_dtype(dtype),))
            require_device(tensor, argument, table.device)
    return torch.ops.pgolf_fast.embed_norm_fwd(tokens, table, addend, gate, smear_lambda, SMEARS.index(smear), bos, dtype)
