"""The range of images: [0, 1] here, and a training step never reads it."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from openpae.models.tokenizer import PAE


def test_images_in_minus_one_to_one_are_refused(tiny_pae: PAE) -> None:
    images = torch.rand(2, 3, 32, 32)
    with pytest.raises(
        ValueError, match=r"images must lie in \[0, 1\], got -0.\d+; bring images in \[-1, 1\]"
    ):
        tiny_pae.encode(images - 0.9)
    with pytest.raises(ValueError, match="clamp decoded ones"):
        tiny_pae.reconstruct(images - 0.9)


def test_a_training_step_does_not_read_the_range_of_its_images(
    tiny_pae: PAE, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would make the step wait for the GPU; nor can compiled code and tensors without values."""
    import openpae.models.tokenizer as module

    def fail(images: torch.Tensor) -> None:
        raise AssertionError("the step reads its images")

    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert tiny_pae.encode(mode.from_tensor(torch.rand(1, 3, 32, 32))).shape == (1, 8, 4, 4)
    exported = torch.export.export(Encode(tiny_pae), (torch.rand(2, 3, 32, 32),))
    torch.testing.assert_close(exported.module()(images := torch.rand(2, 3, 32, 32)), tiny_pae.encode(images))
    monkeypatch.setattr(module, "_refuse_signed", fail)
    tiny_pae(torch.rand(1, 3, 32, 32))


class Encode(torch.nn.Module):
    """`encode` as the forward pass of a module, which torch.export takes."""

    def __init__(self, tokenizer: PAE) -> None:
        super().__init__()
        self.tokenizer = tokenizer

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.tokenizer.encode(images)
