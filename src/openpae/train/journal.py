"""What a run writes down: log.jsonl, TensorBoard, and the first value that is not finite."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from openpae.storage import whole_file
from openpae.train.settings import LoopConfig
from openpae.train.task import Update


@dataclass
class Journal:
    """log.jsonl and TensorBoard; sums stay on the device until a line is due, so no step waits for them."""

    run_dir: Path
    start: int
    loop: LoopConfig
    sums: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    first_bad: Tensor | None = None

    def __enter__(self) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.file = self.run_dir / "log.jsonl"
        if self.file.is_file():  # what was logged after the checkpoint happens again
            lines = [line for line in read_log(self.run_dir) if line["step"] <= self.start]
            with whole_file(self.file) as partial:
                partial.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        self.board = SummaryWriter(str(self.run_dir / "tensorboard"), purge_step=self.start + 1)
        self.clock, self.clock_step = time.perf_counter(), self.start

    def __exit__(self, *_: object) -> None:
        self.board.close()

    def add(self, step: int, update: Update) -> None:
        """Take in an update before its step; on a CPU a loss that is not finite stops here."""
        terms = {f"{update.player}/{name}": value for name, value in update.logs.items()}
        terms = {f"{update.player}/loss": update.loss.detach(), **terms}
        self.check(step, update.loss.detach(), terms)
        for name, value in terms.items():
            self.keep(name, value)

    def check(self, step: int, value: Tensor, terms: Mapping[str, Tensor]) -> None:
        """Stop if a value is not finite: on a CPU now, on a GPU with the next line, as nothing may wait."""
        if value.device.type == "cpu":
            if not value.isfinite():
                raise _not_finite(step, terms)
        else:
            bad = torch.where(value.isfinite(), math.inf, float(step))
            self.first_bad = bad if self.first_bad is None else torch.minimum(self.first_bad, bad)

    def require_finite(self) -> None:
        """Stop if a step since the last line was not finite; on a GPU this waits for the steps so far."""
        if self.first_bad is not None and math.isfinite(bad := self.first_bad.item()):
            means = {name: value / self.counts[name] for name, value in self.sums.items()}
            raise _not_finite(int(bad), means)

    def keep(self, name: str, value: Tensor) -> None:
        """Add to the mean of the next line."""
        value = value.detach().float()
        self.sums[name] = self.sums[name] + value if name in self.sums else value
        self.counts[name] = self.counts.get(name, 0) + 1

    def flush(self, step: int, lr: float) -> dict[str, float]:
        """Write the means since the last line; one read from the device. Returns them."""
        if not self.sums:
            return {}
        self.require_finite()
        values = torch.stack(list(self.sums.values())).tolist()
        means = {name: value / self.counts[name] for name, value in zip(self.sums, values, strict=True)}
        self.sums.clear()
        self.counts.clear()
        now = time.perf_counter()
        images = (step - self.clock_step) * self.loop.global_batch_size
        rate = {"lr": lr, "images_per_second": images / (now - self.clock)}
        self.clock, self.clock_step = now, step
        self.write(step, means | rate)
        return means

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Append one line."""
        line = {"step": step, "images_seen": step * self.loop.global_batch_size, **values}
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        for name, value in values.items():
            self.board.add_scalar(name, value, step)


def read_log(run_dir: Path) -> list[dict[str, float]]:
    """The lines of a run's log.jsonl; a last line cut off by a kill is left out."""
    lines = []
    for text in (run_dir / "log.jsonl").read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines


def _not_finite(step: int, terms: Mapping[str, Tensor]) -> FloatingPointError:
    named = [f"{name} = {value.item()}" for name, value in terms.items() if not value.isfinite()]
    return FloatingPointError(
        f"training is not finite at step {step}: {', '.join(named) or 'no single term'}; "
        "nothing was saved after it: lower optim.lr, set optim.clip, or use loop.precision fp32"
    )
