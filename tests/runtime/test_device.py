"""The device that a setting picks."""

from __future__ import annotations

import pytest
import torch

from openpae.runtime.device import pick_device


def test_a_missing_gpu_is_an_error_at_the_start() -> None:
    assert pick_device("cpu") == torch.device("cpu")
    if not torch.cuda.is_available():
        assert pick_device("auto") == torch.device("cpu")
        with pytest.raises(ValueError, match=r"^--device is cuda, but torch sees no GPU"):
            pick_device("cuda")
    if not torch.backends.mps.is_available():
        with pytest.raises(ValueError, match=r"^loop.device is mps, but torch sees no Apple GPU"):
            pick_device("mps", "loop.device")


def test_mps_is_a_device_where_torch_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert pick_device("mps") == torch.device("mps")
