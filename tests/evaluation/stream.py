"""A small model, a small validation stream, and the losses of a window by definition: what every evaluator's test compares with."""

import dataclasses

import numpy as np
import torch

from pgolf_fast.data import Validation
from pgolf_fast.model import GPT, ModelConfig

CONFIG = ModelConfig(
    vocab_size=48,
    num_layers=4,
    model_dim=32,
    num_heads=2,
    num_kv_heads=1,
    rope_dims=8,
    rope_train_seq_len=16,
    mlp_mult=2.0,
    xsa_last_n=2,
    bigram_buckets=32,
    bigram_dim=8,
    smear="channel",
    value_embed=True,
    ve_dim=8,
    ve_layers=(2, 3),
    activation="star_relu2",
    skip_gates=True,
    bf16_tensors=(),
)


def model(seed: int = 3, **changed) -> GPT:
    """Every tensor matters: none is zero."""
    made = GPT(dataclasses.replace(CONFIG, **changed), seed, stream_dtype=torch.float32)
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in made.parameters():
            p += 0.2 * torch.randn(p.shape, generator=noise)
    return made


def validation(num_positions: int, seed: int = 5) -> Validation:
    rng = np.random.default_rng(seed)
    tokens = rng.integers(2, CONFIG.vocab_size, num_positions + 1).astype(np.uint16)
    tokens[np.concatenate([[0], rng.integers(1, num_positions, num_positions // 40)])] = 1
    target_bytes = np.where(tokens[1:] == 1, 0, rng.integers(1, 6, num_positions)).astype(np.uint16)
    return Validation(tokens, target_bytes, np.flatnonzero(tokens[:num_positions] == 1), False)


@torch.no_grad()
def window_losses(gpt, tokens: np.ndarray, start: int, end: int, row: int) -> np.ndarray:
    """float64 nats of positions start..end-1, the window alone, padded to `row` tokens: the rotary base follows the row's length."""
    stream = torch.from_numpy(tokens[start : end + 1].astype(np.int64))
    padded = torch.cat([stream[:-1], torch.zeros(row - (end - start), dtype=torch.int64)])
    logits = gpt(padded[None])[0, : end - start].double()
    return (torch.logsumexp(logits, 1) - logits.gather(1, stream[1:, None])[:, 0]).numpy()


def sliding_losses(gpt, tokens: np.ndarray, window: int, stride: int, first: int = 0, stop: int | None = None) -> np.ndarray:
    """Section 6.2, of the positions first..stop-1: window 0 scores all its positions, every other one its last `stride`."""
    stop = len(tokens) - 1 if stop is None else stop
    losses = np.full(len(tokens) - 1, np.nan)
    for start in range(0, len(tokens) - window, stride):
        scored_from = 0 if start == 0 else start + window - stride
        if first <= scored_from < stop:
            losses[scored_from : start + window] = window_losses(gpt, tokens, start, start + window, window)[scored_from - start :]
    return losses[first:stop]
