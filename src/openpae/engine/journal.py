"""The logs of a run: log.jsonl, trackers and an optional profile."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, schedule

from openpae.engine.settings import PROFILED_FROM, LoopConfig
from openpae.engine.trackers import Tracker, open_trackers
from openpae.runtime import processes
from openpae.runtime.cards import card_of
from openpae.runtime.device import device_name, peak_gib
from openpae.storage.files import atomic_file, explain_disk_full


class Journal:
    """Writes log.jsonl and feeds trackers. Sums stay on the device until a line is due: no step synchronises.

    Every rank keeps its sums; rank 0 writes the means over all ranks.

    Args:
        run_dir: folder of the logs.
        start: steps done; later log lines are removed.
        loop: settings of the run.
        operations: of one image in a step, forward and backward; with them the log has their rate.
    """

    def __init__(self, run_dir: Path, start: int, loop: LoopConfig, operations: float | None = None) -> None:
        self.run_dir, self.start, self.loop, self.operations = run_dir, start, loop, operations
        self.trackers: list[Tracker] = []
        self.file = run_dir / "log.jsonl"
        self.sums: dict[str, Tensor] = {}
        self.numbers: dict[str, int | Tensor] = {}
        self.counts: dict[str, int | Tensor] = {}
        self.evaluated = False
        """Whether the log holds an evaluation of the step `start`; rank 0 knows it."""

    def __enter__(self) -> None:
        self.clock, self.clock_step = time.perf_counter(), self.start
        if not processes.is_rank0():
            return
        seen: set[tuple[int, str]] = set()
        if self.file.is_file():
            old = read_log(self.run_dir)
            seen = {(int(line["step"]), name) for line in old for name in line}
            lines = [line for line in old if line["step"] <= self.start]
            last = [line for line in lines if line["step"] == self.start]
            self.evaluated = any(name.startswith("eval/") for line in last for name in line)
            with atomic_file(self.file) as partial:
                partial.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        with explain_disk_full(self.file):
            self.trackers = open_trackers(self.loop.track, self.run_dir, self.start, seen)

    def __exit__(self, *_: object) -> None:
        for tracker in self.trackers:
            tracker.close()

    def keep(self, name: str, value: Tensor) -> None:
        """Add a value to the mean of the next line. With `skip`, values that are not finite do not count."""
        value = value.detach().float()
        number: int | Tensor = 1
        if self.loop.on_nonfinite == "skip":
            number = value.isfinite().float()
            value = torch.where(number > 0, value, 0)
        self.sums[name] = self.sums[name] + value if name in self.sums else value
        self.numbers[name] = self.numbers.get(name, 0) + number

    def count(self, name: str, value: int | Tensor) -> None:
        """Add to the count of the next line, summed over all ranks."""
        self.counts[name] = self.counts.get(name, 0) + value

    def means(self) -> dict[str, Tensor]:
        """This rank's means since the last line, on the device."""
        return {name: value / self.numbers[name] for name, value in self.sums.items()}

    def flush(self, step: int, lr: float) -> dict[str, float]:
        """Write and return the means since the last line. It reads from the device once."""
        if not self.sums:
            return {}
        kept = (self.sums, self.numbers, self.counts)
        device = next(iter(self.sums.values())).device
        column = [torch.as_tensor(x, dtype=torch.float32, device=device) for d in kept for x in d.values()]
        read = iter(processes.mean_of(torch.stack(column)).tolist())
        sums, numbers, counts = ({name: next(read) for name in values} for values in kept)
        means = {name: sums[name] / numbers[name] for name in sums if numbers[name]}
        totals = {name: count * processes.world_size() for name, count in counts.items()}
        for values in kept:
            values.clear()
        now = time.perf_counter()
        images = (step - self.clock_step) * self.loop.global_batch_size
        speed = images / (now - self.clock)
        self.clock, self.clock_step = now, step
        shown = {"lr": lr, "images_per_second": speed, "peak_memory_gib": peak_gib(device)}
        self.write(step, means | totals | shown | self._operations(speed, device))
        return means

    def _operations(self, images_per_second: float, device: torch.device) -> dict[str, float]:
        """Operations per second over all ranks, and their share of what the cards can do."""
        if self.operations is None:
            return {}
        done = self.operations * images_per_second
        rates = {"teraflops": done / 1e12}
        card = card_of(device_name(device))
        if card is not None and (peak := card.peak(self.loop.precision)) is not None:
            rates["model_flops_utilisation"] = done / (peak * processes.world_size())
        return rates

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Append one line."""
        if not processes.is_rank0():
            return
        line = {"step": step, "images_seen": step * self.loop.global_batch_size, **values}
        with explain_disk_full(self.file):
            with self.file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            for tracker in self.trackers:
                tracker.add(step, values)

    def picture(self, step: int, picture: Image.Image) -> None:
        """Write run_dir/evaluations/step-N.png, and show it in the trackers. Only rank 0 may call it."""
        folder = self.run_dir / "evaluations"
        folder.mkdir(exist_ok=True)
        with atomic_file(folder / f"step-{step:08d}.png") as partial:
            picture.save(partial, "PNG")
        for tracker in self.trackers:
            tracker.add_picture(step, "eval/pictures", picture)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Inside, the clock of images per second stands still."""
        start = time.perf_counter()
        yield
        self.clock += time.perf_counter() - start


def read_log(run_dir: Path) -> list[dict[str, float]]:
    """Read the lines of a run's log.jsonl, without a truncated last line.

    Raises:
        ValueError: a line holds no step, or a value that is no number.
    """
    lines: list[dict[str, float]] = []
    for text in (run_dir / "log.jsonl").read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            break
        numbers = isinstance(line, dict) and all(isinstance(value, int | float) for value in line.values())
        if not numbers or type(line.get("step")) is not int:
            raise ValueError(
                f"{run_dir / 'log.jsonl'} is damaged: line {len(lines) + 1} must hold a step and numbers; "
                "remove it"
            )
        lines.append(line)
    return lines


@contextmanager
def profiled(run_dir: Path, loop: LoopConfig) -> Iterator[Callable[[], None]]:
    """Inside, PyTorch's profiler records `profile_steps` steps. Call the yielded function after each step.

    Rank 0 writes run_dir/profile/trace.json (for chrome://tracing or Perfetto) and table.txt.
    """
    if not loop.profile_steps or not processes.is_rank0():
        yield lambda: None
        return
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)

    def write(profiler: profile) -> None:
        folder = run_dir / "profile"
        folder.mkdir(exist_ok=True)
        profiler.export_chrome_trace(str(folder / "trace.json"))
        kind = "cuda" if torch.cuda.is_available() else "cpu"
        table = profiler.key_averages().table(sort_by=f"self_{kind}_time_total", row_limit=40)
        (folder / "table.txt").write_text(table + "\n", encoding="utf-8")

    window = schedule(wait=PROFILED_FROM - 1, warmup=1, active=loop.profile_steps, repeat=1)
    with profile(activities=activities, schedule=window, on_trace_ready=write) as profiler:
        yield profiler.step
