"""A disk that fills up while something is saved: what was there stays, nothing half-written does, and the
error says what to free."""

from __future__ import annotations

import errno
import io
import re
import resource
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from openpae.commands.describe import describe
from openpae.data.images import ImageFolder
from openpae.data.packing import pack_images
from openpae.data.shards import Shards
from openpae.engine import loop as loop_module
from openpae.engine.settings import LoopConfig, OptimConfig
from openpae.models.configs import LightningDiTConfig
from openpae.storage.files import DiskFull, atomic_file, atomic_folder, explain_disk_full, write_json
from openpae.storage.model_folder import checkpoint_steps
from openpae.train.generator import train_generator
from openpae.train.settings import GeneratorRun
from tests.engine.runs import curve, same, state_of
from tests.faults.children import run_in_child

NUMBERS = {"a": torch.arange(20_000.0), "b": torch.arange(3.0)}


def save_numpy(path: Path) -> None:
    with path.open("wb") as file:
        np.save(file, NUMBERS["a"].numpy())


WRITERS: dict[str, Callable[[Path], object]] = {
    "torch": lambda path: torch.save(NUMBERS, path),
    "safetensors": lambda path: save_file(NUMBERS, path),
    "numpy": save_numpy,
    "python": lambda path: path.write_bytes(bytes(80_000)),
}


@pytest.mark.parametrize("limit", [0, 10, 5_000, 65_000])
@pytest.mark.parametrize("writer", WRITERS)
def test_whoever_writes_the_error_is_one_and_the_old_content_stays(
    tmp_path: Path, writer: str, limit: int
) -> None:
    """torch says "unexpected pos", NumPy "1000 requested and 3 written", safetensors "os error 27"."""
    file, folder = tmp_path / "file", tmp_path / "folder"
    file.write_text("old")
    folder.mkdir()
    (folder / "a").write_text("old")

    def write_file() -> None:
        with atomic_file(file) as partial:
            WRITERS[writer](partial)

    def write_folder() -> None:
        with atomic_folder(folder) as partial:
            (partial / "first").touch()
            WRITERS[writer](partial / "a")

    for action, target in ((write_file, file), (write_folder, folder)):
        ended = run_in_child(action, largest_file=limit)
        assert ended.error.startswith(f"DiskFull: no room for {target}: "), ended.trace
        for part in (
            "bytes and no more",
            "are free on that disk",
            "free some",
            "run the same command",
        ):
            assert part in ended.error
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a", "file", "folder"]
    assert file.read_text() == (folder / "a").read_text() == "old"


def test_other_errors_are_left_as_they_are(tmp_path: Path) -> None:
    def fail() -> None:
        with atomic_file(tmp_path / "a") as partial:
            torch.save(NUMBERS, partial)
            raise RuntimeError("unexpected pos 832 vs 790")

    ended = run_in_child(fail, largest_file=10_000_000)
    assert ended.error == "RuntimeError: unexpected pos 832 vs 790"
    with pytest.raises(PermissionError), atomic_folder(tmp_path / "b"):
        raise PermissionError(errno.EACCES, "Permission denied")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_the_systems_three_numbers_are_known(tmp_path: Path, code: int) -> None:
    """Also behind another error, as where torch writes to a file object of Python."""

    class Full(io.RawIOBase):
        def writable(self) -> bool:
            return True

        def write(self, data: object) -> int:
            raise OSError(code, "no")

    with (
        pytest.raises(DiskFull, match=r"no room for .*a: .* took 0 bytes and"),
        explain_disk_full(tmp_path / "a"),
    ):
        torch.save(NUMBERS, Full())  # type: ignore[arg-type]


def test_json_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"a": 1})
    ended = run_in_child(lambda: write_json(tmp_path / "a.json", {"a": "x" * 1000}), largest_file=500)
    assert ended.error.startswith("DiskFull: no room for ")
    assert (tmp_path / "a.json").read_text() == '{\n "a": 1\n}\n'


# Training


@pytest.fixture
def run(tiny_dit_config: LightningDiTConfig, latents: Shards) -> GeneratorRun:
    loop = LoopConfig(
        steps=8, global_batch_size=4, precision="fp32", device="cpu", ema_decay=0.8, log_every=1, save_every=2
    )
    return GeneratorRun(
        model=tiny_dit_config, latents=latents.folder, optim=OptimConfig(lr=1e-3, clip=1.0), loop=loop
    )


def fill_up_at(step: int, limit: int) -> None:
    """From the checkpoint of this step on, no file of this process grows beyond the limit."""
    save = loop_module.checkpoints.save

    def limited(state: object, run_dir: Path, at: int, loop: LoopConfig) -> None:
        if at >= step:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        save(state, run_dir, at, loop)  # type: ignore[arg-type]

    loop_module.checkpoints.save = limited


@pytest.mark.parametrize(
    "limit",
    [
        pytest.param(100, id="nothing"),
        pytest.param(50_000, id="some weights"),
        pytest.param(500_000, id="weights but not all of the state"),
    ],
)
def test_a_checkpoint_that_does_not_fit_leaves_those_before(
    run: GeneratorRun, tmp_path: Path, limit: int
) -> None:
    """After room was made the same command ends in the same weights."""
    run_dir = tmp_path / "run"

    def train() -> None:
        fill_up_at(6, limit)
        train_generator(run, run_dir, quiet=True)

    ended = run_in_child(train)
    assert ended.error.startswith(f"DiskFull: no room for {run_dir}/checkpoints/step-00000006: "), ended.trace
    written, wanted = (
        int(n.replace(",", "")) for n in re.findall(r"([\d,]+) of ([\d,]+) bytes", ended.error)[0]
    )
    assert written < wanted
    assert checkpoint_steps(run_dir) == [2, 4]
    assert sorted(path.name for path in (run_dir / "checkpoints").iterdir()) == [
        "step-00000002",
        "step-00000004",
    ]
    describe(run_dir, verify=True)
    train_generator(run, run_dir, quiet=True)
    train_generator(run, tmp_path / "whole", quiet=True)
    assert same(state_of(run_dir), state_of(tmp_path / "whole"))
    assert curve(run_dir) == curve(tmp_path / "whole")
    size = sum(file.stat().st_size for file in (run_dir / "checkpoints" / "step-00000006").iterdir())
    assert wanted == pytest.approx(size, rel=0.1)


def test_a_log_that_does_not_fit_stops_the_run_in_one_line(run: GeneratorRun, tmp_path: Path) -> None:
    """And TensorBoard's writer does not die in a thread of its own."""
    run = replace(run, loop=replace(run.loop, steps=20, save_every=5))
    ended = run_in_child(lambda: train_generator(run, tmp_path / "run", quiet=True), largest_file=1500)
    assert re.match(r"DiskFull: no room for .*(log.jsonl|step-00000005): ", ended.error), ended.trace
    train_generator(run, tmp_path / "run", quiet=True)
    train_generator(run, tmp_path / "whole", quiet=True)
    assert curve(tmp_path / "run") == curve(tmp_path / "whole")


def test_shards_that_do_not_fit_are_not_there(image_folder: Path, tmp_path: Path) -> None:
    def pack() -> None:
        pack_images(ImageFolder(image_folder), tmp_path / "packed", size=32, per_shard=4)

    ended = run_in_child(pack, largest_file=10_000)
    assert re.match(
        r"DiskFull: no room for .*00000.npy: .* took 10,000 of 12,288 bytes and no more", ended.error
    )
    assert sorted(path.name for path in (tmp_path / "packed").iterdir()) == [".lock", "header.json"]
    pack()
    Shards(tmp_path / "packed").verify()
