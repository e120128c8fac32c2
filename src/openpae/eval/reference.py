"""References: real images or their statistics, from folders, ADM files or saved references."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from openpae.data.crops import Size
from openpae.data.images import PackedImages, open_images
from openpae.data.npz import npz_array, npz_keys
from openpae.eval.extractors import INCEPTION, FeatureExtractor
from openpae.eval.features import FeatureSet, features_of
from openpae.eval.frechet import Gaussian, check_statistics, gaussian_of
from openpae.eval.image_stream import counted, npz_stream, real_images
from openpae.storage.files import atomic_file, file_hash


@dataclass(frozen=True, kw_only=True)
class Reference:
    """Statistics and features of real images, from one extractor."""

    name: str
    sha256: str
    """Hash of the images, or of the file of statistics."""
    extractor: str
    weights: str
    """Fingerprint of the extractor's weights; empty if a file of statistics does not hold it."""
    pooled: Gaussian
    spatial: Gaussian | None = None
    features: Tensor | None = None
    """(M, F) float32, for KID, precision and recall; None if a file holds statistics only."""
    image_size: tuple[int, int] | None = None
    """(H, W); None if a file of statistics does not hold it."""
    preprocessing: str = "unknown"
    """Resize and crop, in words."""


def reference_of(images: FeatureSet, name: str, preprocessing: str = "unknown") -> Reference:
    """Make a reference of the features of real images.

    Args:
        images: features of the images.
        name: name in records.
        preprocessing: resize and crop, in words.

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
        preprocessing=preprocessing,
    )


def open_reference(
    path: Path,
    extractor: FeatureExtractor,
    *,
    size: Size | None = None,
    batch_size: int = 32,
    progress: Callable[[int, int], None] | None = None,
) -> Reference:
    """The reference at a path: a folder of images, packed images, an ADM file, or a saved reference.

    Args:
        path: the folder or file.
        extractor: the extractor of the samples.
        size: (H, W) of the centre crop of images of a folder, or the side of squares; None takes the size of
            packed images. Files ignore it.
        batch_size: images per forward pass.
        progress: called with (done, all) images of a folder.

    Raises:
        FileNotFoundError: the path does not exist.
        ValueError: the file does not fit, or a folder of images needs `size`.
    """
    if not path.is_dir():
        return read_reference(path, extractor, batch_size)
    source = open_images(path)
    if isinstance(source, PackedImages):
        size = size or source.image_shape
    if size is None:
        raise ValueError(f"{path} holds images of any size, so the side to crop them to is needed: --size")
    images = counted(real_images(source, size, name=str(path)), progress)
    return reference_of(features_of(images, extractor, batch_size), images.name, images.preprocessing)


_FACTS = ("name", "sha256", "extractor", "weights", "preprocessing")


def save_reference(reference: Reference, path: Path) -> None:
    """Write a reference as npz, atomically: the arrays of the ADM layout, and further ones."""
    arrays = {
        "mu": reference.pooled.mean.numpy(),
        "sigma": reference.pooled.covariance.numpy(),
        "facts": np.array([getattr(reference, name) for name in _FACTS]),
    }
    if reference.pooled.n is not None:
        arrays["n"] = np.array(reference.pooled.n)
    if reference.spatial is not None:
        arrays |= {"mu_s": reference.spatial.mean.numpy(), "sigma_s": reference.spatial.covariance.numpy()}
    if reference.features is not None:
        arrays["features"] = reference.features.numpy()
    if reference.image_size is not None:
        arrays["image_size"] = np.array(reference.image_size)
    with atomic_file(path) as partial, partial.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]


def is_own_reference(path: Path) -> bool:
    """Whether `save_reference` wrote the file."""
    try:
        return path.is_file() and "facts" in npz_keys(path)
    except ValueError:
        return False


def read_reference(path: Path, extractor: FeatureExtractor, batch_size: int = 64) -> Reference:
    """Read an npz reference: an ADM file (statistics, images or both), or a saved reference.

    ADM files hold mu, sigma (pooled), mu_s, sigma_s (spatial) of the Inception network and, as arr_0, 10,000
    images (N, H, W, 3). As in the ADM evaluator, the file gives the statistics if it has them, and its images
    give the features for precision and recall.

    Args:
        path: the file.
        extractor: the extractor of the samples.
        batch_size: images per forward pass.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no such reference, or it is damaged or of another extractor.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no reference at {path}")
    keys = npz_keys(path)
    if "mu" not in keys and "arr_0" not in keys:
        raise ValueError(
            f"{path} must hold mu and sigma, or images as arr_0; it holds: "
            f"{', '.join(sorted(keys)) or 'nothing'}"
        )
    if "facts" in keys:
        return _read_own(path, extractor)
    if "mu" in keys and extractor.name != INCEPTION:
        raise ValueError(
            f"{path} holds statistics of {INCEPTION}, which do not compare with features of "
            f"{extractor.name}; measure with {INCEPTION}, or make a reference from real images"
        )
    images = None
    if "arr_0" in keys:
        stream = npz_stream(path)
        images = features_of(stream, extractor, batch_size)
        if "mu" not in keys:
            return reference_of(images, path.name, stream.preprocessing)
    return Reference(
        name=path.name,
        sha256=file_hash(path),
        extractor=extractor.name,
        weights="" if images is None else extractor.weights,
        pooled=_gaussian(path, "mu", "sigma"),
        spatial=_gaussian(path, "mu_s", "sigma_s") if "mu_s" in keys else None,
        features=None if images is None else images.features(),
        image_size=None if images is None else images.image_size,
        preprocessing="unknown" if images is None else stream.preprocessing,
    )


def _gaussian(path: Path, mean: str, covariance: str, n: int | None = None) -> Gaussian:
    mu, sigma = (torch.from_numpy(npz_array(path, name).astype(np.float64)) for name in (mean, covariance))
    try:
        gaussian = Gaussian(mean=mu, covariance=sigma, n=n)
        check_statistics(gaussian)
    except ValueError as error:
        raise ValueError(f"{path} holds no {mean} and {covariance}: {error}") from None
    return gaussian


def _read_own(path: Path, extractor: FeatureExtractor) -> Reference:
    keys, names = npz_keys(path), npz_array(path, "facts", "U").ravel().tolist()
    facts = dict(zip(_FACTS, names, strict=False))
    if len(names) != len(_FACTS):
        raise ValueError(f"{path} is damaged: its facts must be {', '.join(_FACTS)}, got {len(names)} texts")
    if (facts["extractor"], facts["weights"]) != (extractor.name, extractor.weights):
        raise ValueError(
            f"{path} was made by {facts['extractor']} with weights {facts['weights'] or 'unknown'}, but "
            f"the samples are measured by {extractor.name} with {extractor.weights}; make the reference "
            "again"
        )
    n = _positive_integers(path, "n", 1)[0] if "n" in keys else None
    height_width = _positive_integers(path, "image_size", 2) if "image_size" in keys else None
    pooled = _gaussian(path, "mu", "sigma", n)
    features = torch.from_numpy(npz_array(path, "features")).float() if "features" in keys else None
    if features is not None:
        if features.shape[1:] != pooled.mean.shape or len(features) != n or not features.isfinite().all():
            raise ValueError(
                f"{path} is damaged: features must be ({n}, {len(pooled.mean)}) finite numbers, one row for "
                f"each of its images, got {tuple(features.shape)}"
            )
        if len(features) < features.shape[1]:
            pooled = gaussian_of(features)  # with its exact factor, as before saving
    return Reference(
        **facts,
        pooled=pooled,
        spatial=_gaussian(path, "mu_s", "sigma_s", n) if "mu_s" in keys else None,
        features=features,
        image_size=None if height_width is None else (height_width[0], height_width[1]),
    )


def _positive_integers(path: Path, name: str, count: int) -> list[int]:
    numbers: list[int] = npz_array(path, name, "iu").ravel().tolist()
    if len(numbers) != count or min(numbers) < 1:
        raise ValueError(f"{path} is damaged: {name} must hold {count} numbers above 0, got {numbers[:4]}")
    return numbers
