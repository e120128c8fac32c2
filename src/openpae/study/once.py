"""Do a stage once: whoever comes second takes the record of the first."""

from __future__ import annotations

import time
from typing import Any

import torch

from openpae.engine.checkpoints import forget_training
from openpae.runtime import processes
from openpae.runtime.device import pick_device
from openpae.storage.files import read_json, write_json
from openpae.study import work
from openpae.study.stage import Stage, StageLayout, settings_of


def run_stage(stage: Stage, places: StageLayout, *, commit: str, quiet: bool = False) -> dict[str, Any]:
    """Do a stage, or take what is there; another process at the same stage is waited for.

    Under torchrun every process must call it: they share the work of training, caching and judging.

    Args:
        stage: its inputs are done.
        places: where.
        commit: which code does it; goes into the record.
        quiet: no progress bars.

    Returns:
        Its record: metrics, seconds (over interruptions), settings.

    Raises:
        What its library functions raise; `Stopped` among them, after which the same call goes on.
    """
    record = places.record(stage.id)
    with places.alone(stage.id):
        if (known := processes.on_rank0(lambda: read_json(record) if record.is_file() else None)) is not None:
            return known
        begun = places.lock(stage.id).with_suffix(".seconds")
        spent = read_json(begun)["seconds"] if begun.is_file() else 0.0
        start = time.perf_counter()
        try:
            metrics = work.WORK[stage.kind](stage, places, quiet)
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
                forget_training(places.folder(stage.id))

        processes.on_rank0(close)
    return result
