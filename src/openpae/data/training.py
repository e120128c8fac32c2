"""Training data by position in training: augmented images and cached latents."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from openpae.data.classes import check_images_agree
from openpae.data.crops import Size, covers, crop, height_width, resize_to_cover
from openpae.data.decode import BrokenImage
from openpae.data.images import ImageSource, PackedImages, open_images
from openpae.data.order import StepBatches, random_bits, shuffled
from openpae.data.readers import read_batches, share
from openpae.data.settings import ImageData
from openpae.data.shards import Shards


def open_training(data: ImageData) -> tuple[ImageSource, ImageSource | None]:
    """Open the training images of a config, and its held-out images or None.

    Raises:
        FileNotFoundError, ValueError, PermissionError: see `open_images`, or the classes differ.
    """
    images = open_images(data.images)
    if data.evaluation is None:
        return images, None
    held_out = open_images(data.evaluation)
    check_images_agree(data.images, images.classes, data.evaluation, held_out.classes)
    return images, held_out


class ImageBatch(NamedTuple):
    """Images of one device batch."""

    images: Tensor
    """uint8, (B, 3, H, W)."""
    labels: Tensor
    """int64, (B,)."""
    features: Tensor | None = None
    """Cached VFM features, float16, (B, N, D)."""
    prior: Tensor | None = None
    """Cached refined targets, float16, (B, N, C)."""
    skipped: tuple[str, ...] = ()
    """Messages for broken files that others replaced."""
    broken: str = ""
    """Message for a broken file that may not be skipped; then the batch is empty."""
    warned: tuple[Warning, ...] = ()
    """Warnings raised by the worker that read the batch."""


class TrainingImages(Dataset[ImageBatch]):
    """Augmented images by position in training: a pure function of (seed, images seen).

    Args:
        source: the images.
        size: (H, W) of the output, or the side of a square.
        seed: seed of order and augmentation.
        augment: "none" centre-crops; "flip" also mirrors half of the images; "crop" scales the shorter side
            to `resize` (in the proportions of H x W), crops at random and mirrors half of the images.
        resize: see "crop".
        skip_broken: replace a broken image by the next readable one, and report it.
        features: cached VFM features of a packed source, one row per image.
        targets: cached refined targets of these features, one row per image.

    Raises:
        ValueError: resize is smaller than the shorter side, or features or targets do not fit the source and
            the augmentation.
    """

    def __init__(
        self,
        source: ImageSource,
        *,
        size: Size,
        seed: int,
        augment: Literal["none", "flip", "crop"] = "none",
        resize: int | None = None,
        skip_broken: bool = False,
        features: Shards | None = None,
        targets: Shards | None = None,
    ) -> None:
        shorter = min(height_width(size))
        if augment == "crop" and (resize is None or resize < shorter):
            raise ValueError(f"augment 'crop' needs resize >= {shorter}, got {resize}")
        for cached in (features, targets):
            if cached is not None:
                check_features(cached, source, augment)
        self.source, self.size, self.seed = source, height_width(size), seed
        self.augment = augment
        grow = resize / shorter if augment == "crop" and resize else 1
        self.cover = round(self.size[0] * grow), round(self.size[1] * grow)
        self.skip_broken, self.features, self.targets = skip_broken, features, targets
        self.reading: Tensor | None = None  # in shared memory: process id and current row of each worker

    def __getitems__(self, positions: list[int]) -> ImageBatch:
        """The batch of these positions (images seen before each)."""
        if get_worker_info() is None:
            return self._batch(positions)
        with warnings.catch_warnings(record=True) as caught:  # for the training process to print
            warnings.simplefilter("always")
            batch = self._batch(positions)
        return batch._replace(warned=tuple(w.message for w in caught if isinstance(w.message, Warning)))

    def _batch(self, positions: list[int]) -> ImageBatch:
        seen = np.asarray(positions, dtype=np.int64)
        rows = shuffled(seen, len(self.source), self.seed)
        bits = random_bits(seen, self.seed)
        flips = (bits & 1).astype(bool) if self.augment != "none" else np.zeros(len(seen), dtype=bool)
        skipped: list[str] = []
        if isinstance(self.source, PackedImages) and covers(self.source.image_shape, self.cover):
            corners = self._corners(self.source.image_shape, bits)
            images = self.source.cut(rows, self.size, *corners, flips)
        else:
            try:
                taken = [self._read(int(row), bits[i : i + 1], skipped) for i, row in enumerate(rows)]
            except BrokenImage as error:  # raised by `raise_on_broken`: a worker would add its traceback
                return ImageBatch(torch.empty(0), torch.empty(0), broken=str(error))
            rows = np.array([row for row, _ in taken])
            images = torch.from_numpy(np.stack([pixels for _, pixels in taken]))
            for i in np.flatnonzero(flips).tolist():  # one by one stays in the CPU cache
                images[i] = images[i].flip(-1)
        features, prior = (
            None if cached is None else cached.gather(rows, flips.astype(np.int64))
            for cached in (self.features, self.targets)
        )
        labels = torch.from_numpy(self.source.labels[rows])
        return ImageBatch(images, labels, features, prior, tuple(skipped))

    def _read(self, row: int, bits: NDArray[np.uint64], skipped: list[str]) -> tuple[int, NDArray[np.uint8]]:
        for offset in range(len(self.source)):
            index = (row + offset) % len(self.source)
            if self.reading is not None and (worker := get_worker_info()) is not None:
                self.reading[worker.id, 0], self.reading[worker.id, 1] = os.getpid(), index
            try:
                return index, self._cut(self.source.read(index), bits)
            except BrokenImage as error:
                if not self.skip_broken:
                    raise BrokenImage(f"{error}; remove the file, or pass --data.skip-broken") from None
                skipped.append(str(error))
        raise BrokenImage(f"not one of the {len(self.source)} images can be decoded; the last: {skipped[-1]}")

    def _cut(self, image: Image.Image, bits: NDArray[np.uint64]) -> NDArray[np.uint8]:
        image = resize_to_cover(image, self.cover)
        lefts, tops = self._corners((image.height, image.width), bits)
        return crop(image, self.size, int(lefts[0]), int(tops[0]))

    def _corners(
        self, shape: tuple[int, int], bits: NDArray[np.uint64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """First column and first row, (B,) each, of the crops of images of this (H, W)."""
        down, across = (side - kept for side, kept in zip(shape, self.size, strict=True))
        if self.augment != "crop":
            return np.full(len(bits), across // 2), np.full(len(bits), down // 2)
        # Two numbers in [0, 1), from bits that the flip does not use.
        x, y = ((bits >> np.uint64(shift)) % np.uint64(2**20) / 2**20 for shift in (8, 32))
        return (x * (across + 1)).astype(np.int64), (y * (down + 1)).astype(np.int64)


def image_batches(
    images: TrainingImages, sampler: StepBatches, num_workers: int, *, pin: bool
) -> Iterator[ImageBatch]:
    """Batches of the sampler, read by `num_workers` processes and checked by `raise_on_broken`.

    Raises:
        BrokenImage: a file cannot be decoded and may not be skipped.
        ChildProcessError: a worker died; the message names the file it was reading.
    """
    reading = images.reading = torch.full((max(1, num_workers), 2), -1)
    if num_workers:
        share([reading])

    def place(dead: set[int | None]) -> str:
        names = {images.source.name(row) for pid, row in reading.tolist() if pid in dead}
        return ", ".join(sorted(names)) or "its start"

    yield from raise_on_broken(
        read_batches(images, sampler, num_workers, pin=pin, label="images", place=place)
    )


def raise_on_broken(batches: Iterable[ImageBatch]) -> Iterator[ImageBatch]:
    """Pass batches on with a warning for each replaced image, and raise at one that may not be skipped.

    Raises:
        BrokenImage: a file cannot be decoded and may not be skipped.
    """
    for batch in batches:
        if batch.broken:
            raise BrokenImage(batch.broken)
        for warning in batch.warned:
            warnings.warn(warning, stacklevel=2)
        for name in batch.skipped:
            warnings.warn(f"{name}; another image takes its place", stacklevel=2)
        yield batch


def broken_count(batch: ImageBatch, data: ImageData) -> dict[str, int]:
    """Number of replaced images in a batch, for the log; empty if `skip_broken` is off."""
    return {"broken_images": len(batch.skipped)} if data.skip_broken else {}


class LatentBatch(NamedTuple):
    """Latents of one device batch."""

    latents: Tensor
    """bfloat16, (B, C, h, w), as encoded by the tokenizer."""
    labels: Tensor
    """int64, (B,)."""


class TrainingLatents(Dataset[LatentBatch]):
    """Cached latents by position in training: a pure function of (seed, images seen).

    Each position takes the latent of an image or of its mirror image at random.

    Args:
        shards: a latent cache.
        seed: seed of order and mirroring.
    """

    def __init__(self, shards: Shards, *, seed: int) -> None:
        self.shards, self.seed = shards, seed

    def __getitems__(self, positions: list[int]) -> LatentBatch:
        """The batch of these positions (images seen before each)."""
        seen = np.asarray(positions, dtype=np.int64)
        rows = shuffled(seen, len(self.shards), self.seed)
        versions = (random_bits(seen, self.seed) % np.uint64(self.shards.shape[0])).astype(np.int64)
        return LatentBatch(self.shards.gather(rows, versions), torch.from_numpy(self.shards.labels[rows]))


def check_features(features: Shards, source: ImageSource, augment: str) -> None:
    """Raise ValueError unless cached features belong to this source and augmentation."""
    if not isinstance(source, PackedImages):
        raise ValueError("cached features need packed images (pae pack), so that row and image stay together")
    if augment == "crop":
        raise ValueError("cached features do not fit random crops; use augment 'none' or 'flip'")
    if features.attributes["images"] != source.fingerprint() or len(features) != len(source):
        raise ValueError(
            f"the features in {features.folder} are not those of the images in {source.shards.folder}"
        )
    if augment == "flip" and features.shape[0] < 2:
        raise ValueError(f"the features in {features.folder} lack the mirrored images; cache them with flips")
