"""What a GPU does once, done before the clock runs and without the validation text."""

import itertools

import numpy as np

from pgolf_fast.data import Validation
from pgolf_fast.evaluation.referee import Evaluator, Referee


def rehearse(evaluator: Evaluator, num_positions: int) -> None:
    """The first two chunks of a stream of random ids through the evaluator; its state is then as before."""
    model = evaluator.model
    tokens = np.random.default_rng(0).integers(2, model.config.vocab_size, num_positions + 1).astype(np.uint16)
    synthetic = Validation(tokens, np.ones(num_positions, np.uint16), np.zeros(0, np.int64), False)
    tensors, state = evaluator.state()
    before = {name: t.clone() for name, t in tensors.items()}
    for _ in itertools.islice(evaluator.chunks(Referee(model, synthetic, model.tok_emb.device)), 2):
        pass
    evaluator.load_state(before, state)
