"""The negative control learns what it must not, and says so."""

import copy
import dataclasses

import numpy as np
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


def test_every_step_is_the_published_one():
    """Section 6.4, with torch's own SGD: passes over 8 rows, three at a time; the positions behind the last whole row are left out."""
    gpt, validation = stream.model(), stream.validation(8 * 32 + 20)
    student, teacher = copy.deepcopy(gpt), copy.deepcopy(gpt)
    config = dataclasses.replace(CONFIG, epochs=2, freeze_blocks=0, grad_clip=0.5, momentum=0.8)
    text = torch.from_numpy(validation.tokens[:257].astype(np.int64))
    inputs, targets = text[:-1].view(8, 32), text[1:].view(8, 32)
    sgd = torch.optim.SGD(student.parameters(), lr=0.05, momentum=0.8)
    for rows in [slice(0, 3), slice(3, 6), slice(6, 8)] * 2:
        sgd.zero_grad()
        with torch.no_grad():
            wanted = teacher(inputs[rows])
        loss_of(student(inputs[rows]), wanted, targets[rows], 2.0).backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 0.5)
        sgd.step()
    self_distill(gpt, validation, 32, config)
    for (name, p), q in zip(gpt.named_parameters(), student.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5, msg=name)


def test_too_little_text():
    with pytest.raises(UserError, match="20 positions are not a row of 32"):
        self_distill(stream.model(), stream.validation(20), 32, CONFIG)


@pytest.mark.parametrize(("field", "value"), [("temperature", 0.0), ("batch_rows", 0)])
def test_bad_settings_are_named(field, value):
    with pytest.raises(UserError, match=f"^sdttt.{field}: expected .*, got {value}"):
        dataclasses.replace(CONFIG, **{field: value})


def test_off_unless_asked_for_and_else_as_published():
    assert SelfDistillationConfig() == SelfDistillationConfig(False, 2, 0.001, 0.9, 1.0, 2.0, 4, 32)
