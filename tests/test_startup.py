"""The command starts without torch: help, version and `import openpae` load none of the heavy packages."""

from __future__ import annotations

import subprocess
import sys

import pytest

import openpae
from openpae.cli import COMMANDS

HEAVY = (
    "torch",
    "transformers",
    "scipy",
    "sklearn",
    "matplotlib",
    "tensorboard",
    "huggingface_hub",
    "resvg_py",
    "gradio",
)


def loaded(code: str) -> list[str]:
    """The heavy packages that a new interpreter holds after this code."""
    code = f"import sys\ntry:\n    {code}\nexcept SystemExit:\n    pass\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return sorted(set(HEAVY) & set(done.stdout.splitlines()[-1].split()))


@pytest.mark.parametrize(
    "argv", [["--help"], ["--version"], *([name, "--help"] for name in COMMANDS)], ids=" ".join
)
def test_help_loads_nothing_heavy(argv: list[str]) -> None:
    assert loaded(f"import openpae.cli; openpae.cli.main({argv!r})") == []


def test_importing_the_package_loads_nothing_heavy() -> None:
    assert loaded("import openpae; openpae.__version__") == []


def test_every_public_name_is_there() -> None:
    named = [name for names in openpae._HOMES.values() for name in names]
    assert sorted(named) == sorted(openpae.__all__)
    assert all(getattr(openpae, name) is not None for name in openpae.__all__)
    assert set(openpae.__all__) <= set(dir(openpae))
    with pytest.raises(AttributeError, match="no attribute 'Tokeniser'"):
        _ = openpae.Tokeniser
