"""Config of the images of a run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from openpae.config import check_fields


@dataclass(frozen=True, kw_only=True)
class ImageData:
    """Training and held-out images of a run."""

    images: Path
    """Training images: packed images (pae pack), a folder with or without class subfolders, or another form
    that can be read in any order, such as a tar or hf:OWNER/NAME#SPLIT."""
    evaluation: Path | None = None
    """Held-out images in any of these forms; null skips evaluation."""
    evaluation_images: int = 500
    """Number of held-out images, evenly spread."""
    augment: Literal["none", "flip", "crop"] = "crop"
    """none: centre crop. flip: also mirror half of the images. crop: shorter side to `resize`, random crop,
    mirror half."""
    resize: int = 384
    """Shorter side before the random crop, in the proportions of the crop."""
    skip_broken: bool = False
    """Replace a file that cannot be decoded by the next readable image, with a warning that names it."""
    feature_cache: Path | None = None
    """Folder for cached VFM features of packed images, made on first use; null computes them each step."""

    def __post_init__(self) -> None:
        if self.feature_cache is not None and self.augment == "crop":
            raise ValueError(
                "data.feature_cache needs data.augment none or flip: no cache holds random crops"
            )
        check_fields(self, "data.", evaluation_images="[1, inf)")
