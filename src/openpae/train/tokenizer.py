"""Stage (b): train the tokenizer on images."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from openpae.checkpoint import encoder_fingerprint, write_tokenizer
from openpae.critics import LPIPS, load_lpips
from openpae.data.caches import Progress, cache_features
from openpae.data.images import ImageSource, PackedImages, center_crop, open_images
from openpae.data.order import StepBatches, loader
from openpae.data.shards import Shards
from openpae.data.training import ImageBatch, ImageData, TrainingImages
from openpae.encoders import Encoder, load_encoder
from openpae.eval.reconstruction import ReconstructionMetrics
from openpae.tokenizer import PAE, PAEConfig
from openpae.train.engine import Draws, LoopConfig, OptimConfig, Update, adamw, fit, open_run, pick_device


@dataclass(frozen=True, kw_only=True)
class TokenizerLoss:
    """Weights of the tokenizer's losses; 0 switches a term off and saves its cost. L1 has weight 1."""

    lpips: float = 1.0
    """Perceptual distance of reconstruction and image."""
    lpips_net: Literal["vgg", "alex", "random"] = "vgg"
    """Its network: vgg as in the paper; alex costs a CPU a tenth of it; random needs no weights (for
    trials)."""

    def __post_init__(self) -> None:
        if self.lpips < 0:
            raise ValueError(f"loss.lpips must be >= 0 (0 switches it off), got {self.lpips}")


@dataclass(frozen=True, kw_only=True)
class TokenizerRun:
    """One training run of a tokenizer."""

    model: PAEConfig = field(default_factory=PAEConfig)
    """The tokenizer."""
    data: ImageData
    """Its images."""
    loss: TokenizerLoss = field(default_factory=TokenizerLoss)
    """What it is trained for."""
    optim: OptimConfig
    """How it is trained."""
    loop: LoopConfig
    """How long it is trained."""

    def __post_init__(self) -> None:
        if self.data.feature_cache is not None and self.model.fusion == "finetune":
            raise ValueError("data.feature_cache can not serve model.fusion finetune: the features change")


class TokenizerTask:
    """L1 + LPIPS between image and reconstruction.

    Args:
        run: the config.
        encoder: the frozen VFM, or None to load the one that the config names.
        progress: called with (done, all) while features are cached.
    """

    def __init__(
        self, run: TokenizerRun, encoder: Encoder | None = None, progress: Progress | None = None
    ) -> None:
        self.run = run
        self.device = pick_device(run.loop.device)
        source = open_images(run.data.images)
        torch.manual_seed(run.loop.seed)
        trainable = run.model.fusion == "finetune"
        encoder = encoder or load_encoder(run.model.encoder, run.model.encoder_source, trainable=trainable)
        self.model = PAE(run.model, encoder).to(self.device)
        # Before training: a finetuned encoder is told by what it started from.
        self.encoder_print = encoder_fingerprint(encoder)
        features = self._features(source, progress)
        self.images = TrainingImages(
            source,
            size=run.model.image_size,
            seed=run.loop.seed,
            augment=run.data.augment,
            resize=run.data.resize,
            skip_broken=run.data.skip_broken,
            features=features,
        )
        self.lpips = load_perceptual(run.loss.lpips_net).to(self.device) if run.loss.lpips else None
        self.held_out = self._held_out()
        self.inputs: Mapping[str, str] = {"images": source.fingerprint(), "encoder": self.encoder_print}
        self.players: Mapping[str, nn.Module] = {"autoencoder": self.model}
        self.optimizers: Mapping[str, Optimizer] = {"autoencoder": adamw(self.model, run.optim)}
        if run.loop.compile:
            self.model.decoder.compile()
            if self.model.modulator is not None:
                self.model.modulator.compile()

    def batches(self, steps: range) -> Iterable[ImageBatch]:
        """Device batches of images, in the order of (seed, images seen)."""
        loop = self.run.loop
        sampler = StepBatches(steps, loop.global_batch_size, loop.device_batch_size or loop.global_batch_size)
        return loader(self.images, sampler, loop.num_workers, pin=self.device.type == "cuda")

    def updates(self, batch: ImageBatch, draws: Draws, step: int) -> Iterator[Update]:
        """L = L1(x_r, x) + w LPIPS(x_r, x)."""
        for broken in batch.skipped:
            warnings.warn(f"{broken}; another image takes its place", stacklevel=2)
        x = batch.images.float() / 255
        x_r = self.model.decode(self.model.encode(x, batch.features))
        loss = F.l1_loss(x_r, x)
        logs = {"l1": loss.detach()}
        if self.lpips is not None:
            with torch.no_grad():
                target = self.lpips.features(x)
            perceptual = self.lpips.distance(target, self.lpips.features(x_r)).mean()
            loss = loss + self.run.loss.lpips * perceptual
            logs["lpips"] = perceptual.detach()
        yield Update("autoencoder", loss, logs)

    def evaluate(self, step: int) -> dict[str, float]:
        """PSNR (dB), SSIM and LPIPS of held-out images; nothing where there are none."""
        if self.held_out is None:
            return {}
        metrics = ReconstructionMetrics(self.lpips)
        part = self.run.loop.device_batch_size or self.run.loop.global_batch_size
        for images in torch.split(self.held_out, part):
            x = images.to(self.device).float() / 255
            metrics.update(x, self.model.reconstruct(x).float())
        return {name: estimate.value for name, estimate in metrics.compute().items()}

    def write(self, folder: Path, weights: Mapping[str, Tensor]) -> None:
        """Write a tokenizer folder."""
        write_tokenizer(folder, weights, self.run.model, self.encoder_print)

    def _features(self, source: ImageSource, progress: Progress | None) -> Shards | None:
        folder = self.run.data.feature_cache
        if folder is None:
            return None
        if not isinstance(source, PackedImages):
            raise ValueError(
                f"data.feature_cache needs packed images; make them with: pae pack {self.run.data.images}"
            )
        model, config = self.model, self.run.model
        return cache_features(
            model.features,
            source,
            folder,
            image_size=config.image_size,
            shape=(config.grid_size**2, model.spec.dim),
            encoder_print=self.encoder_print,
            flips=self.run.data.augment == "flip",
            device=self.device,
            progress=progress,
        )

    def _held_out(self) -> Tensor | None:
        data, size = self.run.data, self.run.model.image_size
        if data.evaluation is None:
            return None
        source = open_images(data.evaluation)
        count = min(data.evaluation_images, len(source))
        return torch.from_numpy(np.stack([center_crop(source.read(i), size) for i in range(count)]))


def train_tokenizer(
    run: TokenizerRun, run_dir: Path, *, quiet: bool = False, progress: Progress | None = None
) -> dict[str, float]:
    """Train a tokenizer, or go on where an interrupted run of the same folder stopped.

    Args:
        run: the config; run_dir keeps it and refuses another.
        run_dir: gets config.yaml, checkpoints/, log.jsonl and TensorBoard files.
        quiet: no progress bar.
        progress: called with (done, all) while features are cached.

    Returns:
        The last evaluation.
    """
    open_run(run_dir, run)
    return fit(TokenizerTask(run, progress=progress), run_dir, run.optim, run.loop, quiet=quiet)


def load_perceptual(net: Literal["vgg", "alex", "random"]) -> LPIPS:
    """LPIPS with the published weights, or AlexNet with fixed random ones for trials without a download."""
    if net != "random":
        return load_lpips(net)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LPIPS("alex")
