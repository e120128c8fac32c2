"""`pae evaluate`: judge reconstructions, stored samples, or a generator's own, against a reference."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from openpae.data.images import height_width, open_images
from openpae.eval.evaluate import evaluate_reconstruction, evaluate_samples
from openpae.eval.extractors import ExtractorName, FeatureExtractor, load_extractor
from openpae.eval.image_stream import ImageStream, drawn_images, npz_stream, real_images, stored_images
from openpae.eval.reference import open_reference, save_reference
from openpae.models.lpips import PerceptualNet
from openpae.models.lpips_weights import load_perceptual
from openpae.models.saved import check_pair, load_generator, load_tokenizer
from openpae.runtime.processes import is_rank0
from openpae.sampling.sampler import SamplerConfig, balanced_labels
from openpae.storage.model_folder import identity_of


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How a generator draws the samples that are judged."""

    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    """Solver and guidance."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of the networks; the path itself is followed in float32."""
    autoguidance: Path | None = None
    """A smaller or less trained generator of the same latents, which guides in place of the null class."""
    compile: bool = False
    """Compile the generators."""


@dataclass(frozen=True, kw_only=True)
class EvaluationRun:
    """One evaluation: what is judged, and how."""

    samples: Path | None = None
    """Evaluate these: samples.npz of pae sample, or its folder; an npz of the ADM layout; a folder of images."""
    tokenizer: Path | None = None
    """Evaluate its reconstructions of the reference's images; with generator, it decodes the samples."""
    generator: Path | None = None
    """SampleEvaluator what it makes, straight from the sampler; needs tokenizer and sample_count."""
    sample_count: int | None = None
    """How many samples to draw, in equal numbers of every class; published numbers take 50,000."""
    seed: int = 0
    """Of their noise: sample i depends on (seed, i) alone."""
    extractor: ExtractorName = "vgg16"
    """Features of the Frechet distance; distances of two extractors do not compare. inception is that of
    published FIDs."""
    extractor_weights: Path | None = None
    """inception: its weights file; dinov2: a local folder. By default both are downloaded."""
    lpips: PerceptualNet = "vgg"
    """Network of LPIPS, of reconstructions."""
    lpips_weights: str | None = None
    """Its weights, where the package registry cannot be reached: a file or folder of the usual ones (the
    lpips package's, torchvision's), or a name of the hub."""
    count: int | None = None
    """Reference images to take for reconstructions, from the first on; all by default."""
    size: int | None = None
    """Side to which a folder of reference images is cropped; by default that of what is judged."""
    min_samples: int = 10_000
    """Fewer samples than this are measured with a warning."""
    save_reference: Path | None = None
    """Write the reference's features here (npz), so that the next evaluation need not compute them; with
    nothing to judge that is all that is done."""

    def __post_init__(self) -> None:
        for name, least in (
            ("sample_count", 2),
            ("count", 1),
            ("size", 1),
            ("min_samples", 2),
        ):
            if (value := getattr(self, name)) is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if self.samples is not None and (self.tokenizer is not None or self.generator is not None):
            raise ValueError("samples are judged as they are; leave tokenizer and generator out, or samples")
        if self.generator is not None and (self.tokenizer is None or self.sample_count is None):
            raise ValueError("generator needs tokenizer, which decodes its latents, and sample_count")
        if self.generator is None and self.sample_count is not None:
            raise ValueError(
                "sample_count is the number of samples that generator draws; generator is missing"
            )
        if self.count is not None and (self.tokenizer is None or self.generator is not None):
            raise ValueError(
                "count is the number of images to reconstruct; a reference of samples is taken whole"
            )
        if self.lpips_weights is not None and (self.tokenizer is None or self.generator is not None):
            raise ValueError("lpips_weights are for LPIPS, which compares reconstructions alone")
        if self.samples is None and self.tokenizer is None and self.save_reference is None:
            raise ValueError("nothing to judge: give samples, tokenizer, or tokenizer and generator")
        if self.save_reference is not None and self.tokenizer is not None and self.generator is None:
            raise ValueError(
                "save_reference keeps a reference of samples; leave it out for reconstructions, which are "
                "compared with their own originals"
            )

    def record_path(self) -> Path:
        """Where the record goes if nothing else is said: beside what is judged."""
        if self.samples is not None:
            return (self.samples if self.samples.is_dir() else self.samples.parent) / "evaluation.json"
        judged = self.generator or self.tokenizer
        assert judged is not None  # __post_init__ saw to it
        return judged / "evaluation.json"


def run_evaluation(
    reference: Path,
    run: EvaluationRun,
    device: torch.device,
    *,
    drawing: SamplingOptions | None = None,
    batch_size: int = 32,
) -> dict[str, Any] | None:
    """SampleEvaluator, and give the record; None where only a reference was to be made.

    Under torchrun every process must call it: each works on its share, and all get the record.

    Args:
        reference: real images (a folder, or packed images), an npz of the ADM layout (images, statistics or
            both), or a file of save_reference.
        run: what is judged, and how.
        device: where to compute.
        drawing: how the generator draws; None is the sampler's defaults. Only for a generator.
        batch_size: images per forward pass and process; changes no number beyond rounding.

    Raises:
        FileNotFoundError, ValueError: something that is not there, or that does not fit.
    """
    if not reference.exists():  # before any weights are fetched
        raise FileNotFoundError(
            f"no reference at {reference}; give a folder of real images, packed images, or an npz file"
        )
    if run.generator is None and drawing is not None:
        raise ValueError("how samples are drawn says something about generator, which is missing")
    extractor = load_extractor(run.extractor, run.extractor_weights, device)
    if run.tokenizer is not None and run.generator is None:
        return _reconstruction(reference, run, run.tokenizer, extractor, device, batch_size)
    samples = _samples(run, drawing or SamplingOptions(), device)
    size = run.size if run.size is not None or samples is None else samples.size
    known = open_reference(reference, extractor, size=size, batch_size=batch_size)
    if run.save_reference is not None and is_rank0():
        save_reference(known, run.save_reference)
    if samples is None:
        return None
    return evaluate_samples(
        samples, known, extractor=extractor, batch_size=batch_size, min_samples=run.min_samples
    )


def _samples(run: EvaluationRun, drawing: SamplingOptions, device: torch.device) -> ImageStream | None:
    if run.samples is not None:
        return stored_images(run.samples)
    if run.generator is None or run.tokenizer is None or run.sample_count is None:
        return None
    facts = check_pair(run.tokenizer, run.generator)
    tokenizer = load_tokenizer(run.tokenizer, decode_only=True).to(device)
    generator, weak = load_generator(run.generator).to(device), None
    if drawing.autoguidance is not None:
        facts |= {"autoguidance": check_pair(run.tokenizer, drawing.autoguidance)["generator"]}
        weak = load_generator(drawing.autoguidance).to(device)
    for model in (generator, weak) if drawing.compile else ():
        if model is not None:
            model.compile()
    return drawn_images(
        tokenizer,
        generator,
        balanced_labels(run.sample_count, generator.config.num_classes),
        drawing.sampler,
        size=tokenizer.config.image_shape,
        seed=run.seed,
        precision=drawing.precision,
        weak=weak,
        facts={"labels": "class-balanced", "compile": drawing.compile, **facts},
    )


def _reconstruction(
    reference: Path,
    run: EvaluationRun,
    folder: Path,
    extractor: FeatureExtractor,
    device: torch.device,
    batch_size: int,
) -> dict[str, Any]:
    tokenizer = load_tokenizer(folder).to(device)
    size = height_width(run.size or tokenizer.config.image_shape)
    if reference.is_dir():
        source = open_images(reference)
        rows = range(len(source) if run.count is None else min(run.count, len(source)))
        images = real_images(source, size, name=str(reference), rows=rows)
    else:
        images = npz_stream(reference, count=run.count)
        if images.size != size:
            raise ValueError(
                f"{reference} holds images of {images.size[0]} x {images.size[1]} (H x W), but {folder} "
                f"takes {size[0]} x {size[1]}; give the original images as a folder"
            )
    return evaluate_reconstruction(
        tokenizer,
        images,
        extractor=extractor,
        lpips=load_perceptual(run.lpips, run.lpips_weights).to(device),
        batch_size=batch_size,
        min_samples=run.min_samples,
        facts={"tokenizer": identity_of(folder).fingerprint, "lpips": f"lpips-{run.lpips}"},
    )
