"""Which path a tensor takes."""

from pathlib import Path

import torch

from pgolf_fast.ops import _library


def test_composite_leaves_only_the_named_kernels(monkeypatch):
    monkeypatch.setattr(_library, "_capability", lambda index: (9, 0))
    monkeypatch.setattr(_library, "_file", Path("built"))
    monkeypatch.setattr(_library, "has_kernel", lambda name: True)
    gpu = torch.device("cuda", 0)
    uses = lambda: [name for name in ("qkv_forward", "qkv_backward", "product_forward") if _library.uses_kernel(name, gpu)]  # noqa: E731
    assert len(uses()) == 3
    with _library.composite():
        assert uses() == []
        with _library.composite(but=("qkv",)):
            assert uses() == ["qkv_forward", "qkv_backward"]
        assert uses() == []
    assert len(uses()) == 3


def test_kernels_get_aligned_tensors():
    """A gradient may be a slice at any offset: of what torch.cat gave, say."""
    buffer = torch.arange(65.0).bfloat16()
    whole, shifted, columns = buffer[:64].view(8, 8), buffer[1:].view(8, 8), buffer[:64].view(8, 8).T
    assert _library.aligned(whole) is whole
    for tensor in (shifted, columns):
        found = _library.aligned(tensor)
        assert torch.equal(found, tensor) and found.is_contiguous() and found.data_ptr() % 16 == 0
