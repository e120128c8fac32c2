"""Stage (c): train a generator on cached latents."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.optim import Optimizer

from openpae.data.classes import check_images_agree, check_same_classes, count_classes, empty_classes
from openpae.data.images import open_images
from openpae.data.order import StepBatches
from openpae.data.pixels import image_grid
from openpae.data.readers import read_batches
from openpae.data.shards import Shards
from openpae.data.training import ImageBatch, LatentBatch, TrainingLatents
from openpae.engine.loop import fit
from openpae.engine.optim import adamw, device_batches
from openpae.engine.parallel import distribute, unwrap
from openpae.engine.run_folder import check_run, continued, open_run
from openpae.engine.task import PICTURED, Update
from openpae.eval.evaluate import evaluate_samples, write_evaluation
from openpae.eval.extractors import load_extractor
from openpae.eval.image_stream import sampled_images
from openpae.eval.reference import open_reference
from openpae.interop.any_tokenizer import decoded_shape, open_decoder
from openpae.models.configs import GeneratorConfig
from openpae.models.ditdh import build_generator
from openpae.models.saved import write_generator
from openpae.objective.flow import dimension_shift, interpolate, shift_time, training_times, velocity_loss
from openpae.runtime.device import pick_device
from openpae.runtime.draws import Draws
from openpae.sampling.sampler import balanced_labels, sample_images
from openpae.storage.model_folder import Parent, write_parent
from openpae.train.given import names_from, start_from
from openpae.train.online import OnlineLatents
from openpae.train.settings import GeneratorRun

L = TypeVar("L", Shards, OnlineLatents)


class GeneratorTask:
    """Velocity MSE + cosine distance on the straight path between noise and latent (Sec. 4.1).

    Args:
        run: the config.

    Raises:
        ValueError: the latents have another shape or more classes than the model.
    """

    def __init__(self, run: GeneratorRun) -> None:
        self.run = run
        self.device = pick_device(run.loop.device, "loop.device")
        self.latents: Shards | OnlineLatents = (
            _open_latents(run.latents, run.model)
            if run.images is None
            else _check_latents(OnlineLatents(run, self.device), run.model)
        )
        self.held_out = (
            None if run.held_out_latents is None else _open_latents(run.held_out_latents, run.model)
        )
        self.classes = _classes_of(self.latents, run)
        """Names and image counts of the classes; None for latents without class names, unless the run starts
        from a generator that has them."""
        if self.held_out:
            self._check_held_out(self.held_out)
        self.run_dir: Path | None = None
        """Folder for the records of evaluations; None writes none."""
        if self.classes is not None:
            if (images := run.evaluation_images) is not None and images.is_dir():
                check_images_agree(run.latents, self.classes[0], images, open_images(images).classes)
            if empty := empty_classes(*self.classes):
                warnings.warn(
                    f"{run.latents} has no image of class {', '.join(empty)}; it is not sampled", stacklevel=2
                )
        self.evaluator = (
            None if run.tokenizer is None else _SampleEvaluator(run, self.device, self._tokenizer_fingerprint)
        )
        torch.manual_seed(run.loop.seed)
        self.model = build_generator(run.model, checkpoint_blocks=run.checkpoint_blocks)
        self.parent: Parent | None = None
        """The model from whose weights the run starts."""
        if run.init_from is not None:
            statistics = ("latent_mean", "latent_std")
            self.parent, _ = start_from(self.model, run.init_from, run.init_new, own_buffers=statistics)
        self.model.set_statistics(*(torch.tensor(self.latents.index[key]) for key in ("mean", "std")))
        self.model.to(self.device)
        self.inputs: Mapping[str, str] = {
            "latents": self.latents.fingerprint(),
            "tokenizer": self.latents.attributes["tokenizer"],
            **({} if self.parent is None else {"init_from": self.parent.fingerprint}),
        }
        self.players: Mapping[str, nn.Module] = {"generator": distribute(self.model, run.loop)}
        self.optimizers: Mapping[str, Optimizer] = {"generator": adamw(self.players["generator"], run.optim)}
        if run.loop.compile:
            unwrap(self.players["generator"]).compile()

    def batches(self, steps: Sequence[int]) -> Iterable[LatentBatch | ImageBatch]:
        """This rank's device batches of latents, or of images to encode, in the order of (seed, seen)."""
        loop = self.run.loop
        sampler = StepBatches(steps, loop.global_batch_size, device_batches(loop))
        if isinstance(self.latents, OnlineLatents):
            return self.latents.batches(sampler)
        latents = TrainingLatents(self.latents, seed=loop.seed)
        pin = self.device.type == "cuda"
        return read_batches(latents, sampler, loop.num_workers, pin=pin, label="latents")

    def updates(self, batch: LatentBatch | ImageBatch, draws: Draws, step: int) -> Iterator[Update]:
        """L = MSE(v, x_1 - x_0) + w (1 - cos(v, x_1 - x_0))."""
        dropped = draws.uniform("class dropout") < self.run.model.class_dropout
        labels = torch.where(dropped, self.model.null_label, batch.labels)
        if isinstance(batch, LatentBatch):
            z = batch.latents
        else:
            assert isinstance(self.latents, OnlineLatents)  # batches made it
            z = self.latents.encode(batch.images)
        mse, cosine = self._losses(self.players["generator"], z, labels, draws)
        loss = mse + self.run.cosine * cosine
        yield Update("generator", loss, {"mse": mse.detach(), "cosine": cosine.detach()})

    def evaluate(self, step: int) -> dict[str, float]:
        """Loss terms of held-out latents with fixed noise and positions, and metrics of samples."""
        return self._held_out_losses() | self._sample_metrics(step)

    def picture(self) -> Image.Image | None:
        """Samples with the same noise and classes at every evaluation; None without a tokenizer."""
        if self.evaluator is None:
            return None
        tokenizer, labels = self.evaluator.tokenizer, balanced_labels(PICTURED, self._trained_classes())
        batch = [range(PICTURED)]
        images = sample_images(tokenizer, self.model, labels, self.run.sampler, seed=0, batches=batch)
        return image_grid(next(images).clamp(0, 1), PICTURED // 2)

    def _check_held_out(self, held_out: Shards) -> None:
        if held_out.attributes["tokenizer"] != self.latents.attributes["tokenizer"]:
            raise ValueError(f"{held_out.folder} and {self.latents.folder} come from different tokenizers")
        if self.classes is not None and (others := _classes_of(held_out)) is not None:
            check_same_classes(self.latents.folder, self.classes[0], held_out.folder, others[0])

    def _sample_metrics(self, step: int) -> dict[str, float]:
        run = self.run
        if self.evaluator is None:
            return {}
        samples = sampled_images(
            self.evaluator.tokenizer,
            self.model,
            balanced_labels(run.evaluation_samples, self._trained_classes()),
            run.sampler,
            size=self.evaluator.image_shape,
            facts={"labels": "class-balanced", "tokenizer": self._tokenizer_fingerprint},
        )
        record = evaluate_samples(
            samples,
            self.evaluator.reference,
            extractor=self.evaluator.extractor,
            batch_size=len(device_batches(run.loop)[0]),
            min_samples=2,  # for a curve over steps, an equal count at every point is enough
        )
        if self.run_dir is not None:
            write_evaluation(record, self.run_dir, step)
        return {name: metric["value"] for name, metric in record["metrics"].items()}

    def _held_out_losses(self) -> dict[str, float]:
        if self.held_out is None:
            return {}
        count = min(1024, len(self.held_out))
        part = len(device_batches(self.run.loop)[0])
        sums = {"mse": 0.0, "cosine": 0.0}
        for start in range(0, count, part):
            rows = np.arange(start, min(start + part, count))
            z = self.held_out.gather(rows, np.zeros_like(rows)).to(self.device)
            labels = torch.from_numpy(self.held_out.labels[rows]).to(self.device)
            draws = Draws(0, 0, range(start, start + len(rows)), count, self.device)
            for name, value in zip(sums, self._losses(self.model, z, labels, draws), strict=True):
                sums[name] += value.item() * len(rows) / count
        return sums

    def write(self, folder: Path, weights: Mapping[str, Tensor]) -> None:
        """Write a generator folder."""
        write_generator(folder, weights, self.run.model, self._tokenizer_fingerprint, self.classes)
        if self.parent is not None:
            write_parent(folder, self.parent)

    def _trained_classes(self) -> int | list[int]:
        if self.classes is None:
            return self.run.model.num_classes
        return [label for label, count in enumerate(self.classes[1]) if count]

    @property
    def _tokenizer_fingerprint(self) -> str:
        return str(self.latents.attributes["tokenizer"])

    def _losses(self, generator: nn.Module, z: Tensor, labels: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        x_1 = self.model.normalise(z)
        x_0 = draws.normal("noise", *x_1.shape[1:])
        if (shift := self.run.time_shift) is None:
            shift = dimension_shift(self.run.model.latent_shape)
        if self.run.times == "uniform":
            t = shift_time(draws.uniform("t"), shift)
        else:
            t = training_times(draws.normal("t"), shift)
        velocity = generator(interpolate(x_1, x_0, t), t, labels)
        return velocity_loss(velocity, x_1, x_0)


class _SampleEvaluator:
    """Decoder, extractor and reference for the metrics of samples."""

    def __init__(self, run: GeneratorRun, device: torch.device, tokenizer_fingerprint: str) -> None:
        assert run.tokenizer is not None
        assert run.evaluation_images is not None  # GeneratorRun takes both or neither
        origin = (f"{run.latents} holds latents", tokenizer_fingerprint)
        self.tokenizer, _ = open_decoder(run.tokenizer, origin, device)
        self.image_shape = decoded_shape(self.tokenizer, run.model.latent_shape)
        self.extractor = load_extractor(run.extractor, run.extractor_weights, device)
        self.reference = open_reference(run.evaluation_images, self.extractor, size=self.image_shape)


def train_generator(
    run: GeneratorRun, run_dir: Path, *, quiet: bool = False, operations: float | None = None
) -> dict[str, float]:
    """Train a generator, or resume the run in run_dir.

    Args:
        run: the config; that of an existing run_dir, but for `run_folder.FREE_FIELDS` and more steps.
        run_dir: gets config.yaml, checkpoints/, log.jsonl, evaluations/ and the files of trackers.
        quiet: no progress bar.
        operations: of one image in a step; see `fit`.

    Returns:
        The last evaluation.
    """
    run = continued(run_dir, run)
    check_run(run_dir, run)
    task = GeneratorTask(run)
    task.run_dir = run_dir
    open_run(run_dir, run)
    return fit(task, run_dir, run.optim, run.loop, quiet=quiet, operations=operations)


def _classes_of(
    latents: Shards | OnlineLatents, run: GeneratorRun | None = None
) -> tuple[list[str], list[int]] | None:
    """Names and image counts of the classes of training latents (with `run`) or others; None if unknown."""
    names = latents.attributes.get("classes")
    if latents.attributes.get("source") == "imported":  # their names are the numbers
        names = None
    if run is not None and run.init_from is not None:
        largest = max(latents.labels, default=-1)
        names = names_from(run.init_from, run.init_new, latents.folder, names, largest)
    return None if names is None else (list(names), count_classes(names, latents.labels))


def _open_latents(folder: Path, model: GeneratorConfig) -> Shards:
    return _check_latents(Shards(folder, kind="latents"), model)


def _check_latents(shards: L, model: GeneratorConfig) -> L:
    folder = shards.folder
    if shards.shape[1:] != model.latent_shape:
        raise ValueError(
            f"{folder} holds latents of shape {shards.shape[1:]}, the generator is built for "
            f"{model.latent_shape}; set model.latent_dim, model.grid_size and model.grid_width"
        )
    if len(shards) and shards.labels.max() >= model.num_classes:
        raise ValueError(
            f"{folder} has labels up to {shards.labels.max()}, but model.num_classes is {model.num_classes}"
        )
    return shards
