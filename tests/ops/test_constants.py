"""What the kernels' headers and the Python ops both state is the same."""

import importlib
import re
from pathlib import Path

import pytest

from pgolf_fast.ops import _library

KERNELS = Path(__file__).parents[2] / "csrc" / "kernels"
# Stem of the header and of the op, C++ name, Python name.
CONSTANTS = [
    ("attn_gate", "kGateHeads", "HEADS"),
    ("attn_gate", "kGateMaxWindow", "MAX_WINDOW"),
    ("embed_norm", "kEmbedNormWidth", "KERNEL_WIDTH"),
    ("embed_norm", "kEmbedNormMaxCtas", "MAX_CTAS"),
    ("embedding", "kEmbeddingRange", "RANGE"),
    ("fused_mlp", "kFusedMlpRowTile", "ROW_TILE"),
    ("linear_softcap_ce", "kLinearSoftcapCEDepth", "KERNEL_DEPTH"),
    ("linear_softcap_ce", "kLinearSoftcapCEVocabularyMultiple", "KERNEL_VOCABULARY_MULTIPLE"),
    ("linear_softcap_ce", "kLinearSoftcapCEMaxCap", "KERNEL_MAX_CAP"),
    ("mix_norm", "kMixNormWidth", "KERNEL_WIDTH"),
    ("mix_norm", "kMixNormMaxTensors", "MAX_TENSORS"),
    ("mix_norm", "kMixNormMaxCtas", "MAX_CTAS"),
    ("optimizer_step", "kOptimizerMaxTensors", "MAX_TENSORS"),
    ("orthogonalize", "kOrthogonalizeMaxSteps", "MAX_STEPS"),
    ("orthogonalize", "kOrthogonalizeSquares", "SQUARES"),
    ("products", "kProductColumnTile", "COLUMN_TILE"),
    ("qkv", "kQkvHeadDim", "HEAD_DIM"),
    ("qkv", "kQkvRotated", "ROTATED"),
    ("qkv", "kQkvMaxHeads", "MAX_HEADS"),
    ("xsa_attention", "kXsaHeadDim", "HEAD_DIM"),
    ("xsa_attention", "kXsaKeysPerBlock", "KEYS_PER_BLOCK"),
]
ENUMS = [
    ("embed_norm", "Smear", "SMEARS"),
    ("fused_mlp", "Activation", "ACTIVATIONS"),
    ("softcap_ce", "SoftcapCEReduction", "REDUCTIONS"),
]


def of_op(stem, name):
    return getattr(importlib.import_module(f"pgolf_fast.ops.{stem}"), name)


def of_header(header, name):
    (literal,) = re.findall(rf"constexpr (?:int|float) {name} = ([^;]+);", (KERNELS / header).read_text())
    literal = literal.removesuffix("f")
    return float.fromhex(literal) if literal.startswith("0x") else float(literal)


@pytest.mark.parametrize("stem, native, python", CONSTANTS)
def test_constant(stem, native, python):
    assert of_header(f"{stem}.h", native) == of_op(stem, python)


def test_least_norms():
    assert of_header("common/norm.h", "kRmsEpsilon") == _library.RMS_EPSILON
    assert of_header("xsa_attention.h", "kXsaLeastSquare") == of_op("xsa_attention", "EPSILON") ** 2


@pytest.mark.parametrize("stem, native, python", ENUMS)
def test_enum(stem, native, python):
    """Python passes an index: the order is the same, kLeakyRelu2 is leaky_relu2, and where values are given they count from 0."""
    (members,) = re.findall(rf"enum class {native}[^{{]*{{([^}}]+)}}", (KERNELS / f"{stem}.h").read_text())
    entries = [re.fullmatch(r"k(\w+)(?: = (\d+))?", entry.strip()).groups() for entry in members.split(",")]
    assert tuple(re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower() for name, _ in entries) == of_op(stem, python)
    assert all(value is None or int(value) == i for i, (_, value) in enumerate(entries))


def test_workspace_of_the_losses():
    """sizeof(SoftcapCEWorkspace): doubles, int64s and two 32-bit counters."""
    of_eight_bytes = [of_header("softcap_ce.h", name) for name in ("kMaxCtas", "kCountCtas")]
    assert of_op("softcap_ce", "WORKSPACE_BYTES") == 8 * sum(of_eight_bytes) + 8
