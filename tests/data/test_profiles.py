"""Colour profiles are honoured: what is read is sRGB, by the equations of the profile."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from openpae.data.colour import UnreadProfile
from openpae.data.decode import read_image
from openpae.data.images import ImageFolder
from openpae.data.label_maps import read_segmented
from openpae.data.order import StepBatches
from openpae.data.training import TrainingImages, image_batches
from tests.data.icc import (
    ADOBE_GAMMA,
    ADOBE_RGB,
    D50,
    SRGB,
    cmyk_profile,
    grey_profile,
    matrix_profile,
    to_srgb,
    write_png,
    xyz_of_lab,
)
from tests.faults.running import run

ADOBE = matrix_profile(ADOBE_RGB, ADOBE_GAMMA)
PHOTO = (200, 120, 61)
SEEN = to_srgb((np.array(PHOTO) / 255) ** ADOBE_GAMMA @ np.array(ADOBE_RGB))
INK = (128, 148, 138)
"""Lab in 8 bits of a full cyan, which no other conversion gives."""
ROUNDING = 2
"""Levels: the profile's numbers and the conversion between them are rounded to 8 bits each."""


def one(path: Path) -> list[int]:
    """The colour of a picture of one colour."""
    colours = np.unique(np.asarray(read_image(path)).reshape(-1, 3), axis=0)
    assert len(colours) == 1
    return list(map(int, colours[0]))


@pytest.mark.parametrize("ending", ["png", "webp", "tif"])
def test_adobe_rgb_becomes_srgb(tmp_path: Path, ending: str) -> None:
    options = {"lossless": True} if ending == "webp" else {}
    Image.new("RGB", (8, 8), PHOTO).save(tmp_path / f"a.{ending}", icc_profile=ADOBE, **options)
    assert one(tmp_path / f"a.{ending}") == pytest.approx(SEEN, abs=ROUNDING)
    Image.new("RGB", (8, 8), PHOTO).save(tmp_path / f"plain.{ending}", **options)
    assert one(tmp_path / f"plain.{ending}") == list(PHOTO)


def test_a_jpeg_keeps_its_profile_through_every_mode(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8), PHOTO).save(tmp_path / "a.jpg", icc_profile=ADOBE, quality=100, subsampling=0)
    assert one(tmp_path / "a.jpg") == pytest.approx(SEEN, abs=ROUNDING + 1)  # JPEG rounds once more
    ink = cmyk_profile({(1, 0, 0, 0): INK})
    Image.new("CMYK", (8, 8), (255, 0, 0, 0)).save(tmp_path / "c.jpg", icc_profile=ink, quality=100)
    lab = (INK[0] / 2.55, INK[1] - 128, INK[2] - 128)
    assert one(tmp_path / "c.jpg") == pytest.approx(to_srgb(xyz_of_lab(lab)), abs=ROUNDING + 1)


@pytest.mark.parametrize("mode", ["L", "LA", "1", "I;16"])
def test_grey_scales_follow_their_own_gamma(tmp_path: Path, mode: str) -> None:
    level = {"1": 255, "I;16": 100 * 256 + 7}.get(mode, 100)
    image = Image.new("L", (8, 8), level) if mode == "LA" else Image.new(mode, (8, 8), level)
    if mode == "LA":
        image.putalpha(255)
    image.save(tmp_path / "a.png", icc_profile=grey_profile(1.0))
    shown = to_srgb((255 if mode == "1" else 100) / 255 * np.array(D50))
    assert one(tmp_path / "a.png") == pytest.approx(shown, abs=ROUNDING)


def test_a_grey_image_may_have_the_profile_of_a_colour_space(tmp_path: Path) -> None:
    """As scanners and editors write it: the three channels are equal."""
    Image.new("L", (8, 8), 100).save(tmp_path / "a.png", icc_profile=matrix_profile(SRGB, 1.0))
    assert one(tmp_path / "a.png") == pytest.approx(to_srgb(100 / 255 * np.array(D50)), abs=ROUNDING)


@pytest.mark.parametrize("kind", ["RGBA", "P"])
def test_transparent_parts_lie_on_white_after_the_colours_are_converted(tmp_path: Path, kind: str) -> None:
    image = Image.new("RGBA", (8, 8), (*PHOTO, 255))
    if kind == "RGBA":
        image.paste((*PHOTO, 0), (4, 0, 8, 8))
        image.save(tmp_path / "a.png", icc_profile=ADOBE)
    else:
        palette = Image.new("P", (8, 8), 0)
        palette.putpalette([*PHOTO, 1, 2, 3])
        palette.paste(1, (4, 0, 8, 8))
        palette.save(tmp_path / "a.png", icc_profile=ADOBE, transparency=1)
    found = np.asarray(read_image(tmp_path / "a.png"))
    assert found[0, 0].tolist() == pytest.approx(SEEN, abs=ROUNDING)
    assert (found[:, 4:] == 255).all()


def test_lab_needs_no_profile(tmp_path: Path) -> None:
    Image.new("LAB", (8, 8), INK).save(tmp_path / "a.tif")
    shown = to_srgb(xyz_of_lab((INK[0] / 2.55, INK[1] - 128, INK[2] - 128)))
    assert one(tmp_path / "a.tif") == pytest.approx(shown, abs=ROUNDING)


def test_srgb_changes_no_pixel(tmp_path: Path) -> None:
    """Most photographs say that they are sRGB; caches of them stay valid to the bit."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    pixels = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png", icc_profile=profile)
    assert (np.asarray(read_image(tmp_path / "a.png")) == pixels).all()


BROKEN = {
    "junk": (b"junk" * 50, "cannot open"),
    "cut off": (ADOBE[:150], "cannot open"),
    "of inks": (cmyk_profile({}), "for CMYK pixels, and the image holds RGB"),
    "of greys": (grey_profile(1.0), "for GRAY pixels, and the image holds RGB"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_profile_that_cannot_be_used_is_a_warning_that_names_the_file(tmp_path: Path, fault: str) -> None:
    profile, reason = BROKEN[fault]
    Image.new("RGB", (8, 8), PHOTO).save(tmp_path / "odd.png", icc_profile=profile)
    with pytest.warns(UnreadProfile, match=f"profile of .*odd.png cannot be used: .*{reason}"):
        assert one(tmp_path / "odd.png") == list(PHOTO)


def test_a_profile_whose_bytes_are_lost_is_a_warning_too(tmp_path: Path) -> None:
    write_png(tmp_path / "odd.png", 8, 2, [bytes(PHOTO)], iCCP=b"name\0\0not compressed")
    with pytest.warns(UnreadProfile, match=r"odd.png cannot be used: its parts do not fit together"):
        assert one(tmp_path / "odd.png") == list(PHOTO)


def test_numbers_of_segments_are_no_colours(tmp_path: Path) -> None:
    for folder in ("images", "panoptic"):
        (tmp_path / folder).mkdir()
    Image.new("RGB", (8, 8), PHOTO).save(tmp_path / "images" / "a.png")
    Image.new("RGB", (8, 8), PHOTO).save(tmp_path / "panoptic" / "a.png", icc_profile=ADOBE)
    facts = {
        "images": [{"id": 1, "file_name": "a.png"}],
        "annotations": [{"image_id": 1, "file_name": "a.png"}],
    }
    (tmp_path / "panoptic.json").write_text(json.dumps(facts))
    found = read_segmented(tmp_path / "images", tmp_path / "panoptic.json", size=8)
    assert found.labels.unique().tolist() == [PHOTO[0] + 256 * PHOTO[1] + 256**2 * PHOTO[2]]


@pytest.fixture
def odd(tmp_path: Path) -> Path:
    """Six images, five of them with a profile that cannot be used."""
    (tmp_path / "odd").mkdir()
    for number in range(6):
        profile = None if number == 5 else b"junk"
        Image.new("RGB", (16, 16), PHOTO).save(tmp_path / "odd" / f"{number}.png", icc_profile=profile)
    return tmp_path / "odd"


@pytest.mark.parametrize("workers", [0, 1])
def test_training_warns_of_each_file_once_whoever_reads_it(odd: Path, workers: int) -> None:
    images = TrainingImages(ImageFolder(odd), size=16, seed=0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        list(image_batches(images, StepBatches(range(4), 6, [range(6)]), workers, pin=False))
    names = sorted(str(warning.message).split(" cannot")[0][-5:] for warning in caught)
    assert names == [f"{number}.png" for number in range(5)]


def test_a_command_prints_the_first_ones_and_counts_the_others(odd: Path) -> None:
    outcome = run("pae pack odd packed --size 16", odd.parent)
    assert outcome.code == 0
    lines = [line for line in outcome.everything.splitlines() if line.startswith("pae: warning: ")]
    assert len(lines) == 4
    assert all("cannot be used" in line for line in lines[:3])
    assert lines[3] == "pae: warning: 2 more warnings of this kind, 5 in all"
