"""`pae --print-completion SHELL`: a script that completes commands and their options."""

from __future__ import annotations

import functools
import inspect
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from openpae import config as configs
from openpae.plan.settings import PlanSettings
from openpae.train.settings import GeneratorRun, RefinerRun, TokenizerRun

SHELLS = ("bash", "zsh", "fish")

_TRAINING: dict[str, tuple[type[Any], str]] = {
    "train-refiner": (RefinerRun, "refiner/tiny"),
    "train-tokenizer": (TokenizerRun, "tokenizer/tiny"),
    "train-generator": (GeneratorRun, "generator/tiny"),
}
"""Command -> class of its config, and a preset of it."""


@dataclass(frozen=True, kw_only=True)
class _Common:
    quiet: bool = False
    debug: bool = False


@dataclass(frozen=True, kw_only=True)
class _WithResult(_Common):
    json: bool = False


def print_completion(
    shell: str, functions: Mapping[str, Callable[..., Any]], with_json: Sequence[str]
) -> None:
    """Print the completion script of `pae` with all its commands. To complete, it needs only Python.

    Args:
        shell: one of SHELLS.
        functions: command -> its function.
        with_json: commands with --json.

    Raises:
        ValueError: another shell.
    """
    if shell not in SHELLS:
        raise ValueError(f"--print-completion must be one of {', '.join(SHELLS)}, got {shell!r}")
    special = {name: _training(*run) for name, run in _TRAINING.items()} | {"plan": _plan}
    specs: dict[str, Callable[..., Any]] = {}
    for name, function in functions.items():
        specs[name] = _with_common(special.get(name, function), _WithResult if name in with_json else _Common)
    arguments = ["--tyro-write-completion", shell, "-"]
    try:
        tyro.extras.subcommand_cli_from_dict(specs, prog="pae", args=arguments)
    except SystemExit as stop:
        if stop.code:
            raise


def _training(kind: type[Any], preset: str) -> Callable[..., None]:
    def spec(config: Any, run_dir: Path, /, run: Any) -> None: ...

    fields: Any = Annotated[kind, tyro.conf.arg(name=""), tyro.conf.AvoidSubcommands]
    spec.__annotations__ = {"config": str, "run_dir": Path, "run": fields}
    spec.__defaults__ = (configs.load(kind, preset),)
    return spec


def _plan(config: str, /, settings: tyro.conf.OmitArgPrefixes[PlanSettings]) -> None: ...


def _with_common(function: Callable[..., Any], common: type[Any]) -> Callable[..., Any]:
    """The function with the options of all commands as further parameters."""

    @functools.wraps(function)
    def spec(*_: Any, **__: Any) -> None: ...

    hints = typing.get_type_hints(function, include_extras=True)
    options: Any = Annotated[common, tyro.conf.arg(name="")]
    hints["common_options"] = options
    signature = inspect.signature(function)
    parameters = [each.replace(annotation=hints[name]) for name, each in signature.parameters.items()]
    added = inspect.Parameter(
        "common_options", inspect.Parameter.KEYWORD_ONLY, default=common(), annotation=options
    )
    spec.__annotations__ = hints
    spec.__signature__ = signature.replace(parameters=[*parameters, added])  # type: ignore[attr-defined]
    del spec.__wrapped__
    return spec
