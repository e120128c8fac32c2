"""Saved models: a folder of weights (safetensors), config (YAML) and one line on how to load it.

Also the import of the authors' released weights, by a written map of names.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from openpae import config as configs
from openpae.dit import LightningDiT, LightningDiTConfig
from openpae.encoders import Encoder, load_encoder
from openpae.layers import rope_2d, sincos_2d
from openpae.priors import FrozenPrior, LinearTargets, LinearTargetsConfig, Refiner, RefinerConfig
from openpae.storage import fingerprint
from openpae.tokenizer import PAE, PAEConfig

WEIGHTS = "model.safetensors"


@dataclass(frozen=True, kw_only=True)
class Identity:
    """Which weights a folder holds, and which others they belong to. 16 hexadecimal digits each."""

    fingerprint: str
    """Of these weights and their config."""
    made_with: str
    """Of the frozen encoder (for a tokenizer or a refiner), or of the tokenizer whose latents it makes (for a
    generator)."""


def write_tokenizer(folder: Path, state: Mapping[str, Tensor], config: PAEConfig, encoder_print: str) -> None:
    """Write a tokenizer's files into an existing folder; `storage.whole_folder` makes it whole or nothing.

    Args:
        folder: where.
        state: state dict of a `PAE`; the frozen encoder's weights are left out, they have their own home.
        config: of the tokenizer.
        encoder_print: fingerprint of the encoder, checked when the folder is loaded.
    """
    keep_encoder = config.fusion == "finetune"
    own = {name: value for name, value in state.items() if keep_encoder or not name.startswith("encoder.")}
    _write(folder, own, config, encoder_print, "openpae.load_tokenizer")


def write_generator(
    folder: Path, state: Mapping[str, Tensor], config: LightningDiTConfig, tokenizer_print: str
) -> None:
    """Write a generator's files into an existing folder; tokenizer_print names the tokenizer of its
    latents."""
    _write(folder, state, config, tokenizer_print, "openpae.load_generator")


def load_tokenizer(folder: str | Path, encoder: Encoder | None = None, *, decode_only: bool = False) -> PAE:
    """A tokenizer in evaluation mode.

    Args:
        folder: a tokenizer folder, a training checkpoint, or a run folder (its newest checkpoint).
        encoder: your own module, where the tokenizer was trained with one.
        decode_only: leave the frozen encoder out: quicker, but `encode` then needs features.

    Raises:
        FileNotFoundError: no such folder, or the encoder's weights can not be had.
        ValueError: another kind of folder, damaged or unfitting weights, or another encoder than in training.
    """
    path = model_folder(folder)
    config = configs.load(PAEConfig, path / "config.yaml")
    state, identity = _load(path)
    if decode_only and encoder is None:  # a finetuned encoder is among the weights
        state = {name: value for name, value in state.items() if not name.startswith("encoder.")}
    if encoder is None and not decode_only:
        encoder = load_encoder(config.encoder, config.encoder_source, trainable=config.fusion == "finetune")
    model = PAE(config, encoder)
    if encoder is not None and config.fusion != "finetune":
        found = encoder_fingerprint(encoder)
        if found != identity.made_with:
            raise ValueError(
                f"{path} was trained with an encoder of fingerprint {identity.made_with}, but "
                f"{config.encoder!r} "
                f"now has {found}; point encoder_source to the weights it was trained with"
            )
        state |= {f"encoder.{name}": value for name, value in model.encoder.state_dict().items()}  # type: ignore[union-attr]
    load_strict(model, state, f"weights in {path}")
    return model.eval()


def load_generator(folder: str | Path) -> LightningDiT:
    """A generator in evaluation mode, with the statistics of its latents.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: another kind of folder, damaged or unfitting weights.
    """
    path = model_folder(folder)
    config = configs.load(LightningDiTConfig, path / "config.yaml")
    state, _ = _load(path)
    model = LightningDiT(config)
    load_strict(model, state, f"weights in {path}")
    return model.eval()


def write_prior(
    folder: Path,
    state: Mapping[str, Tensor],
    config: RefinerConfig | LinearTargetsConfig,
    encoder_print: str,
) -> None:
    """Write a refiner's files (or raw targets') into an existing folder; encoder_print names the encoder
    whose
    features it refines."""
    _write(folder, state, config, encoder_print, "openpae.load_prior")


def load_prior(folder: str | Path) -> FrozenPrior:
    """The fixed targets of SSR and SCR: a refiner, or raw targets, that never changes.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: another kind of folder, damaged or unfitting weights.
    """
    path = model_folder(folder)
    kind = configs.read_yaml(path / "config.yaml").get("kind")
    targets: Refiner | LinearTargets
    if kind == "LinearTargetsConfig":
        targets = LinearTargets(configs.load(LinearTargetsConfig, path / "config.yaml"))
    else:
        targets = Refiner(configs.load(RefinerConfig, path / "config.yaml"))
    state, _ = _load(path)
    load_strict(targets, state, f"weights in {path}")
    return FrozenPrior(targets)


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


def check_pair(tokenizer: str | Path, generator: str | Path) -> dict[str, str]:
    """See that a generator makes latents of this tokenizer; returns both fingerprints.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: the generator was trained on the latents of another tokenizer.
    """
    ours, theirs = identity_of(tokenizer), identity_of(generator)
    if theirs.made_with != ours.fingerprint:
        raise ValueError(
            f"{generator} makes latents of the tokenizer {theirs.made_with}, but {tokenizer} is "
            f"{ours.fingerprint}; "
            "decode with the tokenizer that the generator was trained with"
        )
    return {"tokenizer": ours.fingerprint, "generator": theirs.fingerprint}


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


def checkpoint_path(run_dir: Path, step: int) -> Path:
    """Where a run keeps its checkpoint of a step."""
    return run_dir / "checkpoints" / f"step-{step:08d}"


def checkpoint_steps(run_dir: Path) -> list[int]:
    """The steps of the complete checkpoints of a run, in order: by number, never by size or date."""
    found = (re.fullmatch(r"step-(\d+)", path.name) for path in (run_dir / "checkpoints").glob("step-*"))
    return sorted(int(match[1]) for match in found if match)


def encoder_fingerprint(encoder: Encoder) -> str:
    """Fingerprint of a frozen encoder: its weights, and what its spec says of their input and output.

    Raises:
        TypeError: the encoder is no nn.Module, so it has no weights to name.
    """
    if not isinstance(encoder, nn.Module):
        raise TypeError(f"encoder must be an nn.Module, got {type(encoder).__name__}")
    spec = encoder.spec
    facts = (spec.stride, spec.num_prefix_tokens, spec.image_mean, spec.image_std)
    return fingerprint(encoder.state_dict(), repr(facts))


def load_strict(model: nn.Module, state: Mapping[str, Tensor], what: str) -> None:
    """Load a state dict that must fit exactly.

    Raises:
        ValueError: missing or unexpected keys, or wrong shapes; the message lists some of them.
    """
    own = model.state_dict()
    missing, unexpected = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    shapes = [
        f"{name} {tuple(state[name].shape)} for {tuple(own[name].shape)}"
        for name in sorted(own.keys() & state.keys())
        if own[name].shape != state[name].shape
    ]
    faults = [
        f"{len(names)} {label} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        for label, names in (
            ("keys missing", missing),
            ("unexpected", unexpected),
            ("of another shape", shapes),
        )
        if names
    ]
    if faults:
        raise ValueError(f"{what} do not fit the config: {', '.join(faults)}")
    model.load_state_dict(dict(state))


def read_tensors(file: Path) -> dict[str, Any]:
    """Tensors of a foreign file: safetensors, or a pickle that holds nothing but data.

    Raises:
        FileNotFoundError: no such file.
        ValueError: damaged, or a pickle that would run code when read.
    """
    if not file.is_file():
        raise FileNotFoundError(f"no weights file at {file}")
    try:
        if file.suffix == ".safetensors":
            return dict(load_file(file))
        data = torch.load(file, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # the bytes of a damaged pickle can lead its reader to any of them
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"{file} is refused: damaged, or a pickle that holds more than tensors and plain values "
            f"and could run code when read ({reason})"
        ) from None
    if not isinstance(data, dict):
        raise ValueError(f"{file} must hold a mapping of tensors, got {type(data).__name__}")
    return data


# Names of the authors' release -> ours. First match wins; a name that none matches is an error.
_TOKENIZER_NAMES = [
    (r"delta_encoder\.patch_embed\.proj\.", "modulator.patch_embed."),
    (r"delta_encoder\.layers\.(\d+)\.norm1\.", r"modulator.layers.\1.norm_self."),
    (r"delta_encoder\.layers\.(\d+)\.norm2_q\.", r"modulator.layers.\1.norm_query."),
    (r"delta_encoder\.layers\.(\d+)\.norm2_kv\.", r"modulator.layers.\1.norm_context."),
    (r"delta_encoder\.layers\.(\d+)\.norm3\.", r"modulator.layers.\1.norm_mlp."),
    (r"delta_encoder\.layers\.(\d+)\.(self_attn|cross_attn|mlp)\.", r"modulator.layers.\1.\2."),
    (r"delta_encoder\.fusion_proj\.", "modulator.fusion.proj."),
    (r"delta_encoder\.final_ln\.", "modulator.fusion.norm."),
    (r"latent_compressor\.0\.", "projector.attn."),
    (r"latent_compressor\.1\.", "projector.to_latent."),
    (r"latent_decompressor\.0\.", "deprojector.from_latent."),
    (r"latent_decompressor\.1\.", "deprojector.attn."),
    (r"decoder\.decoder_embed\.", "decoder.embed."),
    (r"decoder\.trainable_cls_token$", "decoder.cls_token"),
    (r"decoder\.decoder_layers\.(\d+)\.attention\.output\.dense\.", r"decoder.blocks.\1.attn.proj."),
    (
        r"decoder\.decoder_layers\.(\d+)\.attention\.attention\.(query|key|value)\.",
        r"decoder.blocks.\1.attn.\2.",
    ),
    (r"decoder\.decoder_layers\.(\d+)\.layernorm_before\.", r"decoder.blocks.\1.norm1."),
    (r"decoder\.decoder_layers\.(\d+)\.layernorm_after\.", r"decoder.blocks.\1.norm2."),
    (r"decoder\.decoder_layers\.(\d+)\.intermediate\.dense\.", r"decoder.blocks.\1.mlp.fc1."),
    (r"decoder\.decoder_layers\.(\d+)\.output\.dense\.", r"decoder.blocks.\1.mlp.fc2."),
    (r"decoder\.decoder_norm\.", "decoder.norm."),
    (r"decoder\.decoder_pred\.", "decoder.to_pixels."),
    (r"encoder\.encoder\.", "encoder.backbone."),
]
_GENERATOR_NAMES = [
    (r"x_embedder\.proj\.", "patch_embed."),
    (r"t_embedder\.mlp\.", "time_mlp."),
    (r"y_embedder\.embedding_table\.", "class_embed."),
    (r"blocks\.(\d+)\.adaLN_modulation\.1\.", r"blocks.\1.modulation."),
    (r"blocks\.(\d+)\.(norm1|norm2|attn|mlp)\.", r"blocks.\1.\2."),
    (r"final_layer\.adaLN_modulation\.1\.", "final_modulation."),
    (r"final_layer\.norm_final\.", "final_norm."),
    (r"final_layer\.linear\.", "to_velocity."),
]


def import_tokenizer(released: Mapping[str, Any], config: PAEConfig, encoder: Encoder) -> PAE:
    """The authors' tokenizer weights as a `PAE`.

    Args:
        released: their file's content: the state dict, bare or under the key "model", names bare or behind
            "module." and "_orig_mod.".
        config: sizes of the released model.
        encoder: the VFM whose architecture the file holds; its weights are replaced by the file's.

    Raises:
        ValueError: a key is missing, left over or of another shape, or its fixed positions are not ours.
    """
    state = _plain_names(released, ("model",))
    grid, patch = config.grid_size, config.decoder.hidden_dim
    model = PAE(config, encoder)
    dim = config.width or model.spec.dim
    _take_constant(state, "delta_encoder.pos_embed", sincos_2d(grid, grid, dim)[None])
    cls_free = sincos_2d(grid, grid, patch)
    with_cls = torch.cat([torch.zeros(1, patch), cls_free])[None]
    _take_constant(state, "decoder.decoder_pos_embed", with_cls)
    renamed = _rename(state, _TOKENIZER_NAMES)
    for index in range(config.decoder.num_layers):
        for kind in ("weight", "bias"):
            parts = [f"decoder.blocks.{index}.attn.{name}.{kind}" for name in ("query", "key", "value")]
            if all(part in renamed for part in parts):
                renamed[f"decoder.blocks.{index}.attn.qkv.{kind}"] = torch.cat(
                    [renamed.pop(p) for p in parts]
                )
    load_strict(model, renamed, "released tokenizer weights")
    return model.eval()


def import_generator(released: Mapping[str, Any], config: LightningDiTConfig) -> LightningDiT:
    """The authors' LightningDiT weights as ours; the latent statistics stay at 0 and 1 until they are set.

    Args:
        released: their file's content: the state dict, bare or under the key "ema" (preferred) or "model".
        config: sizes of the released model.

    Raises:
        ValueError: a key is missing, left over or of another shape, or its fixed positions are not ours.
    """
    state = _plain_names(released, ("ema", "model"))
    side = config.grid_size // config.patch_size
    _take_constant(state, "pos_embed", sincos_2d(side, side, config.hidden_dim)[None])
    for name, values in zip(
        ("cos", "sin"), rope_2d(side, side, config.hidden_dim // config.num_heads), strict=True
    ):
        _take_constant(state, f"feat_rope.freqs_{name}", values)
    model = LightningDiT(config)
    statistics = {"latent_mean": model.latent_mean, "latent_std": model.latent_std}
    load_strict(model, _rename(state, _GENERATOR_NAMES) | statistics, "released generator weights")
    return model.eval()


def _write(folder: Path, state: Mapping[str, Tensor], config: Any, made_with: str, loader: str) -> None:
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    identity = {"fingerprint": _print_of(weights, configs.to_dict(config), made_with), "made_with": made_with}
    save_file(weights, folder / WEIGHTS, metadata=identity)
    configs.save(config, folder / "config.yaml")
    (folder / "README.md").write_text(f"`{loader}(FOLDER)` of the package openpae loads this folder.\n")


def _load(path: Path) -> tuple[dict[str, Tensor], Identity]:
    # The config as it stands in the file: a field that a later version adds must not change old fingerprints.
    config = configs.read_yaml(path / "config.yaml")
    identity = identity_of(path)
    try:
        state = dict(load_file(path / WEIGHTS))
    except SafetensorError as error:
        raise ValueError(f"{path / WEIGHTS} is damaged: {error}") from None
    if _print_of(state, config, identity.made_with) != identity.fingerprint:
        raise ValueError(
            f"{path} is damaged or was edited: weights and config do not give its fingerprint "
            f"{identity.fingerprint}"
        )
    return state, identity


def _print_of(state: Mapping[str, Tensor], config: Mapping[str, Any], made_with: str) -> str:
    # Where the encoder's weights come from is no part of what the model is.
    facts = {key: value for key, value in config.items() if key not in ("kind", "encoder_source")}
    return fingerprint(state, repr(sorted(facts.items())), made_with)


def _plain_names(released: Mapping[str, Any], holders: Iterable[str]) -> dict[str, Tensor]:
    for holder in holders:
        if isinstance(released.get(holder), Mapping):
            released = released[holder]
            break
    plain = {re.sub(r"^((module|_orig_mod)\.)+", "", name): value for name, value in released.items()}
    if strange := [name for name, value in plain.items() if not isinstance(value, Tensor)]:
        raise ValueError(
            f"released weights must map names to tensors; not so: {', '.join(sorted(strange)[:5])}"
        )
    return plain


def _rename(state: Mapping[str, Tensor], names: list[tuple[str, str]]) -> dict[str, Tensor]:
    renamed, left = {}, []
    for name, value in state.items():
        for pattern, replacement in names:
            new, hits = re.subn(f"^{pattern}", replacement, name)
            if hits:
                renamed[new] = value
                break
        else:
            left.append(name)
    if left:
        raise ValueError(f"released weights hold {len(left)} unknown names: {', '.join(sorted(left)[:5])}")
    return renamed


def _take_constant(state: dict[str, Tensor], name: str, ours: Tensor) -> None:
    """Drop a table that is computed here, once it is seen to be the same."""
    if name not in state:
        raise ValueError(f"released weights lack {name}")
    theirs = state.pop(name)
    if theirs.shape != ours.shape or not torch.allclose(theirs.float(), ours, atol=1e-5):
        raise ValueError(
            f"{name} of the released weights is not the fixed sine-cosine table of this grid "
            f"(shape {tuple(theirs.shape)}, ours {tuple(ours.shape)}); check image_size and the grid"
        )
