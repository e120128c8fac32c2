"""Run a stage once: later calls return its record."""

from __future__ import annotations

import time
from typing import Any

import torch

from openpae.engine.checkpoints import forget_training
from openpae.runtime import processes
from openpae.runtime.device import pick_device
from openpae.storage.files import read_fields, write_json
from openpae.study import work
from openpae.study.stage import Stage, StageLayout, read_stage, settings_of


def run_stage(stage: Stage, layout: StageLayout, *, commit: str, quiet: bool = False) -> dict[str, Any]:
    """Run a stage, or return its record if it is done. Wait for another process at the same stage.

    Under torchrun every process must call it: they share training, caching and evaluation.

    Args:
        stage: a stage whose inputs are done.
        layout: the folders of stages.
        commit: version of the code, for the record.
        quiet: show no progress bars.

    Returns:
        The record: metrics, seconds (summed over interruptions), settings.

    Raises:
        Stopped: after a signal; the same call resumes the stage.
    """
    record = layout.record(stage.id)
    with layout.alone(stage.id):
        known = processes.on_rank0(lambda: read_stage(record) if record.is_file() else None)
        if known is not None:
            return known
        begun = layout.lock(stage.id).with_suffix(".seconds")
        spent = read_fields(begun, seconds=float)["seconds"] if begun.is_file() else 0.0
        start = time.perf_counter()
        try:
            metrics = work.WORK[stage.kind](stage, layout, quiet)
        finally:
            seconds = spent + time.perf_counter() - start
            if processes.is_rank0():
                write_json(begun, {"seconds": seconds})
        result = {
            "stage": stage.kind,
            "what": stage.label,
            "metrics": metrics,
            "seconds": seconds,
            "commit": commit,
            "threads": torch.get_num_threads(),
            "processes": processes.world_size(),
            "device": pick_device("auto").type,
            "inputs": dict(stage.inputs),
            "settings": settings_of(stage.settings),
        }

        def close() -> None:
            write_json(record, result)
            begun.unlink()
            if stage.kind in ("refiner", "tokenizer", "generator"):
                forget_training(layout.folder(stage.id))

        processes.on_rank0(close)
    return result
