"""Packages that only some commands need: they are installed with an extra of openpae."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager


class MissingExtra(ImportError):
    """A package of an extra is not installed; the message names the extra."""


@contextmanager
def needs(extra: str, user: str) -> Iterator[None]:
    """Inside, import packages of an extra. One that is not installed raises `MissingExtra`.

    Args:
        extra: name of the extra in pyproject.toml.
        user: what needs the package, for the message.

    Raises:
        MissingExtra: a package is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or str(error)).partition(".")[0]
        if package == "openpae":
            raise
        raise MissingExtra(
            f"{user} needs {package}; install it with pip install 'openpae[{extra}]'", name=error.name
        ) from None


def require(extra: str, user: str, *packages: str) -> None:
    """Import packages of an extra, so that a missing one is an error before the work begins.

    Raises:
        MissingExtra: a package is not installed.
    """
    with needs(extra, user):
        for package in packages:
            importlib.import_module(package)
