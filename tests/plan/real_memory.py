"""Print the memory that real steps of a run need, in bytes: python real_memory.py RUN.yaml

It is the peak of the resident memory in two steps of the phase that `pae plan` measures, less the resident
memory before the networks were built.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import torch

from openpae import config as configs
from openpae.engine.loop import trial_steps
from openpae.plan.trial import last_steps
from openpae.train.generator import GeneratorTask
from openpae.train.refiner import RefinerTask
from openpae.train.settings import GeneratorRun, RefinerRun, TokenizerRun
from openpae.train.tokenizer import TokenizerTask


def status(field: str) -> int:
    """A field of this process's status file, in bytes."""
    match = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="utf-8"))
    assert match
    return 1024 * int(match[1])


def main(file: Path) -> None:
    """Take the steps and print."""
    torch.set_num_threads(1)
    run = configs.load_one_of([RefinerRun, TokenizerRun, GeneratorRun], file)
    warm = torch.nn.Linear(64, 64)
    warm(torch.rand(64, 64)).sum().backward()  # what libraries set up once
    before = status("VmRSS")
    if isinstance(run, GeneratorRun):
        task = GeneratorTask(run)
    else:
        task = TokenizerTask(run) if isinstance(run, TokenizerRun) else RefinerTask(run)
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak begins here
    for _ in trial_steps(task, run.optim, run.loop, last_steps(run)):
        pass
    print(status("VmHWM") - before)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
