"""The model card of a saved model or pair: description, loading code, metrics and licence."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from safetensors import safe_open

from openpae import config as configs
from openpae.runtime.escape import code, markdown
from openpae.storage.files import is_number, read_json
from openpae.storage.model_folder import (
    CONFIG,
    RECORD,
    WEIGHTS,
    Identity,
    Parent,
    identity_of,
    read_classes,
    read_parent,
)

_SHOWN = 20
"""Names of classes in a card."""
PAPER = "https://arxiv.org/abs/2605.07915"


@dataclass(frozen=True)
class _Kind:
    """Words for a model whose config is of one kind."""

    summary: str
    name: str
    loader: str
    made_with: str


_KINDS = {
    "PAEConfig": _Kind("images to latents and back", "tokenizer", "PAE", "frozen encoder"),
    "LightningDiTConfig": _Kind("latents of a class, from noise", "generator", "LightningDiT", "tokenizer"),
    "DiTDHConfig": _Kind("latents of a class, from noise", "generator", "DiTDH", "tokenizer"),
}


@dataclass(frozen=True)
class _Facts:
    """Contents of the card for one model."""

    kind: _Kind
    config: Mapping[str, Any]
    identity: Identity
    weights: int
    record: Mapping[str, Any] | None
    parent: Parent | None
    names: list[str]
    """Of the classes; empty if they are not known."""


def model_card(folders: Mapping[str, Path], repo: str, licence: str | None) -> str:
    """Markdown with the front matter that the hub reads.

    Args:
        folders: one model folder under any key, or a pair under "tokenizer" and "generator".
        repo: OWNER/NAME on the hub, for the loading code.
        licence: licence of the weights in the hub's spelling; None if none is stated.

    Raises:
        FileNotFoundError: a folder holds no model.
        ValueError: a model is damaged, or neither a tokenizer nor a generator.
    """
    models = {part: _facts(folder) for part, folder in folders.items()}
    names = sorted({facts.kind.name for facts in models.values()})
    matter: dict[str, Any] = {"library_name": "openpae", "tags": ["openpae", *names]}
    if "generator" in names:
        matter["pipeline_tag"] = "unconditional-image-generation"
    if licence is not None:
        matter["license"] = licence
    title = repo.rpartition("/")[2]
    stated = (
        f"The weights are under {markdown(licence)}." if licence else "No licence of the weights is stated."
    )
    lines = [
        *("---", yaml.safe_dump(matter, sort_keys=False).rstrip(), "---", f"# {markdown(title)}", ""),
        *(line for facts in models.values() for line in _about(facts)),
        *_usage(models, repo),
        *(line for facts in models.values() for line in _metrics(facts)),
        *("## Licence", ""),
        f"{stated} A frozen encoder keeps its own licence.",
        "Its weights come from its own home.",
        "",
    ]
    return "\n".join(lines)


def _facts(folder: Path) -> _Facts:
    config = configs.read_yaml(folder / CONFIG)
    kind = _KINDS.get(config.pop("kind", ""))
    if kind is None:
        raise ValueError(f"{folder} holds neither a tokenizer nor a generator, so it has no model card")
    identity = identity_of(folder)  # first, as it detects damage
    with safe_open(folder / WEIGHTS, "pt") as file:
        weights = sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    record = read_json(folder / RECORD) if (folder / RECORD).is_file() else None
    names, _ = read_classes(folder) or ([], [])
    return _Facts(kind, config, identity, weights, record, read_parent(folder), names)


def is_record(record: Mapping[str, Any]) -> bool:
    """Whether a record holds metrics in the format of pae evaluate."""
    metrics = record.get("metrics")
    return isinstance(metrics, Mapping) and all(
        isinstance(metric, Mapping)
        # Infinite is the PSNR of an exact copy.
        and (is_number(value := metric.get("value")) or value == math.inf)
        and (metric.get("stderr") is None or is_number(metric["stderr"]))
        for metric in metrics.values()
    )


def _about(facts: _Facts) -> list[str]:
    home = facts.identity
    return [
        f"{facts.kind.name.capitalize()}: {facts.kind.summary} ([PAE]({PAPER})), {facts.weights:,} weights.",
        "",
        *(f"- {markdown(key)}: {markdown(_short(value))}" for key, value in facts.config.items()),
        f"- fingerprint: {code(home.fingerprint)}, made with the {facts.kind.made_with} "
        f"{code(home.made_with)}",
        *_origin(facts.parent),
        *_classes(facts.names),
        "",
    ]


def _origin(parent: Parent | None) -> list[str]:
    if parent is None:
        return []
    given, part = code(parent.fingerprint), markdown(parent.trained)
    new = f"; new weights at the start: {markdown(', '.join(parent.new))}" if parent.new else ""
    return [f"- trained from the weights of {given}, part {part}{new}"]


def _classes(names: list[str]) -> list[str]:
    if not names:
        return []
    shown = "; ".join(f"{label} {markdown(name)}" for label, name in enumerate(names[:_SHOWN]))
    return [f"- classes: {shown}{'; ...' * (len(names) > _SHOWN)}"]


def _usage(models: Mapping[str, _Facts], repo: str) -> list[str]:
    if len(models) > 1:
        calls = [
            f'pipeline = openpae.Pipeline.from_pretrained("{repo}")',
            f"images = pipeline(class_labels={models['generator'].names[:2] or [0, 1, 2, 3]}, seed=0)",
        ]
    else:
        (facts,) = models.values()
        calls = [f'{facts.kind.name} = openpae.{facts.kind.loader}.from_pretrained("{repo}")']
        kind, other, _ = facts.identity.made_with.partition(":")
        if other:  # a tokenizer of another kind
            calls += [f'pipeline = openpae.Pipeline.join("{markdown(kind)}:...", "{repo}")']
    return ["## How to load it", "", "```python", "import openpae", "", *calls, "```", ""]


def _metrics(facts: _Facts) -> list[str]:
    if facts.record is None:
        return []
    rows = []
    for name, metric in facts.record["metrics"].items():
        error = "" if metric.get("stderr") is None else f"{metric['stderr']:.2g}"
        rows.append(f"| {markdown(name)} | {metric['value']:.5g} | {error} |")
    return [
        *(f"## Metrics of the {facts.kind.name}", ""),
        *("| metric | value | standard error |", "|---|---|---|", *rows, ""),
        *(f"`{RECORD}` says against what and how they were measured.", ""),
    ]


def _short(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {inner}" for key, inner in value.items())
    return str(value)
