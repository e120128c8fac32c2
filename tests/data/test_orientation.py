"""Images come upright in every mode and format, and transparency is that of the file's own levels."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, PngImagePlugin

from openpae.data.decode import read_image
from openpae.data.label_maps import read_segmented
from tests.data.icc import write_png

Array = NDArray[np.uint8]

# The meaning of EXIF's orientation: where the stored first row and first column are to be seen.
VIEWED: dict[int, Callable[[Array], Array]] = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: a.swapaxes(0, 1)[:, ::-1],
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: a.swapaxes(0, 1)[::-1],
}


def drawn(mode: str) -> Image.Image:
    """8 x 6 pixels, no two rows or columns alike, some of them transparent where the mode knows it."""
    x, y = np.meshgrid(np.arange(8), np.arange(6))
    colour = Image.fromarray(np.stack([30 * x, 40 * y, 10 * x * y % 256], axis=-1).astype(np.uint8))
    if mode == "I;16":
        return Image.fromarray((7000 * x + 900 * y).astype(np.uint16))
    if mode in ("RGBA", "LA"):
        colour.putalpha(Image.fromarray((20 * x + 16 * y).astype(np.uint8)))
    return colour.quantize(32) if mode == "P" else colour.convert(mode)


CASES = [
    *(("png", mode, {}) for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")),
    ("png", "P", {"transparency": 3}),
    ("png", "P", {"transparency": bytes(range(0, 256, 8))}),
    ("png", "L", {"transparency": 76}),
    ("png", "RGB", {"transparency": (30, 40, 10)}),
    *(("jpg", mode, {}) for mode in ("L", "RGB", "CMYK")),
    *(("webp", mode, {"lossless": True}) for mode in ("RGB", "RGBA")),
    *(("tif", mode, {}) for mode in ("1", "L", "RGB", "RGBA", "CMYK", "I;16")),
    ("tif", "RGB", {"compression": "tiff_lzw"}),
]


@pytest.mark.parametrize(("ending", "mode", "options"), CASES)
def test_every_mode_and_format_is_turned_as_exif_says(
    tmp_path: Path, ending: str, mode: str, options: dict[str, object]
) -> None:
    image = drawn(mode)
    image.save(tmp_path / f"plain.{ending}", **options)
    stored = np.asarray(read_image(tmp_path / f"plain.{ending}"))
    for orientation, view in VIEWED.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        image.save(tmp_path / f"turned.{ending}", exif=exif, **options)
        seen = np.asarray(read_image(tmp_path / f"turned.{ending}"))
        assert np.array_equal(seen, view(stored)), orientation


def test_exif_that_makes_no_sense_turns_nothing(tmp_path: Path) -> None:
    for number, content in enumerate((b"", b"junk", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff")):
        drawn("RGBA").save(tmp_path / f"{number}.png", exif=content)
        assert read_image(tmp_path / f"{number}.png").size == (8, 6)
    exif = Image.Exif()
    exif[0x0112] = 9
    drawn("RGB").save(tmp_path / "nine.png", exif=exif)
    assert read_image(tmp_path / "nine.png").size == (8, 6)


@pytest.mark.parametrize(
    ("bits", "colour", "rows", "key", "seen"),
    [
        # Levels 0, 1, 2, 3 of two bits; the third is transparent, so white. The others spread over 0 to 255.
        (2, 0, [b"\x1b"], (2,), [0, 85, 255, 255]),
        (4, 0, [b"\x0f\x5a"], (5,), [0, 255, 255, 170]),
        (1, 0, [b"\x50"], (0,), [255, 255, 255, 255, 255, 255, 255, 255]),
        (8, 0, [b"\x00\x64\xc8"], (100,), [0, 255, 200]),
        # In 16 bits 25,600 and 25,601 share their upper half; only one of them is transparent.
        (16, 0, [struct.pack(">3H", 25600, 25601, 40000)], (25600,), [255, 100, 156]),
        (16, 2, [struct.pack(">6H", 0, 0, 0, 51200, 51200, 51200)], (51200,) * 3, [0, 255]),
    ],
)
def test_the_transparent_level_of_a_png_is_meant_in_its_own_bits(
    tmp_path: Path, bits: int, colour: int, rows: list[bytes], key: tuple[int, ...], seen: list[int]
) -> None:
    write_png(tmp_path / "a.png", bits, colour, rows, tRNS=struct.pack(f">{len(key)}H", *key))
    assert np.asarray(read_image(tmp_path / "a.png"))[0, :, 0].tolist() == seen


def test_16_bits_and_a_transparent_level_are_turned_together(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    levels = np.zeros((4, 6), np.uint16)
    levels[:, :3] = 40000
    Image.fromarray(levels).save(tmp_path / "a.png", exif=exif, transparency=40000)
    found = np.asarray(read_image(tmp_path / "a.png"))
    assert found.shape == (6, 4, 3)
    assert (found[:3] == 255).all()
    assert not found[3:].any()


def test_a_png_with_megabytes_of_text_is_read_and_an_endless_one_is_not(tmp_path: Path) -> None:
    info = PngImagePlugin.PngInfo()
    info.add_itxt("XML:com.adobe.xmp", "x" * 5_000_000, zip=True)
    info.add_text("notes", "y" * 3_000_000)
    drawn("RGB").save(tmp_path / "text.png", pnginfo=info)
    assert np.array_equal(np.asarray(read_image(tmp_path / "text.png")), np.asarray(drawn("RGB")))
    info.add_itxt("bomb", "z" * 80_000_000, zip=True)
    drawn("RGB").save(tmp_path / "bomb.png", pnginfo=info)
    with pytest.raises(ValueError, match=r"bomb.png cannot be decoded: .*large"):
        read_image(tmp_path / "bomb.png")


def test_label_maps_are_turned_with_their_images(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    for folder in ("images", "maps"):
        (tmp_path / folder).mkdir()
    labels = np.repeat(np.arange(4, dtype=np.uint8), 8).reshape(4, 8)
    Image.fromarray(labels).save(tmp_path / "maps" / "a.png", exif=exif)
    Image.fromarray(labels * 60).convert("RGB").save(tmp_path / "images" / "a.webp", exif=exif, lossless=True)
    found = read_segmented(tmp_path / "images", tmp_path / "maps", size=(8, 4))
    assert found.labels[0, 0].tolist() == [3, 2, 1, 0]
    assert (found.images[0, 0] == 60 * found.labels[0]).all()
