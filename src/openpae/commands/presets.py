"""`pae presets`: the configs that come with the package."""

from __future__ import annotations

from typing import Annotated

import tyro

from openpae import config as configs
from openpae.runtime.terminal import say


def presets(
    name: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="[NAME]")] = None,
) -> None:
    """List the presets with one line each, or print one.

    Args:
        name: a preset, such as tokenizer/tiny; printed with its comments. By default all are listed.
    """
    if name is not None:
        print(configs.find(name).read_text(encoding="utf-8"), end="")
        return
    known = configs.preset_names()
    width = max(map(len, known))
    for each in known:
        say(f"{each:{width}}  {_first_sentence(configs.find(each).read_text(encoding='utf-8'))}".rstrip())


def _first_sentence(text: str) -> str:
    """The first sentence of the comment that a preset begins with."""
    lines = text.splitlines()
    comment = []
    for line in lines:
        if not line.startswith("#"):
            break
        comment.append(line.removeprefix("#").strip())
    sentence = " ".join(comment).split(". ")[0]
    return sentence.removesuffix(".")
