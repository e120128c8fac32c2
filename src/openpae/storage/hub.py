"""Load models from the Hugging Face hub, and save or upload them with a model card.

This module knows no model. `from_pretrained`, `save_pretrained` and `push_to_hub` of the models and of
`Pipeline` call it.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar, cast

import torch
import yaml
from torch import Tensor, nn

from openpae import config as configs
from openpae.runtime.extras import needs
from openpae.storage.card import is_record, model_card
from openpae.storage.files import read_json, write_json
from openpae.storage.model_folder import (
    CLASSES,
    CONFIG,
    ENCODER,
    PARENT,
    PARTS,
    README,
    RECORD,
    WEIGHTS,
    Parent,
    model_folder,
    new_model_folder,
    read_classes,
    read_model,
    write_classes,
    write_model,
    write_parent,
)
from openpae.storage.pairs import packaged_pair
from openpae.storage.weights import check_finite, check_size, load_strict

_NAME = r"[A-Za-z0-9_.-]+/[A-Za-z0-9_.-]+"
"""A repository on the hub: OWNER/NAME."""
C = TypeVar("C")
M = TypeVar("M", bound=nn.Module)

Precision = Literal["fp32", "bf16"]


class Saveable(Protocol):
    """A model that can be saved: an nn.Module with a config."""

    @property
    def config(self) -> Any:
        """Config of the model."""
        ...

    def state_dict(self) -> Mapping[str, Tensor]:
        """Parameters and buffers by name."""
        ...

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Parameters by name."""
        ...


# The files of a model, without optimizer state and logs.
_FILES = (WEIGHTS, CONFIG, ENCODER, CLASSES, PARENT, RECORD)


def find_model(name_or_folder: str | Path, revision: str | None = None) -> Path:
    """The local folder of a saved model or pair, downloaded from the hub if needed.

    Args:
        name_or_folder: a folder, or OWNER/NAME on the hub. A folder takes precedence.
        revision: branch, tag or commit on the hub; None for a folder.

    Raises:
        FileNotFoundError: neither a folder nor a name, or the hub does not have it or cannot be reached.
        ValueError: a revision is given for a folder.
    """
    places = ("", *(f"{part}/" for part in PARTS))
    wanted = [f"{place}{file}" for place in places for file in (*_FILES, README)]
    return find_folder(name_or_folder, wanted, revision)


def find_folder(name_or_folder: str | Path, wanted: Sequence[str], revision: str | None = None) -> Path:
    """`find_model` for other files: `wanted` are name patterns of the files to download."""
    folder = Path(name_or_folder)
    if folder.is_dir():
        if revision is not None:
            raise ValueError(f"{folder} is a folder and has no revision {revision!r}; leave revision out")
        return folder
    name = str(name_or_folder)
    if revision is None and (pair := packaged_pair(name)) is not None:
        return pair
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise FileNotFoundError(f"no folder at {name}, and it is no name of the hub (OWNER/NAME)")
    with needs("hub", f"{name}, which is no folder,"):
        from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(wanted)))
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"no folder at {name}, and the hub did not give it ({_one_line(error)}); name a folder, or on a "
            f"machine that reaches the hub run: hf download {name} --local-dir FOLDER"
        ) from None


def load_saved(
    kind: Callable[[C], M], config: type[C], name_or_folder: str | Path, revision: str | None
) -> tuple[M, str]:
    """A saved model that its config alone defines, in evaluation mode, and its `made_with`.

    Args:
        kind: class of the model.
        config: class of its config.
        name_or_folder: a model or run folder, or OWNER/NAME on the hub.
        revision: see `find_model`.

    Raises:
        FileNotFoundError: see `find_model`.
        ValueError: the model is of another kind, or its weights are damaged or do not fit.
    """
    path = model_folder(find_model(name_or_folder, revision))
    loaded = configs.load(config, path / CONFIG)
    state, identity = read_model(path)
    check_size(lambda: kind(loaded), state, f"weights in {path}")
    model = kind(loaded)
    load_strict(model, state, f"weights in {path}")
    return model.eval(), identity.made_with


def save(
    model: Saveable,
    folder: str | Path,
    *,
    made_with: str | None,
    precision: Precision,
    leave_out: str | None = None,
    architecture: Mapping[str, Any] | None = None,
    classes: tuple[Sequence[str], Sequence[int]] | None = None,
    parent: Parent | None = None,
) -> None:
    """Write a model folder with a model card.

    Args:
        model: the model.
        folder: output folder; replaced if it holds only a saved model.
        made_with: see `model_folder.Identity`.
        precision: bf16 halves the size of the parameters; buffers (latent statistics) keep theirs. fp32
            also holds for a model in half precision.
        leave_out: prefix of the names that are not saved.
        architecture: architecture of an encoder whose weights are saved too.
        classes: names of a generator's classes and their numbers of training images.
        parent: the model from whose weights its training started.

    Raises:
        ValueError: made_with is None, a weight is not finite, or the folder holds something else.
    """
    name = type(model).__name__
    if made_with is None:
        raise ValueError(
            f"this {name} does not know with what it was made, as it was not loaded from a folder; set its "
            "made_with to a fingerprint (identity_of(FOLDER).fingerprint gives that of a tokenizer)"
        )
    state = {k: v for k, v in model.state_dict().items() if leave_out is None or not k.startswith(leave_out)}
    if precision == "bf16":
        parameters = {name for name, _ in model.named_parameters()}
        state = {k: v.to(torch.bfloat16) if k in parameters else v for k, v in state.items()}
    else:
        state = {k: v.float() if v.is_floating_point() else v for k, v in state.items()}
    check_finite(state, f"the weights of this {name}")
    with new_model_folder(Path(folder)) as partial:
        write_model(partial, state, model.config, made_with, f"openpae.{name}.from_pretrained")
        if architecture is not None:
            write_json(partial / ENCODER, architecture)
        if classes is not None:
            write_classes(partial, *classes)
        if parent is not None:
            write_parent(partial, parent)
        (partial / README).write_text(model_card({"": partial}, str(folder), None), encoding="utf-8")


def stage(folder: Path, out: Path, repo: str, *, licence: str | None = None) -> None:
    """Copy the files of a saved model or pair for publication, and write a model card.

    An `encoder_source` that is a local folder is dropped from the config; the fingerprint does not cover it.

    Args:
        folder: a model or run folder, or a folder with the subfolders tokenizer and generator.
        out: output folder; replaced if it holds only such a copy.
        repo: OWNER/NAME on the hub, for the loading code in the card.
        licence: licence of the weights in the hub's spelling (apache-2.0, cc-by-sa-4.0, ...).

    Raises:
        FileNotFoundError: no saved model in the folder.
        ValueError: the model is damaged, has a link among its files, or is neither tokenizer nor generator;
            `repo` is no valid name; or `out` holds something else.
    """
    _check_repo(repo)
    pair = all((folder / part).is_dir() for part in PARTS)
    with new_model_folder(out) as partial:
        places = {part: partial / part for part in PARTS} if pair else {"": partial}
        for part, target in places.items():
            target.mkdir(exist_ok=True)
            _copy(folder / part, target)
        (partial / README).write_text(model_card(places, repo, licence), encoding="utf-8")


def push(folder: Path, repo: str, *, licence: str | None = None, private: bool = False) -> str:
    """Upload a copy made by `stage` to the hub.

    Args:
        folder: see `stage`.
        repo: OWNER/NAME; created if absent.
        licence: see `stage`.
        private: create the repository as private.

    Returns:
        Address of the repository.

    Raises:
        FileNotFoundError: no saved model in the folder.
        ConnectionError: the hub cannot be reached, or refuses.
    """
    with needs("hub", "pae push"):
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HfHubHTTPError

    # Without any answer the HTTP client's own error is raised, a base class of the hub's error.
    refusals = cast(tuple[type[Exception], ...], (*HfHubHTTPError.__bases__, ValueError))
    with tempfile.TemporaryDirectory() as work:
        staged = Path(work) / "model"
        stage(folder, staged, repo, licence=licence)
        api = HfApi(library_name="openpae")
        try:
            address = api.create_repo(repo, private=private, exist_ok=True)
            api.upload_folder(repo_id=repo, folder_path=staged, commit_message="Upload with openpae")
        except refusals as error:
            raise ConnectionError(
                f"{repo} was not uploaded ({_one_line(error)}); log in with hf auth login, or see with "
                "pae push --dry-run what would be uploaded"
            ) from None
    return str(address)


def push_saved(save: Callable[[Path], None], repo: str, *, licence: str | None, private: bool) -> str:
    """`save` a model into a temporary folder and `push` it."""
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work) / "model"
        save(folder)
        return push(folder, repo, licence=licence, private=private)


def _copy(source: Path, target: Path) -> None:
    """Copy the files of a model folder, or of a run's newest checkpoint, after a check of the fingerprint."""
    path = model_folder(source)
    read_model(path)
    for name in _FILES:
        # The record of a run is beside its checkpoints.
        for place in (source, path):
            if (place / name).is_file() and (name == RECORD or place == path):
                if (place / name).is_symlink():  # it may point to any file of this machine
                    raise ValueError(f"{place / name} is a link; put the file itself there")
                if name == CLASSES:
                    read_classes(place)
                if name in (ENCODER, PARENT, RECORD):
                    content = read_json(place / name)
                    if name == RECORD and not is_record(content):
                        raise ValueError(f"{place / name} is no record of pae evaluate; remove it")
                shutil.copyfile(place / name, target / name)
    config = configs.read_yaml(path / CONFIG)
    home = config.get("encoder_source")
    if home is not None and (Path(str(home)).exists() or not re.fullmatch(_NAME, str(home))):
        text = yaml.safe_dump(config | {"encoder_source": None}, sort_keys=False, width=100)
        (target / CONFIG).write_text(text, encoding="utf-8")


def _check_repo(repo: str) -> None:
    """Raise ValueError unless `repo` is a valid name on the hub."""
    parts = repo.split("/")
    if (
        not re.fullmatch(_NAME, repo)
        or len(repo) > 96
        or any(
            part[0] in "-." or part[-1] in "-." or "--" in part or ".." in part or part.endswith(".git")
            for part in parts
        )
    ):
        raise ValueError(
            f"{repo} cannot be a name of the hub; it must be OWNER/NAME of letters, digits, -, _ and ., at "
            "most 96, without -- and .., and begin and end with a letter or digit"
        )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
