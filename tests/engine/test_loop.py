"""The engine's contract: resumed is uninterrupted, parts are the whole, what is not finite is not kept."""

from __future__ import annotations

import json
import math
import os
import pickle
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from openpae import config as configs
from openpae.data.images import ImageFolder, PackedImages
from openpae.data.settings import ImageData
from openpae.data.shard_writer import ShardWriter
from openpae.data.shards import Shards
from openpae.data.training import TrainingLatents
from openpae.engine import checkpoints
from openpae.engine import loop as loop_module
from openpae.engine.ema import Ema
from openpae.engine.health import NonFiniteGuard
from openpae.engine.journal import read_log
from openpae.engine.loop import fit, seconds_per_step
from openpae.engine.optim import adamw
from openpae.engine.run_folder import open_run
from openpae.engine.settings import LoopConfig, OptimConfig, lr_at
from openpae.engine.task import Task, Update
from openpae.models.configs import DiscriminatorConfig, LightningDiTConfig, PAEConfig
from openpae.models.encoders import encoder_fingerprint, load_encoder
from openpae.models.saved import load_generator, load_tokenizer
from openpae.objective.settings import TokenizerLoss
from openpae.runtime.device import pick_device
from openpae.runtime.draws import Draws
from openpae.runtime.signals import Stopped
from openpae.storage.files import file_hash, write_json
from openpae.storage.model_folder import checkpoint_path, checkpoint_steps, identity_of
from openpae.train.generator import GeneratorTask, train_generator
from openpae.train.settings import GeneratorRun, TokenizerRun
from openpae.train.tokenizer import TokenizerTask, train_tokenizer
from tests.by_hand import double_precision
from tests.conftest import kill_points

OPTIM = OptimConfig(lr=1e-3, final_lr=1e-4, warmup_steps=2, weight_decay=0.1, clip=1.0)
LOOP = LoopConfig(
    steps=6,
    global_batch_size=4,
    device_batch_size=2,
    precision="fp32",
    device="cpu",
    ema_decay=0.8,
    log_every=3,
    save_every=2,
)
STAGES = ["tokenizer", "generator"]
L1_ONLY = TokenizerLoss(lpips=0.0, lpips_net="random", gan=0.0, ssr=0.0, mcr=0.0, scr=0.0)


class Killed(BaseException):
    """The process is gone: not an Exception, so that nothing may catch it."""


class Numbers(NamedTuple):
    """A device batch of the tiny task."""

    x: Tensor
    y: Tensor


class Tiny:
    """Linear regression that a step takes a tenth of a millisecond of.

    Args:
        loop: says how the data are cut.
        spoil: (step, loss) -> loss, to put faults in.
    """

    def __init__(
        self, loop: LoopConfig = LOOP, spoil: Callable[[int, Tensor], Tensor] = lambda _, loss: loss
    ) -> None:
        torch.manual_seed(loop.seed)
        self.loop, self.spoil = loop, spoil
        self.model = nn.Linear(3, 2)
        self.model.register_buffer("count", torch.zeros(()))
        self.players: Mapping[str, nn.Module] = {"model": self.model}
        self.optimizers = {"model": adamw(self.model, OPTIM)}
        self.inputs: Mapping[str, str] = {"numbers": "1"}
        self.judged: list[tuple[int, dict[str, Tensor], bool, bool]] = []

    def batches(self, steps: range) -> Iterable[Numbers]:
        part = self.loop.device_batch_size or self.loop.global_batch_size
        for step in steps:
            g = torch.Generator().manual_seed(step)
            x = torch.randn(self.loop.global_batch_size, 3, generator=g)
            for start in range(0, len(x), part):
                yield Numbers(x[start : start + part], x[start : start + part, :2].sin())

    def updates(self, batch: Numbers, draws: Draws, step: int) -> Iterator[Update]:
        self.model.count += 1  # type: ignore[operator]
        noise = 0.01 * draws.normal("noise", 2)
        loss = (self.model(batch.x) + noise - batch.y).square().mean()
        yield Update("model", self.spoil(step, loss), {"error": loss.detach(), "size": batch.x.abs().mean()})

    def evaluate(self, step: int) -> dict[str, float]:
        weights = {name: value.clone() for name, value in self.model.state_dict().items()}
        self.judged.append((step, weights, self.model.training, torch.is_grad_enabled()))
        return {"bias": float(self.model.bias.sum())}

    def write(self, folder: Path, weights: Mapping[str, Tensor]) -> None:
        save_file(dict(weights), folder / "model.safetensors")


def tiny_run(run_dir: Path, loop: LoopConfig = LOOP, **changes: Any) -> Tiny:
    """A tiny task, trained."""
    run_dir.mkdir(exist_ok=True)
    task = Tiny(loop, **changes)
    fit(task, run_dir, OPTIM, loop, quiet=True)
    return task


@pytest.fixture
def tokenizer_run(tiny_config: PAEConfig, image_folder: Path) -> TokenizerRun:
    """Random crops from files, L1 + LPIPS, accumulation, clipping, schedule and EMA."""
    data = ImageData(images=image_folder, evaluation=image_folder, evaluation_images=3, resize=36)
    loss = replace(L1_ONLY, lpips=1.0)
    return TokenizerRun(model=tiny_config, data=data, loss=loss, optim=OPTIM, loop=LOOP)


@pytest.fixture
def generator_run(tiny_dit_config: LightningDiTConfig, latents: Shards) -> GeneratorRun:
    model = replace(tiny_dit_config, class_dropout=0.3)
    return GeneratorRun(
        model=model, latents=latents.folder, held_out_latents=latents.folder, optim=OPTIM, loop=LOOP
    )


@pytest.fixture
def runs(tokenizer_run: TokenizerRun, generator_run: GeneratorRun) -> dict[str, Any]:
    return {"tokenizer": tokenizer_run, "generator": generator_run}


def train(run: Any, run_dir: Path) -> dict[str, float]:
    start = train_tokenizer if isinstance(run, TokenizerRun) else train_generator
    return start(run, run_dir, quiet=True)


def task_of(run: Any) -> Any:
    return TokenizerTask(run) if isinstance(run, TokenizerRun) else GeneratorTask(run)


def train_until(run: Any, run_dir: Path, step: int) -> None:
    """Train, and die while the losses of this step are computed."""
    open_run(run_dir, run)
    task = task_of(run)
    updates = task.updates

    def dying(batch: Any, draws: Draws, now: int) -> Iterator[Update]:
        if now == step:
            raise Killed
        return updates(batch, draws, now)

    task.updates = dying
    with pytest.raises(Killed):
        fit(task, run_dir, run.optim, run.loop, quiet=True)


def with_loop(run: Any, **changes: Any) -> Any:
    return replace(run, loop=replace(run.loop, **changes))


def state_of(run_dir: Path) -> Any:
    """All that the newest checkpoint knows: exported weights, players, optimizers, average."""
    folder = checkpoint_path(run_dir, checkpoint_steps(run_dir)[-1])
    return {
        # Copied: the file is mapped, and some tests spoil it.
        "exported": {name: value.clone() for name, value in load_file(folder / "model.safetensors").items()},
        **torch.load(folder / "state.pt", weights_only=True),
    }


def same(a: Any, b: Any) -> bool:
    """Equal to the bit, however nested."""
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, Mapping):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def curve(run_dir: Path) -> list[dict[str, float]]:
    """The log without what the clock says."""
    return [
        {key: value for key, value in line.items() if key != "images_per_second"}
        for line in read_log(run_dir)
    ]


# Resumed is uninterrupted


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", STAGES)
def test_a_resumed_run_equals_the_uninterrupted_one(
    runs: dict[str, Any], tmp_path: Path, stage: str, precision: str
) -> None:
    """To the bit, twice interrupted: before the first checkpoint, and between two."""
    run = with_loop(runs[stage], precision=precision)
    metrics = train(run, tmp_path / "whole")
    train_until(run, tmp_path / "resumed", 1)
    assert checkpoint_steps(tmp_path / "resumed") == []
    train_until(run, tmp_path / "resumed", 5)
    assert checkpoint_steps(tmp_path / "resumed") == [2, 4]
    assert train(run, tmp_path / "resumed") == metrics
    assert same(state_of(tmp_path / "resumed"), state_of(tmp_path / "whole"))
    assert curve(tmp_path / "resumed") == curve(tmp_path / "whole")
    assert identity_of(tmp_path / "resumed") == identity_of(tmp_path / "whole")


def test_a_resumed_run_of_all_losses_equals_the_uninterrupted_one(
    tokenizer_run: TokenizerRun, tmp_path: Path
) -> None:
    """A second player that joins later, a third that shares an optimizer, perturbations and augmentation."""
    loss = replace(
        tokenizer_run.loss,
        gan=0.5,
        gan_weight="adaptive",
        gan_start=0.6,
        discriminator=DiscriminatorConfig(kind="patch", width=4, num_layers=2),
        discriminator_start=0.3,
        mcr=0.5,
        kl=1e-6,
        diffusion=0.1,
        gradients_every=3,
    )
    run = replace(tokenizer_run, loss=loss)
    train(run, tmp_path / "whole")
    train_until(run, tmp_path / "resumed", 3)
    train_until(run, tmp_path / "resumed", 5)
    train(run, tmp_path / "resumed")
    whole = state_of(tmp_path / "whole")
    assert same(state_of(tmp_path / "resumed"), whole)
    assert curve(tmp_path / "resumed") == curve(tmp_path / "whole")
    assert whole["players"].keys() == {"autoencoder", "denoiser", "discriminator"}
    terms = {key.removeprefix("autoencoder/") for key in curve(tmp_path / "whole")[-2]}
    assert {"l1", "lpips", "gan", "mcr", "kl", "diffusion"} <= terms


def test_a_tokenizer_killed_in_the_middle_of_saving_goes_on(
    tokenizer_run: TokenizerRun, tmp_path: Path
) -> None:
    """A process of its own, dead by SIGKILL when its second checkpoint is about to be renamed into place."""
    configs.save(tokenizer_run, tmp_path / "run.yaml")
    code = f"""
import os, signal, sys, torch
from pathlib import Path
from openpae import config
from openpae.train.tokenizer import TokenizerRun, train_tokenizer
torch.set_num_threads(int(os.environ.get("OPENPAE_TEST_THREADS", "1")))
def hook(event, args):
    if event == "os.rename" and str(args[1]).endswith("step-00000004"):
        os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(hook)
train_tokenizer(config.load(TokenizerRun, {str(tmp_path / "run.yaml")!r}), Path({str(tmp_path / "killed")!r}))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    folder = tmp_path / "killed" / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == [".step-00000004.partial", "step-00000002"]
    train(tokenizer_run, tmp_path / "killed")
    train(tokenizer_run, tmp_path / "whole")
    assert same(state_of(tmp_path / "killed"), state_of(tmp_path / "whole"))
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000004", "step-00000006"]


def test_a_run_killed_between_any_two_file_operations_goes_on(tmp_path: Path) -> None:
    loop = replace(LOOP, steps=2, save_every=1, keep_last=1, log_every=1)
    whole = state_of_tiny(tmp_path / "whole", loop)
    run_dir, deaths = tmp_path / "run", 0
    for _ in kill_points(lambda: tiny_run(run_dir, loop), tmp_path):
        assert same(state_of_tiny(run_dir, loop), whole)
        assert [line["step"] for line in curve(run_dir)] == [1, 2, 2]
        left = {path.name for path in (run_dir / "checkpoints").iterdir()}
        assert left <= {"step-00000001", "step-00000002"}  # and no half-written folder
        shutil.rmtree(run_dir)
        deaths += 1
    assert deaths > 15


def state_of_tiny(run_dir: Path, loop: LoopConfig) -> Any:
    tiny_run(run_dir, loop)
    return state_of(run_dir)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-1]),
        lambda f: (f / "state.pt").write_bytes((f / "state.pt").read_bytes()[:-1]),
        lambda f: (f / "state.pt").write_bytes(b"\x00" + (f / "state.pt").read_bytes()[1:]),
        lambda f: (f / "state.pt").unlink(),
        lambda f: (f / "checkpoint.json").write_text('{"step"'),
        lambda f: (f / "checkpoint.json").write_text("{}"),
        lambda f: shutil.rmtree(f) or f.mkdir(),
    ],
)
def test_a_damaged_checkpoint_is_passed_over_with_a_warning(
    tmp_path: Path, spoil: Callable[[Path], object]
) -> None:
    tiny_run(tmp_path / "whole")
    tiny_run(tmp_path / "run")
    spoil(checkpoint_path(tmp_path / "run", 6))
    with pytest.warns(UserWarning, match=r"checkpoint .*step-00000006 is damaged and was passed over: "):
        tiny_run(tmp_path / "run")
    assert same(state_of(tmp_path / "run"), state_of(tmp_path / "whole"))


@pytest.mark.parametrize("stage", STAGES)
def test_a_real_run_passes_over_a_damaged_checkpoint(
    runs: dict[str, Any], tmp_path: Path, stage: str
) -> None:
    train(runs[stage], tmp_path / "run")
    expected = state_of(tmp_path / "run")
    folder = checkpoint_path(tmp_path / "run", 6)
    (folder / "state.pt").write_bytes(b"")
    (folder / "model.safetensors").write_bytes(b"")
    with pytest.warns(
        UserWarning, match="step-00000006 is damaged and was passed over: its checksum is wrong"
    ):
        train(runs[stage], tmp_path / "run")
    assert same(state_of(tmp_path / "run"), expected)


def test_the_newest_checkpoint_is_the_one_of_the_highest_step(tmp_path: Path) -> None:
    """Not the largest file, nor the one that was written last."""
    tiny_run(tmp_path / "run")
    old = checkpoint_path(tmp_path / "run", 4)
    (old / "model.safetensors").write_bytes(b"x" * 100_000)
    os.utime(old / "state.pt")
    task = tiny_run(tmp_path / "run")
    assert [step for step, *_ in task.judged] == [6]  # nothing was trained, only judged
    assert same(dict(task.model.state_dict()), state_of(tmp_path / "run")["players"]["model"])


def test_a_finished_run_is_judged_again_and_changed_no_more(tmp_path: Path) -> None:
    first = tiny_run(tmp_path / "run")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run" / "checkpoints").rglob("*")}
    log = curve(tmp_path / "run")
    again = Tiny()
    metrics = fit(again, tmp_path / "run", OPTIM, LOOP, quiet=True)
    assert metrics == {"bias": float(first.judged[-1][1]["bias"].sum())}
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert curve(tmp_path / "run") == log


def test_one_seed_one_run(runs: dict[str, Any], tmp_path: Path) -> None:
    for stage, run in runs.items():
        for name, seed in (("a", 0), ("b", 0), ("c", 1)):
            train(with_loop(run, seed=seed, steps=2), tmp_path / stage / name)
        a, b, c = (state_of(tmp_path / stage / name) for name in "abc")
        assert same(a, b)
        assert not same(a["exported"], c["exported"])


def test_other_data_than_before_are_refused(
    generator_run: GeneratorRun,
    tokenizer_run: TokenizerRun,
    latents: Shards,
    image_folder: Path,
    tmp_path: Path,
) -> None:
    """The config names the same folders, but what lies there has changed: this cannot be the same run."""
    for print_, labels, message in (
        (
            "another",
            latents.labels,
            "trained with other latents, tokenizer: what its config names has changed",
        ),
        (latents.attributes["tokenizer"], 1 - latents.labels, "trained with other latents: what"),
    ):
        folder = tmp_path / print_ / "latents"
        shutil.copytree(latents.folder, folder)
        run = replace(generator_run, latents=folder, held_out_latents=None)
        train_until(run, tmp_path / print_ / "run", 3)
        rewritten(latents, folder, print_, labels)
        with pytest.raises(ValueError, match=message):
            train(run, tmp_path / print_ / "run")
    images = Path(shutil.copytree(image_folder, tmp_path / "images"))
    other = replace(tokenizer_run, data=replace(tokenizer_run.data, images=images))
    train_until(other, tmp_path / "tokenizer", 3)
    (images / "boxes" / "0.png").unlink()
    with pytest.raises(ValueError, match=r"tokenizer was trained with other images: what"):
        train(other, tmp_path / "tokenizer")


def rewritten(source: Shards, folder: Path, tokenizer: str, labels: np.ndarray) -> None:
    """The latents again, but of another tokenizer or under other labels."""
    from openpae.data.shards import Layout

    shutil.rmtree(folder)
    layout = Layout(
        kind="latents",
        dtype="bfloat16",
        shape=source.shape,
        sources=len(source),
        per_shard=len(source),
        attributes=source.attributes | {"tokenizer": tokenizer},
    )
    writer = ShardWriter(folder, layout)
    rows = source.gather(np.arange(len(source)))
    writer.write(0, rows + 1 if tokenizer == "another" else rows, labels.tolist())
    writer.finish()


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_folder_refuses_another_config_and_names_the_difference(
    runs: dict[str, Any], tmp_path: Path, stage: str
) -> None:
    run = with_loop(runs[stage], steps=2)
    train(run, tmp_path / "run")
    other = replace(run, optim=replace(run.optim, lr=2e-3), loop=replace(run.loop, ema_decay=None))
    with pytest.raises(ValueError, match="another config") as caught:
        train(other, tmp_path / "run")
    assert "loop.ema_decay: 0.8 -> None; optim.lr: 0.001 -> 0.002" in str(caught.value)
    assert configs.load(type(run), tmp_path / "run" / "config.yaml") == run
    train(configs.load(type(run), tmp_path / "run" / "config.yaml"), tmp_path / "run")


def test_a_run_may_go_on_on_other_hardware(runs: dict[str, Any], tmp_path: Path) -> None:
    """Device batches, processes and workers say how it is computed, not what; config.yaml keeps the last."""
    run = with_loop(runs["generator"], steps=4)
    train_until(run, tmp_path, 3)
    other = with_loop(run, device_batch_size=4, num_workers=0, parallel="fsdp", profile_steps=0)
    train(other, tmp_path)
    assert checkpoint_steps(tmp_path) == [2, 4]
    assert configs.load(GeneratorRun, tmp_path / "config.yaml") == other


def test_a_run_folder_of_another_stage_is_refused(runs: dict[str, Any], tmp_path: Path) -> None:
    open_run(tmp_path, runs["tokenizer"])
    with pytest.raises(ValueError, match="is of kind 'TokenizerRun', but a GeneratorRun is needed"):
        open_run(tmp_path, runs["generator"])


# Parts are the whole


@pytest.mark.parametrize("stage", STAGES)
def test_accumulated_batches_equal_one_batch(runs: dict[str, Any], tmp_path: Path, stage: str) -> None:
    """Noise, crops, dropped classes and losses are those of the global batch, however it is cut.

    In float64: three steps of Adam make the rounding of reordered sums some thousand times larger."""
    with double_precision():
        for part in (1, 2, 4, None):
            train(with_loop(runs[stage], device_batch_size=part, steps=3), tmp_path / str(part))
    whole, lines = state_of(tmp_path / "None"), curve(tmp_path / "None")
    for part in ("1", "2", "4"):
        found = state_of(tmp_path / part)
        for name, value in whole["players"].items():
            for key, tensor in value.items():
                torch.testing.assert_close(
                    found["players"][name][key], tensor, atol=1e-10, rtol=1e-9, msg=key
                )
        for line, expected in zip(curve(tmp_path / part), lines, strict=True):
            assert line == pytest.approx(expected, rel=1e-6)  # the log is float32


@given(
    whole=st.integers(1, 12),
    data=st.data(),
    seed=st.integers(0, 2**40),
    step=st.integers(0, 10**7),
)
def test_draws_do_not_depend_on_how_the_batch_is_cut(
    whole: int, data: st.DataObject, seed: int, step: int
) -> None:
    part = data.draw(st.sampled_from([n for n in range(1, whole + 1) if whole % n == 0]))
    device = torch.device("cpu")
    every = Draws(seed, step, range(whole), whole, device)
    cuts = [Draws(seed, step, range(i, i + part), whole, device) for i in range(0, whole, part)]
    for name, shape in (("a", (2, 3)), ("b", ())):
        assert torch.equal(torch.cat([cut.normal(name, *shape) for cut in cuts]), every.normal(name, *shape))
        assert torch.equal(
            torch.cat([cut.uniform(name, *shape) for cut in cuts]), every.uniform(name, *shape)
        )
    assert torch.equal(every.normal("a"), every.normal("a"))


def test_draws_differ_by_seed_step_and_name() -> None:
    drawn = [
        Draws(seed, step, range(100), 100, torch.device("cpu")).normal(name)
        for seed, step, name in (
            (0, 0, "a"),
            (1, 0, "a"),
            (0, 1, "a"),
            (0, 0, "b"),
            (1, 11, "a"),
            (11, 1, "a"),
        )
    ]
    correlation = torch.corrcoef(torch.stack(drawn)) - torch.eye(6)
    assert correlation.abs().max() < 0.5


def test_two_players_move_in_the_order_of_their_updates(tmp_path: Path) -> None:
    """What follows a yield sees stepped weights; with accumulation, only in the last device batch."""
    seen: list[tuple[int, float, float]] = []

    class Two(Tiny):
        def __init__(self) -> None:
            super().__init__()
            self.judge = nn.Linear(1, 1)
            self.players = {"model": self.model, "judge": self.judge}
            self.optimizers = {
                name: torch.optim.SGD(module.parameters(), lr=0.0) for name, module in self.players.items()
            }

        def updates(self, batch: Numbers, draws: Draws, step: int) -> Iterator[Update]:
            before = self.model.bias.detach().clone()
            yield Update("model", self.model.bias.sum(), {})
            moved = (self.model.bias - before).detach().abs().max()
            judged = self.judge.bias.detach().clone()
            if step != 1:
                yield Update("judge", -self.judge.bias.sum(), {})
            seen.append((step, float(moved), float(self.judge.bias.detach() - judged)))

    fit(Two(), tmp_path, OptimConfig(lr=0.5), replace(LOOP, steps=3, ema_decay=None), quiet=True)
    assert np.round(seen, 5).tolist() == [
        [step, moved, judged]
        for step, second in ((0, 0.5), (1, 0.0), (2, 0.5))
        for moved, judged in ((0.0, 0.0), (0.5, second))
    ]


def test_gradients_are_clipped_by_their_norm(tmp_path: Path) -> None:
    """At rate 1 a step of plain descent is as long as the clipped gradient; the log has the norm."""
    for clip, expected in ((0.25, 0.25), (None, 2.0)):
        task = Tiny()
        task.optimizers = {"model": torch.optim.SGD(task.model.parameters(), lr=0.0)}
        task.updates = lambda *_, task=task: iter(  # type: ignore[method-assign]
            [Update("model", math.sqrt(2) * task.model.bias.sum(), {})]
        )
        before = task.model.bias.detach().clone()
        optim, loop = OptimConfig(lr=1.0, clip=clip), replace(LOOP, steps=1, ema_decay=None)
        run_dir = tmp_path / str(clip)
        run_dir.mkdir()
        fit(task, run_dir, optim, loop, quiet=True)
        assert (task.model.bias - before).detach().norm() == pytest.approx(expected, rel=1e-4)
        assert read_log(run_dir)[0]["model/grad_norm"] == pytest.approx(2.0)


# Nothing that is not finite is kept


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_loss_that_is_not_finite_stops_before_its_step(tmp_path: Path, bad: float) -> None:
    task = Tiny(spoil=lambda step, loss: loss * bad if step == 3 else loss)
    steps: list[dict[str, Tensor]] = []
    task.optimizers["model"].register_step_post_hook(
        lambda *_: steps.append({k: v.clone() for k, v in task.model.state_dict().items() if k != "count"})
    )
    with pytest.raises(FloatingPointError, match=r"not finite at step 3: model/loss = (nan|-?inf);"):
        fit(task, tmp_path, OPTIM, LOOP, quiet=True)
    assert len(steps) == 3
    assert all(torch.equal(task.model.state_dict()[name], value) for name, value in steps[-1].items())
    assert checkpoint_steps(tmp_path) == [2]


def test_the_broken_term_is_named_and_the_sound_ones_are_not(tmp_path: Path) -> None:
    task = Tiny()

    def updates(batch: Numbers, draws: Draws, step: int) -> Iterator[Update]:
        sound, broken = task.model(batch.x).mean(), task.model(batch.x).mean() * torch.nan
        yield Update("model", sound + broken, {"sound": sound.detach(), "broken": broken.detach()})

    task.updates = updates  # type: ignore[method-assign]
    with pytest.raises(FloatingPointError, match="not finite at step 0") as caught:
        fit(task, tmp_path, OPTIM, LOOP, quiet=True)
    assert "model/broken = nan" in str(caught.value)
    assert "sound" not in str(caught.value)
    assert "lower optim.lr, set optim.clip, or use loop.precision fp32" in str(caught.value)


@pytest.mark.parametrize("clip", [None, 1.0])
def test_a_finite_loss_with_a_gradient_that_is_not_stops_too(tmp_path: Path, clip: float | None) -> None:
    """sqrt(0) is 0, its slope is not finite: without a check the weights, and a checkpoint, would be NaN."""
    task = Tiny(spoil=lambda step, loss: loss + (loss * 0).sqrt() if step == 3 else loss)
    with pytest.raises(FloatingPointError, match=r"not finite at step 3: model/grad_norm = nan"):
        fit(task, tmp_path, replace(OPTIM, clip=clip), replace(LOOP, save_every=1), quiet=True)
    assert checkpoint_steps(tmp_path) == [2, 3]
    assert all(p.isfinite().all() for p in task.model.parameters())


@pytest.mark.parametrize(("stage", "term"), [("tokenizer", "autoencoder/l1"), ("generator", "generator/mse")])
def test_a_diverged_real_run_names_step_and_term(
    runs: dict[str, Any], tmp_path: Path, stage: str, term: str
) -> None:
    open_run(tmp_path, runs[stage])
    task = task_of(runs[stage])
    updates = task.updates

    def diverging(batch: Any, draws: Draws, step: int) -> Iterator[Update]:
        if step == 3:
            with torch.no_grad():
                next(iter(task.optimizers.values())).param_groups[0]["params"][-1].fill_(torch.nan)
        return updates(batch, draws, step)

    task.updates = diverging
    with pytest.raises(FloatingPointError, match=rf"not finite at step 3: .*{term} = nan"):
        fit(task, tmp_path, OPTIM, LOOP, quiet=True)
    assert checkpoint_steps(tmp_path) == [2]


@pytest.mark.parametrize("stage", STAGES)
def test_no_step_waits_for_the_device(
    runs: dict[str, Any], tmp_path: Path, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between two lines of the log nothing is read from a tensor, as far as a GPU may run ahead."""
    loss = TokenizerLoss(
        lpips_net="random",
        discriminator=DiscriminatorConfig(kind="patch", width=4, num_layers=2),
        discriminator_start=0.0,
        gan_start=0.0,
        gan_weight="adaptive",
        ssr=0.0,
        scr=0.0,
        diffusion=0.1,
        kl=1e-6,
        gradients_every=2,
    )
    run = with_loop(runs[stage], steps=5, log_every=5, save_every=5)
    run = replace(run, optim=replace(OPTIM, spike_factor=5.0))
    task = task_of(replace(run, loss=loss) if stage == "tokenizer" else run)
    reads, seen = Reads(), []

    def late(*arguments: Any) -> NonFiniteGuard:
        health = NonFiniteGuard(*arguments)
        health.at_once = False  # as on a GPU
        return health

    monkeypatch.setattr(loop_module, "NonFiniteGuard", late)
    updates = task.updates

    def counting(batch: Any, draws: Draws, step: int) -> Iterator[Update]:
        seen.append((step, reads.count))
        return updates(batch, draws, step)

    task.updates = counting
    with reads:
        fit(task, tmp_path, run.optim, run.loop, quiet=True)
    counts = dict(seen)
    assert counts[4] - counts[0] == 0
    assert reads.count > counts[4]  # the line, the checkpoint and the evaluation do


class Reads(TorchDispatchMode):
    """Counts how often Python asks a tensor for a number."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


# What is frozen, and what is averaged


def test_the_frozen_encoder_stays_to_the_bit(tokenizer_run: TokenizerRun, tmp_path: Path) -> None:
    task = TokenizerTask(replace(tokenizer_run, optim=replace(OPTIM, lr=0.1)))
    before = {name: value.clone() for name, value in task.model.state_dict().items()}
    fit(task, tmp_path, task.run.optim, LOOP, quiet=True)
    after = task.model.state_dict()
    frozen = {name for name in before if name.startswith("encoder.")}
    assert frozen
    assert all(torch.equal(before[name], after[name]) for name in frozen)
    assert encoder_fingerprint(task.model.encoder) == encoder_fingerprint(load_encoder("random-tiny"))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == before.keys() - frozen


def test_a_finetuned_encoder_is_trained_and_averaged(tokenizer_run: TokenizerRun, tmp_path: Path) -> None:
    run = replace(tokenizer_run, model=replace(tokenizer_run.model, fusion="finetune"))
    train(run, tmp_path)
    loaded = load_tokenizer(tmp_path)
    images = torch.rand(1, 3, 32, 32)
    start = load_encoder("random-tiny")
    assert not torch.allclose(loaded.features(images), start(loaded.preprocess(images)), atol=1e-4)
    assert identity_of(tmp_path).made_with == encoder_fingerprint(start)


def test_the_average_of_constant_weights_is_constant() -> None:
    module = nn.Linear(5, 4)
    ema = Ema(module, 0.3)
    for _ in range(50):
        ema.update()
    assert all(torch.equal(ema.average[name], p) for name, p in module.named_parameters())


def test_the_average_is_its_closed_form() -> None:
    """decay^n w_0 + (1 - decay) sum_k decay^(n-k) w_k; frozen weights and buffers are not averaged."""
    module = nn.ModuleDict(
        {"a": nn.Linear(1, 1, bias=False), "frozen": nn.Linear(1, 1), "norm": nn.BatchNorm1d(1)}
    )
    module["frozen"].requires_grad_(False)
    nn.init.constant_(module["a"].weight, 1.0)
    ema, expected = Ema(module, 0.75), 1.0
    for k in range(1, 6):
        nn.init.constant_(module["a"].weight, float(k * k))
        ema.update()
        expected = 0.75 * expected + 0.25 * k * k
    assert ema.average.keys() == {"a.weight", "norm.weight", "norm.bias"}
    assert float(ema.average["a.weight"]) == pytest.approx(expected, rel=1e-6)


def test_averaged_weights_are_in_place_only_inside() -> None:
    module = nn.Linear(2, 2)
    ema = Ema(module, 0.5)
    nn.init.ones_(module.weight)
    average = ema.average["weight"].clone()
    with ema.in_place():
        assert torch.equal(module.weight, average)
    with pytest.raises(ZeroDivisionError), ema.in_place():
        1 / 0  # noqa: B018
    assert (module.weight == 1).all()
    assert torch.equal(ema.average["weight"], average)


@pytest.mark.parametrize(("export", "decay"), [("ema", 0.8), ("raw", 0.8), ("ema", None)])
def test_what_is_exported_is_what_is_judged(tmp_path: Path, export: Any, decay: float | None) -> None:
    """The average or the raw weights, in evaluation mode and without gradients; buffers as they are."""
    task = tiny_run(tmp_path / "run", replace(LOOP, export=export, ema_decay=decay, evaluate_every=3))
    assert [step for step, *_ in task.judged] == [3, 6]
    _, judged, training, gradients = task.judged[-1]
    assert not training
    assert not gradients
    state = state_of(tmp_path / "run")
    assert same(state["exported"], judged)
    raw = state["players"]["model"]
    averaged = export == "ema" and decay is not None
    assert same(state["exported"], raw) == (not averaged)
    if averaged:
        assert same({name: state["exported"][name] for name in state["ema"]}, state["ema"])
    assert state["exported"]["count"] == 12  # two device batches a step


@pytest.mark.parametrize("stage", STAGES)
def test_an_exported_model_is_the_one_that_was_judged(
    runs: dict[str, Any], tmp_path: Path, stage: str
) -> None:
    metrics = train(runs[stage], tmp_path)
    task = task_of(runs[stage])
    loaded = (load_tokenizer if stage == "tokenizer" else load_generator)(tmp_path)
    task.model.load_state_dict(loaded.state_dict())
    task.model.eval()
    with torch.no_grad():
        assert task.evaluate(6) == pytest.approx(metrics)
    assert metrics.keys() == ({"psnr", "ssim", "lpips"} if stage == "tokenizer" else {"mse", "cosine"})


# Schedule


@given(
    steps=st.integers(2, 400),
    warmup=st.integers(0, 100),
    lr=st.floats(1e-6, 1),
    share=st.floats(0, 1),
)
def test_the_schedule_rises_then_falls_between_its_corners(
    steps: int, warmup: int, lr: float, share: float
) -> None:
    optim = OptimConfig(lr=lr, final_lr=lr * share, warmup_steps=warmup)
    rates = [lr_at(step, optim, steps) for step in range(steps)]
    assert all(0 <= rate <= lr * (1 + 1e-12) for rate in rates)
    rise, fall = np.diff(rates[: warmup + 1]), np.diff(rates[warmup:])
    assert (rise >= -1e-12).all()  # where the cosine begins, its formula rounds
    assert (fall <= 1e-12).all()
    if warmup:
        assert rates[0] == pytest.approx(lr / warmup)
    if warmup < steps:
        assert max(rates) == pytest.approx(lr)
    if warmup + 1 < steps:
        assert rates[-1] == pytest.approx(lr * share)


def test_the_schedule_without_an_end_is_constant() -> None:
    optim = OptimConfig(lr=0.5, warmup_steps=4)
    assert [lr_at(step, optim, 100) for step in (0, 1, 3, 4, 50, 99)] == [0.125, 0.25, 0.5, 0.5, 0.5, 0.5]


def test_the_middle_of_the_cosine_is_the_mean() -> None:
    optim = OptimConfig(lr=1.0, final_lr=0.2, warmup_steps=10)
    assert lr_at(60, optim, 111) == pytest.approx(0.6)


def test_the_optimizer_runs_at_the_scheduled_rate(tmp_path: Path) -> None:
    task, rates = Tiny(), []
    task.optimizers["model"].register_step_pre_hook(lambda opt, *_: rates.append(opt.param_groups[0]["lr"]))
    fit(task, tmp_path, OPTIM, LOOP, quiet=True)
    assert rates == [lr_at(step, OPTIM, LOOP.steps) for step in range(6)]


# Signals, log, folders


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_after_its_step_and_the_same_command_goes_on(
    tmp_path: Path, signum: signal.Signals
) -> None:
    # One device batch a step: each sends the signal, and a second one would mean "now".
    loop = replace(LOOP, save_every=100, device_batch_size=None)
    handlers = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]

    def interrupting(step: int, loss: Tensor) -> Tensor:
        if step == 2 and not checkpoint_steps(tmp_path / "run"):
            os.kill(os.getpid(), signum)
        return loss

    whole = state_of_tiny(tmp_path / "whole", loop)
    with pytest.raises(
        Stopped, match=rf"stopped by {signum.name} after step 3; the same command goes on"
    ) as caught:
        tiny_run(tmp_path / "run", loop, spoil=interrupting)
    assert caught.value.signum == signum
    assert checkpoint_steps(tmp_path / "run") == [3]
    assert [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)] == handlers
    tiny_run(tmp_path / "run", loop, spoil=interrupting)
    assert same(state_of(tmp_path / "run"), whole)


def test_a_second_signal_means_now(tmp_path: Path) -> None:
    def interrupting(step: int, loss: Tensor) -> Tensor:
        os.kill(os.getpid(), signal.SIGINT)
        return loss

    with pytest.raises(KeyboardInterrupt):
        tiny_run(tmp_path / "run", spoil=interrupting)
    assert checkpoint_steps(tmp_path / "run") == []


def test_the_log_has_means_and_counts_images(tmp_path: Path) -> None:
    losses: list[float] = []

    def noting(step: int, loss: Tensor) -> Tensor:
        losses.append(float(loss.detach()))
        return loss

    loop = replace(LOOP, save_every=100, evaluate_every=4)
    tiny_run(tmp_path / "run", loop, spoil=noting)
    lines = read_log(tmp_path / "run")
    assert [(line["step"], line["images_seen"]) for line in lines] == [(3, 12), (4, 16), (6, 24), (6, 24)]
    assert lines[0]["model/loss"] == pytest.approx(np.mean(losses[:6]))
    assert lines[2]["model/loss"] == pytest.approx(np.mean(losses[6:]))
    assert lines[0].keys() == {
        *("step", "images_seen", "lr", "images_per_second"),
        *("model/loss", "model/error", "model/size", "model/grad_norm"),
    }
    assert lines[1].keys() == lines[3].keys() == {"step", "images_seen", "eval/bias"}
    assert lines[0]["lr"] == lr_at(2, OPTIM, 6)
    assert any((tmp_path / "run" / "tensorboard").iterdir())


def test_a_line_cut_off_by_a_kill_is_left_out(tmp_path: Path) -> None:
    tiny_run(tmp_path / "run")
    whole = curve(tmp_path / "run")
    file = tmp_path / "run" / "log.jsonl"
    file.write_text(file.read_text() + '{"step": 7, "mod')
    assert curve(tmp_path / "run") == whole
    tiny_run(tmp_path / "run")
    assert curve(tmp_path / "run") == whole
    assert all(json.loads(line) for line in file.read_text().splitlines())


def test_only_the_last_checkpoints_are_kept_and_the_last_step_is_one(tmp_path: Path) -> None:
    for keep, expected in ((1, [5]), (2, [4, 5]), (10, [2, 4, 5])):
        loop = replace(LOOP, steps=5, keep_last=keep)
        tiny_run(tmp_path / str(keep), loop)
        assert checkpoint_steps(tmp_path / str(keep)) == expected
        facts = json.loads((checkpoint_path(tmp_path / str(keep), 5) / "checkpoint.json").read_text())
        assert facts["images_seen"] == 20
        state = checkpoint_path(tmp_path / str(keep), 5) / "state.pt"
        weights = state.with_name("model.safetensors")
        assert facts["sha256"] == {file.name: file_hash(file) for file in (weights, state)}


def test_some_checkpoints_are_kept_for_good(tmp_path: Path) -> None:
    loop = replace(LOOP, steps=11, save_every=2, keep_last=2, keep_every=4)
    tiny_run(tmp_path, loop)
    assert checkpoint_steps(tmp_path) == [4, 8, 10, 11]


def test_an_evaluation_that_fails_costs_no_step(tmp_path: Path) -> None:
    """The checkpoint is written before it, and the same command judges it again."""
    task = Tiny()

    def failing(step: int) -> dict[str, float]:
        raise RuntimeError("no memory")

    task.evaluate = failing  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="no memory"):
        fit(task, tmp_path, OPTIM, LOOP, quiet=True)
    assert checkpoint_steps(tmp_path) == [4, 6]
    again = tiny_run(tmp_path)
    assert [step for step, *_ in again.judged] == [6]
    assert "eval/bias" in read_log(tmp_path)[-1]


def test_an_evaluation_that_a_kill_took_is_made_up_for(tmp_path: Path) -> None:
    """In the middle of a run too; one that is there is not made again."""
    loop = replace(LOOP, evaluate_every=2)
    tiny_run(tmp_path / "whole", loop)
    for name, lost in (("lost", True), ("there", False)):
        shutil.copytree(tmp_path / "whole", tmp_path / name)
        shutil.rmtree(checkpoint_path(tmp_path / name, 6))
        lines = (tmp_path / name / "log.jsonl").read_text().splitlines(keepends=True)
        if lost:
            kept = [line for line in lines if not ("eval/" in line and '"step": 4' in line)]
            assert len(kept) == len(lines) - 1
            (tmp_path / name / "log.jsonl").write_text("".join(kept))
        task = tiny_run(tmp_path / name, loop)
        assert [step for step, *_ in task.judged] == ([4, 6] if lost else [6])
        assert curve(tmp_path / name) == curve(tmp_path / "whole")


def test_what_a_kill_left_of_a_step_that_is_not_saved_again_is_cleared_away(tmp_path: Path) -> None:
    """A signal may save any step; killed in it, the next run saves others."""
    left = tmp_path / "run" / "checkpoints" / ".step-00000003.partial"
    left.mkdir(parents=True)
    (left / "state.pt").write_bytes(b"half")
    tiny_run(tmp_path / "run")
    assert not left.exists()


def test_a_step_can_be_timed_before_a_run(runs: dict[str, Any]) -> None:
    for run in runs.values():
        assert 0 < seconds_per_step(task_of(run), run.optim, run.loop, steps=2) < 60


def test_tasks_are_what_the_engine_expects(runs: dict[str, Any]) -> None:
    """The first player is the exported one, each has its optimizer over just what is trained."""
    for run in runs.values():
        task: Task = task_of(run)
        assert task.players.keys() == task.optimizers.keys()
        for name, module in task.players.items():
            trained = {id(p) for p in module.parameters() if p.requires_grad}
            groups = task.optimizers[name].param_groups
            assert {id(p) for group in groups for p in group["params"]} == trained


# The two tasks


def test_broken_images_are_named_while_training_goes_on(
    tokenizer_run: TokenizerRun, image_folder: Path, tmp_path: Path
) -> None:
    images = Path(shutil.copytree(image_folder, tmp_path / "images"))
    (images / "discs" / "9.png").write_text("no image")
    data = replace(tokenizer_run.data, images=images, skip_broken=True)
    with pytest.warns(UserWarning, match=r"discs/9.png cannot be decoded.*another image takes its place"):
        train(replace(tokenizer_run, data=data), tmp_path / "run")


def test_training_on_cached_features_is_training_on_computed_ones(
    tokenizer_run: TokenizerRun, packed: PackedImages, tmp_path: Path
) -> None:
    """The first losses are equal up to the rounding to float16, 5e-4 of a feature; the cache is made on
    first use and used ever after."""
    tokenizer_run = with_loop(tokenizer_run, steps=1, log_every=1)
    data = replace(tokenizer_run.data, images=packed.shards.folder, augment="flip")
    cached = replace(tokenizer_run, data=replace(data, feature_cache=tmp_path / "features"))
    train(replace(tokenizer_run, data=data), tmp_path / "computed")
    train(cached, tmp_path / "cached")
    assert Shards(tmp_path / "features", kind="features").shape == (2, 16, 48)
    for line, expected in zip(curve(tmp_path / "cached"), curve(tmp_path / "computed"), strict=True):
        assert line == pytest.approx(expected, rel=5e-3)
    before = (tmp_path / "features" / "index.json").stat().st_mtime_ns
    TokenizerTask(cached)
    assert (tmp_path / "features" / "index.json").stat().st_mtime_ns == before


def test_cached_features_that_could_not_be_right_are_refused(
    tokenizer_run: TokenizerRun, tmp_path: Path
) -> None:
    data = replace(tokenizer_run.data, augment="flip", feature_cache=tmp_path / "features")
    with pytest.raises(ValueError, match=r"needs packed images; make them with: pae pack"):
        TokenizerTask(replace(tokenizer_run, data=data))
    with pytest.raises(ValueError, match=r"feature_cache cannot serve model.fusion finetune"):
        replace(tokenizer_run, data=data, model=replace(tokenizer_run.model, fusion="finetune"))


def test_a_loss_switched_off_is_not_computed(tokenizer_run: TokenizerRun, tmp_path: Path) -> None:
    run = replace(tokenizer_run, loss=L1_ONLY)
    assert train(run, tmp_path).keys() == {"psnr", "ssim"}
    assert "autoencoder/lpips" not in read_log(tmp_path)[0]
    assert read_log(tmp_path)[0]["autoencoder/loss"] == read_log(tmp_path)[0]["autoencoder/l1"]
    with pytest.raises(ValueError, match=r"loss.lpips must be >= 0, got -1.0"):
        TokenizerLoss(lpips=-1.0)


def test_classes_are_dropped_as_often_as_the_config_says(generator_run: GeneratorRun) -> None:
    for share in (0.0, 0.3, 1.0):
        run = replace(generator_run, model=replace(generator_run.model, class_dropout=share))
        task = GeneratorTask(with_loop(run, global_batch_size=500, device_batch_size=None))
        seen: list[Tensor] = []
        task.model.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[2]))
        batch = next(iter(task.batches(range(1))))
        update = next(iter(task.updates(batch, Draws(0, 0, range(500), 500, torch.device("cpu")), 0)))
        null = seen[0] == task.model.null_label
        assert float(null.float().mean()) == pytest.approx(share, abs=0.07)
        assert torch.equal(seen[0][~null], batch.labels[~null])
        torch.testing.assert_close(update.loss.detach(), update.logs["mse"] + update.logs["cosine"])


def test_evaluation_of_the_generator_is_the_same_in_any_batch(generator_run: GeneratorRun) -> None:
    results = []
    for part in (1, 4):
        task = GeneratorTask(with_loop(generator_run, device_batch_size=part))
        task.model.eval()
        with torch.no_grad():
            results.append(task.evaluate(0))
    assert results[0] == pytest.approx(results[1], rel=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"grid_size": 8}, r"holds latents of shape \(8, 4, 4\), the generator is built for \(8, 8, 8\)"),
        ({"latent_dim": 4}, r"built for \(4, 4, 4\); set model.latent_dim, model.grid_size and"),
        ({"num_classes": 1}, "has labels up to 1, but model.num_classes is 1"),
    ],
)
def test_latents_that_do_not_fit_are_refused(
    generator_run: GeneratorRun, changes: dict[str, int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        GeneratorTask(replace(generator_run, model=replace(generator_run.model, **changes)))


def test_held_out_latents_must_be_of_the_same_tokenizer(
    generator_run: GeneratorRun, latents: Shards, tmp_path: Path
) -> None:
    (tmp_path / "other").mkdir()
    rewritten(latents, tmp_path / "other", "another", latents.labels)
    with pytest.raises(ValueError, match="come from different tokenizers"):
        GeneratorTask(replace(generator_run, held_out_latents=tmp_path / "other"))


def test_data_travel_to_worker_processes(tokenizer_run: TokenizerRun, latents: Shards) -> None:
    """What a spawned reader unpickles gives the same batches."""
    for data in (TokenizerTask(tokenizer_run).images, TrainingLatents(latents, seed=0)):
        there = pickle.loads(pickle.dumps(data))
        for a, b in zip(data.__getitems__([3, 11]), there.__getitems__([3, 11]), strict=True):
            assert same(a, b)


# Settings


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": 0.0}, "optim.lr must be > 0, got 0.0"),
        ({"lr": math.nan}, "optim.lr must be a finite number, got nan"),
        ({"lr": math.inf}, "optim.lr must be a finite number, got inf"),
        ({"final_lr": 2.0}, r"optim.final_lr must lie in \[0, 1.0\], got 2.0"),
        ({"warmup_steps": -1}, "optim.warmup_steps must be >= 0, got -1"),
        ({"betas": (0.9, 1.0)}, r"optim.betas must lie in \[0, 1\), got \(0.9, 1.0\)"),
        ({"clip": 0.0}, "optim.clip must be > 0, got 0.0"),
        ({"clip": math.nan}, "optim.clip must be a finite number, got nan"),
    ],
)
def test_optimizer_settings_that_can_not_be_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OptimConfig(**({"lr": 1.0} | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "loop.steps must be >= 1, got 0"),
        ({"save_every": 0}, "loop.save_every must be >= 1, got 0"),
        ({"keep_last": 0}, "loop.keep_last must be >= 1, got 0"),
        ({"seed": -1}, "loop.seed must be >= 0, got -1"),
        ({"device_batch_size": 3}, "device_batch_size must divide global_batch_size = 4, got 3"),
        ({"ema_decay": 1.0}, r"loop.ema_decay must lie in \[0, 1\), got 1.0"),
    ],
)
def test_loop_settings_that_can_not_be_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(LOOP, **changes)


def test_steps_are_profiled_into_the_run_folder(tmp_path: Path) -> None:
    tiny_run(tmp_path, replace(LOOP, profile_steps=2))
    trace = json.loads((tmp_path / "profile" / "trace.json").read_text())
    steps = {event["name"] for event in trace["traceEvents"] if event["name"].startswith("ProfilerStep#")}
    assert steps == {"ProfilerStep#3", "ProfilerStep#4"}
    assert "aten::addmm" in (tmp_path / "profile" / "table.txt").read_text()
    with pytest.raises(ValueError, match=r"profile_steps must leave the first 3 of 6 steps out, got 4"):
        replace(LOOP, profile_steps=4)


@pytest.mark.parametrize(("precision", "expected"), [("fp32", False), ("tf32", True), ("bf16", False)])
def test_a_gpu_multiplies_in_tf32_only_where_it_is_asked_for(
    tmp_path: Path, precision: Any, expected: bool
) -> None:
    flags = []

    def noting(step: int, loss: Tensor) -> Tensor:
        flags.append((torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32))
        return loss

    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    tiny_run(tmp_path, replace(LOOP, precision=precision), spoil=noting)
    assert set(flags) == {(expected, expected)}
    assert (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32) == before


def test_a_missing_gpu_is_said_at_the_start() -> None:
    assert pick_device("cpu") == torch.device("cpu")
    if not torch.cuda.is_available():
        assert pick_device("auto") == torch.device("cpu")
        with pytest.raises(ValueError, match=r"loop.device is cuda, but torch sees no GPU"):
            pick_device("cuda")


def test_a_checkpoint_of_an_older_layout_is_passed_over_by_name(tmp_path: Path) -> None:
    tiny_run(tmp_path / "run")
    file = checkpoint_path(tmp_path / "run", 6) / "checkpoint.json"
    facts = json.loads(file.read_text())
    del facts["inputs"]
    write_json(file, facts)
    with pytest.warns(UserWarning, match=r"step-00000006 is damaged and .* no fitting inputs"):
        tiny_run(tmp_path / "run")


def test_folders_of_images_are_found_where_the_config_says(tokenizer_run: TokenizerRun) -> None:
    task = TokenizerTask(tokenizer_run)
    assert task.inputs["images"] == ImageFolder(tokenizer_run.data.images).fingerprint()
    assert task.judged is not None
    assert len(task.judged) == 10


def test_two_processes_do_not_train_in_one_folder(tmp_path: Path) -> None:
    """A lock that a kill lets go; the second process is told, and changes nothing."""
    from filelock import FileLock

    (tmp_path / "run").mkdir()
    with FileLock(tmp_path / "run" / ".lock"), pytest.raises(ValueError, match="another process is training"):
        fit(Tiny(), tmp_path / "run", OPTIM, LOOP, quiet=True)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_kill_while_a_checkpoint_is_removed_leaves_no_half_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was found by chance: kill -9 between two files of a folder that is being removed."""
    for step in (1, 2, 3):
        folder = checkpoint_path(tmp_path, step)
        folder.mkdir(parents=True)
        for name in ("config.yaml", "model.safetensors"):
            (folder / name).touch()

    def killed(folder: Path) -> None:
        (folder / "config.yaml").unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoints.shutil, "rmtree", killed)
    loop = LoopConfig(steps=3, global_batch_size=1, keep_last=1)
    with pytest.raises(KeyboardInterrupt):
        checkpoints.remove_old(tmp_path, loop, 3)
    assert checkpoint_steps(tmp_path) == [2, 3]
    for step in (2, 3):
        assert {file.name for file in checkpoint_path(tmp_path, step).iterdir()} == {
            "config.yaml",
            "model.safetensors",
        }


def test_old_checkpoints_go_up_to_a_sound_one_alone(tmp_path: Path) -> None:
    """A damaged newer one neither counts nor is removed: it was named, and its owner may want to look."""
    for step in range(6):
        checkpoint_path(tmp_path, step).mkdir(parents=True)
    loop = LoopConfig(steps=5, global_batch_size=1, save_every=1, keep_last=2, keep_every=2)
    checkpoints.remove_old(tmp_path, loop, 4)
    assert checkpoint_steps(tmp_path) == [2, 3, 4, 5]
