"""Two steps of a run under fake tensors, and what they need."""

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
    """What a process of a run needs for a step at its dearest, when every loss counts."""

    device_batch: int
    """Images per forward pass."""
    trained: int
    """Parameters that the optimizers change."""
    frozen: int
    """Parameters of the networks beside them."""
    exported: int
    """Trained parameters of the model that is exported and averaged."""
    peak: Peak
    """Of the last step, on one device."""
    lasting: Mapping[Kind, int]
    """Bytes by kind between two steps."""
    operations: Mapping[str, float]
    """Operations of an image by the type of their numbers: the mean over the run where all its phases are
    tried, else of the last step."""
    dearest: float
    """Operations of an image in the last step, of all types."""


def planned_run(run: Run, **loop: Any) -> Run:
    """The run as it is planned: on this machine's fake tensors, without compile, evaluation and files.

    Args:
        run: a run's config.
        loop: fields of its loop that are to be others.
    """
    # skip: as on a GPU, which is asked for no value. compile: it saves memory, and its steps cannot be faked.
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
    else:
        changes["data"] = dataclasses.replace(run.data, evaluation=None)
        if isinstance(run, TokenizerRun):
            changes |= {"extractor": None, "start": "vit"}
    return dataclasses.replace(run, **changes)


def try_run(run: Run, gpus: int = 1, *, phases: bool = False, round_to: int = 512) -> Trial:
    """Build a run's task, and take two steps of the phase in which all its losses count.

    Args:
        run: as `planned_run` gives it.
        gpus: processes that share the global batch.
        phases: take one of each phase before, for the mean of their operations.
        round_to: see `Tracker`.

    Raises:
        ValueError: the config does not fit the number of processes, its networks are not known, or a step
            reads the values of a tensor.
    """
    with fake_world(gpus) as mode, Tracker(mode, round_to) as tracker:
        # What is left of building, weights aside, is DDP's buckets, where gradients are kept.
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
        shares, steps = _phases(run)
        if not phases:
            shares, steps = [1.0], steps[-2:]
        found: list[Mapping[torch.dtype, int]] = []
        tracker.reset()
        for state in loop_module.trial_steps(task, run.optim, run.loop, steps):
            if state.ema is not None:
                tracker.mark("average", state.ema.average.values())
            found.append(tracker.operations)
            peak, lasting = tracker.peak, dict(tracker.now)
            tracker.reset()
        trained = {id(w): w for o in task.optimizers.values() for g in o.param_groups for w in g["params"]}
        return Trial(
            device_batch=len(parts[0]),
            trained=sum(weight.numel() for weight in trained.values()),
            frozen=_count(networks, trained),
            exported=sum(w.numel() for w in state.exported.parameters() if w.requires_grad),
            peak=peak,
            lasting=lasting,
            operations=_per_image(found, shares, images := len(parts) * len(parts[0])),
            dearest=sum(found[-1].values()) / images,
        )


def _networks(task: AnyTask) -> dict[str, nn.Module]:
    """All networks that a step runs, by the name of their player or of the task's attribute."""
    parts = {name: part for name, part in vars(task).items() if isinstance(part, nn.Module)}
    return {name: unwrap(player) for name, player in task.players.items()} | parts


def _phases(run: Run) -> tuple[list[float], list[int]]:
    """Shares of the run with one set of losses each, and the steps to take: one of each, and the dearest."""
    starts, every = {0}, 0
    if isinstance(run, TokenizerRun):
        loss, every = run.loss, run.loss.gradients_every
        shares = [loss.mcr_start] * (loss.mcr > 0) + [loss.discriminator_start, loss.gan_start] * (
            loss.gan > 0
        )
        shares += [loss.lpips_late_start] * (loss.lpips_late_net is not None)
        starts |= {math.ceil(share * run.loop.steps) for share in shares}
    known = sorted(start for start in starts if start == 0 or start < run.loop.steps)
    ends = [*known[1:], run.loop.steps]
    steps = [start + 1 if every and start % every == 0 else start for start in known]
    dearest = math.ceil((known[-1] + 1) / every) * every if every else known[-1] + 1
    return [(end - start) / run.loop.steps for start, end in zip(known, ends, strict=True)], [*steps, dearest]


def _per_image(found: list[Mapping[torch.dtype, int]], shares: list[float], images: int) -> dict[str, float]:
    mean: dict[str, float] = {}
    for operations, share in zip(found, shares, strict=False):  # the dearest step stands for itself
        for dtype, count in operations.items():
            name = str(dtype).removeprefix("torch.")
            mean[name] = mean.get(name, 0.0) + share * count / images
    return mean


def _mark_gradient(tracker: Tracker, weight: Tensor) -> None:
    if weight.grad is not None:  # FSDP has taken it already
        tracker.mark("gradients", [weight.grad])


def _count(networks: Mapping[str, nn.Module], trained: Mapping[int, Tensor]) -> int:
    """Parameters that are not trained. What FSDP has cut into shards is left on the meta device."""
    weights = {id(w): w for network in networks.values() for w in network.parameters() if not w.is_meta}
    return sum(weight.numel() for key, weight in weights.items() if key not in trained)
