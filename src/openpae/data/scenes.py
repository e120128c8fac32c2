"""Scenes of several OpenMoji emoji with exact panoptic labels: pure functions of emoji, seed and index."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from openpae.data.backgrounds import soft_background
from openpae.data.label_maps import Segmented
from openpae.data.openmoji import (
    CATEGORIES,
    Emoji,
    Placement,
    as_tensor,
    check_size,
    draw_tile,
    emoji_catalog,
    may_mirror,
    place,
    random_stream,
    split_catalog,
    tile_of,
)

BACKGROUND = len(CATEGORIES)
"""Class of the background of a scene."""

_SCENE_SCALE = (0.36, 0.60)
_SCENE_SHIFT = 0.5  # anywhere
_SCENE_COUNT = (2, 5)  # emoji in a scene, both ends included
_SCENE_TRIES = 20  # places tried for one emoji before it is left out
_SCENE_VISIBLE = 0.6  # share of each emoji that must stay visible


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


def render_segmented(count: int, *, size: int, seed: int = 0) -> Segmented:
    """Scenes of held-out emoji as images with label maps. The background, label 0, counts as a segment.

    Args:
        count: number of scenes.
        size: side S in pixels, >= 16.
        seed: seed of the scenes.

    Raises:
        ValueError: count below 1, or size below 16.
        FileNotFoundError: the assets are not in the cache and cannot be downloaded.
    """
    if count < 1:
        raise ValueError(f"scenes must be at least 1, got {count}")
    _, held_out = split_catalog(emoji_catalog())
    scenes = [render_scene(held_out, seed=seed, index=index, size=size) for index in range(count)]
    return Segmented(
        name=f"OpenMoji scenes, seed {seed}",
        images=torch.stack([scene.image for scene in scenes]),
        labels=torch.stack([scene.segments.long() for scene in scenes]),
        ignore=None,
    )


def render_scene(emojis: Sequence[Emoji], *, seed: int, index: int, size: int) -> Scene:
    """One scene of up to five emoji that may overlap, with exact panoptic labels.

    An emoji that hides too much of the others at every place tried is left out.

    `seed` names the data set and `index` the scene; `size` is the side in pixels.

    Raises:
        ValueError: no emoji, or size below 16.
    """
    check_size(size)
    if not emojis:
        raise ValueError("emojis is empty; there is nothing to render")
    rng = random_stream(seed, "scene", str(index))
    low, high = _SCENE_COUNT
    chosen = [emojis[int(i)] for i in rng.integers(len(emojis), size=int(rng.integers(low, high + 1)))]
    background = soft_background(rng, size)
    placed: list[tuple[Image.Image, Placement]] = []
    classes: list[int] = []
    for emoji in chosen:
        tile = tile_of(emoji.svg, size)
        for _ in range(_SCENE_TRIES):
            placement = place(rng, tile.size, size, _SCENE_SCALE, _SCENE_SHIFT, may_mirror(emoji))
            if _all_visible([*placed, (tile, placement)], size):
                placed.append((tile, placement))
                classes.append(emoji.category)
                break
    return compose_scene(background, placed, classes)


def compose_scene(
    background: Image.Image, placed: Sequence[tuple[Image.Image, Placement]], classes: Sequence[int]
) -> Scene:
    """Draw tiles over each other. Each pixel belongs to the topmost tile that covers at least half of it.

    Args:
        background: RGB, (S, S).
        placed: RGBA tiles and their places, from back to front.
        classes: class of each tile.
    """
    image = background.copy()
    owner = np.zeros((background.height, background.width), np.int32)
    for number, (tile, placement) in enumerate(placed, start=1):
        layer = draw_tile(tile, placement, background.width)
        image.paste(layer, (0, 0), layer)
        owner[np.asarray(layer.getchannel("A")) >= 128] = number
    # The appended 0 makes the background id 0 even if it is hidden.
    visible, segments = np.unique(np.append(owner, 0), return_inverse=True)
    names = [BACKGROUND, *classes]
    return Scene(
        image=as_tensor(image),
        segments=torch.from_numpy(segments.reshape(-1)[:-1].reshape(owner.shape).astype(np.int32)),
        classes=torch.tensor([names[int(number)] for number in visible]),
    )


def _all_visible(placed: Sequence[tuple[Image.Image, Placement]], size: int) -> bool:
    """Whether each tile keeps the required share of its pixels when all are drawn."""
    covered = np.zeros((size, size), bool)
    for tile, placement in reversed(placed):
        own = np.asarray(draw_tile(tile, placement, size).getchannel("A")) >= 128
        if (own & ~covered).sum() < max(1, _SCENE_VISIBLE * own.sum()):
            return False
        covered |= own
    return True
