"""Ranks and the collectives that a step needs. One process is the ordinary case: every function then does nothing."""

import os

import torch
import torch.distributed as dist

# Renamed in torch 2.13; the old names warn there and are the only ones before it.
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def start(device_type="cuda") -> torch.device:
    """Join the other processes that torchrun started, if it did, and return this one's device."""
    device = torch.device("cpu")
    if device_type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        # NVLink multicast stays off: a process that dies with it on can take the GPUs of its host out of service.
        os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
        on_gpu = device.type == "cuda"
        dist.init_process_group("nccl" if on_gpu else "gloo", device_id=device if on_gpu else None)
    return device


def stop():
    """Leave the other processes, at the end of a run that went well; after an error just exit, and torchrun ends the others.

    NOTE: NCCL waits, without end, for every CUDA graph that holds a collective; also where a process exits without this call.
    """
    if dist.is_initialized():
        dist.destroy_process_group()


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


class _Done:
    """Stands for a collective where there is nobody to talk to."""

    def wait(self):
        pass


DONE = _Done()


def sum_(tensor):
    """Start adding up `tensor` over the ranks, in place; `wait()` on the result."""
    return dist.all_reduce(tensor, async_op=True) if world_size() > 1 else DONE


def mean_(tensor):
    """Start averaging `tensor` over the ranks, in place; `wait()` on the result."""
    if world_size() > 1:
        tensor /= world_size()
    return sum_(tensor)


def max_(tensor):
    """The largest value of any rank, in place."""
    if world_size() > 1:
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)


def sum_shard(tensor):
    """Start adding up over the ranks, of which each receives its part along the first dimension: (part, what to wait on)."""
    if world_size() == 1:
        return tensor, DONE
    shard = tensor.new_empty((tensor.shape[0] // world_size(), *tensor.shape[1:]))
    return shard, _reduce_scatter(shard, tensor, async_op=True)


def gather(shard):
    """Start joining the ranks' parts along the first dimension: (whole, what to wait on)."""
    if world_size() == 1:
        return shard, DONE
    whole = shard.new_empty((shard.shape[0] * world_size(), *shard.shape[1:]))
    return whole, _all_gather(whole, shard.contiguous(), async_op=True)


def gather_objects(value) -> list:
    """Every rank's small host value, in the order of ranks. Waits."""
    if world_size() == 1:
        return [value]
    everyone = [None] * world_size()
    dist.all_gather_object(everyone, value)
    return everyone


def any_rank(claim: bool, device) -> bool:
    """Whether it holds on any rank. Waits."""
    if world_size() == 1:
        return claim
    found = torch.tensor(int(claim), device=device)
    max_(found)
    return bool(found)


def meet(device):
    """Waits until every rank is here."""
    any_rank(False, device)
