"""Output head and softcapped cross-entropy in one: logits = x weight^T, then `softcap_cross_entropy`."""

from pgolf_fast.ops._library import require, require_device, require_dtype
from pgolf_fast.ops.softcap_ce import softcap_cross_entropy, softcap_cross_entropy_ref


def linear_softcap_cross_entropy_ref(x, weight, targets, cap=30.0, reduction="mean", ignore_index=-100):
    """The definition.  x [N, D], weight [V, D], targets [N]"""
    return softcap_cross_entropy_ref(x @ weight.T, targets, cap, reduction, ignore_index)


def linear_softcap_cross_entropy(x, weight, targets, cap=30.0, reduction="mean", ignore_index=-100):
    """Softcapped cross-entropy of the head `x @ weight.T`.

    x        [N, D], float
    weight   [V, D], the dtype of x
    targets  [N], int64, each in [0, V) or `ignore_index`
    """
    require(x.dim() == 2, "x", f"expected [N, D], got shape {list(x.shape)}")
    require(x.is_floating_point(), "x", f"expected a float dtype, got {x.dtype}")
    require(weight.dim() == 2 and weight.shape[1] == x.shape[1], "weight", f"expected [V, {x.shape[1]}], got shape {list(weight.shape)}")
    require_dtype(weight, "weight", (x.dtype,))
    require_device(weight, "weight", x.device)
    return softcap_cross_entropy(x @ weight.T, targets, cap, reduction, ignore_index)
