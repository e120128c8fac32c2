"""What an evaluation and a search for guidance are asked to do."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from openpae.config import check_fields
from openpae.models.configs import PerceptualNet
from openpae.sampling.settings import SamplerConfig

ExtractorName = Literal["inception", "dinov2", "vgg16", "efficientnet-lite0", "random"]
"""inception gives the FID that is published, dinov2 FD-DINOv2; vgg16 (512 features) and efficientnet-lite0
(1,280) need no hub; random has fixed random weights, for trials."""


SIDE, SAMPLES = "[1, 16384]", "[2, 100000000]"
"""Pixels of a side, and images that are drawn: what lies beyond is a mistake."""

Candidate = tuple[float, float, float]
"""guidance, guidance_start, guidance_end."""

NO_GUIDANCE: Candidate = (1.0, 0.0, 1.0)
"""What every search is held against; it costs half as much."""


@dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """Which settings of guidance compete, and over how many samples."""

    scales: tuple[float, ...] = (1.5, 2.0, 2.5, 3.0, 4.0)
    """Strengths w; 1 is no guidance, and competes once."""
    starts: tuple[float, ...] = (0.0, 0.15, 0.3, 0.45)
    """Positions from which on to guide."""
    ends: tuple[float, ...] = (1.0,)
    """Positions up to which to guide."""
    samples: int = 1000
    """Of each candidate in the first round, in equal numbers of every class."""
    halving: int = 2
    """After each round one candidate in so many goes on, and is judged over so many times the samples."""
    seed: int = 0
    """Of the noise, which all candidates share. Report with another."""

    def __post_init__(self) -> None:
        check_fields(self, samples="[2, inf)", halving="[2, inf)")
        for name in ("scales", "starts", "ends"):
            if not getattr(self, name):
                raise ValueError(f"{name} must hold at least one value")

    def candidates(self, sampler: SamplerConfig) -> list[Candidate]:
        """All that compete, in order: without guidance there is no interval, so that competes once.

        Raises:
            ValueError: a value that a sampler refuses, or fewer than two candidates.
        """
        found: dict[Candidate, None] = {}
        for scale, start, end in itertools.product(self.scales, self.starts, self.ends):
            if start > end:
                continue
            candidate = NO_GUIDANCE if scale == 1 else (scale, start, end)
            with_guidance(sampler, candidate)
            found[candidate] = None
        if len(found) < 2:
            raise ValueError(
                f"a search needs at least 2 candidates, got {len(found)}: give more scales, starts or ends "
                "(a start beyond its end is none)"
            )
        return list(found)


def with_guidance(sampler: SamplerConfig, candidate: Candidate) -> SamplerConfig:
    """The sampler with a candidate's guidance.

    Raises:
        ValueError: values that it refuses.
    """
    scale, start, end = candidate
    return replace(sampler, guidance=scale, guidance_start=start, guidance_end=end)


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Settings of the metrics of generated images; the defaults are those of the field."""

    k: int = 3
    """Neighbours that span the manifolds of precision and recall."""
    kid_subsets: int = 100
    """Random subsets over which KID is averaged."""
    kid_subset_size: int = 1000
    """Samples per subset."""
    splits: int = 10
    """Splits over which the Inception Score is averaged."""
    seed: int = 2020
    """Of the subsets and splits; torch-fidelity's."""
    min_samples: int = 10_000
    """Fewer samples than this are measured with a warning: the Frechet distance is then much too large."""

    def __post_init__(self) -> None:
        one, two = ("k", "kid_subsets", "splits"), ("kid_subset_size", "min_samples")
        check_fields(self, **dict.fromkeys(one, "[1, inf)"), **dict.fromkeys(two, "[2, inf)"))


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
    """Samples: samples.npz of pae sample, or its folder; an npz of the ADM layout; a folder of images."""
    tokenizer: Path | None = None
    """Evaluate its reconstructions of the reference's images; with generator, it decodes the samples."""
    generator: Path | None = None
    """Generator whose samples are evaluated as they are drawn; needs tokenizer and sample_count."""
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
        check_fields(self, sample_count=SAMPLES, count="[1, inf)", size=SIDE, min_samples="[2, inf)")
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

    def judges(self) -> bool:
        """Whether something is measured, not only a reference made."""
        return self.samples is not None or self.tokenizer is not None

    def record_path(self) -> Path:
        """Where the record goes if nothing else is said: beside what is judged."""
        if self.samples is not None:
            return (self.samples if self.samples.is_dir() else self.samples.parent) / "evaluation.json"
        judged = self.generator or self.tokenizer
        assert judged is not None  # __post_init__ saw to it
        return judged / "evaluation.json"
