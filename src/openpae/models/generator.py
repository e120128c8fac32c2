"""The base of the generators: statistics of latents, initial weights of the conditioning, saving and
loading."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from openpae.models.configs import GeneratorConfig
from openpae.models.precision import MixedPrecision, in_dtype
from openpae.storage import hub
from openpae.storage.model_folder import Parent, model_folder, read_classes, read_parent


def checked_statistics(mean: Tensor, std: Tensor, *shapes: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Check mean and standard deviation of latents; returns them in shapes that broadcast to (C, h, w).

    Raises:
        ValueError: a shape that is not in `shapes`, or a channel that does not vary.
    """
    if mean.shape != std.shape or tuple(mean.shape) not in shapes:
        allowed = " or ".join(map(str, shapes))
        raise ValueError(f"mean and std must be {allowed}, got {tuple(mean.shape)} and {tuple(std.shape)}")
    if not (mean.isfinite().all() and std.isfinite().all() and (std > 0).all()):
        raise ValueError(
            f"statistics must be finite and std > 0, got mean {mean.tolist()} and std {std.tolist()}; "
            "a latent channel that never varies cannot be generated"
        )
    return (mean.view(-1, 1, 1), std.view(-1, 1, 1)) if mean.ndim == 1 else (mean, std)


class LatentGenerator(MixedPrecision):
    """A network that predicts the velocity of noisy latents; `LightningDiT` and `DiTDH` are the two.

    It works on normalised latents. Their statistics are buffers, so that they are saved with the weights.
    In half precision the velocity has the type of the weights; see `MixedPrecision`.

    Args:
        config: its sizes.
        checkpoint_blocks: see `layers.run_blocks`; it changes the cost of training, not its result.
    """

    config_class: ClassVar[type[GeneratorConfig]]
    config: GeneratorConfig
    latent_mean: Tensor
    latent_std: Tensor
    made_with: str | None = None
    """Fingerprint of the tokenizer of its latents, known after loading; saving needs it."""
    parent: Parent | None = None
    """The model from whose weights its training started, known after loading."""
    classes: tuple[list[str], list[int]] | None = None
    """Names of the classes and their numbers of training images, known after loading if the folder has them;
    saved with the weights."""
    class_embed: nn.Embedding
    time_mlp: nn.Sequential
    final_modulation: nn.Linear
    to_velocity: nn.Linear

    def __init__(self, config: GeneratorConfig, *, checkpoint_blocks: int = 0) -> None:
        super().__init__()
        self.config = config
        self.checkpoint_blocks = checkpoint_blocks

    def _register_statistics(self, *shape: int) -> None:
        self.register_buffer("latent_mean", torch.zeros(*shape))
        self.register_buffer("latent_std", torch.ones(*shape))

    def _reset_conditioning(self, *blocks: nn.Module) -> None:
        """Initial weights of the conditioning as in DiT; every block starts as the identity (AdaLN-zero)."""
        nn.init.normal_(self.class_embed.weight, std=0.02)
        for layer in self.time_mlp:
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=0.02)
        modulations = [block.get_submodule("modulation") for block in blocks]
        for module in [*modulations, self.final_modulation, self.to_velocity]:
            for parameter in module.parameters():
                nn.init.zeros_(parameter)

    @property
    def class_names(self) -> list[str] | None:
        """Names of the classes, at most K; None if they are not known."""
        return None if self.classes is None else self.classes[0][: self.config.num_classes]

    @property
    def null_label(self) -> int:
        """The label of the null class."""
        return self.config.num_classes

    @property
    def _statistics_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Allowed shapes of mean and standard deviation."""
        return ((self.config.latent_dim,),)

    def set_statistics(self, mean: Tensor, std: Tensor) -> None:
        """Set mean and standard deviation of the latents of training.

        Args:
            mean: per channel, (C,); for `DiTDH` also per channel and cell, (C, h, w), as in RAE's release.
            std: alike, > 0.

        Raises:
            ValueError: another shape, or a channel that does not vary.
        """
        mean, std = checked_statistics(mean, std, *self._statistics_shapes)
        self.latent_mean.copy_(mean)
        self.latent_std.copy_(std)

    def normalise(self, z: Tensor) -> Tensor:
        """Latents of the tokenizer to latents of zero mean and unit variance, float32."""
        x = z.float()
        x = x.clone() if x is z else x  # then in place: fresh memory costs more than the arithmetic
        return x.sub_(self.latent_mean).div_(self.latent_std)

    def denormalise(self, x: Tensor) -> Tensor:
        """Inverse of `normalise`."""
        return x.float() * self.latent_std + self.latent_mean

    @classmethod
    def from_pretrained(
        cls,
        name_or_folder: str | Path,
        *,
        revision: str | None = None,
        torch_dtype: torch.dtype | None = None,
    ) -> Self:
        """Load a saved generator in evaluation mode, with the statistics of its latents and the names of its
        classes.

        Args:
            name_or_folder: a model or run folder, or a name OWNER/NAME of the hub.
            revision: branch, tag or commit of the hub.
            torch_dtype: torch.bfloat16 or torch.float16 for half precision; None is float32.

        Raises:
            FileNotFoundError: no such folder or name, or the hub cannot be reached.
            ValueError: another kind of model, damaged or incompatible weights, or another torch_dtype.
        """
        folder = hub.find_model(name_or_folder, revision)
        model, made_with = hub.load_saved(cls, cls.config_class, folder, None)
        model.made_with, model.classes = made_with, read_classes(folder)
        model.parent = read_parent(model_folder(folder))
        return in_dtype(model, torch_dtype)

    def save_pretrained(self, folder: str | Path, *, precision: hub.Precision = "fp32") -> None:
        """Write a folder that `from_pretrained` loads: safetensors, config, model card, names of classes.

        Args:
            folder: new, or replaced if it holds only a saved model.
            precision: of the parameters in the file.

        Raises:
            ValueError: `made_with` is not known, or the folder holds other files.
        """
        hub.save(
            self,
            folder,
            made_with=self.made_with,
            precision=precision,
            classes=self.classes,
            parent=self.parent,
        )

    def push_to_hub(self, repo: str, *, licence: str | None = None, private: bool = False) -> str:
        """Save and upload to the hub; see `hub.push`. Returns the address."""
        return hub.push_saved(self.save_pretrained, repo, licence=licence, private=private)
