"""A pair as one argument: the folders that it stands for, before a command parses its arguments."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise, takewhile

from openpae.storage.pairs import PARTS, find_pair

_BOTH = ("sample", "search-guidance")
_TOKENIZER = ("interpolate", "reconstruct", "cache-latents")


def with_pairs(command: str, argv: Sequence[str]) -> list[str]:
    """Replace a pair in the arguments of a command by its tokenizer and generator.

    A pair is a folder with both, such as runs/quickstart, or a name of `openpae.list_models()`. Options of
    `evaluate` and `interpolate` are filled too: `--generator PAIR` stands for both models.

    Args:
        command: name of the command.
        argv: its arguments.
    """
    arguments = list(argv)
    if command in (*_BOTH, *_TOKENIZER) and arguments and (pair := find_pair(arguments[0])):
        parts = PARTS if command in _BOTH else PARTS[:1]
        arguments[:1] = [str(pair / part) for part in parts]
        if command == "interpolate" and "--seeds" in arguments and "--generator" not in arguments:
            arguments += ["--generator", str(pair / "generator")]
    elif command == "profile":
        count = len(list(takewhile(lambda argument: not argument.startswith("-"), arguments)))
        pairs = [find_pair(argument) for argument in arguments[:count]]
        for i, pair in enumerate(pairs):
            arguments[i] = arguments[i] if pair is None else str(pair / "tokenizer")
    elif command == "evaluate":
        arguments = _options(arguments)
    elif command in ("info", "push", "demo", "export") and arguments and (pair := find_pair(arguments[0])):
        arguments[0] = str(pair)
    return arguments


def _options(arguments: list[str]) -> list[str]:
    filled = list(arguments)
    for i, (option, value) in enumerate(pairwise(arguments)):
        if option in ("--generator", "--tokenizer") and (pair := find_pair(value)):
            filled[i + 1] = str(pair / option.removeprefix("--"))
            if option == "--generator" and "--tokenizer" not in arguments:
                filled += ["--tokenizer", str(pair / "tokenizer")]
    return filled
