"""Data sets of the Hugging Face hub, as parquet files in its cache."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

CONVERTED = "refs/convert/parquet"
"""The branch on which the hub keeps a parquet copy of every public data set."""
_NAME = r"[\w.-]+/[\w.-]+"


def download_parquet(name: str, split: str | None = None) -> list[Path]:
    """The parquet files of a split of a data set, downloaded once into the hub's cache.

    Args:
        name: OWNER/NAME.
        split: see `split_files`.

    Raises:
        FileNotFoundError: the hub does not have it or cannot be reached.
        ValueError: no such split, or several.
    """
    if not re.fullmatch(_NAME, name):
        raise ValueError(f"hf:{name} is no data set of the hub; write hf:OWNER/NAME or hf:OWNER/NAME#SPLIT")
    from huggingface_hub import snapshot_download

    where = f"hf:{name}"
    try:
        revision, files = _on_the_hub(name)
        chosen = split_files(where, files, split)
        folder = Path(
            snapshot_download(name, repo_type="dataset", revision=revision, allow_patterns=list(chosen))
        )
    except Exception as error:  # the package below huggingface_hub has errors of its own
        if type(error) is ValueError:
            raise
        if (cached := _in_the_cache(name)) is None:
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise FileNotFoundError(
                f"the hub did not give {where} ({reason}); on a machine that reaches it run: hf download "
                f"{name} --repo-type dataset --local-dir FOLDER, and give FOLDER"
            ) from None
        folder, files = cached
        chosen = split_files(where, files, split)
    return [folder / file for file in chosen]


def _on_the_hub(name: str) -> tuple[str | None, list[str]]:
    """Revision and names of the parquet files of a data set: its own, or the hub's copies."""
    from huggingface_hub import HfApi

    for revision in (None, CONVERTED):
        files = HfApi().list_repo_files(name, repo_type="dataset", revision=revision)
        if parquet := [file for file in files if file.endswith(".parquet")]:
            return revision, parquet
    raise ValueError(f"hf:{name} has no parquet files on the hub, which pae reads")


def _in_the_cache(name: str) -> tuple[Path, list[str]] | None:
    """Folder and names of the parquet files of an earlier download."""
    from huggingface_hub import snapshot_download

    for revision in (None, CONVERTED):
        try:
            folder = Path(
                snapshot_download(name, repo_type="dataset", revision=revision, local_files_only=True)
            )
        except (OSError, ValueError):
            continue
        if files := [path.relative_to(folder).as_posix() for path in folder.rglob("*.parquet")]:
            return folder, files
    return None


def split_files(where: str, files: Sequence[str], split: str | None) -> list[str]:
    """The files of a split, sorted.

    Args:
        where: the data, for messages.
        files: names of parquet files below the data's folder.
        split: name of the split, or CONFIG/SPLIT; by default train, or the only one.

    Raises:
        ValueError: no such split, several, or only a part of one.
    """
    groups: dict[str, list[str]] = {}
    for file in sorted(files):
        groups.setdefault(_split_of(file), []).append(file)
    wanted = "train" if split is None and len(groups) > 1 else split
    chosen = [
        group for group in groups if wanted is None or group == wanted or group.rpartition("/")[2] == wanted
    ]
    known = ", ".join(groups) or "no parquet files"
    if len(chosen) != 1:
        raise ValueError(f"{where} has {known}; name one of them: {where}#SPLIT")
    if chosen[0].rpartition("/")[2].startswith("partial-"):
        raise ValueError(f"{where} is on the hub in part only ({chosen[0]}); download the data itself")
    return groups[chosen[0]]


def _split_of(file: str) -> str:
    """Config and split of a parquet file: data/train-00000-of-00002.parquet or CONFIG/SPLIT/0000.parquet."""
    folder, _, stem = file.removesuffix(".parquet").rpartition("/")
    name = re.sub(r"-\d+(-of-\d+)?(-[0-9a-f]{8,})?$", "", stem)
    folder = "/".join(part for part in folder.split("/") if part not in ("data", "default", ""))
    return folder if re.fullmatch(r"\d+", name) else f"{folder}/{name}".strip("/")
