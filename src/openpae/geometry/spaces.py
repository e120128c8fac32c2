"""Any tokenizer as two functions on images in [0, 1]: openpae folders, diffusers models, bare VFMs, your own.

A text names one (`open_tokenizer`):

    runs/x                      a folder: an openpae tokenizer or run, or a diffusers model (config.json)
    openpae:runs/x              an openpae tokenizer or run
    diffusers:OWNER/NAME        an autoencoder of the hub, OWNER/NAME/SUBFOLDER, or a folder
    encoder:dinov2-l            features of a frozen VFM, one token per 16 x 16 pixels
    encoder:dinov2-l/8          the same, one token per 8 x 8 pixels
    python:my_tokenizer.py      a file with encode(images) and, if it has one, decode(z); it is run
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from openpae.data.crops import Size, height_width
from openpae.data.pixels import check_images
from openpae.geometry.metrics import Decode
from openpae.models.encoders import EncoderInput, encoder_fingerprint, load_encoder
from openpae.models.layers import to_grid
from openpae.models.saved import load_tokenizer
from openpae.models.tokenizer import Autoencoder
from openpae.storage.files import file_hash, fingerprint
from openpae.storage.model_folder import identity_of


class Tokenizer(Protocol):
    """What can be measured. An object of your own with these six can be passed wherever one is asked for."""

    @property
    def name(self) -> str:
        """What tables call it."""
        ...

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that name exactly these weights."""
        ...

    @property
    def image_size(self) -> Size:
        """(H, W) in pixels that it was made for, or the side of squares."""
        ...

    @property
    def decode(self) -> Decode | None:
        """Latents (B, C, h, w) to images (B, 3, H, W) in [0, 1]; None where there is no decoder."""
        ...

    def encode(self, images: Tensor, /) -> Tensor:
        """Latents (B, C, h, w) of images (B, 3, H, W) in [0, 1]; the same whenever it is asked."""
        ...

    def latent_shape(self, image_size: Size, /) -> tuple[int, int, int]:
        """(C, h, w) for images of this size."""
        ...


@dataclass(frozen=True, kw_only=True)
class LatentSpace:
    """A tokenizer as two functions and what is known of it; every adapter makes one."""

    name: str
    kind: str
    """Which adapter made it: openpae, diffusers, encoder, python."""
    fingerprint: str
    image_size: Size
    encode: Callable[[Tensor], Tensor]
    """Images in [0, 1], on any device, to latents (B, C, h, w), float32."""
    decode: Decode | None
    """Latents, on any device, to images in [0, 1]; None where there is no decoder."""

    @torch.no_grad()
    def latent_shape(self, image_size: Size) -> tuple[int, int, int]:
        """(C, h, w) for images of this size, by encoding a black one."""
        _, c, h, w = self.encode(torch.zeros(1, 3, *height_width(image_size))).shape
        return (c, h, w)


def open_tokenizer(text: str, device: torch.device | str = "cpu") -> LatentSpace:
    """The tokenizer that a text names; the head of this file lists what it may say.

    Args:
        text: KIND:WHERE, or a folder.
        device: where its weights go.

    Raises:
        ValueError: an unknown kind, or weights that do not fit.
        FileNotFoundError: nothing there, or weights that cannot be had.
    """
    kind, colon, where = text.partition(":")
    if colon and kind in _ADAPTERS:
        return _ADAPTERS[kind](where, torch.device(device))
    folder = Path(text)
    if colon and not folder.exists():
        raise ValueError(f"unknown kind of tokenizer {kind!r} in {text!r}; known: {', '.join(_ADAPTERS)}")
    return _ADAPTERS["diffusers" if _is_diffusers(folder) else "openpae"](text, torch.device(device))


@torch.no_grad()
def check_tokenizer(tokenizer: Tokenizer, images: Tensor) -> None:
    """See that a tokenizer keeps its promises on some images, so that no metric rests on broken ones.

    Args:
        tokenizer: any.
        images: (B, 3, H, W) in [0, 1].

    Raises:
        ValueError: latents or decoded images of the wrong shape or range, or other ones when asked again.
    """
    z = tokenizer.encode(images)
    if z.ndim != 4 or len(z) != len(images) or not z.is_floating_point() or not z.isfinite().all():
        raise ValueError(
            f"encode of {tokenizer.name} must give finite float latents (B, C, h, w) for B = {len(images)}, "
            f"got {z.dtype} {tuple(z.shape)}" + ("" if z.isfinite().all() else " with NaN or infinity")
        )
    if not torch.allclose(z, tokenizer.encode(images), rtol=1e-3, atol=1e-4):
        raise ValueError(
            f"encode of {tokenizer.name} gives other latents when asked again; switch off its noise"
        )
    if tokenizer.decode is None:
        return
    decoded = tokenizer.decode(z)
    if decoded.shape != images.shape:
        raise ValueError(
            f"decode of {tokenizer.name} makes images {tuple(decoded.shape)} of {tuple(images.shape)}; "
            f"give it images of the size it was made for ({tokenizer.image_size})"
        )
    check_images(decoded, f"images decoded by {tokenizer.name}")
    if not torch.allclose(decoded, tokenizer.decode(z), rtol=1e-3, atol=1e-3):
        raise ValueError(
            f"decode of {tokenizer.name} gives other images when asked again; switch off its noise"
        )


def pae_space(model: Autoencoder, name: str, fingerprint: str) -> LatentSpace:
    """Our tokenizer as it stands, wherever its weights are."""
    return LatentSpace(
        name=name,
        kind="openpae",
        fingerprint=fingerprint,
        image_size=model.config.image_shape,
        encode=lambda images: model.encode(images.to(model.device)),
        decode=lambda z: model.decode(z.to(model.device)).clamp(0, 1),
    )


def _openpae(where: str, device: torch.device) -> LatentSpace:
    model = load_tokenizer(where).to(device)
    return pae_space(model, Path(where).resolve().name, identity_of(where).fingerprint)


_UNIT_RANGE = {"AutoencoderRAE"}
"""Classes of diffusers that take and give images in [0, 1]; all others use [-1, 1]."""


@runtime_checkable
class _Autoencoder(Protocol):
    """What diffusers' autoencoders have in common; each answers with a tuple when return_dict is off."""

    def encode(self, x: Tensor, return_dict: bool = True) -> Any: ...

    def decode(self, z: Tensor, return_dict: bool = True) -> Any: ...


def _diffusers(where: str, device: torch.device) -> LatentSpace:
    """Any image autoencoder of diffusers: the mode of its posterior, in float32.

    Latents are left as the model gives them. Its scaling_factor and shift_factor belong to a generator; a
    common scale changes no metric of ours, and the shift is not the tokenizer's.
    """
    model, config = _load_diffusers(where)
    model = model.to(device).eval().requires_grad_(False)
    low, span = (0.0, 1.0) if config["_class_name"] in _UNIT_RANGE else (-1.0, 2.0)

    def encode(images: Tensor) -> Tensor:
        try:
            answer = model.encode(images.to(device) * span + low, return_dict=False)[0]
        except (RuntimeError, ValueError, TypeError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise ValueError(
                f"{where} ({config['_class_name']}) takes no images {tuple(images.shape)}; only autoencoders "
                f"of images can be measured, at a size that they allow ({str(error).splitlines()[0]})"
            ) from None
        latent: Tensor = (
            answer if isinstance(answer, Tensor) else answer.mode()
        )  # a posterior's, without noise
        return latent

    def decode(z: Tensor) -> Tensor:
        images: Tensor = model.decode(z.to(device), return_dict=False)[0]
        return ((images - low) / span).clamp(0, 1)

    facts = {key: value for key, value in config.items() if not key.startswith("_") or key == "_class_name"}
    return LatentSpace(
        name=Path(where).name,
        kind="diffusers",
        fingerprint=fingerprint(model.state_dict(), repr(sorted(facts.items()))),
        image_size=_side(config),
        encode=encode,
        decode=decode,
    )


def _load_diffusers(where: str) -> tuple[Any, dict[str, Any]]:
    """The model and its config; strictly, unlike diffusers itself."""
    if importlib.util.find_spec("diffusers") is None:
        raise ValueError(
            f"{where} needs the package diffusers, which is not installed; pip install openpae[diffusers]"
        )
    import diffusers

    source, subfolder = where, None
    if not Path(where).is_dir():
        owner_and_name, rest = where.split("/")[:2], where.split("/")[2:]
        source, subfolder = "/".join(owner_and_name), "/".join(rest) or None
    try:
        config = dict(diffusers.AutoModel.load_config(source, subfolder=subfolder))
        kind = getattr(diffusers, config.get("_class_name", ""), None)
        if kind is None or not issubclass(kind, _Autoencoder):
            raise ValueError(
                f"{where} is no autoencoder of diffusers, but {config.get('_class_name', 'unknown')}"
            )
        # low_cpu_mem_usage wants the package accelerate; mismatched sizes are left to the report below.
        model, report = kind.from_pretrained(
            source,
            subfolder=subfolder,
            torch_dtype=torch.float32,
            output_loading_info=True,
            low_cpu_mem_usage=False,
            ignore_mismatched_sizes=True,
        )
    except OSError as error:
        raise FileNotFoundError(
            f"no diffusers autoencoder at {where!r}; give a folder with config.json, or a hub name that can "
            f"be reached: OWNER/NAME or OWNER/NAME/SUBFOLDER ({str(error).strip().splitlines()[0]})"
        ) from None
    faults = [*report["missing_keys"], *map(str, report["mismatched_keys"]), *report["unexpected_keys"]]
    if faults:
        raise ValueError(f"weights at {where!r} do not fit {kind.__name__}: {', '.join(sorted(faults)[:5])}")
    return model, config


def _side(config: dict[str, Any]) -> int:
    """The side of the images that a diffusers model was made for, where its config says it."""
    size = config.get("sample_size") or config.get("image_size") or 256
    return size if isinstance(size, int) else int(size[0])


def _is_diffusers(folder: Path) -> bool:
    try:
        return "_class_name" in json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False


def _encoder(where: str, device: torch.device) -> LatentSpace:
    """Patch features of a frozen VFM as a latent (RAE's, before its normalisation): no decoder."""
    name, slash, number = where.partition("/")
    if slash and (not number.isdecimal() or int(number) < 1):
        raise ValueError(f"encoder:{where} must be encoder:NAME or encoder:NAME/PIXELS_PER_TOKEN")
    patch = int(number) if slash else 16
    encoder = load_encoder(name).to(device)
    prepare = EncoderInput(encoder.spec, patch).to(device)

    def encode(images: Tensor) -> Tensor:
        h, w = images.shape[-2] // patch, images.shape[-1] // patch
        return to_grid(encoder(prepare(images.to(device))), h, w)

    return LatentSpace(
        name=f"{name} (VFM)",
        kind="encoder",
        fingerprint=encoder_fingerprint(encoder),
        image_size=16 * patch,
        encode=encode,
        decode=None,
    )


def _python(where: str, device: torch.device) -> LatentSpace:
    """A file of the user's own, which is run: encode, decode where there is one, image_size (256 if not)."""
    file = Path(where)
    if not file.is_file():
        raise FileNotFoundError(
            f"no Python file at {file}; it must define encode(images) and may define decode(z)"
        )
    spec = importlib.util.spec_from_file_location(file.stem, file)
    if spec is None or spec.loader is None:
        raise ValueError(f"{file} is no Python file; its name must end with .py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    own = vars(module)
    encode, decode, size = own.get("encode"), own.get("decode"), own.get("image_size", 256)
    if not callable(encode):
        raise ValueError(
            f"{file} must define encode(images): images (B, 3, H, W) in [0, 1] to latents (B, C, h, w)"
        )
    if not (decode is None or callable(decode)) or not isinstance(size, int):
        raise ValueError(f"in {file}, decode must be a function (or left out) and image_size an int")
    return LatentSpace(
        name=file.stem,
        kind="python",
        fingerprint=file_hash(file)[:16],
        image_size=size,
        encode=lambda images: encode(images.to(device)).float(),
        decode=None if decode is None else lambda z: decode(z.to(device)).float(),
    )


_ADAPTERS: dict[str, Callable[[str, torch.device], LatentSpace]] = {
    "openpae": _openpae,
    "diffusers": _diffusers,
    "encoder": _encoder,
    "python": _python,
}
