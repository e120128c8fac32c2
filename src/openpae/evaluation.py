"""`pae evaluate`: judge reconstructions, stored samples, or a generator's own, against a reference."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from openpae.checkpoint import check_pair, load_generator, load_tokenizer
from openpae.critics import PerceptualNet, load_perceptual
from openpae.data.images import height_width, open_images
from openpae.eval.extractors import ExtractorName, FeatureExtractor, load_extractor
from openpae.eval.records import evaluate_reconstruction, evaluate_samples
from openpae.eval.reference import Reference, open_reference, save_reference
from openpae.eval.streams import ImageStream, drawn_images, npz_stream, real_images, stored_images
from openpae.folders import identity_of
from openpae.processes import is_first
from openpae.sampling import SamplerConfig, balanced_labels


@dataclass(frozen=True, kw_only=True)
class EvaluationRun:
    """One evaluation: what is judged, and how."""

    samples: Path | None = None
    """Judge these: samples.npz of pae sample, or its folder; an npz of the ADM layout; a folder of images."""
    tokenizer: Path | None = None
    """Judge its reconstructions of the reference's images; with generator, it decodes the samples."""
    generator: Path | None = None
    """Judge what it makes, straight from the sampler; needs tokenizer and sample_count."""
    autoguidance: Path | None = None
    """A smaller or less trained generator of the same latents, which guides in place of the null class."""
    sample_count: int | None = None
    """How many samples to draw, in equal numbers of every class; published numbers take 50,000."""
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    """How they are drawn."""
    seed: int = 0
    """Of their noise: sample i depends on (seed, i) alone."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of the networks that draw them."""
    extractor: ExtractorName = "vgg16"
    """Features of the Frechet distance; distances of two extractors do not compare. inception is that of
    published FIDs."""
    extractor_weights: Path | None = None
    """inception: its weights file; dinov2: a local folder. By default both are downloaded."""
    lpips: PerceptualNet = "vgg"
    """Network of LPIPS, of reconstructions."""
    lpips_weights: str | None = None
    """Its weights, where the package registry can not be reached: a file or folder of the usual ones (the
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
    batch_size: int = 32
    """Images per forward pass and process; changes no number beyond rounding."""

    def __post_init__(self) -> None:
        for name, least in (
            ("sample_count", 2),
            ("count", 1),
            ("size", 1),
            ("min_samples", 2),
            ("batch_size", 1),
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
        if self.generator is None and self.autoguidance is not None:
            raise ValueError("autoguidance guides generator, which is missing")
        if self.count is not None and (self.tokenizer is None or self.generator is not None):
            raise ValueError(
                "count is the number of images to reconstruct; a reference of samples is taken whole"
            )
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


def run_evaluation(reference: Path, run: EvaluationRun, device: torch.device) -> dict[str, Any] | None:
    """Judge, and give the record; None where only a reference was to be made.

    Under torchrun every process must call it: each works on its share, and all get the record.

    Args:
        reference: real images (a folder, or packed images), an npz of the ADM layout (images, statistics or
            both), or a file of save_reference.
        run: what is judged, and how.
        device: where to compute.

    Raises:
        FileNotFoundError, ValueError: something that is not there, or that does not fit.
    """
    if not reference.exists():  # before any weights are fetched
        raise FileNotFoundError(
            f"no reference at {reference}; give a folder of real images, packed images, or an npz file"
        )
    extractor = load_extractor(run.extractor, run.extractor_weights, device)
    if run.tokenizer is not None and run.generator is None:
        return _reconstruction(reference, run, run.tokenizer, extractor, device)
    samples = _samples(run, device)
    known = _reference(reference, run, extractor, samples)
    if run.save_reference is not None and is_first():
        save_reference(known, run.save_reference)
    if samples is None:
        return None
    return evaluate_samples(
        samples, known, extractor=extractor, batch_size=run.batch_size, min_samples=run.min_samples
    )


def _samples(run: EvaluationRun, device: torch.device) -> ImageStream | None:
    if run.samples is not None:
        return stored_images(run.samples)
    if run.generator is None or run.tokenizer is None or run.sample_count is None:
        return None
    facts = check_pair(run.tokenizer, run.generator)
    tokenizer = load_tokenizer(run.tokenizer, decode_only=True).to(device)
    generator = load_generator(run.generator).to(device)
    weak = None
    if run.autoguidance is not None:
        facts |= {"autoguidance": check_pair(run.tokenizer, run.autoguidance)["generator"]}
        weak = load_generator(run.autoguidance).to(device)
    return drawn_images(
        tokenizer,
        generator,
        balanced_labels(run.sample_count, generator.config.num_classes),
        run.sampler,
        size=tokenizer.config.image_shape,
        seed=run.seed,
        precision=run.precision,
        weak=weak,
        facts={"labels": "class-balanced", **facts},
    )


def _reference(
    path: Path, run: EvaluationRun, extractor: FeatureExtractor, samples: ImageStream | None
) -> Reference:
    size = run.size if run.size is not None or samples is None else samples.size
    return open_reference(path, extractor, size=size, batch_size=run.batch_size)


def _reconstruction(
    reference: Path, run: EvaluationRun, folder: Path, extractor: FeatureExtractor, device: torch.device
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
        batch_size=run.batch_size,
        min_samples=run.min_samples,
        facts={"tokenizer": identity_of(folder).fingerprint, "lpips": f"lpips-{run.lpips}"},
    )
