"""Where a run is to be trained, for `pae plan`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from openpae.config import check_fields
from openpae.runtime.cards import card

IMAGENET = 1_281_167
"""Images of ImageNet-1k."""


@dataclass(frozen=True, kw_only=True)
class PlanSettings:
    """Where a run is to be trained."""

    gpus: int = 1
    """GPUs, one process each."""
    card: str = "h100"
    """A row of openpae.runtime.cards.CARDS."""
    parallel: Literal["ddp", "fsdp"] | None = None
    """As loop.parallel; null takes the config's."""
    utilisation: float = 0.4
    """Share of the card's operations per second that training reaches: an assumption."""
    images: int = IMAGENET
    """Images of the data set, for the size of caches."""

    def __post_init__(self) -> None:
        check_fields(self, "--", gpus="[1, inf)", images="[1, inf)", utilisation="(0, 1]")
        card(self.card)
