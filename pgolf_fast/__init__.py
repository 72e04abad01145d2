"""Kernels, trainer, quantizer and evaluator for 16 MB language models.

The ops are here. What `pgolf` does is in modules of their own: recipe.resolve and train.Trainer make a run, export.read_run and
export.quantize_run quantize it, artifact.pack and export.load_model make a file of it and a model of that, evaluation.evaluate scores.
Importing this package needs torch and numpy and nothing else.
"""

__version__ = "0.1.0"

from pgolf_fast import caseops
from pgolf_fast.ops import (
    embed_norm,
    embedding,
    embedding_plan,
    fused_mlp,
    linear_softcap_cross_entropy,
    mix_norm,
    orthogonalize,
    pack_int6,
    softcap_cross_entropy,
    unpack_int6,
    xsa_attention,
)

__all__ = [
    "caseops",
    "embed_norm",
    "embedding",
    "embedding_plan",
    "fused_mlp",
    "linear_softcap_cross_entropy",
    "mix_norm",
    "orthogonalize",
    "pack_int6",
    "softcap_cross_entropy",
    "unpack_int6",
    "xsa_attention",
]
