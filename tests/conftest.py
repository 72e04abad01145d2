"""Markers, seeding, and poisoned memory for every test."""

import pytest
import torch

from pgolf_fast.ops import _library


def _kernel_gpu() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0) and _library.library_file() is not None


def pytest_collection_modifyitems(items):
    no_gpu = pytest.mark.skip(reason="no CUDA GPU here")
    no_kernels = pytest.mark.skip(reason="needs an sm_90 GPU and the built kernel library")
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(no_gpu)
        if "cuda" in item.keywords and not _kernel_gpu():
            item.add_marker(no_kernels)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(20240520)


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Uninitialised memory is filled with nan (integers: their maximum), so an element that a kernel leaves unwritten shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request):
    return torch.device(request.param)
