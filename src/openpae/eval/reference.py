"""Features of a stream of images, and the references they are compared with (ADM files among them)."""

from __future__ import annotations

import hashlib
import warnings
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, distributed

from openpae.eval.extractors import INCEPTION, FeatureExtractor
from openpae.eval.frechet import Gaussian, Moments
from openpae.eval.reconstruction import quantize
from openpae.storage import file_hash, whole_file


class FeatureSet:
    """Features of images that come in batches, from one process or several.

    Statistics are kept in float64, the features themselves in float32 on the CPU (8 KiB an image for
    Inception). Images are numbered, so that neither the batch size nor the number of processes changes a
    metric that draws samples. They are rounded to 256 levels first: the numbers are those of saved files.

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
            images: (B, 3, H, W) in [0, 1], all of one size, on any device; the extractor's is where they go.
            index: number of each image among all images of all processes; by default they count on.

        Raises:
            ValueError: not RGB images in [0, 1], of another size than before, or not one number per image.
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
        found = self.extractor.features((levels.float() / 255).to(_device(self.extractor)))
        self.pooled.update(found.pooled.cpu())
        self.rows.append(found.pooled.float().cpu())
        if found.spatial is not None:
            self.spatial = self.spatial or Moments()
            self.spatial.update(found.spatial.cpu())
        if found.logits is not None:
            self.logit_rows.append(found.logits.float().cpu())
        self.image_size = size
        self.index.extend(numbers)
        self.hashes.extend(hashes_of(levels))

    def merge(self, other: FeatureSet) -> None:
        """Add what another process has seen.

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
                f"number the images of all processes apart with index="
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
        """Merge what all processes of torch.distributed have seen into process 0; the others keep their own.

        Raises:
            ValueError: see `merge`.
        """
        rank, world = distributed.get_rank(), distributed.get_world_size()
        own = {name: value for name, value in vars(self).items() if name != "extractor"}
        states: list[dict[str, Any]] = [{} for _ in range(world)]
        distributed.gather_object(own, states if rank == 0 else None, dst=0)
        if rank == 0:
            for state in states[1:]:
                other = FeatureSet(self.extractor)
                vars(other).update(state)
                self.merge(other)

    def features(self) -> Tensor:
        """Pooled features in the order of the image numbers: (N, F) float32.

        Raises:
            ValueError: no images were given.
        """
        self._check_filled()
        return torch.cat(self.rows)[self._order()]

    def logits(self) -> Tensor | None:
        """Logits in the order of the image numbers: (N, K) float32, or None where the extractor has none."""
        return torch.cat(self.logit_rows)[self._order()] if self.logit_rows else None

    def duplicates(self) -> int:
        """Images that equal an earlier one pixel by pixel."""
        return self.n - len(set(self.hashes))

    def sha256(self) -> str:
        """Hash of all images, whatever their order."""
        return hash_of_all(self.hashes)

    def _order(self) -> Tensor:
        return torch.tensor(self.index).argsort()

    def _check_filled(self) -> None:
        if not self.index:
            raise ValueError("no images were given; call update first")


def hashes_of(levels: Tensor) -> list[bytes]:
    """What names each image: 16 bytes over its pixels, uint8 (B, 3, H, W), channels last."""
    pixels = levels.permute(0, 2, 3, 1).contiguous().cpu().numpy()
    return [hashlib.blake2b(image.tobytes(), digest_size=16).digest() for image in pixels]


def hash_of_all(hashes: Iterable[bytes]) -> str:
    """SHA-256 over what `hashes_of` gave, whatever the order of the images."""
    return hashlib.sha256(b"".join(sorted(hashes))).hexdigest()


@dataclass(frozen=True, kw_only=True)
class Reference:
    """What generated images are compared with, in the features of one extractor."""

    name: str
    sha256: str
    """Of the images, or of the file of statistics."""
    extractor: str
    weights: str
    """Fingerprint of the extractor's weights; empty where a file of statistics does not say."""
    pooled: Gaussian
    spatial: Gaussian | None = None
    features: Tensor | None = None
    """(M, F) float32, for KID, precision and recall; None where a file holds statistics only."""
    image_size: tuple[int, int] | None = None


def reference_of(images: FeatureSet, name: str) -> Reference:
    """Make a reference of real images.

    Raises:
        ValueError: fewer than two images.
    """
    return Reference(
        name=name,
        sha256=images.sha256(),
        extractor=images.extractor.name,
        weights=images.extractor.weights,
        pooled=images.pooled.gaussian(),
        spatial=None if images.spatial is None else images.spatial.gaussian(),
        features=images.features(),
        image_size=images.image_size,
    )


def save_reference(reference: Reference, path: Path) -> None:
    """Write a reference as npz, whole or not at all: the names of the ADM layout, and ours beside them."""
    arrays = {
        "mu": reference.pooled.mean.numpy(),
        "sigma": reference.pooled.covariance.numpy(),
        "facts": np.array([reference.name, reference.sha256, reference.extractor, reference.weights]),
    }
    if reference.pooled.n is not None:
        arrays["n"] = np.array(reference.pooled.n)
    if reference.spatial is not None:
        arrays |= {"mu_s": reference.spatial.mean.numpy(), "sigma_s": reference.spatial.covariance.numpy()}
    if reference.features is not None:
        arrays["features"] = reference.features.numpy()
    if reference.image_size is not None:
        arrays["image_size"] = np.array(reference.image_size)
    with whole_file(path) as partial, partial.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]


def read_reference(path: Path, extractor: FeatureExtractor, batch_size: int = 64) -> Reference:
    """Read an npz reference: an ADM file (statistics, images or both), or one that `save_reference` wrote.

    The ADM files hold mu, sigma (pooled), mu_s, sigma_s (spatial) of the Inception network and, as arr_0,
    10,000 images (N, H, W, 3). As the ADM evaluator does, statistics are taken from the file where it has
    them, and the features for precision and recall from its images.

    Args:
        path: the file.
        extractor: with which the samples will be measured.
        batch_size: images per forward pass.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not such a file, damaged, or its statistics are of another extractor.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no reference at {path}")
    keys = _keys(path)
    if "mu" not in keys and "arr_0" not in keys:
        raise ValueError(
            f"{path} must hold mu and sigma, or images as arr_0; it holds: "
            f"{', '.join(sorted(keys)) or 'nothing'}"
        )
    if "facts" in keys:
        return _read_own(path, extractor)
    if "mu" in keys and extractor.name != INCEPTION:
        raise ValueError(
            f"{path} holds statistics of {INCEPTION}, which say nothing in the features of {extractor.name}; "
            f"measure with {INCEPTION}, or make a reference from real images"
        )
    images = None
    if "arr_0" in keys:
        images = FeatureSet(extractor)
        for batch in npz_images(path, batch_size):
            images.update(batch.to(_device(extractor)))
    if images is not None and "mu" not in keys:
        return reference_of(images, path.name)
    with np.load(path) as file:
        return Reference(
            name=path.name,
            sha256=file_hash(path),
            extractor=extractor.name,
            weights="" if images is None else extractor.weights,
            pooled=_gaussian(file, "mu", "sigma"),
            spatial=_gaussian(file, "mu_s", "sigma_s") if "mu_s" in keys else None,
            features=None if images is None else images.features(),
            image_size=None if images is None else images.image_size,
        )


def npz_images(path: Path, batch_size: int, key: str = "arr_0") -> Iterator[Tensor]:
    """Stream the images of an npz file: batches (B, 3, H, W) in [0, 1], of which only one is in memory.

    Args:
        path: a file that holds uint8 images (N, H, W, 3).
        batch_size: B; the last batch may be smaller.
        key: name of the array.

    Raises:
        ValueError: no such array, not uint8 images, or cut short.
    """
    if key not in _keys(path):
        raise ValueError(f"{path} holds no {key}; it holds: {', '.join(sorted(_keys(path)))}")
    with zipfile.ZipFile(path) as archive, archive.open(f"{key}.npy") as file:
        version = np.lib.format.read_magic(file)
        read_header = (
            np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        )
        shape, in_fortran_order, dtype = read_header(file)
        if dtype != np.uint8 or len(shape) != 4 or shape[-1] != 3 or in_fortran_order:
            raise ValueError(f"{key} in {path} must be uint8 images (N, H, W, 3), got {dtype} {shape}")
        for start in range(0, shape[0], batch_size):
            wanted = (min(batch_size, shape[0] - start), *shape[1:])
            data = file.read(int(np.prod(wanted)))
            if len(data) < np.prod(wanted):
                raise ValueError(f"{path} is damaged: {key} ends before its {shape[0]} images do")
            batch = torch.from_numpy(np.frombuffer(data, np.uint8).reshape(wanted).copy())
            yield batch.permute(0, 3, 1, 2).float() / 255


def _keys(path: Path) -> set[str]:
    try:
        with zipfile.ZipFile(path) as archive:
            return {name.removesuffix(".npy") for name in archive.namelist()}
    except zipfile.BadZipFile:
        raise ValueError(f"{path} is no npz file") from None


def _gaussian(file: np.lib.npyio.NpzFile, mean: str, covariance: str, n: int | None = None) -> Gaussian:
    return Gaussian(
        mean=torch.from_numpy(file[mean].astype(np.float64)),
        covariance=torch.from_numpy(file[covariance].astype(np.float64)),
        n=n,
    )


def _read_own(path: Path, extractor: FeatureExtractor) -> Reference:
    with np.load(path) as file:
        name, sha256, made_by, weights = (str(fact) for fact in file["facts"])
        if (made_by, weights) != (extractor.name, extractor.weights):
            raise ValueError(
                f"{path} was made by {made_by} with weights {weights or 'unknown'}, but the samples are "
                f"measured by {extractor.name} with {extractor.weights}; make the reference again"
            )
        n = int(file["n"]) if "n" in file else None
        return Reference(
            name=name,
            sha256=sha256,
            extractor=made_by,
            weights=weights,
            pooled=_gaussian(file, "mu", "sigma", n),
            spatial=_gaussian(file, "mu_s", "sigma_s", n) if "mu_s" in file else None,
            features=torch.from_numpy(file["features"]) if "features" in file else None,
            image_size=tuple(file["image_size"].tolist()) if "image_size" in file else None,
        )


def _device(extractor: FeatureExtractor) -> torch.device:
    """Where an extractor's weights are; the CPU for one that is no module."""
    if isinstance(extractor, torch.nn.Module):
        return next((p.device for p in extractor.parameters()), torch.device("cpu"))
    return torch.device("cpu")
