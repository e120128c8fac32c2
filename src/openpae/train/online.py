"""Latents without a cache: images that a tokenizer encodes at each step."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from openpae.data.images import open_images
from openpae.data.order import StepBatches
from openpae.data.pixels import to_unit
from openpae.data.training import ImageBatch, TrainingImages, image_batches, raise_on_broken
from openpae.interop.any_tokenizer import AnyTokenizer
from openpae.interop.spaces import open_tokenizer
from openpae.runtime import processes
from openpae.runtime.device import autocast
from openpae.train.settings import GeneratorRun

STATISTICS = 2048
"""Images whose latents give mean and standard deviation: the first of the training, as it augments them."""


class OnlineLatents:
    """Augmented images and the frozen tokenizer that encodes them, in place of a latent cache.

    Args:
        run: the config; `latents` is the tokenizer, `images` are the images.
        device: device of the tokenizer.

    Raises:
        FileNotFoundError, ValueError: see `open_tokenizer` and `open_images`, or the tokenizer does not take
            the images.
    """

    def __init__(self, run: GeneratorRun, device: torch.device) -> None:
        assert run.images is not None
        self._tokenizer = AnyTokenizer(open_tokenizer(run.latents, device), device)
        self._loop, self._device = run.loop, device
        source = open_images(run.images)
        size = self._tokenizer.space.image_size if run.image_size is None else run.image_size
        self.images = TrainingImages(
            source, size=size, seed=run.loop.seed, augment=run.augment, resize=run.resize
        )
        self._tokenizer.check(size)
        self.folder, self.labels = run.images, source.labels
        self.shape = (1, *self._tokenizer.space.latent_shape(size))
        self.attributes: dict[str, Any] = {
            "tokenizer": self._tokenizer.identity,
            "classes": source.classes,
        }
        self.index: dict[str, Any] = processes.on_rank0(self._statistics)
        """mean and std of the latents, per channel."""

    def __len__(self) -> int:
        return len(self.labels)

    def fingerprint(self) -> str:
        """Fingerprint of the images."""
        return self.images.source.fingerprint()

    def batches(self, sampler: StepBatches) -> Iterable[ImageBatch]:
        """Device batches of augmented images."""
        return image_batches(self.images, sampler, self._loop.num_workers, pin=self._device.type == "cuda")

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Latents (B, C, h, w) of images, uint8 (B, 3, H, W)."""
        with autocast(self._device, self._loop.precision):
            return self._tokenizer.encode(to_unit(images.to(self._device))).float()

    def _statistics(self) -> dict[str, list[float]]:
        """Mean and standard deviation of each channel, added up in float64."""
        count, part = min(STATISTICS, len(self.images.source)), 32
        sums = torch.zeros(2, self.shape[1], dtype=torch.float64)
        read = (
            self.images.__getitems__([*range(start, min(start + part, count))])
            for start in range(0, count, part)
        )
        for batch in raise_on_broken(read):
            z = self.encode(batch.images).double().cpu()
            sums += torch.stack([z.sum((0, 2, 3)), z.square().sum((0, 2, 3))])
        mean, square = sums / (count * self.shape[2] * self.shape[3])
        std = (square - mean.square()).clamp_min(0).sqrt()
        return {"mean": mean.tolist(), "std": std.tolist()}
