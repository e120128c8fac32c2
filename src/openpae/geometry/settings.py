"""What a measurement of latent spaces is asked to do."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from openpae.config import check_fields
from openpae.eval.settings import SIDE, ExtractorName
from openpae.models.configs import PerceptualNet


@dataclass(frozen=True, kw_only=True)
class MeasureConfig:
    """Settings of a measurement; all of them go into the record."""

    count: int = 5000
    """Images for GSQ, eRank and reconstruction, evenly spread over the source."""
    lpc_count: int = 200
    """Of these, images for LPC: each costs nine decodings."""
    directions: int = 1
    """Directions per image of LPC."""
    sigma: float = 0.1
    """Temperature of the affinity of SSC."""
    classes: int = 100
    """Classes per repeat of GSQ."""
    repeats: int = 5
    """Repeats of GSQ."""
    batch_size: int = 32
    """Images per forward pass; changes no number beyond rounding."""
    seed: int = 0
    """Seed of directions, classes and clusters."""

    def __post_init__(self) -> None:
        others = dict.fromkeys(("lpc_count", "directions", "classes", "repeats", "batch_size"), "[1, inf)")
        check_fields(self, count="[2, inf)", sigma="[0.01, inf)", seed="[0, inf)", **others)


@dataclass(frozen=True, kw_only=True)
class ProfileRun:
    """One comparison of latent spaces: over what, and how."""

    images: Path
    """Folder of images, best with one subfolder per class (GSQ needs it), or packed images."""
    out: Path
    """Folder for profile.json and profile.html."""
    label_maps: Path | None = None
    """For SSC: a folder of index PNGs named as their images, or a COCO panoptic JSON."""
    label_images: Path | None = None
    """The images of the label maps, if they are others than images."""
    label_count: int = 500
    """Images with label maps to take, evenly spread."""
    ignore: int | None = None
    """Label that does not count, such as that of unlabelled pixels."""
    scenes: int = 0
    """For SSC without label maps: render so many emoji scenes, whose label maps are exact."""
    size: int | None = None
    """Side in pixels of all images, squares; by default the size of the first tokenizer's own."""
    lpips: PerceptualNet = "vgg"
    """Network of LPIPS."""
    lpips_weights: str | None = None
    """Its weights, where the package registry cannot be reached: a file or folder of the usual ones (the
    lpips package's, torchvision's), or a name of the hub."""
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
            raise ValueError("label_images and ignore say something about label_maps, which were not given")
        check_fields(self, label_count="[1, inf)", scenes="[0, 1000000]", size=SIDE)
        if self.extractor == "none" and self.extractor_weights is not None:
            raise ValueError("extractor none takes no extractor_weights; leave them out or name an extractor")
