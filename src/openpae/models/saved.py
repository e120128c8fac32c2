"""Folders of saved tokenizers, generators and priors, and the check that two of them belong together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from openpae import config as configs
from openpae.models.configs import DiTDHConfig, GeneratorConfig, LinearTargetsConfig, PAEConfig, RefinerConfig
from openpae.models.dit import LightningDiT
from openpae.models.ditdh import GENERATORS, DiTDH
from openpae.models.encoders import Encoder
from openpae.models.generator import LatentGenerator
from openpae.models.priors import FrozenPrior, LinearTargets, Refiner
from openpae.models.tokenizer import Autoencoder
from openpae.storage.files import write_json
from openpae.storage.model_folder import (
    CONFIG,
    ENCODER,
    Identity,
    identity_of,
    model_folder,
    read_model,
    read_parent,
    write_classes,
    write_model,
)
from openpae.storage.weights import check_size, load_strict


def write_tokenizer(
    folder: Path,
    state: Mapping[str, Tensor],
    config: PAEConfig,
    encoder_fingerprint: str,
    architecture: Mapping[str, Any] | None = None,
    *,
    keep_encoder: bool = False,
) -> None:
    """Write the files of a tokenizer into an existing folder.

    Args:
        folder: see `storage.files.atomic_folder`, which publishes it only if complete.
        state: state dict of the tokenizer; weights of a frozen encoder are not written.
        config: of the tokenizer.
        encoder_fingerprint: fingerprint of the encoder; loading compares it.
        architecture: output of `encoder_architecture`, written beside the weights of an encoder.
        keep_encoder: write the weights of the encoder too; those of a finetuned one are always written.
    """
    keep = keep_encoder or config.fusion == "finetune"
    own = {name: value for name, value in state.items() if keep or not name.startswith("encoder.")}
    write_model(folder, own, config, encoder_fingerprint, "openpae.load_tokenizer")
    if keep and architecture is not None:
        write_json(folder / ENCODER, architecture)


def write_generator(
    folder: Path,
    state: Mapping[str, Tensor],
    config: GeneratorConfig,
    tokenizer_fingerprint: str,
    classes: tuple[Sequence[str], Sequence[int]] | None = None,
) -> None:
    """Write the files of a generator into an existing folder.

    Args:
        folder: the folder.
        state: state dict of the generator.
        config: of the generator.
        tokenizer_fingerprint: fingerprint of the tokenizer of its latents.
        classes: names of the classes and their numbers of training images, if known.
    """
    write_model(folder, state, config, tokenizer_fingerprint, "openpae.load_generator")
    if classes is not None:
        write_classes(folder, *classes)


def load_tokenizer(
    folder: str | Path,
    encoder: Encoder | None = None,
    *,
    decode_only: bool = False,
    torch_dtype: torch.dtype | None = None,
) -> Autoencoder:
    """`Autoencoder.from_pretrained` for local folders only, so that a mistyped path is not looked up on the
    hub.

    Args:
        folder: a tokenizer folder, a training checkpoint, or a run folder (its newest checkpoint).
        encoder: your own module, if the tokenizer was trained with one.
        decode_only: skip the frozen encoder: faster, but `encode` then needs features.
        torch_dtype: see `Autoencoder.from_pretrained`.

    Raises:
        FileNotFoundError: no such folder, or the encoder's weights cannot be loaded.
        ValueError: another kind of folder, damaged or incompatible weights, or not the encoder of training.
    """
    return Autoencoder.from_pretrained(
        model_folder(folder), encoder, decode_only=decode_only, torch_dtype=torch_dtype
    )


def load_generator(folder: str | Path, *, torch_dtype: torch.dtype | None = None) -> LatentGenerator:
    """`from_pretrained` of the class that the folder holds, for local folders only.

    Args:
        folder: a generator folder, a training checkpoint, or a run folder (its newest checkpoint).
        torch_dtype: see `LatentGenerator.from_pretrained`.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: another kind of folder, damaged or incompatible weights.
    """
    path = model_folder(folder)
    config = configs.load_one_of(GENERATORS, path / CONFIG)
    kind = DiTDH if isinstance(config, DiTDHConfig) else LightningDiT
    return kind.from_pretrained(path, torch_dtype=torch_dtype)


def write_prior(
    folder: Path,
    state: Mapping[str, Tensor],
    config: RefinerConfig | LinearTargetsConfig,
    encoder_fingerprint: str,
) -> None:
    """Write the files of a refiner or of raw targets into an existing folder.

    `encoder_fingerprint` is that of the encoder of its features.
    """
    write_model(folder, state, config, encoder_fingerprint, "openpae.load_prior")


def load_prior(folder: str | Path) -> FrozenPrior:
    """Load a refiner, or raw targets, as the frozen prior of SSR and SCR.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: another kind of folder, damaged or incompatible weights.
    """
    path = model_folder(folder)
    kind = configs.read_yaml(path / CONFIG).get("kind")
    build: Callable[[], Refiner | LinearTargets]
    if kind == "LinearTargetsConfig":
        build = partial(LinearTargets, configs.load(LinearTargetsConfig, path / CONFIG))
    else:
        build = partial(Refiner, configs.load(RefinerConfig, path / CONFIG))
    state, _ = read_model(path)
    check_size(build, state, f"weights in {path}")
    targets = build()
    load_strict(targets, state, f"weights in {path}")
    return FrozenPrior(targets)


def check_pair(tokenizer: str | Path, generator: str | Path) -> dict[str, str]:
    """Check that a generator makes latents of this openpae tokenizer; returns both fingerprints.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: a folder holds another kind of model, or the generator was trained on latents of another
            tokenizer.
    """
    _check_kind(tokenizer, "tokenizer", [PAEConfig])
    second = generator_identity(generator)
    first = check_origin(tokenizer, f"{generator} makes latents", second.made_with)
    return {"tokenizer": first, "generator": second.fingerprint}


def generator_identity(folder: str | Path) -> Identity:
    """Identity of a saved generator. Its `made_with` is that of the tokenizer of its latents.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: another kind of model.
    """
    _check_kind(folder, "generator", [*GENERATORS])
    return identity_of(folder)


def check_origin(tokenizer: str | Path, origin: str, made_with: str, identity: str | None = None) -> str:
    """Check that a tokenizer is the one of given latents; returns its identity.

    A tokenizer whose training was `train: decoder` has the latents of its parent, to the bit.

    Args:
        tokenizer: the tokenizer; an openpae folder where `identity` is None.
        origin: what made or holds the latents, for the message.
        made_with: identity of their tokenizer.
        identity: identity of the given tokenizer.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: another tokenizer.
    """
    if identity is None:
        _check_kind(tokenizer, "tokenizer", [PAEConfig])
        identity = identity_of(tokenizer).fingerprint
        parent = read_parent(model_folder(tokenizer))
        if parent is not None and (parent.trained, parent.fingerprint) == ("decoder", made_with):
            return identity
    if made_with != identity:
        raise ValueError(
            f"{origin} of the tokenizer {made_with}, but {tokenizer} is {identity}; decode with the "
            "tokenizer that the generator was trained with"
        )
    return identity


def _check_kind(folder: str | Path, expected: str, classes: Sequence[type]) -> None:
    kind = configs.read_yaml(model_folder(folder) / CONFIG).get("kind")
    if kind not in [cls.__name__ for cls in classes]:
        raise ValueError(f"{folder} is no {expected}: its config is of kind {kind!r}")
