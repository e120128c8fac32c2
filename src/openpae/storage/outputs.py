"""Checks before a command writes: inputs and files of others stay, and one process writes a folder."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from openpae.runtime import processes
from openpae.storage.files import read_json, resolved, write_json

INDEX = ".openpae.json"
"""Index of the files that commands have written into a folder, for commands without a record of their own."""
LOCK = ".lock"
"""Lock file of the process that writes into a folder."""


def check_outputs(
    *targets: Path,
    into: Path | None = None,
    inputs: Sequence[Path | None] = (),
    own: Collection[Path] = (),
    overwrite: bool | None = None,
) -> None:
    """Refuse to write if a file of the user would be lost.

    Args:
        targets: files and folders to be made or replaced. Links are resolved first.
        into: folder for the targets; it may hold other files.
        inputs: paths that the command reads; absent ones are ignored.
        own: targets that this program made; they may be replaced.
        overwrite: replace targets of any origin, but no inputs; None if the command has no such option.

    Raises:
        ValueError: a target exists and is not in `own`, or is an input, lies in one or holds one.
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
        _check_folders(target, place.parents)
        if place.exists() and place not in made and target is not into and not overwrite:
            replace = "" if overwrite is None else ", or add --overwrite"
            raise ValueError(
                f"{target} exists and was not made by this command; move it away or name another folder"
                f"{replace}"
            )
    if into is not None:
        _check_folders(into, [resolved(into)])


def read_record(file: Path) -> dict[str, Any]:
    """Content of a JSON record; empty if the file is absent or no record."""
    try:
        return read_json(file)
    except (OSError, ValueError):
        return {}


def made_by(file: Path, **facts: Any) -> bool:
    """Whether a JSON record holds these values, which identify the command that wrote it."""
    record = read_record(file)
    return all(record.get(name) == value for name, value in facts.items())


def check_claim(
    out: Path, names: Sequence[str], *, inputs: Sequence[Path | None], overwrite: bool = False
) -> list[str]:
    """`check_outputs` for names in a folder; those in its index may be replaced.

    Args:
        out: the folder.
        names: files and folders to be written, relative to it.
        inputs, overwrite: see `check_outputs`.

    Returns:
        All names for the index, to be written before the files.

    Raises:
        ValueError, NotADirectoryError: see `check_outputs`.
    """
    if (out / INDEX).is_symlink():  # it may point to any file of the user
        raise ValueError(f"{out / INDEX} must be a file that this program made, got a link; remove it")
    files = read_record(out / INDEX).get("files")
    listed = [name for name in files if isinstance(name, str)] if isinstance(files, list) else []
    own = [out / name for name in {*listed} & {*names}]
    check_outputs(*(out / name for name in names), into=out, inputs=inputs, own=own, overwrite=overwrite)
    return sorted({*listed, *names})


def claim(out: Path, names: Sequence[str], *, inputs: Sequence[Path | None], overwrite: bool = False) -> None:
    """`check_claim`, then add the names to the folder's index."""
    listed = check_claim(out, names, inputs=inputs, overwrite=overwrite)
    make_folder(out)
    write_json(out / INDEX, {"files": listed})


def make_folder(folder: Path) -> None:
    """Make a folder and its parents if they are absent.

    Raises:
        NotADirectoryError: a file has its name, or that of a parent.
    """
    place = resolved(folder)
    _check_folders(folder, (place, *place.parents))
    place.mkdir(parents=True, exist_ok=True)


def _check_folders(path: Path, folders: Iterable[Path]) -> None:
    """Raise NotADirectoryError, which names `path`, if one of these folders is a file."""
    for folder in folders:
        if folder.exists() and not folder.is_dir():
            raise NotADirectoryError(f"{path} cannot be written: {folder.name} is a file, not a folder")


@contextmanager
def locked(folder: Path, doing: str) -> Iterator[None]:
    """Hold a lock on a folder, so that no second process writes there. It ends with the process.

    Args:
        folder: made if absent.
        doing: the work of this process, for the error in another one: "training".

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
    """`locked` for a run: rank 0 holds the folder. Every rank must enter."""
    with ExitStack() as stack:
        processes.on_rank0(lambda: stack.enter_context(locked(folder, doing)))
        yield
