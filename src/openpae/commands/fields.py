"""Help for the fields of a config: the ten that people change."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import textwrap
from collections.abc import Sequence
from typing import Any

_OF_ALL = (
    *("optim.lr", "loop.steps", "loop.global_batch_size", "loop.device_batch_size"),
    *("loop.device", "loop.precision", "loop.seed"),
)
OFTEN_CHANGED = {
    "RefinerRun": ("data.images", "data.feature_cache", "upsampler", *_OF_ALL),
    "TokenizerRun": ("data.images", "data.evaluation", "prior", *_OF_ALL),
    "GeneratorRun": ("latents", "model.num_classes", "loop.evaluate_every", *_OF_ALL),
}
"""Class of a run's config -> the fields that `--help` shows."""


def short_help(config: Any, prog: str, fields: Sequence[str]) -> str:
    """The help of some fields of a config, with its values as the defaults.

    Args:
        config: the config that flags change.
        prog: the command, for the usage.
        fields: dotted paths.
    """
    lines = [f"usage: {prog} [--field value ...]", "", f"{(type(config).__doc__ or '').splitlines()[0]}", ""]
    for path in fields:
        owner, (*parents, name) = config, path.split(".")
        for parent in parents:
            owner = getattr(owner, parent)
        text = f"{field_docs(type(owner))[name]} (default: {getattr(owner, name)})"
        lines.append(f"  --{path.replace('_', '-')}")
        lines += textwrap.wrap(text, 100, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join([*lines, "", "  --help-all lists all fields."])


def field_docs(cls: type) -> dict[str, str]:
    """The docstring behind each field of a dataclass and of its bases."""
    docs = {}
    for base in filter(dataclasses.is_dataclass, reversed(cls.__mro__)):
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        assert isinstance(tree, ast.ClassDef)
        for field, text in itertools.pairwise(tree.body):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
                assert isinstance(field.target, ast.Name)
                docs[field.target.id] = " ".join(ast.literal_eval(text.value).split())
    return docs
