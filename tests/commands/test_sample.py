"""The commands that make images, as a user types them, on a saved tiny tokenizer and generator."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

from openpae import config as configs
from openpae.cli import main
from openpae.commands.sample import SamplerChoice, SampleRun
from openpae.models.configs import LightningDiTConfig
from openpae.models.dit import LightningDiT
from openpae.models.saved import write_generator
from openpae.runtime.terminal import Progress
from openpae.sampling.sampler import evaluations
from openpae.sampling.settings import SamplerConfig
from openpae.storage.model_folder import identity_of, write_classes
from tests.conftest import shaken

QUICK = ("--steps", "3", "--guidance", "2", "--batch-size", "2")


class Pair(NamedTuple):
    tokenizer: Path
    generator: Path
    weak: Path
    """Of the same tokenizer's latents, smaller."""
    stranger: Path
    """Of another tokenizer's."""


@pytest.fixture(scope="module")
def pair(
    tokenizer_folder: Path, tiny_dit_config: LightningDiTConfig, tmp_path_factory: pytest.TempPathFactory
) -> Pair:
    root = tmp_path_factory.mktemp("generators")
    made_with = identity_of(tokenizer_folder).fingerprint
    small = replace(tiny_dit_config, num_layers=1)
    torch.manual_seed(0)
    for name, config, owner in (
        ("generator", tiny_dit_config, made_with),
        ("weak", small, made_with),
        ("stranger", small, "0" * 16),
    ):
        (root / name).mkdir()
        write_generator(root / name, shaken(LightningDiT(config)).state_dict(), config, owner)
    return Pair(tokenizer_folder, root / "generator", root / "weak", root / "stranger")


def run(*arguments: str | Path) -> None:
    main([str(argument) for argument in arguments])


def fails(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    with pytest.raises(SystemExit) as stop:
        run(*arguments)
    assert stop.value.code == 2
    return capsys.readouterr().err


def images_of(folder: Path) -> np.ndarray:
    with np.load(folder / "samples.npz") as file:
        return file["arr_0"]


def record_of(folder: Path, name: str = "samples.json") -> dict[str, object]:
    return json.loads((folder / name).read_text())


# Presets


@pytest.mark.parametrize(
    ("preset", "expected"),
    [
        ("official-250", {"solver": "euler", "steps": 249, "guidance": 2.5, "guidance_start": 0.25}),
        ("official-sde", {"solver": "sde", "steps": 249, "guidance": 1.0}),
        ("fast-28", {"solver": "adams", "steps": 28, "shift": 0.6, "guidance": 2.5, "guidance_start": 0.25}),
        ("fast-45", {"solver": "multistep", "steps": 45, "guidance": 2.5, "guidance_start": 0.25}),
        ("few-15", {"solver": "multistep", "steps": 15, "guidance": 2.5, "guidance_start": 0.25}),
    ],
)
def test_presets_are_what_they_are_called(preset: str, expected: dict[str, object]) -> None:
    config = SamplerChoice(preset=preset).config()
    assert {name: getattr(config, name) for name in expected} == expected
    assert config.shift == expected.get("shift", 0.4)


def test_the_papers_preset_is_the_default_of_the_library_and_of_the_command() -> None:
    assert SamplerChoice().config() == SamplerConfig()
    assert evaluations(SamplerChoice(preset="official-sde").config()) == 250


def test_flags_go_over_the_preset_and_take_back_what_was_tuned(tmp_path: Path) -> None:
    assert SamplerChoice(preset="fast-45", steps=20).config().steps == 20
    tuned = SamplerConfig(guidance=3.0, tuned_on="the Frechet distance to x")
    configs.save(tuned, tmp_path / "best.yaml")
    choice = SamplerChoice(preset=str(tmp_path / "best.yaml"))
    assert choice.config() == tuned
    assert replace(choice, solver="heun").config().tuned_on == tuned.tuned_on
    assert replace(choice, guidance_start=0.5).config().tuned_on is None


def test_choices_that_cannot_be_are_named() -> None:
    with pytest.raises(FileNotFoundError, match=r"no config file or preset 'sampler/fast'.*sampler/fast-45"):
        SamplerChoice(preset="fast").config()
    with pytest.raises(ValueError, match="rk45 finds its own steps: leave --steps out"):
        SamplerChoice(solver="rk45", steps=10).config()
    with pytest.raises(ValueError, match="--batch-size must be >= 1, got 0"):
        SamplerChoice(batch_size=0).config()
    with pytest.raises(ValueError, match="leave --count out"):
        SampleRun(grid=True, count=8).check()
    with pytest.raises(ValueError, match="--columns must be >= 1, got 0"):
        SampleRun(columns=0).check()


def test_labels_of_a_run() -> None:
    assert SampleRun().labels(1000)[0].tolist() == list(range(64))
    assert SampleRun(count=5).labels(10, [7, 3])[0].tolist() == [7, 3, 7, 3, 7]
    assert SampleRun(grid=True, columns=3).labels(10, [7, 3])[0].tolist() == [7, 7, 7, 3, 3, 3]
    spread = SampleRun(grid=True, columns=1).labels(1000)[0].tolist()
    assert len(spread) == 8
    assert (spread[0], spread[-1]) == (0, 999)
    assert SampleRun(grid=True, columns=1).labels(3)[0].tolist() == [0, 1, 2]


# pae sample


def test_a_grid_has_a_class_per_row(pair: Pair, tmp_path: Path) -> None:
    run("sample", pair.tokenizer, pair.generator, tmp_path, "--grid", "--columns", "3", *QUICK)
    with np.load(tmp_path / "samples.npz") as file:
        assert file["arr_1"].tolist() == [0, 0, 0, 1, 1, 1]
        images = file["arr_0"]
    with Image.open(tmp_path / "grid.png") as picture:
        assert picture.size == (3 * 34 - 2, 2 * 34 - 2)
        second_row = np.asarray(picture)[34:66, 34:66]
    assert np.array_equal(second_row, images[4])
    assert record_of(tmp_path)["labels"] == "3 each of [0, 1]"


@pytest.fixture
def named(pair: Pair, tmp_path: Path) -> Path:
    """The generator with names of its classes."""
    folder = shutil.copytree(pair.generator, tmp_path / "named")
    write_classes(folder, ["cat", "dog, wet"], [3, 4])
    return folder


def test_classes_by_name_are_those_by_number(pair: Pair, named: Path, tmp_path: Path) -> None:
    """Also in the record, so that the command with numbers goes on in a folder of the one with names."""
    for name, classes in (("names", ["dog, wet,cat"]), ("numbers", ["1", "0"]), ("list", ["1,0"])):
        run("sample", pair.tokenizer, named, tmp_path / name, "--count", "3", *QUICK, "--classes", *classes)
        assert record_of(tmp_path / name) == record_of(tmp_path / "names")
        assert np.array_equal(images_of(tmp_path / name), images_of(tmp_path / "names"))
    assert record_of(tmp_path / "names")["labels"] == "in turn (1, 0)"


def test_rows_of_one_named_class_show_its_name(pair: Pair, named: Path, tmp_path: Path) -> None:
    grids = {}
    for name, generator, options in (
        ("named", named, ["--grid", "--columns", "2"]),
        ("plain", pair.generator, ["--grid", "--columns", "2"]),
        ("mixed", named, ["--count", "4", "--columns", "2"]),
    ):
        run("sample", pair.tokenizer, generator, tmp_path / f"{name} out", *options, *QUICK)
        with Image.open(tmp_path / f"{name} out" / "grid.png") as picture:
            grids[name] = np.asarray(picture)
    margin = grids["named"].shape[1] - grids["plain"].shape[1]
    assert margin > 20
    assert np.array_equal(grids["named"][:, margin:], grids["plain"])
    assert grids["mixed"].shape == grids["plain"].shape


def test_classes_that_are_not_known_are_named(
    pair: Pair, named: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for generator, classes, message in (
        (named, "cta", "has no class 'cta'; did you mean 'cat'?"),
        (named, "", "an empty text is no class; give numbers or names"),
        (named, "a\nb", r"has no class 'a\nb'; known: 'cat', 'dog, wet'"),
        (
            pair.generator,
            "cat",
            "keeps no names of its classes, so 'cat' is not known; give numbers from 0 to 1",
        ),
    ):
        printed = fails(
            capsys, "sample", pair.tokenizer, generator, tmp_path / "out", "--classes", classes, *QUICK
        )
        assert message in printed
        assert printed.count("\n") == 1
    printed = fails(capsys, "sample", pair.tokenizer, named, tmp_path / "out", "--classes")
    assert "an empty text is no class" in printed
    assert not (tmp_path / "out").exists()


def test_two_processes_draw_what_one_draws(pair: Pair, tmp_path: Path) -> None:
    """To the bit, because a part has the same samples whoever draws it."""
    common = ["sample", pair.tokenizer, pair.generator]
    options = ["--preset", "official-sde", "--guidance", "2", "--guidance-start", "0.3"]
    options += ["--count", "7", "--batch-size", "2", "--steps", "20"]
    run(*common, tmp_path / "one", *options)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, "-m", "openpae", *map(str, common), str(tmp_path / "two"), *options, "--device", "cpu"],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("7 samples in") == 1
    one, two = record_of(tmp_path / "one"), record_of(tmp_path / "two")
    assert two["processes"] == 2
    assert one["samples_sha256"] == two["samples_sha256"]
    assert (tmp_path / "one/samples.npz").read_bytes() == (tmp_path / "two/samples.npz").read_bytes()
    assert not (tmp_path / "two" / "parts").exists()


def test_a_killed_command_goes_on_to_the_same_file(pair: Pair, tmp_path: Path) -> None:
    options = ["--preset", "official-sde", "--count", "40", "--batch-size", "2", "--steps", "60"]
    common = ["sample", str(pair.tokenizer), str(pair.generator)]
    child = subprocess.Popen(
        [sys.executable, "-m", "openpae", *common, str(tmp_path / "killed"), *options],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    parts, deadline = tmp_path / "killed" / "parts", time.monotonic() + 120
    while len(list(parts.glob("*.npy"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    child.wait(timeout=60)
    drawn = len(list(parts.glob("*.npy")))
    assert 3 <= drawn < 20
    assert not (tmp_path / "killed" / "samples.npz").exists()
    for name in ("killed", "undisturbed"):
        run(*common, tmp_path / name, *options)
    assert (tmp_path / "killed/samples.npz").read_bytes() == (
        tmp_path / "undisturbed/samples.npz"
    ).read_bytes()
    assert record_of(tmp_path / "killed") == record_of(tmp_path / "undisturbed")


def test_a_weaker_generator_guides_and_is_named(
    pair: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["sample", pair.tokenizer, pair.generator]
    run(*common, tmp_path / "auto", "--count", "2", *QUICK, "--autoguidance", pair.weak)
    run(*common, tmp_path / "free", "--count", "2", *QUICK)
    assert not np.array_equal(images_of(tmp_path / "auto"), images_of(tmp_path / "free"))
    record = record_of(tmp_path / "auto")
    assert record["autoguidance"] == identity_of(pair.weak).fingerprint
    assert "autoguidance" not in record_of(tmp_path / "free")
    message = fails(capsys, *common, tmp_path / "no", "--autoguidance", pair.stranger)
    assert "makes latents of the tokenizer 0000000000000000" in message
    assert not (tmp_path / "no").exists()


def test_half_precision_draws_nearly_the_same(pair: Pair, tmp_path: Path) -> None:
    common = ["sample", pair.tokenizer, pair.generator]
    for precision in ("fp32", "bf16"):
        run(*common, tmp_path / precision, "--count", "4", *QUICK, "--precision", precision)
    full, half = (images_of(tmp_path / name).astype(int) for name in ("fp32", "bf16"))
    assert 0 < np.abs(full - half).mean() < 4
    assert record_of(tmp_path / "bf16")["precision"] == "bf16"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # PyTorch's own, of parts that compiling imports
def test_a_compiled_generator_draws_the_same(pair: Pair, tmp_path: Path) -> None:
    common = ["sample", pair.tokenizer, pair.generator]
    for name, flags in (("plain", []), ("compiled", ["--compile"])):
        run(*common, tmp_path / name, "--count", "5", *QUICK, *flags)
    plain, compiled = (images_of(tmp_path / name).astype(int) for name in ("plain", "compiled"))
    assert np.abs(plain - compiled).max() <= 1


def test_the_evaluation_knows_the_samples_by_their_hash(
    pair: Pair, image_folder: Path, tmp_path: Path
) -> None:
    run("sample", pair.tokenizer, pair.generator, tmp_path / "out", "--count", "6", *QUICK)
    with pytest.warns(UserWarning, match="only 6 samples"):
        run("evaluate", image_folder, "--samples", tmp_path / "out", "--extractor", "random")
    record = record_of(tmp_path / "out", "evaluation.json")
    assert record["samples_sha256"] == record_of(tmp_path / "out")["samples_sha256"]
    assert record["sampler"]["solver"] == "euler"  # type: ignore[index]


# pae interpolate


def test_a_walk_between_two_images(pair: Pair, image_folder: Path, tmp_path: Path) -> None:
    first, last = sorted(image_folder.rglob("*.png"))[:2]
    run("interpolate", pair.tokenizer, tmp_path, "--images", first, last, "--frames", "4")
    names = sorted(path.name for path in (tmp_path / "frames").iterdir())
    assert names == ["000.png", "001.png", "002.png", "003.png"]
    with Image.open(tmp_path / "strip.png") as strip, Image.open(tmp_path / "frames" / "003.png") as frame:
        assert strip.size == (4 * 34 - 2, 32)
        assert np.array_equal(np.asarray(strip)[:, 102:134], np.asarray(frame))


def test_a_walk_between_two_seeds(
    pair: Pair, named: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    strips = []
    for generator, label in ((pair.generator, "1"), (named, "dog, wet")):
        out = tmp_path / label
        command = ["interpolate", pair.tokenizer, out, "--generator", generator, "--seeds", "0", "1"]
        run(*command, "--label", label, "--frames", "3", *QUICK)
        assert len(list((out / "frames").iterdir())) == 3
        strips.append((out / "strip.png").read_bytes())
    assert strips[0] == strips[1]
    assert "--label takes one class, got 0,1" in fails(capsys, *command, "--label", "0,1", "--overwrite")


@pytest.mark.parametrize(
    ("arguments", "fact"),
    [
        ([], "needs either --images FIRST LAST, or"),
        (["--seeds", "0", "1"], "needs either --images FIRST LAST, or"),
        (["--images", "a.png", "b.png", "--label", "1"], "needs either --images FIRST LAST, or"),
        (["--images", "a.png", "b.png", "--steps", "5"], "leave the sampler's options out"),
    ],
)
def test_half_a_walk_is_refused(
    pair: Pair, tmp_path: Path, arguments: list[str], fact: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fact in fails(capsys, "interpolate", pair.tokenizer, tmp_path / "out", *arguments)
    assert not (tmp_path / "out").exists()


# pae search-guidance


def searched(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[object, str]:
    """Exit code and output; the code is 3 where guidance is of no use, by chance with random weights."""
    code: object = 0
    try:
        run(*arguments)
    except SystemExit as stop:
        code = stop.code
    return code, capsys.readouterr().out


def test_a_search_ends_in_a_preset_that_says_where_it_comes_from(
    pair: Pair, image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [
        "search-guidance", pair.tokenizer, pair.generator, image_folder, tmp_path / "search",
        "--scales", "1.5", "3", "--starts", "0", "0.5", "--samples", "4", "--steps", "2",
        "--extractor", "random",
    ]  # fmt: skip
    code, printed = searched(capsys, *command)
    assert printed.count("samples, guidance") == 4 + 2 + 1  # the last is without guidance, to compare with
    assert "best: guidance" in printed
    assert code == (3 if "not usable: no guidance is at" in printed else 0)
    again, printed = searched(capsys, *command)
    assert printed.count("samples, guidance") == 0  # all of it was known
    assert again == code
    best = tmp_path / "search" / "best.yaml"
    run("sample", pair.tokenizer, pair.generator, tmp_path / "out", "--count", "2", "--preset", best)
    record = record_of(tmp_path / "out")
    assert "the Frechet distance of" in str(record["tuned_on"])
    assert record["steps"] == 2


def test_json_is_the_record(pair: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("sample", *pair[:2], tmp_path, "--count", "2", *QUICK, "--json")
    assert json.loads(capsys.readouterr().out) == record_of(tmp_path)


@pytest.mark.filterwarnings("ignore:only 2 samples")
def test_progress_off_a_terminal_is_lines_and_quiet_has_none(
    pair: Pair, image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(Progress, "EVERY", 0.0)
    models = ["--tokenizer", pair.tokenizer, "--generator", pair.generator, "--sample-count", "2"]
    for name, command in {
        "sampling: 2 of 2": ["sample", *models[1:4:2], tmp_path / "{}", "--count", "3", *QUICK],
        "measuring: 2 of 2": ["evaluate", image_folder, *models, "--extractor", "random", *QUICK, "--out",
        tmp_path / "{}.json"],
    }.items():  # fmt: skip
        run(*(str(word).format("shown") for word in command))
        shown = capsys.readouterr()
        assert name in shown.err
        assert not {"\r", "\x1b"} & set(shown.out + shown.err)
        run(*(str(word).format("quiet") for word in command), "--quiet")
        quiet = capsys.readouterr()
        assert (quiet.out, quiet.err) == (shown.out.replace("shown", "quiet"), "")
