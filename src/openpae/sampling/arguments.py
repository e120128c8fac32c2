"""The arguments and results of `Pipeline` under the names that diffusers gives them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Generic, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor

from openpae.data.pixels import to_image

T = TypeVar("T")

OutputType = Literal["pil", "np", "pt", "latent"]
"""pil: Pillow images; np: float32 (H, W, 3) in [0, 1]; pt: the same as tensors (3, H, W); latent: latents (C,
h, w) in the tokenizer's scale, not decoded."""

OUTPUT_TYPES = ("pil", "np", "pt", "latent")


class Images(list[T], Generic[T]):
    """A list of images that also has `.images`, as the results of diffusers' pipelines.

    Args:
        images: the images: a list, or one array or tensor of all.
    """

    images: Any
    """The argument: a list of Pillow images, (n, H, W, 3) for np, (n, 3, H, W) for pt, (n, C, h, w) for
    latent."""

    def __init__(self, images: Sequence[T] | Any) -> None:
        super().__init__(images)
        self.images = images


def same_value(**given: Any) -> Any:
    """The value of an argument that has two names; None if neither is given.

    Raises:
        ValueError: both names are given, with different values.
    """
    (first, a), (second, b) = given.items()
    if a is not None and b is not None and a != b:
        raise ValueError(f"{first} and {second} mean the same, got {a!r} and {b!r}; give one of them")
    return b if a is None else a


def seed_of(generator: torch.Generator) -> int:
    """The seed that a generator stands for, and advance the generator.

    A new generator stands for its seed: `torch.Generator().manual_seed(5)` gives the images of seed=5. A used
    one stands for its next number, so that a second call gives other images.

    Raises:
        TypeError: not one torch.Generator.
    """
    if not isinstance(generator, torch.Generator):
        raise TypeError(
            f"generator must be one torch.Generator, got {type(generator).__name__}; each image has its own "
            "noise already"
        )
    new = torch.Generator(generator.device).manual_seed(generator.initial_seed())
    unused = torch.equal(new.get_state(), generator.get_state())
    number = torch.randint(2**62, (), generator=generator, device=generator.device)
    return generator.initial_seed() if unused else int(number)


def in_output_type(pixels: Tensor, output_type: OutputType) -> Images[Any]:
    """Images (n, 3, H, W) in [0, 1] on the CPU, or latents, in an output type."""
    if output_type == "pil":
        return Images([to_image(image) for image in pixels])
    if output_type == "np":
        return Images(np.ascontiguousarray(pixels.permute(0, 2, 3, 1).numpy()))
    return Images(pixels)
