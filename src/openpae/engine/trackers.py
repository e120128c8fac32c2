"""Trackers: TensorBoard, Weights & Biases and trackio show the numbers of log.jsonl, and pictures."""

from __future__ import annotations

import io
import os
import time
import uuid
import warnings
from collections.abc import Callable, Collection, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import yaml
from PIL import Image

from openpae.engine.settings import TrackerName
from openpae.runtime.extras import needs
from openpae.storage.files import atomic_file


class Tracker(Protocol):
    """Shows the values and the pictures of one run. Rank 0 has it."""

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Show the values of a step."""
        ...

    def add_picture(self, step: int, name: str, picture: Image.Image) -> None:
        """Show a picture of a step."""
        ...

    def close(self) -> None:
        """End the tracker. It gets no more values."""
        ...


def open_trackers(
    names: Collection[TrackerName] | None,
    run_dir: Path,
    start: int,
    seen: Collection[tuple[int, str]] = (),
) -> list[Tracker]:
    """Open the trackers of a run, at its first step or where it resumes.

    Args:
        names: the trackers; None takes TensorBoard if it is installed.
        run_dir: the run folder. Its name is the name of the run.
        start: steps done.
        seen: (step, name) of the values that were shown before; a resumed run does not show them twice.

    Raises:
        MissingExtra: the package of a tracker is not installed.
    """
    default: tuple[TrackerName, ...] = ("tensorboard",) if find_spec("tensorboard") else ()
    online: dict[str, Callable[[Path], Tracker]] = {"wandb": _WandB, "trackio": _Trackio}
    opened: list[Tracker] = []
    for name in dict.fromkeys(default if names is None else names):
        with needs("train" if name == "tensorboard" else name, f"loop.track = {name}"):
            if name == "tensorboard":
                opened.append(_Board(run_dir / "tensorboard", start + 1))
            else:
                opened.append(_Guarded(name, online[name](run_dir), frozenset(seen)))
    return opened


class _Board:
    """Writes the TensorBoard file of one run synchronously.

    TensorBoard's own writer uses a thread, which dies on a full disk with a traceback that names no file.
    """

    def __init__(self, folder: Path, first_step: int) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary.writer.record_writer import RecordWriter

        folder.mkdir(exist_ok=True)
        name = f"events.out.tfevents.{time.time_ns()}.{os.getpid()}"
        self.file = (folder / name).open("wb", buffering=0)  # buffered, close() would write again
        self.records = RecordWriter(self.file)
        start = Event(step=first_step, session_log=SessionLog(status=SessionLog.START))  # hides later steps
        for event in (Event(file_version="brain.Event:2"), start):
            self._write(event)

    def add(self, step: int, values: Mapping[str, float]) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        self._show(step, [Summary.Value(tag=name, simple_value=value) for name, value in values.items()])

    def add_picture(self, step: int, name: str, picture: Image.Image) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        buffer = io.BytesIO()
        picture.save(buffer, "PNG")
        image = Summary.Image(
            height=picture.height,
            width=picture.width,
            colorspace=3,  # RGB
            encoded_image_string=buffer.getvalue(),
        )
        self._show(step, [Summary.Value(tag=name, image=image)])

    def close(self) -> None:
        self.file.close()

    def _show(self, step: int, values: list[Any]) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        self._write(Event(step=step, summary=Summary(value=values)))

    def _write(self, event: Any) -> None:
        event.wall_time = time.time()
        self.records.write(event.SerializeToString())


class _WandB:
    """A run of Weights & Biases. WANDB_PROJECT names its project; WANDB_MODE=offline keeps it on disk."""

    def __init__(self, run_dir: Path) -> None:
        import wandb

        self.package = wandb
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "openpae"),
            name=run_dir.name,
            id=_run_id(run_dir),
            resume="allow",
            dir=str(run_dir),
            config=_config_of(run_dir),
        )

    def add(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log(dict(values), step=step)

    def add_picture(self, step: int, name: str, picture: Image.Image) -> None:
        self.run.log({name: self.package.Image(picture)}, step=step)

    def close(self) -> None:
        self.run.finish()


class _Trackio:
    """A run of trackio. TRACKIO_PROJECT names its project."""

    def __init__(self, run_dir: Path) -> None:
        import trackio

        self.package = trackio
        trackio.init(
            project=os.environ.get("TRACKIO_PROJECT", "openpae"),
            name=f"{run_dir.name}-{_run_id(run_dir)}",
            resume="allow",
            config=_config_of(run_dir),
        )

    def add(self, step: int, values: Mapping[str, float]) -> None:
        self.package.log(dict(values), step=step)

    def add_picture(self, step: int, name: str, picture: Image.Image) -> None:
        self.package.log({name: self.package.Image(picture)}, step=step)

    def close(self) -> None:
        self.package.finish()


class _Guarded:
    """A tracker whose failure costs no training: the first one is a warning, and it gets no more values."""

    def __init__(self, name: str, tracker: Tracker, seen: Collection[tuple[int, str]]) -> None:
        self.name, self.seen = name, seen
        self.tracker: Tracker | None = tracker

    def add(self, step: int, values: Mapping[str, float]) -> None:
        if new := {name: value for name, value in values.items() if (step, name) not in self.seen}:
            self._call(lambda tracker: tracker.add(step, new))

    def add_picture(self, step: int, name: str, picture: Image.Image) -> None:
        if not any(at == step and value.startswith("eval/") for at, value in self.seen):
            self._call(lambda tracker: tracker.add_picture(step, name, picture))

    def close(self) -> None:
        self._call(lambda tracker: tracker.close())

    def _call(self, action: Callable[[Tracker], None]) -> None:
        if self.tracker is None:
            return
        try:
            action(self.tracker)
        except Exception as error:  # any fault of a network or of a foreign package
            self.tracker = None
            warnings.warn(
                f"{self.name} failed ({type(error).__name__}: {error}); the run goes on without it, and "
                "log.jsonl holds all values",
                stacklevel=2,
            )


def _run_id(run_dir: Path) -> str:
    """An identifier that a run folder keeps, so that a resumed run goes on in the same curve."""
    file = run_dir / "tracker-id"
    if not file.is_file():
        with atomic_file(file) as partial:
            partial.write_text(uuid.uuid4().hex[:12] + "\n", encoding="utf-8")
    return file.read_text(encoding="utf-8").strip()


def _config_of(run_dir: Path) -> dict[str, Any]:
    file = run_dir / "config.yaml"
    return yaml.safe_load(file.read_text(encoding="utf-8")) if file.is_file() else {}
