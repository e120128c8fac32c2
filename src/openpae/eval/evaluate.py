"""Evaluation of reconstructions and of samples. The record holds each number and everything it depends on.

Under torchrun every process must call these functions: each works on its share, and all get the record.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from openpae.eval.estimate import Estimate
from openpae.eval.extractors import FeatureExtractor
from openpae.eval.features import FeatureSet, device_of
from openpae.eval.frechet import frechet_distance
from openpae.eval.generation import Evaluation, frechet_floor
from openpae.eval.image_stream import ImageStream
from openpae.eval.reconstruction import ReconstructionMetrics
from openpae.eval.reference import Reference, reference_of
from openpae.eval.settings import EvaluationConfig
from openpae.interop.any_tokenizer import AnyTokenizer
from openpae.models.lpips import LPIPS
from openpae.models.tokenizer import Autoencoder
from openpae.runtime import processes
from openpae.runtime.provenance import package_versions
from openpae.storage.files import fingerprint, write_json

VALUE_RANGE = "RGB in [0, 1], rounded to 256 levels"
"""Range and levels of all images before features are computed."""


def evaluate_reconstruction(
    tokenizer: Autoencoder | AnyTokenizer,
    images: ImageStream,
    *,
    extractor: FeatureExtractor | None,
    lpips: LPIPS | None,
    batch_size: int = 32,
    min_samples: int = 10_000,
    facts: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """PSNR, SSIM, LPIPS, and the Frechet distance of reconstructions to their originals (rFID, rFD).

    Args:
        tokenizer: in evaluation mode.
        images: real images of a size that the tokenizer takes.
        extractor: features of the Frechet distance; None leaves it out.
        lpips: None leaves LPIPS out.
        batch_size: images per forward pass. It changes rounding only.
        min_samples: fewer images give a warning.
        facts: further entries of the record (fingerprints).

    Returns:
        The record: metric -> value, standard error, n and settings; and what the numbers depend on.

    Raises:
        ValueError: the tokenizer does not take the images.
    """
    pairs = ReconstructionMetrics(lpips)
    sets = [] if extractor is None else [FeatureSet(extractor), FeatureSet(extractor)]
    _reconstruct(tokenizer, images, batch_size, pairs, sets)

    def compute() -> dict[str, Any]:
        metrics = pairs.compute()
        distance_facts: dict[str, Any] = {}
        if extractor is not None:
            real, decoded = sets
            reference = reference_of(real, images.name, images.preprocessing)
            evaluation = Evaluation(extractor, reference, _settings(real.n, reference, min_samples))
            evaluation.merge(decoded)
            distances, distance_facts = _results_of(evaluation)
            metrics |= distances
        network: dict[str, str] = {}
        if lpips is not None:
            network = {"lpips": f"lpips-{lpips.net}", "lpips_weights": fingerprint(lpips.state_dict())}
        return {
            "metrics": metric_facts(metrics),
            "images": images.count,
            "data": images.facts.get("data"),
            "reference": images.name,
            "reference_preprocessing": images.preprocessing,
            "image_size": list(images.size),
            **distance_facts,
            **network,
        }

    return _record("reconstruction", compute, tokenizer.device, facts)


@torch.no_grad()
def _reconstruct(
    tokenizer: Autoencoder | AnyTokenizer,
    images: ImageStream,
    batch_size: int,
    pairs: ReconstructionMetrics,
    sets: Sequence[FeatureSet],
) -> None:
    """Add all pairs of images, and the features of images and reconstructions if `sets` holds both sets."""
    for batch in images.batches(batch_size):
        x = batch.images.to(tokenizer.device)
        y = tokenizer.reconstruct(x).float()
        pairs.update(x, y, batch.numbers)
        for features, pixels in zip(sets, (x, y), strict=False):
            features.update(pixels, batch.numbers)
    pairs.gather()
    for features in sets:
        features.gather()


def evaluate_samples(
    samples: ImageStream,
    reference: Reference,
    *,
    extractor: FeatureExtractor,
    batch_size: int = 32,
    min_samples: int = 10_000,
    others: Mapping[str, Reference] | None = None,
    facts: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Frechet distances (gFID, sFID), Inception Score, KID, precision and recall of samples.

    The record also holds the floor: the distance of real images to real images at the samples' count, or at
    half of the real images if these are too few.

    Args:
        samples: generated images.
        reference: real images or their statistics, in the features of `extractor`.
        extractor: gives the features.
        batch_size: images per forward pass. It changes rounding only.
        min_samples: fewer samples give a warning: the distance is then much too large.
        others: further references by name; each adds the metric frechet_NAME, the distance to it.
        facts: further entries of the record, beside the facts of the stream (sampler, fingerprints).

    Returns:
        The record: metric -> value, standard error, n and settings; and what the numbers depend on.

    Raises:
        ValueError: the samples have several sizes or another size than the reference, the reference is of
            another extractor, or the stream's facts describe other samples.
    """
    evaluation = Evaluation(extractor, reference, _settings(samples.count, reference, min_samples))
    evaluation.check_size(samples.size)
    for batch in samples.batches(batch_size):
        evaluation.update(batch.images, batch.numbers)
    evaluation.gather()
    sampler = dict(samples.facts)

    def compute() -> dict[str, Any]:
        _check_sidecar(samples, evaluation.samples.sha256())
        metrics, distance_facts = _results_of(evaluation)
        for name, other in (others or {}).items():
            distance = frechet_distance(evaluation.samples.pooled.gaussian(), other.pooled)
            metrics[f"frechet_{name}"] = Estimate(
                name=f"frechet_{name}",
                value=distance,
                n=samples.count,
                settings={"reference": other.name, "reference_sha256": other.sha256},
            )
        return {
            "metrics": metric_facts(metrics),
            **distance_facts,
            "samples_from": samples.name,
            "samples_preprocessing": samples.preprocessing,
            "tokenizer": sampler.pop("tokenizer", None),
            "generator": sampler.pop("generator", None),
            "sampler": sampler or None,
        }

    return _record("samples", compute, device_of(extractor), facts)


def metric_facts(metrics: Mapping[str, Estimate]) -> dict[str, Any]:
    """Metrics for a record: name -> value, standard error, n, settings."""
    return {name: dataclasses.asdict(estimate) for name, estimate in metrics.items()}


def write_evaluation(record: Mapping[str, Any], run_dir: Path, step: int) -> None:
    """Write the record of an evaluation inside training, run_dir/evaluations/step-N.json. Rank 0 writes."""
    if processes.is_rank0():
        folder = run_dir / "evaluations"
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / f"step-{step:08d}.json", {**record, "step": step})


def _settings(count: int, reference: Reference, min_samples: int) -> EvaluationConfig:
    # A subset of KID holds at most half of either set: subsets of all samples would have no spread.
    n = count if reference.features is None else min(count, len(reference.features))
    return EvaluationConfig(kid_subset_size=max(2, min(1000, n // 2)), min_samples=max(2, min_samples))


def _check_sidecar(samples: ImageStream, sha256: str) -> None:
    """Refuse a record of other samples."""
    recorded = samples.facts.get("samples_sha256", sha256)
    if recorded != sha256:
        raise ValueError(
            f"the record beside {samples.name} describes other samples: its samples_sha256 is "
            f"{str(recorded)[:12]}..., that of these samples {sha256[:12]}...; bring the record of these, or "
            "move this one away"
        )


def _results_of(evaluation: Evaluation) -> tuple[dict[str, Estimate], dict[str, Any]]:
    """The metrics with the floor of real images, and what these numbers depend on."""
    samples, reference = evaluation.samples, evaluation.reference
    metrics, undefined = evaluation.compute()
    if reference.features is not None and (half := len(reference.features) // 2) >= 2:
        floor = metrics["frechet_floor"] = frechet_floor(reference.features, min(samples.n, half))
        if floor.value > 0:
            metrics["frechet_ratio"] = Estimate(
                name="frechet_ratio",
                value=metrics["frechet"].value / floor.value,
                n=samples.n,
                settings={"extractor": samples.extractor.name, "floor_images": min(samples.n, half)},
            )
    assert samples.image_size is not None  # there are samples
    return metrics, {
        "undefined": undefined,
        "samples": samples.n,
        "samples_sha256": samples.sha256(),
        "duplicates": samples.duplicates(),
        "image_size": list(samples.image_size),
        "reference": reference.name,
        "reference_sha256": reference.sha256,
        "reference_n": reference.pooled.n,
        "reference_preprocessing": reference.preprocessing,
        "extractor": samples.extractor.name,
        "extractor_weights": samples.extractor.weights,
    }


def _record(
    kind: str,
    compute: Callable[[], Mapping[str, Any]],
    device: torch.device,
    facts: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Compute on rank 0, and give the full record to all processes."""
    return processes.on_rank0(
        lambda: {
            "kind": kind,
            **compute(),
            **(facts or {}),
            "value_range": VALUE_RANGE,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "processes": processes.world_size(),
            "versions": package_versions(),
        }
    )
