"""Settings of `pae plan`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from openpae.config import check_fields
from openpae.runtime.cards import card

IMAGENET = 1_281_167
"""Images of ImageNet-1k."""


@dataclass(frozen=True, kw_only=True)
class PlanSettings:
    """The cards to plan for, and how they are used."""

    gpus: int = 1
    """Number of GPUs, with one process each."""
    card: str = "h100"
    """Name of a card in openpae.runtime.cards.CARDS."""
    parallel: Literal["ddp", "fsdp"] | None = None
    """loop.parallel; null takes the value of the config."""
    utilisation: float = 0.4
    """Assumed share of the card's peak operations per second that training reaches."""
    images: int = IMAGENET
    """Number of images in the data set, for the size of caches."""

    def __post_init__(self) -> None:
        check_fields(self, "--", gpus="[1, 1000000]", images="[1, inf)", utilisation="(0, 1]")
        card(self.card)
