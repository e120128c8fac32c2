"""PAE: a frozen VFM, the Detail-Aware Modulator, a latent on the sphere and a ViT decoder (Sec. 3 of the
paper)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from openpae import config as configs
from openpae.models.configs import DecoderConfig, PAEConfig
from openpae.models.encoders import (
    Encoder,
    EncoderInput,
    encoder_architecture,
    encoder_fingerprint,
    load_encoder,
)
from openpae.models.layers import (
    SelfAttention,
    TransformerBlock,
    init_vit,
    resize_positions,
    run_blocks,
    sincos_2d,
    start_at_self,
    start_with_spectrum,
    to_grid,
    to_sphere,
    to_tokens,
    unpatchify,
)
from openpae.models.modulator import DetailModulator
from openpae.models.vfms import EncoderSpec, encoder_spec
from openpae.storage import hub
from openpae.storage.model_folder import CONFIG, ENCODER, model_folder, read_model
from openpae.storage.weights import load_strict


class Projector(nn.Module):
    """Fused features to latent: self-attention (no residual, no norm), then a 3x3 convolution D -> C."""

    def __init__(self, dim: int, num_heads: int, latent_dim: int) -> None:
        super().__init__()
        self.attn = SelfAttention(dim, num_heads, qkv_bias=False)
        self.to_latent = nn.Conv2d(dim, latent_dim, 3, padding=1)
        init_vit(self)

    def forward(self, tokens: Tensor, h: int, w: int) -> Tensor:
        """tokens: (B, h w, D). Returns latents before the sphere norm: (B, C, h, w)."""
        out: Tensor = self.to_latent(to_grid(self.attn(tokens), h, w))
        return out


class Deprojector(nn.Module):
    """Latent to features, the projector's mirror: a 3x3 convolution C -> D, then self-attention."""

    def __init__(self, dim: int, num_heads: int, latent_dim: int) -> None:
        super().__init__()
        self.from_latent = nn.Conv2d(latent_dim, dim, 3, padding=1)
        self.attn = SelfAttention(dim, num_heads, qkv_bias=False)
        init_vit(self)

    def forward(self, z: Tensor) -> Tensor:
        """z: (B, C, h, w). Returns tokens: (B, h w, D)."""
        out: Tensor = self.attn(to_tokens(self.from_latent(z)))
        return out


class PixelDecoder(nn.Module):
    """ViT-MAE style decoder from tokens to normalised pixels.

    Args:
        dim: width D of the tokens that come in.
        config: its own sizes.
        grid: (h, w) that the positions are made for; for another they are interpolated.
    """

    positions: Tensor

    def __init__(self, dim: int, config: DecoderConfig, grid: tuple[int, int]) -> None:
        super().__init__()
        width = config.hidden_dim
        self.patch_size, self.grid = config.patch_size, grid
        self.checkpoint_blocks = 0  # see `run_blocks`
        self.embed = nn.Linear(dim, width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.register_buffer("positions", sincos_2d(*grid, width)[None], persistent=False)
        self.blocks = nn.ModuleList(
            TransformerBlock(width, config.num_heads, config.mlp_dim, norm_eps=1e-12)
            for _ in range(config.num_layers)
        )
        self.norm = nn.LayerNorm(width, eps=1e-12)
        self.to_pixels = nn.Linear(width, 3 * config.patch_size**2)
        init_vit(self)

    def forward(self, tokens: Tensor, h: int, w: int) -> Tensor:
        """tokens: (B, h w, D). Returns normalised pixels: (B, 3, h patch, w patch)."""
        x = self.embed(tokens) + resize_positions(self.positions, self.grid, h, w)
        # The CLS token carries no position; it goes in front and is dropped behind the last block.
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1).to(x.dtype), x], dim=1)
        x = run_blocks(self.blocks, x, (), self.checkpoint_blocks)
        return unpatchify(self.to_pixels(self.norm(x)[:, 1:]), h, w, self.patch_size)


class PAE(nn.Module):
    """Prior-Aligned AutoEncoder.

    Args:
        config: its sizes.
        encoder: the frozen VFM, or a module of your own that satisfies `Encoder`. None builds everything
            else from the facts of the table: enough to train on cached features, to decode, to count.

    Raises:
        ValueError: config.encoder names no row of the table and no encoder is given, or fusion none is to
            make latents of another width than the features.
    """

    made_with: str | None = None
    """Fingerprint of its encoder, where it was loaded; else that of the encoder it holds."""
    keeps_encoder: bool
    """Whether the encoder's weights are saved with the others: they were finetuned, or came with them."""

    def __init__(self, config: PAEConfig, encoder: Encoder | None = None) -> None:
        super().__init__()
        self.config = config
        self.keeps_encoder = config.fusion == "finetune"
        self.spec: EncoderSpec = encoder_spec(config.encoder) if encoder is None else encoder.spec
        self.encoder = encoder
        dim, heads, grid = config.width or self.spec.dim, self.spec.num_heads, config.grid_shape
        bare = config.fusion == "none"
        if bare and config.latent_dim != dim:
            raise ValueError(
                f"fusion none makes latents of the width of the features, so latent_dim must be {dim}, got "
                f"{config.latent_dim}"
            )
        self.narrow = nn.Linear(self.spec.dim, dim) if config.width else nn.Identity()
        self.modulator = (
            DetailModulator(dim, heads, config.modulator_layers, self.spec.stride, grid, config.fusion)
            if config.fusion != "finetune" and config.fusion != "none"
            else None
        )
        self.projector = None if bare else Projector(dim, heads, config.latent_dim)
        self.deprojector = None if bare else Deprojector(dim, heads, config.latent_dim)
        self.decoder = PixelDecoder(dim, config.decoder, grid)
        self.encoder_input = EncoderInput(self.spec, config.decoder.patch_size)

    def forward(
        self,
        images: Tensor,
        features: Tensor | None = None,
        extra_latents: Callable[[Tensor], Sequence[Tensor]] | None = None,
        noise: Tensor | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """Encode, and decode the latents together with others made from them: what a training step needs.

        Args:
            images: in [0, 1], (B, 3, H, W).
            features: as for `encode`.
            further: makes more latents (any batch sizes) from z; they pass the decoder in one batch with it.
            noise: what is added to z before it is decoded, (B, C, h, w).

        Returns:
            z, (B, C, h, w), and the decodes of z and of the further latents, in order.
        """
        z = self.encode(images, features)
        latents = [z if noise is None else z + noise, *(extra_latents(z) if extra_latents else [])]
        decoded = self.decode(torch.cat(latents))
        return z, list(torch.split(decoded, [len(latent) for latent in latents]))

    def preprocess(self, images: Tensor) -> Tensor:
        """Images in [0, 1], (B, 3, H, W), as the VFM wants them; see `EncoderInput`."""
        pixels: Tensor = self.encoder_input(images)
        return pixels

    def features(self, images: Tensor) -> Tensor:
        """Features H_vfm of images in [0, 1], (B, 3, H, W): (B, N, D).

        Raises:
            RuntimeError: this tokenizer was built without its encoder.
        """
        return self._encoder()(self.preprocess(images))

    def encode(self, images: Tensor, features: Tensor | None = None) -> Tensor:
        """Latents z of images; deterministic.

        Args:
            images: in [0, 1], (B, 3, H, W).
            features: what `features(images)` gives, (B, N, D), where it is at hand (cached).

        Returns:
            z, (B, C, h, w), on the sphere: unit root mean square over the channels of each token.
        """
        patch = self.config.decoder.patch_size
        h, w = images.shape[-2] // patch, images.shape[-1] // patch
        pixels = self.preprocess(images)
        if features is None:
            features = self._encoder()(pixels)
        tokens: Tensor = self.narrow(features.float())  # cached ones come in float16
        if self.modulator is not None:
            tokens = self.modulator(pixels, tokens)
        z = to_grid(tokens, h, w) if self.projector is None else self.projector(tokens, h, w)
        return to_sphere(z, self.config.sphere)

    def decode(self, z: Tensor) -> Tensor:
        """Images (B, 3, H, W) of latents z (B, C, h, w): around [0, 1], not clamped, float32."""
        z = z.float()  # cached ones come in bfloat16
        tokens = to_tokens(z) if self.deprojector is None else self.deprojector(z)
        normalised: Tensor = self.decoder(tokens, *z.shape[-2:])
        return normalised.float() * self.encoder_input.std + self.encoder_input.mean

    def reconstruct(self, images: Tensor) -> Tensor:
        """Images in [0, 1], (B, 3, H, W), encoded, decoded and clamped to [0, 1]."""
        return self.decode(self.encode(images)).clamp(0, 1)

    @classmethod
    def from_pretrained(
        cls,
        name_or_folder: str | Path,
        encoder: Encoder | None = None,
        *,
        decode_only: bool = False,
        revision: str | None = None,
    ) -> PAE:
        """A saved tokenizer in evaluation mode.

        Args:
            name_or_folder: a model or run folder, or a name OWNER/NAME of the hub.
            encoder: your own module, where the tokenizer was trained with one.
            decode_only: leave the frozen encoder out: quicker, but `encode` then needs features.
            revision: branch, tag or commit of the hub.

        Raises:
            FileNotFoundError: no such folder or name, or weights (the encoder's too) that cannot be had.
            ValueError: another kind of model, damaged or unfitting weights, or another encoder than in
                training.
        """
        path = model_folder(hub.find_model(name_or_folder, revision))
        config = configs.load(PAEConfig, path / CONFIG)
        state, identity = read_model(path)
        kept = {name: value for name, value in state.items() if name.startswith("encoder.")}
        finetuned = config.fusion == "finetune"
        if encoder is None:
            state = {name: value for name, value in state.items() if name not in kept}
            if not decode_only:
                source = str(path / ENCODER) if (path / ENCODER).is_file() else config.encoder_source
                own = {name.removeprefix("encoder."): value for name, value in kept.items()} or None
                encoder = load_encoder(config.encoder, source, trainable=finetuned, state=own)
        model = cls(config, encoder)
        # What the file does not hold of the encoder is as it was built.
        built = {k: v for k, v in model.state_dict().items() if k.startswith("encoder.")}
        load_strict(model, built | state, f"weights in {path}")
        model.made_with, model.keeps_encoder = identity.made_with, bool(kept)
        if encoder is not None and not finetuned and encoder_fingerprint(encoder) != identity.made_with:
            raise ValueError(
                f"{path} was trained with an encoder of fingerprint {identity.made_with}, but "
                f"{config.encoder!r} now has {encoder_fingerprint(encoder)}; point encoder_source to the "
                "weights that it was trained with"
            )
        return model.eval()

    def save_pretrained(self, folder: str | Path, *, precision: hub.Precision = "fp32") -> None:
        """Write a folder that `from_pretrained` loads: safetensors, config and model card.

        The frozen encoder's weights are left out, unless they were finetuned or came with the tokenizer's.

        Args:
            folder: where; replaced if it holds nothing but a saved model.
            precision: of the parameters in the file.

        Raises:
            ValueError: the encoder is not known, or the folder holds something else.
        """
        made_with = self.made_with
        if made_with is None and self.encoder is not None:
            made_with = encoder_fingerprint(self.encoder)
        if self.keeps_encoder and self.encoder is None:
            raise ValueError("this tokenizer was loaded without its own encoder; load it whole to save it")
        hub.save(
            self,
            folder,
            made_with=made_with,
            precision=precision,
            leave_out=None if self.keeps_encoder else "encoder.",
            architecture=encoder_architecture(self.encoder) if self.keeps_encoder else None,
        )

    def push_to_hub(self, repo: str, *, licence: str | None = None, private: bool = False) -> str:
        """Save and upload to the hub; see `hub.push`. Returns the address."""
        return hub.push_saved(self.save_pretrained, repo, licence=licence, private=private)

    def start_local(self) -> None:
        """Other initial weights: detail passes both projectors from the first step, and the first images have
        the spectrum of photographs (`layers.start_at_self`, `layers.start_with_spectrum`)."""
        for projector in (self.projector, self.deprojector):
            if projector is not None:
                start_at_self(projector.attn)
        start_with_spectrum(self.decoder.to_pixels, self.decoder.patch_size)

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        return self.encoder_input.mean.device

    def trained_parameters(self) -> list[nn.Parameter]:
        """Everything that training changes: all but the frozen VFM."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def _encoder(self) -> Encoder:
        if self.encoder is None:
            raise RuntimeError(
                f"this tokenizer was built without its encoder {self.config.encoder!r}, so it needs the "
                "features "
                "beside the images; build it with build_tokenizer(config) or load it with its encoder"
            )
        return self.encoder


def build_tokenizer(config: PAEConfig) -> PAE:
    """A new tokenizer with the pretrained VFM that its config names.

    Raises:
        ValueError, FileNotFoundError: the VFM is unknown, or its weights cannot be had.
    """
    trainable = config.fusion == "finetune"
    return PAE(config, load_encoder(config.encoder, config.encoder_source, trainable=trainable))
