"""Power of a GPU under load, from the driver's energy counter: what bounds a training step once the card is at its power limit."""

import threading
import time

import torch


def management_handle(device: torch.device):
    """The device in the management library, which does not follow CUDA_VISIBLE_DEVICES."""
    import pynvml

    pynvml.nvmlInit()
    return pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")


def millijoules_of(device: torch.device):
    """Reads what the device has spent since its driver was loaded; the counter ticks about ten times a second."""
    import pynvml

    handle = management_handle(device)
    return lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)


class PowerMeter:
    """`with PowerMeter(read) as meter:` around work that ends with a synchronisation; then `meter.watts`.

    The mean between the counter's first and last tick inside: whole ticks, so that the counter's step is no error. None where there were
    not two of them.
    """

    def __init__(self, millijoules):
        self._millijoules = millijoules
        self._ticks: list[tuple[float, int]] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self):
        last = self._millijoules()
        while not self._over.wait(1e-3):
            now = self._millijoules()
            if now != last:
                self._ticks.append((time.perf_counter(), now))
                last = now

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._over.set()
        self._thread.join()

    @property
    def watts(self) -> float | None:
        if len(self._ticks) < 2:
            return None
        (begin, first), (end, last) = self._ticks[0], self._ticks[-1]
        return (last - first) / 1e3 / (end - begin)
