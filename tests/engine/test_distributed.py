"""Several processes train what one trains: the same data, gradients and losses, and each other's checkpoints.

One group of processes is started for all that a number of processes has to show.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from openpae import config as configs
from openpae.data.images import PackedImages
from openpae.data.settings import ImageData
from openpae.data.shards import Shards
from openpae.engine.journal import read_log
from openpae.engine.settings import LoopConfig, OptimConfig
from openpae.models.configs import DiscriminatorConfig, LightningDiTConfig, PAEConfig
from openpae.objective.settings import TokenizerLoss
from openpae.storage.model_folder import checkpoint_path, checkpoint_steps, read_model
from openpae.train.settings import GeneratorRun, TokenizerRun
from tests.engine.group import (
    HEADROOM,
    Growth,
    Job,
    Run,
    cached,
    compare,
    growth_of,
    helpers,
    losses,
    poisoned,
    rejected,
    started_unequal,
    stopped_by_signal,
    together,
    trained,
    with_loop,
)

STEPS = 20
OPTIM = OptimConfig(lr=3e-4, final_lr=1e-4, warmup_steps=2, weight_decay=0.1, clip=1.0)
LOOP = LoopConfig(
    steps=STEPS,
    global_batch_size=4,
    precision="fp32",
    device="cpu",
    ema_decay=0.8,
    log_every=1,
    save_every=STEPS // 2,
)
QUICK, REST = ["tokenizer-ddp", "generator-fsdp"], ["tokenizer-fsdp", "generator-ddp"]
JOBS = [*QUICK, *(pytest.param(job, marks=pytest.mark.slow) for job in REST)]


@pytest.fixture(scope="module")
def runs(
    tiny_config: PAEConfig, tiny_dit_config: LightningDiTConfig, packed: PackedImages, latents: Shards
) -> dict[str, Run]:
    """The tokenizer with both players and the adaptive weight; the generator with accumulation."""
    data = ImageData(
        images=packed.shards.folder, evaluation=packed.shards.folder, evaluation_images=3, augment="flip"
    )
    loss = TokenizerLoss(
        lpips_net="random",
        gan=0.5,
        gan_weight="adaptive",
        discriminator=DiscriminatorConfig(kind="patch", width=4, num_layers=2),
        discriminator_start=0.0,
        gan_start=0.2,
        ssr=0.0,
        scr=0.0,
        diffusion=0.1,
        gradients_every=7,
    )
    tokenizer = TokenizerRun(model=tiny_config, data=data, loss=loss, optim=OPTIM, loop=LOOP)
    generator = GeneratorRun(
        model=replace(tiny_dit_config, class_dropout=0.3),
        latents=latents.folder,
        held_out_latents=latents.folder,
        optim=OPTIM,
        loop=replace(LOOP, device_batch_size=1),
    )
    return {
        f"{stage}-{parallel}": replace(run, loop=replace(run.loop, parallel=parallel))
        for stage, run in (("tokenizer", tokenizer), ("generator", generator))
        for parallel in ("ddp", "fsdp")
    }


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("distributed")


@pytest.fixture(scope="module")
def alone(runs: Mapping[str, Run], home: Path) -> dict[str, Any]:
    """Each stage by one process, which is neither DDP nor FSDP."""
    return {stage: trained(runs[f"{stage}-ddp"], home / stage) for stage in ("tokenizer", "generator")}


@pytest.fixture(scope="module")
def two(runs: Mapping[str, Run], alone: Mapping[str, Any], home: Path) -> dict[str, list[Any]]:
    """What two processes do in the ordinary suite."""
    jobs: dict[str, Job] = {name: (trained, runs[name], home / f"{name}-2") for name in QUICK}
    halfway(home / "generator", home / "one-two")
    jobs["one-two"] = (trained, runs["generator-fsdp"], home / "one-two")
    jobs["helpers"] = (helpers,)
    jobs["caches"] = (cached, runs["tokenizer-ddp"], home / "caches")
    jobs["broken"] = (cached, runs["tokenizer-ddp"], home / "broken", True)
    for policy in ("stop", "skip", "rollback"):
        run = with_loop(runs["generator-ddp"], steps=6, save_every=2, on_nonfinite=policy)
        jobs[policy] = (poisoned, run, home / policy)
    jobs["signal"] = (stopped_by_signal, with_loop(runs["generator-ddp"], save_every=STEPS), home / "signal")
    jobs["unequal"] = (started_unequal, runs["generator-ddp"])
    jobs["uneven"] = (rejected, with_loop(runs["generator-ddp"], global_batch_size=5, device_batch_size=None))
    return together(2, home / "two", jobs)


@pytest.fixture(scope="module")
def two_more(runs: Mapping[str, Run], home: Path) -> dict[str, list[Any]]:
    """What they do in the slow one."""
    jobs: dict[str, Job] = {name: (trained, runs[name], home / f"{name}-2") for name in REST}
    jobs["bf16"] = (trained, with_loop(runs["tokenizer-fsdp"], steps=3, precision="bf16"), home / "bf16")
    return together(2, home / "two-more", jobs)


@pytest.fixture
def by_two(request: pytest.FixtureRequest, job: str) -> dict[str, list[Any]]:
    """The group that has done this job."""
    results: dict[str, list[Any]] = request.getfixturevalue("two" if job in QUICK else "two_more")
    return results


@pytest.fixture(scope="module")
def four(
    runs: Mapping[str, Run], two: Mapping[str, Any], two_more: Mapping[str, Any], home: Path
) -> dict[str, list[Any]]:
    """All jobs by four, and the checkpoints of two processes gone on with by four."""
    jobs = {name: (trained, run, home / f"{name}-4") for name, run in runs.items()}
    for name, run in runs.items():
        halfway(home / f"{name}-2", home / f"{name}-two-four")
        jobs[f"{name}-two-four"] = (trained, run, home / f"{name}-two-four")
    return together(4, home / "four", jobs)


def halfway(run_dir: Path, copy: Path) -> None:
    """A run as it was when its second last checkpoint was written."""
    shutil.copytree(run_dir, copy)
    shutil.rmtree(checkpoint_path(copy, STEPS))


@pytest.fixture(scope="module")
def growth(runs: Mapping[str, Run], alone: Mapping[str, Any], home: Path) -> dict[str, Growth]:
    """Of each stage."""
    return {
        stage: growth_of(runs[f"{stage}-ddp"], home / stage, alone[stage]["metrics"])
        for stage in ("tokenizer", "generator")
    }


def check(
    world: int,
    results: Mapping[str, list[Any]],
    alone: Mapping[str, Any],
    growth: Mapping[str, Growth],
    home: Path,
    job: str,
) -> None:
    """Data order, gradients and losses of the first step, and later losses and metrics."""
    stage = job.split("-")[0]
    expected = alone[stage]
    parts = [each["rows"] for each in results[job]]
    assert [parts[i % world][i // world] for i in range(len(expected["rows"]))] == expected["rows"]
    for each in results[job]:
        assert each["gradients"].keys() == expected["gradients"].keys()
        for name, gradient in each["gradients"].items():
            # A gradient that is truly 0 is its rounding: what counts is how far all of them are off.
            longest = max(float(g.norm()) for key, g in expected["gradients"].items() if key[:3] == name[:3])
            torch.testing.assert_close(
                gradient, expected["gradients"][name], rtol=1e-10, atol=1e-12 * longest, msg=name
            )
        assert each["metrics"] == pytest.approx(
            expected["metrics"], rel=1e-9 + HEADROOM * growth[stage].metrics
        )
    logs = losses(home / f"{job}-{world}"), losses(home / stage)
    compare(logs[0][:1], logs[1][:1])
    compare(*logs, growth[stage].logs)


@pytest.mark.parametrize("job", JOBS)
def test_two_processes_train_what_one_trains(
    alone: Mapping[str, Any],
    by_two: Mapping[str, list[Any]],
    growth: Mapping[str, Growth],
    home: Path,
    job: str,
) -> None:
    check(2, by_two, alone, growth, home, job)


@pytest.mark.slow
@pytest.mark.parametrize("job", QUICK + REST)
def test_four_processes_train_what_one_trains(
    alone: Mapping[str, Any],
    four: Mapping[str, list[Any]],
    growth: Mapping[str, Growth],
    home: Path,
    job: str,
) -> None:
    check(4, four, alone, growth, home, job)


@pytest.mark.parametrize("job", ["tokenizer-ddp", pytest.param("generator-ddp", marks=pytest.mark.slow)])
def test_gradients_are_reduced_once_a_step(by_two: Mapping[str, list[Any]], job: str) -> None:
    """Of each player, however many device batches a step has and however often a loss asks the network."""
    for result in by_two[job]:
        assert set(result["reductions"].values()) == {STEPS}


def check_goes_on(run_dir: Path, full: Path, growth: Growth) -> None:
    """From halfway on: the losses of the run that was not interrupted, and the same model in the end."""
    compare(losses(run_dir, after=STEPS // 2), losses(full, after=STEPS // 2), growth.logs)
    resumed, expected = (read_model(checkpoint_path(folder, STEPS))[0] for folder in (run_dir, full))
    assert resumed.keys() == expected.keys()
    for name, value in resumed.items():
        torch.testing.assert_close(
            value, expected[name], rtol=0, atol=1e-12 + HEADROOM * growth.weights, msg=name
        )


@pytest.mark.parametrize("job", JOBS)
def test_one_process_goes_on_with_a_checkpoint_of_two(
    runs: Mapping[str, Run],
    by_two: Mapping[str, Any],
    growth: Mapping[str, Growth],
    home: Path,
    job: str,
) -> None:
    """The state is one file under ddp, and shards of both processes under fsdp."""
    halfway(home / f"{job}-2", home / f"{job}-two-one")
    state = checkpoint_path(home / f"{job}-two-one", STEPS // 2)
    assert (state / "state.pt").is_file() == job.endswith("ddp")
    assert len(list(state.glob("state/*.distcp"))) == (2 if job.endswith("fsdp") else 0)
    trained(runs[job], home / f"{job}-two-one")
    stage = job.split("-")[0]
    check_goes_on(home / f"{job}-two-one", home / stage, growth[stage])


@pytest.mark.slow
@pytest.mark.parametrize("job", QUICK + REST)
def test_four_processes_go_on_with_a_checkpoint_of_two(
    four: Mapping[str, Any], growth: Mapping[str, Growth], home: Path, job: str
) -> None:
    stage = job.split("-")[0]
    check_goes_on(home / f"{job}-two-four", home / stage, growth[stage])


def test_two_processes_go_on_with_a_checkpoint_of_one(
    two: Mapping[str, Any], growth: Mapping[str, Growth], home: Path
) -> None:
    """One process writes one file; two that cut the model into shards read it, and write shards."""
    check_goes_on(home / "one-two", home / "generator", growth["generator"])
    assert (checkpoint_path(home / "one-two", STEPS // 2) / "state.pt").is_file()
    assert (checkpoint_path(home / "one-two", STEPS) / "state").is_dir()


# What processes do together


def test_processes_agree(two: Mapping[str, list[Any]]) -> None:
    first, second = two["helpers"]
    assert first["rank_slice"] == [0, 2, 4]
    assert second["rank_slice"] == [1, 3]
    for result in (first, second):
        assert result["share"] == 7
        assert result["gather"] == [0, 1]
        assert result["on_rank0"] == 3
        assert result["error of the first"] == "ZeroDivisionError: integer division or modulo by zero"
        assert result["error of the second"] == "ValueError: in 1"
        assert result["no error"] == ""
        assert result["any_rank"] == [True, False]
        assert result["mean_of"] == [0.5, 1.0]
        assert result["largest_of"] == [1.0, 0.0]
        assert result["norm_of"] == pytest.approx(5.0)
        assert result["ballot"] == [0, 0, 5, 0, 0]  # one call later


def test_latents_cached_by_two_processes_are_those_of_one(
    runs: Mapping[str, Run], two: Mapping[str, list[Any]], home: Path, tmp_path: Path
) -> None:
    expected = cached(runs["tokenizer-ddp"], tmp_path / "alone")  # type: ignore[arg-type]
    assert two["caches"] == [expected, expected]
    assert {path.name for path in (home / "caches").glob(".*")} <= {".lock"}


def test_a_process_that_cannot_cache_its_shards_stops_all_when_they_are_done(
    two: Mapping[str, list[Any]],
) -> None:
    message = "BrokenImage: second process"
    assert two["broken"] == [(message, ["00000.npy", "00002.npy", "00004.npy"])] * 2


def test_what_is_not_finite_in_one_process_stops_all_at_the_same_step(
    two: Mapping[str, list[Any]], home: Path
) -> None:
    first, second = two["stop"]
    assert first["error"] == second["error"]
    assert first["error"].startswith("NotFinite: training is not finite at step 3: generator/loss = nan")
    assert "first seen when computed again: the term loss" in first["error"]
    assert checkpoint_steps(home / "stop") == [2]


@pytest.mark.parametrize("policy", ["skip", "rollback"])
def test_processes_leave_out_the_same_step(two: Mapping[str, list[Any]], home: Path, policy: str) -> None:
    first, second = two[policy]
    assert first["error"] == second["error"] == ""
    assert checkpoint_steps(home / policy) == [4, 6]
    for name, value in first["weights"].items():
        assert torch.equal(value, second["weights"][name]), name
        assert value.isfinite().all()
    counts = [line.get("generator/skipped_steps") for line in read_log(home / policy)]
    assert counts == ([0, 0, 0, 1, 0, 0, None] if policy == "skip" else [None] * 7)


def test_a_signal_to_one_process_stops_all_after_the_same_step(
    two: Mapping[str, list[Any]], home: Path
) -> None:
    """Agreed on without waiting, so one step later; a checkpoint is there."""
    assert two["signal"] == ["Stopped: stopped by SIGTERM after step 6; the same command goes on"] * 2
    assert checkpoint_steps(home / "signal") == [6]


def test_processes_must_start_alike_and_share_equally(two: Mapping[str, list[Any]]) -> None:
    for error in two["unequal"]:
        assert error.startswith("RuntimeError: the processes must start from the same weights of ")
    for error in two["uneven"]:
        assert error.startswith("ValueError: loop.global_batch_size must be a multiple of the number of proc")


@pytest.mark.slow
def test_shards_train_in_bf16(two_more: Mapping[str, list[Any]], home: Path) -> None:
    """Weights and their average stay float32; all players of the tokenizer."""
    weights = read_model(checkpoint_path(home / "bf16", 3))[0]
    assert {value.dtype for value in weights.values()} == {torch.float32}
    assert all(value.isfinite().all() for value in weights.values())
    assert two_more["bf16"][0]["metrics"] == two_more["bf16"][1]["metrics"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.jit, which the compiler imports
def test_compiled_runs_are_the_same(
    runs: Mapping[str, Run], growth: Mapping[str, Growth], home: Path
) -> None:
    """Compiled without graph breaks, by one process and by two with ddp and fsdp."""
    jobs: dict[str, Job] = {
        f"{parallel}-compiled": (
            trained,
            with_loop(runs[f"generator-{parallel}"], steps=4, save_every=4, compile=True),
            home / f"{parallel}-compiled",
        )
        for parallel in ("ddp", "fsdp")
    }
    together(2, home / "compiled", jobs)
    run = with_loop(runs["generator-ddp"], steps=4, save_every=4, compile=True)
    trained(run, home / "alone-compiled")
    full = with_loop(runs["generator-ddp"], steps=4, save_every=4)
    trained(full, home / "four-steps")
    for name in ("alone", *("ddp", "fsdp")):
        compare(losses(home / f"{name}-compiled"), losses(home / "four-steps"), growth["generator"].logs)


@pytest.mark.slow
def test_torchrun_starts_the_commands(runs: Mapping[str, Run], tmp_path: Path) -> None:
    """Its first step is that of one process, but for float32 sums in another order."""
    configs.save(with_loop(runs["generator-fsdp"], steps=3), tmp_path / "run.yaml")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "openpae"]
    done = subprocess.run(
        [*command, "train-generator", str(tmp_path / "run.yaml"), str(tmp_path / "run")],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(f"done: {tmp_path / 'run'}") == 1
    trained(with_loop(runs["generator-ddp"], steps=3), tmp_path / "alone", exact=False)
    results, expected = (losses(tmp_path / name) for name in ("run", "alone"))
    assert len(results) == len(expected)
    assert results[0] == pytest.approx(expected[0], rel=1e-5)
