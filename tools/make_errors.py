"""Write docs/errors.md from the table that the tests run: python tools/make_errors.py"""

from __future__ import annotations

import re
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from tests.faults.edited_cases import ROWS
from tests.faults.running import SMALL, Case, Outcome, run_case, workspace

HEAD = """# Errors

`python tools/make_errors.py` generates this page from `tests/faults/cases.py`. The tests run every row.
Paths are those of a small folder with `images`, `packed`, `tokenizer`, `another-tokenizer`, `latents`,
`generator` and `generator-run`. The messages of libraries, and what differs between machines, are left out
(...).

**One line.** A command that cannot do its work prints one line (`pae: error: ...`) and exits with 2.
`--debug` shows the traceback. A flag that does not parse is answered in a frame, with the flags that may
have been meant. A warning (`pae: warning: ...`) appears where the result is still what was asked for.

**Signals.** After SIGINT or SIGTERM the command saves and exits with 130 or 143. The same command then goes
on.

**When damage is detected.** Opening a folder checks what costs nothing: sizes, types, labels, and that
nothing is missing. The weights of a model are hashed whenever they are loaded, a checkpoint whenever a run
goes on. Packed images, features and latents may be terabytes: `pae info FOLDER --verify` reads them
completely and compares every checksum. Run it after a copy, or where a disk is in doubt. What no checksum
covers is not detected. A flipped bit inside one of your JPEG files gives other pixels and no error.

**When the disk is full,** the last complete checkpoint, shard or file stays as it was. Nothing half-written
is left. The same command goes on once there is room.

**When the process is killed,** the same holds. `tests/faults/test_kills.py` kills training, caching and
sampling at random moments and compares the bytes with those of an undisturbed run.

**When a process that reads images dies,** the error names the file it was reading.

**Untrusted files.** Images are opened as seven formats only, recognised by their content. Weights and
checkpoints are read by safetensors, or by torch with `weights_only=True`. Arrays are read without pickles,
YAML without tags. The exception is `state/` of a run with `loop.parallel: fsdp`: what torch writes there
has a pickle in it. Go on with such runs only if they are your own.

Below, SMALL stands for `%s`.
"""


def page(outcomes: Mapping[Case, Outcome]) -> str:
    """The whole page."""
    parts = [HEAD % SMALL]
    for group in dict.fromkeys(case.group for case in outcomes):
        rows = [row(case, outcome) for case, outcome in outcomes.items() if case.group == group]
        parts.append(
            f"\n## {group}\n\n| given | command | exit | what is said |\n|---|---|---|---|\n"
            + "\n".join(rows)
            + "\n"
        )
    return "".join(parts)


def row(case: Case, outcome: Outcome) -> str:
    """One case as a line of the table."""
    line = re.sub(case.foreign, "...", outcome.line) if case.foreign else outcome.line
    line = re.sub(r"\b[0-9a-f]{16}\b", "...", line)  # fingerprints
    command = case.command.replace(SMALL, "SMALL")
    cells = (case.given, f"`{command}`", str(outcome.code), f"`{line}`")
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch) / "workspace"
        root.mkdir()
        workspace(root)
        text = page({case: run_case(case, root, Path(scratch) / "copy") for case in ROWS})
    (Path(__file__).parent.parent / "docs" / "errors.md").write_text(text, encoding="utf-8")
