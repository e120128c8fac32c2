"""A tokenizer of any kind beside a generator: scale of its latents, its identity, the check of the pair."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from openpae.data.caches import cache_latents
from openpae.data.crops import Size, height_width
from openpae.data.images import ImageSource
from openpae.data.shards import Shards
from openpae.interop.kinds import kind_and_source
from openpae.interop.spaces import LatentSpace, check_tokenizer, open_tokenizer
from openpae.models.saved import check_origin, check_pair, generator_identity, load_tokenizer
from openpae.models.tokenizer import Autoencoder
from openpae.runtime.device import autocast


class AnyTokenizer:
    """A latent space as its generators see it.

    Latents are in the scale that the autoencoder's config wants (`LatentSpace.scaling`).

    Args:
        space: the latent space.
        device: device of its weights.
        scaled: False leaves the latents as the space gives them, as in studies.
    """

    def __init__(
        self, space: LatentSpace, device: torch.device | str = "cpu", *, scaled: bool = True
    ) -> None:
        self.space, self._device = space, torch.device(device)
        self._scaling = space.scaling if scaled else None
        own = space.kind == "openpae" or not scaled
        self.identity = space.fingerprint if own else f"{space.kind}:{space.fingerprint}"
        """What caches and generators keep of it: the fingerprint; before it the kind, if not openpae."""

    @property
    def device(self) -> torch.device:
        """Device of its weights."""
        return self._device if self.space.module is None else next(self.space.module.parameters()).device

    def encode(self, images: Tensor) -> Tensor:
        """Latents (B, C, h, w) of images (B, 3, H, W) in [0, 1]."""
        z = self.space.encode(images)
        if self._scaling is None:
            return z
        shift, factor = (part.to(z.device) for part in self._scaling)
        return (z - shift) * factor

    def decode(self, z: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] of latents (B, C, h, w), float32.

        Raises:
            ValueError: it has no decoder.
        """
        if self.space.decode is None:
            raise ValueError(
                f"{self.space.name} has no decoder, so its latents cannot become images; a generator of them "
                "can be trained, and pae sample --format latents draws them"
            )
        if self._scaling is not None:
            shift, factor = (part.to(z.device) for part in self._scaling)
            z = z / factor + shift
        return self.space.decode(z).clamp(0, 1).float()

    def reconstruct(self, images: Tensor) -> Tensor:
        """Images in [0, 1], (B, 3, H, W), encoded and decoded. Raises ValueError without a decoder."""
        return self.decode(self.encode(images))

    def to(self, *args: Any, **settings: Any) -> Self:
        """Move the weights of a diffusers model; those of your own code stay. Arguments as in torch."""
        if self.space.module is not None:
            self.space.module.to(*args, **settings)
        return self

    def check(self, size: Size) -> None:
        """Encode and decode two random images, before much work depends on it. One of openpae is not tried.

        Raises:
            ValueError: see `spaces.check_tokenizer`.
        """
        if self.space.kind != "openpae":
            draw = torch.Generator().manual_seed(0)
            check_tokenizer(self.space, torch.rand(2, 3, *height_width(size), generator=draw))

    def cache_latents(
        self, source: ImageSource, folder: Path, *, size: Size | None = None, precision: str, **settings: Any
    ) -> Shards:
        """`data.caches.cache_latents` of this tokenizer.

        Args:
            source: the images.
            folder: output folder.
            size: (H, W) of the images, or the side of squares; None is that of the tokenizer.
            precision: fp32 or bf16.
            settings: batch_size, skip_broken, progress.

        Raises:
            ValueError: the tokenizer breaks its protocol (`spaces.check_tokenizer`), or see
                `data.caches.cache_latents`.
        """
        size = self.space.image_size if size is None else size
        self.check(size)

        def encode(images: Tensor) -> Tensor:
            with autocast(self.device, precision):
                return self.encode(images)

        return cache_latents(
            encode,
            source,
            folder,
            image_size=size,
            latent_shape=self.space.latent_shape(size),
            tokenizer_fingerprint=self.identity,
            precision=precision,
            device=self.device,
            **settings,
        )


def open_decoder(
    tokenizer: str | Path,
    latents: tuple[str, str],
    device: torch.device | str = "cpu",
    *,
    decode_only: bool = True,
    torch_dtype: torch.dtype | None = None,
) -> tuple[Autoencoder | AnyTokenizer, str]:
    """The tokenizer that decodes given latents, and its identity.

    Args:
        tokenizer: KIND:SOURCE or a folder; see `kinds`.
        latents: their origin for the message ("runs/g makes latents"), and the identity of their tokenizer.
        device: device of the weights.
        decode_only: leave out the frozen encoder of an openpae tokenizer.
        torch_dtype: see `Autoencoder.from_pretrained`.

    Raises:
        FileNotFoundError: no such tokenizer.
        ValueError: the latents come from another tokenizer, or weights are damaged or do not fit.
    """
    origin, made_with = latents
    kind, source = kind_and_source(tokenizer)
    if kind == "openpae":
        identity = check_origin(source, origin, made_with)
        own = load_tokenizer(source, decode_only=decode_only, torch_dtype=torch_dtype)
        return own.to(device), identity
    space = open_tokenizer(tokenizer, device)
    other = AnyTokenizer(space, device, scaled=made_with != space.fingerprint)
    check_origin(tokenizer, origin, made_with, other.identity)
    return other if torch_dtype is None else other.to(torch_dtype), other.identity


def open_pair(
    tokenizer: str | Path,
    generator: str | Path,
    device: torch.device | str = "cpu",
    *,
    decode_only: bool = True,
    torch_dtype: torch.dtype | None = None,
) -> tuple[Autoencoder | AnyTokenizer, dict[str, str]]:
    """The tokenizer of a saved generator, and the identities of both.

    Args:
        tokenizer: KIND:SOURCE or a folder; see `kinds`.
        generator: folder of the generator.
        device, decode_only, torch_dtype: see `open_decoder`.

    Raises:
        FileNotFoundError, ValueError: see `open_decoder`, or the folder holds no generator.
    """
    kind, source = kind_and_source(tokenizer)
    if kind == "openpae":
        check_pair(source, generator)
    identity = generator_identity(generator)
    decoder, own = open_decoder(
        tokenizer,
        (f"{generator} makes latents", identity.made_with),
        device,
        decode_only=decode_only,
        torch_dtype=torch_dtype,
    )
    return decoder, {"tokenizer": own, "generator": identity.fingerprint}


@torch.no_grad()
def decoded_shape(
    tokenizer: Autoencoder | AnyTokenizer, latent_shape: tuple[int, int, int]
) -> tuple[int, int]:
    """(H, W) of the images that a tokenizer makes of latents of this shape.

    Raises:
        ValueError: the tokenizer has no decoder.
    """
    if isinstance(tokenizer, Autoencoder) and latent_shape == tokenizer.config.latent_shape:
        return tokenizer.config.image_shape
    height, width = tokenizer.decode(torch.zeros(1, *latent_shape, device=tokenizer.device)).shape[-2:]
    return height, width
