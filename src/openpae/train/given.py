"""Start a run from the weights of a saved model, as `init_from`, `init_new` and `train` of a config say."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor, nn

from openpae import config as configs
from openpae.models.configs import PAEConfig
from openpae.models.encoders import Encoder
from openpae.models.saved import load_tokenizer
from openpae.models.tokenizer import Autoencoder
from openpae.runtime import processes
from openpae.runtime.terminal import note
from openpae.storage.model_folder import CONFIG, Parent, model_folder, read_classes, read_model
from openpae.storage.weights import some
from openpae.train.settings import TrainedPart

_TRAINED: Mapping[str, tuple[str, ...]] = {
    "decoder": ("decoder", "deprojector"),
    "decoder+projectors": ("decoder", "deprojector", "projector"),
}
"""The modules of a tokenizer that each value of `train` but all trains."""


def start_from(
    model: nn.Module, folder: Path, new: Sequence[str] = (), *, own_buffers: Sequence[str] = ()
) -> tuple[Parent, str]:
    """Give a new model the weights of a saved one, all but those of some parts. Rank 0 prints what was done.

    Weights of a frozen encoder that are not in the folder stay as they are.

    Args:
        model: on any device.
        folder: a model or run folder.
        new: modules or parameters, by dotted name, that keep their new weights.
        own_buffers: buffers that the caller sets, not from the folder.

    Returns:
        What the folder of the new model says of its parent, and the parent's `made_with`.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: damaged weights, a name in `new` that the model does not have, or another part that does
            not fit.
    """
    path, own = model_folder(folder), model.state_dict()
    state, identity = read_model(path)
    for name in new:
        if not any(_covers([name], key) for key in own):
            raise ValueError(f"init_new names {name!r}, no part of the model; its parts: {_parts(own)}")
    given = {name: value for name, value in state.items() if not _covers([*new, *own_buffers], name)}
    unfit = [name for name, value in given.items() if name not in own or own[name].shape != value.shape]
    lacking = [
        name for name in own if not _covers([*new, *own_buffers, "encoder"], name) and name not in given
    ]
    if faults := sorted({*unfit, *lacking}):
        raise ValueError(
            f"the weights in {path} do not fit the config at {some(faults)}; change the config, or let these "
            f"parts start with new weights by init_new: {_parts(faults)}"
        )
    model.load_state_dict(own | given)
    started = tuple(name for name in own if _covers(new, name))
    if processes.is_rank0():
        rest = f"; new weights for {', '.join(new)} ({len(started)} tensors)" if new else ""
        note(f"starts from {path}, fingerprint {identity.fingerprint}{rest}")
    return Parent(fingerprint=identity.fingerprint, new=started), identity.made_with


def names_from(
    folder: Path, new: Sequence[str], latents: Path, names: Sequence[str] | None, largest: int
) -> Sequence[str] | None:
    """Class names of a generator that starts from a saved one.

    They are those of its latents. Where the latents have none, and the class embedding is taken over, they
    are those of the saved generator. Warn if a class goes on with the embedding of another.

    Args:
        folder: the saved generator.
        new: see `start_from`.
        latents: folder of the latents, for the warning.
        names: their class names; None if they have none.
        largest: their largest label.

    Raises:
        FileNotFoundError, ValueError: see `read_classes`.
    """
    before = None if _covers(new, "class_embed.weight") else read_classes(folder)
    if before is None:
        return names
    if names is None:
        return before[0] if largest < len(before[0]) else None
    pairs = enumerate(zip(before[0], names, strict=False))
    others = [
        f"{label} is {old!r} in {folder} and {own!r} in {latents}"
        for label, (old, own) in pairs
        if old != own
    ]
    if others:
        warnings.warn(
            f"{len(others)} classes go on with the embedding of another: class {others[0]}; init_new "
            "class_embed gives them new weights",
            stacklevel=2,
        )
    return names


def kept_encoder(folder: Path, config: PAEConfig) -> Encoder | None:
    """The encoder of a saved tokenizer if its weights lie in the folder; None if they have another home.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: the folder holds no tokenizer, or that of another VFM.
    """
    before = configs.load(PAEConfig, model_folder(folder) / CONFIG)
    if before.encoder != config.encoder:
        raise ValueError(
            f"{folder} was trained with the VFM {before.encoder}, model.encoder is {config.encoder}; a "
            "tokenizer starts from one of the same VFM"
        )
    kept = load_tokenizer(folder, decode_only=True).keeps_encoder
    return load_tokenizer(folder).encoder if kept else None


def start_tokenizer(model: Autoencoder, folder: Path, new: Sequence[str], encoder_fingerprint: str) -> Parent:
    """`start_from` for a tokenizer, whose frozen encoder must be that of the saved one.

    Raises:
        ValueError: as `start_from`; or another encoder.
    """
    parent, made_with = start_from(model, folder, new)
    if model.config.fusion != "finetune" and made_with != encoder_fingerprint:
        raise ValueError(
            f"{folder} was trained with the encoder {made_with}, but model.encoder is {encoder_fingerprint}; "
            "point model.encoder_source to the weights that it was trained with"
        )
    return parent


def freeze_rest(model: nn.Module, train: TrainedPart) -> None:
    """Freeze all weights of a tokenizer except those of the part that is trained."""
    if train != "all":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(parameter.requires_grad and _covers(_TRAINED[train], name))


def _covers(parts: Sequence[str], name: str) -> bool:
    """Whether a tensor belongs to one of the parts."""
    return any(name == part or name.startswith(f"{part}.") for part in parts)


def _parts(names: Mapping[str, Tensor] | Sequence[str]) -> str:
    return ", ".join(sorted({name.partition(".")[0] for name in names}))
