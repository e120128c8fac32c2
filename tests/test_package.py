"""The package as users get it: a source distribution whose tests run, and a wheel in a fresh environment."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import venv
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
LEFT_OUT = shutil.ignore_patterns(
    "__pycache__", "*.egg-info", ".git", ".venv", "build", "dist", "runs", "shared"
)

pytestmark = pytest.mark.slow


def ran(*command: str | Path, cwd: Path, **environment: str) -> str:
    """The output of a command that must succeed, away from the package that runs these tests."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=kept | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Source distribution and wheel, the wheel built from the source distribution."""
    source, out = (tmp_path_factory.mktemp("package") / name for name in ("source", "dist"))
    shutil.copytree(ROOT, source, symlinks=True, ignore=LEFT_OUT)
    ran(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, ".", cwd=source)
    (sdist,), (wheel,) = out.glob("*.tar.gz"), out.glob("*.whl")
    return sdist, wheel


def test_the_registry_would_take_both(distributions: tuple[Path, Path], tmp_path: Path) -> None:
    shown = ran(
        sys.executable, "-m", "twine", "check", "--strict", *distributions, cwd=tmp_path, NO_COLOR="1"
    )
    assert shown.count("PASSED") == 2


def test_tests_run_from_the_source_distribution(distributions: tuple[Path, Path], tmp_path: Path) -> None:
    """All can be collected; those that read files of the project pass."""
    with tarfile.open(distributions[0]) as archive:
        archive.extractall(tmp_path, filter="data")
    (folder,) = tmp_path.iterdir()
    pytest_command = (sys.executable, "-m", "pytest", "-q", "-W", "error", "-p", "no:cacheprovider")
    environment = {"PYTHONPATH": str(folder / "src")}
    ran(*pytest_command, "--collect-only", cwd=folder, **environment)
    files = ["tests/test_docs.py", "tests/test_readme.py", "tests/test_structure.py", "tests/test_configs.py"]
    files += ["tests/tools", "tests/test_old_folders.py", "tests/models/test_tokenizer.py"]
    assert " passed" in ran(*pytest_command, *files, cwd=folder, **environment)


def test_the_wheel_works_alone(distributions: tuple[Path, Path], tmp_path: Path) -> None:
    """In an environment that holds nothing else, and from a folder that is not the project."""
    venv.create(tmp_path / "environment", with_pip=True)
    programs = tmp_path / "environment" / ("Scripts" if os.name == "nt" else "bin")
    ran(programs / "python", "-m", "pip", "install", "--quiet", distributions[1], cwd=tmp_path)
    pae = programs / "pae"
    assert "tokenizer/dinov2-l-d32" in ran(pae, "presets", cwd=tmp_path)
    ran(pae, "sample", "openmoji", "samples", "--count", "2", "--steps", "2", cwd=tmp_path)
    with np.load(tmp_path / "samples" / "samples.npz") as samples:
        assert samples["arr_0"].shape == (2, 64, 64, 3)
    installed = ran(programs / "python", "-m", "pip", "list", cwd=tmp_path).lower()
    for extra in ("matplotlib", "scipy", "transformers", "tensorboard", "diffusers"):
        assert extra not in installed
