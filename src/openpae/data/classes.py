"""Class names and counts: compared between labelled sets, and printed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import zip_longest
from pathlib import Path

UNLABELLED = ["all"]
"""Classes of a folder without subfolders, whose labels mean nothing."""
_SHOWN = 20


def check_same_classes(
    folder: str | Path, classes: Sequence[str], other: str | Path, others: Sequence[str]
) -> None:
    """Refuse two labelled sets with different classes.

    Raises:
        ValueError: the message names the first difference.
    """
    for label, (first, second) in enumerate(zip_longest(classes, others)):
        if first != second:
            meanings = " and ".join(
                f"{'missing' if name is None else repr(name)} in {place}"
                for name, place in ((first, folder), (second, other))
            )
            raise ValueError(
                f"{other} must have the classes of {folder}, but class {label} is {meanings}; make both from "
                "folders with the same class subfolders"
            )


def check_images_agree(
    folder: str | Path, classes: Sequence[str], other: str | Path, others: Sequence[str]
) -> None:
    """`check_same_classes`, but a folder without subfolders fits any other."""
    if UNLABELLED not in (list(classes), list(others)):
        check_same_classes(folder, classes, other, others)


def count_classes(classes: Sequence[str], labels: Iterable[int]) -> list[int]:
    """Number of rows of each class."""
    counts = Counter(int(label) for label in labels)
    return [counts[label] for label in range(len(classes))]


def class_list(classes: Sequence[str], counts: Sequence[int]) -> str:
    """Label, name and rows of each class in one line; of many classes the first ones and the last."""
    pairs = enumerate(zip(classes, counts, strict=True))
    parts = [f"{label} {name} ({count:,})" for label, (name, count) in pairs]
    return ", ".join(parts if len(parts) <= _SHOWN else [*parts[: _SHOWN - 1], "...", parts[-1]])


def empty_classes(classes: Sequence[str], counts: Sequence[int]) -> list[str]:
    """Label and name of each class without a row."""
    pairs = enumerate(zip(classes, counts, strict=True))
    return [f"{label} {name}" for label, (name, count) in pairs if not count]
