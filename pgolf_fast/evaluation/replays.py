"""The adapted forward and backward as CUDA graphs: one pair for each shape of a batch, recorded when the shape is first met."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pgolf_fast.fused_blocks import as_columns


class Recording(NamedTuple):
    forward: torch.cuda.CUDAGraph  # inputs, positions -> logits
    backward: torch.cuda.CUDAGraph  # grad_logits -> added to the adapters' gradients
    inputs: Tensor
    positions: Tensor
    logits: Tensor
    grad_logits: Tensor


class _Replay(torch.autograd.Function):
    """Logits of a recording; their gradient replays its backward, which knows where the adapters' gradients lie."""

    @staticmethod
    def forward(ctx, anchor, recording):
        ctx.recording = recording
        return recording.logits.detach()

    @staticmethod
    def backward(ctx, grad_logits):
        ctx.recording.grad_logits.copy_(grad_logits)
        ctx.recording.backward.replay()
        return None, None


class Replays(nn.Module):
    """A GPT to whoever calls it with adapters."""

    def __init__(self, model, num_scored):
        """num_scored  positions of a row that are scored at most"""
        super().__init__()
        self.model, self.num_scored = model, num_scored
        self.recordings: dict[tuple, Recording] = {}
        self.pool = torch.cuda.graph_pool_handle()
        self.anchor = torch.zeros((), device=model.tok_emb.device, requires_grad=True)

    def forward(self, inputs, *, positions, adapters, max_seqlen):
        positions = as_columns(positions, inputs)
        wanted = positions.shape[1]
        positions = F.pad(positions, (0, self.num_scored - wanted))
        key = inputs.shape, positions.shape, id(adapters)
        if key not in self.recordings:
            self.recordings[key] = self.record(inputs, positions, adapters, max_seqlen)
        recording = self.recordings[key]
        recording.inputs.copy_(inputs)
        recording.positions.copy_(positions)
        recording.forward.replay()
        logits = _Replay.apply(self.anchor, recording) if torch.is_grad_enabled() else recording.logits
        return logits[:, :wanted]

    @torch.enable_grad()
    def record(self, inputs, positions, adapters, max_seqlen) -> Recording:
        inputs, positions = inputs.clone(), positions.clone()
        leaves = list(adapters.leaves.values())
        gradients = [leaf.grad for leaf in leaves]
        forward, backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        # A first run leaves nothing to be initialised while recording.
        logits = self.model(inputs, positions=positions, adapters=adapters, max_seqlen=max_seqlen)
        torch.autograd.grad(logits, leaves, torch.zeros_like(logits))
        del logits
        torch.cuda.empty_cache()  # what that run held would double the peak
        # NOTE: recordings share one pool of memory, so a backward must follow its own forward before any other replay.
        with torch.cuda.graph(forward, pool=self.pool):
            logits = self.model(inputs, positions=positions, adapters=adapters, max_seqlen=max_seqlen)
        grad_logits = torch.empty_like(logits)
        with torch.cuda.graph(backward, pool=self.pool):
            torch._foreach_add_(gradients, torch.autograd.grad(logits, leaves, grad_logits))
        return Recording(forward, backward, inputs, positions, logits.detach(), grad_logits)
