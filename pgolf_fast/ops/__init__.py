"""The public ops. Each module holds, in this order: reference, schema and
CPU implementation, CUDA paths, fake, autograd, public function."""

from pgolf_fast.ops.embed_norm import embed_norm
from pgolf_fast.ops.embedding import embedding, embedding_plan
from pgolf_fast.ops.fused_mlp import fused_mlp
from pgolf_fast.ops.int6_pack import pack_int6, unpack_int6
from pgolf_fast.ops.linear_softcap_ce import linear_softcap_cross_entropy
from pgolf_fast.ops.mix_norm import mix_norm
from pgolf_fast.ops.orthogonalize import orthogonalize
from pgolf_fast.ops.softcap_ce import softcap_cross_entropy
from pgolf_fast.ops.xsa_attention import xsa_attention

__all__ = [
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
