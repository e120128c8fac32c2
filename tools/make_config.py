"""Write docs/config.md from the docstrings of the configs: python tools/make_config.py"""

from __future__ import annotations

import dataclasses
import inspect
import typing
from pathlib import Path
from typing import Any

from openpae.commands.fields import field_docs
from openpae.data.settings import ImageData
from openpae.engine.settings import LoopConfig, OptimConfig
from openpae.geometry.settings import MeasureConfig
from openpae.models.configs import (
    DecoderConfig,
    DiscriminatorConfig,
    DiTDHConfig,
    HeadConfig,
    LightningDiTConfig,
    LowPassConfig,
    PAEConfig,
    RefinerConfig,
)
from openpae.objective.settings import TokenizerLoss
from openpae.sampling.settings import SamplerConfig
from openpae.study.settings import (
    Claim,
    JudgeSettings,
    MeasureSettings,
    Reported,
    Study,
    StudyRow,
    StudySetup,
)
from openpae.train.settings import GeneratorRun, RefinerRun, TokenizerRun

RUNS = (RefinerRun, TokenizerRun, GeneratorRun, Study, StudySetup)
PARTS = (
    *(PAEConfig, DecoderConfig, RefinerConfig, LowPassConfig, LightningDiTConfig, DiTDHConfig),
    *(HeadConfig, ImageData, TokenizerLoss, DiscriminatorConfig, OptimConfig, LoopConfig, SamplerConfig),
    *(StudyRow, Claim, Reported, MeasureSettings, MeasureConfig, JudgeSettings),
)


def default(field: dataclasses.Field[Any]) -> str:
    """A field's default as a cell of the table."""
    if field.default is not dataclasses.MISSING:
        return "null" if field.default is None else f"`{field.default}`"
    return "required" if field.default_factory is dataclasses.MISSING else "see its own table"


def table(cls: type) -> str:
    """One config as Markdown."""
    docs, hints = field_docs(cls), typing.get_type_hints(cls)
    rows = []
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        choices = [arg for arg in typing.get_args(hint) if dataclasses.is_dataclass(arg)]
        if typing.get_origin(hint) is tuple:
            choices = []  # a list of configs, not a choice among them
        kind = " or ".join(choice.__name__ for choice in choices) or str(field.type).replace(" | ", " or ")
        meaning = docs[field.name].replace("|", "\\|")
        rows.append(f"| `{field.name}` | {kind} | {default(field)} | {meaning} |")
    summary = " ".join((inspect.getdoc(cls) or "").split("\n\n")[0].split())
    return "\n".join(
        [
            f"### {cls.__name__}",
            "",
            summary,
            "",
            "| field | type | default | meaning |",
            "|---|---|---|---|",
            *rows,
            "",
        ]
    )


def page() -> str:
    """The whole page."""
    head = """# Configs

`python tools/make_config.py` generates this page. A config file names its `kind` first and holds the fields
below. Any of them can follow on the command line (`--optim.lr 1e-4`).

- An unknown key, a wrong type or a missing key is an error that says what is allowed.
- In YAML write `2.0e-4`: without the dot it is text.
- A field that takes one of several configs holds a `kind` of its own, by default the first.
- `pae train-generator` also takes `--model.size s`, `b`, `l`, `xl`, `1p0b` or `1p6b` for layers, width and
  heads together.
"""
    runs = "\n".join(table(cls) for cls in RUNS)
    parts = "\n".join(table(cls) for cls in PARTS)
    return f"{head}\n## Runs\n\n{runs}\n## Parts\n\n{parts}"


if __name__ == "__main__":
    (Path(__file__).parent.parent / "docs" / "config.md").write_text(page(), encoding="utf-8")
