"""Every command end to end at tiny size, as a user types it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from openpae.cli import COMMANDS, main
from openpae.data.shards import Shards
from openpae.models.saved import load_generator, load_tokenizer
from openpae.storage.model_folder import checkpoint_path, checkpoint_steps

SMALL = ["--loop.steps", "6", "--loop.global-batch-size", "4", "--loop.save-every", "3"]


def run(*arguments: str | Path) -> None:
    main([str(argument) for argument in arguments])


def fails(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """The one line on stderr of a command that must end with exit code 2."""
    with pytest.raises(SystemExit) as stop:
        run(*arguments)
    assert stop.value.code == 2
    message = capsys.readouterr().err.strip()
    assert "Traceback" not in message
    return message


@pytest.fixture(scope="module")
def line(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Refiner, tokenizer, latents, generator and samples, each made by its command."""
    root = tmp_path_factory.mktemp("line")
    run("pack", image_folder, root / "packed", "--size", "32")
    cached = ["--data.images", root / "packed", "--data.feature-cache", root / "features"]
    run("train-refiner", "refiner/tiny", root / "refiner", *cached, *SMALL)
    objective = ["--loss.ssr", "0.2", "--loss.mcr", "0.5", "--loss.scr", "1", "--loss.gan", "0.5"]
    judge = ["--loss.discriminator.kind", "patch", "--loss.discriminator.width", "4"]
    run(
        "train-tokenizer", "tokenizer/tiny", root / "tokenizer",
        *cached, "--prior", root / "refiner", *objective, *judge, *SMALL,
    )  # fmt: skip
    run("cache-latents", root / "tokenizer", root / "packed", root / "latents")
    run("train-generator", "generator/tiny", root / "generator", "--latents", root / "latents", *SMALL)
    run("sample", root / "tokenizer", root / "generator", root / "samples", "--count", "6", "--steps", "3")
    return root


def test_the_line_ends_in_images(line: Path) -> None:
    with np.load(line / "samples" / "samples.npz") as file:
        assert file["arr_0"].shape == (6, 32, 32, 3)
        assert file["arr_0"].dtype == np.uint8
        assert file["arr_1"].tolist() == [0, 1, 0, 1, 0, 1]
    with Image.open(line / "samples" / "grid.png") as grid:
        assert grid.size == (6 * 34 + 2 * 34 - 2, 32)  # eight columns, two of them empty
    assert len(Shards(line / "latents", "latents")) == 10


def test_the_same_command_again_changes_nothing(line: Path) -> None:
    folder = checkpoint_path(line / "generator", 6)
    before = load_file(folder / "model.safetensors")
    run("train-generator", "generator/tiny", line / "generator", "--latents", line / "latents", *SMALL)
    after = load_file(folder / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_runs_own_config_repeats_it(line: Path, tmp_path: Path) -> None:
    run("train-generator", line / "generator" / "config.yaml", tmp_path / "again")
    first, again = load_generator(line / "generator"), load_generator(tmp_path / "again")
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))


def test_a_sample_depends_on_its_seed_not_on_the_batch(line: Path, tmp_path: Path) -> None:
    common = ["sample", line / "tokenizer", line / "generator"]
    run(*common, tmp_path / "few", "--count", "3", "--steps", "3", "--batch-size", "2")
    with np.load(tmp_path / "few" / "samples.npz") as few, np.load(line / "samples" / "samples.npz") as all_:
        difference = few["arr_0"].astype(int) - all_["arr_0"][:3].astype(int)
    assert np.abs(difference).max() <= 1  # rounding to 256 levels


def test_chosen_classes_are_drawn_in_turn(line: Path, tmp_path: Path) -> None:
    run(
        "sample", line / "tokenizer", line / "generator", tmp_path / "one",
        "--count", "3", "--steps", "2", "--classes", "1",
    )  # fmt: skip
    with np.load(tmp_path / "one" / "samples.npz") as file:
        assert file["arr_1"].tolist() == [1, 1, 1]


def test_reconstruct_keeps_the_names(line: Path, image_folder: Path, tmp_path: Path) -> None:
    run("reconstruct", line / "tokenizer", image_folder, tmp_path / "out")
    names = sorted(p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*.png"))
    assert names == sorted(p.relative_to(image_folder).as_posix() for p in image_folder.rglob("*.png"))
    with Image.open(tmp_path / "out" / names[0]) as image:
        assert image.size == (32, 32)


def test_evaluate_writes_a_record(line: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = tmp_path / "record.json"
    random = ["--extractor", "random", "--lpips", "random"]
    with pytest.warns(UserWarning, match="only 10 samples"):
        run("evaluate", line / "packed", "--tokenizer", line / "tokenizer", *random, "--out", record)
    printed = capsys.readouterr().out
    content = json.loads(record.read_text())
    for name in ("psnr", "ssim", "lpips", "frechet"):
        assert name in printed
        assert np.isfinite(content["metrics"][name]["value"])
    assert content["images"] == 10
    with pytest.warns(UserWarning, match="only 6 samples"):
        run("evaluate", line / "packed", "--samples", line / "samples" / "samples.npz", *random)
    content = json.loads((line / "samples" / "evaluation.json").read_text())
    assert content["sampler"]["nfe"] >= 3
    assert content["samples"] == 6
    assert content["sampler"]["seed"] == 0
    assert content["metrics"]["frechet_floor"]["value"] < content["metrics"]["frechet"]["value"]


@pytest.mark.parametrize(
    ("folder", "facts"),
    [
        ("packed", ("packed images", "10 of shape (3, 32, 32)")),
        ("latents", ("cached latents", "10 of shape (2, 8, 4, 4), bfloat16")),
        ("features", ("cached features",)),
        ("refiner", ("a run (RefinerRun)", "6 of 6 steps")),
        ("tokenizer", ("a run (TokenizerRun)", "3, 6")),
        ("generator/checkpoints/step-00000006", ("a generator", "made for")),
    ],
)
def test_info_says_what_a_folder_is(
    line: Path, folder: str, facts: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    run("info", line / folder, "--verify")
    printed = capsys.readouterr().out
    for fact in facts:
        assert fact in printed


def test_info_on_images_and_on_nothing(
    image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("info", image_folder)
    assert "a folder of images" in capsys.readouterr().out
    assert "no folder at" in fails(capsys, "info", tmp_path / "nothing")


def test_a_generator_refuses_another_tokenizer(
    line: Path, tokenizer_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = fails(capsys, "sample", tokenizer_folder, line / "generator", tmp_path / "out")
    assert "makes latents of the tokenizer" in message
    assert not (tmp_path / "out").exists()


def test_latents_of_another_tokenizer_do_not_mix(
    line: Path, tokenizer_folder: Path, image_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = fails(capsys, "cache-latents", tokenizer_folder, line / "packed", line / "latents")
    assert "begun with another" in message
    assert "tokenizer" in message


@pytest.mark.parametrize(
    ("arguments", "facts"),
    [
        (["paint"], ("unknown command 'paint'", "quickstart")),
        (["train-tokenizer"], ("needs CONFIG and RUN_DIR",)),
        (["train-tokenizer", "tokenizer/tiny"], ("needs a run folder",)),
        (["train-tokenizer", "tokenizer/big", "out"], ("no config file or preset 'tokenizer/big'",
        "dinov2-l-d32")),
        (["train-tokenizer", "generator/tiny", "out"], ("of kind 'GeneratorRun'", "TokenizerRun")),
        (["evaluate", "images"], ("nothing to evaluate: give samples, tokenizer",)),
        (["quickstart", "--budget", "soon"], ("12min", "'soon'")),
        (["quickstart", "--budget", "3s"], ("at least 3min",)),
        (["sample", "no", "where", "out"], ("no model at no",)),
        (["sample", "no", "where", "out", "--columns", "0"], ("--columns must be >= 1, got 0",)),
        (["cache-latents", "a", "b", "c", "--batch-size", "0"], ("--batch-size must be >= 1",)),
        (["train-tokenizer", "tokenizer/tiny", "out", "--data.images", "x"], ("no image folder",)),
    ],
)  # fmt: skip
def test_what_can_not_be_done_is_one_line(
    arguments: list[str], facts: tuple[str, ...], capsys: pytest.CaptureFixture[str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    message = fails(capsys, *arguments)
    assert message.startswith("pae: error: ")
    for fact in facts:
        assert fact in message
    assert not list(tmp_path.iterdir())


def test_an_unknown_flag_gets_a_suggestion(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as stop:
        run("train-tokenizer", "tokenizer/tiny", tmp_path / "out", "--optim.lrr", "1")
    assert stop.value.code == 2
    assert "--optim.lr" in capsys.readouterr().err


def test_broken_images_stop_or_are_skipped_by_name(
    image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for number, file in enumerate(sorted(image_folder.rglob("*.png"))):
        (folder / f"{number}.png").write_bytes(file.read_bytes())
    (folder / "3.png").write_bytes(b"no image")
    message = fails(capsys, "pack", folder, tmp_path / "packed", "--size", "32")
    assert "3.png" in message
    assert "--skip-broken" in message
    run("pack", folder, tmp_path / "packed", "--size", "32", "--skip-broken")
    printed = capsys.readouterr().out
    assert "9 images" in printed
    assert "left out 1 broken files" in printed
    assert "3.png" in printed


@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_broken_image_stops_training_with_its_name(
    image_folder: Path, tmp_path: Path, workers: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """In one line, also out of a worker process."""
    folder = tmp_path / "images"
    folder.mkdir()
    for number, file in enumerate(sorted(image_folder.rglob("*.png"))[:4]):
        (folder / f"{number}.png").write_bytes(file.read_bytes())
    (folder / "2.png").write_bytes(b"no image")
    common = ["train-tokenizer", "tokenizer/tiny", tmp_path / "run", "--data.images", folder, *SMALL]
    message = fails(capsys, *common, "--loop.num-workers", workers)
    assert "2.png" in message.splitlines()[-1]
    assert "--data.skip-broken" in message.splitlines()[-1]


def test_a_wrong_path_leaves_no_run_folder_behind(
    line: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The corrected command must not be refused as another config."""
    common = ["train-generator", "generator/tiny", tmp_path / "run", *SMALL]
    fails(capsys, *common, "--latents", tmp_path / "typo")
    run(*common, "--latents", line / "latents")
    assert checkpoint_steps(tmp_path / "run")


def test_ctrl_c_saves_and_the_same_command_goes_on(line: Path, tmp_path: Path) -> None:
    """The interrupted and resumed run equals the one that was left alone, to the bit."""
    steps = ["--loop.steps", "400", "--loop.save-every", "1000", "--loop.log-every", "1"]
    common = ["train-generator", "generator/tiny"]
    latents = ["--latents", str(line / "latents"), *steps]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    child = subprocess.Popen(
        [sys.executable, "-m", "openpae", *common, str(tmp_path / "stopped"), *latents],
        env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    log = tmp_path / "stopped" / "log.jsonl"
    deadline = time.monotonic() + 60
    while not (log.is_file() and log.read_text().count("\n") > 3) and time.monotonic() < deadline:
        time.sleep(0.02)
    child.send_signal(signal.SIGINT)
    _, errors = child.communicate(timeout=60)
    assert child.returncode == 130
    assert "the same command goes on" in errors
    (stopped_at,) = checkpoint_steps(tmp_path / "stopped")
    assert 0 < stopped_at < 400
    for name in ("stopped", "whole"):
        run(*common, tmp_path / name, *latents)
    a, b = (load_generator(tmp_path / name) for name in ("stopped", "whole"))
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    run("--help")
    printed = capsys.readouterr().out
    for name in COMMANDS:
        assert f"  {name} " in printed
    run("--version")
    assert capsys.readouterr().out.startswith("openpae 0.")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        run(name, "--help")
    assert stop.value.code == 0
    assert "usage: pae" in capsys.readouterr().out


def test_a_tokenizer_without_its_encoder_still_decodes(line: Path) -> None:
    tokenizer = load_tokenizer(line / "tokenizer", decode_only=True)
    with torch.no_grad():
        assert tokenizer.decode(torch.randn(1, 8, 4, 4)).shape == (1, 3, 32, 32)
    with pytest.raises(RuntimeError, match="built without its encoder"):
        tokenizer.encode(torch.rand(1, 3, 32, 32))


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            RuntimeError("CUDA out of memory. Tried to allocate 9 GiB"),
            "CUDA out of memory. Tried to allocate 9",
        ),
        (
            RuntimeError("DefaultCPUAllocator: not enough memory: you\nframe #0"),
            "not enough memory: you; lower",
        ),
        (RuntimeError("Storage size calculation overflowed with sizes=[9]"), "sizes of the model"),
        (
            RuntimeError(
                "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: "
                "you tried to allocate 4000000 bytes. Error code 12 (Cannot allocate memory)"
            ),
            "pae: error: out of memory: a tensor of 4,000,000 bytes had no room; lower --batch-size",
        ),
        (MemoryError(), "out of memory; lower --batch-size"),
    ],
)
def test_want_of_memory_is_one_line_and_other_faults_keep_their_traceback(
    error: Exception, message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(argv: object) -> None:
        raise error

    monkeypatch.setitem(COMMANDS, "pack", fail)
    said = fails(capsys, "pack")
    assert message in said
    assert len(said.splitlines()) == 1
    error = RuntimeError("a bug of ours")
    with pytest.raises(RuntimeError, match="a bug of ours"):
        run("pack")
