"""`pae evaluate`: compare reconstructions, stored samples, or samples of a generator with a reference."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from openpae.data.classes import check_images_agree
from openpae.data.crops import height_width
from openpae.data.images import open_images
from openpae.eval.evaluate import evaluate_reconstruction, evaluate_samples
from openpae.eval.extractors import FeatureExtractor, load_extractor
from openpae.eval.image_stream import (
    ImageStream,
    counted,
    npz_stream,
    real_images,
    sampled_images,
    stored_images,
)
from openpae.eval.reference import open_reference, save_reference
from openpae.eval.settings import EvaluationRun, SamplingOptions
from openpae.interop.any_tokenizer import AnyTokenizer
from openpae.interop.spaces import open_tokenizer
from openpae.models.lpips_weights import load_perceptual
from openpae.runtime.processes import is_rank0
from openpae.sampling.pipeline import SamplingModels
from openpae.sampling.sampler import balanced_labels
from openpae.storage.model_folder import read_classes, trained_classes


def run_evaluation(
    reference: Path,
    run: EvaluationRun,
    device: torch.device,
    *,
    options: SamplingOptions | None = None,
    batch_size: int = 32,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any] | None:
    """Evaluate and return the record; None if only a reference was made.

    Under torchrun every process must call this function: each works on its share, and all get the record.

    Args:
        reference: real images (a folder, or packed images), an npz of the ADM layout (images, statistics or
            both), or a file of save_reference.
        run: what to evaluate, and the settings.
        device: device of all networks.
        options: how to sample; None takes the defaults. Only with a generator.
        batch_size: images per forward pass and process. It changes rounding only.
        progress: called with (done, all) images of the reference, then of what is measured.

    Raises:
        FileNotFoundError, ValueError: a path does not exist, or something does not fit.
    """
    if not reference.exists():  # before weights are downloaded
        raise FileNotFoundError(
            f"no reference at {reference}; give a folder of real images, packed images, or an npz file"
        )
    if run.generator is None and options is not None:
        raise ValueError("options are for sampling from generator, which is missing")
    extractor = load_extractor(run.extractor, run.extractor_weights, device)
    if run.tokenizer is not None and run.generator is None:
        return _reconstruction(reference, run, run.tokenizer, extractor, device, batch_size, progress)
    if run.generator is not None:
        check_reference(reference, run.generator)
    samples = _samples(run, options or SamplingOptions(), device)
    size = run.size if run.size is not None or samples is None else samples.size
    known = open_reference(reference, extractor, size=size, batch_size=batch_size, progress=progress)
    if run.save_reference is not None and is_rank0():
        save_reference(known, run.save_reference)
    if samples is None:
        return None
    return evaluate_samples(
        counted(samples, progress),
        known,
        extractor=extractor,
        batch_size=batch_size,
        min_samples=run.min_samples,
    )


def check_reference(reference: Path, generator: Path) -> None:
    """Refuse labelled reference images with other classes than the generator names.

    Raises:
        ValueError: the message names the first difference.
    """
    known = read_classes(generator)
    if known is not None and reference.is_dir():
        check_images_agree(generator, known[0], reference, open_images(reference).classes)


def _samples(run: EvaluationRun, options: SamplingOptions, device: torch.device) -> ImageStream | None:
    if run.samples is not None:
        return stored_images(run.samples)
    if run.generator is None or run.tokenizer is None or run.sample_count is None:
        return None
    models = SamplingModels.load(
        run.tokenizer,
        run.generator,
        options.autoguidance,
        device=device,
        precision=options.precision,
        compile=options.compile,
    )
    return sampled_images(
        models.tokenizer,
        models.generator,
        balanced_labels(
            run.sample_count, trained_classes(run.generator, models.generator.config.num_classes)
        ),
        options.sampler,
        size=models.image_shape,
        seed=run.seed,
        precision=options.precision,
        weak=models.weak,
        facts={"labels": "class-balanced", **models.facts},
    )


def _reconstruction(
    reference: Path,
    run: EvaluationRun,
    given: Path,
    extractor: FeatureExtractor,
    device: torch.device,
    batch_size: int,
    progress: Callable[[int, int], None] | None,
) -> dict[str, Any]:
    tokenizer = AnyTokenizer(open_tokenizer(given, device), device)
    size = height_width(run.size or tokenizer.space.image_size)
    if reference.is_dir():
        source = open_images(reference)
        rows = range(len(source) if run.count is None else min(run.count, len(source)))
        images = real_images(source, size, name=str(reference), rows=rows)
    else:
        images = npz_stream(reference, count=run.count)
        if images.size != size:
            raise ValueError(
                f"{reference} holds images of {images.size[0]} x {images.size[1]} (H x W), but {given} "
                f"takes {size[0]} x {size[1]}; give the original images as a folder"
            )
    return evaluate_reconstruction(
        tokenizer,
        counted(images, progress),
        extractor=extractor,
        lpips=load_perceptual(run.lpips, run.lpips_weights).to(device),
        batch_size=batch_size,
        min_samples=run.min_samples,
        facts={"tokenizer": tokenizer.identity, "lpips": f"lpips-{run.lpips}"},
    )
