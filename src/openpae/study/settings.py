"""What a study is: rows of changes to three presets, seeds, and the paper's claims about the rows."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from openpae import config as configs
from openpae.config import check_fields
from openpae.eval.settings import ExtractorName
from openpae.geometry.settings import MeasureConfig
from openpae.models.configs import PerceptualNet
from openpae.sampling.settings import SamplerConfig
from openpae.train.settings import GeneratorRun, RefinerRun, TokenizerRun

T = TypeVar("T")

MetricName = Literal[
    "ssc",
    "lpc",
    "gsq",
    "erank",
    "psnr",
    "ssim",
    "lpips",
    "rfid",
    "ifid",
    "gfid",
    "gfid_own",
    "kid",
    "precision",
    "recall",
]
"""rfid, ifid and gfid are Frechet distances of reconstructions, of decoded mixtures of neighbours, and of
samples to real images, gfid_own of samples to the tokenizer's own reconstructions of them, in the features of
the study's extractor; they are FIDs where that is Inception. A tokenizer that reconstructs badly spoils gfid
for any generator; gfid_own leaves that error out, but grows with the spread of the reconstructions: it
favours a tokenizer whose images are all alike."""

_OWN = frozenset(
    {"data.images", "prior", "latents", "held_out_latents", "evaluation_images", "tokenizer"}
) | {
    "loop.seed",
    "loop.device",
}
"""Fields of runs that a study fills in."""

HIGHER_IS_BETTER: frozenset[str] = frozenset({"ssc", "gsq", "erank", "psnr", "ssim", "precision", "recall"})
"""Of the others, the lower value is the better one."""


@dataclass(frozen=True, kw_only=True)
class MeasureSettings:
    """How the latent space of every tokenizer is measured, on held-out images."""

    metrics: MeasureConfig = field(default_factory=MeasureConfig)
    """Counts and settings of the metrics."""
    lpips: PerceptualNet = "vgg"
    """Network of LPC and LPIPS."""
    extractor: ExtractorName = "vgg16"
    """Features of rfid and ifid."""
    extractor_weights: Path | None = None
    """inception: its weights file; dinov2: a local folder in place of the hub's."""
    label_count: int = 200
    """Images with label maps to take for SSC, evenly spread."""
    ignore: int | None = None
    """Label that does not count, such as that of unlabelled pixels."""

    def __post_init__(self) -> None:
        check_fields(self, "measure.", label_count="[1, inf)")


@dataclass(frozen=True, kw_only=True)
class JudgeSettings:
    """How the samples of every generator are evaluated, against training images or the given reference."""

    samples: int = 50_000
    """Class-balanced samples, with the same noise for every generator."""
    curve: bool = False
    """Evaluate every checkpoint that the generator's loop keeps for good (`loop.keep_every`), for the curve
    over steps. Otherwise only the last one is evaluated."""
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    """How they are drawn."""
    extractor: ExtractorName = "vgg16"
    """Features of gfid, kid, precision and recall."""
    extractor_weights: Path | None = None
    """inception: its weights file; dinov2: a local folder in place of the hub's."""
    reference_images: int | None = None
    """Images to compare with, evenly spread; null takes all."""
    own_images: int = 0
    """Training images, evenly spread, whose reconstructions the samples are also compared with: gfid_own. 0
    leaves it out."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Precision of the networks."""
    batch_size: int = 64
    """Samples at once; changes no number beyond rounding."""
    seed: int = 0
    """Seed of the noise."""

    def __post_init__(self) -> None:
        two = dict.fromkeys(("samples", "reference_images"), "[2, inf)")
        check_fields(self, "judge.", batch_size="[1, inf)", own_images="[0, inf)", **two)
        if self.own_images == 1:
            raise ValueError(f"judge.own_images must be >= 2, or 0 for none, got {self.own_images}")


@dataclass(frozen=True, kw_only=True)
class StudyData:
    """Where the images of a study are."""

    images: Path
    """Training images: one subfolder per class."""
    held_out: Path
    """Other images of the same classes: tokenizers are measured on them."""
    label_images: Path | None = None
    """Images with label maps, for SSC; None leaves it out."""
    label_maps: Path | None = None
    """Their maps: index PNGs or a COCO panoptic JSON."""
    reference: Path | None = None
    """What samples are compared with: an npz in ADM's layout, or images; None takes the training images."""

    def __post_init__(self) -> None:
        if (self.label_images is None) != (self.label_maps is None):
            raise ValueError("label_images and label_maps are needed both, or neither")


@dataclass(frozen=True, kw_only=True)
class StudySetup:
    """What all rows of a study share: a size."""

    refiner: str
    """Preset or file of the refiner."""
    tokenizer: str
    """Preset or file of the tokenizer."""
    generator: str
    """Preset or file of the generator."""
    data: StudyData | None = None
    """The images that it is meant for; the command can name others."""
    pack: bool = True
    """Decode and centre-crop all images once. Random crops need the originals: false then."""
    every: int = 1
    """Take every n-th training image; above 1 it needs `pack`."""
    raw_count: int = 2000
    """Training images to which raw targets (PCA) are fitted."""
    flips: bool = True
    """Keep the latents of mirror images too."""
    measure: MeasureSettings = field(default_factory=MeasureSettings)
    """How tokenizers are measured."""
    judge: JudgeSettings = field(default_factory=JudgeSettings)
    """How samples are evaluated."""

    def __post_init__(self) -> None:
        check_fields(self, every="[1, inf)", raw_count="[1, inf)")
        if self.every > 1 and not self.pack:
            raise ValueError(f"every = {self.every} needs pack: true")


@dataclass(frozen=True, kw_only=True)
class Reported:
    """The paper's numbers of a row (ImageNet 256); null where it gives none."""

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


@dataclass(frozen=True, kw_only=True)
class StudyRow:
    """One setting, trained once per seed."""

    name: str
    """Name in tables."""
    set: tuple[str, ...] = ()
    """Changes to the presets: STAGE.FIELD=VALUE with STAGE refiner, tokenizer, generator, measure or `judge`,
    such as tokenizer.loss.ssr=0.0; the value as YAML."""
    targets: Literal["refined", "pca", "random"] = "refined"
    """Targets of SSR and SCR: a trained refiner's, or raw ones (Table 2b)."""
    tokenizer_from: str | None = None
    """A tokenizer that is not trained here, as `pae profile` names one: diffusers:OWNER/NAME, a folder."""
    generate: bool = True
    """Train a generator and evaluate its samples; otherwise the tokenizer is only measured."""
    x: float | None = None
    """Place on the axis of a sweep."""
    paper: Reported = field(default_factory=Reported)
    """The paper's numbers."""

    def __post_init__(self) -> None:
        if self.tokenizer_from and any(item.startswith(("tokenizer.", "refiner.")) for item in self.set):
            raise ValueError(
                f"row {self.name!r} takes its tokenizer from {self.tokenizer_from}, so changes to the "
                "presets of tokenizer and refiner would have no effect; remove them"
            )


@dataclass(frozen=True, kw_only=True)
class Claim:
    """What the paper says of two rows."""

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
    """A grid of runs: every row with every seed, and what the paper says of them."""

    name: str
    """Name of its folder of results, and in tables: letters, digits, - and _."""
    title: str
    """Title of its section in the report."""
    text: str = ""
    """A few sentences below the title: what the paper did, and what is different here."""
    setup: str
    """Preset or file of the `StudySetup`."""
    set: tuple[str, ...] = ()
    """Changes to all rows, before their own."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of initial weights, data order, augmentation and noise of tokenizer and generator. Refiner and
    raw targets are made once for all of them."""
    rows: tuple[StudyRow, ...]
    """The settings that are compared."""
    claims: tuple[Claim, ...] = ()
    """Each gets a verdict."""
    faster: str | None = None
    """Row that is said to reach the others' final quality in fewer steps; needs `judge.curve`."""
    x_label: str = ""
    """Label of the axis of a sweep."""
    radar: tuple[MetricName, ...] = ()
    """Axes of a radar plot of the rows; none draws none."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[\w-]+", self.name) or self.name == "stages":
            raise ValueError(f"name must be letters, digits, - and _, and not 'stages', got {self.name!r}")
        if not self.rows or not self.seeds:
            raise ValueError("a study needs at least one row and one seed")
        for what, values in (("rows", [row.name for row in self.rows]), ("seeds", self.seeds)):
            if twice := [value for value, times in Counter(values).items() if times > 1]:
                raise ValueError(f"{what} must differ, got {twice[0]!r} more than once")
        names = {row.name for row in self.rows}
        named = [name for claim in self.claims for name in (claim.better, claim.worse)]
        for name in [*named, *([self.faster] if self.faster else [])]:
            if name not in names:
                raise ValueError(f"no row {name!r}, which a claim names; rows: {', '.join(names)}")


@dataclass(frozen=True, kw_only=True)
class Resolved:
    """The configs of one row: presets with all changes applied."""

    refiner: RefinerRun
    tokenizer: TokenizerRun
    generator: GeneratorRun
    measure: MeasureSettings
    judge: JudgeSettings


def _short(change: str) -> str:
    return repr(change if len(change) <= 80 else f"{change[:80]}...")


def resolve(setup: StudySetup, changes: Sequence[str]) -> Resolved:
    """The presets of a setup with changes applied, the later ones over the earlier.

    Raises:
        ValueError, TypeError: a change that is no STAGE.FIELD=VALUE, an unknown field, a wrong value.
    """
    parts: dict[str, Any] = {
        "refiner": configs.load(RefinerRun, setup.refiner),
        # The plan puts each row's own targets there, or none.
        "tokenizer": replace(configs.load(TokenizerRun, setup.tokenizer), prior=Path("targets")),
        "generator": configs.load(GeneratorRun, setup.generator),
        "measure": setup.measure,
        "judge": setup.judge,
    }
    wanted: dict[str, dict[str, Any]] = {name: {} for name in parts}
    for change in changes:
        where, equals, text = change.partition("=")
        stage, dot, name = where.strip().partition(".")
        if not (equals and dot and stage in parts):
            raise ValueError(
                f"a change must be STAGE.FIELD=VALUE with STAGE one of {', '.join(parts)}, got "
                f"{_short(change)}"
            )
        if name in _OWN:
            raise ValueError(f"{_short(change)} cannot be changed: a study sets {name} itself")
        try:
            wanted[stage][name] = yaml.safe_load(text)
        except (yaml.YAMLError, RecursionError, ValueError) as error:  # depth, a wrong date or number
            raise ValueError(
                f"the value of {_short(change)} is not YAML: {' '.join(str(error).split())}"
            ) from None
    return Resolved(**{name: configs.changed(part, wanted[name], at=name) for name, part in parts.items()})


def reported(row: StudyRow) -> dict[str, float]:
    """The paper's numbers of a row that it gives."""
    values = {part.name: getattr(row.paper, part.name) for part in fields(row.paper)}
    return {name: value for name, value in values.items() if value is not None}
