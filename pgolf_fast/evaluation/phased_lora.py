"""Phased test-time training with low-rank adapters: the evaluator of PR #1934.

    documents, longest first, in batches; a set of adapters per document
        chunk by chunk    score the chunk of every document  ->  one AdamW step of the adapters
    at the pauses         SGD of all weights over documents that are scored

Documents of a batch do not touch each other. What goes from one batch to the next is each set's `down` half, which
starts the document that follows in its place, and the weights, once a pause has changed them.

The published script hands the next batch to whichever GPU asks first, so its score depends on their timing. Here a queue simulated over
`lanes` equal workers, with the number of tokens read for time, says who gets which batch and when the pauses fall; rank r
does the work of the lanes r, r + world size, ... in their order. So the score is the same for every number of ranks.
"""

import heapq
import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pgolf_fast import dist
from pgolf_fast.adapters import Adapters
from pgolf_fast.data import Batch, pack_segments
from pgolf_fast.errors import UserError
from pgolf_fast.evaluation.replays import Replays
from pgolf_fast.evaluation.score_first_sgd import Sgd, StepPlan, TttConfig
from pgolf_fast.evaluation.windows import Windows
from pgolf_fast.settings import requirer, setting
from pgolf_fast.step import GraphedStep, Step

SEGMENT_ENTRIES = 256  # of a row's documents: a multiple of it, one size for nearly every row of a pause


@dataclass(frozen=True)
class PhasedLoraConfig:
    seed: int = setting(1337, "of the adapters' first values")
    lanes: int = setting(8, "workers that the batches and the rows of a global chunk are shared out over; at most so many ranks")
    window_tokens: int = setting(2048, "context of a prediction", "TTT_EVAL_SEQ_LEN")
    chunk_tokens: int = setting(48, "predictions per document between two updates of its adapters", "TTT_CHUNK_SIZE")
    batch_documents: int = setting(64, "documents scored side by side", "TTT_BATCH_SIZE")
    row_multiple: int = setting(128, "tokens; rows are padded to a multiple of it, one recorded step each, without effect on a score")
    rank: int = setting(96, "of the adapters", "TTT_LORA_RANK")
    alpha: float = setting(144.0, "corrections are scaled by alpha / rank", "TTT_LORA_ALPHA")
    lr: float = setting(1e-4, "of the adapters, constant", "TTT_LORA_LR")
    beta2: float = setting(0.999, "of their AdamW, whose beta1 is 0", "TTT_BETA2")
    epsilon: float = setting(1e-10, "of their AdamW")
    weight_decay: float = setting(1.0, "of their AdamW, times lr per step", "TTT_WEIGHT_DECAY")
    prefix_documents: int = setting(
        2000, "scored documents after which the last pause comes, and which it learns from", "PHASED_TTT_PREFIX_DOCS"
    )
    phases: int = setting(3, "pauses, at equal parts of prefix_documents", "PHASED_TTT_NUM_PHASES")
    global_lr: float = setting(0.001, "of all weights at a pause, falling along a cosine", "GLOBAL_TTT_LR")
    global_momentum: float = setting(0.9, "of that SGD", "GLOBAL_TTT_MOMENTUM")
    global_clip: float = setting(1.0, "largest norm of its gradient", "GLOBAL_TTT_GRAD_CLIP")
    global_chunk_tokens: int = setting(32768, "tokens of one of its steps; a multiple of lanes", "GLOBAL_TTT_CHUNK_TOKENS")

    def __post_init__(self):
        require = requirer("lora")
        for field in ("lanes", "window_tokens", "chunk_tokens", "batch_documents", "row_multiple", "rank", "global_chunk_tokens"):
            require(getattr(self, field) > 0, field, f"expected at least 1, got {getattr(self, field)}")
        require(
            self.chunk_tokens <= self.window_tokens, "chunk_tokens", f"{self.chunk_tokens} do not fit into a window of {self.window_tokens}"
        )
        require(
            self.global_chunk_tokens % self.lanes == 0,
            "global_chunk_tokens",
            f"{self.global_chunk_tokens} is no multiple of the {self.lanes} lanes",
        )
        require(self.beta2 < 1, "beta2", f"expected below 1, got {self.beta2}")
        require(self.epsilon > 0, "epsilon", "expected above 0: a gradient of 0 would be divided by it")


# --- who does what, known before anything is scored ---------------------------------------------------------------------


class Turn(NamedTuple):
    lane: int
    batch: int


class Phase(NamedTuple):
    turns: list[Turn]  # in the order of their begin
    learned: np.ndarray  # documents of the SGD that follows; empty: none follows


class Plan(NamedTuple):
    batches: list[np.ndarray]  # document numbers, shortest documents first
    phases: list[Phase]


def plan(lengths: np.ndarray, config: PhasedLoraConfig) -> Plan:
    """lengths  predictions of each document"""
    ascending = np.argsort(lengths, kind="stable")
    size = config.batch_documents
    batches = [ascending[i : i + size] for i in range(0, len(ascending), size)]
    waiting = list(range(len(batches)))  # taken from the end
    boundaries = [config.prefix_documents * k // config.phases for k in range(1, config.phases + 1)]
    boundaries = [boundary for boundary in boundaries if boundary > 0]
    phases, scored = [], []
    while waiting:
        turns, num_scored = [], sum(len(batches[b]) for b in scored)
        boundary = boundaries[len(phases)] if len(phases) < len(boundaries) else math.inf
        busy = [(0, lane, None) for lane in range(config.lanes)]  # (time at which it is free, lane, its batch)
        while busy:
            time, lane, done = heapq.heappop(busy)
            if done is not None:
                scored.append(done)
                num_scored += len(batches[done])
            if waiting and num_scored < boundary:
                batch = waiting.pop()
                turns.append(Turn(lane, batch))
                heapq.heappush(busy, (time + tokens_read(lengths[batches[batch]], config), lane, batch))
        learned = np.concatenate([batches[b] for b in sorted(scored)])[:boundary] if waiting else ascending[:0]
        phases.append(Phase(turns, learned))
    return Plan(batches, phases)


def tokens_read(lengths: np.ndarray, config: PhasedLoraConfig) -> int:
    """By one batch, whose rows are as long as its longest."""
    ends = config.chunk_tokens * np.arange(1, _num_chunks(lengths, config).max() + 1)
    return len(lengths) * int(np.minimum(ends, config.window_tokens).sum())


def _num_chunks(lengths: np.ndarray, config: PhasedLoraConfig) -> np.ndarray:
    return -(-lengths // config.chunk_tokens)


class _PauseSgd(Sgd):
    """Its gradient is the mean over the rows of all lanes."""

    def __init__(self, model, config: PhasedLoraConfig):
        super().__init__(model, TttConfig(momentum=config.global_momentum, grad_clip=config.global_clip))
        self.rows_per_rank = config.lanes // dist.world_size()

    def restart(self) -> None:
        torch._foreach_zero_(list(self.momentum.values()))

    def step(self) -> None:
        torch._foreach_div_([p.grad for p in self.params.values()], self.rows_per_rank)
        super().step()


# --- the evaluator ------------------------------------------------------------------------------------------------------


class PhasedLora:
    """An `Evaluator`; see referee.py."""

    def __init__(self, model, config: PhasedLoraConfig):
        if config.lanes % dist.world_size():
            raise UserError(
                f"lora.lanes: {config.lanes} lanes cannot be shared by {dist.world_size()} ranks; use a multiple of {dist.world_size()}"
            )
        self.weights, self.config = model, config
        self.device = model.tok_emb.device
        on_gpu = self.device.type == "cuda"
        self.sgd = (GraphedStep if on_gpu else Step)(model, _PauseSgd(model, config), config.window_tokens)
        model.requires_grad_(False)
        self.model = Replays(model, config.chunk_tokens) if on_gpu else model
        self.phase = self.round = 0  # next to be done
        self.lane_down: dict[int, Tensor] = {}  # what a lane's next batch starts from
        self.adapters: dict[int, Adapters] = {}  # by number of documents

    def chunks(self, referee):
        """Stops at the end of a round, in which each rank scores one batch, and after the SGD of a pause."""
        starts = np.union1d(referee.document_starts, [0])
        ends = np.append(starts[1:], referee.num_positions)
        batches, phases = plan(ends - starts, self.config)
        world, rank = dist.world_size(), dist.rank()
        while self.phase < len(phases):
            turns, learned = phases[self.phase]
            shares = [[turn for turn in turns if turn.lane % world == r] for r in range(world)]
            while self.round < max(map(len, shares)):
                if self.round < len(shares[rank]):
                    lane, batch = shares[rank][self.round]
                    self.score_batch(referee, lane, starts[batches[batch]], ends[batches[batch]])
                self.round += 1
                yield
            if len(learned):
                referee.meet()
                self.learn_globally(referee, [referee.reveal(starts[d], ends[d]) for d in learned])
            self.phase, self.round = self.phase + 1, 0
            self.lane_down = {}
            yield

    def warm_up(self, num_documents: int) -> None:
        """Every chunk step that a stream of so many documents needs, on random ids."""
        if isinstance(self.model, Replays):
            size, multiple = self.config.batch_documents, self.config.row_multiple
            for rows in {min(size, num_documents), num_documents % size} - {0}:
                adapters = self.adapters_for(lane=0, num_documents=rows)
                for row in range(multiple, self.config.window_tokens + multiple, multiple):
                    inputs = torch.randint(2, self.weights.config.vocab_size, (rows, row), device=self.device)
                    self.model(inputs, positions=inputs[:, :1] % row, adapters=adapters, max_seqlen=self.config.window_tokens)
                self.update(adapters)

    def close(self) -> None:
        self.sgd.close()

    # -- adapters, document by document

    def adapters_for(self, lane, num_documents) -> Adapters:
        """Ready for a batch: as the lane's last one left them, or new."""
        if num_documents not in self.adapters:
            self.adapters[num_documents] = Adapters(self.weights, num_documents, self.config.rank, self.config.alpha / self.config.rank)
        adapters = self.adapters[num_documents]
        if num_documents == self.config.batch_documents and lane in self.lane_down:
            adapters.down.copy_(self.lane_down[lane])
        else:
            seed = np.random.SeedSequence((self.config.seed, self.phase, lane, num_documents)).generate_state(1, np.uint64)[0]
            adapters.fill(torch.Generator(self.device).manual_seed(int(seed) >> 1))
        adapters.restart()
        return adapters

    def score_batch(self, referee, lane, starts, ends):
        config = self.config
        adapters = self.adapters_for(lane, len(starts))
        counts = _num_chunks(ends - starts, config)
        num_chunks = torch.from_numpy(counts).to(self.device)
        for number in range(counts.max()):
            row = min(config.chunk_tokens * (number + 1), config.window_tokens)
            learns = bool(number + 1 < counts.max())
            scored = referee.score(
                chunk_windows(starts, ends, number, config),
                row_tokens=-(-row // config.row_multiple) * config.row_multiple,
                with_grad=learns,
                adapters=adapters,
                max_seqlen=config.window_tokens,
            )
            if learns:
                with referee.adapt(scored):
                    # A document's last chunk is never learned from. Its adapters then have no gradient, but they decay on.
                    has_later = num_chunks > number + 1
                    (scored.losses.sum(1) * has_later).sum().div(config.chunk_tokens).backward()
                    self.update(adapters)
        if len(starts) == config.batch_documents:
            self.lane_down[lane] = adapters.down.clone()

    def update(self, adapters) -> None:
        adapters.step(self.config.lr, self.config.beta2, self.config.epsilon, self.config.weight_decay)

    # -- all weights, at a pause

    def learn_globally(self, referee, texts):
        """One pass of SGD over the texts one after the other, all ranks together; the last chunk, whole or not, is left out."""
        config = self.config
        stream = torch.cat([text.tokens for text in texts])
        host_stream = stream.cpu().numpy()
        num_chunks = -(-(len(stream) - 1) // config.global_chunk_tokens)
        row_tokens = config.global_chunk_tokens // config.lanes

        def row(chunk, lane) -> Batch:
            start = chunk * config.global_chunk_tokens + lane * row_tokens
            segments = pack_segments(host_stream[start : start + row_tokens], config.window_tokens, SEGMENT_ENTRIES)
            inputs, targets = (stream[i : i + row_tokens] for i in (start, start + 1))
            return Batch(inputs, targets, torch.from_numpy(segments).to(self.device), 0)

        with referee.adapt(*texts):
            self.weights.requires_grad_(True)
            self.sgd.optimizer.restart()
            for chunk in range(num_chunks - 1):
                lr = config.global_lr * 0.5 * (1 + math.cos(math.pi * chunk / (num_chunks - 1)))
                own_lanes = range(dist.rank(), config.lanes, dist.world_size())
                self.sgd.run([row(chunk, lane) for lane in own_lanes], StepPlan(lr, fake_quant=False))
            self.weights.requires_grad_(False)

    # -- to stop and go on

    def state(self) -> tuple[dict[str, Tensor], dict]:
        tensors = {f"lane.{lane}": down for lane, down in self.lane_down.items()}
        if self.phase:
            tensors |= {f"weight.{name}": p.detach() for name, p in self.weights.named_parameters()}
        return tensors, {"phase": self.phase, "round": self.round}

    @torch.no_grad()
    def load_state(self, tensors: dict[str, Tensor], state: dict) -> None:
        self.phase, self.round = state["phase"], state["round"]
        self.lane_down = {
            int(name.removeprefix("lane.")): down.to(self.device) for name, down in tensors.items() if name.startswith("lane.")
        }
        if self.phase:
            for name, p in self.weights.named_parameters():
                p.copy_(tensors[f"weight.{name}"])


def chunk_windows(starts, ends, number, config: PhasedLoraConfig) -> Windows:
    """The windows of chunk `number` of each document; a document that has no such chunk reads and scores nothing."""
    first = np.minimum(starts + config.chunk_tokens * number, ends)
    end = np.minimum(first + config.chunk_tokens, ends)
    start = np.where(first < end, np.maximum(starts, end - config.window_tokens), end)
    return Windows(start, first, end)
