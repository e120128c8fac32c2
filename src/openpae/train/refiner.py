"""Stage (a): train the refiner, which makes the targets of SSR and SCR (Sec. 3.3)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from openpae.data.caches import Progress, cache_features
from openpae.data.order import StepBatches
from openpae.data.pixels import to_unit
from openpae.data.training import ImageBatch, TrainingImages, broken_count, image_batches, open_training
from openpae.engine.loop import fit
from openpae.engine.optim import adamw, device_batches
from openpae.engine.parallel import distribute, unwrap
from openpae.engine.run_folder import check_run, continued, open_run
from openpae.engine.task import Update
from openpae.models.encoders import Encoder, EncoderInput, encoder_fingerprint, load_encoder
from openpae.models.priors import Refiner
from openpae.models.saved import write_prior
from openpae.models.upsampling import load_anyup, reference_features
from openpae.objective.losses import feature_reconstruction, gram_alignment
from openpae.runtime.device import pick_device
from openpae.runtime.draws import Draws
from openpae.train.settings import RefinerRun


class RefinerTask:
    """L = l_rep ||H^ - H_vfm||^2 + l_gram ||Gram(Z_T) - Gram(H_ref)||^2.

    Args:
        run: the config.
        encoder: the frozen VFM; None loads the one of the config.
        progress: called with (done, all) while features are cached.

    Raises:
        ValueError: model.feature_dim is not the encoder's width.
    """

    def __init__(
        self, run: RefinerRun, encoder: Encoder | None = None, progress: Progress | None = None
    ) -> None:
        self.run = run
        self.device = pick_device(run.loop.device, "loop.device")
        source, _ = open_training(run.data)
        encoder = encoder or load_encoder(run.encoder, run.encoder_source)
        if encoder.spec.dim != run.model.feature_dim:
            raise ValueError(
                f"model.feature_dim must be the encoder width {encoder.spec.dim}, got {run.model.feature_dim}"
            )
        self.encoder_fingerprint = encoder_fingerprint(encoder)
        patch = run.image_size // run.model.grid_size
        self.encoder_input = EncoderInput(encoder.spec, patch).to(self.device)
        self.encoder = encoder.to(self.device) if isinstance(encoder, nn.Module) else encoder
        torch.manual_seed(run.loop.seed)
        self.model = Refiner(run.model).to(self.device)
        features = None
        if run.data.feature_cache is not None:
            features = cache_features(
                self.features,
                source,
                run.data.feature_cache,
                image_size=run.image_shape,
                shape=(math.prod(run.model.grid_shape), encoder.spec.dim),
                encoder_fingerprint=self.encoder_fingerprint,
                flips=run.data.augment == "flip",
                device=self.device,
                progress=progress,
            )
        self.images = TrainingImages(
            source,
            size=run.image_shape,
            seed=run.loop.seed,
            augment=run.data.augment,
            resize=run.data.resize,
            skip_broken=run.data.skip_broken,
            features=features,
        )
        self.upsampler = load_anyup().to(self.device) if run.upsampler == "anyup" else run.upsampler
        self.inputs: Mapping[str, str] = {"images": source.fingerprint(), "encoder": self.encoder_fingerprint}
        self.players: Mapping[str, nn.Module] = {"refiner": distribute(self.model, run.loop)}
        self.optimizers: Mapping[str, Optimizer] = {"refiner": adamw(self.players["refiner"], run.optim)}
        if run.loop.compile:
            unwrap(self.players["refiner"]).compile()

    def batches(self, steps: Sequence[int]) -> Iterable[ImageBatch]:
        """This rank's device batches of images, in the order of (seed, images seen)."""
        loop = self.run.loop
        sampler = StepBatches(steps, loop.global_batch_size, device_batches(loop))
        return image_batches(self.images, sampler, loop.num_workers, pin=self.device.type == "cuda")

    def updates(self, batch: ImageBatch, draws: Draws, step: int) -> Iterator[Update]:
        """One update of the refiner."""
        images = to_unit(batch.images)
        features = self.features(images) if batch.features is None else batch.features.float()
        grid = self.run.model.grid_shape
        reference = reference_features(features, images, *grid, self.upsampler, self.run.low_pass)
        prior, reconstructed = self.players["refiner"](features)
        terms = {
            "reconstruction": feature_reconstruction(reconstructed, features),
            "gram": gram_alignment(prior, reference),
        }
        loss = self.run.reconstruction * terms["reconstruction"] + self.run.gram * terms["gram"]
        logs = {name: term.detach() for name, term in terms.items()}
        yield Update("refiner", loss, logs, broken_count(batch, self.run.data))

    def features(self, images: Tensor) -> Tensor:
        """H_vfm of images in [0, 1], (B, 3, S, S): (B, N, D)."""
        return self.encoder(self.encoder_input(images))

    def evaluate(self, step: int) -> dict[str, float]:
        """No metrics: a refiner is measured by its effect on the tokenizer."""
        return {}

    def picture(self) -> None:
        """None: the refiner makes no pictures."""
        return None

    def write(self, folder: Path, weights: Mapping[str, Tensor]) -> None:
        """Write a refiner folder."""
        write_prior(folder, weights, self.run.model, self.encoder_fingerprint)


def train_refiner(
    run: RefinerRun,
    run_dir: Path,
    *,
    quiet: bool = False,
    progress: Progress | None = None,
    operations: float | None = None,
) -> dict[str, float]:
    """Train a refiner, or resume the run in run_dir.

    Args:
        run: the config; that of an existing run_dir, but for `run_folder.FREE_FIELDS` and more steps.
        run_dir: gets config.yaml, checkpoints/, log.jsonl and the files of trackers.
        quiet: no progress bar.
        progress: called with (done, all) while features are cached.
        operations: of one image in a step; see `fit`.
    """
    run = continued(run_dir, run)
    check_run(run_dir, run)
    task = RefinerTask(run, progress=progress)
    open_run(run_dir, run)
    return fit(task, run_dir, run.optim, run.loop, quiet=quiet, operations=operations)
