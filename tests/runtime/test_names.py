"""Near misses of names."""

from __future__ import annotations

from openpae.runtime.names import did_you_mean


def test_the_nearest_name_is_suggested_in_its_own_spelling() -> None:
    assert did_you_mean("samlpe", ["sample", "pack"]) == "did you mean 'sample'?"
    assert did_you_mean("TABBY CAT", ["Tabby cat", "Tiger cat"]) == "did you mean 'Tabby cat'?"


def test_nothing_is_suggested_for_a_name_unlike_all() -> None:
    assert did_you_mean("zzz", ["sample", "pack"]) == ""
    assert did_you_mean("zzz", []) == ""
