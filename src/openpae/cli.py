"""The command `pae`: each subcommand is a thin call of a library function."""

from __future__ import annotations

import functools
import inspect
import io
import math
import os
import re
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from openpae import __version__
from openpae.commands.bench import bench
from openpae.commands.console import common_help, parsed
from openpae.commands.data import info, pack
from openpae.commands.demo import demo
from openpae.commands.env import env
from openpae.commands.interpolate import interpolate
from openpae.commands.measure import evaluate, profile
from openpae.commands.pairs import with_pairs
from openpae.commands.plan import plan
from openpae.commands.presets import presets
from openpae.commands.publish import export, import_official, push
from openpae.commands.reconstruct import reconstruct
from openpae.commands.sample import sample
from openpae.commands.search import search_guidance
from openpae.commands.study import study
from openpae.commands.train import cache_latents, fit_targets, train_generator, train_refiner, train_tokenizer
from openpae.runtime.escape import one_line
from openpae.runtime.extras import MissingExtra
from openpae.runtime.names import did_you_mean
from openpae.runtime.signals import Stopped
from openpae.runtime.terminal import output_mode, print_json

_Result = Mapping[str, Any] | None
_COMMON = ("--json", "--quiet", "--debug")
"""Options of all commands; `main` takes them."""

_NO_MEMORY = (
    "out of memory",
    "not enough memory",
    "t allocate memory",
    "Storage size calculation overflowed",
)
"""Texts of torch's RuntimeErrors for memory: on a GPU, on a CPU, and for impossible sizes."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run a subcommand.

    The exit code is 0 after success, 2 after an error (one line), 3 if the result is not usable, and 130 or
    143 after a signal.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    common = {option for option in _COMMON if option in arguments}
    debug = "--debug" in common
    arguments = [argument for argument in arguments if argument not in common]
    name = arguments[0] if arguments else "--help"
    if name in ("-h", "--help"):
        print(_overview())
        return
    if name == "--version":
        print(f"openpae {__version__}")
        return
    if name == "--print-completion":
        _print_completion(arguments[1] if len(arguments) > 1 else "")
        return
    if name not in COMMANDS:
        hint = did_you_mean(name, COMMANDS)
        sys.exit(_fail(f"unknown command {name!r}; {hint + ' ' if hint else ''}known: {', '.join(COMMANDS)}"))
    as_json = "--json" in common
    if as_json and name not in _WITH_RESULT:
        sys.exit(_fail(f"pae {name} has no --json; these commands have it: {', '.join(_WITH_RESULT)}"))

    if isinstance(
        sys.stdout, io.TextIOWrapper
    ):  # file names may hold any byte, and the terminal may not be UTF-8
        sys.stdout.reconfigure(errors="backslashreplace")
    lines = _WarningLines()
    plain, warnings.formatwarning = warnings.formatwarning, lines.line
    try:
        with output_mode(json=as_json, quiet="--quiet" in common):
            result = COMMANDS[name](arguments[1:])
        if as_json and result is not None and os.environ.get("RANK", "0") == "0":
            print_json(result)
    except Stopped as stop:
        print(f"pae: {one_line(stop)}", file=sys.stderr)
        sys.exit(128 + stop.signum)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader of the output has left, such as head
        sys.stderr.close()
        sys.exit(1)
    except (ValueError, TypeError, OSError, FloatingPointError, MissingExtra) as error:
        if debug:
            raise
        sys.exit(_fail(str(error)))
    except (RuntimeError, MemoryError) as error:
        if debug or not (isinstance(error, MemoryError) or any(text in str(error) for text in _NO_MEMORY)):
            raise
        hint = "lower --batch-size or loop.device_batch_size, or the sizes of the model"
        sys.exit(_fail(f"{_memory(str(error))}; {hint}"))
    finally:
        warnings.formatwarning = plain
        lines.count_the_rest()


def quickstart(
    out: Path | None = None,
    budget: str | None = None,
    seed: int = 0,
    pretrained: bool = False,
    strict_budget: bool = False,
) -> None:
    """Train a small tokenizer and generator on emoji, sample, measure, and write report.html.

    Args:
        out: folder for all results; an interrupted command resumes when it is run again. By default
            runs/quickstart, or runs/pretrained.
        budget: total time, such as 3min, 12min or 2h; 12min by default.
        seed: seed of weights, data order and noise.
        pretrained: train nothing; sample and reconstruct with the pretrained models of the package.
        strict_budget: reject a budget that is too short for this machine; by default it is extended.
    """
    from openpae.quickstart.plans import parse_budget
    from openpae.quickstart.run import run_quickstart, show_pretrained

    if pretrained and (budget is not None or strict_budget):
        raise ValueError("--pretrained trains nothing, so it has no --budget; leave one of them out")
    if pretrained:
        print(f"open {show_pretrained(out or Path('runs/pretrained'), seed=seed)} in a browser")
        return
    seconds = parse_budget(budget or "12min")
    outcome = run_quickstart(out or Path("runs/quickstart"), seconds, seed=seed, strict=strict_budget)
    if outcome.verdict:
        print(f"{outcome.verdict}\nopen {outcome.report} in a browser to see it")
        sys.exit(3)
    print(f"open {outcome.report} in a browser")


class _WarningLines:
    """Print each warning in one line; count those beyond the `most_lines` of their class."""

    def __init__(self) -> None:
        self.counts: Counter[type[Warning]] = Counter()

    def line(self, message: Warning | str, category: type[Warning], *_: object, **__: object) -> str:
        self.counts[category] += 1
        hidden = self.counts[category] > getattr(category, "most_lines", math.inf)
        return "" if hidden else f"pae: warning: {one_line(message)}\n"

    def count_the_rest(self) -> None:
        for category, count in self.counts.items():
            if (more := count - getattr(category, "most_lines", math.inf)) > 0:
                print(f"pae: warning: {more} more warnings of this kind, {count} in all", file=sys.stderr)


def _memory(message: str) -> str:
    """Return the message of an out-of-memory error in one line, without the position in C++ code."""
    if asked := re.search(r"you tried to allocate (\d+) bytes", message):
        return f"out of memory: a tensor of {int(asked[1]):,} bytes had no room"
    return message.splitlines()[0] if message else "out of memory"


def _fail(message: str) -> int:
    print(f"pae: error: {one_line(message)}", file=sys.stderr)
    return 2


def _command(function: Callable[..., _Result]) -> Callable[[Sequence[str]], _Result]:
    def run(argv: Sequence[str]) -> _Result:
        @functools.wraps(function)
        def collect(*args: Any, **named: Any) -> tuple[Any, Any]:
            return args, named

        name = _name(function)
        about = (inspect.getdoc(function) or "").partition("\nArgs:")[0].strip()
        args, named = parsed(
            collect,
            args=with_pairs(name, argv),
            prog=f"pae {name}",
            description=f"{about}\n{common_help(with_json=name in _WITH_RESULT)}",
        )
        return function(*args, **named)

    run.__doc__ = function.__doc__
    return run


def _name(function: Callable[..., Any]) -> str:
    return function.__name__.replace("_", "-")


_WITH_CONFIG = (plan, train_refiner, train_tokenizer, train_generator)
"""Commands that parse their arguments themselves: the fields of a config are their flags."""
_FUNCTIONS: tuple[Callable[..., _Result], ...] = (
    *(quickstart, pack, plan, train_refiner, fit_targets, train_tokenizer, cache_latents, train_generator),
    *(sample, search_guidance, interpolate, reconstruct, evaluate, profile, study, demo),
    *(import_official, export, push, info, presets, bench, env),
)
COMMANDS = {_name(each): each if each in _WITH_CONFIG else _command(each) for each in _FUNCTIONS}
_WITH_RESULT = ("plan", "sample", "evaluate", "profile", "info", "bench", "env")
"""Commands with --json: they return their result."""


def _print_completion(shell: str) -> None:
    from openpae.commands.completion import print_completion

    try:
        print_completion(shell, {_name(each): each for each in _FUNCTIONS}, _WITH_RESULT)
    except ValueError as error:
        sys.exit(_fail(str(error)))


def _overview() -> str:
    rows = "\n".join(
        f"  {name:18} {(function.__doc__ or '').strip().splitlines()[0]}"
        for name, function in COMMANDS.items()
    )
    return (
        f"openpae {__version__}: prior-aligned autoencoders for latent diffusion\n\nusage: pae COMMAND "
        f"...\n\n{rows}\n\n"
        "  pae COMMAND --help lists the options of a command.\n"
        "  pae --print-completion bash (or zsh, fish) prints a script that completes them in a shell.\n"
        f"  {common_help(with_json=True)}"
    )
