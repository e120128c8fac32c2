"""A quickstart and its folder; tests/test_readme.py runs one."""

from __future__ import annotations

from pathlib import Path

import pytest

from openpae.quickstart.run import run_quickstart
from openpae.storage.outputs import locked


def test_a_second_quickstart_in_one_folder_is_refused(tmp_path: Path) -> None:
    with (
        locked(tmp_path / "out", "running a quickstart"),
        pytest.raises(ValueError, match=r"another process is running a quickstart in .*; wait for it"),
    ):
        run_quickstart(tmp_path / "out", 1.0, limit=12)
    assert not (tmp_path / "out" / "data").exists()
