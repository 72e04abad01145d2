"""Names of the parameters in the published checkpoints, which hold one matrix or vector per name where the model stacks them."""

import torch

# "{}" runs along the first dimension; a stack with two names holds all of the first, then all of the second.
PUBLISHED_NAMES = {
    "tok_emb": ("tok_emb.weight",),
    "bigram_embed": ("bigram.embed.weight",),
    "bigram_proj": ("bigram.proj.weight",),
    "bigram_scale": ("bigram.scale",),
    "smear_gate": ("smear.gate",),
    "smear_lambda": ("smear_lambda",),
    "ve_embed": ("ve_shared.embed.weight",),
    "ve_proj": ("ve_shared.proj.weight",),
    "ve_scale": ("ve_shared.scale",),
    "ve_layer_scales": ("ve_layer_scales.{}",),
    "skip_weights": ("skip_weights",),
    "skip_gates": ("skip_gates",),
    "resid_mix": ("blocks.{}.resid_mix",),
    "qo": ("blocks.{}.attn.c_q.weight", "blocks.{}.attn.proj.weight"),
    "kv": ("blocks.{}.attn.c_k.weight", "blocks.{}.attn.c_v.weight"),
    "q_gain": ("blocks.{}.attn.q_gain",),
    "attn_gate": ("blocks.{}.attn.attn_gate_w",),
    "attn_scale": ("blocks.{}.attn_scale",),
    "mlp_up": ("blocks.{}.mlp.fc.weight",),
    "mlp_down": ("blocks.{}.mlp.proj.weight",),
    "star_scale": ("blocks.{}.mlp.scale",),
    "star_shift": ("blocks.{}.mlp.bias",),
    "mlp_scale": ("blocks.{}.mlp_scale",),
    "lane_resid": ("parallel_resid_lambdas",),
    "lane_post": ("parallel_post_lambdas",),
}
# Where PR #598 and the token-gated smear of the CaseOps stacks are called otherwise.
GEPA_NAMES = {
    "bigram_embed": ("bigram_emb.embed.weight",),
    "bigram_proj": ("bigram_emb.proj.weight",),
    "bigram_scale": ("bigram_emb.scale",),
    "smear_gate": ("smear_gate.gate",),
    "mlp_up": ("blocks.{}.mlp.up_proj.weight",),
    "mlp_down": ("blocks.{}.mlp.down_proj.weight",),
}
TOKEN_SMEAR_NAMES = {"smear_gate": ("smear_gate.weight",)}


def is_per_block(name) -> bool:
    return PUBLISHED_NAMES[name][0].startswith("blocks.")


def published_names(config) -> dict[str, tuple[str, ...]]:
    """The model's names to the published ones."""
    names = PUBLISHED_NAMES | (GEPA_NAMES if config.tensor_names == "gepa" else {})
    return names | (TOKEN_SMEAR_NAMES if config.smear == "token" else {})


def published_views(config, tensors) -> dict[str, torch.Tensor]:
    """Views of `tensors` (parameters, gradients, averages: name to tensor) under the published names, one matrix or vector each."""
    names = published_names(config)
    views = {}
    for name, tensor in tensors.items():
        if "{}" not in names[name][0]:
            views[names[name][0]] = tensor
            continue
        for published, part in zip(names[name], tensor.chunk(len(names[name]))):
            views |= {published.format(i): view for i, view in enumerate(part)}
    return views
