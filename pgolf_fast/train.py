"""Settings of the training loop."""

from dataclasses import dataclass

from pgolf_fast.errors import UserError
from pgolf_fast.settings import setting


@dataclass(frozen=True)
class TrainConfig:
    run_id: str = setting("", "name of the run's folder; empty: made from the recipe and the time", "RUN_ID")
    seed: int = setting(1337, "of the initial weights; the order of the data does not depend on it", "SEED")
    batch_tokens: int = setting(786432, "tokens per step, over all ranks", "TRAIN_BATCH_TOKENS")
    micro_batches: int = setting(8, "parts of a step, each one forward and backward; a multiple of the number of ranks")
    seq_len: int = setting(2048, "tokens of context in training", "TRAIN_SEQ_LEN")
    warmup_steps: int = setting(20, "full steps before the clock starts, of which nothing is kept", "WARMUP_STEPS")
    val_every: int = setting(4000, "steps between validations; 0: only after the last step", "VAL_LOSS_EVERY")
    val_batch_tokens: int = setting(524288, "tokens per validation batch, over all ranks", ("VAL_BATCH_SIZE", "VAL_BATCH_TOKENS"))
    log_every: int = setting(500, "steps between lines of the text log", "TRAIN_LOG_EVERY")

    def __post_init__(self):
        for field in ("batch_tokens", "micro_batches", "seq_len", "val_batch_tokens", "log_every"):
            if getattr(self, field) < 1:
                raise UserError(f"train.{field}: expected at least 1, got {getattr(self, field)}")
        rows = self.micro_batches * self.seq_len
        if self.batch_tokens % rows:
            raise UserError(f"train.batch_tokens: {self.batch_tokens} is no multiple of micro_batches x seq_len, {rows}")
