"""What happens in an optimizer step, in the order it happens:

    reduce over ranks -> clip -> Muon on this rank's matrices -> AdamW on the rest -> average (EMA) -> clear

Nothing in a step depends on a host value that changes from step to step: the learning-rate factor,
Muon's momentum and Adam's step count are tensors on the device, gradients live in buffers that never
move, and no result is read back. So a CUDA graph can replay it.
"""

import fnmatch
import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

from pgolf_fast import dist
from pgolf_fast.errors import UserError
from pgolf_fast.ops import orthogonalize
from pgolf_fast.ops.optimizer_step import adam_apply_, gradient_norm, muon_apply_, muon_direction_, wide
from pgolf_fast.settings import setting
from pgolf_fast.tensor_names import PUBLISHED_NAMES, is_per_block

CLIP_EPSILON = 1e-6  # added to the gradient's norm


@dataclass(frozen=True)
class OptimConfig:
    embed_lr: float = setting(0.035, "learning rate of embed_tensors", "TIED_EMBED_LR")
    matrix_lr: float = setting(0.025, "learning rate of muon_tensors", "MATRIX_LR")
    scalar_lr: float = setting(0.025, "learning rate of all other tensors", "SCALAR_LR")
    decoder_lr_mult: float = setting(1.0, "on the learning rate of the blocks from num_layers // 2 on", "DECODER_LR_MULT")
    embed_wd: float | None = setting(None, "weight decay of embed_tensors; none: adam_wd", "EMBED_WD")
    muon_wd: float = setting(0.04, "weight decay of muon_tensors", "MUON_WD")
    adam_wd: float = setting(0.04, "weight decay of all other tensors, gains and gates included", "ADAM_WD")

    embed_tensors: tuple[str, ...] = setting(("tok_emb",), "name patterns: AdamW at embed_lr")
    muon_tensors: tuple[str, ...] = setting(("qo", "kv", "mlp_up", "mlp_down"), "name patterns: Muon")
    frozen_tensors: tuple[str, ...] = setting((), "name patterns: not trained, and not part of the gradient's norm")

    beta1: float = setting(0.9, "of AdamW", "BETA1")
    beta2: float = setting(0.95, "of AdamW", "BETA2")
    adam_eps: float = setting(1e-8, "of AdamW", "ADAM_EPS")

    muon_coefficients: Literal["muon", "polar_express"] = setting("muon", "Newton-Schulz table (ops/orthogonalize.py)")
    muon_steps: int = setting(5, "Newton-Schulz iterations", "MUON_BACKEND_STEPS")
    muon_row_normalize: bool = setting(False, "bring the update's rows to length 1 first (MuonEq-R)", "MUON_ROW_NORMALIZE")
    muon_dtype: Literal["float32", "bfloat16"] = setting("float32", "of the averaged gradient and the momentum of muon_tensors")

    grad_clip_norm: float = setting(0.3, "L2 norm of all gradients at most; 0: no clipping", "GRAD_CLIP_NORM")
    grad_clip_scope: Literal["global", "piece"] = setting(
        "global", "clip the averaged gradient, or each micro-batch's by itself before averaging, as 8 ranks that clip alone do"
    )
    ema: bool = setting(True, "the final weights are an exponential moving average", "EMA_ENABLED")
    ema_decay: float = setting(0.997, "of that average, per step", "EMA_DECAY")
    swa: bool = setting(False, "without ema: the final weights are the mean of the schedule's snapshots", "SWA_ENABLED")

    def __post_init__(self):
        for field in ("embed_tensors", "muon_tensors", "frozen_tensors"):
            for pattern in getattr(self, field):
                if not fnmatch.filter(PUBLISHED_NAMES, pattern):
                    raise UserError(f"optim.{field}: {pattern!r} matches no parameter; they are {', '.join(PUBLISHED_NAMES)}")
        if self.muon_steps < 1:
            raise UserError(f"optim.muon_steps: expected at least 1, got {self.muon_steps}")
        if self.adam_eps <= 0:
            raise UserError("optim.adam_eps: expected above 0: a gradient of 0 would be divided by it")
        for field in ("beta1", "beta2", "ema_decay"):
            if not 0 <= getattr(self, field) < 1:
                raise UserError(f"optim.{field}: expected at least 0 and less than 1, got {getattr(self, field)}")


class Group(NamedTuple):
    patterns: tuple[str, ...]
    algorithm: Literal["adam", "muon", "none"]
    lr: float
    weight_decay: float


def groups(config) -> tuple[Group, ...]:
    """A parameter belongs to the first group that one of whose patterns matches its name."""
    embed_wd = config.adam_wd if config.embed_wd is None else config.embed_wd
    return (
        Group(config.frozen_tensors, "none", 0.0, 0.0),
        Group(config.embed_tensors, "adam", config.embed_lr, embed_wd),
        Group(config.muon_tensors, "muon", config.matrix_lr, config.muon_wd),
        Group(("*",), "adam", config.scalar_lr, config.adam_wd),
    )


def group_of(name, config) -> Group:
    return next(group for group in groups(config) if any(fnmatch.fnmatch(name, pattern) for pattern in group.patterns))


def _rates(name, param, group, config, num_layers):
    """The group's learning rate, [1]; where the decoder has its own, one for each entry of a tensor's first dimension."""
    if config.decoder_lr_mult == 1.0 or not is_per_block(name):
        return torch.full((1,), group.lr, device=param.device)
    block = torch.arange(param.shape[0], device=param.device) % num_layers
    return torch.where(block >= num_layers // 2, group.lr * config.decoder_lr_mult, group.lr).float()


def _scale_each(tensors, factor):
    for tensor in tensors:
        # NOTE: torch would round a 0-dim `factor` to bfloat16 before multiplying a bfloat16 tensor by it.
        tensor.copy_(wide(tensor) * factor) if tensor.dtype == torch.bfloat16 else tensor.mul_(factor)


def _wait(arrivals):
    for arrival in arrivals:
        arrival.wait()


class MuonBank:
    """A stack of matrices [n, rows, columns], of which each rank updates its share."""

    def __init__(self, param, rates, weight_decay, config):
        self.param, self.rates, self.weight_decay = param, rates, weight_decay
        self.count = param[..., 0, 0].numel()
        ranks = dist.world_size()
        padded = math.ceil(self.count / ranks) * ranks
        self.grad = torch.zeros((padded, *param.shape[-2:]), dtype=param.dtype, device=param.device)
        param.grad = self.grad[: self.count].view(param.shape)
        dtype = getattr(torch, config.muon_dtype)
        self.momentum = torch.zeros((padded // ranks, *param.shape[-2:]), dtype=dtype, device=param.device)
        self.shape_factor = math.sqrt(max(1.0, param.shape[-2] / param.shape[-1]))

    def reduce(self, scale=None):
        """Start adding up `scale * grad` in muon_dtype, as the published runs do; each rank receives its own matrices."""
        travelling = self.grad
        if dist.world_size() > 1 and (scale is not None or self.grad.dtype != self.momentum.dtype):
            travelling = torch.empty_like(self.grad, dtype=self.momentum.dtype)
            torch.mul(self.grad, 1.0 if scale is None else scale, out=travelling)
        self.shard, arrival = dist.sum_shard(travelling)
        return arrival

    def gather(self, update):
        """Start collecting every rank's orthogonal matrices."""
        self.update, arrival = dist.gather(update)
        return arrival


class AdamTensor:
    """What AdamW keeps of a parameter, stored as the parameter is."""

    def __init__(self, param, grad, rates, weight_decay):
        self.param, self.grad, self.rates, self.weight_decay = param, grad, rates, weight_decay
        param.grad = grad
        self.mean, self.square = torch.zeros_like(param.detach()), torch.zeros_like(param.detach())


def _flat_gradients(params):
    """One zeroed buffer per dtype for the gradients of `params`, and the part of each, on 32 bytes or more."""
    flats, parts = [], {}
    for dtype in dict.fromkeys(p.dtype for p in params.values()):
        members = {name: p for name, p in params.items() if p.dtype == dtype}
        room = [math.ceil(p.numel() / 16) * 16 for p in members.values()]
        flat = torch.zeros(sum(room), dtype=dtype, device=next(iter(members.values())).device)
        flats.append(flat)
        parts |= {name: part[: p.numel()].view(p.shape) for (name, p), part in zip(members.items(), flat.split(room))}
    return flats, parts


class Optimizer:
    """Trains a model, so:

    for each micro-batch   loss.backward(); optimizer.collect()
    then, once per step    optimizer.set(plan); optimizer.step(); and optimizer.snapshot() where the plan says so
    at the end             optimizer.load_average()

    The loss is each micro-batch's own mean, undivided: a gradient of 1 spares the loss kernel a pass over the logits.
    `num_micro_batches` is per rank. The optimizer owns the gradients' memory and clears it. Build it when the model
    is on its device, and reset it when the weights are replaced.
    """

    @torch.no_grad()
    def __init__(self, model, config: OptimConfig, num_micro_batches=1):
        self.config, self.num_micro_batches = config, num_micro_batches
        self.params = dict(model.named_parameters())
        device = next(iter(self.params.values())).device
        self.lr_factor = torch.ones((), device=device)
        self.momentum = torch.zeros((), device=device)
        self.adam_step = torch.zeros((), dtype=torch.float64, device=device)
        self.grad_norm = torch.zeros((), device=device)  # of the last clipped gradient, before clipping

        self.one = torch.ones((), device=device)

        self.banks, self.adam = {}, {}
        group = {name: group_of(name, config) for name in self.params}
        self.adam_grads, adam_grad = _flat_gradients({name: p for name, p in self.params.items() if group[name].algorithm == "adam"})
        for name, param in self.params.items():
            rates = _rates(name, param, group[name], config, model.config.num_layers)
            if group[name].algorithm == "adam":
                self.adam[name] = AdamTensor(param, adam_grad[name], rates, group[name].weight_decay)
            elif group[name].algorithm == "muon":
                if param.dim() < 2 or param.dtype == torch.bfloat16:
                    raise UserError(f"optim.muon_tensors: {name} {list(param.shape)} {param.dtype} is not a stack of float32 matrices")
                self.banks[name] = MuonBank(param, rates, group[name].weight_decay, config)
            else:
                param.requires_grad_(False)
        self.buffers = [bank.grad for bank in self.banks.values()] + self.adam_grads
        if not self.buffers:
            raise UserError("optim.frozen_tensors: they leave nothing to train")
        self.grads = {name: p.grad for name, p in self.params.items() if p.requires_grad}
        # Sums of clipped pieces, where several are clipped one by one on this rank.
        apart = self._clips("piece") and num_micro_batches > 1
        self.sums = [torch.zeros_like(buffer) for buffer in self.buffers] if apart else None
        self.ema = {name: wide(torch.empty_like(p)) for name, p in self.params.items()} if config.ema else {}
        self.reset()

    @torch.no_grad()
    def reset(self):
        """As new, with the parameters as they are now: what follows a warm-up after they were restored."""
        for state in self._state().values():
            state.zero_()
        for buffer in self.buffers + (self.sums or []):
            buffer.zero_()
        for name, average in self.ema.items():
            average.copy_(self.params[name])
        self.snapshots, self.num_snapshots = {}, 0

    @torch.no_grad()
    def set(self, plan):
        """Put a schedule.StepPlan's numbers where the step reads them."""
        self.lr_factor.fill_(plan.lr_factor)
        self.momentum.fill_(plan.muon_momentum)

    @torch.no_grad()
    def collect(self):
        """After each micro-batch's backward."""
        if any(self.params[name].grad is not grad for name, grad in self.grads.items()):
            raise RuntimeError("gradients were moved out of the optimizer's buffers: it clears them itself, do not call zero_grad()")
        if self.sums is not None:
            _scale_each(self.buffers, self._clip_factor(gradient_norm(self.buffers)))
            for total, buffer in zip(self.sums, self.buffers):
                total.add_(buffer)
                buffer.zero_()

    @torch.no_grad()
    def step(self):
        if self.sums is not None:
            for buffer, total in zip(self.buffers, self.sums):
                buffer.copy_(total)
                total.zero_()
        # What the gradients are multiplied by where they are next read: on one rank by the update, on several before they travel.
        scale, own_clip = self.one, None
        if self._clips("piece") and self.sums is None:
            own_clip = self._clip_factor(gradient_norm(self.buffers))
            if dist.world_size() == 1:
                scale = own_clip
            else:
                _scale_each(self.adam_grads, own_clip)
        # Reduce, the large banks first.
        banks = dict(sorted(self.banks.items(), key=lambda item: -item[1].grad.numel()))
        _wait([bank.reduce(own_clip) for bank in banks.values()] + [dist.sum_(grad) for grad in self.adam_grads])
        shards = [bank.shard for bank in banks.values()]
        scale = scale / (self.num_micro_batches * dist.world_size())
        if self._clips("global"):
            scale = scale * self._clip_factor(scale * self._norm_over_ranks(shards))

        directions = muon_direction_(
            shards, [bank.momentum for bank in banks.values()], scale, self.momentum, self.config.muon_row_normalize
        )
        updates = orthogonalize(directions, self.config.muon_coefficients, self.config.muon_steps)
        arrivals = [bank.gather(update) for bank, update in zip(banks.values(), updates)]
        # Adam works while Muon's updates travel.
        self.adam_step += 1
        self._apply_adam(scale)
        _wait(arrivals)
        self._apply_muon(banks)
        for buffer in self.buffers:
            buffer.zero_()

    def _apply_adam(self, scale):
        members, config = self.adam.values(), self.config
        adam_apply_(
            [m.param.detach() for m in members],
            [m.grad for m in members],
            [m.mean for m in members],
            [m.square for m in members],
            [self.ema[name] for name in self.adam] if config.ema else [],
            [m.rates for m in members],
            [m.weight_decay for m in members],
            scale,
            self.lr_factor,
            self.adam_step,
            config.beta1,
            config.beta2,
            config.adam_eps,
            config.ema_decay,
        )

    def _apply_muon(self, banks):
        members = banks.values()
        muon_apply_(
            [m.param.detach() for m in members],
            [m.update[: m.count].view(m.param.shape) for m in members],
            [self.ema[name] for name in banks] if self.config.ema else [],
            [m.rates for m in members],
            [m.weight_decay for m in members],
            [m.shape_factor for m in members],
            self.lr_factor,
            self.config.ema_decay,
        )
        for bank in members:
            bank.shard = bank.update = None

    def _clips(self, scope):
        return self.config.grad_clip_scope == scope and self.config.grad_clip_norm > 0

    def _clip_factor(self, norm):
        self.grad_norm.copy_(norm)
        return (self.config.grad_clip_norm / (norm + CLIP_EPSILON)).clamp(max=1.0)

    def _norm_over_ranks(self, shards):
        """Of the reduced gradients: this rank holds a share of the banks, and all of the rest."""
        if dist.world_size() == 1:
            return gradient_norm(shards + self.adam_grads)
        square = gradient_norm(shards).square() if shards else torch.zeros_like(self.one)
        dist.sum_(square).wait()
        return (square + gradient_norm(self.adam_grads).square()).sqrt()

    # -- final weights

    @torch.no_grad()
    def snapshot(self):
        """Add the weights to the mean that `swa` exports. Summed in float32: sums of bfloat16 lose the later ones."""
        if not self.config.swa:
            return
        if not self.snapshots:
            self.snapshots = {name: torch.zeros_like(wide(p)) for name, p in self.params.items()}
        for name, p in self.params.items():
            self.snapshots[name] += p
        self.num_snapshots += 1

    @torch.no_grad()
    def load_average(self) -> str:
        """Replace the weights by those to be exported, and say which these are."""
        if self.config.ema:
            for name, average in self.ema.items():
                self.params[name].copy_(average)
            return f"exponential moving average, decay {self.config.ema_decay}"
        if self.config.swa and self.num_snapshots >= 2:
            for name, total in self.snapshots.items():
                self.params[name].copy_(total / self.num_snapshots)
            return f"mean of {self.num_snapshots} snapshots"
        return "weights of the last step"

    # -- checkpoints

    def _state(self):
        """What an update leaves behind, as this rank holds it."""
        state = {f"muon.{name}.momentum": bank.momentum for name, bank in self.banks.items()}
        for name, tensor in self.adam.items():
            state |= {f"adam.{name}.mean": tensor.mean, f"adam.{name}.square": tensor.square}
        return state | {"adam.step": self.adam_step}

    @torch.no_grad()
    def state_dict(self) -> dict[str, torch.Tensor]:
        """All state, whole and not copied, the same for any number of ranks, which must all call this."""
        state = self._state()
        for name, bank in self.banks.items():
            whole, arrival = dist.gather(bank.momentum)
            arrival.wait()
            state[f"muon.{name}.momentum"] = whole[: bank.count]
        state |= {f"ema.{name}": average for name, average in self.ema.items()}
        state |= {f"swa.{name}": total for name, total in self.snapshots.items()}
        return state | {"swa.count": torch.tensor(self.num_snapshots)}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, torch.Tensor]):
        self.num_snapshots = int(state["swa.count"])
        if self.num_snapshots:
            self.snapshots = {name: torch.zeros_like(wide(p)) for name, p in self.params.items()}
        mine = self._state() | {f"ema.{name}": average for name, average in self.ema.items()}
        mine |= {f"swa.{name}": total for name, total in self.snapshots.items()}
        different = mine.keys() ^ (state.keys() - {"swa.count"})
        if different:
            raise UserError(f"checkpoint: optimizer state {min(different)} is missing or unknown: is it of this recipe?")
        for name, bank in self.banks.items():
            share, first = bank.momentum.shape[0], dist.rank() * bank.momentum.shape[0]
            own = state[f"muon.{name}.momentum"][first : first + share]
            bank.momentum.zero_()[: own.shape[0]].copy_(own)
        for name in mine.keys() - {f"muon.{bank}.momentum" for bank in self.banks}:
            mine[name].copy_(state[name])
