"""What an artifact holds: the declared tensors of its recipe's model, and no validation text."""

import math
from pathlib import Path

import numpy as np
import torch

from pgolf_fast import artifact, export, shards
from pgolf_fast.audit.invariants import FAIL, PASS, UNTESTED, Finding, finding
from pgolf_fast.errors import UserError
from pgolf_fast.ledger import CAP_BYTES
from pgolf_fast.quantize import Codes
from pgolf_fast.recipe import Recipe

RUN_TOKENS = 8  # validation tokens in a row that no weights hold by chance
SAMPLED_EVERY = 64  # positions of the validation text whose run is looked for; a planted stretch of 71 tokens surely holds one


def audit_contents(path: Path, data: Path | None) -> tuple[tuple[str, Recipe] | None, list[Finding]]:
    """The recipe that the artifact names, if it does, and what was found.

    data  the folder with the validation shards that must not be in the file
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"artifact: cannot read {path} ({error.strerror})") from None
    fits = len(content) <= CAP_BYTES
    size = finding("size", PASS if fits else FAIL, f"{len(content):,} of {CAP_BYTES:,} bytes, code not counted (pgolf pack counts it)")
    loaded = artifact.unpack(content)
    described, declared = _declared(path, loaded, content)
    return described, [size, declared, no_validation_text(content, loaded.tensors, data)]


def _declared(path: Path, loaded: artifact.Artifact, content: bytes) -> tuple[tuple[str, Recipe] | None, Finding]:
    try:
        name, settings = export.recipe_of(loaded.metadata, str(path))
        export.build_model(settings, loaded.tensors)
    except UserError as error:
        return None, finding("declared tensors", FAIL, str(error))
    if extra := loaded.metadata.keys() - {"recipe", "settings"}:
        return (name, settings), finding("declared tensors", FAIL, f"its metadata holds more than a recipe: {', '.join(sorted(extra))}")
    if artifact.pack(loaded.tensors, loaded.codec, loaded.metadata) != content:
        said = (
            "packed again it gives other bytes: it holds something beside its tensors, or other versions of the codec's libraries made it"
        )
        return (name, settings), finding("declared tensors", FAIL, said)
    weights = sum((t.codes if isinstance(t, Codes) else t).numel() for t in loaded.tensors.values())
    said = f"{len(loaded.tensors)} tensors, {weights:,} weights: those of recipe {name}, no other; packed again they give this file"
    return (name, settings), finding("declared tensors", PASS, said)


def no_validation_text(content: bytes, tensors, data: Path | None) -> Finding:
    if data is None:
        return finding("no validation text", UNTESTED, "say --data FOLDER with the validation shards")
    tokens = shards.read_split(shards.require_shards(data, "val"))
    hidden = [("the file", content)]
    for name, tensor in tensors.items():
        parts = [tensor.codes, tensor.scales] if isinstance(tensor, Codes) else [tensor]
        hidden += [(name, part.contiguous().flatten().view(torch.uint8).numpy().tobytes()) for part in parts]
    for order in ("<u2", ">u2"):
        runs = sampled_runs(tokens, order)
        for name, data_bytes in hidden:
            found = find_run(data_bytes, runs)
            if found is not None:
                said = f"{name} holds validation tokens at byte {found:,}: a run of {RUN_TOKENS}, as 16-bit numbers"
                return finding("no validation text", FAIL, said)
    num_bytes = sum(len(b) for _, b in hidden)
    said = (
        f"no {RUN_TOKENS} validation tokens in a row as 16-bit numbers in {num_bytes:,} bytes of file and tensors; blind to other codings"
    )
    return finding("no validation text", PASS, said)


def sampled_runs(tokens: np.ndarray, order: str) -> np.ndarray:
    """uint64 [k, 2], sorted: runs of RUN_TOKENS tokens as stored in bytes."""
    num = max(0, (len(tokens) - RUN_TOKENS) // SAMPLED_EVERY + 1)
    places = SAMPLED_EVERY * np.arange(num)[:, None] + np.arange(RUN_TOKENS)
    runs = np.ascontiguousarray(tokens[places].astype(order)).view(np.uint64).reshape(num, 2)
    return runs[np.lexsort((runs[:, 1], runs[:, 0]))]


def find_run(data: bytes, runs: np.ndarray) -> int | None:
    """Place of the first run found in `data`, at any byte."""
    first = np.unique(runs[:, 0])
    pairs = set(map(tuple, runs.tolist()))
    found = math.inf
    for shift in range(8):
        words = np.frombuffer(data, np.uint64, max(0, len(data) - shift) // 8, shift) if len(data) >= shift + 8 else np.empty(0, np.uint64)
        if len(words) < 2 or len(first) == 0:
            continue
        place = np.searchsorted(first, words[:-1]).clip(max=len(first) - 1)
        for i in np.flatnonzero(first[place] == words[:-1]).tolist():
            if (int(words[i]), int(words[i + 1])) in pairs:
                found = min(found, 8 * i + shift)
                break
    return None if found == math.inf else int(found)
