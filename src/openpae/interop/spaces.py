"""Any tokenizer as two functions on images in [0, 1]: openpae folders, diffusers models, bare VFMs, own code.

`open_tokenizer` takes a text:

    runs/x                      a folder: an openpae tokenizer or run, or a diffusers model (config.json)
    openpae:runs/x              an openpae tokenizer or run
    diffusers:OWNER/NAME        an autoencoder of the hub, OWNER/NAME/SUBFOLDER, or a folder
    encoder:dinov2-l            features of a frozen VFM, one token per 16 x 16 pixels
    encoder:dinov2-l/8          the same, one token per 8 x 8 pixels
    targets:dinov2-l/8:runs/r   targets Z_T of a refiner of that VFM, or raw targets
    python:my_tokenizer.py      a file with encode(images) and perhaps decode(z); its code is run
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
from openpae.models.encoders import EncoderInput, FrozenEncoder, encoder_fingerprint, load_encoder
from openpae.models.layers import to_grid, to_tokens
from openpae.models.saved import load_prior, load_tokenizer
from openpae.models.tokenizer import Autoencoder
from openpae.runtime.extras import needs
from openpae.storage.files import file_hash, fingerprint
from openpae.storage.model_folder import identity_of


class Tokenizer(Protocol):
    """What a measurement needs of a tokenizer. Any object with these six members will do."""

    @property
    def name(self) -> str:
        """Name in tables."""
        ...

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that identify the weights."""
        ...

    @property
    def image_size(self) -> Size:
        """(H, W) of its training images in pixels, or the side of squares."""
        ...

    @property
    def decode(self) -> Callable[[Tensor], Tensor] | None:
        """Latents (B, C, h, w) to images (B, 3, H, W) in [0, 1]; None without a decoder."""
        ...

    def encode(self, images: Tensor, /) -> Tensor:
        """Latents (B, C, h, w) of images (B, 3, H, W) in [0, 1]; equal in every call."""
        ...

    def latent_shape(self, image_size: Size, /) -> tuple[int, int, int]:
        """(C, h, w) for images of this size."""
        ...


@dataclass(frozen=True, kw_only=True)
class LatentSpace:
    """A `Tokenizer` made by an adapter."""

    name: str
    kind: str
    """The adapter: openpae, diffusers, encoder, targets, python."""
    fingerprint: str
    image_size: Size
    encode: Callable[[Tensor], Tensor]
    """Images in [0, 1], on any device, to latents (B, C, h, w), float32."""
    decode: Callable[[Tensor], Tensor] | None
    """Latents, on any device, to images in [0, 1]; None without a decoder."""

    @torch.no_grad()
    def latent_shape(self, image_size: Size) -> tuple[int, int, int]:
        """(C, h, w) for images of this size; encodes a black image."""
        _, c, h, w = self.encode(torch.zeros(1, 3, *height_width(image_size))).shape
        return (c, h, w)


def open_tokenizer(text: str, device: torch.device | str = "cpu") -> LatentSpace:
    """Open a tokenizer.

    Args:
        text: KIND:SOURCE, or a folder; the head of this file lists all forms.
        device: device of the weights.

    Raises:
        ValueError: an unknown kind, or weights that do not fit.
        FileNotFoundError: the folder, file or weights do not exist.
    """
    kind, colon, source = text.partition(":")
    if colon and kind in _ADAPTERS:
        return _ADAPTERS[kind](source, torch.device(device))
    folder = Path(text)
    if colon and not folder.exists():
        raise ValueError(f"unknown kind of tokenizer {kind!r} in {text!r}; known: {', '.join(_ADAPTERS)}")
    return _ADAPTERS["diffusers" if _is_diffusers(folder) else "openpae"](text, torch.device(device))


@torch.no_grad()
def check_tokenizer(tokenizer: Tokenizer, images: Tensor) -> None:
    """Check a tokenizer on some images, before any metric depends on it.

    Args:
        tokenizer: any tokenizer.
        images: (B, 3, H, W) in [0, 1].

    Raises:
        ValueError: latents or decoded images have a wrong shape or range, or differ in a second call.
    """
    z = tokenizer.encode(images)
    if z.ndim != 4 or len(z) != len(images) or not z.is_floating_point() or not z.isfinite().all():
        raise ValueError(
            f"encode of {tokenizer.name} must give finite float latents (B, C, h, w) for B = {len(images)}, "
            f"got {z.dtype} {tuple(z.shape)}" + ("" if z.isfinite().all() else " with NaN or infinity")
        )
    if not torch.allclose(z, tokenizer.encode(images), rtol=1e-3, atol=1e-4):
        raise ValueError(
            f"encode of {tokenizer.name} gives other latents in a second call; switch off its noise"
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
            f"decode of {tokenizer.name} gives other images in a second call; switch off its noise"
        )


def pae_space(model: Autoencoder, name: str, fingerprint: str) -> LatentSpace:
    """A model of openpae as a latent space, on the device of its weights."""
    return LatentSpace(
        name=name,
        kind="openpae",
        fingerprint=fingerprint,
        image_size=model.config.image_shape,
        encode=lambda images: model.encode(images.to(model.device)),
        decode=lambda z: model.decode(z.to(model.device)).clamp(0, 1),
    )


def _openpae(folder: str, device: torch.device) -> LatentSpace:
    model = load_tokenizer(folder).to(device)
    return pae_space(model, Path(folder).resolve().name, identity_of(folder).fingerprint)


_UNIT_RANGE = {"AutoencoderRAE"}
"""Classes of diffusers with images in [0, 1]; all others use [-1, 1]."""


@runtime_checkable
class _Autoencoder(Protocol):
    """The common methods of diffusers' autoencoders; without return_dict they return tuples."""

    def encode(self, x: Tensor, return_dict: bool = True) -> Any: ...

    def decode(self, z: Tensor, return_dict: bool = True) -> Any: ...


def _diffusers(source: str, device: torch.device) -> LatentSpace:
    """Any image autoencoder of diffusers: the mode of its posterior, in float32.

    Latents are not scaled or shifted. scaling_factor and shift_factor belong to a generator, and a common
    scale changes none of the metrics.
    """
    model, config = _load_diffusers(source)
    model = model.to(device).eval().requires_grad_(False)
    low, span = (0.0, 1.0) if config["_class_name"] in _UNIT_RANGE else (-1.0, 2.0)

    def encode(images: Tensor) -> Tensor:
        try:
            output = model.encode(images.to(device) * span + low, return_dict=False)[0]
        except (RuntimeError, ValueError, TypeError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise ValueError(
                f"{source} ({config['_class_name']}) takes no images {tuple(images.shape)}; only image "
                f"autoencoders can be measured, at a size that they allow ({str(error).splitlines()[0]})"
            ) from None
        latent: Tensor = output if isinstance(output, Tensor) else output.mode()  # of a posterior
        return latent

    def decode(z: Tensor) -> Tensor:
        images: Tensor = model.decode(z.to(device), return_dict=False)[0]
        return ((images - low) / span).clamp(0, 1)

    facts = {key: value for key, value in config.items() if not key.startswith("_") or key == "_class_name"}
    return LatentSpace(
        name=Path(source).name,
        kind="diffusers",
        fingerprint=fingerprint(model.state_dict(), repr(sorted(facts.items()))),
        image_size=_side(config),
        encode=encode,
        decode=decode,
    )


def _load_diffusers(name: str) -> tuple[Any, dict[str, Any]]:
    """The model and its config. Missing or unexpected weights raise, unlike in diffusers."""
    with needs("diffusers", name):
        import diffusers

    source, subfolder = name, None
    if not Path(name).is_dir():
        owner_and_name, rest = name.split("/")[:2], name.split("/")[2:]
        source, subfolder = "/".join(owner_and_name), "/".join(rest) or None
    try:
        config = dict(diffusers.AutoModel.load_config(source, subfolder=subfolder))
        kind = getattr(diffusers, config.get("_class_name", ""), None)
        if kind is None or not issubclass(kind, _Autoencoder):
            raise ValueError(
                f"{name} is no autoencoder of diffusers, but {config.get('_class_name', 'unknown')}"
            )
        # low_cpu_mem_usage needs the package accelerate; the report below names mismatched sizes.
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
            f"no diffusers autoencoder at {name!r}; give a folder with config.json, or a hub name that can "
            f"be reached: OWNER/NAME or OWNER/NAME/SUBFOLDER ({str(error).strip().splitlines()[0]})"
        ) from None
    faults = [*report["missing_keys"], *map(str, report["mismatched_keys"]), *report["unexpected_keys"]]
    if faults:
        raise ValueError(f"weights at {name!r} do not fit {kind.__name__}: {', '.join(sorted(faults)[:5])}")
    return model, config


def _side(config: dict[str, Any]) -> int:
    """The image side of a diffusers model; 256 if its config does not hold it."""
    size = config.get("sample_size") or config.get("image_size") or 256
    return size if isinstance(size, int) else int(size[0])


def _is_diffusers(folder: Path) -> bool:
    try:
        return "_class_name" in json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False


def _encoder(source: str, device: torch.device) -> LatentSpace:
    """Patch features of a frozen VFM as latents (those of RAE before normalisation). No decoder."""
    encoder, patch, encode = _features(source, device)
    return LatentSpace(
        name=f"{source.partition('/')[0]} (VFM)",
        kind="encoder",
        fingerprint=encoder_fingerprint(encoder),
        image_size=16 * patch,
        encode=encode,
        decode=None,
    )


def _features(source: str, device: torch.device) -> tuple[FrozenEncoder, int, Callable[[Tensor], Tensor]]:
    """A VFM, the pixels of its token, and the function from images to its features (B, D, h, w)."""
    name, slash, number = source.partition("/")
    if slash and (not number.isdecimal() or int(number) < 1):
        raise ValueError(f"encoder:{source} must be encoder:NAME or encoder:NAME/PIXELS_PER_TOKEN")
    patch = int(number) if slash else 16
    encoder = load_encoder(name).to(device)
    prepare = EncoderInput(encoder.spec, patch).to(device)

    def encode(images: Tensor) -> Tensor:
        h, w = images.shape[-2] // patch, images.shape[-1] // patch
        return to_grid(encoder(prepare(images.to(device))), h, w)

    return encoder, patch, encode


def _targets(source: str, device: torch.device) -> LatentSpace:
    """Z_T of a refiner as latents. If their SSC is low, no weight of SSR raises that of a tokenizer."""
    named, colon, folder = source.partition(":")
    if not colon:
        raise ValueError(f"targets:{source} must be targets:ENCODER/PIXELS_PER_TOKEN:FOLDER of a refiner")
    encoder, patch, features = _features(named, device)
    prior, identity = load_prior(Path(folder)).to(device), identity_of(folder)
    if identity.made_with != encoder_fingerprint(encoder):
        raise ValueError(
            f"{folder} refines features of the encoder {identity.made_with}, but {named} is "
            f"{encoder_fingerprint(encoder)}; name the encoder of the refiner"
        )

    def encode(images: Tensor) -> Tensor:
        grid = features(images)
        targets: Tensor = prior(to_tokens(grid))
        return to_grid(targets, *grid.shape[-2:])

    return LatentSpace(
        name=f"{Path(folder).resolve().name} (targets)",
        kind="targets",
        fingerprint=identity.fingerprint,
        image_size=16 * patch,
        encode=encode,
        decode=None,
    )


def _python(source: str, device: torch.device) -> LatentSpace:
    """A Python file with encode and perhaps decode and image_size (256 by default). Its code is run."""
    file = Path(source)
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
    "targets": _targets,
    "python": _python,
}
