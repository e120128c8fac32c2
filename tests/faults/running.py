"""Run a command in a folder that something is wrong with, and see what the user sees."""

from __future__ import annotations

import contextlib
import os
import re
import resource
import shlex
import shutil
import signal
import sys
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tensorboard.compat.proto.event_pb2
import tensorboard.summary.writer.record_writer  # noqa: F401
from PIL import Image

from openpae import cli
from openpae.storage.model_folder import checkpoint_path


@dataclass(frozen=True, kw_only=True)
class Case:
    """One row."""

    group: str
    """Heading of the page that it stands under."""
    given: str
    """What is wrong, in words."""
    spoil: Callable[[], object]
    """Makes it so, in the current folder: a fresh copy of `workspace`."""
    command: str
    """As it is typed."""
    says: str
    """Pattern of the line."""
    code: int = 2
    """Exit code."""
    foreign: str = ""
    """Pattern of a library's own words, which may change: the page leaves them out."""
    largest_file: int | None = None
    """Limit of the process on the size of a file, in bytes: a full disk that needs no root."""


@dataclass(frozen=True)
class Outcome:
    """What came of it."""

    code: int
    line: str
    """The line on stderr behind "pae: error: " or "pae: warning: "; where there is none, what was printed."""
    everything: str
    """All of stdout and stderr."""


SMALL = "--loop.steps 2 --loop.global-batch-size 2 --loop.device cpu"
TOKENIZER = f"pae train-tokenizer tokenizer/tiny run --data.images images {SMALL}"
GENERATOR = f"pae train-generator generator/tiny run --latents latents {SMALL}"


def workspace(root: Path) -> None:
    """images, packed, tokenizer, another-tokenizer, latents, generator and run (of the generator), all tiny.

    Called once; every case gets a copy.
    """
    rng = np.random.default_rng(0)
    for number in range(6):
        folder = root / "images" / ("cats" if number < 3 else "dogs")
        folder.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 255, (20, 24, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    for command in (
        "pae pack images packed --size 32",
        f"pae train-tokenizer tokenizer/tiny tokenizer-run --data.images packed {SMALL}",
        f"pae train-tokenizer tokenizer/tiny another-run --data.images packed {SMALL} --loop.seed 1",
        "pae cache-latents tokenizer-run packed latents --device cpu",
        f"pae train-generator generator/tiny generator-run --latents latents {SMALL} --loop.save-every 1",
    ):
        outcome = run(command, root)
        assert outcome.code == 0, outcome.everything
    for name in ("tokenizer", "another", "generator"):
        source = checkpoint_path(root / f"{name}-run", 2)
        target = root / {"another": "another-tokenizer"}.get(name, name)
        target.mkdir()
        for file in ("config.yaml", "model.safetensors", "README.md"):
            shutil.copy(source / file, target / file)
    shutil.rmtree(root / "tokenizer-run")
    shutil.rmtree(root / "another-run")


def run_case(case: Case, root: Path, scratch: Path) -> Outcome:
    """Run a row in a copy of the workspace at `root`, made in `scratch`."""
    shutil.copytree(root, scratch, symlinks=True)
    outcome = run(case.command, scratch, case.spoil, case.largest_file)
    shutil.rmtree(scratch)
    return outcome


def run(
    command: str,
    folder: Path,
    spoil: Callable[[], object] = lambda: None,
    largest_file: int | None = None,
) -> Outcome:
    """Run a command in a folder, in a process of its own; one that hangs is ended after two minutes."""
    output = folder / ".output"
    sys.stdout.flush()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of fork beside threads
        child = os.fork()
    if not child:
        _run_here(command, folder, output, spoil, largest_file)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    text = output.read_text(encoding="utf-8", errors="replace")
    output.unlink()
    lines = [line for line in text.splitlines() if line.strip()]
    messages = re.findall(r"pae: (?:error|warning): (.*)", text)  # a progress bar may stand before it
    return Outcome(code, messages[-1] if messages else " ".join(lines), text)


def _run_here(
    command: str, folder: Path, output: Path, spoil: Callable[[], object], largest_file: int | None
) -> None:
    code = 1
    with output.open("w", encoding="utf-8", errors="surrogateescape") as file:
        try:
            signal.alarm(120)
            os.chdir(folder)
            spoil()
            warnings.resetwarnings()
            warnings.simplefilter("ignore", ResourceWarning)
            warnings.showwarning = _show  # pytest would keep them to itself
            if largest_file is not None:
                hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
                resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, hard))
            with contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
                cli.main(shlex.split(command)[1:])
            code = 0
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
        except BaseException:
            traceback.print_exc(file=file)
    os._exit(code)


def _show(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: object = None,
    line: str | None = None,
) -> None:
    print(warnings.formatwarning(message, category, filename, lineno, line), end="", file=sys.stderr)
