"""Evaluations as a user runs them, and their records: every number with what it was measured with.

Under torchrun every process must call these functions: each works on its share, and all get the record.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
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
from openpae.models.lpips import LPIPS
from openpae.models.tokenizer import Autoencoder
from openpae.runtime import processes
from openpae.runtime.provenance import package_versions
from openpae.storage.files import fingerprint, write_json

VALUE_RANGE = "RGB in [0, 1], rounded to 256 levels"
"""Of all images before any feature is computed."""


def evaluate_reconstruction(
    tokenizer: Autoencoder,
    images: ImageStream,
    *,
    extractor: FeatureExtractor | None,
    lpips: LPIPS | None,
    batch_size: int = 32,
    min_samples: int = 10_000,
    facts: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """PSNR, SSIM, LPIPS, and the Frechet distance of reconstructions to their originals (rFID's kind).

    Args:
        tokenizer: in evaluation mode.
        images: real images of a size that it takes.
        extractor: of the Frechet distance; None leaves it out.
        lpips: None leaves it out.
        batch_size: images per forward pass; changes no number beyond rounding.
        min_samples: fewer images than this make a Frechet distance that is warned of.
        facts: what else the record should say (fingerprints).

    Returns:
        The record: metric -> value, standard error, n and settings; and what it was measured with.

    Raises:
        ValueError: images that the tokenizer does not take.
    """
    pairs = ReconstructionMetrics(lpips)
    sets = [] if extractor is None else [FeatureSet(extractor), FeatureSet(extractor)]
    with torch.no_grad():
        for batch in images.batches(batch_size):
            x = batch.images.to(tokenizer.device)
            y = tokenizer.reconstruct(x).float()
            pairs.update(x, y, batch.numbers)
            for features, shown in zip(sets, (x, y), strict=False):
                features.update(shown, batch.numbers)
    pairs.gather()
    for features in sets:
        features.gather()

    def compute() -> dict[str, Any]:
        metrics = pairs.compute()
        found: dict[str, Any] = {}
        if extractor is not None:
            real, decoded = sets
            reference = reference_of(real, images.name, images.preprocessing)
            evaluation = Evaluation(extractor, reference, _settings(real.n, reference, min_samples))
            evaluation.merge(decoded)
            judged, found = _judged(evaluation)
            metrics |= judged
        return {
            "metrics": metric_facts(metrics),
            "images": images.count,
            "data": images.facts.get("data"),
            "reference": images.name,
            "reference_preprocessing": images.preprocessing,
            "image_size": list(images.size),
            **found,
            **_network(lpips),
        }

    return _record("reconstruction", compute, tokenizer.device, facts)


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
    """Frechet distances (gFID's and sFID's kind), Inception Score, KID, precision, recall of samples.

    Beside them stands the floor: the distance of one half of the real images to the other at the samples'
    count (or at half of the real images, where there are too few).

    Args:
        samples: generated images.
        reference: what they are compared with, in the features of the same extractor.
        extractor: of the features.
        batch_size: images per forward pass; changes no number beyond rounding.
        min_samples: fewer samples than this are warned of: the distance is then much too large.
        others: further references by name, in the features of the same extractor; each adds the metric
            frechet_NAME, the distance of the samples to it.
        facts: what else the record should say, over what the stream says of itself (sampler, fingerprints).

    Returns:
        The record: metric -> value, standard error, n and settings; and what it was measured with.

    Raises:
        ValueError: samples of another size than the reference's or than one another, a reference of another
            extractor, or samples that are not those that the stream's facts tell of.
    """
    evaluation = Evaluation(extractor, reference, _settings(samples.count, reference, min_samples))
    evaluation.check_size(samples.size)
    for batch in samples.batches(batch_size):
        evaluation.update(batch.images, batch.numbers)
    evaluation.gather()
    sampler = dict(samples.facts)

    def compute() -> dict[str, Any]:
        _check_sidecar(samples, evaluation.samples.sha256())
        metrics, found = _judged(evaluation)
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
            **found,
            "samples_from": samples.name,
            "samples_preprocessing": samples.preprocessing,
            "tokenizer": sampler.pop("tokenizer", None),
            "generator": sampler.pop("generator", None),
            "sampler": sampler or None,
        }

    return _record("samples", compute, device_of(extractor), facts)


def metric_facts(metrics: Mapping[str, Estimate]) -> dict[str, Any]:
    """Metrics as a record holds them: name -> value, standard error, n, settings."""
    return {name: dataclasses.asdict(estimate) for name, estimate in metrics.items()}


def write_evaluation(record: Mapping[str, Any], run_dir: Path, step: int) -> None:
    """Keep the record of an evaluation inside training: run_dir/evaluations/step-N.json, by one process."""
    if processes.is_rank0():
        folder = run_dir / "evaluations"
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / f"step-{step:08d}.json", {**record, "step": step})


def _settings(count: int, reference: Reference, min_samples: int) -> EvaluationConfig:
    # KID's subsets hold at most half of either set: equal subsets would have no spread.
    n = count if reference.features is None else min(count, len(reference.features))
    return EvaluationConfig(kid_subset_size=max(2, min(1000, n // 2)), min_samples=max(2, min_samples))


def _check_sidecar(samples: ImageStream, found: str) -> None:
    """See that the record beside the samples is theirs."""
    told = samples.facts.get("samples_sha256", found)
    if told != found:
        raise ValueError(
            f"the record beside {samples.name} tells of other samples: their samples_sha256 is "
            f"{str(told)[:12]}..., that of these {found[:12]}...; bring the two together, or move the record "
            "away to measure these without it"
        )


def _judged(evaluation: Evaluation) -> tuple[dict[str, Estimate], dict[str, Any]]:
    """The metrics, the floor of real images beside them, and what both were measured with."""
    result, real = evaluation.compute(), evaluation.reference.features
    metrics = dict(result.metrics)
    if real is not None and len(real) >= 4:
        metrics["frechet_floor"] = frechet_floor(real, min(result.n, len(real) // 2))
    return metrics, {
        "undefined": dict(result.undefined),
        "samples": result.n,
        "samples_sha256": result.samples_sha256,
        "duplicates": result.duplicates,
        "image_size": list(result.image_size),
        "reference": result.reference,
        "reference_sha256": result.reference_sha256,
        "reference_n": result.reference_n,
        "reference_preprocessing": evaluation.reference.preprocessing,
        "extractor": result.extractor,
        "extractor_weights": result.weights,
    }


def _network(lpips: LPIPS | None) -> dict[str, str]:
    if lpips is None:
        return {}
    return {"lpips": f"lpips-{lpips.net}", "lpips_weights": fingerprint(lpips.state_dict())}


def _record(
    kind: str,
    compute: Callable[[], Mapping[str, Any]],
    device: torch.device,
    facts: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """What the first process computes, with everything around it, in all processes."""
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
