"""Saved models: a folder of weights (safetensors), config (YAML) and one line on how to load it.

A folder states its fingerprint (of weights and config) and that of the model it was made with.
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
from openpae.storage import pairs
from openpae.storage.files import atomic_folder, fingerprint, read_json, write_json
from openpae.storage.weights import check_finite, some

WEIGHTS = "model.safetensors"
CONFIG = "config.yaml"
README = "README.md"
ENCODER = "encoder.json"
"""Architecture of an encoder whose weights are saved with the tokenizer."""
CLASSES = "classes.json"
"""Label, name and number of training images of each class of a generator."""
PARENT = "parent.json"
"""The model from whose weights the training started (`Parent`)."""
RUN_CONFIG = "run.yaml"
"""Config of the run, in each checkpoint."""
RECORD = "evaluation.json"
"""Record of pae evaluate."""
PARTS = pairs.PARTS
"""Subfolders of a folder that holds a pair."""


@dataclass(frozen=True, kw_only=True)
class Identity:
    """Fingerprints of 16 hexadecimal digits each."""

    fingerprint: str
    """Fingerprint of these weights and their config."""
    made_with: str
    """Fingerprint of the frozen encoder (of a tokenizer or refiner) or of the tokenizer (of a generator)."""


@dataclass(frozen=True, kw_only=True)
class Parent:
    """The saved model from whose weights a training started."""

    fingerprint: str
    """Its fingerprint."""
    new: tuple[str, ...] = ()
    """Names of the tensors that started with new weights instead."""
    trained: str = "all"
    """The part that was trained; the rest is as in the parent."""


def write_model(folder: Path, state: Mapping[str, Tensor], config: Any, made_with: str, loader: str) -> None:
    """Write a model's files into an existing folder, such as that of `atomic_folder`.

    Args:
        folder: output folder.
        state: state dict of the model.
        config: config of the model.
        made_with: see `Identity`.
        loader: name of the function that loads the folder, for its README.
    """
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    own = _fingerprint_of(weights, configs.to_dict(config), made_with)
    save_file(weights, folder / WEIGHTS, metadata={"fingerprint": own, "made_with": made_with})
    _sort_metadata(folder / WEIGHTS)
    configs.save(config, folder / CONFIG)
    (folder / README).write_text(f"`{loader}(FOLDER)` of the package openpae loads this folder.\n")


def read_model(path: Path) -> tuple[dict[str, Tensor], Identity]:
    """Weights and identity of a model folder.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: the folder is damaged or edited: weights and config do not give the fingerprint; or a
            weight is not finite.
    """
    # The raw config of the file: a field added by a later version must not change old fingerprints.
    config = configs.read_yaml(path / CONFIG)
    identity = identity_of(path)
    try:
        state = dict(load_file(path / WEIGHTS))
    except SafetensorError as error:
        raise ValueError(f"{path / WEIGHTS} is damaged: {error}") from None
    if _fingerprint_of(state, config, identity.made_with) != identity.fingerprint:
        raise ValueError(
            f"{path} is damaged or was edited: weights and config do not give its fingerprint "
            f"{identity.fingerprint}; bring them back as they were, or take another checkpoint"
        )
    check_finite(state, f"the weights of {path}")
    return state, identity


def identity_of(folder: str | Path) -> Identity:
    """Identity of a saved model, without loading its weights.

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


def write_parent(folder: Path, parent: Parent) -> None:
    """Write from which model the training of this one started."""
    write_json(folder / PARENT, {**vars(parent), "new": list(parent.new)})


def read_parent(folder: Path) -> Parent | None:
    """The model from which the training of this one started; None without the file.

    Raises:
        ValueError: the file is damaged.
    """
    file = folder / PARENT
    if not file.is_file():
        return None
    data = read_json(file)
    fingerprint, new, trained = (data.get(name) for name in ("fingerprint", "new", "trained"))
    if not (isinstance(fingerprint, str) and isinstance(trained, str) and isinstance(new, list)):
        raise ValueError(f"{file} is damaged: it must have fingerprint, new and trained")
    return Parent(fingerprint=fingerprint, new=tuple(map(str, new)), trained=trained)


def write_classes(folder: Path, names: Sequence[str], counts: Sequence[int]) -> None:
    """Write name and number of training images of each class of a generator."""
    rows = [
        {"label": label, "name": name, "images": count}
        for label, (name, count) in enumerate(zip(names, counts, strict=True))
    ]
    write_json(folder / CLASSES, {"classes": rows})


def read_classes(folder: str | Path) -> tuple[list[str], list[int]] | None:
    """Name and number of training images of each class of a generator; None without the file.

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
    """Labels of a generator with a training image, or all labels if the folder does not list them.

    Raises:
        FileNotFoundError, ValueError: see `read_classes`.
    """
    known = read_classes(folder)
    if known is None:
        return list(range(num_classes))
    trained = [label for label, count in enumerate(known[1][:num_classes]) if count]
    if not trained:
        raise ValueError(f"{model_folder(folder) / CLASSES} is damaged: no class has a training image")
    return trained


def seen_classes(folder: str | Path, num_classes: int, wanted: Sequence[int] | None) -> list[int]:
    """`trained_classes`. Raises ValueError if one of the `wanted` classes had no training image."""
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
    """The folder of the weights: the given one, or the newest checkpoint of a run folder.

    Raises:
        FileNotFoundError: neither holds weights.
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
    """`atomic_folder` for a saved model or pair; it replaces nothing else.

    Raises:
        ValueError: the folder holds something else.
    """
    known = {WEIGHTS, CONFIG, README, ENCODER, CLASSES, PARENT, RECORD}
    strange = [
        str(file.relative_to(path))
        for file in sorted(path.rglob("*"))
        if not (file.is_file() and file.name in known) and str(file.relative_to(path)) not in PARTS
    ]
    models = {file.parent for file in path.rglob(WEIGHTS)}
    for folder in models:  # raises for weights of another program
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
    """Folder of a run's checkpoint at a step."""
    return run_dir / "checkpoints" / f"step-{step:08d}"


def checkpoint_steps(run_dir: Path) -> list[int]:
    """Sorted steps of the checkpoint folders of a run, by their names."""
    names = (re.fullmatch(r"step-(\d+)", path.name) for path in (run_dir / "checkpoints").glob("step-*"))
    return sorted(int(match[1]) for match in names if match)


def _sort_metadata(file: Path) -> None:
    """Sort the metadata, whose order changes from run to run, so that equal models give equal files."""
    with file.open("r+b") as content:
        size = int.from_bytes(content.read(8), "little")
        header = json.loads(content.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(size)
        if len(text) == size:  # same length: the tensors stay in place
            content.seek(8)
            content.write(text)


def _fingerprint_of(state: Mapping[str, Tensor], config: Mapping[str, Any], made_with: str) -> str:
    # The source of the encoder's weights does not change the model.
    facts = {key: value for key, value in config.items() if key not in ("kind", "encoder_source")}
    return fingerprint(state, repr(sorted(facts.items())), made_with)
