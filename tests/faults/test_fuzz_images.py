"""Whatever bytes an image file holds, it gives an image or one line with its name, in bounded time."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from openpae.data.crops import center_crop
from openpae.data.decode import BrokenImage, read_image


def encoded() -> dict[str, bytes]:
    """One small picture in every format that is decoded, in several modes."""
    x, y = np.meshgrid(np.arange(24), np.arange(16))
    colour = Image.fromarray(np.stack([9 * x, 13 * y, 5 * (x + y)], axis=-1).astype(np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    kinds: dict[str, tuple[str, str, dict[str, object]]] = {
        "png": ("RGB", "PNG", {"exif": exif}),
        "png palette": ("P", "PNG", {"transparency": 3}),
        "png grey alpha": ("LA", "PNG", {}),
        "png interlaced 1 bit": ("1", "PNG", {}),
        "apng": ("RGB", "PNG", {"save_all": True, "append_images": [colour]}),
        "jpeg": ("RGB", "JPEG", {"exif": exif}),
        "jpeg progressive": ("L", "JPEG", {"progressive": True}),
        "jpeg cmyk": ("CMYK", "JPEG", {}),
        "mpo": ("RGB", "MPO", {"save_all": True, "append_images": [colour]}),
        "gif": ("P", "GIF", {}),
        "gif animated": ("P", "GIF", {"save_all": True, "append_images": [colour.convert("P")]}),
        "webp": ("RGB", "WEBP", {}),
        "webp lossless": ("RGBA", "WEBP", {"lossless": True, "exif": exif}),
        "tiff": ("RGB", "TIFF", {}),
        "tiff packed": ("RGBA", "TIFF", {"compression": "tiff_lzw"}),
        "tiff float": ("F", "TIFF", {"compression": "tiff_adobe_deflate"}),
        "bmp": ("RGB", "BMP", {}),
        "bmp palette": ("P", "BMP", {}),
        "ppm": ("RGB", "PPM", {}),
        "pgm": ("L", "PPM", {}),
    }
    files = {}
    for name, (mode, kind, options) in kinds.items():
        buffer = io.BytesIO()
        colour.convert(mode).save(buffer, kind, **options)
        files[name] = buffer.getvalue()
    return files


FILES = encoded()


@st.composite
def damaged(draw: st.DrawFn, sound: bytes) -> bytes:
    """Bytes changed, cut out, doubled or put in; headers more often, for there readers stumble."""
    content = bytearray(sound)
    for _ in range(draw(st.integers(1, 6))):
        within = min(len(content), 100) if draw(st.booleans()) else len(content)
        at = draw(st.integers(0, within))
        match draw(st.sampled_from(["set", "set", "flip", "cut", "end", "double", "insert"])):
            case "set":
                content[at : at + 1] = draw(st.sampled_from([b"\0", b"\1", b"\x7f", b"\x80", b"\xff"]))
            case "flip":
                content[at : at + 1] = bytes(
                    byte ^ 1 << draw(st.integers(0, 7)) for byte in content[at : at + 1]
                )
            case "cut":
                del content[at : at + draw(st.integers(1, 20))]
            case "end":
                del content[at:]
            case "double":
                content[at:at] = content[at : at + draw(st.integers(1, 40))]
            case "insert":
                content[at:at] = draw(st.binary(max_size=8))
    return bytes(content)


def decoded(file: Path) -> Image.Image | str:
    try:
        return read_image(file)
    except BrokenImage as error:
        return str(error)


def check(content: bytes, file: Path) -> None:
    file.write_bytes(content)
    image = decoded(file)
    if isinstance(image, str):
        begins = f"{file} cannot be decoded: "
        assert image.startswith(begins)
        assert image[len(begins) :].strip()
        assert "\n" not in image
        return
    assert image.mode == "RGB"
    if image.width * image.height < 10**7:
        assert center_crop(image, 8).shape == (3, 8, 8)


# What Pillow says of an odd file is no error; under -W error it is one, and read_image passes it on.
quiet = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::PIL.Image.DecompressionBombWarning")


@quiet
@settings(max_examples=50, deadline=5000)
@pytest.mark.parametrize("name", FILES)
@given(data=st.data())
def test_damaged_bytes_give_an_image_or_one_line(
    name: str, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    check(data.draw(damaged(FILES[name])), tmp_path_factory.getbasetemp() / "fuzzed.img")


@quiet
@pytest.mark.slow
@settings(max_examples=1000, deadline=10_000, derandomize=False)
@pytest.mark.parametrize("name", FILES)
@given(data=st.data())
def test_many_damaged_bytes_give_an_image_or_one_line(
    name: str, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    check(data.draw(damaged(FILES[name])), tmp_path_factory.getbasetemp() / "fuzzed.img")


@quiet
@settings(deadline=5000)
@given(
    start=st.sampled_from([content[:12] for content in FILES.values()]) | st.binary(max_size=4),
    rest=st.binary(max_size=200),
)
def test_noise_behind_a_formats_first_bytes_gives_an_image_or_one_line(
    start: bytes, rest: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    check(start + rest, tmp_path_factory.getbasetemp() / "fuzzed.img")
