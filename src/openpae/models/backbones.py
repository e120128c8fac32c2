"""The networks of the encoders, loaded strictly or built. This file does not import the table of encoders."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from logging import ERROR
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from openpae.models.layers import TransformerBlock, to_tokens
from openpae.runtime.extras import needs
from openpae.storage.assets import fetch
from openpae.storage.weights import first_line, pickle_refusal

# The hub's file of InternViT uses the names of its remote code, which is never run.
_INTERNVIT_NAMES = (
    (r"^embeddings\.class_embedding$", "embeddings.cls_token"),
    (r"^embeddings\.position_embedding$", "embeddings.position_embeddings"),
    (r"^embeddings\.patch_embedding\.", "embeddings.patch_embeddings.projection."),
    (r"^encoder\.layers\.(\d+)\.attn\.proj\.", r"encoder.layer.\1.attention.projection_layer."),
    (r"^encoder\.layers\.(\d+)\.norm1\.", r"encoder.layer.\1.layernorm_before."),
    (r"^encoder\.layers\.(\d+)\.norm2\.", r"encoder.layer.\1.layernorm_after."),
    (r"^encoder\.layers\.(\d+)\.ls([12])$", r"encoder.layer.\1.lambda_\2"),
    (r"^encoder\.layers\.(\d+)\.mlp\.", r"encoder.layer.\1.mlp."),
)


def convert_internvit(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """InternViT's weights from the names of its remote code to those of `InternVLVisionModel`.

    Queries, keys and values become separate weights. Unknown names stay unchanged.
    """
    converted: dict[str, Tensor] = {}
    for name, value in state.items():
        if fused := re.fullmatch(r"encoder\.layers\.(\d+)\.attn\.qkv\.(weight|bias)", name):
            for part, rows in zip("qkv", value.chunk(3), strict=True):
                converted[f"encoder.layer.{fused[1]}.attention.{part}_proj.{fused[2]}"] = rows
            continue
        renamed = (
            re.sub(pattern, new, name) for pattern, new in _INTERNVIT_NAMES if re.search(pattern, name)
        )
        converted[next(renamed, name)] = value
    return converted


def drop_norm_affine(backbone: nn.Module, final_norm: str) -> None:
    """Replace a LayerNorm by one without scale and shift, in place.

    Raises:
        ValueError: the backbone has no LayerNorm named `final_norm`.
    """
    owner_name, _, leaf = final_norm.rpartition(".")
    try:
        owner = backbone.get_submodule(owner_name)
        norm = owner.get_submodule(leaf)
    except AttributeError:
        norm = None
    if not isinstance(norm, nn.LayerNorm):
        names = [name for name, module in backbone.named_modules() if isinstance(module, nn.LayerNorm)]
        outer = ", ".join(name for name in names if name.count(".") < 2)
        raise ValueError(f"{type(backbone).__name__} has no LayerNorm {final_norm!r}; it has: {outer}")
    setattr(owner, leaf, nn.LayerNorm(norm.normalized_shape, eps=norm.eps, elementwise_affine=False))


def last_blocks(backbone: nn.Module, count: int) -> tuple[nn.Module, ...]:
    """The last blocks of a transformer, whose outputs are to be summed; none for a count of 1.

    Raises:
        ValueError: the transformer has fewer blocks.
    """
    if count == 1:
        return ()
    stacks = [module for module in backbone.modules() if isinstance(module, nn.ModuleList)]
    blocks = max(stacks, key=len, default=nn.ModuleList())
    if count > len(blocks):
        raise ValueError(
            f"{type(backbone).__name__} has {max(1, len(blocks))} layers, so no sum of its last {count}"
        )
    return tuple(blocks[-count:])


@contextmanager
def outputs_of(blocks: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """Collect the outputs of modules while they run."""
    kept: list[Tensor] = []

    def keep(module: nn.Module, inputs: Any, output: Any) -> None:
        kept.append(output if isinstance(output, Tensor) else output[0])

    handles = [block.register_forward_hook(keep) for block in blocks]
    try:
        yield kept
    finally:
        for handle in handles:
            handle.remove()


def load_pretrained(
    model_class: str,
    source: str,
    *,
    state: Mapping[str, Tensor] | None = None,
    options: Mapping[str, Any],
    other_parts: tuple[str, ...] = (),
    convert: Callable[[Mapping[str, Tensor]], dict[str, Tensor]] | None = None,
) -> Any:
    """Load a vision tower of the transformers package in float32; strictly, unlike the package.

    Remote code is never run: only classes of the package are built.

    Args:
        model_class: class of the package.
        source: hub name or local folder; with `state` also the file of a config.
        state: the weights, if they are already loaded; the source then gives only the config.
        options: settings that replace those of the config.
        other_parts: prefixes of names that the file may hold beside those of the tower.
        convert: maps the names of the file to those of the class; None leaves that to the package.

    Raises:
        FileNotFoundError: the weights cannot be loaded from the source.
        ValueError: the file is damaged; a weight of the tower is missing, unknown or of another shape.
    """
    with needs("vfm", f"the VFM {source}"):
        import transformers  # half a second and 100 MB that only this family needs
        from transformers.utils.hub import cached_file

    kind = getattr(transformers, model_class)
    # Mismatched sizes go to the report, because the package's error does not name them. Weights in half
    # precision become float32; the engine sets the precision of the computation.
    loading = {"dtype": torch.float32, "output_loading_info": True, "ignore_mismatched_sizes": True}
    try:
        with _no_reports():
            config = kind.config_class.from_pretrained(source, **options)
            check_architecture(config.to_dict())
            if state is None and convert is None:
                model, report = kind.from_pretrained(source, config=config, **loading)
            else:
                if state is None:
                    file = cached_file(source, "model.safetensors")
                    assert file is not None  # for the type checker: a missing file raises OSError
                    state = load_file(file)
                weights = dict(state) if convert is None else convert(state)
                _check_room(partial(kind, config), weights)
                model, report = kind.from_pretrained(None, config=config, state_dict=weights, **loading)
    except OSError as error:
        raise FileNotFoundError(
            f"no weights of {model_class} at {source!r}; give encoder_source a local folder "
            f"or a hub name that can be reached ({str(error).splitlines()[0]})"
        ) from None
    except UnpicklingError as error:
        raise ValueError(pickle_refusal(source, error)) from None
    except Exception as error:  # a damaged file or config can raise any exception
        raise ValueError(f"weights or config at {source!r} are damaged: {first_line(error)}") from None
    _raise_on_faults(report, f"weights at {source!r} do not fit {model_class}", other_parts)
    return model


def _raise_on_faults(report: Mapping[str, Any], message: str, other_parts: tuple[str, ...]) -> None:
    faults = {
        "missing": report["missing_keys"],
        "unknown": [key for key in report["unexpected_keys"] if not key.startswith(other_parts)],
        "of another shape": [str(key) for key in report["mismatched_keys"]],
    }
    if any(faults.values()):
        named = (f"{fault}: {', '.join(sorted(keys)[:5])}" for fault, keys in faults.items() if keys)
        raise ValueError(f"{message}: {'; '.join(named)}")


def check_architecture(architecture: Mapping[str, Any]) -> None:
    """Refuse numbers that no VFM has, before a network is built.

    Raises:
        ValueError: a size above 2^20, more than 1024 layers, or a number that is not finite.
    """
    for name, value in architecture.items():
        most = 1024 if "layer" in name and "norm" not in name else 2**20
        for number in value if isinstance(value, list | tuple) else (value,):
            if type(number) is int and abs(number) > most:
                raise ValueError(f"{name} of an encoder must lie in [0, {most}], got {value}")
            if isinstance(number, float) and not math.isfinite(number):
                raise ValueError(f"{name} of an encoder must be a finite number, got {value}")


def _check_room(build: Callable[[], nn.Module], weights: Mapping[str, Tensor]) -> None:
    """Raise ValueError if a network is far larger than its weights, before it is allocated."""
    with torch.device("meta"):
        needed = sum(value.numel() for value in build().state_dict().values())
    held = sum(value.numel() for value in weights.values())
    if needed > 2 * held:  # otherwise the report names what is missing
        raise ValueError(f"the config asks for {needed:,} weights, the file holds {held:,}")


def build_tower(model_class: str, architecture: Mapping[str, Any]) -> nn.Module:
    """A vision tower of the transformers package with random weights.

    Args:
        model_class: class of the package.
        architecture: its config, as plain data.
    """
    with needs("vfm", f"a VFM of class {model_class}"):
        import transformers

    check_architecture(architecture)
    kind = getattr(transformers, model_class)
    tower: nn.Module = kind(kind.config_class.from_dict(dict(architecture)))
    return tower


@contextmanager
def _no_reports() -> Iterator[None]:
    """Silence the package's tables of unused weights; `load_pretrained` raises on weights that do not fit."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity(ERROR)
    try:
        yield
    finally:
        logging.set_verbosity(before)


class TokenMerger(nn.Module):
    """Merge m x m neighbouring tokens: concatenation, LayerNorm and an MLP, as in InternVL.

    Args:
        dim: width of the tokens.
        out: width of the merged tokens.
        merge: m.
    """

    def __init__(self, dim: int, out: int, merge: int) -> None:
        super().__init__()
        self.merge = merge
        self.norm = nn.LayerNorm(merge**2 * dim)
        self.fc1 = nn.Linear(merge**2 * dim, out)
        self.fc2 = nn.Linear(out, out)

    def forward(self, tokens: Tensor, h: int, w: int) -> Tensor:
        """tokens: (B, h w, dim). Returns (B, h w / m^2, out)."""
        m = self.merge
        cells = tokens.reshape(-1, h // m, m, w // m, m, tokens.shape[-1]).transpose(2, 3)
        out: Tensor = self.fc2(F.gelu(self.fc1(self.norm(cells.flatten(3).flatten(1, 2)))))
        return out


class EfficientNetTokens(nn.Module):
    """Tokens (B, h w, 432) of EfficientNet-Lite0 at stride 16: spatial detail beside semantics.

    Args:
        pretrained: take the weights of the registry package.
        layers: last blocks of the fine tap that are summed, at most the three of its shape. The coarse tap
            has one block of its shape.
    """

    def __init__(self, *, pretrained: bool = True, layers: int = 1) -> None:
        super().__init__()
        if layers > 3:
            raise ValueError(f"efficientnet-lite0 has 3 layers of one shape, so no sum of its last {layers}")
        with needs("quickstart", "the VFM efficientnet-lite0"):
            from efficientnet_lite_pytorch import EfficientNet

        self.layers = layers
        net = EfficientNet.from_name("efficientnet-lite0")
        if pretrained:
            (file,) = fetch("efficientnet-lite0").rglob("*.pth")
            net.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
        self.stem = nn.Sequential(net._conv_stem, net._bn0, net._swish)
        self.fine = nn.Sequential(*net._blocks[:11])
        self.coarse = nn.Sequential(*net._blocks[11:])

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels: (B, 3, 16 h, 16 w). Returns tokens: (B, h w, 432)."""
        with outputs_of([*self.fine][-self.layers : -1]) as earlier:
            fine = self.fine(self.stem(pixels.contiguous(memory_format=torch.channels_last)))
        coarse = F.interpolate(self.coarse(fine), size=fine.shape[-2:], mode="bilinear", align_corners=False)
        fine = sum(earlier, fine)
        taps = (to_tokens(tap).float() for tap in (fine, coarse))
        return torch.cat([F.layer_norm(tap, tap.shape[-1:]) for tap in taps], dim=-1)


class RandomViT(nn.Module):
    """A ViT of one block with a CLS token and fixed random weights. It has no positions, so it takes any
    grid.

    Args:
        dim: width D.
        stride: pixels per token and axis.
        num_heads: attention heads.
    """

    def __init__(self, dim: int, stride: int, num_heads: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.patch_embed = nn.Conv2d(3, dim, stride, stride=stride)
            self.cls_token = nn.Parameter(torch.randn(1, 1, dim))
            self.block = TransformerBlock(dim, num_heads, 2 * dim, norm_eps=1e-6)
        self.layernorm = nn.LayerNorm(dim, elementwise_affine=False)

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels: (B, 3, h stride, w stride). Returns the CLS token and the patch tokens: (B, 1 + h w, D)."""
        tokens = to_tokens(self.patch_embed(pixels))
        out: Tensor = self.layernorm(
            self.block(torch.cat([self.cls_token.expand(tokens.shape[0], -1, -1), tokens], 1))
        )
        return out
