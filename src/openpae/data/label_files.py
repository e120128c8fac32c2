"""Images of a folder whose classes are in a label file: ILSVRC's ground truth, or a table of file and
label."""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import numpy as np

from openpae.data.listing import image_names
from openpae.data.records import (
    MOST_CLASSES,
    ByteRanges,
    StoredImages,
    class_names_beside,
    class_numbers,
    damaged_if_unreadable,
)

LABEL_ENDINGS = (".csv", ".tsv", ".txt")
"""Endings of label files."""
_FILE_COLUMNS = ("file", "file_name", "filename", "image", "path", "name", "imageid")
_LABEL_COLUMNS = ("label", "class", "class_name", "category", "predictionstring")
_LARGEST = 2**30
_META = "meta.mat"


def open_labelled_folder(root: Path, label_file: Path, *, full_hash: bool = False) -> StoredImages:
    """Images of a folder, sorted by name, with the labels of a file.

    The file is a table of file names and labels (.csv, .tsv, or .txt with spaces), with or without a header;
    or it has one number a line for the sorted images, counted from 1, as ILSVRC's ground truth. Its meta.mat
    beside it gives the WordNet ids of these numbers, and classes.txt the names of any numbers.

    Args:
        root: the folder.
        label_file: the file; relative to the current folder, or inside of `root`.
        full_hash: see `StoredImages`.

    Raises:
        FileNotFoundError: no folder, no images or no label file.
        ValueError: the two do not fit, or a label has no class.
    """
    names = sorted(name for group in image_names(root).values() for name in group)
    file = next((place for place in (label_file, root / label_file) if place.is_file()), None)
    if file is None:
        raise FileNotFoundError(f"no label file at {label_file}, nor in {root}")
    if file.suffix.lower() not in LABEL_ENDINGS or file.stat().st_size > _LARGEST:
        raise ValueError(f"{file} is no label file; known endings: {' '.join(LABEL_ENDINGS)}, below 1 GiB")
    with damaged_if_unreadable(file):
        rows = _rows(file, file.read_text(encoding="utf-8-sig"))
    if not rows:
        raise ValueError(f"{file} holds no labels")
    if all(len(row) == 1 and re.fullmatch(r"\d{1,9}", row[0]) for row in rows):
        values, known = _ground_truth(file, [int(row[0]) for row in rows], len(names))
    else:
        values, known = _by_name(root, file, rows, names), class_names_beside(file.parent)
    labels, classes = class_numbers(file, values, known)
    paths = [root / name for name in names]
    sizes = np.array([path.stat().st_size for path in paths], dtype=np.int64)
    reader = ByteRanges(paths, np.arange(len(paths)), np.zeros_like(sizes), sizes)
    return StoredImages(root, reader, names, labels, classes, full_hash=full_hash)


def _rows(file: Path, text: str) -> list[list[str]]:
    if file.suffix.lower() == ".txt":
        rows = [line.rsplit(maxsplit=1) for line in text.splitlines()]
    else:
        rows = list(csv.reader(text.splitlines(), delimiter="\t" if file.suffix.lower() == ".tsv" else ","))
    return [[cell.strip() for cell in row] for row in rows if row]


def _ground_truth(
    file: Path, numbers: Sequence[int], images: int
) -> tuple[list[int | str], list[str] | None]:
    """Values and class names of a file with a number for each image, counted from 1."""
    if len(numbers) != images:
        raise ValueError(f"{file} has {len(numbers):,} labels for {images:,} images; it needs one for each")
    if not 1 <= min(numbers) <= max(numbers) <= MOST_CLASSES:
        raise ValueError(
            f"{file} has labels from {min(numbers)} to {max(numbers)}; without file names they count from 1"
        )
    if not (file.parent / _META).is_file():
        known = class_names_beside(file.parent)
        return [number - 1 for number in numbers], known or [str(k + 1) for k in range(max(numbers))]
    ids = _wordnet_ids(file.parent / _META)
    for number in numbers:
        if number not in ids:
            raise ValueError(f"{file} has the label {number}, which {file.parent / _META} does not know")
    return [ids[number] for number in numbers], sorted(ids.values())


def _wordnet_ids(file: Path) -> dict[int, str]:
    """WordNet id of each number in the meta.mat of ILSVRC's development kit."""
    try:
        from scipy.io import loadmat
    except ModuleNotFoundError:
        raise ModuleNotFoundError(f"{file} needs SciPy; install it with: pip install openpae[data]") from None
    with damaged_if_unreadable(file):
        rows = np.atleast_1d(loadmat(file, squeeze_me=True)["synsets"])
        leaves = [
            row for row in rows if int(row["num_children"]) == 0
        ]  # the rest are inner nodes of the tree
        return {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in leaves}


def _by_name(root: Path, file: Path, rows: list[list[str]], names: Sequence[str]) -> list[int | str]:
    """The label of each image from a table."""
    exact = set(names)
    bare = {str(PurePosixPath(name).with_suffix("")): name for name in names}
    at, label_at, several = 0, 1, False
    header = [cell.lower() for cell in rows[0]]
    if rows[0][0].removeprefix("./") not in exact | bare.keys():
        rows = rows[1:]
        at = next((header.index(name) for name in _FILE_COLUMNS if name in header), 0)
        label_at = next((header.index(name) for name in _LABEL_COLUMNS if name in header), 1)
        # Kaggle's table of ILSVRC has a label and a box in each cell.
        several = header[label_at : label_at + 1] == ["predictionstring"]
    values: dict[str, int | str] = {}
    for row in rows:
        if len(row) <= max(at, label_at) or not row[label_at]:
            raise ValueError(f"{file} has a line without a label: {' '.join(row)}")
        key = row[at].removeprefix("./")
        name = key if key in exact else bare.get(key, "")
        if not name or name in values:
            reason = "two labels" if name else "a label"
            raise ValueError(f"{file} has {reason} for {key}{'' if name else f', which is not in {root}'}")
        values[name] = row[label_at].split()[0] if several else row[label_at]
    if missing := [name for name in names if name not in values]:
        raise ValueError(f"{file} has no label for {len(missing)} images of {root}, such as {missing[0]}")
    return [values[name] for name in names]
