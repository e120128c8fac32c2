"""Steps of the presets, their memory against the plan, waiting steps, and resume."""

from __future__ import annotations

import gc
import math
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from openpae import config as configs
from openpae.bench.noise import random_images, random_latents
from openpae.engine.loop import trial_steps
from openpae.models.lpips import LPIPS
from openpae.plan.fakes import Run
from openpae.plan.trial import last_steps, planned_run
from openpae.storage.model_folder import checkpoint_path, checkpoint_steps
from openpae.train import tokenizer
from openpae.train.generator import GeneratorTask, train_generator
from openpae.train.refiner import RefinerTask, train_refiner
from openpae.train.tokenizer import TokenizerTask, train_tokenizer
from tests.gpu.outcome import NotRun, Outcome
from tests.gpu.tasks import (
    FULL,
    GIB,
    TINY,
    images_of,
    peak_figures,
    planned,
    preset,
    real_task,
    timed_steps,
)

PLAN = 0.05
"""Bound of the relative difference between the planned peak and the allocated one."""
STAGES: Mapping[str, tuple[Any, Any]] = {
    "refiner": (RefinerTask, train_refiner),
    "tokenizer": (TokenizerTask, train_tokenizer),
    "generator": (GeneratorTask, train_generator),
}


def step(name: str, device: torch.device) -> Outcome:
    """Take a step of a preset with all its losses, after one to warm up.

    Halves the device batch until it fits.

    Raises:
        NotRun: not one image fits.
    """
    run = preset(name)
    part: int | None = run.loop.device_batch_size or run.loop.global_batch_size
    while part is not None:
        outcome = _step(planned_run(run, device=device.type, device_batch_size=part), device)
        if outcome is not None:
            return outcome
        gc.collect()
        torch.cuda.empty_cache()
        smaller = (size for size in range(part // 2, 0, -1) if run.loop.global_batch_size % size == 0)
        part = next(smaller, None)
    raise NotRun("does not fit: not one image")


def _step(run: Run, device: torch.device) -> Outcome | None:
    """The outcome; None if the memory is not enough."""
    try:
        with real_task(run, device) as task:
            seconds, state = timed_steps(task, run, last_steps(run))
            weights = [weight for player in task.players.values() for weight in player.parameters()]
            finite = all(bool(weight.isfinite().all()) for weight in weights)
            skipped = state.health.longest.item()
    except torch.OutOfMemoryError:
        return None
    figures = {"device batch": run.loop.device_batch_size, "images/s": images_of(run) / seconds}
    problems = [] if finite and not skipped else ["a loss, a gradient or a weight is not finite"]
    return Outcome(figures | peak_figures(device), problems)


def memory(name: str, device: torch.device) -> Outcome:
    """Compare the peak of allocated memory in a step with that of `pae plan`.

    Raises:
        NotRun: there is no GPU.
    """
    if device.type != "cuda":
        raise NotRun("needs CUDA")
    run, trial = planned(name)
    run = planned_run(run, device="cuda")
    before = torch.cuda.memory_allocated(device)  # workspaces of libraries
    with real_task(run, device) as task:
        steps = trial_steps(task, run.optim, run.loop, last_steps(run))
        next(steps)
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        next(steps)
        torch.cuda.synchronize(device)
        measured = torch.cuda.max_memory_allocated(device) - before
        steps.close()  # type: ignore[attr-defined]
    share = trial.peak.total / measured - 1
    figures = {
        "device batch": trial.device_batch,
        "planned GiB": trial.peak.total / GIB,
        "peak GiB": measured / GIB,
        "planned/peak - 1": share,
    }
    wrong = f"the plan is {share:+.1%} from the peak, allowed are {PLAN:.0%}"
    return Outcome(figures, [] if abs(share) <= PLAN else [wrong])


def waits(stage: str, device: torch.device) -> Outcome:
    """Take two steps in which PyTorch raises an error if the host would wait for the GPU.

    Raises:
        NotRun: there is no GPU.
    """
    if device.type != "cuda":
        raise NotRun("needs CUDA")
    name = next(name for name in FULL if name.startswith(stage))
    run = planned_run(preset(name), device="cuda", global_batch_size=4, device_batch_size=2)
    with real_task(run, device) as task:
        last = run.loop.steps
        steps = trial_steps(task, run.optim, run.loop, range(last - 4, last))
        next(steps)
        next(steps)  # what is set up once is set up
        torch.cuda.set_sync_debug_mode("error")
        try:
            next(steps)
            next(steps)
        finally:
            torch.cuda.set_sync_debug_mode("default")
            steps.close()  # type: ignore[attr-defined]
    return Outcome({"preset": name})


def resume(stage: str, device: torch.device) -> Outcome:
    """Interrupt a run, continue it, and compare it to the bit with an uninterrupted run."""
    task, train = STAGES[stage]
    with tempfile.TemporaryDirectory() as name, _deterministic() as random_operations:
        folder = Path(name)
        run = _small_run(stage, folder, device)
        train(run, folder / "full", quiet=True)
        with _interrupted(task, step=3):
            train(run, folder / "resumed", quiet=True)
        at = checkpoint_steps(folder / "resumed")
        train(run, folder / "resumed", quiet=True)
        full, resumed = (_state(folder / part) for part in ("full", "resumed"))
        problems = [] if at == [2] else [f"the interrupted run left the checkpoints {at}, expected [2]"]
        if different := list(_differences(full, resumed)):
            train(run, folder / "again", quiet=True)
            repeats = not list(_differences(full, _state(folder / "again")))
            cause = "an uninterrupted run repeats to the bit" if repeats else "nor does a run repeat itself"
            problems.append(f"the resumed run differs in {', '.join(different[:5])}; {cause}")
    figures: dict[str, Any] = {"steps": run.loop.steps, "precision": run.loop.precision}
    if random_operations:
        figures["without deterministic algorithm"] = sorted(random_operations)
    return Outcome(figures, problems)


def _small_run(stage: str, folder: Path, device: torch.device) -> Run:
    """A tiny preset on random data with every loss that needs no refiner."""
    run: Any = preset(next(name for name in TINY if name.startswith(stage)))
    changes: dict[str, Any] = {
        "loop.device": device.type,
        "loop.precision": "bf16",
        "loop.steps": 6,
        "loop.save_every": 2,
        "loop.log_every": 1,
        "loop.global_batch_size": 4,
        "loop.device_batch_size": 2,
    }
    if stage == "generator":
        random_latents(folder / "latents", 8, run.model.latent_shape, classes=2)
        return configs.changed(run, changes | {"latents": str(folder / "latents")})
    shape = run.model.image_shape if stage == "tokenizer" else run.image_shape
    random_images(folder / "images", 8, shape)
    changes["data.images"] = str(folder / "images")
    return configs.changed(run, changes | (_LOSSES if stage == "tokenizer" else {}))


_LOSSES: dict[str, Any] = {
    "loss.lpips_net": "vgg",
    "loss.gan": 0.5,
    "loss.gan_start": 0.5,
    "loss.discriminator_start": 0.3,
    "loss.discriminator": {"kind": "patch", "width": 4, "num_layers": 2},
    "loss.mcr": 0.5,
}


class _Interruption(BaseException):
    """The end of an interrupted run. It is no Exception, so nothing catches it."""


@contextmanager
def _interrupted(task: Any, step: int) -> Iterator[None]:
    """Enter a context where training ends in the losses of a step."""
    updates = task.updates

    def ending(self: Any, batch: Any, draws: Any, at: int) -> Any:
        if at == step:
            raise _Interruption
        return updates(self, batch, draws, at)

    with mock.patch.object(task, "updates", ending):
        try:
            yield
        except _Interruption:
            return
    raise AssertionError(f"the run has no step {step}")


@contextmanager
def _deterministic() -> Iterator[set[str]]:
    """Enter a context of deterministic algorithms. Yields the operations that have none.

    Attention is computed by matrix products: its fused backward passes are deterministic only if every other
    operation is. VGG stands for AlexNet, whose pooling windows overlap.
    """
    cudnn = torch.backends.cudnn
    before = cudnn.deterministic
    operations: set[str] = set()
    with (
        warnings.catch_warnings(record=True) as caught,
        sdpa_kernel(SDPBackend.MATH),
        mock.patch.object(tokenizer, "load_perceptual", _vgg),
    ):
        warnings.simplefilter("always")
        torch.use_deterministic_algorithms(True, warn_only=True)
        cudnn.deterministic = True
        try:
            yield operations
        finally:
            torch.use_deterministic_algorithms(False)
            cudnn.deterministic = before
            texts = [str(warning.message) for warning in caught]
            operations |= {text.split()[0] for text in texts if "deterministic" in text}


def _vgg(*_: Any) -> LPIPS:
    return LPIPS("vgg")


def _state(run_dir: Path) -> dict[str, Any]:
    """The newest checkpoint of a run: exported weights, players, optimizers, average."""
    folder = checkpoint_path(run_dir, checkpoint_steps(run_dir)[-1])
    state = torch.load(folder / "state.pt", weights_only=True, map_location="cpu")
    return {"exported": load_file(folder / "model.safetensors"), **state}


def _differences(a: Any, b: Any, at: str = "") -> Iterator[str]:
    """The paths of the values that are not equal to the bit."""
    if isinstance(a, Mapping) and isinstance(b, Mapping) and a.keys() == b.keys():
        for key in a:
            yield from _differences(a[key], b[key], f"{at}.{key}" if at else str(key))
    elif isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        for number, pair in enumerate(zip(a, b, strict=True)):
            yield from _differences(*pair, f"{at}.{number}")
    elif isinstance(a, Tensor) and isinstance(b, Tensor):
        if a.dtype != b.dtype or not torch.equal(a, b):
            yield at
    elif a != b and not (isinstance(a, float) and math.isnan(a) and b != b):
        yield at
