"""Where commands may write: never into an input, never over what the program did not make, and alone."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from openpae.runtime import processes
from openpae.storage.files import read_json, resolved, write_json

INDEX = ".openpae.json"
"""Lists what a command has written into a folder, where no record of its own says so."""
LOCK = ".lock"
"""Held by the process that writes into a folder."""


def check_outputs(
    *targets: Path,
    into: Path | None = None,
    inputs: Sequence[Path | None] = (),
    own: Collection[Path] = (),
    overwrite: bool | None = None,
) -> None:
    """Refuse to write where something of the user would be lost.

    Args:
        targets: files and folders that will be made or replaced. Links are resolved first.
        into: folder that gets them; it may hold other files.
        inputs: what the command reads; paths that do not exist count for nothing.
        own: those of the targets that this program made.
        overwrite: whether the user wants them replaced, whoever made them; None where the command has no such
            option. Inputs are spared all the same.

    Raises:
        ValueError: a target exists and is not ours, or it is an input, lies in one or holds one.
        NotADirectoryError: a target lies below a file.
    """
    made = {resolved(path) for path in own}
    for target in (*targets, *([] if into is None else [into])):
        place = resolved(target)
        for given in (path for path in inputs if path is not None and path.exists()):
            source = resolved(given)
            if source in (place, *place.parents) or (place in source.parents and target is not into):
                relation = "is" if place == source else "lies in" if source in place.parents else "holds"
                raise ValueError(
                    f"{target} {relation} {given}, which is read; name another place to write to"
                )
        for parent in place.parents:
            if parent.exists() and not parent.is_dir():
                raise NotADirectoryError(f"{target} cannot be written: {parent.name} is a file, not a folder")
        if place.exists() and place not in made and target is not into and not overwrite:
            replace = "" if overwrite is None else ", or add --overwrite"
            raise ValueError(
                f"{target} exists and was not made by this command; move it away or name another folder"
                f"{replace}"
            )
    if into is not None and into.exists() and not into.is_dir():
        raise NotADirectoryError(f"{into} is a file, but a folder is needed; name another")


def read_record(file: Path) -> dict[str, Any]:
    """What a JSON file of ours holds; nothing where it is none, or not there."""
    try:
        return read_json(file)
    except (OSError, ValueError):
        return {}


def made_by(file: Path, **facts: Any) -> bool:
    """Whether a JSON file is a record of ours: it holds these values."""
    found = read_record(file)
    return all(found.get(name) == value for name, value in facts.items())


def check_claim(
    out: Path, names: Sequence[str], *, inputs: Sequence[Path | None], overwrite: bool = False
) -> list[str]:
    """`check_outputs` the names in a folder but for those that its index lists.

    Args:
        out: the folder.
        names: files and folders that will be written, relative to it.
        inputs: see `check_outputs`.
        overwrite: see `check_outputs`.

    Returns:
        All names that the index must list before these are written.

    Raises:
        ValueError, NotADirectoryError: see `check_outputs`.
    """
    files = read_record(out / INDEX).get("files")
    listed = [name for name in files if isinstance(name, str)] if isinstance(files, list) else []
    own = [out / name for name in {*listed} & {*names}]
    check_outputs(*(out / name for name in names), into=out, inputs=inputs, own=own, overwrite=overwrite)
    return sorted({*listed, *names})


def claim(out: Path, names: Sequence[str], *, inputs: Sequence[Path | None], overwrite: bool = False) -> None:
    """`check_claim`, and list the names in the folder's index: they are ours from now on."""
    listed = check_claim(out, names, inputs=inputs, overwrite=overwrite)
    make_folder(out)
    write_json(out / INDEX, {"files": listed})


def make_folder(folder: Path) -> None:
    """Make a folder with its parents; one that exists is kept.

    Raises:
        NotADirectoryError: a file has its name, or that of a parent.
    """
    place = resolved(folder)
    for path in (place, *place.parents):
        if path.exists() and not path.is_dir():
            raise NotADirectoryError(f"{folder} cannot be a folder: {path.name} is a file; name another")
    place.mkdir(parents=True, exist_ok=True)


@contextmanager
def locked(folder: Path, doing: str) -> Iterator[None]:
    """Hold a folder: two processes that write there would mix their files. A kill lets it go.

    Args:
        folder: made if absent.
        doing: what the process does, for the message to another: "training".

    Raises:
        ValueError: another process holds it.
    """
    make_folder(folder)
    file = resolved(folder) / LOCK
    if file.is_symlink():
        raise ValueError(f"{folder / LOCK} must be a lock file, got a link; remove it")
    lock = FileLock(file)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(
            f"another process is {doing} in {folder}; wait for it, stop it, or name another folder"
        ) from None
    try:
        yield
    finally:
        lock.release()


@contextmanager
def run_lock(folder: Path, doing: str) -> Iterator[None]:
    """`locked` for all processes of torchrun: the first holds the folder. Each must come here."""
    with ExitStack() as stack:
        processes.on_rank0(lambda: stack.enter_context(locked(folder, doing)))
        yield
