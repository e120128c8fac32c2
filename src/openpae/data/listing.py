"""List the image files of a folder by class."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterable
from pathlib import Path

EXTENSIONS = {
    *(".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg"),
    *(".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"),
}
"""Suffixes of image files. The content determines the format."""
_TRAINING = {"train", "training"}
_HELD_OUT = {"val", "valid", "validation", "test", "testing", "held-out", "heldout"}
_UNDECODED = {
    ".avif",
    ".heic",
    ".heif",
    ".jp2",
}  # listed too, so that they are reported as broken and not skipped


def image_names(root: Path) -> dict[str, list[str]]:
    """Sorted names of the image files of each class, relative to the root.

    Each subfolder is a class. Images directly in the root form one class "all". Names that begin with a dot
    are skipped. Links are followed; a link to a folder above it in the same class adds nothing.

    Raises:
        FileNotFoundError: no such folder, no images in it, or a broken link.
        ValueError: images both in the folder and in subfolders, a class without images, splits of a data set
            (train and val) in place of classes, or two classes with the same folder or with names that differ
            only in case.
        PermissionError: a folder is not readable.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"no image folder at {root}")
    entries = _entries(str(root))
    flat = [name for name, is_folder in entries if not is_folder]
    seen = {os.path.realpath(root): "."}
    classes = {name: _images_below(root, name, seen) for name, is_folder in entries if is_folder}
    if flat and any(classes.values()):
        raise ValueError(
            f"{root} holds images both directly and in subfolders "
            f"({next(name for name in classes if classes[name])}); "
            "keep one subfolder per class, or all images in one folder"
        )
    if flat:
        return {"all": flat}
    if not any(classes.values()):
        raise no_images(root)
    _check_splits(root, classes)
    if empty := [name for name, files in classes.items() if not files]:
        raise ValueError(f"{root} has {len(empty)} class folders without images: {', '.join(empty[:5])}")
    _check_alike(root, classes)
    return classes


def archive_names(archive: Path, names: Iterable[str]) -> dict[str, list[str]]:
    """Names of images in an archive by class, grouped and sorted as `image_names` does for a folder.

    A folder that holds all images is passed over if they lie in folders inside of it.

    Raises:
        FileNotFoundError: no images.
        ValueError: as `image_names`.
    """
    split = sorted(name.split("/") for name in names)
    if not split:
        raise no_images(archive)
    depth = min(len(parts) for parts in split) - 2  # folders above every class folder
    top = 0
    while top < depth and split[0][top] == split[-1][top]:
        top += 1
    folders = {len(parts) > top + 1 for parts in split}
    if len(folders) == 2:
        raise ValueError(
            f"{archive} holds images both directly and in subfolders "
            f"({next(parts[top] for parts in split if len(parts) > top + 1)}); "
            "keep one subfolder per class, or all images in one folder"
        )
    classes: dict[str, list[str]] = {}
    for parts in split:
        classes.setdefault(parts[top] if len(parts) > top + 1 else "all", []).append("/".join(parts))
    _check_splits(archive, classes)
    _check_alike(archive, classes)
    return classes


def no_images(root: Path) -> FileNotFoundError:
    """The error about a folder or an archive without images."""
    return FileNotFoundError(f"no images in {root}; known endings: {' '.join(sorted(EXTENSIONS))}")


def is_image_name(name: str) -> bool:
    """Whether a name has the ending of an image file, and no part of it begins with a dot."""
    hidden = any(part.startswith(".") for part in name.split("/"))
    return not hidden and os.path.splitext(name)[1].lower() in EXTENSIONS | _UNDECODED


def _entries(folder: str) -> list[tuple[str, bool]]:
    """Sorted image files and subfolders of a folder: (name, is a folder)."""
    listed: list[tuple[str, bool]] = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_symlink() and not os.path.exists(entry.path):
                raise FileNotFoundError(f"{entry.path} is a link that leads nowhere; repair or remove it")
            if entry.is_dir():
                listed.append((entry.name, True))
            elif os.path.splitext(entry.name)[1].lower() in EXTENSIONS | _UNDECODED and entry.is_file():
                listed.append((entry.name, False))
    return sorted(listed)


def _images_below(root: Path, top: str, seen: dict[str, str]) -> list[str]:
    """Names of all images in the class folder `top`, relative to the root.

    `seen` maps the real path of each folder visited so far to its first name.
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
    """Refuse a root whose subfolders are the splits of a data set."""
    training = [name for name in classes if name.casefold() in _TRAINING]
    held_out = [name for name in classes if name.casefold() in _HELD_OUT]
    if training and held_out:
        raise ValueError(
            f"{root} holds the splits {training[0]} and {held_out[0]}, not classes; give one of them, "
            f"such as {root / training[0]}"
        )


def _check_alike(root: Path, classes: Iterable[str]) -> None:
    """Refuse class names that are equal on a case-insensitive file system."""
    first: dict[str, str] = {}
    for name in classes:
        other = first.setdefault(unicodedata.normalize("NFC", name).casefold(), name)
        if other != name:
            raise ValueError(
                f"the class folders {other!r} and {name!r} of {root} differ in case or encoding only; "
                "rename one, or merge them"
            )
