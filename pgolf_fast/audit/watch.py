"""What an evaluator does while it runs: every forward of the model, under which weights, and every look at the network."""

import contextlib
import dataclasses
import sys
import zlib
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pgolf_fast.audit.stream import Stream
from pgolf_fast.fused_blocks import as_columns

NETWORK_EVENTS = {"socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto", "urllib.Request"}
SURE_RUN = 6  # tokens that must agree in a row before a row's place in the stream is believed


@dataclass(frozen=True)
class Forward:
    version: int  # of the weights: how many different ones there were before
    tokens: Tensor  # int64 [B, T], what the model read
    columns: Tensor | None  # int64 [B, S], the places in a row that `output` is of; None: all
    targets: Tensor | None
    output: Tensor  # logits [B, S, V], losses [B, S], or a mean
    with_grad: bool


class Watch:
    """Records a model's forwards through torch's hooks. With `forget`, every forward sees the weights as they were at first: an
    evaluation that learns is then one that does not, without its help."""

    def __init__(self, model: nn.Module, forget: bool = False):
        self.forwards: list[Forward] = []
        self._forget = forget
        self._first: dict[int, tuple[Tensor, Tensor]] = {}  # by id: the tensor, and its first value
        self._version, self._stamp = 0, None
        self._model = model
        model.register_forward_pre_hook(self._before, with_kwargs=True)
        model.register_forward_hook(self._after, with_kwargs=True)

    def _weights(self, kwargs) -> list[Tensor]:
        return [*self._model.parameters(), *_float_tensors(kwargs)]

    def _before(self, model, args, kwargs):
        if self._forget:
            for tensor in self._weights(kwargs):
                _, value = self._first.setdefault(id(tensor), (tensor, tensor.detach().clone()))
                tensor.data.copy_(value)
        stamp = [zlib.crc32(t.detach().contiguous().flatten().view(torch.uint8).numpy()) for t in self._weights(kwargs)]
        self._version += self._stamp is not None and stamp != self._stamp
        self._stamp = stamp

    def _after(self, model, args, kwargs, output):
        tokens = args[0] if args else kwargs.get("tokens")
        if isinstance(tokens, Tensor) and tokens.dim() == 2 and isinstance(output, Tensor):
            targets = args[1] if len(args) > 1 else kwargs.get("targets")
            with_grad = torch.is_grad_enabled() and output.requires_grad
            columns = as_columns(kwargs.get("positions"), tokens)
            copies = (t.detach().clone() if isinstance(t, Tensor) else None for t in (tokens, columns, targets, output))
            self.forwards.append(Forward(self._version, *copies, with_grad))


def _float_tensors(value) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    if isinstance(value, nn.Module):
        return list(value.parameters())
    if dataclasses.is_dataclass(value):
        value = vars(value)
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [tensor for part in parts for tensor in _float_tensors(part)]


def locate(row: np.ndarray, stream: np.ndarray) -> np.ndarray:
    """The stream position of each token of a row, -1 where it cannot be told: that on the longest common run through the token."""
    same = row[:, None] == stream[None, :]
    run = same.astype(np.int32)
    for j in range(1, len(row)):  # length of the run that ends here
        run[j, 1:] += run[j - 1, :-1] * same[j, 1:]
    for j in range(len(row) - 2, -1, -1):  # of the whole run through here
        run[j, :-1] = np.where(same[j, :-1] & same[j + 1, 1:], run[j + 1, 1:], run[j, :-1])
    best = run.max(1)
    sure = (best >= min(SURE_RUN, len(row))) & ((run == best[:, None]).sum(1) == 1)
    return np.where(sure, run.argmax(1), -1)


@dataclass(frozen=True)
class Seen:
    """A forward in terms of the stream."""

    version: int
    with_grad: bool
    positions: np.ndarray  # int64 [k], those that it predicted
    losses: np.ndarray | None  # float32 [k], if they can be told


def in_stream(forwards: list[Forward], stream: Stream) -> list[Seen]:
    tokens = stream.tokens.numpy()
    found, known = [], {}
    for forward in forwards:
        rows = forward.tokens.cpu().numpy().astype(np.int64)
        places = []
        for row in rows:
            key = row.tobytes()
            if key not in known:
                known[key] = locate(row, tokens)
            places.append(known[key])
        position = torch.from_numpy(np.stack(places))
        if forward.columns is not None:
            position = position.gather(1, forward.columns)
        told = (position >= 0) & (position < len(stream))
        losses = _losses(forward, stream, position)
        found.append(Seen(forward.version, forward.with_grad, position[told].numpy(), None if losses is None else losses[told].numpy()))
    return found


def _losses(forward: Forward, stream: Stream, position: Tensor) -> Tensor | None:
    if forward.targets is not None:
        return forward.output.float().view(position.shape) if forward.output.numel() == position.numel() else None
    if forward.output.dim() != 3 or forward.output.shape[:2] != position.shape:
        return None
    target = stream.tokens[(position + 1).clamp(0, len(stream))]
    return F.cross_entropy(forward.output.float().flatten(0, 1), target.flatten(), reduction="none").view(position.shape)


# --- network ---------------------------------------------------------------------------------------------------------


class NetworkUse(RuntimeError):
    """Raised where the audited code reaches for the network."""


_watching: list[list[str]] = []


def _on_event(event, args):
    if _watching and event in NETWORK_EVENTS:
        # NOTE: a socket of the machine itself (AF_UNIX has a path as its address) is no network.
        address = args[1] if event in ("socket.connect", "socket.sendto") else args[0]
        if isinstance(address, str | bytes) and event == "socket.connect":
            return
        _watching[-1].append(f"{event} {address}")
        raise NetworkUse(f"the audited code reached for the network: {event} {address}")


_is_installed = False


@contextlib.contextmanager
def no_network():
    """Inside, reaching for the network raises; yields the list of attempts, which stays when the code under test swallows the exception."""
    global _is_installed
    if not _is_installed:
        sys.addaudithook(_on_event)  # cannot be taken out again, so it is put in when first needed and sleeps outside these blocks
        _is_installed = True
    attempts: list[str] = []
    _watching.append(attempts)
    try:
        yield attempts
    finally:
        _watching.pop()
