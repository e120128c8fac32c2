"""PAE: a frozen VFM, the Detail-Aware Modulator, a latent on the sphere and a ViT decoder (Sec. 3). RAE: the
baseline without modulator and projectors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from openpae import config as configs
from openpae.models.configs import PAEConfig
from openpae.models.decoder import Deprojector, PixelDecoder, Projector
from openpae.models.encoders import (
    Encoder,
    EncoderInput,
    encoder_architecture,
    encoder_fingerprint,
    load_encoder,
)
from openpae.models.layers import to_grid, to_sphere, to_tokens
from openpae.models.modulator import DetailModulator, NoModulator
from openpae.models.precision import MixedPrecision, in_dtype, own_precision
from openpae.models.vfms import EncoderSpec, encoder_spec
from openpae.storage import hub
from openpae.storage.model_folder import CONFIG, ENCODER, Parent, model_folder, read_model, read_parent
from openpae.storage.weights import check_size, load_strict


class Autoencoder(MixedPrecision):
    """A VFM, a bottleneck from its features to latents and back, and a ViT decoder.

    `PAE` and `RAE` differ in the bottleneck: `_build_bottleneck`, `_to_latent` and `_from_latent`.
    Latents and images are float32 in every precision of the weights; see `MixedPrecision`.

    Args:
        config: its sizes.
        encoder: the VFM, or your own module that satisfies `Encoder`. None builds the other parts from the
            facts of the table, which is enough to train on cached features and to decode.

    Raises:
        ValueError: no encoder is given, and config.encoder is not a row of the table.
    """

    made_with: str | None = None
    """Fingerprint of the encoder of training, known after loading."""
    parent: Parent | None = None
    """The model from whose weights its training started, known after loading."""
    keeps_encoder: bool
    """Whether the encoder's weights are saved too: if they were finetuned or imported with the tokenizer."""

    def __init__(self, config: PAEConfig, encoder: Encoder | None = None) -> None:
        super().__init__()
        self.config = config
        self.keeps_encoder = config.fusion == "finetune"
        self.spec: EncoderSpec = encoder_spec(config.encoder) if encoder is None else encoder.spec
        self.encoder = encoder
        width = self._build_bottleneck()
        self.decoder = PixelDecoder(width, config.decoder, config.grid_shape)
        self.encoder_input = EncoderInput(self.spec, config.decoder.patch_size)

    def _build_bottleneck(self) -> int:
        """Build the modules between VFM and decoder; returns the width of the decoder's input tokens."""
        raise NotImplementedError

    def _to_latent(self, pixels: Tensor, features: Tensor, h: int, w: int) -> Tensor:
        """Latents before the sphere norm, (B, C, h, w), of VFM features (B, h w, D)."""
        raise NotImplementedError

    def _from_latent(self, z: Tensor) -> Tensor:
        """Tokens for the decoder, (B, h w, D), of latents (B, C, h, w)."""
        raise NotImplementedError

    @own_precision
    def forward(
        self,
        images: Tensor,
        features: Tensor | None = None,
        extra_latents: Callable[[Tensor], Sequence[Tensor]] | None = None,
        noise: Tensor | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """Encode, and decode the latents in one pass with further latents: a training step.

        Args:
            images: in [0, 1], (B, 3, H, W).
            features: as for `encode`.
            extra_latents: computes further latents (any batch sizes) from z.
            noise: added to z before the decoder, (B, C, h, w).

        Returns:
            z, (B, C, h, w), and the decodes of z and of the extra latents, in order.
        """
        z = self._encode(images, features)
        latents = [z if noise is None else z + noise, *(extra_latents(z) if extra_latents else [])]
        decoded = self.decode(torch.cat(latents))
        return z, list(torch.split(decoded, [len(latent) for latent in latents]))

    def preprocess(self, images: Tensor) -> Tensor:
        """Images in [0, 1], (B, 3, H, W), to the input of the VFM; see `EncoderInput`."""
        pixels: Tensor = self.encoder_input(images)
        return pixels

    @own_precision
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
            features: the output of `features(images)`, (B, N, D), if it is cached.

        Returns:
            z, (B, C, h, w), on the sphere: unit root mean square over the channels of each token, or over
            all values with sphere: sample.

        Raises:
            ValueError: integer pixels, values below 0, or sides that the patch size does not divide.
        """
        _refuse_signed(images)
        return self._encode(images, features)

    @own_precision
    def _encode(self, images: Tensor, features: Tensor | None) -> Tensor:
        patch = self.config.decoder.patch_size
        h, w = images.shape[-2] // patch, images.shape[-1] // patch
        pixels = self.preprocess(images)
        if features is None:
            features = self._encoder()(pixels)
        z = self._to_latent(pixels, features.float(), h, w)  # cached features come in float16
        return to_sphere(z, self.config.sphere)

    @own_precision
    def decode(self, z: Tensor) -> Tensor:
        """Images (B, 3, H, W) of latents z (B, C, h, w): around [0, 1], not clamped, float32."""
        z = z.float()  # cached ones come in bfloat16
        normalised: Tensor = self.decoder(self._from_latent(z), *z.shape[-2:])
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
        torch_dtype: torch.dtype | None = None,
    ) -> Autoencoder:
        """Load a saved tokenizer in evaluation mode.

        Args:
            name_or_folder: a model or run folder, or a name OWNER/NAME of the hub.
            encoder: your own module, if the tokenizer was trained with one.
            decode_only: skip the frozen encoder: faster, but `encode` then needs features.
            revision: branch, tag or commit of the hub.
            torch_dtype: torch.bfloat16 or torch.float16 for half precision; None is float32.

        Raises:
            FileNotFoundError: no such folder or name, or weights that cannot be loaded.
            ValueError: another kind of model, damaged or incompatible weights, or another encoder than in
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
        kind = tokenizer_class(config)
        fixed = (
            {f"encoder.{k}": v for k, v in encoder.state_dict().items()}
            if isinstance(encoder, nn.Module)
            else {}
        )
        check_size(lambda: kind(config, encoder), fixed | state, f"weights in {path}")
        model = kind(config, encoder)
        # Weights of the encoder that are not in the file stay as built.
        built = {k: v for k, v in model.state_dict().items() if k.startswith("encoder.")}
        load_strict(model, built | state, f"weights in {path}")
        model.made_with, model.keeps_encoder = identity.made_with, bool(kept)
        model.parent = read_parent(path)
        if encoder is not None and not finetuned and encoder_fingerprint(encoder) != identity.made_with:
            raise ValueError(
                f"{path} was trained with an encoder of fingerprint {identity.made_with}, but "
                f"{config.encoder!r} now has {encoder_fingerprint(encoder)}; point encoder_source to the "
                "weights that it was trained with"
            )
        return in_dtype(model.eval(), torch_dtype)

    def save_pretrained(self, folder: str | Path, *, precision: hub.Precision = "fp32") -> None:
        """Write a folder that `from_pretrained` loads: safetensors, config and model card.

        The encoder's weights are saved only if `keeps_encoder` is set.

        Args:
            folder: new, or replaced if it holds only a saved model.
            precision: of the parameters in the file.

        Raises:
            ValueError: the fingerprint of the encoder is not known, or the folder holds other files.
        """
        made_with = self.made_with
        if made_with is None and self.encoder is not None:
            if self.half_dtype is not None:
                raise ValueError(
                    f"the encoder was rounded to {self.half_dtype}, so its fingerprint is not known; save "
                    'first, with precision="bf16" for a small file'
                )
            made_with = encoder_fingerprint(self.encoder)
        if self.keeps_encoder and self.encoder is None:
            raise ValueError(
                "this tokenizer was loaded without its own encoder; load it with its encoder to save it"
            )
        hub.save(
            self,
            folder,
            made_with=made_with,
            precision=precision,
            leave_out=None if self.keeps_encoder else "encoder.",
            architecture=encoder_architecture(self.encoder) if self.keeps_encoder else None,
            parent=self.parent,
        )

    def push_to_hub(self, repo: str, *, licence: str | None = None, private: bool = False) -> str:
        """Save and upload to the hub; see `hub.push`. Returns the address."""
        return hub.push_saved(self.save_pretrained, repo, licence=licence, private=private)

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.encoder_input.mean.device

    def trained_parameters(self) -> list[nn.Parameter]:
        """The parameters that training changes: all except those of the frozen VFM."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def _encoder(self) -> Encoder:
        if self.encoder is None:
            raise RuntimeError(
                f"this tokenizer was built without its encoder {self.config.encoder!r}, so it needs features "
                "beside the images; build it with build_tokenizer(config) or load it with its encoder"
            )
        return self.encoder


def _refuse_signed(images: Tensor) -> None:
    """Raise ValueError for images with values below 0, as in [-1, 1].

    It reads a value from the device, so the training step, compiled code and tensors without values skip it.
    """
    if torch.compiler.is_compiling() or type(images) is not Tensor or images.is_meta or not images.numel():
        return
    if (lowest := images.min().item()) < 0:
        raise ValueError(
            f"images must lie in [0, 1], got {lowest:.3g}; bring images in [-1, 1] there by (x + 1) / 2, and "
            "clamp decoded ones"
        )


class PAE(Autoencoder):
    """Prior-Aligned AutoEncoder (Sec. 3): modulator, projector, sphere, deprojector; see `Autoencoder`."""

    def _build_bottleneck(self) -> int:
        config, spec = self.config, self.spec
        if config.fusion == "none":
            raise ValueError("fusion none is the bare autoencoder: build it with build_tokenizer, or RAE")
        dim = config.width or spec.dim
        self.narrow = nn.Linear(spec.dim, dim) if config.width else nn.Identity()
        self.modulator = (
            NoModulator()
            if config.fusion == "finetune"
            else DetailModulator(
                dim, spec.num_heads, config.modulator_layers, spec.stride, config.grid_shape, config.fusion
            )
        )
        self.projector = Projector(dim, spec.num_heads, config.latent_dim)
        self.deprojector = Deprojector(dim, spec.num_heads, config.latent_dim)
        return dim

    def _to_latent(self, pixels: Tensor, features: Tensor, h: int, w: int) -> Tensor:
        z: Tensor = self.projector(self.modulator(pixels, self.narrow(features)), h, w)
        return z

    def _from_latent(self, z: Tensor) -> Tensor:
        tokens: Tensor = self.deprojector(z)
        return tokens


class RAE(Autoencoder):
    """Representation autoencoder (arXiv:2510.11690), the paper's baseline with fusion none; see
    `Autoencoder`.

    The VFM's features on the sphere are the latent, and only the decoder is trained.

    Raises:
        ValueError: latent_dim differs from the width of the features.
    """

    def _build_bottleneck(self) -> int:
        dim = self.spec.dim
        if self.config.latent_dim != dim:
            raise ValueError(
                f"fusion none makes latents of the width of the features, so latent_dim must be {dim}, got "
                f"{self.config.latent_dim}"
            )
        return dim

    def _to_latent(self, pixels: Tensor, features: Tensor, h: int, w: int) -> Tensor:
        return to_grid(features, h, w)

    def _from_latent(self, z: Tensor) -> Tensor:
        return to_tokens(z)


def tokenizer_class(config: PAEConfig) -> type[Autoencoder]:
    """The class of a config: `RAE` for fusion none, else `PAE`."""
    return RAE if config.fusion == "none" else PAE


def build_tokenizer(config: PAEConfig) -> Autoencoder:
    """A new tokenizer with the pretrained VFM that its config names.

    Raises:
        ValueError: the VFM is unknown.
        FileNotFoundError: its weights cannot be loaded.
    """
    trainable = config.fusion == "finetune"
    return tokenizer_class(config)(
        config, load_encoder(config.encoder, config.encoder_source, trainable=trainable)
    )
