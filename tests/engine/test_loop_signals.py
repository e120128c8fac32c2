"""Stop signals: the first one saves and stops, the second one stops at once."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
from torch import Tensor

from openpae.runtime.signals import Stopped
from openpae.storage.model_folder import checkpoint_steps
from tests.engine.runs import LOOP, same, state_of, state_of_tiny, tiny_run


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_after_its_step_and_the_same_command_resumes(
    tmp_path: Path, signum: signal.Signals
) -> None:
    # One device batch a step: each sends the signal, and a second one would mean "now".
    loop = replace(LOOP, save_every=100, device_batch_size=None)
    handlers = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]

    def interrupting(step: int, loss: Tensor) -> Tensor:
        if step == 2 and not checkpoint_steps(tmp_path / "run"):
            os.kill(os.getpid(), signum)
        return loss

    whole = state_of_tiny(tmp_path / "whole", loop)
    with pytest.raises(
        Stopped, match=rf"stopped by {signum.name} after step 3; the same command goes on"
    ) as caught:
        tiny_run(tmp_path / "run", loop, spoil=interrupting)
    assert caught.value.signum == signum
    assert checkpoint_steps(tmp_path / "run") == [3]
    assert [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)] == handlers
    tiny_run(tmp_path / "run", loop, spoil=interrupting)
    assert same(state_of(tmp_path / "run"), whole)


def test_a_second_signal_stops_at_once(tmp_path: Path) -> None:
    def interrupting(step: int, loss: Tensor) -> Tensor:
        os.kill(os.getpid(), signal.SIGINT)
        return loss

    with pytest.raises(KeyboardInterrupt):
        tiny_run(tmp_path / "run", spoil=interrupting)
    assert checkpoint_steps(tmp_path / "run") == []
