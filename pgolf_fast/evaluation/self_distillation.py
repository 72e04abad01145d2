"""Self-distillation on the validation text (SDTTT, PR #379): a negative control, never a score.

It trains on targets before they are scored, so what is scored afterwards is not legal; the published run switched it off, as it made the
score worse (1.1428 to 1.1431). The referee cannot express it: this function takes the tokens themselves, and what follows it is marked.
"""

import copy
from dataclasses import dataclass

import torch.nn.functional as F

from pgolf_fast import dist
from pgolf_fast.data import Validation
from pgolf_fast.errors import UserError
from pgolf_fast.evaluation.score_first_sgd import Sgd, StepPlan, TttConfig
from pgolf_fast.settings import requirer, setting

DISTILLED, OBSERVED = 0.7, 0.3  # weights of the teacher's distribution and of the text in the loss


@dataclass(frozen=True)
class SelfDistillationConfig:
    enabled: bool = setting(False, "train on the validation text before it is scored: a negative control, not legal", "SDTTT_ENABLED")
    epochs: int = setting(2, "passes over the whole split", "SDTTT_EPOCHS")
    lr: float = setting(0.001, "learning rate, constant", "SDTTT_LR")
    momentum: float = setting(0.9, "of the SGD")
    grad_clip: float = setting(1.0, "norm of the whole gradient at most; 0: no limit")
    temperature: float = setting(2.0, "of both distributions in the distilled part", "SDTTT_TEMPERATURE")
    freeze_blocks: int = setting(4, "first blocks that are not trained", "SDTTT_FREEZE_BLOCKS")
    batch_rows: int = setting(32, "rows per rank and step")

    def __post_init__(self):
        require = requirer("sdttt")
        require(self.temperature > 0, "temperature", f"expected > 0, got {self.temperature}")
        require(self.batch_rows > 0, "batch_rows", f"expected at least 1, got {self.batch_rows}")


def self_distill(model, validation: Validation, seq_len: int, config: SelfDistillationConfig) -> None:
    """Trains `model` in place. Rows are contiguous parts of the stream per rank; rows that do not divide by the ranks are left out."""
    device = next(model.parameters()).device
    rows = len(validation) // seq_len // dist.world_size()
    if rows == 0:
        raise UserError(f"sdttt: {len(validation):,} positions are not a row of {seq_len:,} for each of {dist.world_size()} ranks")
    teacher = copy.deepcopy(model).requires_grad_(False)
    optimizer = Sgd(model, TttConfig(momentum=config.momentum, grad_clip=config.grad_clip, freeze_blocks=config.freeze_blocks))
    plan = StepPlan(config.lr, fake_quant=False)
    for _ in range(config.epochs):
        for begin in range(0, rows, config.batch_rows):
            first = (dist.rank() * rows + begin) * seq_len
            inputs, targets, _ = validation.slice(first, first + min(config.batch_rows, rows - begin) * seq_len)
            inputs, targets = (t.view(-1, seq_len).to(device) for t in (inputs, targets))
            loss_of(model(inputs), teacher(inputs), targets, config.temperature).backward()
            optimizer.set(plan)
            optimizer.step()


def loss_of(logits, teacher_logits, targets, temperature):
    """0.7 tau^2 KL(teacher || student) at temperature tau + 0.3 cross-entropy, both means over tokens."""
    student, teacher = ((z / temperature).flatten(0, 1).log_softmax(-1) for z in (logits, teacher_logits))
    distilled = temperature**2 * F.kl_div(student, teacher, reduction="batchmean", log_target=True)
    return DISTILLED * distilled + OBSERVED * F.cross_entropy(logits.flatten(0, 1), targets.flatten())
