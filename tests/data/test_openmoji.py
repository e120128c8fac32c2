"""Emoji pictures: pure functions of seed and index, never cut off; scenes whose labels are exact."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from openpae.data import backgrounds
from openpae.data.openmoji import (
    CATEGORIES,
    Emoji,
    Placement,
    emoji_catalog,
    render_dataset,
    render_picture,
    split_catalog,
)
from openpae.data.scenes import BACKGROUND, compose_scene, render_scene

SQUARE = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 72 72"><path fill="{}" d="{}"/></svg>'


def make_emoji(folder: Path, number: int, fill: str = "#ff0000", shape: str = "M10 20h52v32h-52z") -> Emoji:
    svg = folder / f"{number:X}.svg"
    svg.write_text(SQUARE.format(fill, shape), encoding="utf-8")
    return Emoji(
        codepoints=svg.stem, base=svg.stem, name="square", category=number % len(CATEGORIES), svg=svg
    )


@pytest.fixture
def emojis(tmp_path: Path) -> list[Emoji]:
    """Five drawn here: three filled boxes, a triangle, a ring."""
    shapes = ["M10 20h52v32h-52z"] * 3 + ["M36 10l26 52h-52z", "M10 10h52v52h-52zM20 20v32h32v-32z"]
    fills = ["#ff0000", "#00ff00", "#0000ff", "#000000", "#ffffff"]
    return [
        make_emoji(tmp_path, n, fill, shape)
        for n, (fill, shape) in enumerate(zip(fills, shapes, strict=True))
    ]


def tile(red: int, green: int, blue: int, alpha: int = 255) -> Image.Image:
    return Image.new("RGBA", (8, 8), (red, green, blue, alpha))


def test_pictures_depend_on_seed_and_index_alone(emojis: list[Emoji]) -> None:
    first = render_picture(emojis[0], seed=0, index=0, size=32)
    assert first.shape == (3, 32, 32)
    assert first.dtype == torch.uint8
    render_picture(emojis[1], seed=5, index=7, size=32)  # what was drawn before must not matter
    assert torch.equal(render_picture(emojis[0], seed=0, index=0, size=32), first)
    assert not torch.equal(render_picture(emojis[0], seed=0, index=1, size=32), first)
    assert not torch.equal(render_picture(emojis[0], seed=1, index=0, size=32), first)


def test_emoji_are_large_whole_and_inside_the_margin(tmp_path: Path) -> None:
    """Pure red never occurs in a background, so the red box shows where the emoji stands."""
    emoji = make_emoji(tmp_path, 0)
    for index in range(40):
        picture = render_picture(emoji, seed=0, index=index, size=64)
        red = (picture[0] > 200) & (picture[1] < 60) & (picture[2] < 60)
        rows, columns = red.any(1).nonzero().flatten(), red.any(0).nonzero().flatten()
        width, height = int(columns[-1] - columns[0]) + 1, int(rows[-1] - rows[0]) + 1
        assert 0.70 * 64 <= width <= 0.96 * 64
        assert abs(width / height - 52 / 32) < 0.1  # not squeezed
        assert min(int(rows[0]), int(columns[0])) >= 1
        assert max(int(rows[-1]), int(columns[-1])) <= 62


def test_backgrounds_are_soft_and_both_plain_and_graded() -> None:
    plain = 0
    for number in range(60):
        pixels = np.asarray(backgrounds.soft_background(np.random.default_rng(number), 24)).astype(int)
        assert pixels.shape == (24, 24, 3)
        assert pixels.mean() > 150  # light
        steps = max(np.abs(np.diff(pixels, axis=0)).max(), np.abs(np.diff(pixels, axis=1)).max())
        assert steps < 16  # no edge that could be taken for the emoji's
        plain += bool(steps == 0)
    assert 15 < plain < 45


def test_oklab_ends_at_black_and_white() -> None:
    assert backgrounds.oklch_to_rgb(1.0, 0.0, np.array(0.0)).tolist() == [255, 255, 255]
    assert backgrounds.oklch_to_rgb(0.0, 0.0, np.array(0.0)).tolist() == [0, 0, 0]
    # sRGB red in Oklch: published as L 0.6280, C 0.2577, h 29.23 degrees
    red = backgrounds.oklch_to_rgb(0.6280, 0.2577, np.radians(29.23))
    assert np.abs(red.astype(int) - [255, 0, 0]).max() <= 2


def test_only_letters_and_flags_are_never_mirrored(tmp_path: Path) -> None:
    """A triangle whose weight is on its left shows the flip."""
    sides: dict[str, set[bool]] = {}
    for category in ("Flags", "Food & Drink"):
        emoji = make_emoji(tmp_path, CATEGORIES.index(category), shape="M10 10v52h52z")
        sides[category] = set()
        for index in range(12):
            picture = render_picture(emoji, seed=0, index=index, size=48)
            columns = ((picture[0] > 200) & (picture[1] < 60)).sum(0).nonzero().flatten()
            weight = ((picture[0] > 200) & (picture[1] < 60)).sum(0)[columns]
            sides[category].add(bool(weight[:5].sum() > weight[-5:].sum()))
    assert sides == {"Flags": {True}, "Food & Drink": {True, False}}


def test_dataset_is_the_pictures_in_order(emojis: list[Emoji]) -> None:
    images, labels = render_dataset(emojis, size=24, renders_per_emoji=3, seed=4)
    assert images.shape == (15, 3, 24, 24)
    assert labels.tolist() == [e.category for e in emojis for _ in range(3)]
    assert labels.dtype == torch.int64
    for e, emoji in enumerate(emojis):
        for r in range(3):
            assert torch.equal(images[3 * e + r], render_picture(emoji, seed=4, index=r, size=24))


def test_front_tile_owns_the_overlap() -> None:
    background = Image.new("RGB", (32, 32), (200, 200, 200))
    red, blue = (
        (tile(255, 0, 0), Placement(2, 2, 16, 16, False)),
        (tile(0, 0, 255), Placement(10, 10, 16, 16, False)),
    )
    scene = compose_scene(background, [red, blue], [3, 5])
    assert scene.classes.tolist() == [BACKGROUND, 3, 5]
    assert torch.equal(scene.segments == 2, scene.image[2] == 255)
    assert torch.equal(scene.segments == 1, scene.image[0] == 255)
    assert torch.equal(scene.segments == 0, scene.image[1] == 200)
    assert (int((scene.segments == 1).sum()), int((scene.segments == 2).sum())) == (16 * 16 - 8 * 8, 16 * 16)
    assert scene.segments.dtype == torch.int32
    assert scene.semantic[3, 3] == 3
    assert scene.semantic[25, 25] == 5
    assert scene.semantic[31, 0] == BACKGROUND


def test_hidden_tiles_get_no_id() -> None:
    """Ids stay gapless: a tile wholly behind another is in neither the segments nor the classes."""
    background = Image.new("RGB", (32, 32))
    hidden, front = (
        (tile(1, 1, 1), Placement(4, 4, 8, 8, False)),
        (tile(9, 9, 9), Placement(2, 2, 20, 20, False)),
    )
    scene = compose_scene(background, [hidden, front], [0, 7])
    assert scene.classes.tolist() == [BACKGROUND, 7]
    assert scene.segments.unique().tolist() == [0, 1]


def test_a_scene_without_free_pixels_keeps_background_as_id_0() -> None:
    scene = compose_scene(Image.new("RGB", (16, 16)), [(tile(9, 9, 9), Placement(0, 0, 16, 16, False))], [2])
    assert scene.classes.tolist() == [BACKGROUND, 2]
    assert scene.segments.unique().tolist() == [1]


def test_half_transparent_pixels_go_to_who_covers_most() -> None:
    thin, thick = tile(9, 9, 9, alpha=100), tile(9, 9, 9, alpha=150)
    placed = [(thin, Placement(0, 0, 8, 8, False)), (thick, Placement(8, 8, 8, 8, False))]
    scene = compose_scene(Image.new("RGB", (16, 16)), placed, [0, 1])
    assert scene.classes.tolist() == [BACKGROUND, 1]
    assert (scene.segments[:8, :8] == 0).all()


def test_scenes_are_pure_and_their_labels_gapless(emojis: list[Emoji]) -> None:
    counts: Counter[int] = Counter()
    for index in range(20):
        scene = render_scene(emojis, seed=0, index=index, size=48)
        again = render_scene(emojis, seed=0, index=index, size=48)
        assert torch.equal(scene.image, again.image)
        assert torch.equal(scene.segments, again.segments)
        assert scene.image.shape == (3, 48, 48)
        assert scene.segments.unique().tolist() == list(range(len(scene.classes)))
        assert scene.classes[0] == BACKGROUND
        assert (scene.classes[1:] < BACKGROUND).all()
        counts[len(scene.classes) - 1] += 1
    assert set(counts) <= {1, 2, 3, 4, 5}
    assert len(counts) >= 3
    other = render_scene(emojis, seed=1, index=0, size=48)
    assert not torch.equal(other.image, render_scene(emojis, seed=0, index=0, size=48).image)


def test_no_emoji_of_a_scene_is_mostly_hidden(emojis: list[Emoji]) -> None:
    """Boxes of one colour each: what is seen of a box is at least the promised share of it."""
    for index in range(20):
        scene = render_scene(emojis[:3], seed=3, index=index, size=64)
        for number in range(1, len(scene.classes)):
            own = scene.segments == number
            longest = max(int(own.any(0).sum()), int(own.any(1).sum()))
            assert own.sum() > 0.55 * longest * longest * 32 / 52


def make_catalog(tones: bool) -> list[Emoji]:
    catalog = []
    for number in range(400):
        for tone in ("", "-1F3FB", "-1F3FF") if tones and number % 3 == 0 else ("",):
            base = f"1F{number:03X}"
            catalog.append(Emoji(codepoints=base + tone, base=base, name="", category=number % 9, svg=Path()))
    return catalog


def test_split_keeps_skin_tones_together_and_ignores_the_rest() -> None:
    train, held_out = split_catalog(make_catalog(tones=True))
    assert not {e.base for e in train} & {e.base for e in held_out}
    assert len(train) + len(held_out) == len(make_catalog(tones=True))
    plain_train, plain_held_out = split_catalog(make_catalog(tones=False))
    assert {e.base for e in held_out} == {e.base for e in plain_held_out}
    assert 0.05 < len(plain_held_out) / 400 < 0.15
    assert [e.base for e in plain_train] == sorted(e.base for e in plain_train)
    assert split_catalog(make_catalog(tones=False), seed=1)[1] != plain_held_out


def test_errors_name_the_fault(emojis: list[Emoji], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="held_out must be between 0 and 1, both excluded, got 1"):
        split_catalog(emojis, held_out=1)
    with pytest.raises(ValueError, match=r"size must be >= 16 pixels .* got 8"):
        render_picture(emojis[0], seed=0, index=0, size=8)
    with pytest.raises(ValueError, match="emojis is empty"):
        render_scene([], seed=0, index=0, size=32)
    with pytest.raises(ValueError, match="emojis is empty"):
        render_dataset([], size=32, renders_per_emoji=1, seed=0)
    with pytest.raises(ValueError, match="renders_per_emoji must be >= 1, got 0"):
        render_dataset(emojis, size=32, renders_per_emoji=0, seed=0)
    with pytest.raises(ValueError, match="is an empty picture"):
        render_picture(make_emoji(tmp_path, 99, shape=""), seed=0, index=0, size=32)


@pytest.mark.assets
def test_catalog_is_all_of_unicode_but_components() -> None:
    catalog = emoji_catalog()
    assert Counter(CATEGORIES[e.category] for e in catalog) == {
        "People & Body": 385,
        "Flags": 269,
        "Objects": 262,
        "Symbols": 223,
        "Travel & Places": 218,
        "Smileys & Emotion": 168,
        "Animals & Nature": 153,
        "Food & Drink": 135,
        "Activities": 85,
    }  # counted in emoji.json itself
    assert catalog == emoji_catalog()
    assert len({e.codepoints for e in catalog}) == len(catalog)
    assert catalog[0].name == "grinning face"
    toned = emoji_catalog(skin_tones=True)
    plain = set(catalog)
    assert [e for e in toned if e in plain] == catalog
    assert {CATEGORIES[e.category] for e in set(toned) - plain} == {"People & Body"}
    for side in split_catalog(catalog):
        assert {e.category for e in side} == set(range(9))


@pytest.mark.assets
def test_real_emoji_render_in_colour_and_touch_no_border() -> None:
    catalog = emoji_catalog()[::200]
    images, _ = render_dataset(catalog, size=64, renders_per_emoji=2, seed=0)
    assert (images.flatten(1).float().std(dim=1) > 10).all()
    border = torch.cat([images[:, :, 0], images[:, :, -1], images[:, :, :, 0], images[:, :, :, -1]], dim=2)
    assert border.min() > 60  # outlines are black, backgrounds are light
