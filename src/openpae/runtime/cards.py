"""Memory and speed of GPUs, from their data sheets."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Card:
    """One kind of GPU."""

    pattern: str
    """Regular expression for a part of its device name."""
    half: float
    """Dense bfloat16 operations per second. Most data sheets give twice this, with sparsity."""
    full: float
    """float32 operations per second, without TF32."""
    gib: float
    """Memory that PyTorch sees, in GiB, rounded down."""

    def peak(self, precision: str) -> float | None:
        """Operations per second in a `loop.precision`; None for tf32, which is not in the table."""
        return {"bf16": self.half, "fp32": self.full}.get(precision)


CARDS = {
    "b200": Card(pattern="B200", half=2250e12, full=75e12, gib=178),
    "h200": Card(pattern="H200", half=989e12, full=67e12, gib=139),
    "h100-pcie": Card(pattern="H100 PCIe", half=756e12, full=51e12, gib=79),
    "h100-nvl": Card(pattern="H100 NVL", half=835e12, full=60e12, gib=93),
    "h100": Card(pattern="H100", half=989e12, full=67e12, gib=79),
    "h800-pcie": Card(pattern="H800 PCIe", half=756e12, full=51e12, gib=79),
    "h800": Card(pattern="H800", half=989e12, full=67e12, gib=79),
    "a100-40": Card(pattern="A100.*40GB", half=312e12, full=19.5e12, gib=39),
    "a100": Card(pattern="A100", half=312e12, full=19.5e12, gib=79),
    "a800": Card(pattern="A800", half=312e12, full=19.5e12, gib=79),
    "l40s": Card(pattern="L40S", half=362e12, full=91.6e12, gib=44),
    "l4": Card(pattern="L4", half=121e12, full=30.3e12, gib=22),
    "4090": Card(pattern="RTX 4090", half=165e12, full=82.6e12, gib=23.5),
}
"""Keyed by the values of `pae plan --card`. RTX 4090: from the Ada whitepaper."""


def card_of(name: str) -> Card | None:
    """The first card that matches a device name, or None."""
    return next((card for card in CARDS.values() if re.search(rf"\b{card.pattern}\b", name)), None)


def card(name: str) -> Card:
    """A card by its key. Raises ValueError if there is none."""
    if name not in CARDS:
        raise ValueError(f"--card must be one of {', '.join(CARDS)}, got {name!r}")
    return CARDS[name]
