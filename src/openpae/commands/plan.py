"""The command that says what a run needs, before it is paid for."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

from openpae import config as configs
from openpae.commands.console import overridden, parsed
from openpae.plan.settings import PlanSettings
from openpae.runtime.cards import CARDS
from openpae.train.settings import GeneratorRun, RefinerRun, TokenizerRun

_RUNS: list[type[Any]] = [RefinerRun, TokenizerRun, GeneratorRun]
_USAGE = f"""usage: pae plan CONFIG [--gpus N] [--card CARD] [--parallel ddp|fsdp] [--utilisation SHARE]
                [--images N] [--json] [--field value ...]

  the fields are those of the config: pae train-... CONFIG --help lists them
  cards: {", ".join(CARDS)}"""


def plan(argv: Sequence[str]) -> None:
    """Say what a training run needs: memory, device batch, time, disk. It needs no GPU and no data.

    The run's own steps are taken with tensors that have shapes and no values. So they also show that no step
    waits for a value: one that reads it is an error.
    """
    if not argv or argv[0].startswith("-"):
        if not {"-h", "--help"} & set(argv):
            raise ValueError("pae plan needs CONFIG: pae plan CONFIG [--gpus N] [--card CARD]")
        print(_USAGE)
        sys.exit(0)
    if {"-h", "--help"} & set(argv):
        print(_USAGE)
        sys.exit(0)
    arguments = [argument for argument in argv[1:] if argument != "--json"]
    parse: Any = parsed  # with this option it gives a pair
    settings, rest = parse(PlanSettings, args=arguments, return_unknown_args=True)
    prog = f"pae plan {argv[0]}"
    run = overridden(configs.load_one_of(_RUNS, argv[0]), rest, prog)
    from openpae.plan.estimate import facts, plan_run
    from openpae.plan.text import lines

    planned = plan_run(run, settings)
    if len(arguments) < len(argv) - 1:
        json.dump(facts(planned), sys.stdout, indent=1)
        print()
    else:
        print("\n".join(lines(planned)).strip())
