"""Several processes train what one trains: the same data, gradients and losses, and each other's checkpoints.

One group of processes is started for all that a number of processes has to show.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, multiprocessing
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from openpae import config as configs
from openpae.data.caches import cache_latents
from openpae.data.images import BrokenImage, PackedImages
from openpae.data.settings import ImageData
from openpae.data.shards import Shards
from openpae.engine.journal import read_log
from openpae.engine.loop import fit
from openpae.engine.run_folder import open_run
from openpae.engine.settings import LoopConfig, OptimConfig
from openpae.engine.task import Update
from openpae.models.configs import DiscriminatorConfig, LightningDiTConfig, PAEConfig
from openpae.objective.settings import TokenizerLoss
from openpae.runtime import processes
from openpae.runtime.draws import Draws
from openpae.storage.model_folder import checkpoint_path, checkpoint_steps, read_model
from openpae.train.generator import GeneratorTask
from openpae.train.settings import GeneratorRun, TokenizerRun
from openpae.train.tokenizer import TokenizerTask

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

Run = TokenizerRun | GeneratorRun
Job = tuple[Any, ...]
"""A function and its arguments."""


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


def trained(run: Run, run_dir: Path) -> dict[str, Any]:
    """What this process saw and did: rows in order, gradients of the first step, weights' names, metrics."""
    task = TokenizerTask(run) if isinstance(run, TokenizerRun) else GeneratorTask(run)
    rows: list[list[float]] = []
    gradients: dict[str, Tensor] = {}
    original = task.batches

    def noting(steps: Sequence[int]) -> Iterator[Any]:
        for batch in original(steps):
            rows.extend(batch[0].float().flatten(1).sum(1).unsqueeze(1).tolist())
            yield batch

    task.batches = noting  # type: ignore[method-assign]
    for player, optimizer in task.optimizers.items():

        def note(optimizer: Any, *_: Any, player: str = player) -> None:
            if any(name.startswith(f"{player}.") for name in gradients):
                return
            for number, weight in enumerate(optimizer.param_groups[0]["params"]):
                whole = weight.grad.full_tensor() if isinstance(weight.grad, DTensor) else weight.grad
                gradients[f"{player}.{number}"] = whole.clone()

        optimizer.register_step_pre_hook(note)
    reductions = dict.fromkeys(task.players, 0)
    for name, player in task.players.items():
        if isinstance(player, DistributedDataParallel):

            def reduce(state, bucket, name=name):  # type: ignore[no-untyped-def]  # DDP reads annotations
                reductions[name] += bucket.is_last()
                return allreduce_hook(state, bucket)

            player.register_comm_hook(None, reduce)
    if isinstance(task, TokenizerTask):
        assert task.discriminator is not None
        # Where no patch is beyond the hinge, the gradient of the last bias is truly 0, and Adam would turn
        # its rounding into steps of lr.
        with torch.no_grad():
            task.discriminator.get_parameter("to_logits.bias").add_(1)
    open_run(run_dir, run)
    metrics = fit(task, run_dir, run.optim, run.loop, quiet=True)
    return {"rows": rows, "gradients": gradients, "metrics": metrics, "reductions": reductions}


def with_loop(run: Run, **changes: Any) -> Run:
    return replace(run, loop=replace(run.loop, **changes))


def helpers() -> dict[str, Any]:
    """What the small functions of `processes` give to this one of two processes."""
    rank = processes.rank()
    ballot = processes.Ballot()
    ones = [ballot(5 * rank if step == 1 else 0) for step in range(4)]
    return {
        "share": processes.broadcast(rank + 7),
        "gather": processes.gather(rank),
        "on_rank0": processes.on_rank0(lambda: rank + 3),
        "error of the first": error_of(lambda: processes.on_rank0(lambda: 1 // rank)),
        "error of the second": error_of(lambda: fail_in(1)),
        "no error": error_of(lambda: fail_in(2)),
        "any_rank": [processes.any_rank(rank == 1), processes.any_rank(False)],
        "mean_of": processes.mean_of(torch.tensor([1.0, 2.0]) * rank).tolist(),
        "largest_of": processes.largest_of(torch.tensor([1.0, -2.0]) * rank).tolist(),
        "norm_of": processes.norm_of(torch.tensor(3.0 + rank)).item(),
        "ballot": [*ones, ballot.close()],
        "rank_slice": list(processes.rank_slice(5)),
    }


def error_of(function: Callable[[], object]) -> str:
    try:
        function()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def fail_in(rank: int) -> None:
    with processes.failing_together():
        if processes.rank() == rank:
            raise ValueError(f"in {rank}")


def cached(run: TokenizerRun, folder: Path, broken: bool = False) -> Any:
    """Latents of the training images, in five shards; the names of two of them where one cannot be read."""
    source = PackedImages(run.data.images)

    def encode(images: Tensor) -> Tensor:
        if broken and processes.rank() == 1:
            raise BrokenImage("second process")
        return images[:, :, ::8, ::8] - 0.5

    def write() -> Shards:
        return cache_latents(
            encode, source, folder, image_size=32, latent_shape=(3, 4, 4), tokenizer_fingerprint="0",
            batch_size=2, per_shard=2,
        )  # fmt: skip

    if broken:
        return error_of(write), sorted(path.name for path in folder.glob("*.npy"))
    return write().fingerprint()


def poisoned(run: GeneratorRun, run_dir: Path) -> dict[str, Any]:
    """Train on a loss that is nan in the second process alone, at step 3 and for the data of step 3."""
    task = GeneratorTask(run)
    updates = task.updates

    def spoilt(batch: Any, draws: Draws, step: int) -> Iterator[Update]:
        bad = draws.step == 3 and draws.rows.start == 1
        for update in updates(batch, draws, step):
            yield replace(update, loss=update.loss * torch.nan) if bad else update

    task.updates = spoilt  # type: ignore[method-assign]
    open_run(run_dir, run)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        error = error_of(lambda: fit(task, run_dir, run.optim, run.loop, quiet=True))
    return {"error": error, "weights": {n: p.detach().clone() for n, p in task.model.named_parameters()}}


def told_to_stop(run: GeneratorRun, run_dir: Path) -> str:
    """Train until the second process gets SIGTERM in step 4."""
    task = GeneratorTask(run)
    updates = task.updates

    def interrupted(batch: Any, draws: Draws, step: int) -> Iterator[Update]:
        if step == 4 and processes.rank() == 1 and draws.rows.start == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return updates(batch, draws, step)

    task.updates = interrupted  # type: ignore[method-assign]
    open_run(run_dir, run)
    return error_of(lambda: fit(task, run_dir, run.optim, run.loop, quiet=True))


def started_unequal(run: GeneratorRun) -> str:
    return error_of(lambda: GeneratorTask(with_loop(run, seed=processes.rank())))  # type: ignore[arg-type]


def refused(run: GeneratorRun) -> str:
    return error_of(lambda: GeneratorTask(run))


def work(rank: int, world: int, folder: Path, jobs: Mapping[str, Job]) -> None:
    """One of the processes: every job, its findings in a file of its own."""
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=world
    )
    for name, (function, *arguments) in jobs.items():
        torch.save(function(*arguments), folder / f"{name}-{rank}.pt")
    distributed.destroy_process_group()


def together(world: int, folder: Path, jobs: Mapping[str, Job]) -> dict[str, list[Any]]:
    """The findings of each process for each job."""
    folder.mkdir()
    multiprocessing.spawn(work, (world, folder, jobs), nprocs=world)
    return {name: [torch.load(folder / f"{name}-{rank}.pt") for rank in range(world)] for name in jobs}


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
    jobs["signal"] = (told_to_stop, with_loop(runs["generator-ddp"], save_every=STEPS), home / "signal")
    jobs["unequal"] = (started_unequal, runs["generator-ddp"])
    jobs["uneven"] = (refused, with_loop(runs["generator-ddp"], global_batch_size=5, device_batch_size=None))
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
    found: dict[str, list[Any]] = request.getfixturevalue("two" if job in QUICK else "two_more")
    return found


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


def losses(run_dir: Path, after: int = 0) -> list[dict[str, float]]:
    """The log without the clock and the learning rate."""
    return [
        {key: value for key, value in line.items() if key not in ("images_per_second", "lr")}
        for line in read_log(run_dir)
        if line["step"] > after
    ]


def compare(found: list[dict[str, float]], expected: list[dict[str, float]]) -> None:
    assert len(found) == len(expected)
    for line, other in zip(found, expected, strict=True):
        assert line == pytest.approx(other, rel=1e-4, abs=1e-7)


def check(world: int, found: Mapping[str, list[Any]], alone: Mapping[str, Any], home: Path, job: str) -> None:
    """Data order, first gradients, losses and metrics."""
    stage = job.split("-")[0]
    expected = alone[stage]
    parts = [each["rows"] for each in found[job]]
    assert [parts[i % world][i // world] for i in range(len(expected["rows"]))] == expected["rows"]
    for each in found[job]:
        assert each["gradients"].keys() == expected["gradients"].keys()
        for name, gradient in each["gradients"].items():
            # A gradient that is truly 0 is its rounding: what counts is how far all of them are off.
            longest = max(float(g.norm()) for key, g in expected["gradients"].items() if key[:3] == name[:3])
            torch.testing.assert_close(
                gradient, expected["gradients"][name], rtol=1e-5, atol=1e-6 * longest, msg=name
            )
        assert each["metrics"] == pytest.approx(expected["metrics"], rel=1e-4)
    compare(losses(home / f"{job}-{world}"), losses(home / stage))


@pytest.mark.parametrize("job", JOBS)
def test_two_processes_train_what_one_trains(
    alone: Mapping[str, Any], by_two: Mapping[str, list[Any]], home: Path, job: str
) -> None:
    check(2, by_two, alone, home, job)


@pytest.mark.slow
@pytest.mark.parametrize("job", QUICK + REST)
def test_four_processes_train_what_one_trains(
    alone: Mapping[str, Any], four: Mapping[str, list[Any]], home: Path, job: str
) -> None:
    check(4, four, alone, home, job)


@pytest.mark.parametrize("job", ["tokenizer-ddp", pytest.param("generator-ddp", marks=pytest.mark.slow)])
def test_gradients_are_reduced_once_a_step(by_two: Mapping[str, list[Any]], job: str) -> None:
    """Of each player, however many device batches a step has and however often a loss asks the network."""
    for found in by_two[job]:
        assert set(found["reductions"].values()) == {STEPS}


def check_goes_on(run_dir: Path, whole: Path) -> None:
    """From halfway on: the losses of the run that was not interrupted, and the same model in the end."""
    compare(losses(run_dir, after=STEPS // 2), losses(whole, after=STEPS // 2))
    found, expected = (read_model(checkpoint_path(folder, STEPS))[0] for folder in (run_dir, whole))
    assert found.keys() == expected.keys()
    for name, value in found.items():
        # Adam turns the rounding of a gradient that is truly 0 (a key's bias) into steps of lr.
        if not name.endswith(("qkv.bias", "k_proj.bias")):
            torch.testing.assert_close(value, expected[name], atol=1e-4, rtol=1e-3, msg=name)


@pytest.mark.parametrize("job", JOBS)
def test_one_process_goes_on_with_a_checkpoint_of_two(
    runs: Mapping[str, Run], by_two: Mapping[str, Any], home: Path, job: str
) -> None:
    """The state is one file under ddp, and shards of both processes under fsdp."""
    halfway(home / f"{job}-2", home / f"{job}-two-one")
    state = checkpoint_path(home / f"{job}-two-one", STEPS // 2)
    assert (state / "state.pt").is_file() == job.endswith("ddp")
    assert len(list(state.glob("state/*.distcp"))) == (2 if job.endswith("fsdp") else 0)
    trained(runs[job], home / f"{job}-two-one")
    check_goes_on(home / f"{job}-two-one", home / job.split("-")[0])


@pytest.mark.slow
@pytest.mark.parametrize("job", QUICK + REST)
def test_four_processes_go_on_with_a_checkpoint_of_two(four: Mapping[str, Any], home: Path, job: str) -> None:
    check_goes_on(home / f"{job}-two-four", home / job.split("-")[0])


def test_two_processes_go_on_with_a_checkpoint_of_one(two: Mapping[str, Any], home: Path) -> None:
    """One process writes one file; two that cut the model into shards read it, and write shards."""
    check_goes_on(home / "one-two", home / "generator")
    assert (checkpoint_path(home / "one-two", STEPS // 2) / "state.pt").is_file()
    assert (checkpoint_path(home / "one-two", STEPS) / "state").is_dir()


# What processes do together


def test_processes_agree(two: Mapping[str, list[Any]]) -> None:
    first, second = two["helpers"]
    assert first["rank_slice"] == [0, 2, 4]
    assert second["rank_slice"] == [1, 3]
    for found in (first, second):
        assert found["share"] == 7
        assert found["gather"] == [0, 1]
        assert found["on_rank0"] == 3
        assert found["error of the first"] == "ZeroDivisionError: integer division or modulo by zero"
        assert found["error of the second"] == "ValueError: in 1"
        assert found["no error"] == ""
        assert found["any_rank"] == [True, False]
        assert found["mean_of"] == [0.5, 1.0]
        assert found["largest_of"] == [1.0, 0.0]
        assert found["norm_of"] == pytest.approx(5.0)
        assert found["ballot"] == [0, 0, 5, 0, 0]  # one call later


def test_latents_cached_by_two_processes_are_those_of_one(
    runs: Mapping[str, Run], two: Mapping[str, list[Any]], home: Path, tmp_path: Path
) -> None:
    expected = cached(runs["tokenizer-ddp"], tmp_path / "alone")  # type: ignore[arg-type]
    assert two["caches"] == [expected, expected]
    assert not list((home / "caches").glob(".*"))


def test_a_process_that_can_not_cache_its_share_stops_all_when_they_are_done(
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
def test_compiled_runs_are_the_same(runs: Mapping[str, Run], alone: Mapping[str, Any], home: Path) -> None:
    """Compiled as a whole, by one process and by two in either way."""
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
    whole = with_loop(runs["generator-ddp"], steps=4, save_every=4)
    trained(whole, home / "four-steps")
    for name in ("alone", *("ddp", "fsdp")):
        compare(losses(home / f"{name}-compiled"), losses(home / "four-steps"))


@pytest.mark.slow
def test_torchrun_starts_the_commands(runs: Mapping[str, Run], home: Path, tmp_path: Path) -> None:
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
    compare(losses(tmp_path / "run")[:3], losses(home / "generator")[:3])
