"""Pictures of OpenMoji emoji (CC BY-SA 4.0) on soft backgrounds, for quickstart.

A picture is a pure function of its arguments: the same emoji, seed and index give the same pixels.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from openpae.data.backgrounds import soft_background
from openpae.data.images import PackedImages
from openpae.data.shard_writer import ShardWriter
from openpae.data.shards import Layout
from openpae.runtime.extras import needs
from openpae.storage.assets import fetch

CATEGORIES = (
    "Smileys & Emotion",
    "People & Body",
    "Animals & Nature",
    "Food & Drink",
    "Travel & Places",
    "Activities",
    "Objects",
    "Symbols",
    "Flags",
)
_MIRRORED = frozenset(CATEGORIES) - {"Symbols", "Flags"}
_PICTURE_SCALE = (0.72, 0.94)  # longer side of the emoji / side of the picture
_PICTURE_SHIFT = 0.1  # largest distance from the middle / side of the picture
_MARGIN = 0.03  # space left free at each border / side of the picture


@dataclass(frozen=True, kw_only=True)
class Emoji:
    """One emoji, or one of its skin tones."""

    codepoints: str
    """Stem of its SVG file: "1F385-1F3FB"."""
    base: str
    """Codepoints without skin tones, equal for all variants of an emoji."""
    name: str
    category: int
    """Index into `CATEGORIES`."""
    svg: Path


@dataclass(frozen=True)
class Placement:
    """Upper left corner and size of a tile, in pixels."""

    left: int
    top: int
    width: int
    height: int
    mirrored: bool


def emoji_catalog(*, skin_tones: bool = False) -> list[Emoji]:
    """All emoji of the nine categories, in Unicode's order. The first call downloads the assets.

    Args:
        skin_tones: add the variants with skin tones, each after its emoji.

    Raises:
        FileNotFoundError: the assets are not in the cache and cannot be downloaded.
    """
    svgs = fetch("openmoji") / "svg"
    rows = json.loads((fetch("emoji-data") / "emoji.json").read_text(encoding="utf-8"))
    files = {file.stem: file for file in svgs.glob("*.svg")}
    catalog = []
    for row in sorted(rows, key=lambda row: (row["sort_order"], row["unified"])):
        if row["category"] not in CATEGORIES:  # "Component": bare skin tones
            continue
        variants = [row["unified"]]
        if skin_tones:
            variants += [variant["unified"] for variant in row.get("skin_variations", {}).values()]
        for unified in variants:
            # OpenMoji omits the variation selector FE0F in names of single characters.
            svg = files.get(unified) or files.get(unified.replace("-FE0F", ""))
            if svg is None:
                raise FileNotFoundError(
                    f"{svgs} has no picture of emoji {unified}; delete {svgs.parent} to fetch it again"
                )
            catalog.append(
                Emoji(
                    codepoints=svg.stem,
                    base=row["unified"],
                    name=row["name"].lower(),
                    category=CATEGORIES.index(row["category"]),
                    svg=svg,
                )
            )
    return catalog


def split_catalog(
    catalog: Sequence[Emoji], *, held_out: float = 0.1, seed: int = 0
) -> tuple[list[Emoji], list[Emoji]]:
    """Split emoji into training and held-out ones, each in the order of the catalog.

    The side of an emoji depends only on the seed and its base codepoints, so its skin tones stay with it.
    Man, woman and person of one activity are different emoji and can be on different sides.

    Args:
        catalog: from `emoji_catalog`.
        held_out: expected share of held-out emoji, in (0, 1).
        seed: seed of the split.

    Raises:
        ValueError: held_out is not between 0 and 1.
    """
    if not 0 < held_out < 1:
        raise ValueError(f"held_out must be between 0 and 1, both excluded, got {held_out}")
    train: list[Emoji] = []
    test: list[Emoji] = []
    for emoji in catalog:
        side = test if random_stream(seed, "split", emoji.base).random() < held_out else train
        side.append(emoji)
    return train, test


def render_picture(emoji: Emoji, *, seed: int, index: int, size: int) -> Tensor:
    """One picture of one emoji with random background, scale, place and flip. Nothing is cut off.

    Args:
        emoji: the emoji to draw.
        seed: seed of the data set.
        index: number of the picture.
        size: side in pixels, >= 16.

    Returns:
        uint8 RGB, (3, size, size).

    Raises:
        ValueError: size is below 16.
    """
    check_size(size)
    return as_tensor(_picture(tile_of(emoji.svg, size), emoji, seed, index, size))


def render_dataset(
    emojis: Sequence[Emoji], *, size: int, renders_per_emoji: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Pictures of every emoji with the category as label, on all cores.

    Args:
        emojis: the emoji to draw, from `emoji_catalog` or `split_catalog`.
        size: side in pixels, >= 16.
        renders_per_emoji: pictures of each emoji; picture r of emoji e is number e * renders_per_emoji + r,
            and equals `render_picture(emojis[e], seed=seed, index=r, size=size)`.
        seed: seed of the data set.

    Returns:
        images: uint8 RGB, (len(emojis) * renders_per_emoji, 3, size, size).
        labels: int64, indices into `CATEGORIES`, (len(emojis) * renders_per_emoji,).

    Raises:
        ValueError: no emoji, size below 16, or renders_per_emoji below 1.
    """
    check_size(size)
    if not emojis:
        raise ValueError("emojis is empty; there is nothing to render")
    if renders_per_emoji < 1:
        raise ValueError(f"renders_per_emoji must be >= 1, got {renders_per_emoji}")
    images = torch.empty(len(emojis), renders_per_emoji, 3, size, size, dtype=torch.uint8)

    def render(number: int) -> None:
        emoji = emojis[number]
        tile = _rasterise(emoji.svg, _tile_side(size))  # once per emoji
        for index in range(renders_per_emoji):
            images[number, index] = as_tensor(_picture(tile, emoji, seed, index, size))

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # rasterising and resizing release the GIL
        for _ in pool.map(render, range(len(emojis))):  # a failure of a thread is raised here
            pass
    labels = torch.tensor([emoji.category for emoji in emojis]).repeat_interleave(renders_per_emoji)
    return images.flatten(0, 1), labels


def pack_pictures(
    folder: Path, emojis: Sequence[Emoji], *, size: int, pictures: int, seed: int
) -> PackedImages:
    """`render_dataset` as packed images. A complete folder is kept.

    Raises:
        ValueError: as `render_dataset`, or the folder holds other images.
    """
    layout = Layout(
        kind="images",
        dtype="uint8",
        shape=(3, size, size),
        sources=len(emojis) * pictures,
        per_shard=len(emojis) * pictures,
        attributes={"classes": list(CATEGORIES), "source": f"openmoji, {pictures} each, seed {seed}"},
    )
    writer = ShardWriter(folder, layout)
    if writer.missing():
        images, labels = render_dataset(emojis, size=size, renders_per_emoji=pictures, seed=seed)
        writer.write(0, images, labels.tolist())
    writer.finish()
    return PackedImages(folder)


def check_size(size: int) -> None:
    """Raise ValueError for pictures too small to recognise an emoji."""
    if size < 16:
        raise ValueError(f"size must be >= 16 pixels for an emoji to be recognisable, got {size}")


def random_stream(seed: int, *name: str) -> np.random.Generator:
    """A random generator that depends only on the seed and the name, on every machine."""
    digest = hashlib.sha256("/".join([str(seed), *name]).encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:16], "big"))


def _tile_side(size: int) -> int:
    return max(128, 2 * size)  # at least twice the picture: downscaling then smooths all edges


def _rasterise(svg: Path, side: int) -> Image.Image:
    """The visible part of an SVG file, RGBA, without empty margins."""
    with needs("quickstart", "drawing emoji"):
        import resvg_py
    png = resvg_py.svg_to_bytes(svg_path=str(svg), width=side, height=side, skip_system_fonts=True)
    tile = Image.open(io.BytesIO(bytes(png))).convert("RGBA")
    box = tile.getchannel("A").getbbox()
    if box is None:
        raise ValueError(f"{svg} is an empty picture")
    return tile.crop(box)


@lru_cache(maxsize=256)
def tile_of(svg: Path, size: int) -> Image.Image:
    """The visible part of an SVG file, RGBA, for pictures of side `size`; cached."""
    return _rasterise(svg, _tile_side(size))


def _picture(tile: Image.Image, emoji: Emoji, seed: int, index: int, size: int) -> Image.Image:
    rng = random_stream(seed, "picture", emoji.codepoints, str(index))
    image = soft_background(rng, size)
    placement = place(rng, tile.size, size, _PICTURE_SCALE, _PICTURE_SHIFT, may_mirror(emoji))
    layer = draw_tile(tile, placement, size)
    image.paste(layer, (0, 0), layer)
    return image


def may_mirror(emoji: Emoji) -> bool:
    """Whether a mirrored view still shows the same emoji: not for letters and flags."""
    return CATEGORIES[emoji.category] in _MIRRORED


def place(
    rng: np.random.Generator,
    tile: tuple[int, int],
    size: int,
    scale: tuple[float, float],
    shift: float,
    may_mirror: bool,
) -> Placement:
    """A random place inside the margins for a tile of this width and height."""
    longer = rng.uniform(*scale) * size
    moves = rng.uniform(-shift, shift, size=2) * size
    mirrored = bool(rng.random() < 0.5) and may_mirror
    width, height = (max(1, round(longer * side / max(tile))) for side in tile)
    left, top = (
        round(min(max(middle, _MARGIN * size), (1 - _MARGIN) * size - extent))
        for middle, extent in (
            ((size - width) / 2 + moves[0], width),
            ((size - height) / 2 + moves[1], height),
        )
    )
    return Placement(left, top, width, height, mirrored)


def draw_tile(tile: Image.Image, placement: Placement, size: int) -> Image.Image:
    """A transparent picture (S, S) with the tile in its place, RGBA."""
    scaled = tile.resize((placement.width, placement.height), Image.Resampling.LANCZOS)
    if placement.mirrored:
        scaled = scaled.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    layer = Image.new("RGBA", (size, size))
    layer.paste(scaled, (placement.left, placement.top))
    return layer


def as_tensor(image: Image.Image) -> Tensor:
    """An RGB picture as uint8, (3, H, W)."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
