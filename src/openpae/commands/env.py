"""`pae env`: versions and hardware, for bug reports."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from openpae.runtime.terminal import say

_PACKAGES = (
    *("numpy", "pillow", "safetensors", "tyro", "huggingface_hub", "transformers", "scipy", "scikit-learn"),
    *("matplotlib", "tensorboard", "wandb", "trackio", "pyarrow", "diffusers", "onnx", "onnxruntime"),
    *("gradio", "resvg-py", "pooch"),
)
_GIB = 2**30


def env() -> Mapping[str, Any]:
    """Print versions, devices, memory and disk of this machine, for a bug report.

    It shows no path and no name of the machine or its user.
    """
    facts = environment()
    for name, value in facts.items():
        if isinstance(value, dict):
            say(f"{name}:")
            for key, item in value.items():
                say(f"  {key:20} {item or 'not installed'}")
        else:
            say(f"{name:22} {_shown(value)}")
    return facts


def environment() -> dict[str, Any]:
    """Versions, devices, memory (GiB) and free disk (GiB). A package that is not installed is None."""
    import torch

    from openpae.runtime import provenance
    from openpae.runtime.device import device_name

    cards = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    total, free = _memory()
    return {
        "openpae": provenance.version(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "system": platform.platform(),
        "CPU": device_name(torch.device("cpu")),
        "usable cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "torch threads": torch.get_num_threads(),
        "memory in GiB": total,
        "free memory in GiB": free,
        "free disk here in GiB": round(shutil.disk_usage(Path.cwd()).free / _GIB, 1),
        "CUDA of torch": torch.version.cuda or "none",
        "GPUs": [f"{each.name}, {each.total_memory / _GIB:.1f} GiB" for each in cards],
        "MPS": torch.backends.mps.is_available(),
        "packages": {name: _version(name) for name in _PACKAGES},
    }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _memory() -> tuple[float | None, float | None]:
    """Memory of the machine and what is free of it, in GiB; None where the system does not say."""
    file = Path("/proc/meminfo")
    if file.is_file():
        kib = dict(line.split(":") for line in file.read_text(encoding="utf-8").splitlines())
        total, free = (int(kib[name].split()[0]) * 2**10 for name in ("MemTotal", "MemAvailable"))
        return round(total / _GIB, 1), round(free / _GIB, 1)
    known = {"SC_PAGE_SIZE", "SC_PHYS_PAGES"} <= set(getattr(os, "sysconf_names", ()))
    if not known:
        return None, None
    return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / _GIB, 1), None


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return "unknown"
    return "; ".join(value) or "none" if isinstance(value, list) else str(value)
