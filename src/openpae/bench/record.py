"""Records of `pae bench`: results, machine and settings, and the comparison of two records."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from openpae.runtime.device import device_name
from openpae.storage.files import read_fields, read_json


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Results of a bench."""

    figures: Mapping[str, Any]
    """Figures by name, possibly nested; None where a figure is not available."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Settings of the bench; figures of different settings are not comparable."""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    """The device that was measured."""


def record(bench: str, measured: Measured) -> dict[str, Any]:
    """Return the results of a bench with machine and settings, as plain data."""
    machine = {
        "device": device_name(measured.device),
        "threads": torch.get_num_threads() if measured.device.type == "cpu" else None,
        "torch": str(torch.__version__),
    }
    return {
        "bench": bench,
        "machine": machine,
        "settings": dict(measured.settings),
        "figures": dict(measured.figures),
    }


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One figure of two records."""

    name: str
    """Dotted name of the figure: xl.train_images_per_second."""
    value: float
    other: float

    @property
    def ratio(self) -> float | None:
        """value / other; None if other is 0."""
        return self.value / self.other if self.other else None


def read_record(file: Path, bench: str) -> dict[str, Any]:
    """Read a record of `pae bench --out`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, or is no record of this bench.
    """
    content = read_json(file)
    if content.get("bench") != bench:
        raise ValueError(
            f"{file} must hold a record of pae bench {bench} --out FILE, got one of {content.get('bench')!r}"
        )
    return read_fields(file, figures=dict, machine=dict, settings=dict)


def compare(first: Mapping[str, Any], second: Mapping[str, Any]) -> tuple[list[Comparison], list[str]]:
    """Compare two records of one bench.

    Returns:
        Every figure that both records have, and a line for each difference of machine or settings.
    """
    a, b = _leaves(first["figures"]), _leaves(second["figures"])
    both = [
        Comparison(name=name, value=float(value), other=float(b[name]))
        for name, value in a.items()
        if isinstance(value, int | float) and isinstance(b.get(name), int | float)
    ]
    c, d = ({**side["machine"], **side["settings"]} for side in (first, second))
    return both, [f"{name}: {c.get(name)} and {d.get(name)}" for name in c | d if c.get(name) != d.get(name)]


def _leaves(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for key, value in data.items():
        leaves |= (
            _leaves(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
        )
    return leaves
