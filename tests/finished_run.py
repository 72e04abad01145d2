"""The folder of a small run whose training is over, without having trained."""

import numpy as np
import torch

from pgolf_fast import checkpoint, recipe
from pgolf_fast.model import GPT
from pgolf_fast.runlog import RunLog
from pgolf_fast.shards import shard_name, write_shard

SIZES = ("model.num_layers=2", "model.model_dim=64", "model.num_heads=4", "model.num_kv_heads=2", "model.vocab_size=96", "model.mlp_mult=2")
PARTS = ("model.num_loops=1", "model.ve_layers=0", "model.bigram_buckets=16", "model.bigram_dim=4", "model.attn_gate=true")
CALIBRATION = ("quantize.calibration_batches=3", "quantize.calibration_rows=2", "train.seq_len=32")


def write_run(folder, table) -> recipe.Recipe:
    """Random weights, in which no tensor is zero, and random shards; the run says it used up 600 s."""
    generator = np.random.default_rng(0)
    for split in ("train", "val"):
        write_shard(folder / shard_name(split, 0), np.array([1, *generator.integers(2, 96, 9000)], np.uint16))
    resolved = recipe.resolve("base", (*SIZES, *PARTS, *CALIBRATION, f"quantize.table={table}", f"train.data={folder}"), {})
    model = GPT(resolved.recipe.model, seed=3)
    rng = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.2 * torch.randn(p.shape, generator=rng)
    checkpoint.write(folder / "model.safetensors", model.published_tensors(), {"weights": "last step"})
    log = RunLog(folder, writes=True)
    log.document("recipe.json", resolved.record())
    log.event("end", weights="last step", ledger_s={"train": 600.0, "validate": 9.0})
    log.close()
    return resolved.recipe
