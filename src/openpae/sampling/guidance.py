"""The guided velocity of a generator: guided by its null class, or by a weaker generator."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor, nn

from openpae.objective.flow import guide
from openpae.sampling.solvers import Field


class LatentConfig(Protocol):
    """What sampling needs of a generator's config."""

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w)."""
        ...


class VelocityModel(Protocol):
    """What sampling needs of a generator: LightningDiT, or any module with these members."""

    @property
    def config(self) -> LatentConfig:
        """Its sizes."""
        ...

    @property
    def null_label(self) -> int:
        """The label that means no class, K. Classes are in [0, K)."""
        ...

    def denormalise(self, x: Tensor) -> Tensor:
        """Bring generated latents (B, C, h, w) to the tokenizer's scale."""
        ...

    def parameters(self) -> Iterator[nn.Parameter]:
        """Its weights. They decide the device."""
        ...

    def __call__(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        """Velocity (B, C, h, w) of x (B, C, h, w) at t (B,) for labels (B,)."""
        ...


def guided_velocity(
    model: VelocityModel,
    labels: Tensor,
    guidance: float,
    guides_at: Callable[[float], bool],
    weak: VelocityModel | None = None,
) -> Field:
    """The velocity of these classes, guided at some positions (`flow.guide`).

    The decision needs the position alone, which the host knows, so that no step waits for the device. At
    other positions only the generator's own velocity is computed.

    Args:
        model: the generator.
        labels: classes, (B,).
        guidance: w.
        guides_at: the guidance interval: whether to guide at position t (`SamplerConfig.guides_at`).
        weak: gives the worse velocity; None takes the generator with its null class.

    Returns:
        A velocity for the solvers.
    """
    labels_and_null = torch.cat([labels, torch.full_like(labels, model.null_label)])

    def velocity(x: Tensor, t: float) -> Tensor:
        times = torch.full((len(x),), t, device=x.device)
        if not guides_at(t):
            return model(x, times, labels)
        if weak is not None:
            return guide(model(x, times, labels).float(), weak(x, times, labels).float(), guidance)
        both = model(torch.cat([x, x]), torch.cat([times, times]), labels_and_null).float()
        conditional, null = both.chunk(2)
        return guide(conditional, null, guidance)

    return velocity


def check_labels(model: VelocityModel, labels: Tensor) -> None:
    """Refuse labels that the generator does not know.

    Raises:
        ValueError: a label outside [0, K]; K is the null class.
    """
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) <= model.null_label:
        raise ValueError(
            f"labels must lie in [0, {model.null_label}] ({model.null_label} is the null class), "
            f"got {int(labels.min())} to {int(labels.max())}"
        )


def check_weak(model: VelocityModel, weak: VelocityModel) -> None:
    """Refuse a weak generator that does not fit the generator.

    Raises:
        ValueError: it makes latents of another shape or scale, or knows another number of classes.
    """
    for name, ours, theirs in (
        ("latent shape", model.config.latent_shape, weak.config.latent_shape),
        ("number of classes", model.null_label, weak.null_label),
    ):
        if ours != theirs:
            raise ValueError(
                f"the weak generator must have the {name} of the other, {ours}, got {theirs}; take one that "
                "was trained on the same latents"
            )
    # Velocities of two scales cannot be subtracted. The tolerance allows the rounding of two caches.
    shape, device = model.config.latent_shape, next(model.parameters()).device
    ends = torch.stack([torch.zeros(shape), torch.ones(shape)]).to(device)
    if not torch.allclose(model.denormalise(ends), weak.denormalise(ends), rtol=0.02, atol=0.02):
        raise ValueError(
            "the weak generator normalises latents by other statistics; take one that was trained on the "
            "same latents"
        )
