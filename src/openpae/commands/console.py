"""What the commands share: argument types, parsing and output."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import math
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import tyro

from openpae import config as configs
from openpae.commands.fields import OFTEN_CHANGED, short_help
from openpae.runtime.terminal import say

T = TypeVar("T")

Images = Annotated[Path, tyro.conf.arg(metavar="IMAGES")]
Out = Annotated[Path, tyro.conf.arg(metavar="OUT")]
TokenizerPath = Annotated[Path, tyro.conf.arg(metavar="TOKENIZER")]
GeneratorPath = Annotated[Path, tyro.conf.arg(metavar="GENERATOR")]
ReferencePath = Annotated[Path, tyro.conf.arg(metavar="REFERENCE")]
Folder = Annotated[Path, tyro.conf.arg(metavar="FOLDER")]
Device = Literal["auto", "cpu", "cuda", "mps"]
Precision = Literal["fp32", "bf16"]


def parsed(target: Callable[..., T], **options: Any) -> T:
    """Call `tyro.cli`. A ValueError raised by a config is re-raised unchanged.

    Args:
        target: config class, or function that returns its arguments.
        options: of `tyro.cli`.

    Raises:
        ValueError: a config refuses a value, or an option is NaN, infinite or beyond 2^63.
        SystemExit: tyro has printed the help, or an argument that it cannot parse.
    """
    messages = io.StringIO()
    # tyro asks standard output whether it is a terminal, and does not know NO_COLOR.
    plain = bool(os.environ.get("NO_COLOR")) or not sys.stderr.isatty()
    no_terminal = io.TextIOWrapper(io.BytesIO(), encoding=sys.stdout.encoding or "utf-8", write_through=True)
    try:
        with (
            contextlib.redirect_stderr(messages),
            contextlib.redirect_stdout(no_terminal) if plain else contextlib.nullcontext(),
        ):
            result: T = tyro.cli(target, **options)
    except SystemExit as stop:
        no_terminal.seek(0)
        sys.stdout.write(no_terminal.read())
        fault = stop.__context__
        while fault is not None:
            if isinstance(fault, ValueError) and _raised_by_openpae(fault):
                raise fault from None
            fault = fault.__cause__ or fault.__context__
        sys.stderr.write(messages.getvalue())
        raise
    if isinstance(result, tuple):  # arguments of a function; a config checks its own fields
        _check_options("", result)
    return result


def common_help(*, with_json: bool) -> str:
    """One line about the options of all commands, which `cli.main` takes."""
    first = "--json prints the result as one JSON object. " if with_json else ""
    return f"{first}--quiet shows no progress and no notes. --debug shows the traceback of an error."


def _check_options(name: str, value: Any) -> None:
    """Refuse NaN, infinity and integers beyond 2^63 in options, however nested."""
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"--{name.replace('_', '-')} must be a finite number, got {value}")
    if isinstance(value, int) and abs(value) >= 2**63:
        raise ValueError(f"--{name.replace('_', '-')} must be below 2^63, got {len(str(abs(value)))} digits")
    if isinstance(value, dict):
        for key, item in value.items():
            _check_options(str(key), item)
    elif isinstance(value, tuple):
        for item in value:
            _check_options(name, item)
    elif dataclasses.is_dataclass(value):
        _check_options(name, vars(value))


def _raised_by_openpae(fault: BaseException) -> bool:
    trace = fault.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and trace.tb_frame.f_globals.get("__name__", "").startswith("openpae.")


def run_of(
    kind: type[T], argv: Sequence[str], command: str, change: Callable[[T], T] | None = None
) -> tuple[T, Path]:
    """Parse `pae COMMAND CONFIG RUN_DIR [--field value ...]`: the config changed by the flags, and RUN_DIR.

    Args:
        kind: class of the config.
        argv: arguments after the command's name.
        command: the command's name.
        change: applied to the config before the flags; for flags that set several fields.
    """
    paths = [argument for argument in argv[:2] if not argument.startswith("-")]
    if len(paths) < 2:
        if any(argument in ("-h", "--help", "--help-all") for argument in argv) and not paths:
            print(
                f"usage: pae {command} CONFIG RUN_DIR [--field value ...]\n\n  with CONFIG, --help lists "
                f"the fields that people change, --help-all all of them\n\n  {common_help(with_json=False)}"
            )
            sys.exit(0)
        if not paths:
            raise ValueError(
                f"pae {command} needs CONFIG and RUN_DIR: pae {command} CONFIG RUN_DIR [--field value]"
            )
    loaded = configs.load(kind, paths[0])
    loaded = loaded if change is None else change(loaded)
    run = overridden(loaded, argv[len(paths) :], f"pae {command} CONFIG RUN_DIR")
    if len(paths) < 2:
        raise ValueError(
            f"pae {command} needs a run folder after the config: pae {command} {paths[0]} RUN_DIR"
        )
    return run, Path(paths[1])


def overridden(loaded: T, argv: Sequence[str], prog: str) -> T:
    """Return a config changed by flags. `--help` shows the fields that people change, `--help-all` the rest.

    Raises:
        SystemExit: after the help.
    """
    fields = OFTEN_CHANGED.get(type(loaded).__name__, ())
    if {"-h", "--help"} & set(argv) and fields:
        print(short_help(loaded, prog, fields))
        print(f"  {common_help(with_json=False)}")
        sys.exit(0)
    argv = ["--help" if argument == "--help-all" else argument for argument in argv]
    run: T = parsed(
        type(loaded),
        default=loaded,
        args=list(argv),
        prog=prog,
        config=(tyro.conf.AvoidSubcommands,),  # the file chooses among several config classes
    )
    # Flags get the checks of a file: no NaN, no number beyond 2^63.
    return configs.from_dict(type(loaded), configs.to_dict(run))


def take_option(argv: Sequence[str], name: str) -> tuple[list[str], str | None]:
    """Split `NAME VALUE` (or `NAME=VALUE`) off the arguments; the value is None where it is not given.

    Raises:
        ValueError: the value is missing, or the option is given twice.
    """
    rest, values = [], []
    arguments = iter(argv)
    for argument in arguments:
        if argument == name or argument.startswith(f"{name}="):
            value = argument.partition("=")[2] if "=" in argument else next(arguments, "")
            if not value:
                raise ValueError(f"{name} needs a value")
            values.append(value)
        else:
            rest.append(argument)
    if len(values) > 1:
        raise ValueError(f"{name} is given twice: {', '.join(values)}")
    return rest, values[0] if values else None


def say_on_rank0(text: str) -> None:
    """Print one line on rank 0 only."""
    from openpae.runtime import processes

    if processes.is_rank0():
        say(text)


def print_run(run_dir: Path, metrics: dict[str, float]) -> None:
    """Print that a run is done, and its last metrics."""
    shown = ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())
    say_on_rank0(f"done: {run_dir}" + (f" ({shown})" if shown else ""))


def print_skipped(names: Sequence[str]) -> None:
    """Print the names of the files that were left out."""
    if names:
        say_on_rank0(
            f"left out {len(names)} broken files: {'; '.join(names[:5])}{' ...' if len(names) > 5 else ''}"
        )


_LARGEST = {
    **dict.fromkeys(("size", "width", "image_size", "patch_size"), 2**14),
    "latent_dim": 2**16,
    "workers": 2**10,
}
"""Upper bounds of options. Larger values are mistakes that would take hours or all memory."""


def print_classes(names: Sequence[str], labels: Iterable[int]) -> None:
    """Print the class of each label, and the classes without images."""
    from openpae.data.classes import class_list, count_classes, empty_classes

    counts = count_classes(names, labels)
    say_on_rank0(f"labels: {class_list(names, counts)}")
    if empty := empty_classes(names, counts):
        say_on_rank0(f"no image is left of class {', '.join(empty)}; no generator learns or draws it")


def at_least_one(**numbers: int | None) -> None:
    """Refuse counts below 1 and above any use.

    Raises:
        ValueError: names the flag.
    """
    for name, number in numbers.items():
        configs.check_number(f"--{name.replace('_', '-')}", number, f"[1, {_LARGEST.get(name, 10**8)}]")
