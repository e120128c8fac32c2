"""The quickstart's pictures: OpenMoji emoji (CC BY-SA 4.0) on soft backgrounds, and scenes with label maps.

Everything drawn is a pure function of its arguments: the same emoji, seed and index give the same pixels.
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
import resvg_py
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from openpae.data.backgrounds import soft_background
from openpae.data.images import PackedImages
from openpae.data.shards import Layout, ShardWriter
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
BACKGROUND = len(CATEGORIES)
"""Class of the pixels of a scene that belong to no emoji."""

# A mirrored letter or flag is another picture, not another view of the same one.
_MIRRORED = frozenset(CATEGORIES) - {"Symbols", "Flags"}
_PICTURE_SCALE = (0.72, 0.94)  # longer side of the emoji / side of the picture
_PICTURE_SHIFT = 0.1  # largest distance from the middle / side of the picture
_MARGIN = 0.03  # space left free at each border / side of the picture
_SCENE_SCALE = (0.36, 0.60)
_SCENE_SHIFT = 0.5  # anywhere
_SCENE_COUNT = (2, 5)  # emoji in a scene, both ends included
_SCENE_TRIES = 20  # places tried for one emoji before the scene goes on without it
_SCENE_VISIBLE = 0.6  # share of each emoji that later ones may not cover


@dataclass(frozen=True, kw_only=True)
class Emoji:
    """One emoji, or one of its skin tones."""

    codepoints: str
    """As in the name of its SVG file: "1F385-1F3FB"."""
    base: str
    """Codepoints without skin tones: the same for all variants of an emoji."""
    name: str
    category: int
    """Index into `CATEGORIES`."""
    svg: Path


@dataclass(frozen=True, kw_only=True)
class Scene:
    """A picture of several emoji with its panoptic labels."""

    image: Tensor
    """uint8 RGB, (3, S, S)."""
    segments: Tensor
    """int32, (S, S): 0 background, k the k-th visible emoji; every id up to the largest occurs."""
    classes: Tensor
    """int64, (largest id + 1,): the class of each segment; classes[0] is `BACKGROUND`."""

    @property
    def semantic(self) -> Tensor:
        """Class of each pixel, int64, (S, S)."""
        return self.classes[self.segments.long()]


@dataclass(frozen=True)
class _Placement:
    """Where a tile goes: upper left corner and size in pixels."""

    left: int
    top: int
    width: int
    height: int
    mirrored: bool


def emoji_catalog(*, skin_tones: bool = False) -> list[Emoji]:
    """All emoji of the nine categories, in Unicode's order. Downloads the assets on first use.

    Args:
        skin_tones: also the variants with skin tones, each right after its emoji (all are People & Body).

    Raises:
        FileNotFoundError: the assets are not in the cache and cannot be downloaded.
    """
    svgs = fetch("openmoji") / "svg"
    rows = json.loads((fetch("emoji-data") / "emoji.json").read_text(encoding="utf-8"))
    files = {file.stem: file for file in svgs.glob("*.svg")}
    catalog = []
    for row in sorted(rows, key=lambda row: (row["sort_order"], row["unified"])):
        if row["category"] not in CATEGORIES:  # "Component": skin tones by themselves
            continue
        variants = [row["unified"]]
        if skin_tones:
            variants += [variant["unified"] for variant in row.get("skin_variations", {}).values()]
        for unified in variants:
            # OpenMoji leaves the selector "show as a picture" out of the names of single characters.
            svg = files.get(unified) or files.get(unified.replace("-FE0F", ""))
            if svg is None:
                raise FileNotFoundError(
                    f"{svgs} has no picture of emoji {unified}; delete {svgs.parent} to fetch anew"
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
    """Emoji to train on and emoji held out, each in the order of the catalog.

    An emoji's side depends on its own base codepoints alone: its skin tones stay with it, and no other
    emoji's presence moves it. Man, woman and person of one activity are different emoji and may part.

    Args:
        catalog: from `emoji_catalog`.
        held_out: expected share of the emoji held out, in (0, 1).
        seed: another seed, another split.

    Raises:
        ValueError: held_out is not between 0 and 1.
    """
    if not 0 < held_out < 1:
        raise ValueError(f"held_out must be between 0 and 1, both excluded, got {held_out}")
    train: list[Emoji] = []
    test: list[Emoji] = []
    for emoji in catalog:
        side = test if _draw(seed, "split", emoji.base).random() < held_out else train
        side.append(emoji)
    return train, test


def render_picture(emoji: Emoji, *, seed: int, index: int, size: int) -> Tensor:
    """One picture of one emoji: random background, scale, place and flip, always whole.

    Args:
        emoji: what to draw.
        seed: of the data set.
        index: which of the emoji's pictures.
        size: side in pixels, >= 16.

    Returns:
        uint8 RGB, (3, size, size).

    Raises:
        ValueError: size is below 16.
    """
    _check_size(size)
    return _as_tensor(_picture(_tile(emoji.svg, _tile_side(size)), emoji, seed, index, size))


def render_dataset(
    emojis: Sequence[Emoji], *, size: int, renders_per_emoji: int, seed: int, progress: bool = False
) -> tuple[Tensor, Tensor]:
    """Pictures of every emoji with the category as label, on all cores.

    Args:
        emojis: what to draw, from `emoji_catalog` or `split_catalog`.
        size: side in pixels, >= 16.
        renders_per_emoji: pictures of each emoji; picture r of emoji e is number e * renders_per_emoji + r,
            and equals `render_picture(emojis[e], seed=seed, index=r, size=size)`.
        seed: another seed, other pictures.
        progress: show a bar on stderr.

    Returns:
        images: uint8 RGB, (len(emojis) * renders_per_emoji, 3, size, size).
        labels: int64, indices into `CATEGORIES`, (len(emojis) * renders_per_emoji,).

    Raises:
        ValueError: no emoji, size below 16, or renders_per_emoji below 1.
    """
    _check_size(size)
    if not emojis:
        raise ValueError("emojis is empty; there is nothing to render")
    if renders_per_emoji < 1:
        raise ValueError(f"renders_per_emoji must be >= 1, got {renders_per_emoji}")
    images = torch.empty(len(emojis), renders_per_emoji, 3, size, size, dtype=torch.uint8)

    def render(number: int) -> None:
        emoji = emojis[number]
        tile = _rasterise(emoji.svg, _tile_side(size))  # once for all its pictures
        for index in range(renders_per_emoji):
            images[number, index] = _as_tensor(_picture(tile, emoji, seed, index, size))

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # rasterising and resizing release Python's lock
        done = pool.map(render, range(len(emojis)))
        for _ in tqdm(done, total=len(emojis), desc="rendering", unit="emoji", disable=not progress):
            pass
    labels = torch.tensor([emoji.category for emoji in emojis]).repeat_interleave(renders_per_emoji)
    return images.flatten(0, 1), labels


def pack_pictures(
    folder: Path, emojis: Sequence[Emoji], *, size: int, pictures: int, seed: int
) -> PackedImages:
    """Pictures of every emoji (`render_dataset`) as packed images; what is complete is not done again.

    Args:
        folder: for the packed images.
        emojis: what to draw.
        size: side in pixels, >= 16.
        pictures: of each emoji.
        seed: another seed, other pictures.

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


def render_scene(emojis: Sequence[Emoji], *, seed: int, index: int, size: int) -> Scene:
    """One scene of two to five emoji that may overlap, with exact panoptic labels.

    An emoji that would hide too much of the others wherever it is tried is left out.

    Args:
        emojis: what to choose from.
        seed: of the data set.
        index: which scene.
        size: side in pixels, >= 16.

    Raises:
        ValueError: no emoji, or size below 16.
    """
    _check_size(size)
    if not emojis:
        raise ValueError("emojis is empty; there is nothing to render")
    rng = _draw(seed, "scene", str(index))
    low, high = _SCENE_COUNT
    chosen = [emojis[int(i)] for i in rng.integers(len(emojis), size=int(rng.integers(low, high + 1)))]
    background = soft_background(rng, size)
    placed: list[tuple[Image.Image, _Placement]] = []
    classes: list[int] = []
    for emoji in chosen:
        tile = _tile(emoji.svg, _tile_side(size))
        for _ in range(_SCENE_TRIES):
            placement = _place(rng, tile.size, size, _SCENE_SCALE, _SCENE_SHIFT, _may_mirror(emoji))
            if _all_visible([*placed, (tile, placement)], size):
                placed.append((tile, placement))
                classes.append(emoji.category)
                break
    return compose_scene(background, placed, classes)


def compose_scene(
    background: Image.Image, placed: Sequence[tuple[Image.Image, _Placement]], classes: Sequence[int]
) -> Scene:
    """Draw tiles one over the other and label each pixel by the topmost tile that covers at least half of it.

    Args:
        background: RGB, (S, S).
        placed: RGBA tiles and their places, from the back to the front.
        classes: the class of each tile.
    """
    image = background.copy()
    owner = np.zeros((background.height, background.width), np.int32)
    for number, (tile, placement) in enumerate(placed, start=1):
        layer = _layer(tile, placement, background.width)
        image.paste(layer, (0, 0), layer)
        owner[np.asarray(layer.getchannel("A")) >= 128] = number
    visible, segments = np.unique(
        np.append(owner, 0), return_inverse=True
    )  # the 0: background is always id 0
    names = [BACKGROUND, *classes]
    return Scene(
        image=_as_tensor(image),
        segments=torch.from_numpy(segments.reshape(-1)[:-1].reshape(owner.shape).astype(np.int32)),
        classes=torch.tensor([names[int(number)] for number in visible]),
    )


def _check_size(size: int) -> None:
    if size < 16:
        raise ValueError(f"size must be >= 16 pixels for an emoji to be recognisable, got {size}")


def _draw(seed: int, *what: str) -> np.random.Generator:
    """A random stream that depends on its name alone, the same on every machine."""
    digest = hashlib.sha256("/".join([str(seed), *what]).encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:16], "big"))


def _tile_side(size: int) -> int:
    return max(128, 2 * size)  # twice the picture, so that scaling down smooths every edge alike


def _rasterise(svg: Path, side: int) -> Image.Image:
    """The visible part of an SVG file, RGBA, its empty margins cut off."""
    png = resvg_py.svg_to_bytes(svg_path=str(svg), width=side, height=side, skip_system_fonts=True)
    tile = Image.open(io.BytesIO(bytes(png))).convert("RGBA")
    box = tile.getchannel("A").getbbox()
    if box is None:
        raise ValueError(f"{svg} is an empty picture")
    return tile.crop(box)


@lru_cache(maxsize=256)
def _tile(svg: Path, side: int) -> Image.Image:
    return _rasterise(svg, side)


def _picture(tile: Image.Image, emoji: Emoji, seed: int, index: int, size: int) -> Image.Image:
    rng = _draw(seed, "picture", emoji.codepoints, str(index))
    image = soft_background(rng, size)
    placement = _place(rng, tile.size, size, _PICTURE_SCALE, _PICTURE_SHIFT, _may_mirror(emoji))
    layer = _layer(tile, placement, size)
    image.paste(layer, (0, 0), layer)
    return image


def _may_mirror(emoji: Emoji) -> bool:
    return CATEGORIES[emoji.category] in _MIRRORED


def _place(
    rng: np.random.Generator,
    tile: tuple[int, int],
    size: int,
    scale: tuple[float, float],
    shift: float,
    may_mirror: bool,
) -> _Placement:
    """A random place for a tile of this width and height, wholly inside the margins of the picture."""
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
    return _Placement(left, top, width, height, mirrored)


def _layer(tile: Image.Image, placement: _Placement, size: int) -> Image.Image:
    """A transparent picture (S, S) with the tile in its place."""
    scaled = tile.resize((placement.width, placement.height), Image.Resampling.LANCZOS)
    if placement.mirrored:
        scaled = scaled.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    layer = Image.new("RGBA", (size, size))
    layer.paste(scaled, (placement.left, placement.top))
    return layer


def _all_visible(placed: Sequence[tuple[Image.Image, _Placement]], size: int) -> bool:
    """Whether each tile keeps the wanted share of its pixels once all are drawn."""
    covered = np.zeros((size, size), bool)
    for tile, placement in reversed(placed):
        own = np.asarray(_layer(tile, placement, size).getchannel("A")) >= 128
        if (own & ~covered).sum() < max(1, _SCENE_VISIBLE * own.sum()):
            return False
        covered |= own
    return True


def _as_tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
