"""Trackers get the values of log.jsonl once, a picture at each evaluation, and cost no training."""

from __future__ import annotations

import io
import sys
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from openpae.engine.journal import Journal, read_log
from openpae.engine.settings import LoopConfig, TrackerName
from openpae.engine.trackers import open_trackers
from openpae.runtime.extras import MissingExtra
from tests.engine.runs import LOOP, OPTIM, Tiny, fit

RED = Image.new("RGB", (6, 4), (200, 10, 20))


class Service:
    """A package in place of wandb or trackio. It notes its calls, and fails from call `fails_at` on."""

    def __init__(self, fails_at: int = 10**9) -> None:
        self.opened: list[dict[str, Any]] = []
        self.values: list[tuple[int, dict[str, Any]]] = []
        self.ended = 0
        self.fails_at = fails_at

    def init(self, **arguments: Any) -> Service:
        self.opened.append(arguments)
        return self

    def log(self, values: dict[str, Any], step: int) -> None:
        if len(self.values) >= self.fails_at:
            raise ConnectionError("no route to host")
        self.values.append((step, values))

    def finish(self) -> None:
        self.ended += 1

    def Image(self, picture: Image.Image) -> tuple[int, int]:
        return picture.size


def installed(monkeypatch: pytest.MonkeyPatch, name: str, service: Service) -> Service:
    module = types.ModuleType(name)
    for attribute in ("init", "log", "finish", "Image"):
        setattr(module, attribute, getattr(service, attribute))
    monkeypatch.setitem(sys.modules, name, module)
    return service


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_service_gets_what_the_log_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: TrackerName
) -> None:
    service = installed(monkeypatch, name, Service())
    (tmp_path / "config.yaml").write_text("loop:\n  steps: 10\n")
    loop = LoopConfig(steps=10, global_batch_size=4, track=(name,))
    log = Journal(tmp_path, 0, loop)
    with log:
        log.write(2, {"loss": 0.5})
        log.picture(2, RED)
    (opened,) = service.opened
    assert opened["config"] == {"loop": {"steps": 10}}
    assert opened["resume"] == "allow"
    assert service.values == [(2, {"loss": 0.5}), (2, {"eval/pictures": (6, 4)})]
    assert service.ended == 1
    assert not (tmp_path / "tensorboard").exists()


@pytest.mark.parametrize(("name", "identity"), [("wandb", "id"), ("trackio", "name")])
def test_a_resumed_run_goes_on_in_the_same_curve_without_repeats(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: TrackerName, identity: str
) -> None:
    service = installed(monkeypatch, name, Service())
    loop = LoopConfig(steps=10, global_batch_size=4, track=(name,))
    first = Journal(tmp_path, 0, loop)
    with first:
        first.write(2, {"loss": 0.5})
        first.write(4, {"loss": 0.25})  # after the last checkpoint
    second = Journal(tmp_path, 2, loop)
    with second:
        second.write(2, {"eval/psnr": 20.0})  # the kill came before the evaluation
        second.write(4, {"loss": 0.25})
        second.write(6, {"loss": 0.125})
        second.picture(6, RED)
    third = Journal(tmp_path, 6, loop)
    with third:  # the evaluation of step 2 is in the log, that of step 6 is not
        third.picture(2, RED)
        third.picture(6, RED)
    pictures = [step for step, values in service.values if "eval/pictures" in values]
    service.values = [call for call in service.values if "eval/pictures" not in call[1]]
    assert pictures == [6, 6]
    assert [call for call in service.values if call[0] > 0] == [
        (2, {"loss": 0.5}),
        (4, {"loss": 0.25}),
        (2, {"eval/psnr": 20.0}),
        (6, {"loss": 0.125}),
    ]
    assert service.opened[0][identity] == service.opened[1][identity]
    other = tmp_path / "other"
    other.mkdir()
    with Journal(other, 0, loop):
        pass
    assert service.opened[3][identity] != service.opened[0][identity]


def test_a_service_that_fails_costs_no_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    service = installed(monkeypatch, "wandb", Service(fails_at=1))
    log = Journal(tmp_path, 0, LoopConfig(steps=10, global_batch_size=4, track=("wandb",)))
    with log:
        log.write(2, {"loss": 0.5})
        with pytest.warns(UserWarning, match=r"wandb failed \(ConnectionError: no route to host\)"):
            log.write(4, {"loss": 0.25})
        log.write(6, {"loss": 0.125})
    assert [step for step, _ in service.values] == [2]
    assert [line["step"] for line in read_log(tmp_path)] == [2, 4, 6]


@pytest.mark.parametrize("name", ["wandb", "trackio", "tensorboard"])
def test_a_tracker_that_is_not_installed_is_one_line_before_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: TrackerName
) -> None:
    for module in [module for module in sys.modules if module.partition(".")[0] == name]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingExtra, match=rf"loop\.track = {name} needs {name}; install it with"):
        open_trackers((name,), tmp_path, 0)


def test_an_empty_list_tracks_nowhere(tmp_path: Path) -> None:
    with Journal(tmp_path, 0, LoopConfig(steps=10, global_batch_size=4, track=())) as _:
        pass
    assert not (tmp_path / "tensorboard").exists()


class Pictured(Tiny):
    """A task with a picture of one colour a step."""

    def picture(self) -> Any:
        return RED


def test_each_evaluation_leaves_a_picture_in_the_folder_and_in_tensorboard(tmp_path: Path) -> None:
    loop = replace(LOOP, save_every=100, evaluate_every=4)
    fit(Pictured(loop), tmp_path, OPTIM, loop, quiet=True)
    board = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"images": 0})
    board.Reload()
    events = board.Images("eval/pictures")
    assert [event.step for event in events] == [4, 6]
    for step, event in zip((4, 6), events, strict=True):
        shown = Image.open(io.BytesIO(event.encoded_image_string))
        kept = Image.open(tmp_path / "evaluations" / f"step-{step:08d}.png")
        assert shown.size == kept.size == (event.width, event.height) == RED.size
        assert shown.tobytes() == kept.tobytes() == RED.tobytes()


def test_operations_become_a_rate_and_on_a_known_card_a_share(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = "NVIDIA H100 80GB HBM3"
    cases = [("a CPU", "bf16", None), (card, "bf16", 989), (card, "fp32", 67), (card, "tf32", None)]
    for number, (name, precision, peak) in enumerate(cases):
        monkeypatch.setattr("openpae.engine.journal.device_name", lambda _, name=name: name)
        folder = tmp_path / str(number)
        folder.mkdir()
        loop = replace(LOOP, precision=precision)  # type: ignore[arg-type]
        fit(Tiny(loop), folder, OPTIM, loop, quiet=True, operations=2e9)
        line = read_log(folder)[0]
        assert line["teraflops"] == pytest.approx(2e9 * line["images_per_second"] / 1e12)
        share = None if peak is None else pytest.approx(line["teraflops"] / peak)
        assert line.get("model_flops_utilisation") == share
