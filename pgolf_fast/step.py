"""One training step of one rank: forward and backward of its micro-batches, then the update.

`Step` launches it kernel by kernel. `GraphedStep` replays CUDA graphs, one of a micro-batch and one of the update, so that the
host has two launches to make. Both do the same to the same memory: what varies between steps lies on the device, in the batch
and in the optimizer's scalars, and what the graphs were made for is in their key.
"""

import copy
import gc
from typing import NamedTuple

import torch

from pgolf_fast import dist
from pgolf_fast.data import Batch
from pgolf_fast.errors import UserError


class Mode(NamedTuple):
    """What a captured micro-batch cannot change."""

    looped: bool
    fake_quant: bool
    cu_seqlens_entries: int  # 0: rows of seq_len


class Step:
    def __init__(self, model, optimizer, seq_len: int):
        """`seq_len` is the length of a row, or of the longest document where batches are packed."""
        self.model, self.optimizer, self.seq_len = model, optimizer, seq_len
        self.loss_sum = torch.zeros((), device=next(model.parameters()).device)

    def run(self, batches: list[Batch], plan) -> torch.Tensor:
        """The mean loss of all ranks' micro-batches, on the device. These are this rank's."""
        self.optimizer.set(plan)
        self.loss_sum.zero_()
        for batch in batches:
            entries = 0 if batch.cu_seqlens is None else len(batch.cu_seqlens)
            self.micro_batch(batch, Mode(plan.looped, plan.fake_quant, entries))
        self.update()
        return self.loss_sum / len(batches)

    def close(self):
        """No step follows: what dist.stop would wait for goes."""

    def micro_batch(self, batch: Batch, mode: Mode):
        if batch.cu_seqlens is None:
            inputs, targets = (t.view(-1, self.seq_len) for t in (batch.inputs, batch.targets))
            documents = {}
        else:
            inputs, targets = batch.inputs[None], batch.targets[None]
            documents = {"cu_seqlens": batch.cu_seqlens, "max_seqlen": self.seq_len}
        loss = self.model(inputs, targets, looped=mode.looped, fake_quant=mode.fake_quant, **documents)
        loss.backward()
        self.optimizer.collect()
        self.loss_sum += loss.detach()

    def update(self):
        arrival = dist.mean_(self.loss_sum)
        self.optimizer.step()
        arrival.wait()


class GraphedStep(Step):
    """A mode's first micro-batch is launched kernel by kernel, which initialises what capture cannot; the second is captured."""

    def __init__(self, model, optimizer, seq_len: int):
        super().__init__(model, optimizer, seq_len)
        self.seen: set[Mode | str] = set()
        self.graphs: dict[Mode | str, torch.cuda.CUDAGraph] = {}
        self.inputs: dict[int, Batch] = {}  # by cu_seqlens_entries: where the graphs read
        # Only one graph runs at a time and none leaves results in the pool, so they share its memory.
        self.pool = torch.cuda.graph_pool_handle()
        self.stream = torch.cuda.Stream()

    def micro_batch(self, batch: Batch, mode: Mode):
        held = self.inputs.get(mode.cu_seqlens_entries)
        if held is None:
            held = self.inputs[mode.cu_seqlens_entries] = copy.deepcopy(batch)
        held.inputs.copy_(batch.inputs)
        held.targets.copy_(batch.targets)
        if held.cu_seqlens is not None:
            held.cu_seqlens.copy_(batch.cu_seqlens)
        self._replay(mode, lambda: super(GraphedStep, self).micro_batch(held, mode))

    def update(self):
        self._replay("update", super().update)

    def close(self):
        self.graphs.clear()

    def _replay(self, key, launch):
        if key not in self.seen:
            self.seen.add(key)
            # NOTE: on the stream of the capture: autograd remembers on which stream a gradient is accumulated.
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                launch()
            torch.cuda.current_stream().wait_stream(self.stream)
            return
        if key not in self.graphs:
            self.graphs[key] = self._capture(launch)
        self.graphs[key].replay()

    def _capture(self, launch):
        graph = torch.cuda.CUDAGraph()
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # what the launches before left behind would double the peak
        try:
            # NOTE: thread_local, because NCCL's watchdog thread makes calls that a global capture forbids.
            with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
                launch()
        except RuntimeError as error:
            raise UserError(f"the step could not be captured as a CUDA graph ({error}); train.cuda_graphs=false runs without") from error
        return graph
