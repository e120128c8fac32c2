"""`pae plan`: what a training run needs."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from openpae import config as configs
from openpae.commands.console import common_help, overridden, parsed
from openpae.plan.settings import PlanSettings
from openpae.runtime.cards import CARDS
from openpae.runtime.terminal import say
from openpae.train.settings import GeneratorRun, RefinerRun, TokenizerRun

_RUNS: list[type[Any]] = [RefinerRun, TokenizerRun, GeneratorRun]
_USAGE = f"""usage: pae plan CONFIG [--gpus N] [--card CARD] [--parallel ddp|fsdp] [--utilisation SHARE]
                [--images N] [--field value ...]

  the fields are those of the config: pae train-... CONFIG --help lists them
  cards: {", ".join(CARDS)}

  {common_help(with_json=True)}"""


def plan(argv: Sequence[str]) -> Mapping[str, Any]:
    """Print what a training run needs: memory, device batch, time, disk. It needs no GPU and no data.

    It runs two steps of the training with fake tensors, which have shapes and no values. A step that reads a
    value is an error, because a GPU would wait there.
    """
    if {"-h", "--help"} & set(argv):
        print(_USAGE)
        sys.exit(0)
    if not argv or argv[0].startswith("-"):
        raise ValueError("pae plan needs CONFIG: pae plan CONFIG [--gpus N] [--card CARD]")
    parse: Any = parsed  # with return_unknown_args it returns a pair
    settings, rest = parse(PlanSettings, args=list(argv[1:]), return_unknown_args=True)
    run = overridden(configs.load_one_of(_RUNS, argv[0]), rest, f"pae plan {argv[0]}")
    from openpae.plan.estimate import plan_data, plan_run
    from openpae.plan.text import lines

    planned = plan_run(run, settings)
    for line in "\n".join(lines(planned)).strip().splitlines():
        say(line)
    return plan_data(planned)
