"""`pae evaluate`: every kind of sample and reference, on one process and on two, and its errors."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import re
import socket
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from openpae.cli import main
from openpae.data.images import PackedImages
from openpae.data.shards import Shards
from openpae.eval.settings import EvaluationRun
from openpae.models.configs import LightningDiTConfig
from openpae.models.dit import LightningDiT
from openpae.models.saved import write_generator
from openpae.storage.model_folder import identity_of

FAST = ["--extractor", "random", "--min-samples", "2"]
SAMPLED = ["--sample-count", "11", "--steps", "3", "--guidance", "1.5", "--seed", "5"]


def run(*arguments: str | Path | int) -> None:
    main([str(argument) for argument in arguments])


def fails(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    with pytest.raises(SystemExit) as stop:
        run(*arguments)
    assert stop.value.code == 2
    return capsys.readouterr().err.strip()


def values(record: Path) -> dict[str, float]:
    return {name: metric["value"] for name, metric in json.loads(record.read_text())["metrics"].items()}


@pytest.fixture(scope="module")
def generator_folder(
    tokenizer_folder: Path, tiny_dit_config: LightningDiTConfig, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("generator")
    torch.manual_seed(1)
    model = LightningDiT(tiny_dit_config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    write_generator(folder, model.state_dict(), tiny_dit_config, identity_of(tokenizer_folder).fingerprint)
    return folder


@pytest.fixture(scope="module")
def levels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (9, 32, 32, 3), dtype=np.uint8)


@pytest.fixture
def npz(levels: np.ndarray, tmp_path: Path) -> Path:
    np.savez(tmp_path / "samples.npz", levels)
    return tmp_path / "samples.npz"


def test_samples_of_a_folder_and_of_an_npz_are_the_same(
    npz: Path, levels: np.ndarray, packed: PackedImages, tmp_path: Path
) -> None:
    for number, pixels in enumerate(levels):
        (tmp_path / "folder").mkdir(exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / "folder" / f"{number}.png")
    run("evaluate", packed.shards.folder, "--samples", npz, *FAST)
    run("evaluate", packed.shards.folder, "--samples", tmp_path / "folder", *FAST)
    one = json.loads((tmp_path / "evaluation.json").read_text())
    two = json.loads((tmp_path / "folder" / "evaluation.json").read_text())
    assert one["samples_sha256"] == two["samples_sha256"]
    assert one["metrics"] == two["metrics"]


def test_every_kind_of_reference_gives_the_same_distance(
    npz: Path, packed: PackedImages, image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pixels = packed.shards.gather(np.arange(10)).permute(0, 2, 3, 1).numpy()
    np.savez(tmp_path / "adm.npz", pixels)
    saved = tmp_path / "saved.npz"
    run("evaluate", image_folder, "--save-reference", saved, "--size", "32", *FAST)
    assert "reference in" in capsys.readouterr().out
    assert not (tmp_path / "evaluation.json").exists()
    records = []
    for number, reference in enumerate([image_folder, packed.shards.folder, tmp_path / "adm.npz", saved]):
        run("evaluate", reference, "--samples", npz, *FAST, "--out", tmp_path / f"{number}.json")
        record = json.loads((tmp_path / f"{number}.json").read_text())
        assert (record["reference_n"], record["samples"]) == (10, 9)
        records.append(record)
    for record in records[1:]:
        assert record["reference_sha256"] == records[0]["reference_sha256"]
        for name, metric in records[0]["metrics"].items():
            assert record["metrics"][name]["value"] == pytest.approx(metric["value"], rel=1e-6), name
    assert records[2]["reference_preprocessing"] == "as stored"
    assert records[3]["reference_preprocessing"] == records[0]["reference_preprocessing"]


def test_statistics_alone_leave_metrics_undefined(
    npz: Path, packed: PackedImages, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved, bare = tmp_path / "saved.npz", tmp_path / "bare.npz"
    run("evaluate", packed.shards.folder, "--save-reference", saved, *FAST)
    with np.load(saved) as file:
        np.savez(bare, **{name: file[name] for name in ("mu", "sigma", "facts", "n", "image_size")})
    run("evaluate", bare, "--samples", npz, *FAST)
    assert "kid                  not defined: the reference holds statistics only" in capsys.readouterr().out
    with np.load(saved) as file:
        np.savez(bare, mu=file["mu"], sigma=file["sigma"])
    message = fails(capsys, "evaluate", bare, "--samples", npz, *FAST)
    assert "holds statistics of inception-2015" in message


def test_a_generator_is_evaluated_without_files_and_its_sampler_is_recorded(
    tokenizer_folder: Path, generator_folder: Path, packed: PackedImages, tmp_path: Path
) -> None:
    pair = ["--tokenizer", tokenizer_folder, "--generator", generator_folder]
    run("evaluate", packed.shards.folder, *pair, *SAMPLED, *FAST, "--out", tmp_path / "record.json")
    record = json.loads((tmp_path / "record.json").read_text())
    assert record["tokenizer"] == identity_of(tokenizer_folder).fingerprint
    assert record["generator"] == identity_of(generator_folder).fingerprint
    sampler = record["sampler"]
    assert (sampler["seed"], sampler["steps"], sampler["guidance"]) == (5, 3, 1.5)
    assert (sampler["labels"], sampler["precision"]) == ("class-balanced", "fp32")
    assert sampler["nfe"] > 3
    steps = ["--count", "11", "--steps", "3", "--guidance", "1.5", "--seed", "5"]
    run("sample", tokenizer_folder, generator_folder, tmp_path / "samples", *steps)
    run("evaluate", packed.shards.folder, "--samples", tmp_path / "samples", *FAST)
    stored = values(tmp_path / "samples" / "evaluation.json")
    for name, value in values(tmp_path / "record.json").items():
        assert stored[name] == pytest.approx(value, rel=1e-4), name


def test_a_preset_draws_as_it_says(
    tokenizer_folder: Path, generator_folder: Path, packed: PackedImages, tmp_path: Path
) -> None:
    pair = ["--tokenizer", tokenizer_folder, "--generator", generator_folder, "--sample-count", "3"]
    options = ["--preset", "few-15", "--guidance", "1.5", *FAST, "--out", tmp_path / "record.json"]
    run("evaluate", packed.shards.folder, *pair, *options)
    sampler = json.loads((tmp_path / "record.json").read_text())["sampler"]
    assert (sampler["guidance"], sampler["tuned_on"]) == (1.5, None)
    assert 15 <= sampler["nfe"] <= 30


def test_a_weak_generator_guides_and_is_named(
    tokenizer_folder: Path, generator_folder: Path, packed: PackedImages, tmp_path: Path
) -> None:
    pair = ["--tokenizer", tokenizer_folder, "--generator", generator_folder]
    weak = ["--autoguidance", generator_folder]  # guided by itself, which changes nothing
    for name, options in (("weak", [*weak, "--guidance", "3"]), ("bare", ["--guidance", "1"])):
        common = ["--sample-count", "5", "--steps", "3", *options, *FAST]
        run("evaluate", packed.shards.folder, *pair, *common, "--out", tmp_path / f"{name}.json")
    guided, bare = values(tmp_path / "weak.json"), values(tmp_path / "bare.json")
    assert guided["frechet"] == pytest.approx(bare["frechet"], rel=1e-3)
    sampler = json.loads((tmp_path / "weak.json").read_text())["sampler"]
    assert sampler["autoguidance"] == identity_of(generator_folder).fingerprint


def one_of_two(rank: int, port: int, arguments: list[str], said: Path) -> None:
    """One process as torchrun starts it, but forked, so that no module is imported again."""
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "test",
    }  # fmt: skip
    with said.open("w") as file, contextlib.redirect_stdout(file):
        main(arguments)


def on_two(tmp_path: Path, *arguments: str | Path) -> str:
    """Run a command on two processes and return their output."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    said = [tmp_path / f"{rank}.txt" for rank in range(2)]
    fork = multiprocessing.get_context("fork")
    both = [
        fork.Process(target=one_of_two, args=(rank, port, [*map(str, arguments)], said[rank]))
        for rank in range(2)
    ]
    for process in both:
        process.start()
    for process in both:
        process.join(60)
        assert process.exitcode == 0
    return "".join(file.read_text() for file in said)


def options_for(kind: str, npz: Path, tokenizer: Path, generator: Path) -> list[str | Path]:
    return {
        "samples": ["--samples", npz],
        "sampler": ["--tokenizer", tokenizer, "--generator", generator, *SAMPLED],
        "tokenizer": ["--tokenizer", tokenizer, "--lpips", "random"],
    }[kind]


def check_same(one: dict[str, Any], two: dict[str, Any]) -> None:
    assert one["metrics"].keys() == two["metrics"].keys()
    for name, metric in one["metrics"].items():
        other = two["metrics"][name]
        assert other["value"] == pytest.approx(metric["value"], rel=1e-4), name
        if metric["stderr"] is not None:
            assert other["stderr"] == pytest.approx(metric["stderr"], rel=1e-4), name


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
@pytest.mark.parametrize(("kind", "count"), [("samples", 9), ("sampler", 11), ("tokenizer", 10)])
def test_two_processes_and_other_batches_give_the_numbers_of_one(
    kind: str, count: int, npz: Path, tokenizer_folder: Path, generator_folder: Path, image_folder: Path,
    tmp_path: Path,
) -> None:  # fmt: skip
    """Through the command itself; the counts are no multiples of batches times processes."""
    options = options_for(kind, npz, tokenizer_folder, generator_folder)
    common = ["evaluate", image_folder, *options, *FAST]
    run(*common, "--batch-size", "4", "--out", tmp_path / "one.json")
    said = on_two(tmp_path, *common, "--batch-size", "3", "--out", tmp_path / "two.json")
    assert said.count("record in") == 1
    one, two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two"))
    assert (one["processes"], two["processes"]) == (1, 2)
    assert one["samples"] == two["samples"] == count
    check_same(one, two)
    if kind == "samples":
        assert one["samples_sha256"] == two["samples_sha256"]


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_training_on_two_processes_evaluates_as_on_one(
    tokenizer_folder: Path, packed: PackedImages, latents: Shards, tmp_path: Path
) -> None:
    images = packed.shards.folder
    common = [
        "train-generator",
        "generator/tiny",
        "--latents",
        latents.folder,
        "--tokenizer",
        tokenizer_folder,
    ]
    evaluation = ["--evaluation-images", images, "--evaluation-samples", "7", "--extractor", "random"]
    loop = ["--loop.steps", "2", "--loop.global-batch-size", "4", "--sampler.steps", "2"]
    run(*common[:2], tmp_path / "one", *common[2:], *evaluation, *loop)
    on_two(tmp_path, *common[:2], tmp_path / "two", *common[2:], *evaluation, *loop)
    one, two = (
        json.loads((tmp_path / name / "evaluations" / "step-00000002.json").read_text())
        for name in ("one", "two")
    )
    assert (one["processes"], two["processes"], one["samples"], two["samples"]) == (1, 2, 7, 7)
    for name in ("frechet", "kid", "precision", "recall"):
        assert two["metrics"][name]["value"] == pytest.approx(one["metrics"][name]["value"], rel=1e-3), name


def test_two_processes_reconstruct_what_one_does(
    tokenizer_folder: Path, packed: PackedImages, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["reconstruct", tokenizer_folder, packed.shards.folder]
    run(*command, tmp_path / "one", "--device", "cpu")
    shown = capsys.readouterr().out
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "openpae"]
    done = subprocess.run(
        [sys.executable, "-m", *launcher, *map(str, command), str(tmp_path / "two"), "--device", "cpu"],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    means = [dict(re.findall(r"(psnr|ssim) ([0-9.]+)", text)) for text in (shown, done.stdout)]
    assert means[0].keys() == means[1].keys() == {"psnr", "ssim"}
    for name, value in means[0].items():
        assert float(means[1][name]) == pytest.approx(float(value), rel=0.02)
    one, two = (sorted((tmp_path / name).glob("*.png")) for name in ("one", "two"))
    assert (
        [path.name for path in one]
        == [path.name for path in two]
        == [f"{i:06d}.png" for i in range(len(packed))]
    )
    for ours, theirs in zip(one, two, strict=True):
        # Batches of other sizes may round a level to its neighbour.
        difference = np.asarray(Image.open(ours)).astype(int) - np.asarray(Image.open(theirs))
        assert np.abs(difference).max() <= 1


@pytest.mark.slow
def test_torchrun_splits_an_evaluation(npz: Path, image_folder: Path, tmp_path: Path) -> None:
    common = ["evaluate", image_folder, "--samples", npz, *FAST]
    run(*common, "--out", tmp_path / "one.json")
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "openpae"]
    done = subprocess.run(
        [sys.executable, "-m", *launcher, *map(str, common), "--out", str(tmp_path / "two.json")],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("record in") == 1
    one, two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two"))
    assert two["processes"] == 2
    check_same(one, two)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: np.concatenate([x, x[:2]]), "2 of 11 samples equal an earlier one pixel by pixel"),
        (lambda x: x // 255, "images of a batch are black"),
    ],
    ids=["duplicates", "range"],
)
def test_suspicious_samples_are_warned_of(
    change: Any, message: str, levels: np.ndarray, packed: PackedImages, tmp_path: Path
) -> None:
    np.savez(tmp_path / "odd.npz", change(levels))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run("evaluate", packed.shards.folder, "--samples", tmp_path / "odd.npz", *FAST)
    assert any(message in str(warning.message) for warning in caught)


@pytest.mark.parametrize(
    ("change", "against", "message"),
    [
        (lambda x: x[:, :16, :16], "reference.npz", r"size of the reference, \(32, 32\), got \(16, 16\)"),
        (lambda x: x[:, :, :24], "reference.npz", r"size of the reference, \(32, 32\), got \(32, 24\)"),
        (lambda x: np.tile(x, (1, 2, 2, 1)), "images", "is of 32 x 32 pixels, 64 x 64 are needed"),
        (lambda x: x / 255, "images", r"uint8 images \(N, H, W, 3\) from 0 to 255, got float64"),
        (lambda x: x[:1], "images", "at least 2 samples, got 1"),
    ],
    ids=["size", "not square", "too large", "range", "one"],
)
def test_samples_that_do_not_fit_are_refused(
    change: Any, against: str, message: str, levels: np.ndarray, packed: PackedImages, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    reference = packed.shards.folder
    if against == "reference.npz":
        reference = tmp_path / against
        run("evaluate", packed.shards.folder, "--save-reference", reference, *FAST)
    np.savez(tmp_path / "odd.npz", change(levels))
    said = fails(capsys, "evaluate", reference, "--samples", tmp_path / "odd.npz", *FAST)
    assert re.search(message, said), said
    assert not (tmp_path / "evaluation.json").exists()


def test_not_square_samples_need_a_reference_of_their_size(levels: np.ndarray, tmp_path: Path) -> None:
    np.savez(tmp_path / "wide.npz", levels[:, :, :24])
    np.savez(tmp_path / "real.npz", 255 - levels[:, :, :24])
    run("evaluate", tmp_path / "real.npz", "--samples", tmp_path / "wide.npz", *FAST)
    assert json.loads((tmp_path / "evaluation.json").read_text())["image_size"] == [32, 24]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "nothing to evaluate: give samples, tokenizer, or tokenizer and generator"),
        ({"samples": Path("s"), "tokenizer": Path("t")}, "samples need no tokenizer and no generator"),
        ({"generator": Path("g"), "sample_count": 5}, "generator needs tokenizer"),
        ({"generator": Path("g"), "tokenizer": Path("t")}, "and sample_count"),
        ({"tokenizer": Path("t"), "sample_count": 5}, "generator is missing"),
        ({"samples": Path("s"), "count": 5}, "samples need the full reference"),
        ({"tokenizer": Path("t"), "save_reference": Path("r")}, "compared with their own originals"),
        ({"samples": Path("s"), "min_samples": 1}, "min_samples must be >= 2, got 1"),
        ({"samples": Path("s"), "lpips_weights": "w"}, "which compares reconstructions alone"),
    ],
)
def test_contradictions_are_refused_at_the_door(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EvaluationRun(**options)


def test_what_is_not_there_is_named(
    packed: PackedImages, npz: Path, image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = tmp_path / "none"
    assert "no samples at" in fails(capsys, "evaluate", packed.shards.folder, "--samples", missing, *FAST)
    assert "no reference at" in fails(capsys, "evaluate", missing, "--samples", npz, *FAST)
    bare = ["evaluate", packed.shards.folder, "--samples", npz, *FAST]
    assert "the sampler's options say how --generator draws" in fails(capsys, *bare, "--steps", "9")
    assert "--batch-size must be >= 1, got 0" in fails(capsys, *bare, "--batch-size", "0")
    saved = ["--save-reference", tmp_path / "r.npz", *FAST]
    assert "the side to crop them to is needed: --size" in fails(capsys, "evaluate", image_folder, *saved)
