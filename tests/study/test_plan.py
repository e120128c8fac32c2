"""Plans: equal stages are planned once, ids depend on content, and misfits are rejected."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest

from openpae import cli
from openpae import config as configs
from openpae.study.plan import Plan, own_data, resolve_rows, snapshots
from openpae.study.settings import Study, StudyData
from openpae.train.settings import GeneratorRun
from tests.study.conftest import planned, tiny

STUDIES = sorted(
    file for file in (configs.PRESETS / "study").rglob("*.yaml") if configs.read_yaml(file)["kind"] == "Study"
)


@pytest.mark.parametrize("file", STUDIES, ids=lambda file: file.stem)
def test_every_study_loads_and_its_rows_fit(file: Path) -> None:
    study = configs.load(Study, file)
    assert study.name == file.stem
    assert len(resolve_rows(study)) == len(study.rows)


def test_configs_that_do_not_fit_each_other_are_rejected_before_anything_runs(
    data: StudyData, tmp_path: Path
) -> None:
    for changes, message in (
        (["tokenizer.model.latent_dim=4"], r"none: the generator's latent shape is \(8, 4, 4\), the token"),
        (
            ["tokenizer.model.latent_dim=4", "generator.model.latent_dim=4"],
            "full: the refiner's latent_dim is 8, the tokenizer's 4",
        ),
        (["refiner.data.augment=flip"], "full: the refiner's data.augment is flip, the tokenizer's none"),
        (["generator.model.num_classes=3"], "has 2 classes; pass --set generator.model.num_classes=2"),
    ):
        with pytest.raises(ValueError, match=message):
            planned(data, tmp_path, changes=changes)
    with pytest.raises(ValueError, match="no row 'ful'; rows: full, none, raw"):
        planned(data, tmp_path, rows=["ful"])
    with pytest.raises(ValueError, match="different names"):
        planned(data, tmp_path, tiny(), tiny())
    with pytest.raises(ValueError, match="label_images and label_maps are needed both"):
        dataclasses.replace(data, label_maps=None)
    with pytest.raises(FileNotFoundError, match="no reference"):
        planned(dataclasses.replace(data, reference=tmp_path / "x.npz"), tmp_path)


def kinds(plan: Plan) -> dict[str, int]:
    names = [stage.kind for stage in plan.stages.values()]
    return {kind: names.count(kind) for kind in names}


def test_what_is_shared_is_planned_once(data: StudyData, tmp_path: Path) -> None:
    """Three rows, two seeds: images, features, refiner and raw targets once; the rest for each of the six."""
    plan = planned(data, tmp_path)
    once = {"pack": 1, "features": 1, "refiner": 1, "raw-targets": 1, "reference": 1}
    each = ("tokenizer", "measure", "latents", "generator", "own-reference")
    assert kinds(plan) == once | dict.fromkeys(each, 6) | {"judge": 12}
    none = next(run for run in plan.runs if run.row == "none")
    assert "prior" not in dict(plan.stages[none.tokenizer].inputs)  # this row has no targets
    again = tiny(name="again", rows=tiny().rows[:1], claims=(), faster=None)
    both = planned(data, tmp_path, tiny(), again)
    assert both.stages.keys() == plan.stages.keys()


def test_a_stage_is_named_by_what_it_is_made_of(data: StudyData, tmp_path: Path) -> None:
    plan = planned(data, tmp_path)
    shutil.copytree(data.images, tmp_path / "copy")
    moved = dataclasses.replace(data, images=tmp_path / "copy", held_out=tmp_path / "copy")
    assert planned(moved, tmp_path / "elsewhere").stages.keys() == plan.stages.keys()
    changed = planned(data, tmp_path, changes=["tokenizer.optim.lr=0.002"]).stages
    same = {"pack", "features", "refiner", "raw-targets", "reference"}
    assert {plan.stages[name].kind for name in plan.stages.keys() & changed.keys()} == same
    workers = planned(data, tmp_path, changes=["tokenizer.loop.num_workers=1"]).stages
    assert workers.keys() == plan.stages.keys()
    (tmp_path / "copy" / "boxes" / "0.png").unlink()
    assert not planned(moved, tmp_path).stages.keys() & plan.stages.keys()


def test_inputs_come_before_what_needs_them(data: StudyData, tmp_path: Path) -> None:
    plan = planned(data, tmp_path)
    seen: set[str] = set(plan.layout.roots)
    for name, stage in plan.stages.items():
        assert {below for _, below in stage.inputs} <= seen
        seen.add(name)


def test_features_without_mirror_images_do_not_give_their_latents(data: StudyData, tmp_path: Path) -> None:
    for augment, served in (("none", False), ("flip", True)):
        both = [f"{stage}.data.augment={augment}" for stage in ("refiner", "tokenizer")]
        plan = planned(data, tmp_path, changes=both)
        latents = [stage for stage in plan.stages.values() if stage.kind == "latents"]
        assert all(("features" in dict(stage.inputs)) == served for stage in latents)


def test_snapshots_are_the_checkpoints_that_the_loop_keeps_for_good(data: StudyData, tmp_path: Path) -> None:
    run = configs.load(GeneratorRun, "generator/tiny")
    for steps, every, keep, expected in (
        (20, 5, 5, [5, 10, 15, 20]),
        (20, 4, 8, [8, 16, 20]),
        (20, 5, 0, [20]),
    ):
        loop = dataclasses.replace(run.loop, steps=steps, save_every=every, keep_every=keep)
        assert snapshots(dataclasses.replace(run, loop=loop)) == expected
    with pytest.raises(ValueError, match=r"none: judge\.curve needs checkpoints on the way"):
        planned(data, tmp_path, changes=["generator.loop.keep_every=0"])


def test_images_are_those_of_the_study_or_all_given(
    data: StudyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The label maps of the study are never combined with images of the command."""
    monkeypatch.chdir(tmp_path)
    for arguments, message in (
        (["study/table2a-small"], "no images at data/tiny-imagenet-100/train"),
        (["study/table2a-small", "--images", str(data.images)], "--images was given without --held-out"),
        (["study/table2a-small", "--label-maps", "maps"], "--label-maps was given without --images"),
        (["study/table2a-full"], "study/setup/full names no images"),
    ):
        with pytest.raises(SystemExit) as stopped:
            cli.main(["study", *arguments])
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err.replace("\n", " ")
    for place in ("tiny-imagenet-100/train", "tiny-imagenet-100/val"):
        shutil.copytree(data.images, tmp_path / "data" / place)
    for place, source in (("images", data.label_images), ("masks", data.label_maps)):
        assert source is not None
        shutil.copytree(source, tmp_path / "data" / "camvid-256" / "val" / place)
    paths = own_data([configs.load(Study, name) for name in ("study/table2a-small", "study/table7-small")])
    assert paths.images == Path("data/tiny-imagenet-100/train")
    assert paths.label_maps == Path("data/camvid-256/val/masks")
