"""The negative control learns what it must not, and says so."""

import dataclasses

import pytest
import torch

from pgolf_fast.errors import UserError
from pgolf_fast.evaluation.referee import Referee
from pgolf_fast.evaluation.self_distillation import SelfDistillationConfig, loss_of, self_distill
from pgolf_fast.evaluation.sliding import SlidingWindow
from tests.evaluation import stream

CONFIG = SelfDistillationConfig(lr=0.05, freeze_blocks=2, batch_rows=3)


def test_loss_by_definition():
    z, t = torch.randn(2, 5, 48, dtype=torch.float64), torch.randn(2, 5, 48, dtype=torch.float64)
    targets = torch.randint(0, 48, (2, 5))
    p, q = (t / 2).softmax(-1), (z / 2).softmax(-1)
    expected = 0.7 * 4 * (p * (p.log() - q.log())).sum(-1).mean() - 0.3 * z.log_softmax(-1).gather(-1, targets[..., None]).mean()
    torch.testing.assert_close(loss_of(z, t, targets, 2.0), expected)


def test_it_lowers_the_losses_of_the_text_it_saw_and_leaves_frozen_blocks():
    gpt, validation = stream.model(), stream.validation(256)
    before = {name: v.clone() for name, v in gpt.published_tensors().items()}

    def nats():
        referee = Referee(gpt, validation)
        list(SlidingWindow(gpt, 32, 32, 256).chunks(referee))
        return referee.result().score.nats

    fixed = nats()
    self_distill(gpt, validation, 32, dataclasses.replace(CONFIG, epochs=6))
    assert nats() < 0.97 * fixed
    for name, view in gpt.published_tensors().items():
        is_frozen = name.startswith(("blocks.0.", "blocks.1."))
        assert torch.equal(view, before[name]) == is_frozen, name


def test_too_little_text():
    with pytest.raises(UserError, match="20 positions are not a row of 32"):
        self_distill(stream.model(), stream.validation(20), 32, CONFIG)


def test_off_unless_asked_for():
    assert not SelfDistillationConfig().enabled
