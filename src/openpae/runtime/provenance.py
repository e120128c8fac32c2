"""Versions of the packages and of this code."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from pathlib import Path

import openpae


def package_versions() -> dict[str, str]:
    """Versions of Python and of the installed packages that results depend on."""
    names = ("openpae", "torch", "numpy", "pillow", "scipy", "scikit-learn", "transformers", "diffusers")
    versions = {}
    for name in names:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions | {"python": platform.python_version()}


def version() -> str:
    """Version of the package and, in a checkout, the last commit that changed it; "+" marks later edits."""
    folder = str(Path(__file__).parent.parent)

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", folder, *arguments], capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        commit = git("log", "-1", "--format=%h", "--", folder)
        edited = "+" if commit and git("status", "--porcelain", "--", folder) else ""
    except FileNotFoundError:  # no git
        commit = edited = ""
    return f"{openpae.__version__} {commit}{edited}".strip()
