"""Images with a label for every pixel, from index PNGs or COCO panoptic files."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from openpae.data.colour import upright
from openpae.data.crops import Size, center_crop, height_width, resize_to_cover
from openpae.data.decode import decode_file, read_image
from openpae.data.images import spread
from openpae.data.listing import EXTENSIONS
from openpae.storage.files import fingerprint, read_json

PANOPTIC_VOID = 0
"""Id of unlabelled pixels in COCO's panoptic maps."""


@dataclass(frozen=True, kw_only=True)
class Segmented:
    """Images of one size with a segment label for each pixel."""

    name: str
    images: Tensor
    """uint8 RGB, (B, 3, H, W)."""
    labels: Tensor
    """int64, (B, H, W)."""
    ignore: int | None
    """Label of pixels that metrics ignore; None if all count."""

    def fingerprint(self) -> str:
        """16 hexadecimal digits of a hash over pixels, labels and the ignored label."""
        return fingerprint({"images": self.images, "labels": self.labels}, repr(self.ignore))


def read_segmented(
    images: Path, maps: Path, *, size: Size, count: int | None = None, ignore: int | None = None
) -> Segmented:
    """Read images and their label maps, both with the same centre crop; labels by nearest neighbour.

    Args:
        images: folder of images.
        maps: a folder of index PNGs, each named as its image (a/1.png for a/1.jpg), or COCO's panoptic JSON
            with its folder of PNGs beside it (panoptic_val2017.json, panoptic_val2017/). It may be the image
            folder itself if the images are not PNGs.
        size: (H, W) in pixels, or the side of a square.
        count: number of images, evenly spread; None takes all.
        ignore: label of pixels that metrics ignore, for index PNGs only.

    Raises:
        FileNotFoundError: no folder, no maps, or a map without its image.
        ValueError: a map of another shape than its image or without one number per pixel, or a damaged JSON.
        BrokenImage: a file cannot be decoded.
    """
    if not images.is_dir():
        raise FileNotFoundError(f"no image folder at {images}")
    panoptic = maps.is_file()
    if panoptic and ignore is not None:
        raise ValueError(f"ignore must be left out for panoptic maps ({maps}); their void is {PANOPTIC_VOID}")
    pairs = list(_panoptic_pairs(images, maps) if panoptic else _index_pairs(images, maps))
    if not pairs:
        raise FileNotFoundError(f"no label maps in {maps}; give a folder of PNGs or a COCO panoptic JSON")
    if count is not None and count < len(pairs):
        pairs = [pairs[i] for i in spread(len(pairs), count)]
    pixels, labels = [], []
    for image_file, map_file in pairs:
        image = read_image(image_file)
        label = _panoptic_map(map_file) if panoptic else _index_map(map_file)
        if label.shape != (image.height, image.width):
            raise ValueError(
                f"{map_file} must have the size of {image_file.name}, {image.width} x {image.height}, "
                f"got {label.shape[1]} x {label.shape[0]}"
            )
        pixels.append(center_crop(image, size))
        labels.append(_crop_labels(label, image, size))
    return Segmented(
        name=str(maps),
        images=torch.from_numpy(np.stack(pixels)),
        labels=torch.from_numpy(np.stack(labels)).long(),
        ignore=PANOPTIC_VOID if panoptic else ignore,
    )


def _index_pairs(images: Path, maps: Path) -> Iterator[tuple[Path, Path]]:
    image_of: dict[Path, Path] = {}
    for file in sorted(images.rglob("*")):
        if file.suffix.lower() in EXTENSIONS and not (images == maps and file.suffix.lower() == ".png"):
            other = image_of.setdefault(file.relative_to(images).with_suffix(""), file)
            if other != file:
                raise ValueError(f"{other} and {file.name} would share a label map; rename one, and its map")
    for file in sorted(maps.rglob("*.png")):
        stem = file.relative_to(maps).with_suffix("")
        if stem not in image_of:
            raise FileNotFoundError(f"no image for the label map {file}: {images / stem} with any ending")
        yield image_of[stem], file


def _panoptic_pairs(images: Path, maps: Path) -> Iterator[tuple[Path, Path]]:
    content = read_json(maps)
    try:
        names = {entry["id"]: Path(entry["file_name"]) for entry in content["images"]}
        rows = [(names[entry["image_id"]], Path(entry["file_name"])) for entry in content["annotations"]]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{maps} is no COCO panoptic JSON: it lacks {error}") from None
    for image, label in sorted(rows):
        pair = (images / image, maps.with_suffix("") / label)
        if missing := [file for file in pair if not file.is_file()]:
            raise FileNotFoundError(f"{maps} names {missing[0]}, which does not exist")
        yield pair


def _index_map(file: Path) -> NDArray[np.int32]:
    return decode_file(file, _indices)


def _indices(image: Image.Image) -> NDArray[np.int32]:
    array = np.asarray(upright(image))
    if array.ndim != 2 or array.dtype.kind == "f":
        raise ValueError(
            "a label map must hold one integer per pixel (a grey or palette PNG), got mode "
            f"{image.mode}; for COCO's panoptic maps give the JSON file"
        )
    return array.astype(np.int32)


def _panoptic_map(file: Path) -> NDArray[np.int32]:
    """Segment ids, R + 256 G + 256^2 B."""
    rgb = decode_file(file, _levels).astype(np.int32)
    ids: NDArray[np.int32] = rgb[..., 0] + 256 * rgb[..., 1] + 256**2 * rgb[..., 2]
    return ids


def _levels(image: Image.Image) -> NDArray[np.uint8]:
    """RGB as stored. These are segment ids, so no colour profile is applied."""
    return np.asarray(upright(image).convert("RGB"))


def _crop_labels(label: NDArray[np.int32], image: Image.Image, size: Size) -> NDArray[np.int32]:
    """Labels in the crop of `center_crop(image, size)`, (H, W)."""
    height, width = height_width(size)
    covering = resize_to_cover(image, size)
    scaled = Image.fromarray(label).resize(covering.size, Image.Resampling.NEAREST)
    left, top = (covering.width - width) // 2, (covering.height - height) // 2
    return np.asarray(scaled)[top : top + height, left : left + width]
