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
from openpae.data.decode import decoded, read_image
from openpae.data.listing import EXTENSIONS
from openpae.storage.files import fingerprint, read_json

PANOPTIC_VOID = 0
"""Id of the pixels that COCO's panoptic maps leave unlabelled."""


@dataclass(frozen=True, kw_only=True)
class Segmented:
    """Images of one size and the segment of each of their pixels."""

    name: str
    images: Tensor
    """uint8 RGB, (B, 3, H, W)."""
    labels: Tensor
    """int64, (B, H, W)."""
    ignore: int | None
    """Label of pixels that do not count; None if all count."""

    def fingerprint(self) -> str:
        """16 hexadecimal digits that name exactly these pixels and labels."""
        return fingerprint({"images": self.images, "labels": self.labels}, repr(self.ignore))


def read_segmented(
    images: Path, maps: Path, *, size: Size, count: int | None = None, ignore: int | None = None
) -> Segmented:
    """Images and their label maps, both centre-cropped alike; the labels by nearest neighbour.

    Args:
        images: folder of images.
        maps: a folder of index PNGs, each named as its image (a/1.png for a/1.jpg), or COCO's panoptic JSON
            with its folder of PNGs beside it (panoptic_val2017.json, panoptic_val2017/). It may be the folder
            of the images itself, where those are no PNGs.
        size: (H, W) in pixels, or the side of a square.
        count: take this many, evenly spread; None takes all.
        ignore: label that does not count, of index PNGs; panoptic maps say it themselves.

    Raises:
        FileNotFoundError: no folder, no maps, or a map without its image.
        ValueError: a map of another shape than its image, without one number per pixel, or a broken JSON.
        BrokenImage: a file cannot be decoded.
    """
    if not images.is_dir():
        raise FileNotFoundError(f"no image folder at {images}")
    panoptic = maps.is_file()
    if panoptic and ignore is not None:
        raise ValueError(
            f"ignore must be left out for the panoptic maps of {maps}, whose void is {PANOPTIC_VOID}"
        )
    pairs = list(_panoptic_pairs(images, maps) if panoptic else _index_pairs(images, maps))
    if not pairs:
        raise FileNotFoundError(
            f"no label maps in {maps}; it must be a folder of PNGs or a COCO panoptic JSON"
        )
    if count is not None and count < len(pairs):
        pairs = [pairs[i] for i in np.linspace(0, len(pairs) - 1, count).round().astype(int)]
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
    found: dict[Path, Path] = {}
    for file in sorted(images.rglob("*")):
        if file.suffix.lower() in EXTENSIONS and not (images == maps and file.suffix.lower() == ".png"):
            other = found.setdefault(file.relative_to(images).with_suffix(""), file)
            if other != file:
                raise ValueError(
                    f"{other} and {file.name} would share one label map; rename one, and its map"
                )
    for file in sorted(maps.rglob("*.png")):
        stem = file.relative_to(maps).with_suffix("")
        if stem not in found:
            raise FileNotFoundError(
                f"no image for the label map {file}: {images / stem} with any image ending"
            )
        yield found[stem], file


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
    return decoded(file, _indices)


def _indices(image: Image.Image) -> NDArray[np.int32]:
    array = np.asarray(upright(image))
    if array.ndim != 2 or array.dtype.kind == "f":
        raise ValueError(
            "a label map must hold one whole number per pixel (a grey or palette PNG), got mode "
            f"{image.mode}; for COCO's panoptic maps give the JSON file"
        )
    return array.astype(np.int32)


def _panoptic_map(file: Path) -> NDArray[np.int32]:
    """Segment ids, R + 256 G + 256^2 B."""
    rgb = decoded(file, _levels).astype(np.int32)
    ids: NDArray[np.int32] = rgb[..., 0] + 256 * rgb[..., 1] + 256**2 * rgb[..., 2]
    return ids


def _levels(image: Image.Image) -> NDArray[np.uint8]:
    """RGB as stored: numbers of segments are no colours, so a colour profile does not move them."""
    return np.asarray(upright(image).convert("RGB"))


def _crop_labels(label: NDArray[np.int32], image: Image.Image, size: Size) -> NDArray[np.int32]:
    """The crop of `center_crop(image, size)`, by nearest neighbour: (H, W)."""
    height, width = height_width(size)
    whole = resize_to_cover(image, size)
    scaled = Image.fromarray(label).resize(whole.size, Image.Resampling.NEAREST)
    left, top = (whole.width - width) // 2, (whole.height - height) // 2
    return np.asarray(scaled)[top : top + height, left : left + width]
