"""Numeric comparisons against a float64 truth. The number in the test is the one that decides."""

import torch


def relative_error(value: torch.Tensor, truth: torch.Tensor) -> float:
    """|value - truth| / |truth| in the Frobenius norm; nan in `value` gives nan, which no bound accepts."""
    value, truth = value.detach().double().cpu(), truth.detach().double().cpu()
    assert value.shape == truth.shape, f"shape {list(value.shape)}, expected {list(truth.shape)}"
    return ((value - truth).norm() / truth.norm().clamp_min(1e-300)).item()


def assert_within(value, peer, truth, name, factor=2.0, floor=1e-7):
    """`value` is at most `factor` times as far from the truth as `peer`, plain torch in the same dtype.

    Judged twice: in the Frobenius norm, and at the worst element relative to the largest magnitude.
    """
    error, allowed = relative_error(value, truth), factor * relative_error(peer, truth) + floor
    assert error <= allowed, f"{name}: relative error {error:.3e}, allowed {allowed:.3e}"
    value, peer, truth = (x.detach().double().cpu() for x in (value, peer, truth))
    scale = truth.abs().max().clamp_min(1e-300)
    distance = (value - truth).abs()
    worst = distance.flatten().argmax() if distance.numel() else None
    if worst is None:
        return
    allowed = (factor * (peer - truth).abs().max() / scale).item() + floor
    where = [int(i) for i in torch.unravel_index(worst, distance.shape)]
    assert (distance.max() / scale).item() <= allowed, (
        f"{name}: worst element at {where}: {value[tuple(where)]:.6g}, truth {truth[tuple(where)]:.6g}, "
        f"off by {(distance.max() / scale).item():.3e} of the largest, allowed {allowed:.3e}"
    )
