"""The check of a device passes on a CPU, where its networks are tiny, and reports what is wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests import gpu_check
from tests.gpu import precision, training
from tests.gpu.outcome import NotRun, Outcome
from tests.gpu.precision import Network, compare_precisions
from tests.gpu.table import JSON, TABLE, table
from tests.gpu.worker import Result, Worker, result_of

CPU = torch.device("cpu")
NEEDS_CUDA = {
    *(f"no step waits: {stage}" for stage in training.STAGES),
    *(f"memory against plan: {name}" for name in ("refiner/dinov2-l", "tokenizer/dinov2-l-d32")),
    "memory against plan: generator/xl-80ep",
    "generator speed, compiled",
}


def test_a_cpu_passes(tmp_path: Path) -> None:
    command = [sys.executable, gpu_check.__file__, str(tmp_path / "out"), "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    data = json.loads((tmp_path / "out" / JSON).read_text(encoding="utf-8"))
    assert data["type"] == "cpu"
    assert data["versions"]["torch"]
    assert data["commit"]
    rows = {row["name"]: row for row in data["checks"]}
    assert {name for name, row in rows.items() if row["result"] == "not run"} == NEEDS_CUDA
    assert {rows[name]["reason"] for name in NEEDS_CUDA} == {"needs CUDA"}
    assert {row["result"] for name, row in rows.items() if name not in NEEDS_CUDA} == {"passed"}
    assert {f"bf16 against float32: {name}" for name in precision.NETWORKS} < rows.keys()
    assert {f"step: {stage}/tiny" for stage in training.STAGES} < rows.keys()
    assert rows["sampling speed, fast-45"]["figures"]["steps"] == 45
    page = (tmp_path / "out" / TABLE).read_text(encoding="utf-8")
    assert all(f"| {name} | {row['result']} |" in page for name, row in rows.items())


def test_a_check_without_time_is_stopped_and_the_others_are_not_started() -> None:
    worker = Worker("cpu", deterministic=False)
    name = worker.checks[0].name
    stopped = worker.run(name, 0)
    assert (stopped.result, stopped.reason) == ("not run", "no time left: stopped after 0 s")
    assert not worker.alive
    rest = list(gpu_check.run_checks(worker, "cpu", end=0))
    assert {row.reason for row in rest} == {"no time left"}
    assert len(rest) == len(worker.checks)


def test_a_device_that_is_missing_is_a_message(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():  # nothing is missing
        return
    assert gpu_check.main([str(tmp_path), "--device", "cuda"]) == 2
    assert "--device is cuda, but torch sees no GPU; use auto or cpu" in capfd.readouterr().err


def test_errors_and_problems_become_rows() -> None:
    def broken(_: torch.device) -> Outcome:
        raise RuntimeError("first line\nsecond line")

    def absent(_: torch.device) -> Outcome:
        raise NotRun("does not fit")

    def worse(_: torch.device) -> Outcome:
        return Outcome({"error": float("nan")}, ["a is wrong", "b | c"])

    failed = result_of("a", broken, CPU)
    assert (failed.result, failed.reason) == ("failed", "RuntimeError: first line")
    assert "second line" in failed.traceback
    assert result_of("b", absent, CPU) == Result("b", "not run", "does not fit")
    assert result_of("c", worse, CPU) == Result("c", "failed", "a is wrong; b | c", figures={"error": "nan"})
    page = table({}, [failed, result_of("c", worse, CPU)])
    assert "0 passed, 2 failed, 0 not run" in page
    assert r"| c | failed | 0.0 | error nan | a is wrong; b \| c |" in page


class Coarse(nn.Linear):
    """A layer that loses digits under autocast."""

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        return out + 0.1 * out.abs() if torch.is_autocast_enabled("cpu") else out


def test_a_network_that_is_worse_in_bfloat16_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    for layer, count in ((nn.Linear, 0), (Coarse, 2)):
        network = Network(module=layer(64, 64), inputs=(torch.randn(8, 64),))
        monkeypatch.setattr(precision, "NETWORKS", {"layer": lambda _, network=network: network})
        assert len(compare_precisions("layer", CPU).problems) == count


def test_a_resume_that_forgets_the_optimizer_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def forget(self: Any, state: Any) -> None:
        pass

    monkeypatch.setattr(torch.optim.Optimizer, "load_state_dict", forget)
    (problem,) = training.resume("generator", CPU).problems
    assert problem.startswith("the resumed run differs in exported.")
    assert problem.endswith("an uninterrupted run repeats to the bit")
