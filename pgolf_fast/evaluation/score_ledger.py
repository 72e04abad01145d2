"""Every loss, once, in the order in which it was given.

An entry is (positions, losses, weight version); it can be added and never changed. Entries stay on the device until `drain`, so that adding
one waits for nothing. Drained, they are three things: the loss and the version of each position, dense, and a digest chained over all
entries and weight changes in their order. Ledgers of several ranks are merged by position.
"""

import hashlib

import numpy as np
import torch
from torch import Tensor

from pgolf_fast import dist
from pgolf_fast.bpb import Score
from pgolf_fast.evaluation.windows import Windows

DRAIN_ENTRIES = 1 << 20  # losses kept on the device at most
UNSCORED = -1


class ScoreLedger:
    """Of one rank. Positions are the stream's: position p predicts token p + 1."""

    def __init__(self, target_bytes: np.ndarray):
        """target_bytes  of every position"""
        num_positions, self.target_bytes = len(target_bytes), target_bytes
        self.losses = np.zeros(num_positions, np.float32)  # nats; 0 where this rank has not scored
        self.versions = np.full(num_positions, UNSCORED, np.int32)  # of the weights that gave them
        self.digest = bytes(32)
        self.running = Score(0.0, 0, 0)  # of what is drained; sums in the order of the entries
        self._pending: list[tuple[Windows, Tensor, int] | tuple[np.ndarray, None, int]] = []
        self._num_pending = 0

    def add(self, windows: Windows, losses: Tensor, version: int) -> None:
        """losses  [rows, most scored of a row]; what lies past a row's own scored positions is not read"""
        self._pending.append((windows, losses.detach().to(torch.float32, copy=True).flatten(), version))
        self._num_pending += losses.numel()
        if self._num_pending >= DRAIN_ENTRIES:
            self.drain()

    def weights_changed(self, spans: np.ndarray, version: int) -> None:
        """The weights became `version`, learning from these spans of positions, int64 [n, 2]."""
        self._pending.append((spans, None, version))

    def drain(self) -> None:
        """Waits for the device, and takes every entry that is still there."""
        on_device = [losses for _, losses, _ in self._pending if losses is not None]
        arrived = torch.cat(on_device).cpu().numpy() if on_device else None
        place = 0
        for what, losses, version in self._pending:
            if losses is None:
                self._chain(b"weights", version, what)
                continue
            rows = arrived[place : place + losses.numel()].reshape(len(what), -1)
            place += losses.numel()
            own = rows[np.arange(rows.shape[1]) < (what.end - what.first)[:, None]]
            positions = what.positions()
            self.losses[positions], self.versions[positions] = own, version
            nats, num_bytes = float(own.sum(dtype=np.float64)), int(self.target_bytes[positions].sum(dtype=np.int64))
            self.running = Score(self.running.nats + nats, self.running.tokens + len(own), self.running.bytes + num_bytes)
            self._chain(b"scores", version, positions, own)
        self._pending, self._num_pending = [], 0

    def _chain(self, kind: bytes, version: int, *arrays: np.ndarray) -> None:
        link = hashlib.sha256(self.digest + kind + version.to_bytes(8, "little"))
        for array in arrays:
            link.update(np.ascontiguousarray(array).tobytes())
        self.digest = link.digest()

    @property
    def is_scored(self) -> np.ndarray:
        return self.versions != UNSCORED

    def score(self) -> Score:
        """Of what is drained; sums in the order of positions, so the same however the entries came."""
        scored = self.is_scored
        num_bytes = int(self.target_bytes.sum(dtype=np.int64, where=scored))
        return Score(float(self.losses.sum(dtype=np.float64, where=scored)), int(scored.sum()), num_bytes)

    def merged(self, device: torch.device) -> "ScoreLedger":
        """All ranks' entries by position, on every rank; the digest is over the ranks' digests in order."""
        self.drain()
        if dist.world_size() == 1:
            return self
        whole = ScoreLedger(self.target_bytes)
        count = torch.from_numpy(self.is_scored.astype(np.int32)).to(device)
        losses, versions = (torch.from_numpy(a).to(device, copy=True) for a in (self.losses, self.versions + 1))
        for tensor in (count, losses, versions):
            dist.sum_(tensor).wait()
        if int(count.max()) > 1:
            position = int((count > 1).nonzero()[0])
            raise RuntimeError(f"position {position} was scored by {int(count[position])} ranks; an evaluator must share positions out")
        whole.losses, whole.versions = losses.cpu().numpy(), versions.cpu().numpy() - 1
        whole.digest = hashlib.sha256(b"".join(dist.gather_objects(self.digest))).digest()
        return whole

    # -- to stop and go on

    def state(self) -> tuple[dict[str, Tensor], dict]:
        self.drain()
        return {"losses": torch.from_numpy(self.losses), "versions": torch.from_numpy(self.versions)}, {"digest": self.digest.hex()}

    def load_state(self, tensors: dict[str, Tensor], state: dict) -> None:
        self.losses, self.versions = tensors["losses"].numpy().copy(), tensors["versions"].numpy().copy()
        self.digest = bytes.fromhex(state["digest"])
        self.running = self.score()
