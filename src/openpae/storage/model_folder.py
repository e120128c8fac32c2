"""Saved models: a folder of weights (safetensors), config (YAML) and one line on how to load it.

A folder says who it is (a fingerprint of weights and config) and with what it was made.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from openpae import config as configs
from openpae.storage.files import atomic_folder, fingerprint, read_json, write_json
from openpae.storage.weights import some

WEIGHTS = "model.safetensors"
CONFIG = "config.yaml"
README = "README.md"
ENCODER = "encoder.json"
"""Architecture of an encoder whose weights are saved with the tokenizer's."""
CLASSES = "classes.json"
"""Number, name and training images of each class of a generator."""
RUN_CONFIG = "run.yaml"
"""The config of the run, in each of its checkpoints."""
RECORD = "evaluation.json"
"""What pae evaluate found."""
PARTS = ("tokenizer", "generator")
"""Subfolders of a folder that holds a pair."""


@dataclass(frozen=True, kw_only=True)
class Identity:
    """Which weights a folder holds, and which others they belong to. 16 hexadecimal digits each."""

    fingerprint: str
    """Of these weights and their config."""
    made_with: str
    """Of the frozen encoder (for a tokenizer or a refiner), or of the tokenizer whose latents it makes (for a
    generator)."""


def write_model(folder: Path, state: Mapping[str, Tensor], config: Any, made_with: str, loader: str) -> None:
    """Write a model's files into an existing folder; `storage.atomic_folder` makes it whole or nothing.

    Args:
        folder: where.
        state: its state dict.
        config: a config of `openpae.config`.
        made_with: fingerprint of what it belongs to; see `Identity`.
        loader: name of the function that loads the folder, for its README.
    """
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    identity = {"fingerprint": _print_of(weights, configs.to_dict(config), made_with), "made_with": made_with}
    save_file(weights, folder / WEIGHTS, metadata=identity)
    _sort_metadata(folder / WEIGHTS)
    configs.save(config, folder / CONFIG)
    (folder / README).write_text(f"`{loader}(FOLDER)` of the package openpae loads this folder.\n")


def read_model(path: Path) -> tuple[dict[str, Tensor], Identity]:
    """The weights of a model folder, and who they are.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: damaged or edited: weights and config do not give the fingerprint.
    """
    # The config as it stands in the file: a field that a later version adds must not change old fingerprints.
    config = configs.read_yaml(path / CONFIG)
    identity = identity_of(path)
    try:
        state = dict(load_file(path / WEIGHTS))
    except SafetensorError as error:
        raise ValueError(f"{path / WEIGHTS} is damaged: {error}") from None
    if _print_of(state, config, identity.made_with) != identity.fingerprint:
        raise ValueError(
            f"{path} is damaged or was edited: weights and config do not give its fingerprint "
            f"{identity.fingerprint}; bring them back as they were, or take another checkpoint"
        )
    return state, identity


def identity_of(folder: str | Path) -> Identity:
    """Who a saved model is, without loading it.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: the weights carry no identity.
    """
    path = model_folder(folder) / WEIGHTS
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    if missing := {"fingerprint", "made_with"} - metadata.keys():
        raise ValueError(f"{path} carries no {', '.join(sorted(missing))}; it was not saved by openpae")
    return Identity(fingerprint=metadata["fingerprint"], made_with=metadata["made_with"])


def write_classes(folder: Path, names: Sequence[str], counts: Sequence[int]) -> None:
    """Write beside a generator which label is which class, and how many training images each had."""
    rows = [
        {"label": label, "name": name, "images": count}
        for label, (name, count) in enumerate(zip(names, counts, strict=True))
    ]
    write_json(folder / CLASSES, {"classes": rows})


def read_classes(folder: str | Path) -> tuple[list[str], list[int]] | None:
    """Names of a generator's classes and how many training images each had; None where nobody wrote them.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: the file is damaged.
    """
    file = model_folder(folder) / CLASSES
    if not file.is_file():
        return None
    rows = read_json(file).get("classes")
    if not isinstance(rows, list) or not all(
        isinstance(row, dict)
        and (row.get("label"), type(row.get("name")), type(row.get("images"))) == (label, str, int)
        for label, row in enumerate(rows)
    ):
        raise ValueError(f"{file} is damaged: its classes must each have label, name and images, in order")
    return [row["name"] for row in rows], [row["images"] for row in rows]


def trained_classes(folder: str | Path, num_classes: int) -> list[int]:
    """The labels of a generator that saw a training image: all of them where nobody wrote which.

    Raises:
        FileNotFoundError, ValueError: see `read_classes`.
    """
    known = read_classes(folder)
    if known is None:
        return list(range(num_classes))
    return [label for label, count in enumerate(known[1][:num_classes]) if count]


def seen_classes(folder: str | Path, num_classes: int, wanted: Sequence[int] | None) -> list[int]:
    """`trained_classes`, once it is sure that none of the `wanted` ones is missing.

    Raises:
        ValueError: a wanted class had no training image.
    """
    trained = trained_classes(folder, num_classes)
    if unseen := sorted(label for label in {*(wanted or ())} - {*trained} if 0 <= label < num_classes):
        names, _ = read_classes(folder) or ([], [])
        called = [f"{label} ({names[label]})" if label < len(names) else str(label) for label in unseen]
        raise ValueError(
            f"{folder} saw no training image of class {some(called)}; it knows the classes "
            f"{some([str(label) for label in trained])}"
        )
    return trained


def model_folder(folder: str | Path) -> Path:
    """The folder that holds weights: the given one, or the newest checkpoint of a run folder.

    Raises:
        FileNotFoundError: neither.
    """
    path = Path(folder)
    if (path / WEIGHTS).is_file():
        return path
    if steps := checkpoint_steps(path):
        return checkpoint_path(path, steps[-1])
    raise FileNotFoundError(
        f"no model at {path}: neither {WEIGHTS} nor checkpoints/ in it; train one with pae train-tokenizer "
        "or pae train-generator"
    )


@contextlib.contextmanager
def new_model_folder(path: Path) -> Iterator[Path]:
    """`storage.atomic_folder` for a saved model or pair; it replaces nothing but such.

    Raises:
        ValueError: the folder holds something else.
    """
    known = {WEIGHTS, CONFIG, README, ENCODER, CLASSES, RECORD}
    strange = [
        str(file.relative_to(path))
        for file in sorted(path.rglob("*"))
        if not (file.is_file() and file.name in known) and str(file.relative_to(path)) not in PARTS
    ]
    models = {file.parent for file in path.rglob(WEIGHTS)}
    for folder in models:  # weights of another program may lie under the same name
        identity_of(folder)
    if not models:
        strange += [file.name for file in path.glob("*")]
    if strange or path.is_file():
        raise ValueError(
            f"{path} holds something else than a saved model ({some(strange) or 'a file'}), so it is not "
            "replaced; name a new folder"
        )
    with atomic_folder(path) as partial:
        yield partial


def checkpoint_path(run_dir: Path, step: int) -> Path:
    """Where a run keeps its checkpoint of a step."""
    return run_dir / "checkpoints" / f"step-{step:08d}"


def checkpoint_steps(run_dir: Path) -> list[int]:
    """The steps of the complete checkpoints of a run, in order: by number, never by size or date."""
    found = (re.fullmatch(r"step-(\d+)", path.name) for path in (run_dir / "checkpoints").glob("step-*"))
    return sorted(int(match[1]) for match in found if match)


def _sort_metadata(file: Path) -> None:
    """Equal models give equal files: safetensors writes the metadata in an order that changes from run to
    run."""
    with file.open("r+b") as content:
        size = int.from_bytes(content.read(8), "little")
        header = json.loads(content.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(size)
        if len(text) == size:  # as long as before: what follows stays in place
            content.seek(8)
            content.write(text)


def _print_of(state: Mapping[str, Tensor], config: Mapping[str, Any], made_with: str) -> str:
    # Where the encoder's weights come from is no part of what the model is.
    facts = {key: value for key, value in config.items() if key not in ("kind", "encoder_source")}
    return fingerprint(state, repr(sorted(facts.items())), made_with)
