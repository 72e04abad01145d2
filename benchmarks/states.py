"""Synthetic checkpoints: the published names and full-size shapes, random values.

Gaussian rows whose standard deviations are log-normal; no structure between rows or columns, which real
checkpoints have. Good for byte counts of the uncompressed payload and for the coders' speed; compressed sizes
are only indications.
"""

import torch

LAYERS, WIDTH, KV_WIDTH, HEADS = 11, 512, 256, 8


def shapes(family: str, layers: int = LAYERS) -> dict[str, tuple[int, ...]]:
    """Published name to shape, at full size except for the number of layers."""
    caseops, gepa = family == "caseops", family == "sp1024-g"
    vocabulary, hidden = (8192, 2048) if caseops else (1024, 1536)
    up, down = ("up_proj", "down_proj") if gepa else ("fc", "proj")
    table = {"tok_emb.weight": (vocabulary, WIDTH)}
    if caseops:
        table |= {"smear_gate.weight": (1, 12), "smear_lambda": (1,), "skip_weights": (8, WIDTH), "skip_gates": (8, WIDTH)}
        table |= {"parallel_post_lambdas": (layers, 2, 2), "parallel_resid_lambdas": (layers, 2)}
    else:
        bigram = "bigram_emb" if gepa else "bigram"
        table |= {f"{bigram}.embed.weight": (2048, 128), f"{bigram}.proj.weight": (WIDTH, 128), f"{bigram}.scale": ()}
        table |= {"smear_gate.gate" if gepa else "smear.gate": (WIDTH,), "skip_weights": (5, WIDTH)}
        table |= {"skip_gates": (5, WIDTH)} if gepa else {}
        table |= {"ve_shared.embed.weight": (1024, 128), "ve_shared.proj.weight": (KV_WIDTH, 128), "ve_shared.scale": ()}
        table |= {"ve_layer_scales.0": (1,), "ve_layer_scales.1": (1,)}
    for i in range(layers):
        block = {
            "attn.c_q.weight": (WIDTH, WIDTH),
            "attn.c_k.weight": (KV_WIDTH, WIDTH),
            "attn.c_v.weight": (KV_WIDTH, WIDTH),
            "attn.proj.weight": (WIDTH, WIDTH),
            "attn.q_gain": (HEADS,),
            f"mlp.{up}.weight": (hidden, WIDTH),
            f"mlp.{down}.weight": (WIDTH, hidden),
            "attn_scale": (WIDTH,),
            "mlp_scale": (WIDTH,),
            "resid_mix": (2, WIDTH),
        }
        block |= {"attn.attn_gate_w": (HEADS, 12)} if caseops else {}
        block |= {"mlp.scale": (hidden,), "mlp.bias": (hidden,)} if gepa else {}
        table |= {f"blocks.{i}.{name}": shape for name, shape in block.items()}
    return table


def synthetic_state(
    family: str, layers: int = LAYERS, seed: int = 0, sigma: float = 0.18, row_spread: float = 0.3
) -> dict[str, torch.Tensor]:
    """Matrices: Gaussian rows of standard deviation sigma * exp(row_spread * z). The rest: near 1, as gains are.

    With the defaults most rows of the int6 schemes sit on the scale floor, as in the published runs.
    """
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in shapes(family, layers).items():
        values = torch.randn(shape, generator=generator)
        if len(shape) == 2 and min(shape) > 12:
            values *= sigma * torch.exp(row_spread * torch.randn(shape[0], 1, generator=generator))
        else:
            values = 1 + 0.2 * values
        state[name] = values
    return state
