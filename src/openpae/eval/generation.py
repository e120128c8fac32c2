"""All metrics of generated or reconstructed images against a reference, in one pass over the images."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from openpae.eval.estimate import Estimate, Undefined, split_results
from openpae.eval.extractors import FeatureExtractor
from openpae.eval.features import FeatureSet
from openpae.eval.frechet import Gaussian, frechet_distance, gaussian_of
from openpae.eval.reference import Reference
from openpae.eval.scores import inception_score, kid, monge_inception_distance, precision_recall
from openpae.eval.settings import EvaluationConfig


class Evaluation:
    """Collects images, then computes every metric.

    Args:
        extractor: the extractor of the reference.
        reference: real images or their statistics.
        config: settings of the metrics.

    Raises:
        ValueError: the reference was made by another extractor or other weights.
    """

    def __init__(self, extractor: FeatureExtractor, reference: Reference, config: EvaluationConfig) -> None:
        if reference.extractor != extractor.name or reference.weights not in ("", extractor.weights):
            raise ValueError(
                f"the reference was made by {reference.extractor} with weights "
                f"{reference.weights or 'unknown'}, but the samples are measured by {extractor.name} "
                f"with {extractor.weights}"
            )
        self.reference = reference
        self.config = config
        self.samples = FeatureSet(extractor)

    def update(self, images: Tensor, index: Iterable[int] | None = None) -> None:
        """Add a batch of images (B, 3, H, W) in [0, 1]; see `FeatureSet.update`.

        Raises:
            ValueError: not RGB images in [0, 1], or not of the reference's size.
        """
        self.check_size((images.shape[-2], images.shape[-1]))
        self.samples.update(images, index)

    def merge(self, samples: FeatureSet) -> None:
        """Add samples with their features.

        Raises:
            ValueError: another size than the reference, or see `FeatureSet.merge`.
        """
        self.check_size(samples.image_size)
        self.samples.merge(samples)

    def gather(self) -> None:
        """Give every process the samples of all. All processes must call it."""
        self.samples.gather()

    def check_size(self, size: tuple[int, int] | None) -> None:
        """Refuse samples of another size (H, W) than the reference. None means no samples, and passes.

        Raises:
            ValueError: the sizes differ.
        """
        wanted = self.reference.image_size
        if None not in (size, wanted) and size != wanted:
            raise ValueError(
                f"samples must have the size of the reference, {wanted}, got {size}; give samples or a "
                "reference of the other's size: resizing would change the distance"
            )

    def compute(self) -> tuple[dict[str, Estimate], dict[str, str]]:
        """Every metric of the images so far.

        Returns:
            Estimates by name: frechet, and if defined spatial_frechet, inception_score, kid, precision,
            recall; and the reason of each undefined metric by name.

        Raises:
            ValueError: fewer than two samples.
        """
        samples, reference = self.samples, self.reference
        if samples.n < 2:
            raise ValueError(f"a Frechet distance needs at least 2 samples, got {samples.n}")
        self._warn()
        return split_results(
            (
                _frechet("frechet", samples.pooled.gaussian(), reference.pooled),
                self._spatial(),
                self._inception_score(),
                *self._against_features(),
            )
        )

    def _warn(self) -> None:
        n, config = self.samples.n, self.config
        if n < config.min_samples:
            warnings.warn(
                f"only {n} samples (min_samples = {config.min_samples}): the Frechet distance falls with the "
                "number of samples; compare it with the floor of real images at the same number, or use KID",
                stacklevel=3,
            )
        if duplicates := self.samples.duplicates():
            warnings.warn(
                f"{duplicates} of {n} samples equal an earlier one pixel by pixel; look at seeds and loader",
                stacklevel=3,
            )

    def _spatial(self) -> Estimate | Undefined:
        name, samples, reference = "spatial_frechet", self.samples.spatial, self.reference.spatial
        if samples is None:
            return Undefined(name, f"{self.samples.extractor.name} has no spatial features")
        if reference is None:
            return Undefined(name, "the reference holds no spatial statistics")
        return _frechet(name, samples.gaussian(), reference)

    def _inception_score(self) -> Estimate | Undefined:
        config, logits = self.config, self.samples.logits()
        if logits is None:
            return Undefined("inception_score", f"{self.samples.extractor.name} does not classify")
        if len(logits) < config.splits:
            return Undefined(
                "inception_score", f"{len(logits)} samples are fewer than splits = {config.splits}"
            )
        return inception_score(logits, splits=config.splits, seed=config.seed)

    def _against_features(self) -> Iterator[Estimate | Undefined]:
        config, real = self.config, self.reference.features
        if real is None:
            for name in ("kid", "mind", "precision", "recall"):
                yield Undefined(name, "the reference holds statistics only, no images or features")
            return
        features = self.samples.features()
        smaller = min(len(features), len(real))
        if smaller < config.kid_subset_size:
            yield Undefined(
                "kid", f"{smaller} images are fewer than kid_subset_size = {config.kid_subset_size}"
            )
        else:
            subsets, size = config.kid_subsets, config.kid_subset_size
            yield kid(features, real, subsets=subsets, subset_size=size, seed=config.seed)
        yield monge_inception_distance(features, real, seed=config.seed)
        if smaller <= config.k:
            for name in ("precision", "recall"):
                yield Undefined(name, f"{smaller} images have no neighbour {config.k}")
        else:
            yield from precision_recall(features, real, k=config.k)


def frechet_floor(features: Tensor, n: int, *, repeats: int = 3, seed: int = 0) -> Estimate:
    """Frechet distance of real images to real images, the score of a perfect generator.

    Args:
        features: pooled features of real images, (M, F); each repeat draws two disjoint sets of n images.
        n: images per set; the number of samples of the evaluation.
        repeats: number of draws.
        seed: seed of the draws.

    Returns:
        The mean. Repeats share images, so that the standard error is too small if 2 n is close to M.

    Raises:
        ValueError: n is below 2, or above M / 2.
    """
    if not 2 <= n <= len(features) // 2:
        raise ValueError(
            f"the floor needs two disjoint sets, so n must be between 2 and {len(features) // 2} "
            f"(half of {len(features)} images), got {n}"
        )
    values = []
    for repeat in range(repeats):
        generator = torch.Generator().manual_seed(seed + repeat)
        order = torch.randperm(len(features), generator=generator).to(features.device)
        first, second = features[order[:n]], features[order[n : 2 * n]]
        values.append(frechet_distance(gaussian_of(first), gaussian_of(second)))
    spread = torch.tensor(values, dtype=torch.float64)
    std = float(spread.std()) if repeats > 1 else None
    return Estimate(
        name="frechet_floor",
        value=float(spread.mean()),
        std=std,
        stderr=None if std is None else std / repeats**0.5,
        n=repeats,
        over="repeats",
        settings={"samples": n, "images": len(features), "seed": seed},
    )


def _frechet(name: str, samples: Gaussian, reference: Gaussian) -> Estimate:
    assert samples.n is not None
    settings = {} if reference.n is None else {"reference": reference.n}
    return Estimate(name=name, value=frechet_distance(samples, reference), n=samples.n, settings=settings)
