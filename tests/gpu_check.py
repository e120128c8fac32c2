"""What only a machine with a GPU can show, in one command of a few minutes:

    python tests/gpu_check.py OUT [--device auto|cuda|cpu] [--minutes 9]

It needs no data, no download and no pytest: networks have their published sizes and random weights. On a CPU
the sizes are tiny. OUT gets gpu_check.json and gpu_check.md: device, versions, commit, and for each check its
result and figures. The exit code is 1 if a check failed. docs/testing.md describes the checks.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from tests.gpu.table import summary, write
from tests.gpu.worker import Result, Worker

RESERVE = 10.0
"""Seconds of the given time that are kept for the end."""
LEAST = 5.0
"""A check with less time is not started."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all checks and write their results. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0] if __doc__ else None)
    parser.add_argument("out", type=Path, metavar="OUT", help="folder of the results")
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    parser.add_argument("--minutes", type=float, default=9.0, help="time for everything")
    options = parser.parse_args(arguments)
    start = time.monotonic()
    options.out.mkdir(parents=True, exist_ok=True)
    try:
        worker = Worker(options.device, deterministic=True)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    facts: dict[str, Any] = {
        "command": shlex.join(["python", "tests/gpu_check.py", *(arguments or sys.argv[1:])]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        **worker.facts,
    }
    results: list[Result] = []
    for result in run_checks(worker, options.device, start + 60 * options.minutes - RESERVE):
        results.append(result)
        print(f"{result.result:8} {result.seconds:6.1f} s  {result.name}  {result.reason}", flush=True)
        write(options.out, {**facts, "seconds": round(time.monotonic() - start, 1)}, results)
    print(f"{summary(results)}; {options.out}")
    return int(any(result.result == "failed" for result in results))


def run_checks(worker: Worker, device: str, end: float) -> Iterator[Result]:
    """Run the checks of a worker one by one until the time is over.

    Args:
        worker: the first process.
        device: for further processes.
        end: reading of time.monotonic at the end.
    """
    on_gpu = worker.facts["type"] == "cuda"
    try:
        for check in worker.checks:
            if end - time.monotonic() < LEAST:
                yield Result(check.name, "not run", "no time left")
                continue
            if not worker.alive or (on_gpu and worker.deterministic != check.deterministic):
                worker.stop()
                try:
                    worker = Worker(device, deterministic=check.deterministic)
                except ValueError as error:
                    yield Result(check.name, "failed", str(error))
                    continue
            yield worker.run(check.name, min(check.limit, end - time.monotonic()))
    finally:
        worker.stop()


if __name__ == "__main__":
    sys.exit(main())
