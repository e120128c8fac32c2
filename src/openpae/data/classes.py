"""Class names and counts: compared between labelled sets, printed, and looked up."""

from __future__ import annotations

import operator
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import zip_longest
from pathlib import Path

from openpae.runtime.names import did_you_mean

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


def labels_of(
    folder: str | Path, wanted: Iterable[int | str], names: Sequence[str] | None, num_classes: int
) -> list[int]:
    """Labels of classes that are given by label (an integer, not checked) or by name (text).

    Spaces around a name and the Unicode form of its accents do not matter.

    Args:
        folder: the generator, for messages.
        wanted: the classes.
        names: names of the classes, in order; None if they are not known.
        num_classes: K.

    Raises:
        TypeError: a class is neither an integer nor text.
        ValueError: a name is not known, or several classes have it.
    """
    return [
        _by_name(folder, item, names, num_classes) if isinstance(item, str) else _integer(item)
        for item in wanted
    ]


def typed_labels(
    folder: str | Path, texts: Iterable[str], names: Sequence[str] | None, num_classes: int
) -> list[int]:
    """Labels of classes as a user types them: numbers or names, each text a list with commas.

    A name may hold commas: the longest name that fits is taken. `number:2` and `name:2` say which is meant
    where a name looks like the number of another class.

    Args:
        folder: the generator, for messages.
        texts: the arguments.
        names: names of the classes, in order; None if they are not known.
        num_classes: K.

    Raises:
        ValueError: no class is given; a name is not known, or several classes have it; or a text is the
            number of one class and the name of another.
    """
    items = [item for text in texts for item in _split(text, names or [])]
    if not items or not all(items):
        raise ValueError("an empty text is no class; give numbers or names, such as 0,2 or cat,dog")
    return [_typed(folder, item, names, num_classes) for item in items]


def _split(text: str, names: Sequence[str]) -> list[str]:
    """A list with commas in its parts; a name with commas stays one part."""
    known = {_plain(name) for name in names}
    most = max((name.count(",") + 1 for name in names), default=1)
    parts, items = text.split(","), []
    while parts:
        lengths = range(min(most, len(parts)), 1, -1)
        length = next((n for n in lengths if _plain(",".join(parts[:n])) in known), 1)
        items.append(_plain(",".join(parts[:length])))
        parts = parts[length:]
    return items


def _typed(folder: str | Path, text: str, names: Sequence[str] | None, num_classes: int) -> int:
    same, (kind, _, rest) = _of_name(text, names), text.partition(":")
    if kind == "name" and not same:
        return _by_name(folder, rest, names, num_classes)
    digits = rest if kind == "number" and not same else text
    if re.fullmatch("[+-]?[0-9]{1,18}", digits) is None:
        return _by_name(folder, text, names, num_classes)
    label = int(digits)
    if same in ([], [label]):
        return label
    if label >= num_classes or str(label) != text:  # no class has this number; 01 is a name
        return _by_name(folder, text, names, num_classes)
    raise ValueError(
        f"{text} is the name of class {same[0]} of {folder} and the number of another class; write "
        f"name:{text} or number:{text}"
    )


def _by_name(folder: str | Path, name: str, names: Sequence[str] | None, num_classes: int) -> int:
    if names is None:
        raise ValueError(
            f"{folder} keeps no names of its classes, so {name!r} is not known; give numbers from 0 to "
            f"{num_classes - 1}"
        )
    labels = _of_name(name, names)
    if not labels:
        some = [*map(repr, names[:_SHOWN]), *["..."] * (len(names) > _SHOWN)]
        hint = did_you_mean(_plain(name), names) or f"known: {', '.join(some)}"
        raise ValueError(f"{folder} has no class {name!r}; {hint}")
    if len(labels) > 1:
        numbers = ", ".join(map(str, labels))
        raise ValueError(f"{folder} has {len(labels)} classes {name!r}: {numbers}; give the number")
    return labels[0]


def _of_name(name: str, names: Sequence[str] | None) -> list[int]:
    """The labels with this name."""
    return [label for label, known in enumerate(names or ()) if _plain(known) == _plain(name)]


def _plain(name: str) -> str:
    return unicodedata.normalize("NFC", name).strip()


def _integer(label: object) -> int:
    try:
        return operator.index(label)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"a class is an integer or a name, got {label!r}") from None
