"""Which image files a folder holds, class by class."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterable
from pathlib import Path

EXTENSIONS = {
    *(".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg"),
    *(".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"),
}
"""Endings of what is taken as an image; the format is told by the content."""
_TRAINING = {"train", "training"}
_HELD_OUT = {"val", "valid", "validation", "test", "testing", "held-out", "heldout"}
_UNDECODED = {".avif", ".heic", ".heif", ".jp2"}  # images too: named as broken rather than passed over


def image_names(root: Path) -> dict[str, list[str]]:
    """Names of the image files below a folder, of each class in the order of their parts.

    One subfolder is one class; images in the folder itself are the class "all". Names that begin with a dot
    are passed over. Links are followed; one that leads back up inside its class adds nothing.

    Raises:
        FileNotFoundError: no such folder, no images in it, or a link in it that leads nowhere.
        ValueError: images both in the folder and in subfolders, a class without images, the splits of a data
            set (train and val) in place of classes, or two classes of the same folder or of names that only
            differ in case.
        PermissionError: a folder that may not be read.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"no image folder at {root}")
    entries = _entries(str(root))
    flat = [name for name, is_folder in entries if not is_folder]
    seen = {os.path.realpath(root): "."}
    found = {name: _images_below(root, name, seen) for name, is_folder in entries if is_folder}
    if flat and any(found.values()):
        raise ValueError(
            f"{root} holds images both directly and in subfolders ({next(k for k in found if found[k])}); "
            "keep one subfolder per class, or all images in one folder"
        )
    if flat:
        return {"all": flat}
    if not any(found.values()):
        raise FileNotFoundError(f"no images in {root}; known endings: {' '.join(sorted(EXTENSIONS))}")
    _check_splits(root, found)
    if empty := [name for name, files in found.items() if not files]:
        raise ValueError(f"{root} has {len(empty)} class folders without images: {', '.join(empty[:5])}")
    _check_alike(root, found)
    return found


def _entries(folder: str) -> list[tuple[str, bool]]:
    """Image files and folders in a folder, by name: (name, whether it is a folder)."""
    found: list[tuple[str, bool]] = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_symlink() and not os.path.exists(entry.path):
                raise FileNotFoundError(f"{entry.path} is a link that leads nowhere; mend or remove it")
            if entry.is_dir():
                found.append((entry.name, True))
            elif os.path.splitext(entry.name)[1].lower() in EXTENSIONS | _UNDECODED and entry.is_file():
                found.append((entry.name, False))
    return sorted(found)


def _images_below(root: Path, top: str, seen: dict[str, str]) -> list[str]:
    """Names below the root of all images in the folder `top` of it.

    `seen` holds the real folders of all classes so far, each with the first name it was found under.
    """
    images: list[str] = []
    left = [(top, True)]
    while left:
        name, is_folder = left.pop()
        if not is_folder:
            images.append(name)
            continue
        path = os.path.join(root, name)
        first = seen.setdefault(os.path.realpath(path), name)
        if first == name:
            left += [(f"{name}/{inside}", kind) for inside, kind in reversed(_entries(path))]
        elif first.split("/")[0] != top:
            raise ValueError(
                f"{name} and {first} of {root} are the same folder; an image cannot be of two classes: "
                "remove the link"
            )
    return images


def _check_splits(root: Path, classes: Iterable[str]) -> None:
    """Refuse a root whose subfolders are the splits of a data set; their subfolders are the classes."""
    training = [name for name in classes if name.casefold() in _TRAINING]
    held_out = [name for name in classes if name.casefold() in _HELD_OUT]
    if training and held_out:
        raise ValueError(
            f"{root} holds the splits {training[0]} and {held_out[0]}, not classes; give one of them, "
            f"such as {root / training[0]}"
        )


def _check_alike(root: Path, classes: Iterable[str]) -> None:
    """Refuse class names that another file system, or a reader, takes for one."""
    first: dict[str, str] = {}
    for name in classes:
        other = first.setdefault(unicodedata.normalize("NFC", name).casefold(), name)
        if other != name:
            raise ValueError(
                f"the class folders {other!r} and {name!r} of {root} differ in case or encoding only; "
                "rename one, or merge them"
            )
