"""Device and precision: choice of the device, bf16 autocast, copies of batches.

`autocast` is bf16 autocast, for every setting `precision: bf16`. Two others open autocast: a model whose own
weights are in half precision (`models.precision.own_precision`), and the adapter of diffusers, by the type of
its input (`interop.diffusers_adapter`).
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Autocast in bfloat16 for "bf16", else none. Some losses switch it off inside."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def pick_device(device: str, option: str = "--device") -> torch.device:
    """The device for "auto" (a CUDA GPU if there is one, else the CPU), "cpu", "cuda" or "mps" (Apple).

    Args:
        device: the name.
        option: where the user chose it, for messages.

    Raises:
        ValueError: torch sees no such device.
    """
    if device == "mps" and not torch.backends.mps.is_available():
        raise ValueError(f"{option} is mps, but torch sees no Apple GPU; use auto or cpu")
    if device == "mps":
        return torch.device("mps")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"{option} is cuda, but torch sees no GPU; use auto or cpu")
    return torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")


def to_device(batches: Iterable[Any], device: torch.device) -> Iterator[Any]:
    """Move batches (NamedTuples of tensors) to a device. A GPU copies the next batch while it computes.

    The copies are asynchronous only from pinned memory.
    """
    if device.type != "cuda":
        yield from (_moved(batch, device) for batch in batches)
        return
    copies: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    waiting = None
    for batch in batches:
        with torch.cuda.stream(copies):
            coming = _moved(batch, device)
        if waiting is not None:
            yield waiting
        compute = torch.cuda.current_stream(device)
        compute.wait_stream(copies)
        for tensor in coming:
            # The allocator must not reuse this memory before the losses have read it.
            if isinstance(tensor, Tensor):
                tensor.record_stream(compute)
        waiting = coming
    if waiting is not None:
        yield waiting


def _moved(batch: Any, device: torch.device) -> Any:
    moved = (x.to(device, non_blocking=True) if isinstance(x, Tensor) else x for x in batch)
    return type(batch)(*moved)


def device_name(device: torch.device) -> str:
    """Name of a GPU, or model and number of cores of the CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info, model = Path("/proc/cpuinfo"), platform.processor() or platform.machine()
    if info.is_file():  # Linux: platform does not know the model
        lines = info.read_text(encoding="utf-8").splitlines()
        model = next(
            (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), model
        )
    return f"{model}, {os.cpu_count()} cores"


def peak_gib(device: torch.device) -> float:
    """Return the peak memory in GiB: of tensors since the last reset on a GPU, of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource  # Windows lacks it

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # KiB on Linux
