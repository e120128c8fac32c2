"""Settings of measurements of latent spaces."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from openpae.config import check_fields
from openpae.eval.settings import SIDE, ExtractorName
from openpae.models.configs import PerceptualNet


@dataclass(frozen=True, kw_only=True)
class MeasureConfig:
    """Settings of a measurement. The record repeats them."""

    count: int = 5000
    """Images for GSQ, eRank, VIV, SEC, LNC, iFD and reconstruction, evenly spread over the source."""
    lpc_count: int = 200
    """Images for LPC, a part of these; each costs nine decodes."""
    directions: int = 1
    """Directions per image of LPC."""
    sigma: float = 0.1
    """Temperature of the affinity of SSC."""
    classes: int = 100
    """Classes per repeat of GSQ."""
    repeats: int = 5
    """Repeats of GSQ."""
    batch_size: int = 32
    """Images per forward pass. It changes rounding only."""
    seed: int = 0
    """Seed of directions, classes and clusters."""

    def __post_init__(self) -> None:
        others = dict.fromkeys(("lpc_count", "classes", "batch_size"), "[1, 100000000]")
        others |= dict.fromkeys(("directions", "repeats"), "[1, 10000]")
        check_fields(self, count="[2, inf)", sigma="[0.01, inf)", seed="[0, inf)", **others)


@dataclass(frozen=True, kw_only=True)
class ProfileRun:
    """One comparison of latent spaces."""

    images: Path
    """Folder of images, best with one subfolder per class (GSQ needs it), or packed images."""
    out: Path
    """Folder for profile.json and profile.html."""
    label_maps: Path | None = None
    """For SSC: a folder of index PNGs named as their images, or a COCO panoptic JSON."""
    label_images: Path | None = None
    """The images of the label maps, if they differ from images."""
    label_count: int = 500
    """Number of images with label maps, evenly spread."""
    ignore: int | None = None
    """Label that does not count, such as that of unlabelled pixels."""
    scenes: int = 0
    """For SSC without label maps: number of emoji scenes to render, with exact label maps."""
    size: int | None = None
    """Side in pixels of all images; by default the image size of the first tokenizer."""
    lpips: PerceptualNet = "vgg"
    """Network of LPIPS."""
    lpips_weights: str | None = None
    """Weights of LPIPS, if the package registry cannot be reached: a file or folder (of the lpips package, or
    torchvision), or a name of the hub."""
    extractor: ExtractorName | Literal["none"] = "vgg16"
    """Features of the Frechet distances; none leaves them out. inception is that of published FIDs."""
    extractor_weights: Path | None = None
    """inception: its weights file; dinov2: a local folder. By default both are downloaded."""
    measure: MeasureConfig = field(default_factory=MeasureConfig)
    """Settings of the metrics."""

    def __post_init__(self) -> None:
        if self.scenes and self.label_maps is not None:
            raise ValueError(
                "scenes are rendered with their own label maps; give either label_maps or scenes"
            )
        if self.label_maps is None and (self.label_images is not None or self.ignore is not None):
            raise ValueError("label_images and ignore belong to label_maps, which is missing; give it")
        check_fields(self, label_count="[1, inf)", scenes="[0, 1000000]", size=SIDE)
        if self.extractor == "none" and self.extractor_weights is not None:
            raise ValueError("extractor none takes no extractor_weights; leave them out or name an extractor")
