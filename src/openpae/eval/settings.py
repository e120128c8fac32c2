"""Settings of evaluations and of the search for guidance."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from openpae.config import check_fields
from openpae.interop.kinds import home_of
from openpae.models.configs import PerceptualNet
from openpae.sampling.settings import SamplerConfig

ExtractorName = Literal["inception", "dinov2", "vgg16", "efficientnet-lite0", "random"]
"""inception gives published FID, dinov2 FD-DINOv2; vgg16 (512 features) and efficientnet-lite0 (1,280) need
no hub; random has fixed random weights, for trials."""

SIDE, SAMPLES = "[1, 16384]", "[2, 100000000]"
"""Allowed pixels of a side, and numbers of samples. Larger values are mistakes."""

Candidate = tuple[float, float, float]
"""guidance, guidance_start, guidance_end."""

NO_GUIDANCE: Candidate = (1.0, 0.0, 1.0)
"""What every search is held against; it costs half as much."""


@dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """Candidates of the search, and how many samples each gets."""

    scales: tuple[float, ...] = (1.5, 2.0, 2.5, 3.0, 4.0)
    """Guidance scales w; 1 is no guidance, and gives one candidate."""
    starts: tuple[float, ...] = (0.0, 0.15, 0.3, 0.45)
    """Start positions of the guidance interval."""
    ends: tuple[float, ...] = (1.0,)
    """End positions of the guidance interval."""
    samples: int = 1000
    """Samples per candidate in the first round, class-balanced."""
    halving: int = 2
    """Each round keeps 1/halving of the candidates and multiplies their samples by halving."""
    seed: int = 0
    """Seed of the noise, the same for all candidates. Report results with another seed."""

    def __post_init__(self) -> None:
        check_fields(self, samples=SAMPLES, halving="[2, inf)")
        for name in ("scales", "starts", "ends"):
            if not getattr(self, name):
                raise ValueError(f"{name} must hold at least one value")

    def candidates(self, sampler: SamplerConfig) -> list[Candidate]:
        """All combinations in order. No guidance has no interval, so it is one candidate.

        Raises:
            ValueError: the sampler refuses a value, or there are fewer than two candidates.
        """
        candidates: dict[Candidate, None] = {}
        for scale, start, end in itertools.product(self.scales, self.starts, self.ends):
            if start > end:
                continue
            candidate = NO_GUIDANCE if scale == 1 else (scale, start, end)
            with_guidance(sampler, candidate)
            candidates[candidate] = None
        if len(candidates) < 2:
            raise ValueError(
                f"a search needs at least 2 candidates, got {len(candidates)}: give more scales, starts or "
                "ends (a start beyond its end is left out)"
            )
        return list(candidates)


def with_guidance(sampler: SamplerConfig, candidate: Candidate) -> SamplerConfig:
    """The sampler with a candidate's guidance.

    Raises:
        ValueError: the sampler refuses a value.
    """
    scale, start, end = candidate
    return replace(sampler, guidance=scale, guidance_start=start, guidance_end=end)


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Settings of the metrics of generated images. The defaults are the usual ones."""

    k: int = 3
    """The k-th neighbour gives the radius of precision and recall."""
    kid_subsets: int = 100
    """Random subsets over which KID is averaged."""
    kid_subset_size: int = 1000
    """Samples per subset."""
    splits: int = 10
    """Splits over which the Inception Score is averaged."""
    seed: int = 2020
    """Seed of the subsets and splits, that of torch-fidelity."""
    min_samples: int = 10_000
    """Fewer samples give a warning: the Frechet distance is then much too large."""

    def __post_init__(self) -> None:
        one, two = ("k", "kid_subsets", "splits"), ("kid_subset_size", "min_samples")
        check_fields(self, **dict.fromkeys(one, "[1, inf)"), **dict.fromkeys(two, "[2, inf)"))


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How to sample from the generator that is evaluated."""

    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    """Solver and guidance."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Precision of the networks; the solver works in float32."""
    autoguidance: Path | None = None
    """A smaller or less trained generator of the same latents; it guides in place of the null class."""
    compile: bool = False
    """Compile the generators."""


@dataclass(frozen=True, kw_only=True)
class EvaluationRun:
    """One evaluation: of samples, of a tokenizer, or of a generator with its tokenizer."""

    samples: Path | None = None
    """Samples: samples.npz of pae sample, or its folder; an npz of the ADM layout; a folder of images."""
    tokenizer: Path | None = None
    """Evaluate its reconstructions of the reference images; with generator, it decodes the samples. A folder,
    diffusers:FOLDER or python:FILE."""
    generator: Path | None = None
    """Evaluate samples of this generator; needs tokenizer and sample_count."""
    sample_count: int | None = None
    """Number of samples, class-balanced; published numbers take 50,000."""
    seed: int = 0
    """Seed of the noise: sample i depends on (seed, i) alone."""
    extractor: ExtractorName = "vgg16"
    """Features of the Frechet distance; distances of two extractors do not compare. inception is that of
    published FIDs."""
    extractor_weights: Path | None = None
    """inception: its weights file; dinov2: a local folder. By default both are downloaded."""
    lpips: PerceptualNet = "vgg"
    """Network of LPIPS, for reconstructions."""
    lpips_weights: str | None = None
    """Weights of LPIPS, if the package registry cannot be reached: a file or folder (of the lpips package, or
    torchvision), or a name of the hub."""
    count: int | None = None
    """Reconstruct the first `count` reference images; all by default."""
    size: int | None = None
    """Side to which a folder of reference images is cropped; by default that of the evaluated images."""
    min_samples: int = 10_000
    """Fewer samples give a warning."""
    save_reference: Path | None = None
    """Write the reference's features here (npz) for later evaluations; samples and tokenizer may then be
    missing."""

    def __post_init__(self) -> None:
        check_fields(self, sample_count=SAMPLES, count="[1, inf)", size=SIDE, min_samples="[2, inf)")
        if self.samples is not None and (self.tokenizer is not None or self.generator is not None):
            raise ValueError(
                "samples need no tokenizer and no generator; leave these out, or leave samples out"
            )
        if self.generator is not None and (self.tokenizer is None or self.sample_count is None):
            raise ValueError("generator needs tokenizer, which decodes its latents, and sample_count")
        if self.generator is None and self.sample_count is not None:
            raise ValueError("sample_count is the number of samples of generator; generator is missing")
        reconstructs = self.tokenizer is not None and self.generator is None
        if self.count is not None and not reconstructs:
            raise ValueError("count is the number of images to reconstruct; samples need the full reference")
        if self.lpips_weights is not None and not reconstructs:
            raise ValueError("lpips_weights are for LPIPS, which compares reconstructions alone")
        if self.samples is None and self.tokenizer is None and self.save_reference is None:
            raise ValueError("nothing to evaluate: give samples, tokenizer, or tokenizer and generator")
        if self.save_reference is not None and reconstructs:
            raise ValueError(
                "save_reference keeps a reference of samples; leave it out for reconstructions, which are "
                "compared with their own originals"
            )

    def evaluates(self) -> bool:
        """Whether something is evaluated; False if only a reference is made."""
        return self.samples is not None or self.tokenizer is not None

    def record_path(self) -> Path:
        """Default path of the record: beside what is evaluated.

        Raises:
            ValueError: an unknown kind of tokenizer, or one that has no folder.
        """
        if self.samples is not None:
            return (self.samples if self.samples.is_dir() else self.samples.parent) / "evaluation.json"
        if self.generator is not None:
            return self.generator / "evaluation.json"
        assert self.tokenizer is not None  # __post_init__ checks it
        home = home_of(self.tokenizer)
        if home is None or (home != self.tokenizer and not home.exists()):
            raise ValueError(f"{self.tokenizer} has no folder here for the record; name a file with --out")
        return (home.parent if home.is_file() else home) / "evaluation.json"
