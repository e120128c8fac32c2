"""Rows of the table of errors: images and folders of images."""

from __future__ import annotations

import io
import os
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from PIL import Image

from tests.faults.running import TOKENIZER, Case
from tests.faults.spoiling import (
    PACK,
    bomb,
    both,
    copied,
    edited,
    frames,
    nothing,
    oriented,
    ran,
    saved,
    written,
)

BROKEN = both(
    edited("images/cats/1.png", lambda content: content[:200]),
    written("images/dogs/9.jpg", "<html>404</html>"),
)
LIBRARY = r"(?<=cannot be decoded: )[^;]*"


def image(given: str, spoil: Callable[[], object], says: str, **more: object) -> Case:
    return Case(
        group="Images",
        given=given,
        spoil=spoil,
        command=PACK,
        says=says + "; remove the file, or pass --skip-broken$",
        **more,  # type: ignore[arg-type]
    )


def taken(given: str, spoil: Callable[[], object]) -> Case:
    return Case(
        group="Images that are taken as a viewer shows them",
        given=given,
        spoil=spoil,
        command=PACK,
        says=r"^7 images of 2 classes in out labels: 0 cats \(4\), 1 dogs \(3\)$",
        code=0,
    )


def folder(given: str, spoil: Callable[[], object], says: str, command: str = PACK, **more: object) -> Case:
    return Case(
        group="Folders of images",
        given=given,
        spoil=spoil,
        command=command,
        says=says,
        **more,  # type: ignore[arg-type]
    )


def archive(given: str, spoil: Callable[[], object], says: str, source: str, foreign: str = "") -> Case:
    return Case(
        group="Images in other files",
        given=given,
        spoil=spoil,
        command=f"pae pack {source} out --size 16",
        says=says,
        foreign=foreign,
    )


def tarred(name: str, link: str = "") -> Callable[[], object]:
    def make() -> None:
        with tarfile.open("images.tar", "w") as tar:
            info = tar.gettarinfo("images/cats/0.png", arcname=name)
            info.type, info.linkname = (tarfile.SYMTYPE, link) if link else (info.type, "")
            tar.addfile(info, None if link else io.BytesIO(Path("images/cats/0.png").read_bytes()))

    return make


def zipped_zeros() -> None:
    with zipfile.ZipFile("images.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("cats/0.bmp", bytes(2**25))


IMAGE_CASES: tuple[Case, ...] = (
    image(
        "a PNG cut short",
        edited("images/cats/1.png", lambda content: content[:200]),
        r"images/cats/1.png cannot be decoded: image file is truncated.*",
        foreign=LIBRARY,
    ),
    image(
        "a web page named .jpg",
        written("images/cats/9.jpg", "<html>404</html>"),
        r"9.jpg cannot be decoded: no known image format \(BMP GIF JPEG PNG PPM TIFF WEBP\)",
    ),
    image(
        "an empty file",
        written("images/cats/9.png", ""),
        "9.png cannot be decoded: no known image format .*",
    ),
    image("an animated GIF", frames("gif"), "9.gif .*: it has 3 frames or pages, save one as .*"),
    image("an animated PNG", frames("png"), "9.png .*: it has 3 frames or pages, save one as .*"),
    image("an animated WebP", frames("webp"), "9.webp cannot be decoded: it has 3 frames or pages, save .*"),
    image("a TIFF of several pages", frames("tif"), "9.tif cannot be decoded: it has 3 frames or pages, .*"),
    image(
        "32-bit pixels, whose range is not known",
        saved("images/cats/9.tif", Image.new("F", (4, 4))),
        r"its pixels are 32-bit numbers \(mode F\) of unknown range, save 8 or 16 bits",
    ),
    image(
        "a strip of 1 x 60,000 pixels",
        saved("images/cats/9.png", Image.new("L", (1, 60_000))),
        "its sides are 1 x 60000 pixels, more than 100 to 1; crop it",
    ),
    image(
        "a decompression bomb (a few bytes that claim 400 million pixels)",
        bomb,
        r"9.png cannot be decoded: Image size \(400000000 pixels\) exceeds limit of 178956970 pixels.*",
        foreign=LIBRARY,
    ),
    image(
        "a HEIC photo",
        written("images/cats/9.heic", b"\0\0\0\x18ftypheic"),
        "9.heic .* no known image format .*",
    ),
    image(
        "a file that the system cannot read",
        lambda: os.symlink("/proc/self/mem", "images/cats/9.png"),
        "9.png cannot be decoded: Input/output error",
    ),
    Case(
        group="Images",
        given="two broken files, and the wish to skip them",
        spoil=BROKEN,
        command=f"{PACK} --skip-broken",
        says=r"^5 images of 2 classes in out labels: 0 cats \(2\), 1 dogs \(3\) "
        "left out 2 broken files: .*cats/1.png .*; .*dogs/9.jpg .*",
        code=0,
        foreign=r"image file is truncated[^;]*",
    ),
    Case(
        group="Images",
        given="a broken file whose name is not UTF-8",
        spoil=lambda: Path(os.fsdecode(b"images/cats/caf\xe9.png")).write_text("x"),
        command=f"{PACK} --skip-broken",
        says=r"^6 images of 2 classes in out labels: 0 cats \(3\), 1 dogs \(3\) "
        r"left out 1 broken files: images/cats/caf\\udce9.png cannot",
        code=0,
    ),
    Case(
        group="Images",
        given="nothing but broken files, and the wish to skip them",
        spoil=lambda: [path.write_text("x") for path in Path("images").rglob("*.png")],
        command=f"{PACK} --skip-broken",
        says="out would hold no rows: all 6 items were skipped",
    ),
    Case(
        group="Images",
        given="a broken file in training",
        spoil=written("images/cats/1.png", "x"),
        command=TOKENIZER,
        says="1.png cannot be decoded: .*; remove the file, or pass --data.skip-broken$",
    ),
    Case(
        group="Images",
        given="a broken file in training, and the wish to skip it",
        spoil=written("images/cats/1.png", "x"),
        command=f"{TOKENIZER} --data.skip-broken --loop.steps 3",
        says="^images/cats/1.png cannot be decoded: .*; another image takes its place$",
        code=0,
    ),
    Case(
        group="Images",
        given="a broken file, asked about",
        spoil=written("images/cats/1.png", "x"),
        command="pae info images --verify",
        says="images/cats/1.png cannot be decoded: no known image format",
    ),
    taken("CMYK", saved("images/cats/9.jpg", Image.new("CMYK", (8, 8)))),
    taken("16-bit grey (its upper 8 bits)", saved("images/cats/9.png", Image.new("I;16", (8, 8)))),
    taken("a palette", saved("images/cats/9.png", Image.new("P", (8, 8)))),
    taken("transparent parts (on white)", saved("images/cats/9.png", Image.new("RGBA", (8, 8)))),
    taken("turned by EXIF (upright)", oriented),
    taken("a single pixel", saved("images/cats/9.png", Image.new("RGB", (1, 1)))),
    taken("a JPEG named .png", saved("images/cats/9.png", Image.new("RGB", (8, 8)), format="JPEG")),
    taken(
        "a name that is not UTF-8",
        lambda: (
            os.rename("images/cats/1.png", b"images/cats/caf\xe9.png")
            or shutil.copy("images/cats/0.png", "images/cats/9.png")
        ),
    ),
    folder("no folder", nothing, "^no image folder at imagse$", "pae pack imagse out"),
    folder(
        "an empty folder",
        lambda: os.mkdir("empty"),
        "no images in empty; known endings: ",
        "pae pack empty out",
    ),
    folder(
        "an empty class", lambda: os.mkdir("images/eels"), "images has 1 class folders without images: eels"
    ),
    folder(
        "images beside class folders",
        lambda: shutil.copy("images/cats/0.png", "images/0.png"),
        r"images holds images both directly and in subfolders \(cats\); keep one subfolder per class",
    ),
    folder(
        "classes that differ in case only",
        copied("images/cats", "images/Cats"),
        "the class folders 'Cats' and 'cats' of images differ in case or encoding only; rename one, or merge",
    ),
    folder(
        "a link that leads nowhere",
        lambda: os.symlink("/not/mounted", "images/eels"),
        "images/eels is a link that leads nowhere; repair or remove it",
    ),
    folder(
        "a link to itself",
        lambda: os.symlink("eels", "images/eels"),
        "images/eels is a link that leads nowhere; repair or remove it",
    ),
    folder(
        "a class that leads back to the folder",
        lambda: os.symlink("..", "images/cats/up") or os.symlink(".", "images/all"),
        "of images are the same folder; an image cannot be of two classes: remove the link",
    ),
    folder(
        "two images of one name, to be written as PNGs",
        saved("images/cats/1.jpg", Image.new("RGB", (8, 8))),
        "cats/1.jpg and cats/1.png would both become out/cats/1.png; rename one",
        "pae reconstruct tokenizer images out",
    ),
    folder(
        "a target that holds something else",
        written("out/thesis.tex", "years of work"),
        "out is not empty and holds no images; name a new folder",
    ),
    folder(
        "a target begun with another size",
        ran("pae pack images out --size 8"),
        r"out was begun with another shape \(\[3, 8, 8\] there, \[3, 16, 16\] now\); delete the folder",
    ),
    folder(
        "a disk that fills up",
        nothing,
        "no room for out/00000.npy: .* took 5,000 of 18,432 bytes and no more .*; free some",
        "pae pack images out --size 32",
        largest_file=5_000,
        foreign=r"[\d,]+(?= are free)",
    ),
    archive(
        "a file of another kind", written("images.h5", "HDF"), "no form that is read; known: cl", "images.h5"
    ),
    archive(
        "a label file without one of the images",
        written("labels.csv", "0.png,cat\n"),
        "labels.csv has no label for 2 images of images/cats, such as 1.png",
        "images/cats#labels.csv",
    ),
    archive(
        "a name that leads out of a tar",
        tarred("../0.png"),
        "images.tar holds the name '../0.png'; names must stay inside of the archive",
        "images.tar",
    ),
    archive(
        "a link in a tar",
        tarred("cats/0.png", link="/etc/passwd"),
        "images.tar holds cats/0.png, a link, device or sparse file",
        "images.tar",
    ),
    archive(
        "a zip bomb",
        zipped_zeros,
        r"images.zip holds cats/0.bmp, [\d,]+ bytes that would become 33,554,432",
        "images.zip",
        foreign=r"[\d,]+(?= bytes that)",
    ),
)
