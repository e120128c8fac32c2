"""The optimizer, and the device batches of a step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.optim import Optimizer

from openpae.engine.settings import LoopConfig, OptimConfig
from openpae.runtime import processes


def device_batches(loop: LoopConfig) -> list[range]:
    """The rows of the global batch in each device batch of this rank, in order.

    Raises:
        ValueError: the global batch cannot be split equally over ranks and device batches.
    """
    own = processes.rank_slice(loop.global_batch_size)
    if loop.global_batch_size % processes.world_size():
        raise ValueError(
            f"loop.global_batch_size must be a multiple of the number of processes, got "
            f"{loop.global_batch_size} for {processes.world_size()}; change either"
        )
    part = loop.device_batch_size or len(own)
    if len(own) % part:
        raise ValueError(
            f"loop.device_batch_size must divide the {len(own)} images that each of {processes.world_size()} "
            f"processes sees of a global batch of {loop.global_batch_size}, got {part}"
        )
    return [own[start : start + part] for start in range(0, len(own), part)]


def adamw(modules: nn.Module | Sequence[nn.Parameter], optim: OptimConfig) -> Optimizer:
    """AdamW over the parameters that require a gradient."""
    parameters = modules.parameters() if isinstance(modules, nn.Module) else modules
    trained = [p for p in parameters if p.requires_grad]
    return torch.optim.AdamW(
        trained, lr=optim.lr, betas=optim.betas, weight_decay=optim.weight_decay, fused=True
    )
