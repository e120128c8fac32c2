"""Pairs: folders with a tokenizer and a generator of its latents, by path or by a name of the package."""

from __future__ import annotations

from pathlib import Path

PARTS = ("tokenizer", "generator")
"""Subfolders of a pair."""
PACKAGED = Path(__file__).parent.parent / "pretrained"
"""Folder of the pairs that come with the package."""


def list_models() -> list[str]:
    """Names of the pretrained pairs of the package, for `Pipeline.from_pretrained` and `pae sample`."""
    return sorted(folder.name for folder in PACKAGED.iterdir() if is_pair(folder))


def is_pair(folder: Path) -> bool:
    """Whether a folder holds a tokenizer and a generator."""
    return all((folder / part).is_dir() for part in PARTS)


def packaged_pair(name: str | Path) -> Path | None:
    """The pair of this name in the package; None if there is none, or something lies at this path."""
    given = Path(name)
    return PACKAGED / given if not given.exists() and str(name) in list_models() else None


def find_pair(name_or_folder: str | Path) -> Path | None:
    """The folder of a pair, given by path or by name; None if it is no pair."""
    folder = Path(name_or_folder)
    return folder if is_pair(folder) else packaged_pair(name_or_folder)
