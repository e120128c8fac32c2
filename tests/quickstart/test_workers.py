"""Candidates, timings, and functions in several processes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from openpae.engine.settings import LoopConfig
from openpae.quickstart import plans
from openpae.quickstart.workers import Workers, candidates, run_in, time_workers
from openpae.runtime import processes

LOOP = LoopConfig(steps=1, global_batch_size=32)


@pytest.fixture
def threads() -> int:
    return torch.get_num_threads()


@pytest.mark.parametrize(
    ("count", "expected"), [(1, [Workers()]), (2, [Workers(), Workers(threads=2), Workers(processes=2)])]
)
def test_the_candidates_keep_to_the_threads_that_torch_may_use(
    count: int, expected: list[Workers], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: count)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(count), raising=False)
    assert candidates(LOOP) == expected


def test_processes_divide_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(7), raising=False)
    assert candidates(LOOP) == [Workers(), Workers(threads=7), Workers(processes=4)]


def test_one_process_works_with_its_threads_and_gives_them_back(threads: int) -> None:
    assert run_in(Workers(threads=threads + 1), torch.get_num_threads) == threads + 1
    assert torch.get_num_threads() == threads


def sum_over_ranks(file: Path) -> tuple[int, int, float]:
    """Leaves a mark of each process."""
    file.with_name(f"{file.name}-{processes.rank()}").touch()
    total = processes.mean_of(torch.tensor(float(processes.rank()))) * processes.world_size()
    return processes.rank(), processes.world_size(), float(total)


def test_several_processes_call_the_function_together(tmp_path: Path) -> None:
    assert run_in(Workers(processes=2), sum_over_ranks, tmp_path / "seen") == (0, 2, 1.0)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["seen-0", "seen-1"]
    assert processes.world_size() == 1
    assert "TORCHELASTIC_RUN_ID" not in os.environ


@pytest.mark.assets
def test_a_timing_times_both_stages(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (speed,) = time_workers(plans.tokenizer_run(tmp_path, 0), plans.generator_run(tmp_path, 0))
    assert speed.workers == Workers()
    assert speed.tokenizer > 0
    assert speed.generator > 0
