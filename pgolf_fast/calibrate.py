"""Calibration: the second moments of every matrix's inputs over training text, which GPTQ rounds by.

    rows = Windows(folder, seq_len)          training text in PR #1855's random order
    hessians(model, rows.take(n), batches)   published name to H = sum of x x^T over the number of batches

Only training shards are read, and reading them counts as training time.
"""

from collections.abc import Iterable

import numpy as np
import torch

from pgolf_fast import shards
from pgolf_fast.errors import UserError
from pgolf_fast.gptq import HessianSum
from pgolf_fast.model import GPT, rms
from pgolf_fast.tensor_names import published_names

SHARDS_APART = 8  # the published run's ranks: rank 0, whose result alone is kept, reads every eighth shard


class Windows:
    """Rows of training text: the windows of `seq_len` tokens of some shards, each once before any comes again.

    The draws are the published sampler's: per shard a phase and a permutation of its windows; per row a shard, in proportion to the
    windows that it has left, and the last window of that shard's permutation.
    """

    def __init__(self, folder, seq_len: int, vocab_size: int | None = None, rank: int = 0):
        self.seq_len = seq_len
        paths = shards.require_shards(folder, "train")
        self.maps = [shards.open_shard(path, vocab_size) for path in paths[rank::SHARDS_APART] or paths[:1]]
        if all(len(tokens) <= 2 * seq_len for tokens in self.maps):
            raise UserError(f"{folder}: no training shard holds two windows of {seq_len} tokens to calibrate on")
        self.rng = np.random.Generator(np.random.PCG64(rank))
        self._deal()

    def _deal(self):
        self.starts = []
        for tokens in self.maps:
            phase = int(self.rng.integers(0, max(1, min(self.seq_len, len(tokens) - self.seq_len))))
            count = max(0, (len(tokens) - 1 - phase) // self.seq_len)
            self.starts.append((phase + self.seq_len * self.rng.permutation(count)).tolist())

    def take(self, rows: int) -> torch.Tensor:
        """The next rows, int64 [rows, seq_len + 1]."""
        found = np.empty((rows, self.seq_len + 1), np.int64)
        for row in found:
            left = np.array([len(starts) for starts in self.starts])
            if not left.any():
                self._deal()
                left = np.array([len(starts) for starts in self.starts])
            shard = int(self.rng.choice(len(left), p=left / left.sum()))
            start = self.starts[shard].pop()
            row[:] = self.maps[shard][start : start + self.seq_len + 1]
        return torch.from_numpy(found)


@torch.inference_mode()
def hessians(model: GPT, batches: Iterable[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Published name of each block matrix and of the tied head to its Hessian, fp32 on the model's device.

    batches  tokens [B, T]; each row is attended to as one document, loops run, and a block's visits are summed
    """
    config, device = model.config, model.tok_emb.device
    sums: dict[tuple, HessianSum] = {}

    def observe(block, matrices, x):
        sums.setdefault((block, matrices), HessianSum(x.shape[-1], device)).add(x)

    num_batches = 0
    for tokens in batches:
        observe(None, "head", rms(model.stream(tokens.to(device), observe=observe)))
        num_batches += 1
    means = {tap: total.mean(num_batches) for tap, total in sums.items()}

    names = published_names(config)
    (q, o), (k, v), (up,), (down,) = (names[stack] for stack in ("qo", "kv", "mlp_up", "mlp_down"))
    readers = {"qkv": (q, k, v), "o": (o,), "up": (up,), "down": (down,), "head": names["tok_emb"]}
    return {name.format(block): mean for (block, matrices), mean in means.items() for name in readers[matrices]}
