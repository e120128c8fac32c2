"""One workspace for all files of this folder: it takes seconds to make. All tests here fork."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.faults.running import workspace


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """A forked child has one thread, and what it computes equals to the bit what its parent computes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def ready(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that `workspace` makes; copy it before you change anything."""
    root = tmp_path_factory.mktemp("ready") / "workspace"
    root.mkdir()
    workspace(root)
    return root
