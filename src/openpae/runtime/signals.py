"""Signals that end a run. This file imports no torch."""

from __future__ import annotations

import signal


class Stopped(Exception):
    """The run was told to stop by a signal and has saved; the same command goes on."""

    def __init__(self, signum: int, step: int) -> None:
        super().__init__(
            f"stopped by {signal.Signals(signum).name} after step {step}; the same command goes on"
        )
        self.signum = signum
