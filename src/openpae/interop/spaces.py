"""Any tokenizer as two functions on images in [0, 1]: openpae, diffusers, VFMs, own code; see `kinds`."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from openpae.data.crops import Size, height_width
from openpae.data.pixels import check_images
from openpae.interop.diffusers_models import DiffusersModel
from openpae.interop.kinds import kind_and_source
from openpae.models.encoders import EncoderInput, FrozenEncoder, encoder_fingerprint, load_encoder
from openpae.models.layers import to_grid, to_tokens
from openpae.models.saved import load_prior, load_tokenizer
from openpae.models.tokenizer import Autoencoder
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
    scaling: tuple[Tensor, Tensor] | None = None
    """Shift and factor, (1,) or (C, 1, 1): a generator sees (z - shift) * factor. None is z itself."""
    module: nn.Module | None = None
    """The weights, if they can move to another device or type."""

    @torch.no_grad()
    def latent_shape(self, image_size: Size) -> tuple[int, int, int]:
        """(C, h, w) for images of this size; encodes a black image."""
        _, c, h, w = self.encode(torch.zeros(1, 3, *height_width(image_size))).shape
        return (c, h, w)


def open_tokenizer(text: str | Path, device: torch.device | str = "cpu") -> LatentSpace:
    """Open a tokenizer.

    Args:
        text: KIND:SOURCE, or a folder; `kinds` lists all forms.
        device: device of the weights.

    Raises:
        ValueError: an unknown kind, or weights that do not fit.
        FileNotFoundError: the folder, file or weights do not exist.
    """
    kind, source = kind_and_source(text)
    return _ADAPTERS[kind](source, torch.device(device))


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


def _diffusers(source: str, device: torch.device) -> LatentSpace:
    """An image autoencoder of diffusers. Its latents are measured without a scaling.

    scaling_factor and shift_factor belong to a generator, and a common scale changes none of the metrics.
    """
    model = DiffusersModel(source, device)
    return LatentSpace(
        name=Path(source).name,
        kind="diffusers",
        fingerprint=model.fingerprint,
        image_size=model.side,
        encode=model.encode,
        decode=model.decode,
        scaling=model.scaling,
        module=model.module,
    )


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
    """A Python file with encode and perhaps decode and image_size (256 by default). Its code is run.

    The fingerprint covers the file, and the weights of modules that are variables of the file.
    """
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
    modules = {name: value for name, value in own.items() if isinstance(value, nn.Module)}
    weights = {f"{name}.{key}": x for name, value in modules.items() for key, x in value.state_dict().items()}
    code = file_hash(file)
    return LatentSpace(
        name=file.stem,
        kind="python",
        fingerprint=fingerprint(weights, code) if weights else code[:16],
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
