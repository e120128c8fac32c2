"""Configs of a study: rows of changes to three presets, seeds, and the paper's claims about the rows."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from openpae import config as configs
from openpae.config import added, check_fields
from openpae.eval.settings import ExtractorName
from openpae.geometry.settings import MeasureConfig
from openpae.models.configs import PerceptualNet
from openpae.sampling.settings import SamplerConfig
from openpae.train.settings import GeneratorRun, RefinerRun, TokenizerRun

T = TypeVar("T")

MetricName = Literal[
    "ssc", "lpc", "gsq", "erank", "viv", "sec", "lnc", "srss", "psnr", "ssim", "lpips", "rfid", "ifid",
    "gfid", "gfid_own", "kid", "mind", "precision", "recall",
]  # fmt: skip
"""rfid, ifid and gfid are Frechet distances to real images: of reconstructions, of decoded mixtures of
neighbours, and of samples. gfid_own is the distance of samples to the tokenizer's reconstructions. All are in
the features of the study's extractor; they are FIDs if that is Inception. gfid includes the error of the
decoder. gfid_own does not, but it favours a tokenizer whose images are alike."""

_OWN = frozenset((
    "data.images", "prior", "latents", "held_out_latents", "evaluation_images", "tokenizer", "loop.seed",
    "loop.device",
))  # fmt: skip
"""Fields of runs that a study sets."""

HIGHER_IS_BETTER: frozenset[str] = frozenset(
    {"ssc", "gsq", "erank", "lnc", "srss", "psnr", "ssim", "precision", "recall"}
)
"""For the other metrics, lower is better."""


@dataclass(frozen=True, kw_only=True)
class MeasureSettings:
    """Settings of the measurements of each tokenizer, on held-out images."""

    metrics: MeasureConfig = field(default_factory=MeasureConfig)
    """Counts and settings of the metrics."""
    lpips: PerceptualNet = "vgg"
    """Network of LPC and LPIPS."""
    extractor: ExtractorName = "vgg16"
    """Features of rfid and ifid."""
    extractor_weights: Path | None = None
    """Weights file of inception, or local folder of dinov2."""
    label_count: int = 200
    """Number of images with label maps for SSC, evenly spread."""
    ignore: int | None = None
    """Label to ignore, such as the label of unlabelled pixels."""

    def __post_init__(self) -> None:
        check_fields(self, "measure.", label_count="[1, inf)")


@dataclass(frozen=True, kw_only=True)
class JudgeSettings:
    """Settings of the evaluation of samples, against training images or the given reference.

    The YAML key is `judge`. Stage ids contain the class name, so it stays.
    """

    samples: int = 50_000
    """Number of class-balanced samples. Every generator gets the same noise."""
    curve: bool = False
    """Evaluate every checkpoint that the loop keeps (`loop.keep_every`), for a curve over steps. By default
    only the last checkpoint is evaluated."""
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    """Sampler of the samples."""
    extractor: ExtractorName = "vgg16"
    """Features of gfid, kid, precision and recall."""
    extractor_weights: Path | None = None
    """Weights file of inception, or local folder of dinov2."""
    reference_images: int | None = None
    """Number of images in the reference, evenly spread; null takes all."""
    own_images: int = 0
    """Number of training images, evenly spread, whose reconstructions are the reference of gfid_own. 0 leaves
    gfid_own out."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Precision of the networks."""
    batch_size: int = 64
    """Samples per batch; changes results only by rounding."""
    seed: int = 0
    """Seed of the noise."""

    def __post_init__(self) -> None:
        two = dict.fromkeys(("samples", "reference_images"), "[2, inf)")
        check_fields(self, "judge.", batch_size="[1, inf)", own_images="[0, inf)", **two)
        if self.own_images == 1:
            raise ValueError(f"judge.own_images must be >= 2, or 0 for none, got {self.own_images}")


@dataclass(frozen=True, kw_only=True)
class StudyData:
    """Paths of the images of a study."""

    images: Path
    """Training images: one subfolder per class."""
    held_out: Path
    """Other images of the same classes, for measuring tokenizers."""
    label_images: Path | None = None
    """Images with label maps, for SSC; None leaves SSC out."""
    label_maps: Path | None = None
    """Their label maps: index PNGs or a COCO panoptic JSON."""
    reference: Path | None = None
    """Images, or an npz in ADM's layout, to compare samples with; None takes the training images."""

    def __post_init__(self) -> None:
        if (self.label_images is None) != (self.label_maps is None):
            raise ValueError("label_images and label_maps are needed both, or neither")


@dataclass(frozen=True, kw_only=True)
class StudySetup:
    """Presets and settings that all rows of a study share."""

    refiner: str
    """Preset or file of the refiner."""
    tokenizer: str
    """Preset or file of the tokenizer."""
    generator: str
    """Preset or file of the generator."""
    data: StudyData | None = None
    """Default images; the command can name others."""
    pack: bool = True
    """Decode and centre-crop all images once. Random crops need false."""
    every: int = 1
    """Take every n-th training image; above 1 it needs `pack`."""
    raw_count: int = 2000
    """Number of training images for fitting raw targets (PCA)."""
    flips: bool = True
    """Also cache the latents of mirror images."""
    measure: MeasureSettings = field(default_factory=MeasureSettings)
    """Measurement of tokenizers."""
    judge: JudgeSettings = field(default_factory=JudgeSettings)
    """Evaluation of samples."""

    def __post_init__(self) -> None:
        check_fields(self, every="[1, inf)", raw_count="[1, inf)")
        if self.every > 1 and not self.pack:
            raise ValueError(f"every = {self.every} needs pack: true")


@dataclass(frozen=True, kw_only=True)
class Reported:
    """Results of a row in the paper (ImageNet 256); null where it gives none."""

    ssc: float | None = None
    """SSC."""
    lpc: float | None = None
    """LPC."""
    gsq: float | None = None
    """GSQ."""
    rfid: float | None = None
    """rFID."""
    gfid: float | None = None
    """gFID."""

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True, kw_only=True)
class StudyRow:
    """One setting, trained once per seed."""

    name: str
    """Name in tables."""
    set: tuple[str, ...] = ()
    """Changes to the presets: STAGE.FIELD=VALUE with STAGE refiner, tokenizer, generator, measure or `judge`,
    such as tokenizer.loss.ssr=0.0; the value as YAML."""
    targets: Literal["refined", "pca", "random"] = "refined"
    """Targets of SSR and SCR: from a trained refiner, or raw (Table 2b)."""
    tokenizer_from: str | None = None
    """A tokenizer that is not trained here, named as in `pae profile`: diffusers:OWNER/NAME or a folder."""
    generate: bool = True
    """Train a generator and evaluate its samples; false only measures the tokenizer."""
    x: float | None = None
    """Position on the axis of a sweep."""
    paper: Reported = field(default_factory=Reported)
    """The paper's results."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.tokenizer_from and any(item.startswith(("tokenizer.", "refiner.")) for item in self.set):
            raise ValueError(
                f"row {self.name!r} takes its tokenizer from {self.tokenizer_from}, so changes to the "
                "presets of tokenizer and refiner would have no effect; remove them"
            )


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A claim of the paper about two rows."""

    text: str
    """The claim in words."""
    metric: MetricName
    """Metric that is better in one row."""
    better: str
    """Name of a row."""
    worse: str
    """Name of another row."""


@dataclass(frozen=True, kw_only=True)
class Study:
    """A grid of runs, every row with every seed, and the paper's claims."""

    name: str
    """Name in tables and of the results folder: letters, digits, - and _."""
    title: str
    """Title of its section in the report."""
    text: str = ""
    """Text below the title: what the paper did, and the differences here."""
    setup: str
    """Preset or file of the `StudySetup`."""
    set: tuple[str, ...] = ()
    """Changes to all rows, before their own."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of initial weights, data order, augmentation and noise of tokenizer and generator. All seeds
    share refiner and raw targets."""
    paired: bool = added(False)
    """Compare all rows seed by seed: those of a seed share the order of the data, and noise and labels of the
    samples. By default only rows with the same models are compared so."""
    rows: tuple[StudyRow, ...]
    """The settings to compare."""
    claims: tuple[Claim, ...] = ()
    """Claims to test."""
    faster: str | None = None
    """Row that is claimed to reach the final quality of the others in fewer steps; needs `judge.curve`."""
    until: tuple[float, ...] = added(())
    """Levels of gFD: a table says after how many epochs of the generator each row reaches them; needs
    `judge.curve`."""
    x_label: str = ""
    """Label of the axis of a sweep."""
    radar: tuple[MetricName, ...] = ()
    """Axes of a radar plot of the rows; empty draws no plot."""

    def __post_init__(self) -> None:
        check_fields(self)
        if not re.fullmatch(r"[\w-]+", self.name) or self.name == "stages":
            raise ValueError(f"name must be letters, digits, - and _, and not 'stages', got {self.name!r}")
        if not self.rows or not self.seeds:
            raise ValueError("a study needs at least one row and one seed")
        for label, values in (("rows", [row.name for row in self.rows]), ("seeds", self.seeds)):
            if twice := [value for value, times in Counter(values).items() if times > 1]:
                raise ValueError(f"{label} must differ, got {twice[0]!r} more than once")
        names = {row.name for row in self.rows}
        named = [name for claim in self.claims for name in (claim.better, claim.worse)]
        for name in [*named, *([self.faster] if self.faster else [])]:
            if name not in names:
                raise ValueError(f"no row {name!r}, which a claim names; rows: {', '.join(names)}")


@dataclass(frozen=True, kw_only=True)
class Resolved:
    """The configs of one row, with all changes applied."""

    refiner: RefinerRun
    tokenizer: TokenizerRun
    generator: GeneratorRun
    measure: MeasureSettings
    judge: JudgeSettings


def _short(change: str) -> str:
    return repr(change if len(change) <= 80 else f"{change[:80]}...")


def resolve(setup: StudySetup, changes: Sequence[str]) -> Resolved:
    """Apply changes to the presets of a setup; a later change overrides an earlier one.

    Raises:
        ValueError, TypeError: a change is not STAGE.FIELD=VALUE, or names an unknown field or a wrong value.
    """
    parts: dict[str, Any] = {
        "refiner": configs.load(RefinerRun, setup.refiner),
        # A placeholder: the plan sets the prior of each row.
        "tokenizer": replace(configs.load(TokenizerRun, setup.tokenizer), prior=Path("targets")),
        "generator": configs.load(GeneratorRun, setup.generator),
        "measure": setup.measure,
        "judge": setup.judge,
    }
    wanted: dict[str, dict[str, Any]] = {name: {} for name in parts}
    for change in changes:
        field_name, equals, text = change.partition("=")
        stage, dot, name = field_name.strip().partition(".")
        if not (equals and dot and stage in parts):
            raise ValueError(
                f"a change must be STAGE.FIELD=VALUE with STAGE one of {', '.join(parts)}, got "
                f"{_short(change)}"
            )
        if name in _OWN:
            raise ValueError(f"{_short(change)} cannot be changed: a study sets {name} itself")
        try:
            wanted[stage][name] = yaml.safe_load(text)
        except (yaml.YAMLError, RecursionError, ValueError) as error:  # too deep, or a wrong date or number
            raise ValueError(
                f"the value of {_short(change)} is not YAML: {' '.join(str(error).split())}"
            ) from None
    return Resolved(**{name: configs.changed(part, wanted[name], at=name) for name, part in parts.items()})


def reported(row: StudyRow) -> dict[str, float]:
    """Return the results of a row that the paper gives."""
    values = {part.name: getattr(row.paper, part.name) for part in fields(row.paper)}
    return {name: value for name, value in values.items() if value is not None}
