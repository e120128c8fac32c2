"""What a bench found, where, and how two of them compare."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from openpae.runtime.device import device_name
from openpae.storage.files import read_json


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a bench measured."""

    figures: Mapping[str, Any]
    """Numbers by name, in groups or not; None where a figure could not be had."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """What was asked for; figures of other settings do not compare."""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    """Where."""


def record(bench: str, found: Found) -> dict[str, Any]:
    """The figures of a bench under all that they depend on, as plain data."""
    machine = {
        "device": device_name(found.device),
        "threads": torch.get_num_threads() if found.device.type == "cpu" else None,
        "torch": str(torch.__version__),
    }
    return {
        "bench": bench,
        "machine": machine,
        "settings": dict(found.settings),
        "figures": dict(found.figures),
    }


def peak_gib(device: torch.device) -> float:
    """Most memory held so far, in GiB: on a GPU by tensors since the last reset, on a CPU by the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource  # there is none on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # KiB on Linux


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One figure in two records."""

    name: str
    """Its place among the figures: xl.train_images_per_second."""
    ours: float
    theirs: float

    @property
    def ratio(self) -> float | None:
        """Ours / theirs; None where theirs is 0."""
        return self.ours / self.theirs if self.theirs else None


def read_record(file: Path, bench: str) -> dict[str, Any]:
    """A record that `pae bench --out` wrote.

    Raises:
        FileNotFoundError: no such file.
        ValueError: damaged, or no record of this bench.
    """
    found = read_json(file)
    if found.get("bench") != bench:
        raise ValueError(
            f"{file} must hold a record of pae bench {bench} --out FILE, got one of {found.get('bench')!r}"
        )
    return found


def compare(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> tuple[list[Comparison], list[str]]:
    """Two records of one bench, as `record` gives and `read_record` reads them, side by side.

    Returns:
        Every figure that both have, and a line for each fact of machine and settings in which they differ.
    """
    a, b = _leaves(ours["figures"]), _leaves(theirs["figures"])
    both = [
        Comparison(name=name, ours=float(value), theirs=float(b[name]))
        for name, value in a.items()
        if isinstance(value, int | float) and isinstance(b.get(name), int | float)
    ]
    facts, others = ({**side["machine"], **side["settings"]} for side in (ours, theirs))
    return both, [
        f"{name}: {facts.get(name)} here, {others.get(name)} there"
        for name in facts | others
        if facts.get(name) != others.get(name)
    ]


def _leaves(data: Mapping[str, Any], at: str = "") -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for key, value in data.items():
        leaves |= _leaves(value, f"{at}{key}.") if isinstance(value, Mapping) else {f"{at}{key}": value}
    return leaves
