"""Features of streams of images, from one process or several."""

from __future__ import annotations

import warnings
from collections.abc import Iterable

import torch
from torch import Tensor

from openpae.data.pixels import hash_of_all, hashes_of, quantize, to_unit
from openpae.eval.extractors import FeatureExtractor
from openpae.eval.frechet import Moments
from openpae.eval.image_stream import ImageStream
from openpae.runtime import processes


class FeatureSet:
    """Features of images in batches, from one process or several.

    Statistics are float64. The features are float32 on the CPU, 8 KiB an image for Inception. Images are
    numbered, so that neither batch size nor number of processes changes a metric that draws subsets. Images
    are rounded to 256 levels first, as in a saved file.

    Args:
        extractor: gives the features.
    """

    def __init__(self, extractor: FeatureExtractor) -> None:
        self.extractor = extractor
        self.image_size: tuple[int, int] | None = None
        self.pooled = Moments()
        self.spatial: Moments | None = None
        self.rows: list[Tensor] = []
        self.logit_rows: list[Tensor] = []
        self.index: list[int] = []
        self.hashes: list[bytes] = []

    @property
    def n(self) -> int:
        """Images seen so far."""
        return len(self.index)

    @torch.no_grad()
    def update(self, images: Tensor, index: Iterable[int] | None = None) -> None:
        """Add a batch.

        Args:
            images: (B, 3, H, W) in [0, 1], all of one size, on any device.
            index: number of each image among the images of all processes; None continues the count.

        Raises:
            ValueError: not RGB images in [0, 1], another size than before, or not one number per image.
        """
        levels = quantize(images)
        size = (images.shape[-2], images.shape[-1])
        if self.image_size not in (None, size):
            raise ValueError(
                f"images must all have one size, got {size} after {self.image_size}; resize them"
            )
        if images.max() <= 1 / 255:
            warnings.warn(
                f"all {len(images)} images of a batch are black, their largest value is "
                f"{float(images.max()):.2g}; were they divided by 255 twice?",
                stacklevel=2,
            )
        start = max(self.index, default=-1) + 1
        numbers = list(range(start, start + len(images))) if index is None else [int(i) for i in index]
        if len(numbers) != len(images):
            raise ValueError(
                f"index must number each of the {len(images)} images, got {len(numbers)} numbers"
            )
        features = self.extractor.features(to_unit(levels).to(device_of(self.extractor)))
        self.pooled.update(features.pooled.cpu())
        self.rows.append(features.pooled.float().cpu())
        if features.spatial is not None:
            self.spatial = self.spatial or Moments()
            self.spatial.update(features.spatial.cpu())
        if features.logits is not None:
            self.logit_rows.append(features.logits.float().cpu())
        self.image_size = size
        self.index.extend(numbers)
        self.hashes.extend(hashes_of(levels))

    def merge(self, other: FeatureSet) -> None:
        """Add the images of another set.

        Raises:
            ValueError: another extractor, another image size, or an image number that both hold.
        """
        if (self.extractor.name, self.extractor.weights) != (other.extractor.name, other.extractor.weights):
            raise ValueError(
                f"cannot merge features of {other.extractor.name} ({other.extractor.weights}) "
                f"into those of {self.extractor.name} ({self.extractor.weights})"
            )
        if None not in (self.image_size, other.image_size) and self.image_size != other.image_size:
            raise ValueError(
                f"cannot merge images of size {other.image_size} into images of {self.image_size}"
            )
        if both := set(self.index) & set(other.index):
            raise ValueError(
                f"both sets hold the images {', '.join(map(str, sorted(both)[:3]))} ({len(both)} in all); "
                f"give each image its own number with index="
            )
        self.image_size = self.image_size or other.image_size
        self.pooled.merge(other.pooled)
        if other.spatial is not None:
            self.spatial = self.spatial or Moments()
            self.spatial.merge(other.spatial)
        self.rows += other.rows
        self.logit_rows += other.logit_rows
        self.index += other.index
        self.hashes += other.hashes

    def gather(self) -> None:
        """Give every process the images of all. All processes must call it; a single one does nothing.

        Raises:
            ValueError: see `merge`.
        """
        if processes.world_size() == 1:
            return
        own = {name: value for name, value in vars(self).items() if name != "extractor"}
        merged = FeatureSet(self.extractor)
        for state in processes.gather(own):  # the same order in every process, so that rounding is equal
            part = FeatureSet(self.extractor)
            vars(part).update(state)
            merged.merge(part)
        vars(self).update(vars(merged))

    def features(self) -> Tensor:
        """Pooled features in the order of the image numbers: (N, F) float32.

        Raises:
            ValueError: no images were given.
        """
        if not self.index:
            raise ValueError("no images were given; call update first")
        return torch.cat(self.rows)[self._order()]

    def logits(self) -> Tensor | None:
        """Logits in the order of the image numbers: (N, K) float32; None if the extractor has none."""
        return torch.cat(self.logit_rows)[self._order()] if self.logit_rows else None

    def duplicates(self) -> int:
        """Images that equal an earlier one pixel by pixel."""
        return self.n - len(set(self.hashes))

    def sha256(self) -> str:
        """Hash of all images; their order does not matter."""
        return hash_of_all(self.hashes)

    def _order(self) -> Tensor:
        return torch.tensor(self.index).argsort()


def features_of(images: ImageStream, extractor: FeatureExtractor, batch_size: int = 32) -> FeatureSet:
    """Features of all images of a stream. Every process extracts its share and gets all.

    Args:
        images: the stream.
        extractor: gives the features.
        batch_size: images per forward pass.

    Raises:
        ValueError, BrokenImage: see the stream and `FeatureSet.update`.
    """
    features = FeatureSet(extractor)
    for batch in images.batches(batch_size):
        features.update(batch.images, batch.numbers)
    features.gather()
    return features


def device_of(extractor: FeatureExtractor) -> torch.device:
    """The device of an extractor's weights; the CPU if it is no module."""
    if isinstance(extractor, torch.nn.Module):
        return next((p.device for p in extractor.parameters()), torch.device("cpu"))
    return torch.device("cpu")
