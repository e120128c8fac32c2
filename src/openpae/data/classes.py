"""Names and numbers of classes: shown, and compared where two labelled sets meet."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import zip_longest
from pathlib import Path

UNLABELLED = ["all"]
"""Classes of a folder without subfolders: it says nothing of labels."""
_SHOWN = 20


def check_same_classes(
    folder: str | Path, classes: Sequence[str], other: str | Path, others: Sequence[str]
) -> None:
    """Refuse two labelled sets whose labels do not mean the same classes.

    Raises:
        ValueError: the message names the first difference.
    """
    for label, (ours, theirs) in enumerate(zip_longest(classes, others)):
        if ours != theirs:
            meanings = " and ".join(
                f"{'missing' if name is None else repr(name)} in {place}"
                for name, place in ((ours, folder), (theirs, other))
            )
            raise ValueError(
                f"{other} must have the classes of {folder}, but class {label} is {meanings}; make both from "
                "folders with the same class subfolders"
            )


def check_images_agree(
    folder: str | Path, classes: Sequence[str], other: str | Path, others: Sequence[str]
) -> None:
    """`check_same_classes` for images whose labels may be left out: a folder without subfolders fits any."""
    if UNLABELLED not in (list(classes), list(others)):
        check_same_classes(folder, classes, other, others)


def count_classes(classes: Sequence[str], labels: Iterable[int]) -> list[int]:
    """How many rows each class has."""
    counts = Counter(int(label) for label in labels)
    return [counts[label] for label in range(len(classes))]


def class_list(classes: Sequence[str], counts: Sequence[int]) -> str:
    """Number, name and rows of each class in one line; of many classes the first ones and the last."""
    pairs = enumerate(zip(classes, counts, strict=True))
    parts = [f"{label} {name} ({count:,})" for label, (name, count) in pairs]
    return ", ".join(parts if len(parts) <= _SHOWN else [*parts[: _SHOWN - 1], "...", parts[-1]])


def empty_classes(classes: Sequence[str], counts: Sequence[int]) -> list[str]:
    """Number and name of the classes without a row."""
    pairs = enumerate(zip(classes, counts, strict=True))
    return [f"{label} {name}" for label, (name, count) in pairs if not count]
