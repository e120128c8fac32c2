"""Run two steps of a training under fake tensors, and count memory and operations."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from openpae.engine import loop as loop_module
from openpae.engine.parallel import unwrap
from openpae.plan.fakes import AnyTask, Run, build_task, fake_world, planned_batches
from openpae.plan.memory import Kind, Peak, Tracker
from openpae.train.settings import GeneratorRun, TokenizerRun


@dataclass(frozen=True, kw_only=True)
class Trial:
    """Memory and operations of one process in the most expensive step, when all losses are active."""

    device_batch: int
    """Images per forward pass."""
    trained: int
    """Number of trained parameters."""
    frozen: int
    """Number of frozen parameters."""
    exported: int
    """Number of trained parameters of the exported model, which is also averaged."""
    peak: Peak
    """Peak memory of the last step on one device."""
    lasting: Mapping[Kind, int]
    """Bytes in use between two steps, by kind."""
    operations: Mapping[str, float]
    """Operations per image by dtype: the mean over the run if all phases were run, else of the last step."""
    most_operations: float
    """Operations per image in the last step, summed over dtypes."""


def planned_run(run: Run, **loop: Any) -> Run:
    """Return the config for a trial: on the CPU, without compile, evaluation and files.

    Args:
        run: config of the run.
        loop: fields of its loop to replace.
    """
    # skip reads no values of tensors. Compiled steps cannot run under fake tensors.
    plain: dict[str, Any] = {
        "device": "cpu",
        "compile": False,
        "on_nonfinite": "skip",
        "num_workers": 0,
        "profile_steps": 0,
    }
    changes: dict[str, Any] = {"loop": dataclasses.replace(run.loop, **(plain | loop))}
    if isinstance(run, GeneratorRun):
        changes |= {"tokenizer": None, "evaluation_images": None, "held_out_latents": None}
        changes |= {"images": None, "image_size": None, "augment": "flip", "resize": None}
    else:
        changes["data"] = dataclasses.replace(run.data, evaluation=None)
        if isinstance(run, TokenizerRun):
            changes |= {"extractor": None, "start": "vit"}
    return dataclasses.replace(run, **changes)


def try_run(run: Run, gpus: int = 1, *, phases: bool = False, round_to: int = 512) -> Trial:
    """Build a run's task, and run two steps of the phase in which all losses are active.

    Args:
        run: result of `planned_run`.
        gpus: number of processes that share the global batch.
        phases: first run one step of each phase, for the mean number of operations.
        round_to: see `Tracker`.

    Raises:
        ValueError: the config does not fit the number of processes, its networks are unknown, or a step
            reads the values of a tensor.
    """
    with fake_world(gpus) as mode, Tracker(mode, round_to) as tracker:
        # Apart from weights, only DDP's buckets stay after building; they hold gradients.
        with tracker.making("gradients"):
            task = build_task(run)
        networks = _networks(task)
        for name, network in networks.items():
            tracker.name(name, network)
            tracker.mark("weights", [*network.parameters(), *network.buffers()])
            for weight in network.parameters():
                if weight.requires_grad:
                    hook = partial(_mark_gradient, tracker)
                    weight.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
        parts = planned_batches(run.loop)
        shares, steps = _phases(run) if phases else ([1.0], last_steps(run))
        counts: list[Mapping[torch.dtype, int]] = []
        tracker.reset()
        for state in loop_module.trial_steps(task, run.optim, run.loop, steps):
            if state.ema is not None:
                tracker.mark("average", state.ema.average.values())
            counts.append(tracker.operations)
            peak, lasting = tracker.peak, dict(tracker.in_use)
            tracker.reset()
        trained = {id(w): w for o in task.optimizers.values() for g in o.param_groups for w in g["params"]}
        return Trial(
            device_batch=len(parts[0]),
            trained=sum(weight.numel() for weight in trained.values()),
            frozen=_count(networks, trained),
            exported=sum(w.numel() for w in state.exported.parameters() if w.requires_grad),
            peak=peak,
            lasting=lasting,
            operations=_per_image(counts, shares, images := len(parts) * len(parts[0])),
            most_operations=sum(counts[-1].values()) / images,
        )


def operations_per_image(run: Run) -> float:
    """Count the operations of an image in the most expensive step, without computing it.

    Matrix products, convolutions and attention count, forward and backward, those of frozen networks too.

    Args:
        run: config of the run. The count is that of one process and a small batch.
    """
    count = min(8, run.loop.global_batch_size)
    return try_run(planned_run(run, global_batch_size=count, device_batch_size=None)).most_operations


def last_steps(run: Run) -> list[int]:
    """Return two steps of the phase in which all losses are active. The second is the most expensive."""
    return _phases(run)[1][-2:]


def _networks(task: AnyTask) -> dict[str, nn.Module]:
    """Return all networks of a step, by the name of their player or of the task's attribute."""
    parts = {name: part for name, part in vars(task).items() if isinstance(part, nn.Module)}
    return {name: unwrap(player) for name, player in task.players.items()} | parts


def _phases(run: Run) -> tuple[list[float], list[int]]:
    """Return each phase's share of the run, and the steps to run: one per phase, and the most expensive."""
    starts, every = {0}, 0
    if isinstance(run, TokenizerRun):
        loss, every = run.loss, run.loss.gradients_every
        shares = [loss.mcr_start] * (loss.mcr > 0) + [loss.discriminator_start, loss.gan_start] * (
            loss.gan > 0
        )
        shares += [loss.lpips_late_start] * (loss.lpips_late_net is not None)
        starts |= {math.ceil(share * run.loop.schedule_steps) for share in shares}
    known = sorted(start for start in starts if start == 0 or start < run.loop.steps)
    ends = [*known[1:], run.loop.steps]
    steps = [start + 1 if every and start % every == 0 else start for start in known]
    most_expensive = math.ceil((known[-1] + 1) / every) * every if every else known[-1] + 1
    return [(end - start) / run.loop.steps for start, end in zip(known, ends, strict=True)], [
        *steps,
        most_expensive,
    ]


def _per_image(counts: list[Mapping[torch.dtype, int]], shares: list[float], images: int) -> dict[str, float]:
    mean: dict[str, float] = {}
    for operations, share in zip(counts, shares, strict=False):  # without the most expensive step
        for dtype, count in operations.items():
            name = str(dtype).removeprefix("torch.")
            mean[name] = mean.get(name, 0.0) + share * count / images
    return mean


def _mark_gradient(tracker: Tracker, weight: Tensor) -> None:
    if weight.grad is not None:  # None if FSDP has moved it
        tracker.mark("gradients", [weight.grad])


def _count(networks: Mapping[str, nn.Module], trained: Mapping[int, Tensor]) -> int:
    """Count the frozen parameters. Parameters that FSDP has sharded stay on the meta device."""
    weights = {id(w): w for network in networks.values() for w in network.parameters() if not w.is_meta}
    return sum(weight.numel() for key, weight in weights.items() if key not in trained)
