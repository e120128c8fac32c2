"""The settings of optimizer and loop, shared by all three stages."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from openpae.config import added, check_fields

TrackerName = Literal["tensorboard", "wandb", "trackio"]

PROFILED_FROM = 3
"""Steps before the profiler records; the first steps are slower than the rest."""


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW and its schedule."""

    lr: float
    """Learning rate at its highest."""
    final_lr: float | None = None
    """Learning rate at the last step, reached by half a cosine; null keeps `lr`."""
    warmup_steps: int = 0
    """Steps of linear rise from 0."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of the first and second moment."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    clip: float | None = None
    """Largest norm of the gradient; null clips nothing."""
    spike_factor: float | None = None
    """Skip a step whose gradient norm exceeds `spike_factor` times the player's mean norm, once 20 steps are
    known; null skips none. The log counts them."""

    def __post_init__(self) -> None:
        check_fields(
            self,
            "optim.",
            lr="(0, inf)",
            final_lr=f"[0, {self.lr}]",
            warmup_steps="[0, inf)",
            betas="[0, 1)",
            clip="(0, inf)",
            spike_factor="(1, inf)",
        )


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """How long, how much at once, and what is kept."""

    steps: int
    """Optimizer steps. They may grow later: repeat the command with more of them."""
    extended_from: tuple[int, ...] = added(())
    """Ends of earlier schedules, ascending; a run whose steps grow sets them. From each on, the learning rate
    falls again from `lr` to `final_lr`. Shares of the training, such as starts of losses, are shares of the
    first schedule."""
    seconds: float | None = added(None)
    """Seconds that the training may take; null trains all `steps`. The run then passes through the schedule
    of `steps` (learning rate, starts of losses, average, log_every, save_every, evaluate_every) in as many
    steps as the time pays for. It measures its pace as it goes; the log holds each new plan (`pace/...`)."""
    least_steps: int = added(1)
    """With `seconds`, the fewest steps: where the time does not pay for them the run takes longer."""
    global_batch_size: int
    """Images per optimizer step, over all processes."""
    device_batch_size: int | None = None
    """Images per forward pass of one process, to fit memory; null takes all that the process sees of a step.
    It changes the result only where a loss looks at the device batch: kl, gan_weight adaptive, lpips_share
    or mcr_share below 1."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """How several processes (torchrun) share the work. ddp: each keeps the full model, and gradients are
    averaged. fsdp: weights, gradients, optimizer and EMA are sharded (FSDP2). One process uses neither."""
    seed: int = 0
    """Seed of initial weights, data order, augmentation and noise."""
    precision: Literal["fp32", "tf32", "bf16"] = "bf16"
    """fp32: all in float32. tf32: as fp32, but a GPU multiplies in TF32. bf16: autocast around the losses.
    Weights, optimizer and EMA stay float32."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to train; auto takes a CUDA GPU if there is one. mps, an Apple GPU, is not tested."""
    compile: bool = False
    """Compile with torch.compile: refiner and generator in full, of a tokenizer the decoder and modulator."""
    ema_decay: float | None = None
    """Decay of the moving average of the weights per step; null keeps none."""
    export: Literal["ema", "raw"] = "ema"
    """Weights that a checkpoint offers for use and that evaluation takes; without an average the raw ones."""
    log_every: int = 20
    """Steps between log lines; each is the mean since the last."""
    save_every: int = 1000
    """Steps between checkpoints; the last step always leaves one."""
    keep_last: int = 2
    """Newest checkpoints to keep."""
    keep_every: int = 0
    """Beside these, keep for good the checkpoints of steps that are multiples of this; 0 keeps none."""
    evaluate_every: int = 0
    """Steps between evaluations under the weights that are exported; 0 evaluates only at the end."""
    num_workers: int = 0
    """Processes that read data; 0 reads in this one, best where the data are packed or cached."""
    on_nonfinite: Literal["stop", "skip", "rollback"] = "stop"
    """What to do about a loss or a gradient that is not finite. stop: compute the step again, name the module
    and the tensor where it began, and end the run. skip: leave the step out. rollback: go back to the last
    checkpoint, and from there past the data of that step."""
    nonfinite_limit: int = 10
    """Steps skipped in a row, or rollbacks, after which the run ends."""
    track: tuple[TrackerName, ...] | None = added(None)
    """Trackers beside log.jsonl: tensorboard, wandb, trackio; [] takes none, null TensorBoard if it is
    installed."""
    count_operations: bool = added(False)
    """Count the operations of a step before the start, without computing it. The log then has teraflops, and
    on a GPU with a known peak the model FLOPs utilisation."""
    profile_steps: int = 0
    """Steps, from the fourth of this start on, that PyTorch's profiler records into run_dir/profile; 0
    records none."""

    def __post_init__(self) -> None:
        counts = ("steps", "device_batch_size", "log_every", "save_every", "keep_last")
        others = ("evaluate_every", "seed", "keep_every", "profile_steps")
        from_one = dict.fromkeys((*counts, "nonfinite_limit"), "[1, inf)")
        allowed = {"ema_decay": "[0, 1)", "num_workers": "[0, 1024]", "global_batch_size": "[1, 16777216]"}
        check_fields(self, "loop.", **allowed, **from_one, **dict.fromkeys(others, "[0, inf)"))
        part = self.device_batch_size
        if part is not None and self.global_batch_size % part:
            raise ValueError(
                f"loop.device_batch_size must divide global_batch_size = {self.global_batch_size}, got {part}"
            )
        if self.profile_steps and self.profile_steps > self.steps - PROFILED_FROM:
            raise ValueError(
                f"loop.profile_steps must leave out the first {PROFILED_FROM} of {self.steps} steps, got "
                f"{self.profile_steps}"
            )
        if self.seconds is not None and not 0 < self.seconds < math.inf:
            raise ValueError(f"loop.seconds must be > 0 and finite, or null, got {self.seconds}")
        if not 1 <= self.least_steps <= self.steps:
            raise ValueError(
                f"loop.least_steps must lie in [1, steps = {self.steps}], got {self.least_steps}"
            )
        if self.seconds is not None and self.keep_every:
            raise ValueError(
                f"loop.keep_every must be 0 with loop.seconds, got {self.keep_every}: such a run does not "
                "know in advance at which steps it saves"
            )
        ends = (0, *self.extended_from, self.steps)
        if sorted(set(ends)) != list(ends) or (self.extended_from and self.seconds is not None):
            raise ValueError(
                f"loop.extended_from must be ascending, in [1, steps = {self.steps}), and empty with "
                f"loop.seconds, got {self.extended_from}"
            )
        if self.keep_every % self.save_every:
            raise ValueError(
                f"loop.keep_every must be a multiple of save_every = {self.save_every}, got {self.keep_every}"
            )

    @property
    def schedule_steps(self) -> int:
        """Steps of the first schedule, whose shares start the losses."""
        return (*self.extended_from, self.steps)[0]


def lr_at(step: float, optim: OptimConfig, steps: int, extended_from: Sequence[int] = ()) -> float:
    """Learning rate at a position in [0, steps).

    A linear warm-up, then a constant or half a cosine. With ends of earlier schedules in `extended_from` the
    cosine begins again at each of them, without a warm-up.
    """
    if step < optim.warmup_steps:
        return optim.lr * (step + 1) / optim.warmup_steps
    if optim.final_lr is None:
        return optim.lr
    ends = (*extended_from, steps)
    end = next(end for end in ends if step < end or end == steps)
    begin = max((before for before in ends if before < end), default=optim.warmup_steps)
    progress = (step - begin) / max(1, end - 1 - begin)
    return optim.final_lr + (optim.lr - optim.final_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
