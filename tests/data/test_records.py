"""Labels of data sets become class numbers; what is no label is refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from openpae.data.records import class_numbers


@pytest.mark.parametrize(
    ("values", "names", "labels", "classes"),
    [
        ([2, 0], None, [2, 0], ["0", "1", "2"]),
        (["2", "+0", "01"], None, [2, 0, 1], ["0", "1", "2"]),
        (["10", "9", "x"], None, [0, 1, 2], ["10", "9", "x"]),
        (["-", "-1x"], None, [0, 1], ["-", "-1x"]),
        ([1, 0], ["cat", "dog"], [1, 0], ["cat", "dog"]),
    ],
)
def test_numbers_stay_and_names_are_sorted(
    values: list[int | str], names: list[str] | None, labels: list[int], classes: list[str]
) -> None:
    found, known = class_numbers(Path("set"), values, names)
    assert (found.tolist(), known) == (labels, classes)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (["1", "-1", "0"], "set has the label -1; labels must be 0 to 1048575"),
        ([0, -1], "set has the label -1; labels must be 0 to 1048575"),
        ([0, 2**20], "set has the label 1048576; labels must be 0 to 1048575"),
        ([0, 2**63], "set has the label 9223372036854775808; labels must be 0 to 1048575"),
        ([0, 10**400], f"set has the label {str(10**400)[:40]}; labels must be 0 to 1048575"),
        (["0", "9" * 200], f"set has the label {'9' * 40}; labels must be 0 to 1048575"),
        (["a", "b" * 256], f"set has the label '{'b' * 39}; labels must be integers, or names of at most"),
        ([0.0, 1.0], "set has the label 0.0; labels must be integers"),
        ([0, float("nan")], "set has the label nan; labels must be integers"),
        ([[0], [1]], "set has the label [0]; labels must be integers"),
        ([0, True], "set has the label True; labels must be integers"),
        ([0, None], "set has the label None; labels must be integers"),
        ([0, "a"], "set has numbers and names as labels; they must be of one kind"),
    ],
)
def test_what_is_no_label_is_refused(values: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        class_numbers(Path("set"), values, None)
