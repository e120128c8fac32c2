"""How a run is optimized, how long, and what it keeps: the settings that all three stages share."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

PROFILED_FROM = 3
"""Steps before the profiler records: it needs one to warm up, and the first ones are unlike the rest."""


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
        if not 0 < self.lr < math.inf:
            raise ValueError(f"optim.lr must be > 0 and finite, got {self.lr}")
        if self.final_lr is not None and not 0 <= self.final_lr <= self.lr:
            raise ValueError(f"optim.final_lr must lie in [0, lr = {self.lr}], got {self.final_lr}")
        if self.warmup_steps < 0:
            raise ValueError(f"optim.warmup_steps must be >= 0, got {self.warmup_steps}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"optim.betas must lie in [0, 1), got {self.betas}")
        if self.clip is not None and not self.clip > 0:
            raise ValueError(f"optim.clip must be > 0 or null, got {self.clip}")
        if self.spike_factor is not None and not 1 < self.spike_factor < math.inf:
            raise ValueError(f"optim.spike_factor must be > 1 and finite, or null, got {self.spike_factor}")


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """How long, how much at once, and what is kept."""

    steps: int
    """Optimizer steps."""
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
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train; auto takes a GPU if there is one."""
    compile: bool = False
    """Whole-module torch.compile."""
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
    profile_steps: int = 0
    """Steps, from the fourth of this start on, that PyTorch's profiler records into run_dir/profile; 0
    records none."""

    def __post_init__(self) -> None:
        counts = ("steps", "global_batch_size", "log_every", "save_every", "keep_last", "nonfinite_limit")
        for name in counts:
            if getattr(self, name) < 1:
                raise ValueError(f"loop.{name} must be >= 1, got {getattr(self, name)}")
        for name in ("evaluate_every", "num_workers", "seed", "keep_every", "profile_steps"):
            if getattr(self, name) < 0:
                raise ValueError(f"loop.{name} must be >= 0, got {getattr(self, name)}")
        part = self.device_batch_size
        if part is not None and (part < 1 or self.global_batch_size % part):
            raise ValueError(
                f"loop.device_batch_size must divide global_batch_size = {self.global_batch_size}, got {part}"
            )
        if self.profile_steps and self.profile_steps > self.steps - PROFILED_FROM:
            raise ValueError(
                f"loop.profile_steps must leave the first {PROFILED_FROM} of {self.steps} steps out, got "
                f"{self.profile_steps}"
            )
        if self.keep_every % self.save_every:
            raise ValueError(
                f"loop.keep_every must be a multiple of save_every = {self.save_every}, got {self.keep_every}"
            )
        if self.ema_decay is not None and not 0 <= self.ema_decay < 1:
            raise ValueError(f"loop.ema_decay must lie in [0, 1) or be null, got {self.ema_decay}")


def lr_at(step: int, optim: OptimConfig, steps: int) -> float:
    """Learning rate of a step: linear warm-up from lr / warmup_steps, then constant or half a cosine to
    final_lr."""
    if step < optim.warmup_steps:
        return optim.lr * (step + 1) / optim.warmup_steps
    if optim.final_lr is None:
        return optim.lr
    progress = (step - optim.warmup_steps) / max(1, steps - 1 - optim.warmup_steps)
    return optim.final_lr + (optim.lr - optim.final_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
