"""Odd and hostile images: each is decoded as a viewer shows it, or refused by name; folders likewise."""

from __future__ import annotations

import errno
import io
import os
import struct
import threading
import unicodedata
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from openpae.data import images, packing
from openpae.data.crops import center_crop
from openpae.data.decode import BrokenImage, read_image
from openpae.data.images import ImageFolder
from openpae.data.label_maps import read_segmented
from openpae.data.packing import pack_images


def png(width: int, height: int, depth: int, color: int, rows: bytes, *extra: tuple[bytes, bytes]) -> bytes:
    """A PNG by hand, for what Pillow does not write."""
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)),
        *extra,
        (b"IDAT", zlib.compress(rows)),
        (b"IEND", b""),
    ]
    packed = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def pixels(path: Path) -> NDArray[np.uint8]:
    return np.asarray(read_image(path))


def refused(path: Path) -> str:
    with pytest.raises(BrokenImage) as caught:
        read_image(path)
    assert str(caught.value).startswith(f"{path} cannot be decoded: ")
    return str(caught.value)


# Decoded as shown


def test_sixteen_bits_keep_their_upper_half(tmp_path: Path) -> None:
    """Pillow's own conversion clips a 16-bit grey above 255 of 65,535 to white."""
    levels = (np.arange(64 * 64, dtype=np.uint32) * 16).astype(np.uint16).reshape(64, 64)
    for name in ("a.png", "a.tif"):
        Image.fromarray(levels).save(tmp_path / name)
    (tmp_path / "a.pgm").write_bytes(b"P5 64 64 65535\n" + levels.astype(">u2").tobytes())
    for name in ("a.png", "a.tif", "a.pgm"):
        assert (pixels(tmp_path / name) == (levels // 256)[..., None]).all()
    colours = np.array([0x1234, 0x8000, 0xFFFF], dtype=">u2").tobytes()
    (tmp_path / "rgb.png").write_bytes(png(1, 1, 16, 2, b"\0" + colours))
    assert pixels(tmp_path / "rgb.png").ravel().tolist() == [0x12, 0x80, 0xFF]


def test_transparent_parts_are_white_whatever_lies_under_them(tmp_path: Path) -> None:
    array = np.zeros((4, 4, 4), dtype=np.uint8)
    array[..., :3] = (10, 200, 30)
    array[:2, :, 3] = (0, 51, 128, 255)  # opacity of the columns; the lower half stays invisible
    Image.fromarray(array, "RGBA").save(tmp_path / "a.png")
    shown = pixels(tmp_path / "a.png")
    opacity = np.array([0, 51, 128, 255])[:, None] / 255
    expected = opacity * np.array([10, 200, 30]) + (1 - opacity) * 255
    assert np.abs(shown[0] - expected).max() <= 1
    assert (shown[2:] == 255).all()
    grey = Image.fromarray(array[..., 0]).convert("LA")
    grey.putalpha(0)
    grey.save(tmp_path / "b.png")
    palette = Image.new("P", (2, 2), 1)
    palette.putpalette([0, 0, 0, 200, 0, 0])
    palette.save(tmp_path / "c.png", transparency=1)
    assert (pixels(tmp_path / "b.png") == 255).all()
    assert (pixels(tmp_path / "c.png") == 255).all()


def test_photographs_are_turned_upright(tmp_path: Path) -> None:
    """All eight orientations of EXIF, against the transposes that the standard's table means."""
    upright = np.zeros((8, 16, 3), dtype=np.uint8)
    upright[:4, :4] = 255  # the upper left corner
    stored: dict[int, Callable[[NDArray[np.uint8]], NDArray[np.uint8]]] = {
        1: lambda x: x,
        2: lambda x: x[:, ::-1],
        3: lambda x: x[::-1, ::-1],
        4: lambda x: x[::-1],
        5: lambda x: x.transpose(1, 0, 2),
        6: lambda x: np.rot90(x, 1),
        7: lambda x: x[::-1, ::-1].transpose(1, 0, 2),
        8: lambda x: np.rot90(x, 3),
    }
    for orientation, turn in stored.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        for name in ("a.png", "a.webp"):
            image = Image.fromarray(np.ascontiguousarray(turn(upright)))
            image.save(tmp_path / name, exif=exif, **({"lossless": True} if name == "a.webp" else {}))
            assert (pixels(tmp_path / name) == upright).all(), (orientation, name)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")  # Pillow's own
@pytest.mark.parametrize("exif", [b"", b"nothing", b"II*\0\xff\xff\xff\xff", b"MM\0*\0\0\0\x08\xff\xff"])
def test_damaged_exif_does_not_spoil_sound_pixels(tmp_path: Path, exif: bytes) -> None:
    (tmp_path / "a.png").write_bytes(png(1, 1, 8, 2, b"\0\1\2\3", (b"eXIf", exif)))
    assert pixels(tmp_path / "a.png").ravel().tolist() == [1, 2, 3]
    Image.new("RGB", (8, 8), (9, 9, 9)).save(tmp_path / "a.jpg", exif=b"Exif\0\0" + exif)
    assert (pixels(tmp_path / "a.jpg") == 9).all()


def test_inks_become_colours(tmp_path: Path) -> None:
    for inks, colour in (((0, 0, 0, 0), 255), ((0, 0, 0, 255), 0), ((0, 0, 0, 102), 153)):
        Image.new("CMYK", (8, 8), inks).save(tmp_path / "a.jpg", quality=100)
        assert np.abs(pixels(tmp_path / "a.jpg").astype(int) - colour).max() <= 2
    Image.new("CMYK", (8, 8), (255, 0, 0, 0)).save(tmp_path / "a.tif")
    assert (pixels(tmp_path / "a.tif") == (0, 255, 255)).all()


def test_the_content_tells_the_format_and_not_the_name(tmp_path: Path) -> None:
    """ImageNet's n02105855_2933.JPEG is a PNG."""
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (1, 2, 3)).save(buffer, "PNG")
    (tmp_path / "a.JPEG").write_bytes(buffer.getvalue())
    assert (pixels(tmp_path / "a.JPEG") == (1, 2, 3)).all()


@pytest.mark.parametrize("size", [(1, 1), (1, 100), (100, 1), (3, 300)])
def test_thin_images_fill_their_square(tmp_path: Path, size: tuple[int, int]) -> None:
    Image.new("RGB", size, (7, 8, 9)).save(tmp_path / "a.png")
    square = center_crop(read_image(tmp_path / "a.png"), 16)
    assert square.shape == (3, 16, 16)
    assert (square == np.array([7, 8, 9])[:, None, None]).all()


# Refused


def test_animations_are_refused_and_their_still_kin_are_not(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), (60 * number, 0, 0)) for number in range(3)]
    for ending in ("gif", "png", "webp", "tif"):
        frames[0].save(tmp_path / f"still.{ending}")
        assert pixels(tmp_path / f"still.{ending}").shape == (8, 8, 3)
        frames[0].save(tmp_path / f"moving.{ending}", save_all=True, append_images=frames[1:])
        assert "it has 3 frames or pages, save one as a still image" in refused(tmp_path / f"moving.{ending}")


def test_a_phones_second_picture_is_no_animation(tmp_path: Path) -> None:
    """MPO: a JPEG with a further view or a gain map behind it; every viewer shows the first."""
    first, second = (Image.new("RGB", (8, 8), colour) for colour in ((200, 0, 0), (0, 0, 200)))
    first.save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=[second])
    assert (np.abs(pixels(tmp_path / "a.jpg").astype(int) - (200, 0, 0)) < 4).all()


def test_a_decompression_bomb_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    """A few bytes that claim 400 million pixels; and a small thin strip that resizing would blow up."""
    (tmp_path / "bomb.png").write_bytes(png(20_000, 20_000, 8, 2, bytes(1000)))
    assert "exceeds limit of 178956970 pixels" in refused(tmp_path / "bomb.png")
    Image.new("L", (1, 60_000)).save(tmp_path / "strip.png")
    assert "its sides are 1 x 60000 pixels, more than 100 to 1; crop it" in refused(tmp_path / "strip.png")


@pytest.mark.parametrize(("mode", "name"), [("F", "a.tif"), ("I", "a.tif")])
def test_numbers_without_a_known_range_are_refused(tmp_path: Path, mode: str, name: str) -> None:
    Image.new(mode, (4, 4), 70_000).save(tmp_path / name)
    assert f"its pixels are 32-bit numbers (mode {mode}) of unknown range" in refused(tmp_path / name)


def test_what_is_no_image_is_refused_and_starts_no_program(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A web page, an empty file, and a PostScript file, for which Pillow would call Ghostscript."""
    monkeypatch.setattr("subprocess.Popen.__init__", lambda *_, **__: pytest.fail("a program was started"))
    for content in (b"<html>404</html>", b"", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n"):
        (tmp_path / "a.jpg").write_bytes(content)
        assert "no known image format (BMP GIF JPEG PNG PPM TIFF WEBP)" in refused(tmp_path / "a.jpg")


def test_a_file_that_cannot_be_read_is_named_with_the_systems_reason(tmp_path: Path) -> None:
    os.symlink("/proc/self/mem", tmp_path / "a.png")  # opens, and fails to be read, even for root
    assert "cannot be decoded: Input/output error" in refused(tmp_path / "a.png")
    (tmp_path / "b.png").mkdir()
    assert "cannot be decoded: Is a directory" in refused(tmp_path / "b.png")


@pytest.mark.parametrize(
    "fault", [MemoryError(), OSError(errno.EMFILE, "Too many open files"), OSError(errno.ENOMEM, "no")]
)
def test_want_of_the_machine_is_not_blamed_on_the_file(
    tmp_path: Path, fault: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With --skip-broken, sound images would be left out."""

    def fail(*_: object, **__: object) -> None:
        raise fault

    Image.new("L", (1, 1)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(type(fault)):
        read_image(tmp_path / "a.png")


# Folders


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes of one image each."""
    for name in ("cat", "dog"):
        (tmp_path / "images" / name).mkdir(parents=True)
        Image.new("RGB", (4, 4)).save(tmp_path / "images" / name / "1.png")
    return tmp_path / "images"


def test_links_that_lead_nowhere_are_named(folder: Path) -> None:
    """A disk that is not mounted must not take a class away in silence."""
    for name in ("eel", "dog/2.png"):
        os.symlink(folder / "gone", folder / name)
        with pytest.raises(
            FileNotFoundError, match=f"{name} is a link that leads nowhere; repair or remove it"
        ):
            ImageFolder(folder)
        (folder / name).unlink()
    os.symlink(folder / "self", folder / "self")
    with pytest.raises(FileNotFoundError, match="self is a link that leads nowhere"):
        ImageFolder(folder)


def test_loops_inside_a_class_add_nothing(folder: Path) -> None:
    (folder / "dog" / "deep").mkdir()
    os.symlink(folder / "dog", folder / "dog" / "deep" / "up")
    os.symlink(folder / "dog" / "deep", folder / "dog" / "again")
    assert ImageFolder(folder).names == ["cat/1.png", "dog/1.png"]


@pytest.mark.parametrize(
    ("link", "to"), [("again", "."), ("puppy", "dog"), ("dog/more", "cat"), ("dog/up", ".")]
)
def test_one_folder_cannot_be_two_classes(folder: Path, link: str, to: str) -> None:
    os.symlink(folder / to, folder / link)
    with pytest.raises(ValueError, match=r"are the same folder; an image cannot be of two classes"):
        ImageFolder(folder)


def test_a_class_that_is_a_link_to_elsewhere_is_a_class(folder: Path, image_folder: Path) -> None:
    os.symlink(image_folder / "boxes", folder / "box")
    assert ImageFolder(folder).classes == ["box", "cat", "dog"]
    assert len(ImageFolder(folder)) == 8


@pytest.mark.parametrize("twin", ["Cat", "CAT", unicodedata.normalize("NFD", "caf\xe9")])
def test_classes_that_read_alike_are_refused(folder: Path, twin: str) -> None:
    (folder / "caf\xe9").mkdir()
    Image.new("RGB", (4, 4)).save(folder / "caf\xe9" / "1.png")
    (folder / twin).mkdir()
    Image.new("RGB", (4, 4)).save(folder / twin / "1.png")
    with pytest.raises(ValueError, match=r"differ in case or encoding only; rename one, or merge them"):
        ImageFolder(folder)


def test_hidden_files_are_passed_over_and_undecoded_ones_are_not(folder: Path) -> None:
    """macOS leaves ._1.png beside 1.png; a HEIC photo must be named and not be left out."""
    (folder / "dog" / "._1.png").write_bytes(b"resource fork")
    (folder / "dog" / ".thumbnails").mkdir()
    (folder / "dog" / ".thumbnails" / "1.png").write_bytes(b"x")
    assert ImageFolder(folder).names == ["cat/1.png", "dog/1.png"]
    (folder / "dog" / "2.HEIC").write_bytes(b"\0\0\0\x18ftypheic")
    with pytest.raises(BrokenImage, match=r"2.HEIC cannot be decoded: no known image format"):
        pack_images(ImageFolder(folder), folder.parent / "packed", size=4)


def test_a_folder_that_may_not_be_read_is_an_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root may read anything, so the system's answer is acted out."""
    scan = os.scandir

    def guarded(path: str) -> object:
        if path.endswith("dog"):
            raise PermissionError(13, "Permission denied", path)
        return scan(path)

    monkeypatch.setattr("os.scandir", guarded)
    with pytest.raises(PermissionError, match="dog"):
        ImageFolder(folder)


def test_files_come_in_the_order_of_their_parts(tmp_path: Path) -> None:
    names = ["a/b/1.png", "a/b-c/1.png", "a/b.png", "a/z.png", "a-b/1.png", "b/1.png"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (1, 1)).save(tmp_path / name)
    assert ImageFolder(tmp_path).names == [
        path.relative_to(tmp_path).as_posix() for path in sorted(tmp_path.rglob("*.png"))
    ]


# Memory


def test_packing_holds_few_images_at_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shard of 4,096 images of 256 pixels is 800 MB; what waits to be written is bounded instead."""
    for number in range(300):
        Image.new("L", (1, 1), number % 256).save(folder / "dog" / f"{number:03d}.png")
    source, lock, read, written, most = ImageFolder(folder), threading.Lock(), 0, 0, 0
    decode, part = images.read_image, packing.Part

    def reading(path: Path) -> Image.Image:
        nonlocal read, most
        with lock:
            read += 1
            most = max(most, read - written)
        return decode(path)

    def writing(**content: object) -> object:
        nonlocal written
        with lock:
            written += 1
        return part(**content)  # type: ignore[arg-type]

    monkeypatch.setattr(images, "read_image", reading)
    monkeypatch.setattr(packing, "Part", writing)
    assert len(pack_images(source, folder.parent / "packed", size=4, per_shard=1000)) == 302
    assert most <= 66


# Label maps


def test_label_maps_that_cannot_be_meant_are_named(tmp_path: Path) -> None:
    images, maps = tmp_path / "images", tmp_path / "maps"
    images.mkdir()
    maps.mkdir()
    Image.new("RGB", (8, 8)).save(images / "1.jpg")
    for content, message in (
        (b"", "1.png cannot be decoded: no known image format"),
        (png(8, 8, 8, 0, bytes(72))[:45], "1.png cannot be decoded: image file is truncated"),
    ):
        (maps / "1.png").write_bytes(content)
        with pytest.raises(BrokenImage, match=message):
            read_segmented(images, maps, size=8)
    Image.new("L", (8, 8), 3).save(maps / "1.png")
    Image.new("RGB", (8, 8)).save(images / "1.png")
    with pytest.raises(ValueError, match=r"1.jpg and 1.png would share a label map"):
        read_segmented(images, maps, size=8)


@pytest.mark.parametrize(
    "content",
    [
        '{"images": 3}',
        '{"images": [3]}',
        '{"images": [{"id": 1, "file_name": 5}], "annotations": []}',
        "[" * 9999,
    ],
)
def test_a_panoptic_json_of_another_shape_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "p.json").write_text(content)
    with pytest.raises(ValueError, match=r"p.json is (no COCO panoptic JSON|damaged)"):
        read_segmented(tmp_path, tmp_path / "p.json", size=8)
