"""Evaluations as a user runs them, and their records: every number with what it was measured with."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import platform
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from openpae.critics import LPIPS, load_lpips
from openpae.data.images import ImageSource, PackedImages, decode_batch
from openpae.eval.estimate import Estimate
from openpae.eval.extractors import (
    FeatureExtractor,
    VggFeatures,
    load_dinov2,
    load_efficientnet,
    load_inception,
)
from openpae.eval.fid import Evaluation, EvaluationConfig, GenerationMetrics, frechet_floor
from openpae.eval.reconstruction import ReconstructionMetrics
from openpae.eval.reference import FeatureSet, reference_of
from openpae.tokenizer import PAE

ExtractorName = Literal["inception", "dinov2", "vgg16", "efficientnet-lite0", "random"]
"""inception gives the FID that is published; dinov2 is FD-DINOv2; vgg16 (512-d) and efficientnet-lite0
(1,280-d)
need no hub; random is for trials."""


def load_extractor(name: ExtractorName, weights: Path | None = None) -> FeatureExtractor:
    """A feature extractor with its weights; "random" has fixed random ones and means nothing.

    Args:
        name: which.
        weights: inception: the file pt_inception-2015-12-05; dinov2: a local folder. The others take none.

    Raises:
        FileNotFoundError: the weights can not be had.
        ValueError: weights are missing, or given to an extractor that takes none.
    """
    if name == "inception":
        if weights is None:
            raise ValueError(
                "extractor inception needs --extractor-weights, the file "
                "pt_inception-2015-12-05-6726825d.pth "
                "(a release file of the repository mseitzer/pytorch-fid)"
            )
        return load_inception(weights)
    if name == "dinov2":
        return load_dinov2() if weights is None else load_dinov2(str(weights))
    if weights is not None:
        raise ValueError(
            f"extractor {name} takes its weights from a package, so --extractor-weights must be left out"
        )
    if name == "efficientnet-lite0":
        return load_efficientnet()
    if name == "vgg16":
        return VggFeatures(load_lpips("vgg"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return VggFeatures(LPIPS("vgg"))


def source_batches(
    source: ImageSource, size: int, batch_size: int, indices: Iterable[int] | None = None
) -> Iterator[Tensor]:
    """Centre-cropped images of a source, (B, 3, size, size) in [0, 1], in order.

    Raises:
        ValueError: packed images are smaller than `size`.
    """
    if isinstance(source, PackedImages) and source.image_size < size:
        raise ValueError(
            f"{source.shards.folder} holds images of {source.image_size} pixels, {size} are needed; "
            "enlarging them "
            "would change every distance: pack them anew from the originals"
        )
    rows = list(range(len(source)) if indices is None else indices)
    for start in range(0, len(rows), batch_size):
        yield decode_batch(source, rows[start : start + batch_size], size)[0].float() / 255


def evaluate_reconstruction(
    tokenizer: PAE,
    source: ImageSource,
    *,
    extractor: FeatureExtractor | None,
    lpips: LPIPS | None,
    count: int | None = None,
    batch_size: int = 32,
    min_samples: int = 10_000,
) -> dict[str, Any]:
    """PSNR, SSIM, LPIPS, and the Frechet distance of reconstructions to their originals (rFID's kind).

    Args:
        tokenizer: in evaluation mode.
        source: images; centre-cropped to the tokenizer's size.
        extractor: of the Frechet distance; None leaves it out.
        lpips: None leaves it out.
        count: images to take, from the first on; None takes all.
        batch_size: images per forward pass.
        min_samples: fewer images than this make a Frechet distance that is warned of.

    Returns:
        The record: metric -> value, standard error, n and settings; and what it was measured with.
    """
    device = tokenizer.device
    size = tokenizer.config.image_size
    pairs = ReconstructionMetrics(lpips)
    real, decoded = (FeatureSet(extractor), FeatureSet(extractor)) if extractor else (None, None)
    rows = range(len(source) if count is None else min(count, len(source)))
    with torch.no_grad():
        for batch in source_batches(source, size, batch_size, rows):
            x = batch.to(device)
            y = tokenizer.reconstruct(x).float()
            pairs.update(x, y)
            if real is not None and decoded is not None:
                real.update(x)
                decoded.update(y)
    metrics = pairs.compute()
    record: dict[str, Any] = {"images": len(rows), "image_size": size, "data": source.fingerprint()}
    if extractor is not None and real is not None and decoded is not None:
        result = _compare(decoded, real, source.fingerprint(), min_samples)
        metrics = metrics | dict(result.metrics)
        record |= {"extractor": extractor.name, "extractor_weights": extractor.weights}
    return _record("reconstruction", metrics, record)


def features_of(
    source: ImageSource, extractor: FeatureExtractor, size: int, batch_size: int = 32
) -> FeatureSet:
    """Features of all images of a source, centre-cropped to `size`: a reference that can serve many times."""
    real = FeatureSet(extractor)
    for batch in source_batches(source, size, batch_size):
        real.update(batch)
    return real


def evaluate_samples(
    batches: Iterable[Tensor],
    source: ImageSource,
    *,
    extractor: FeatureExtractor,
    size: int,
    batch_size: int = 32,
    real: FeatureSet | None = None,
    min_samples: int = 10_000,
    facts: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Frechet distance (gFID's kind), KID, precision and recall of generated images against real ones.

    Beside them stands the floor: the distance of one half of the real images to the other at the samples'
    count
    (or at half of the real images, where there are too few).

    Args:
        batches: generated images, (B, 3, size, size) in [0, 1].
        source: real images; centre-cropped to `size`.
        extractor: of the features.
        size: side of the images.
        batch_size: real images per forward pass.
        real: what `features_of` made of the source, where it is at hand.
        min_samples: fewer samples than this are warned of: the distance is then much too large.
        facts: what else the record should say (sampler, seed, fingerprints).
    """
    real = real or features_of(source, extractor, size, batch_size)
    fake = FeatureSet(extractor)
    for batch in batches:
        fake.update(batch)
    result = _compare(fake, real, source.fingerprint(), min_samples)
    metrics = dict(result.metrics)
    if real.n >= 4:
        metrics["frechet_floor"] = frechet_floor(real.features(), min(fake.n, real.n // 2))
    record = {
        "samples": fake.n,
        "samples_sha256": result.samples_sha256,
        "duplicates": result.duplicates,
        "undefined": dict(result.undefined),
        "reference": source.fingerprint(),
        "reference_images": real.n,
        "image_size": size,
        "extractor": extractor.name,
        "extractor_weights": extractor.weights,
        **(facts or {}),
    }
    return _record("samples", metrics, record)


def _compare(fake: FeatureSet, real: FeatureSet, name: str, min_samples: int) -> GenerationMetrics:
    n = min(fake.n, real.n)  # KID's subsets hold at most half of them: equal subsets would have no spread
    config = EvaluationConfig(kid_subset_size=max(2, min(1000, n // 2)), min_samples=max(2, min_samples))
    evaluation = Evaluation(fake.extractor, reference_of(real, name), config)
    evaluation.samples = fake
    return evaluation.compute()


def _record(kind: str, metrics: Mapping[str, Estimate], facts: Mapping[str, Any]) -> dict[str, Any]:
    versions = {name: importlib.metadata.version(name) for name in ("openpae", "torch", "numpy", "pillow")}
    return {
        "kind": kind,
        "metrics": {name: dataclasses.asdict(estimate) for name, estimate in metrics.items()},
        **facts,
        "versions": versions | {"python": platform.python_version()},
    }
