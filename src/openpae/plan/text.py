"""A plan as text."""

from __future__ import annotations

from collections.abc import Iterator

from openpae.plan.estimate import Fit, Plan, room
from openpae.plan.memory import KINDS

_GIB = 2**30


def lines(plan: Plan) -> Iterator[str]:
    """Yield the lines of `pae plan`."""
    yield from _table("hardware", list(_hardware(plan)))
    yield from _table("a training step", list(_step(plan)))
    yield from _table(f"memory of a GPU at its peak, in {plan.trial.peak.at}", list(_memory(plan)))
    yield from _table("device batches that fit", [_fit(fit) for fit in plan.fits])
    yield from _table("the run", list(_totals(plan)))
    yield ""
    yield from (f"problem: {problem}" for problem in plan.problems)
    yield from (f"note: {note}" for note in plan.notes)


def _table(title: str, rows: list[tuple[str, str]]) -> Iterator[str]:
    yield f"\n{title}"
    width = max(len(name) for name, _ in rows)
    yield from (f"  {name:{width}}  {value}" for name, value in rows)


def _hardware(plan: Plan) -> Iterator[tuple[str, str]]:
    settings, loop = plan.settings, plan.run.loop
    processes = f" ({loop.parallel})" if settings.gpus > 1 else ""
    yield "GPUs", f"{settings.gpus} x {settings.card}{processes}"
    free = room(settings.card) / _GIB
    yield "memory for tensors", f"{free:.1f} GiB a GPU"
    own = loop.global_batch_size // settings.gpus
    each = f"{own // plan.trial.device_batch} device batches of {plan.trial.device_batch} a GPU"
    yield "global batch", f"{loop.global_batch_size:,} images: {each}"


def _step(plan: Plan) -> Iterator[tuple[str, str]]:
    trial = plan.trial
    yield "parameters", f"{trial.trained / 1e6:,.1f} M trained, {trial.frozen / 1e6:,.1f} M frozen"
    yield "operations of an image", f"{sum(trial.operations.values()) / 1e9:,.1f} G, the mean over the run"
    yield "with every loss", f"{trial.most_operations / 1e9:,.1f} G"
    yield "reads of values", "none: no step waits for the GPU"


def _memory(plan: Plan) -> Iterator[tuple[str, str]]:
    for kind in KINDS:
        yield kind, f"{plan.trial.peak.bytes[kind] / _GIB:8.2f} GiB"
    yield "all", f"{plan.trial.peak.total / _GIB:8.2f} GiB"


def _fit(fit: Fit) -> tuple[str, str]:
    name = f"{fit.checkpoint_blocks} blocks checkpointed"
    if not fit.device_batch:
        return name, "not one image"
    return name, (
        f"{fit.largest:,} images fit; {fit.device_batch:,} divides the batch: {fit.peak / _GIB:.1f} GiB, "
        f"{fit.operations / 1e9:,.1f} G operations an image"
    )


def _totals(plan: Plan) -> Iterator[tuple[str, str]]:
    rate, share = plan.images_per_second, plan.settings.utilisation
    yield "images", f"{plan.images:,} in {plan.run.loop.steps:,} steps"
    yield "speed", f"{rate:,.0f} images/s if {100 * share:.0f} % of the card's operations are reached"
    yield "time", f"{plan.hours:,.1f} h, {plan.hours * plan.settings.gpus:,.0f} GPU hours"
    yield "a checkpoint", f"{plan.checkpoint_bytes / 1e9:.2f} GB"
    for name, size in plan.cache_bytes.items():
        yield f"cache of {name}", f"{size / 1e9:,.1f} GB for {plan.settings.images:,} images"
