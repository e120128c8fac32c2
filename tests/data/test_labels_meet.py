"""Wherever two labelled sets meet, a label means the same class in both, and everybody sees which."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from openpae import cli
from openpae.commands.describe import describe
from openpae.data.caches import cache_latents
from openpae.data.classes import class_list
from openpae.data.images import ImageFolder
from openpae.data.packing import pack_images
from openpae.data.settings import ImageData
from openpae.data.shards import Shards
from openpae.data.training import open_training
from openpae.engine.settings import LoopConfig, OptimConfig
from openpae.eval.run import check_reference
from openpae.models.configs import LightningDiTConfig
from openpae.models.saved import load_tokenizer
from openpae.sampling.sampler import balanced_labels
from openpae.storage.model_folder import (
    identity_of,
    read_classes,
    seen_classes,
    trained_classes,
    write_classes,
)
from openpae.train.generator import train_generator
from openpae.train.settings import GeneratorRun
from tests.faults.running import run, workspace


@pytest.fixture
def latents_of(tokenizer_folder: Path, tmp_path: Path) -> Callable[..., Shards]:
    """Latents of a picture or two of each of these classes."""
    model = load_tokenizer(tokenizer_folder)

    def make(name: str, *classes: str, broken: str = "") -> Shards:
        for number, label in enumerate(classes):
            folder = tmp_path / name / label
            folder.mkdir(parents=True)
            for copy in range(2):
                Image.new("RGB", (32, 32), (40 * number, 90 * copy, 7)).save(folder / f"{copy}.png")
                if label == broken:
                    (folder / f"{copy}.png").write_text("no image")
        return cache_latents(
            model.encode,
            ImageFolder(tmp_path / name),
            tmp_path / f"{name}-latents",
            image_size=32,
            latent_shape=model.config.latent_shape,
            tokenizer_fingerprint=identity_of(tokenizer_folder).fingerprint,
            skip_broken=bool(broken),
        )

    return make


@pytest.fixture
def generator(tiny_dit_config: LightningDiTConfig) -> Callable[..., GeneratorRun]:
    def make(latents: Shards, **changes: object) -> GeneratorRun:
        run = GeneratorRun(
            model=replace(tiny_dit_config, num_classes=3),
            latents=latents.folder,
            optim=OptimConfig(lr=1e-3),
            loop=LoopConfig(steps=1, global_batch_size=2, precision="fp32", device="cpu"),
        )
        return replace(run, **changes)  # type: ignore[arg-type]

    return make


OTHERS = [
    (("boat", "chair"), "class 0 is 'apple' in .* and 'boat' in "),
    (("apple", "boat"), "class 2 is 'chair' in .* and missing in "),
    (("apple", "boat", "chair", "door"), "class 3 is missing in .* and 'door' in "),
    (("apple", "boats", "chair"), "class 1 is 'boat' in .* and 'boats' in "),
]


@pytest.mark.parametrize(("classes", "difference"), OTHERS)
def test_held_out_latents_of_other_classes_are_refused_with_the_first_difference(
    latents_of: Callable[..., Shards],
    generator: Callable[..., GeneratorRun],
    tmp_path: Path,
    classes: tuple[str, ...],
    difference: str,
) -> None:
    training, held_out = latents_of("training", "apple", "boat", "chair"), latents_of("held", *classes)
    run = generator(training, held_out_latents=held_out.folder)
    run = replace(run, model=replace(run.model, num_classes=4))
    with pytest.raises(ValueError, match=rf"held-latents must have the classes of .*, but {difference}"):
        train_generator(run, tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("classes", "difference"), OTHERS)
def test_held_out_and_reference_images_of_other_classes_are_refused(
    tmp_path: Path, classes: tuple[str, ...], difference: str
) -> None:
    for place, names in (("training", ("apple", "boat", "chair")), ("held", classes)):
        for name in names:
            (tmp_path / place / name).mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(tmp_path / place / name / "0.png")
    data = ImageData(images=tmp_path / "training", evaluation=tmp_path / "held")
    with pytest.raises(ValueError, match=difference):
        open_training(data)
    generator = tmp_path / "generator"
    generator.mkdir()
    (generator / "model.safetensors").touch()
    write_classes(generator, ["apple", "boat", "chair"], [1, 1, 1])
    with pytest.raises(ValueError, match=difference):
        check_reference(tmp_path / "held", generator)
    check_reference(tmp_path / "training", generator)
    check_reference(tmp_path / "held" / classes[0], generator)  # it says nothing of labels
    open_training(replace(data, evaluation=tmp_path / "held" / classes[0]))


def test_the_order_of_classes_is_shown_and_kept(
    latents_of: Callable[..., Shards], generator: Callable[..., GeneratorRun], tmp_path: Path
) -> None:
    latents = latents_of("images", "0", "10", "2")
    shown = "0 0 (2), 1 10 (2), 2 2 (2)"
    pack_images(ImageFolder(tmp_path / "images"), tmp_path / "packed", size=32)
    train_generator(generator(latents, held_out_latents=latents.folder), tmp_path / "run", quiet=True)
    for folder in ("images", "packed", "images-latents", "run"):
        assert describe(tmp_path / folder)["labels"] == shown
    assert read_classes(tmp_path / "run") == (["0", "10", "2"], [2, 2, 2])
    many = class_list([f"c{label}" for label in range(1000)], [5] * 1000)
    assert many.startswith("0 c0 (5), 1 c1 (5), ")
    assert many.endswith(", ..., 999 c999 (5)")
    assert len(many) < 400


def test_a_class_that_skipping_empties_is_named_and_not_sampled(
    latents_of: Callable[..., Shards], generator: Callable[..., GeneratorRun], tmp_path: Path
) -> None:
    latents = latents_of("images", "apple", "boat", "chair", broken="boat")
    with pytest.warns(UserWarning, match="no image of class 1 boat; it is not sampled"):
        train_generator(generator(latents), tmp_path / "run", quiet=True)
    trained = trained_classes(tmp_path / "run", 3)
    assert trained == [0, 2]
    assert balanced_labels(5, trained).tolist() == [0, 2, 0, 2, 0]
    assert seen_classes(tmp_path / "run", 3, (2, 0)) == trained
    with pytest.raises(ValueError, match=r"run saw no training image of class 1 \(boat\); .* classes 0, 2"):
        seen_classes(tmp_path / "run", 3, (0, 1))


def test_commands_name_a_class_that_skipping_empties_and_sample_the_others(tmp_path: Path) -> None:
    workspace(tmp_path)
    for file in (tmp_path / "images" / "dogs").iterdir():
        file.write_text("no image")
    for command in (
        "pae pack images some --size 32 --skip-broken",
        "pae cache-latents tokenizer images some-latents --device cpu --skip-broken",
    ):
        outcome = run(command, tmp_path)
        assert "labels: 0 cats (3), 1 dogs (0)" in outcome.everything
        assert "no image is left of class 1 dogs" in outcome.everything
    write_classes(tmp_path / "generator", ["cats", "dogs"], [3, 0])
    outcome = run("pae sample tokenizer generator out --count 3 --steps 1 --device cpu", tmp_path)
    assert outcome.code == 0, outcome.everything
    assert json.loads((tmp_path / "out" / "samples.json").read_text())["count"] == 3
    outcome = run("pae sample tokenizer generator other --classes 1 --steps 1 --device cpu", tmp_path)
    assert (outcome.code, "no training image of class 1 (dogs)" in outcome.line) == (2, True)


@pytest.mark.parametrize("form", ["folder", "label file", "tar"])
def test_names_travel_from_the_images_to_the_samples(
    tokenizer_folder: Path,
    generator: Callable[..., GeneratorRun],
    image_folder: Path,
    tmp_path: Path,
    form: str,
) -> None:
    files = sorted(image_folder.rglob("*.png"))
    source, names = str(tmp_path / "images"), ["a cat", "dog, wet"]
    (tmp_path / "images").mkdir()
    for number, file in enumerate(files):
        home = tmp_path / "images" / ("" if form == "label file" else names[number % 2])
        home.mkdir(exist_ok=True)
        shutil.copy(file, home / f"{number}.png")
    if form == "label file":
        rows = [f'{number}.png,"{names[number % 2]}"' for number in range(len(files))]
        (tmp_path / "labels.csv").write_text("\n".join(["file,label", *rows]))
        source += f"#{tmp_path / 'labels.csv'}"
    elif form == "tar":
        source = shutil.make_archive(str(tmp_path / "train"), "tar", tmp_path / "images")
    cli.main(["pack", source, str(tmp_path / "packed"), "--size", "32"])
    folders = [str(tmp_path / name) for name in ("packed", "latents")]
    cli.main(["cache-latents", str(tokenizer_folder), *folders, "--device", "cpu"])
    run = generator(Shards(tmp_path / "latents"))
    train_generator(replace(run, model=replace(run.model, num_classes=2)), tmp_path / "run", quiet=True)
    assert describe(tmp_path / "run")["labels"] == "0 a cat (5), 1 dog, wet (5)"
    command = ["sample", str(tokenizer_folder), str(tmp_path / "run"), str(tmp_path / "out")]
    cli.main([*command, "--count", "3", "--steps", "1", "--classes", "dog, wet,a cat"])
    assert json.loads((tmp_path / "out" / "samples.json").read_text())["labels"] == "in turn (1, 0)"


def test_a_damaged_list_of_classes_is_named(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    for content in ({}, {"classes": [1]}, {"classes": [{"label": 1, "name": "a", "images": 2}]}):
        (tmp_path / "classes.json").write_text(json.dumps(content))
        with pytest.raises(ValueError, match=r"classes.json is damaged: its classes must each have label"):
            read_classes(tmp_path)


@pytest.mark.parametrize("names", [("train", "val"), ("Training", "test", "meta"), ("a", "train", "valid")])
def test_a_root_of_splits_is_refused_with_a_hint(
    image_folder: Path, tmp_path: Path, names: tuple[str, ...]
) -> None:
    for name in names:
        shutil.copytree(image_folder / "boxes", tmp_path / name / "boxes")
    with pytest.raises(ValueError, match=r"holds the splits .*, not classes; give one of them, .*rain"):
        ImageFolder(tmp_path)


def test_a_class_may_be_called_train(image_folder: Path, tmp_path: Path) -> None:
    for name in ("train", "bus"):
        shutil.copytree(image_folder / "boxes", tmp_path / name)
    assert ImageFolder(tmp_path).classes == ["bus", "train"]
