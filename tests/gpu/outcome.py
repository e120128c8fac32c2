"""What a check hands back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


class NotRun(Exception):
    """A check that does not apply here, with the reason."""


@dataclass(frozen=True)
class Outcome:
    """Figures of a check by name, and one sentence for each problem; without problems it has passed."""

    figures: Mapping[str, Any]
    problems: Sequence[str] = ()
