"""From what a step needs to what a run needs: whether it fits a card, how long it takes, what it writes."""

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
"""Share of a card's memory that tensors may take: the rest is the driver's, libraries' and fragments."""


@dataclass(frozen=True, kw_only=True)
class Fit:
    """The device batches that fit, with so many checkpointed blocks."""

    checkpoint_blocks: int
    largest: int
    """Images that fit; 0 where not one does."""
    device_batch: int
    """The largest of them that divides what a process sees of the global batch; 0 where none does."""
    peak: int
    """Bytes at that device batch."""
    operations: float
    """Of an image in a step at its dearest."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run needs."""

    run: Run
    settings: PlanSettings
    trial: Trial
    fits: tuple[Fit, ...]
    """Without checkpointed blocks, and with all where the model has them."""
    problems: tuple[str, ...]
    """What is wrong, a sentence each."""
    notes: tuple[str, ...]
    """What the figures leave out."""

    @property
    def images(self) -> int:
        """Images that training sees."""
        return self.run.loop.steps * self.run.loop.global_batch_size

    @property
    def images_per_second(self) -> float:
        """Of all GPUs, at the stated utilisation."""
        kind, operations = card(self.settings.card), self.trial.operations
        seconds = sum(
            count / (kind.half if name in ("bfloat16", "float16") else kind.full)
            for name, count in operations.items()
        )
        return self.settings.gpus * self.settings.utilisation / seconds

    @property
    def hours(self) -> float:
        """Of the run."""
        return self.images / self.images_per_second / 3600

    @property
    def checkpoint_bytes(self) -> int:
        """Weights and two moments of all that is trained, the average, and the exported weights; float32."""
        averaged = self.run.loop.ema_decay is not None
        return 4 * (3 * self.trial.trained + (1 + averaged) * self.trial.exported)

    @property
    def cache_bytes(self) -> dict[str, int]:
        """Caches that belong to the run, by name."""
        run, images = self.run, self.settings.images
        found: dict[str, int] = {}
        if not isinstance(run, RefinerRun):
            found["latents"] = images * 2 * 2 * math.prod(run.model.latent_shape)  # bfloat16, and mirrored
        if not isinstance(run, GeneratorRun) and run.data.feature_cache is not None:
            name = run.encoder if isinstance(run, RefinerRun) else run.model.encoder
            flips = 2 if run.data.augment == "flip" else 1
            found["features"] = images * 2 * flips * math.prod(run.model.grid_shape) * encoder_spec(name).dim
        return found


def plan_run(run: Run, settings: PlanSettings) -> Plan:
    """Plan a run on so many cards of a kind.

    Args:
        run: its config.
        settings: where it is to be trained.

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
    """The largest device batch whose peak fits.

    A peak is the largest of some sums that grow with the batch along straight lines: two sizes give the line,
    and the device batch that follows is tried.

    Args:
        run: its config.
        gpus: processes.
        free: bytes for tensors.
        trial: of the run as it stands, where it is known.
    """
    own, blocks = run.loop.global_batch_size // gpus, getattr(run, "checkpoint_blocks", 0)
    tried: dict[int, Trial] = {}

    def at(batch: int) -> Trial:
        if batch not in tried:
            # Where a step has several device batches, its gradients lie beside the next one's activations.
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
        if (found := at(batch)).peak.total <= free:
            return Fit(
                checkpoint_blocks=blocks,
                largest=largest,
                device_batch=batch,
                peak=found.peak.total,
                operations=found.dearest,
            )
    return Fit(checkpoint_blocks=blocks, largest=0, device_batch=0, peak=0, operations=0.0)


def facts(plan: Plan) -> dict[str, Any]:
    """A plan as plain data; bytes, operations, hours."""
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
    """Bytes of a card that tensors may take."""
    return int(ROOM * card(name).gib * 2**30)


def _blocks(run: Run) -> int:
    """Blocks whose activations may be computed again."""
    if isinstance(run, GeneratorRun):
        return run.model.num_blocks
    return run.model.decoder.num_layers if isinstance(run, TokenizerRun) else 0


def _divided(loop: LoopConfig, gpus: int) -> tuple[LoopConfig, list[str]]:
    """The loop with batches that so many processes can share, and what had to be changed."""
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
        yield "planned without loop.compile, which needs less memory; how much less is not known here"
    if isinstance(run, RefinerRun) and run.upsampler == "anyup":
        yield "of AnyUp only its output is counted; its network is torch hub's"
    prior = run.prior if isinstance(run, TokenizerRun) and run.loss.needs_prior else None
    if prior is not None and not prior.is_dir():
        yield f"{prior} is not there; a refiner of the usual sizes is planned"
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
