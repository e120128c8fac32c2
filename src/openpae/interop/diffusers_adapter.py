"""A PAE tokenizer as an autoencoder of the diffusers package (extra `diffusers`).

Import this module before you load a saved pipeline: diffusers does not import it by its name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor

from openpae import config as configs
from openpae.models.configs import PAEConfig
from openpae.models.encoders import FrozenEncoder, empty_encoder, encoder_architecture
from openpae.models.tokenizer import Autoencoder, tokenizer_class
from openpae.runtime.extras import needs

with needs("diffusers", "AutoencoderPAE"):
    from diffusers import ModelMixin
    from diffusers.configuration_utils import ConfigMixin, register_to_config
    from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTinyOutput
    from diffusers.models.autoencoders.vae import DecoderOutput, IdentityDistribution


class EncoderOutput(AutoencoderTinyOutput):  # type: ignore[misc]  # diffusers has no types
    """Latents, also as the distribution that scripts for AutoencoderKL ask for."""

    @property
    def latent_dist(self) -> IdentityDistribution:
        """A point mass: `sample()` and `mode()` are the latents."""
        return IdentityDistribution(self.latents)


class AutoencoderPAE(ModelMixin, ConfigMixin):  # type: ignore[misc]  # diffusers has no types
    """`encode(x).latents` or `.latent_dist`, and `decode(z).sample` of a tokenizer, on images in [-1, 1].

    Build one from a tokenizer with `of`. `save_pretrained` and `from_pretrained` are diffusers' own, and save
    the frozen encoder too. The weights stay in float32. Inputs in half precision run under autocast, and the
    outputs have their dtype.

    Args:
        tokenizer: config of the tokenizer, as plain data.
        architecture: of its encoder, if the transformers package builds it.
        with_encoder: whether it can encode.
        scaling_factor: a generator sees latents times this. Tokens on the sphere need none: their mean square
            is 1.
        shift_factor: subtracted before; see diffusers.
        latent_channels: C, for pipelines that read it.
        sample_size: height of the images of training.
        block_out_channels: its length n gives the patch size 2^(n - 1) to pipelines; the numbers have no
            meaning.
        in_channels: of images.
        out_channels: of images.
    """

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        tokenizer: dict[str, Any],
        architecture: dict[str, Any] | None = None,
        with_encoder: bool = True,
        scaling_factor: float = 1.0,
        shift_factor: float = 0.0,
        latent_channels: int = 32,
        sample_size: int = 256,
        block_out_channels: tuple[int, ...] = (1,) * 5,
        in_channels: int = 3,
        out_channels: int = 3,
    ) -> None:
        super().__init__()
        config = configs.from_dict(PAEConfig, tokenizer)
        trainable = config.fusion == "finetune"
        encoder = empty_encoder(config.encoder, architecture, trainable=trainable) if with_encoder else None
        self.pae = tokenizer_class(config)(config, encoder)

    @classmethod
    def of(cls, tokenizer: Autoencoder, *, scaling_factor: float = 1.0, shift_factor: float = 0.0) -> Self:
        """A tokenizer as an autoencoder of diffusers; the weights are shared.

        Args:
            tokenizer: with its encoder, or without it for decoding only.
            scaling_factor: see the class.
            shift_factor: see the class.

        Raises:
            ValueError: its encoder is not of the table, so diffusers cannot build it, or its patch size is
                not a power of 2.
        """
        config, encoder = tokenizer.config, tokenizer.encoder
        if encoder is not None and not isinstance(encoder, FrozenEncoder):
            raise ValueError(
                f"an encoder of your own ({type(encoder).__name__}) cannot be saved by diffusers; use one "
                "of the table"
            )
        patch = config.decoder.patch_size
        if patch & (patch - 1):
            raise ValueError(f"diffusers' pipelines need a patch size that is a power of 2, got {patch}")
        with torch.device("meta"):  # its weights are replaced below
            model: Self = cls(
                tokenizer=configs.to_dict(config),
                architecture=encoder_architecture(encoder),
                with_encoder=encoder is not None,
                scaling_factor=scaling_factor,
                shift_factor=shift_factor,
                latent_channels=config.latent_dim,
                sample_size=config.image_size,
                block_out_channels=(1,) * patch.bit_length(),
            )
        model.pae = tokenizer
        return model

    @classmethod
    def from_pretrained(cls, *args: Any, **settings: Any) -> Self:
        """As in diffusers; the weights are float32 for every dtype."""
        model: Self = super().from_pretrained(*args, **settings)
        model.pae.float()
        return model

    def encode(self, x: Tensor, return_dict: bool = True) -> EncoderOutput | tuple[Tensor]:
        """Images in [-1, 1], (B, 3, H, W), to latents (B, C, h, w) on the sphere, of the same dtype.
        Deterministic."""
        with _precision_of(x):
            # Without the check of `encode`, which would make each training step wait for the GPU.
            latents = self.pae._encode((x.float() + 1) / 2, None).to(x.dtype)
        return EncoderOutput(latents=latents) if return_dict else (latents,)

    def decode(
        self, z: Tensor, generator: torch.Generator | None = None, return_dict: bool = True
    ) -> DecoderOutput | tuple[Tensor]:
        """Latents (B, C, h, w) to images around [-1, 1], (B, 3, H, W), of the same dtype. `generator` is not
        used."""
        with _precision_of(z):
            images = (self.pae.decode(z) * 2 - 1).to(z.dtype)
        return DecoderOutput(sample=images) if return_dict else (images,)

    def forward(self, sample: Tensor, return_dict: bool = True) -> DecoderOutput | tuple[Tensor]:
        """Images in [-1, 1], encoded and decoded."""
        return self.decode(self.encode(sample, return_dict=False)[0], return_dict=return_dict)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # Scripts cast a frozen autoencoder to half precision. Its norms, positions and sphere need float32,
        # so weights move to another device but keep their dtype.
        def moved(tensor: Tensor) -> Tensor:
            new = fn(tensor)
            return new if new.dtype in (tensor.dtype, torch.float32) else tensor.to(new.device)

        return super()._apply(moved, recurse)  # type: ignore[no-any-return]


def _precision_of(x: Tensor) -> torch.autocast:
    half = x.dtype in (torch.bfloat16, torch.float16)
    return torch.autocast(x.device.type, dtype=x.dtype if half else torch.bfloat16, enabled=half)
