"""Fixtures for the tests of encoders: each family of the table at tiny size."""

from __future__ import annotations

from pathlib import Path

import pytest

from openpae.models.encoders import FrozenEncoder, load_encoder
from tests.models.families import FAMILIES, Family, saved


@pytest.fixture(params=FAMILIES, ids=lambda family: family.row)
def family(request: pytest.FixtureRequest) -> Family:
    return request.param


@pytest.fixture
def encoder(family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FrozenEncoder:
    saved(family, tmp_path, monkeypatch)
    return load_encoder("tiny", str(tmp_path))
