"""A measured number with its standard error and settings."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

Settings = Mapping[str, bool | int | float | str]


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """The result of one metric."""

    name: str
    value: float
    std: float | None = None
    """Standard deviation of the averaged values; None for a value that is no mean."""
    stderr: float | None = None
    """Standard error of the value; None if unknown."""
    n: int
    """Number of averaged values, or of samples."""
    over: str = "images"
    """What n counts: images, repeats, subsets, splits."""
    settings: Settings = field(default_factory=dict)
    """Everything else that changes the value."""

    def __str__(self) -> str:
        error = "" if self.stderr is None else f" +- {self.stderr:.2g}"
        return f"{self.name} {self.value:.4g}{error} ({self.n} {self.over})"


@dataclass(frozen=True)
class Undefined:
    """A metric without a value for these data."""

    name: str
    reason: str


def split_results(results: Iterable[Estimate | Undefined]) -> tuple[dict[str, Estimate], dict[str, str]]:
    """Estimates by name, and reasons of undefined metrics by name."""
    metrics, undefined = {}, {}
    for result in results:
        if isinstance(result, Undefined):
            undefined[result.name] = result.reason
        else:
            metrics[result.name] = result
    return metrics, undefined


def mean_of(name: str, values: Tensor, settings: Settings, over: str = "images") -> Estimate:
    """The mean of independent values (N,), with std / sqrt(N) as its standard error.

    One value has no standard error. Nor has an infinite mean, as from the PSNR of an exact copy.

    Raises:
        ValueError: there are no values.
    """
    n = len(values)
    if n == 0:
        raise ValueError(f"{name} needs at least one value, got none")
    values = values.double()
    mean = float(values.mean())
    std = float(values.std()) if n > 1 and math.isfinite(mean) else None
    return Estimate(
        name=name,
        value=mean,
        std=std,
        stderr=None if std is None else std / math.sqrt(n),
        n=n,
        over=over,
        settings=settings,
    )


def jackknife_error(estimates: Tensor) -> float:
    """Jackknife standard error of a statistic, from its values (G,) with one of G groups left out.

    sqrt((G - 1) / G * sum_g (t_g - mean t)^2)
    """
    groups = len(estimates)
    deviations = estimates.double() - estimates.double().mean()
    return float(torch.sqrt((groups - 1) / groups * deviations.square().sum()))
