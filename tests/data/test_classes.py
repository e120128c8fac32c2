"""Classes by number or name, as a program gives them and as a user types them."""

from __future__ import annotations

import re
import unicodedata

import numpy as np
import pytest
import torch

from openpae.data.classes import labels_of, typed_labels

NAMES = ["cat", "dog", "crane, bird", "caf\u00e9", "big cat", "line\nfeed", "\u732b"]


def typed(*texts: str, names: list[str] | None = NAMES, count: int = 7) -> list[int]:
    return typed_labels("here", texts, names, count)


def test_numbers_and_names_may_be_mixed() -> None:
    assert labels_of("here", ["dog", 0, np.int64(2), torch.tensor(3), "cat", 99], NAMES, 7) == [
        1,
        0,
        2,
        3,
        0,
        99,
    ]
    assert typed("dog", "0", "2,cat", "-1", "99") == [1, 0, 2, 0, -1, 99]
    assert typed("dog , big cat") == [1, 4]
    assert typed("1", "2", names=None) == [1, 2]


@pytest.mark.parametrize("name", NAMES)
def test_each_name_is_its_class_whatever_letters_it_has(name: str) -> None:
    label = NAMES.index(name)
    for form in (name, f" {name} ", unicodedata.normalize("NFD", name)):
        assert labels_of("here", [form], NAMES, 7) == typed(form) == [label]
    assert typed(f"dog,{name},cat") == [1, label, 0]


def test_of_two_readings_of_a_list_the_longest_name_counts() -> None:
    names = ["a", "b", "a,b", "b,c"]
    assert typed("a,b", names=names, count=4) == [2]
    assert typed("a", "b", names=names, count=4) == [0, 1]
    assert typed("a,b,b,c", names=names, count=4) == [2, 3]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("catt", "here has no class 'catt'; did you mean 'cat'?"),
        ("Dog", "here has no class 'Dog'; did you mean 'dog'?"),
        ("zzz", r"here has no class 'zzz'; known: 'cat', .*'line\\nfeed', '猫'"),
        ("dog,cat,", "an empty text is no class; give numbers or names, such as 0,2 or cat,dog"),
        (",", "an empty text is no class"),
        (" ", "an empty text is no class"),
        ("name:2", "here has no class '2'"),
        ("9" * 30, "here has no class '9+'"),
    ],
)
def test_what_is_no_class_is_named(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        typed(text)
    assert "\n" not in str(error.value)


def test_no_class_at_all_is_refused() -> None:
    with pytest.raises(ValueError, match="an empty text is no class"):
        typed()


def test_without_names_only_numbers_are_known() -> None:
    message = "here keeps no names of its classes, so 'cat' is not known; give numbers from 0 to 6"
    for call in (lambda: typed("1,cat", names=None), lambda: labels_of("here", [1, "cat"], None, 7)):
        with pytest.raises(ValueError, match=message):
            call()


def test_many_names_are_not_all_listed() -> None:
    with pytest.raises(ValueError, match=r"known: 'c0', .*'c19', \.\.\.$"):
        typed("zzz", names=[f"c{label}" for label in range(1000)], count=1000)


def test_a_name_of_several_classes_needs_the_number() -> None:
    names = ["crane", "dog", "crane"]
    with pytest.raises(ValueError, match="here has 2 classes 'crane': 0, 2; give the number"):
        typed("crane", names=names, count=3)
    assert typed("2,dog", names=names, count=3) == [2, 1]


def test_a_name_that_looks_like_a_number_is_never_mistaken() -> None:
    """Folders are numbered in the order of their names: 10 is class 1."""
    names = ["0", "10", "2", "2020"]
    assert typed("0", "10", "2", "2020", names=names, count=4) == [0, 1, 2, 3]
    with pytest.raises(
        ValueError, match=re.escape("2 is the name of class 0 of here and the number of another")
    ):
        typed("2", names=["2", "3", "4"], count=3)
    assert typed("name:2", "number:2", "4", names=["2", "3", "4"], count=3) == [0, 2, 2]
    assert typed("01", "1", names=["01", "02"], count=2) == [0, 1]
    assert labels_of("here", ["2", 2], ["2", "3", "4"], 3) == [0, 2]


@pytest.mark.parametrize("value", [1.0, None, ["cat"], torch.tensor([0, 1])])
def test_what_is_neither_number_nor_name_is_refused(value: object) -> None:
    with pytest.raises(TypeError, match="a class is an integer or a name, got"):
        labels_of("here", [value], NAMES, 7)  # type: ignore[list-item]
