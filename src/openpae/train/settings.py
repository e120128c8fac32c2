"""The runs of the three stages: one frozen config each. This file imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from openpae.config import added, check_fields
from openpae.data.settings import ImageData
from openpae.engine.settings import LoopConfig, OptimConfig
from openpae.eval.settings import ExtractorName
from openpae.models.configs import (
    GeneratorConfig,
    LightningDiTConfig,
    LowPassConfig,
    PAEConfig,
    RefinerConfig,
)
from openpae.objective.settings import TokenizerLoss
from openpae.sampling.settings import SamplerConfig

TrainedPart = Literal["all", "decoder", "decoder+projectors"]


@dataclass(frozen=True, kw_only=True)
class RefinerRun:
    """One training run of a refiner."""

    model: RefinerConfig = field(default_factory=RefinerConfig)
    """The refiner."""
    encoder: str = "dinov2-l"
    """The VFM, a row of openpae.models.vfms.ENCODERS."""
    encoder_source: str | None = None
    """Hub name or local folder of its weights; null takes the row's own."""
    image_size: int = 256
    """Side of the training images in pixels, or their height where image_width is set; divided by
    model.grid_size it gives the tokenizer's patch."""
    image_width: int | None = None
    """Width of the training images where they are not square; null: as image_size."""
    data: ImageData
    """Its images."""
    upsampler: Literal["anyup", "jbu", "bilinear"] = "jbu"
    """How H_ref is brought to the image's size: anyup (the paper's; weights from torch hub), joint bilateral
    upsampling (image-guided, training-free) or bilinear."""
    low_pass: LowPassConfig = field(default_factory=LowPassConfig)
    """The low-pass behind it."""
    reconstruction: float = 1.0
    """Weight l_rep of ||H^ - H_vfm||^2."""
    gram: float = 1.0
    """Weight l_gram of the Gram match to H_ref."""
    optim: OptimConfig
    """How it is trained."""
    loop: LoopConfig
    """How long it is trained."""

    def __post_init__(self) -> None:
        if self.image_size % self.model.grid_size:
            raise ValueError(
                f"image_size must be a multiple of model.grid_size = {self.model.grid_size}, "
                f"got {self.image_size}"
            )
        patch, (_, width) = self.image_size // self.model.grid_size, self.image_shape
        if width != patch * self.model.grid_shape[1]:
            raise ValueError(
                f"image_width must be {patch} pixels for each of the {self.model.grid_shape[1]} columns of "
                f"the model's grid, got {width}; set image_width and model.grid_width"
            )
        check_fields(self, reconstruction="[0, inf)", gram="[0, inf)")

    @property
    def image_shape(self) -> tuple[int, int]:
        """(H, W) of the training images."""
        return (self.image_size, self.image_size if self.image_width is None else self.image_width)


@dataclass(frozen=True, kw_only=True)
class TokenizerRun:
    """One training run of a tokenizer."""

    model: PAEConfig = field(default_factory=PAEConfig)
    """The tokenizer."""
    start: Literal["vit", "local", "patches"] = "vit"
    """Initial weights. vit: those of ViT-MAE. local: both projectors start with each token attending to
    itself, and images with the spectrum of photographs. In a run of minutes it is a decibel ahead
    (docs/results.md). Its effect on a long run is not known.
    patches: the principal components of patches pass from the first step (`models.starts`). Before it,
    held-out emoji have 17 decibels at width 96 and 22 at width 256 (docs/log.md)."""
    checkpoint_blocks: int = added(0)
    """Blocks of the decoder, from the first on, whose activations are computed again in the backward pass
    instead of kept: less memory for a third more work in them. The result is the same."""
    init_from: Path | None = added(None)
    """Start from the weights of this tokenizer: a model folder, a run folder or the imported release. `start`
    must then be vit."""
    init_new: tuple[str, ...] = added(())
    """Parts that start with new weights all the same, such as projector; a part that does not fit must be
    among them."""
    train: TrainedPart = added("all")
    """What is trained. decoder: all behind the latent, so that latents stay equal to the bit.
    decoder+projectors: the projector before it too. The rest keeps the weights of init_from."""
    prior: Path | None = None
    """The refined targets of SSR and SCR: a refiner folder or a run folder of pae train-refiner."""
    data: ImageData
    """Its images."""
    loss: TokenizerLoss = field(default_factory=TokenizerLoss)
    """What it is trained for."""
    extractor: ExtractorName | None = None
    """Features of the Frechet distance of reconstructions that evaluation reports; null leaves it out."""
    extractor_weights: Path | None = None
    """inception: its weights file; dinov2: a local folder. By default both are downloaded."""
    geometry: bool = False
    """Evaluation also reports GSQ, eRank and LPC of the held-out latents. LPC takes a tenth of the images:
    each costs nine decodes."""
    optim: OptimConfig
    """How it is trained."""
    loop: LoopConfig
    """How long it is trained."""

    def __post_init__(self) -> None:
        check_fields(self, checkpoint_blocks=f"[0, {self.model.decoder.num_layers}]")
        _check_given(self)
        if self.model.fusion == "none":
            idle = ("ssr", "scr", "va", "kl", "diffusion", "gradients_every")
            if on := [f"loss.{name}" for name in idle if getattr(self.loss, name)]:
                raise ValueError(
                    f"{', '.join(on)} must be 0 for model.fusion none: they act on the latent, which is then "
                    "the VFM's own features"
                )
        if self.data.feature_cache is not None and self.model.fusion == "finetune":
            raise ValueError("data.feature_cache cannot serve model.fusion finetune: the features change")
        if self.loss.needs_prior and self.prior is None:
            raise ValueError(
                "loss.ssr and loss.scr need prior, a refiner's folder; train one with pae train-refiner, or "
                "set both to 0"
            )
        if self.loop.compile and (self.loss.gradients_every or self.loss.gan_weight == "adaptive"):
            raise ValueError(
                "loop.compile cannot be combined with loss.gradients_every or loss.gan_weight adaptive: both "
                "run backward twice, and a compiled graph frees its buffers after the first"
            )
        if self.loss.needs_prior and self.model.fusion == "finetune":
            raise ValueError(
                "loss.ssr and loss.scr need a frozen VFM; model.fusion finetune changes its features"
            )


@dataclass(frozen=True, kw_only=True)
class GeneratorRun:
    """One training run of a generator."""

    model: GeneratorConfig = field(default_factory=LightningDiTConfig)
    """The generator; `kind` DiTDHConfig makes it RAE's, with a wide head."""
    checkpoint_blocks: int = 0
    """Blocks, from the first on, whose activations are computed again in the backward pass instead of kept:
    less memory for a third more work in them. The result is the same."""
    init_from: Path | None = added(None)
    """Start from the weights of this generator: a model folder, a run folder or the imported release."""
    init_new: tuple[str, ...] = added(())
    """Parts that start with new weights all the same, such as class_embed for other classes, or patch_embed
    and to_velocity for another tokenizer; a part that does not fit must be among them."""
    latents: Path
    """Cached latents (pae cache-latents). With `images`, a tokenizer: a folder, diffusers:FOLDER, ..."""
    images: Path | None = added(None)
    """Images that the tokenizer `latents` encodes at each step, in place of a cache; in any form that
    can be read in any order. No cache is written, and random crops are possible."""
    image_size: int | None = added(None)
    """Side of these images in pixels; null takes that of the tokenizer."""
    augment: Literal["none", "flip", "crop"] = added("flip")
    """Augmentation of these images. flip: mirror half of them, as with a cache. crop: shorter side to
    `resize`, random crop, mirror half. none: centre crop."""
    resize: int | None = added(None)
    """Shorter side before the random crop."""
    held_out_latents: Path | None = None
    """Latents of other images, for the loss that evaluation reports; null leaves it out."""
    tokenizer: Path | None = None
    """Decodes samples for the Frechet distance that evaluation reports; null leaves it out. A folder,
    diffusers:FOLDER or python:FILE, as for pae cache-latents."""
    evaluation_images: Path | None = None
    """What the samples are compared with: real images, an npz of the ADM layout, or a reference that
    `pae evaluate --save-reference` wrote; needed beside `tokenizer`."""
    evaluation_samples: int = 1000
    """Number of samples."""
    extractor: ExtractorName = "vgg16"
    """Features of that distance."""
    extractor_weights: Path | None = None
    """inception: its weights file; dinov2: a local folder in place of the hub's."""
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    """How the samples are drawn."""
    times: Literal["logit-normal", "uniform"] = "logit-normal"
    """How training positions t are drawn, before the shift; uniform is RAE's."""
    time_shift: float | None = 0.7
    """Shift of the training positions: t' = s t / (1 + (s - 1) t). Null takes it from the number of
    dimensions, s = sqrt(4096 / (C h w)), as RAE does."""
    cosine: float = 1.0
    """Weight of the cosine term beside the mean squared error."""
    optim: OptimConfig
    """How it is trained."""
    loop: LoopConfig
    """How long it is trained."""

    def __post_init__(self) -> None:
        check_fields(
            self,
            checkpoint_blocks=f"[0, {self.model.num_blocks}]",
            image_size="[1, 16384]",
            resize="[1, 16384]",
            time_shift="(0, inf)",
            evaluation_samples="[2, inf)",
            cosine="[0, inf)",
        )
        if self.init_new and self.init_from is None:
            raise ValueError("init_new needs init_from, the model that gives the other weights")
        if self.images is None and (self.image_size, self.augment, self.resize) != (None, "flip", None):
            raise ValueError("image_size, augment and resize need images; a cache holds its own")
        if (self.augment == "crop") != (self.resize is not None):
            raise ValueError("resize and augment crop must be given both, or neither")
        if (self.tokenizer is None) != (self.evaluation_images is None):
            raise ValueError("tokenizer and evaluation_images must be given both, or neither")


def _check_given(run: TokenizerRun) -> None:
    """Refuse fields that do not fit the start from a saved tokenizer."""
    if run.init_from is None:
        if run.init_new or run.train != "all":
            raise ValueError("init_new and train need init_from, the model that gives the other weights")
        return
    if run.start != "vit":
        raise ValueError(f"start {run.start} would replace the weights of init_from; set start to vit")
    if run.train == "all":
        return
    idle = ("ssr", "scr", "va", "kl", "diffusion", "gradients_every")
    if run.train == "decoder" and (on := [f"loss.{name}" for name in idle if getattr(run.loss, name)]):
        raise ValueError(
            f"{', '.join(on)} must be 0 for train decoder: they act on the latent, which is frozen"
        )
    frozen = ("encoder", "narrow", "modulator", *(["projector"] if run.train == "decoder" else []))
    if both := [name for name in run.init_new if name.partition(".")[0] in frozen]:
        raise ValueError(f"{', '.join(both)} cannot be in init_new: train {run.train} freezes it")
