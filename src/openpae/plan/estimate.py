"""Estimate what a run needs from one step: memory on a card, time, and disk space."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from openpae.engine.settings import LoopConfig
from openpae.models.vfms import encoder_spec
from openpae.plan.fakes import Run
from openpae.plan.settings import PlanSettings
from openpae.plan.trial import Trial, planned_run, try_run
from openpae.runtime.cards import card
from openpae.train.settings import GeneratorRun, RefinerRun, TokenizerRun

ROOM = 0.9
"""Share of a card's memory for tensors. Driver, libraries and fragmentation take the rest."""


@dataclass(frozen=True, kw_only=True)
class Fit:
    """The device batches that fit with a number of checkpointed blocks."""

    checkpoint_blocks: int
    largest: int
    """Largest device batch that fits; 0 if one image does not fit."""
    device_batch: int
    """Largest one that divides the images per process; 0 if none does."""
    peak: int
    """Peak memory in bytes at that device batch."""
    operations: float
    """Operations per image in the most expensive step."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Memory, time and disk space of a run."""

    run: Run
    settings: PlanSettings
    trial: Trial
    fits: tuple[Fit, ...]
    """Fits without checkpointed blocks, and with all blocks checkpointed if the model has blocks."""
    problems: tuple[str, ...]
    """One sentence for each problem of the config."""
    notes: tuple[str, ...]
    """One sentence for each thing that the figures leave out."""

    @property
    def images(self) -> int:
        """Number of images that training sees."""
        return self.run.loop.steps * self.run.loop.global_batch_size

    @property
    def images_per_second(self) -> float:
        """Training speed of all GPUs at the assumed utilisation."""
        kind, operations = card(self.settings.card), self.trial.operations
        seconds = sum(
            count / (kind.half if name in ("bfloat16", "float16") else kind.full)
            for name, count in operations.items()
        )
        return self.settings.gpus * self.settings.utilisation / seconds

    @property
    def hours(self) -> float:
        """Training time in hours."""
        return self.images / self.images_per_second / 3600

    @property
    def checkpoint_bytes(self) -> int:
        """Bytes of a checkpoint in float32: trained weights, two moments, average and exported weights."""
        averaged = self.run.loop.ema_decay is not None
        return 4 * (3 * self.trial.trained + (1 + averaged) * self.trial.exported)

    @property
    def cache_bytes(self) -> dict[str, int]:
        """Bytes of the caches of the run, by name."""
        run, images = self.run, self.settings.images
        sizes: dict[str, int] = {}
        if not isinstance(run, RefinerRun):
            sizes["latents"] = images * 2 * 2 * math.prod(run.model.latent_shape)  # bfloat16, and mirrored
        if not isinstance(run, GeneratorRun) and run.data.feature_cache is not None:
            name = run.encoder if isinstance(run, RefinerRun) else run.model.encoder
            flips = 2 if run.data.augment == "flip" else 1
            sizes["features"] = images * 2 * flips * math.prod(run.model.grid_shape) * encoder_spec(name).dim
        return sizes


def plan_run(run: Run, settings: PlanSettings) -> Plan:
    """Plan a run on a number of equal cards.

    Args:
        run: config of the run.
        settings: cards, and how they are used.

    Raises:
        ValueError: see `trial.try_run`.
    """
    changes: dict[str, Any] = {} if settings.parallel is None else {"parallel": settings.parallel}
    run = dataclasses.replace(run, loop=dataclasses.replace(run.loop, **changes))
    loop, problems = _divided(run.loop, settings.gpus)
    run = dataclasses.replace(run, loop=loop)
    trial = try_run(planned_run(run), settings.gpus, phases=True)
    free = room(settings.card)
    blocks = getattr(run, "checkpoint_blocks", 0)
    fits = [largest_fit(run, settings.gpus, free, trial)]
    for other in {0, _blocks(run)} - {blocks}:
        changed: Any = {"checkpoint_blocks": other}
        fits.append(largest_fit(dataclasses.replace(run, **changed), settings.gpus, free))
    fits.sort(key=lambda fit: fit.checkpoint_blocks)
    if trial.peak.total > free:
        problems.append(_too_large(trial, free, fits))
    return Plan(
        run=run,
        settings=settings,
        trial=trial,
        fits=tuple(fits),
        problems=tuple(problems),
        notes=tuple(_notes(run)),
    )


def largest_fit(run: Run, gpus: int, free: int, trial: Trial | None = None) -> Fit:
    """Find the largest device batch whose peak memory fits.

    The peak is nearly linear in the batch. Two sizes give the line, and the resulting device batch is tried.

    Args:
        run: config of the run.
        gpus: number of processes.
        free: bytes for tensors.
        trial: trial of the unchanged run, if there is one.
    """
    own, blocks = run.loop.global_batch_size // gpus, getattr(run, "checkpoint_blocks", 0)
    tried: dict[int, Trial] = {}

    def at(batch: int) -> Trial:
        if batch not in tried:
            # With several device batches per step, gradients coexist with the next batch's activations.
            parts = 2 if batch < own else 1
            size = {"global_batch_size": batch * parts * gpus, "device_batch_size": batch}
            tried[batch] = try_run(planned_run(run, **size), gpus)
        return tried[batch]

    first = run.loop.device_batch_size or own
    if trial is not None:
        tried[first] = trial
    second = first // 2 if at(first).peak.total > free and first > 1 else 2 * first
    slope = (at(second).peak.total - at(first).peak.total) / (second - first)
    largest = max(0, math.floor(first + (free - at(first).peak.total) / slope))
    for batch in sorted((part for part in range(1, min(own, largest) + 1) if own % part == 0), reverse=True):
        if (fitting := at(batch)).peak.total <= free:
            return Fit(
                checkpoint_blocks=blocks,
                largest=largest,
                device_batch=batch,
                peak=fitting.peak.total,
                operations=fitting.most_operations,
            )
    return Fit(checkpoint_blocks=blocks, largest=0, device_batch=0, peak=0, operations=0.0)


def plan_data(plan: Plan) -> dict[str, Any]:
    """Return a plan as plain data: bytes, operations, hours."""
    trial = plan.trial
    return {
        "run": type(plan.run).__name__,
        **dataclasses.asdict(plan.settings),
        "parallel": plan.run.loop.parallel,
        "global_batch_size": plan.run.loop.global_batch_size,
        "device_batch_size": trial.device_batch,
        "parameters": {"trained": trial.trained, "frozen": trial.frozen},
        "operations_per_image": dict(trial.operations),
        "peak": {"bytes": dict(trial.peak.bytes), "total": trial.peak.total, "at": trial.peak.at},
        "room": room(plan.settings.card),
        "fits": [dataclasses.asdict(fit) for fit in plan.fits],
        "images_per_second": plan.images_per_second,
        "hours": plan.hours,
        "gpu_hours": plan.hours * plan.settings.gpus,
        "checkpoint_bytes": plan.checkpoint_bytes,
        "cache_bytes": plan.cache_bytes,
        "problems": list(plan.problems),
        "notes": list(plan.notes),
    }


def room(name: str) -> int:
    """Return the bytes of a card for tensors."""
    return int(ROOM * card(name).gib * 2**30)


def _blocks(run: Run) -> int:
    """Return the number of blocks that can be checkpointed."""
    if isinstance(run, GeneratorRun):
        return run.model.num_blocks
    return run.model.decoder.num_layers if isinstance(run, TokenizerRun) else 0


def _divided(loop: LoopConfig, gpus: int) -> tuple[LoopConfig, list[str]]:
    """Return the loop with batches that divide over the processes, and the changes as sentences."""
    problems = []
    images, part = loop.global_batch_size, loop.device_batch_size
    if images % gpus:
        images = max(1, images // gpus) * gpus
        problems.append(
            f"loop.global_batch_size {loop.global_batch_size} is no multiple of {gpus} GPUs; "
            f"planned for {images}"
        )
    own = images // gpus
    if part is not None and own % part:
        part = max(size for size in range(1, min(part, own) + 1) if own % size == 0)
        problems.append(
            f"loop.device_batch_size {loop.device_batch_size} does not divide the {own} images that each of "
            f"{gpus} GPUs sees of a step; planned for {part}"
        )
    return dataclasses.replace(loop, global_batch_size=images, device_batch_size=part), problems


def _notes(run: Run) -> Iterator[str]:
    if run.loop.compile:
        yield "planned without loop.compile, which needs less memory by an unknown amount"
    if isinstance(run, RefinerRun) and run.upsampler == "anyup":
        yield "for AnyUp only the output is counted, not the network"
    prior = run.prior if isinstance(run, TokenizerRun) and run.loss.needs_prior else None
    if prior is not None and not prior.is_dir():
        yield f"{prior} does not exist; planned with a refiner of the default sizes"
    yield "evaluation between steps is not planned"


def _too_large(trial: Trial, free: int, fits: list[Fit]) -> str:
    possible = [
        f"loop.device_batch_size {fit.device_batch} with checkpoint_blocks {fit.checkpoint_blocks}"
        for fit in fits
        if fit.device_batch
    ]
    nothing = "not one image fits: take more GPUs with --parallel fsdp, or a larger card"
    advice = f"set {' or '.join(possible)}" if possible else nothing
    return (
        f"a device batch of {trial.device_batch} needs {trial.peak.total / 2**30:.1f} GiB, but "
        f"{free / 2**30:.1f} GiB are free for it; {advice}"
    )
