"""One workspace for all files of this folder: it takes seconds to make."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.running import workspace


@pytest.fixture(scope="session")
def ready(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that `workspace` makes; copy it before you change anything."""
    root = tmp_path_factory.mktemp("ready") / "workspace"
    root.mkdir()
    workspace(root)
    return root
