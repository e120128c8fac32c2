"""Studies: what is the same is done once, what fits not is told before it runs, and verdicts are those of
scipy."""

from __future__ import annotations

import csv
import dataclasses
import math
import os
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy import stats

from openpae import cli
from openpae import config as configs
from openpae.storage.files import read_json
from openpae.study import once, work
from openpae.study.correlations import Point, _rank_correlations, correlations, points
from openpae.study.page import decided, ranks
from openpae.study.plan import Plan, make_plan, own_data, resolve_rows, snapshots
from openpae.study.rehearse import estimates
from openpae.study.run import describe_plan, run_plan
from openpae.study.settings import Claim, Study, StudyData, StudyRow, StudySetup, resolve
from openpae.study.table import Result, curves, finals
from openpae.study.verdicts import compare, first_reach, mean_error, needed_seeds, speed_up
from openpae.train.settings import GeneratorRun

STUDIES = sorted(
    file for file in (configs.PRESETS / "study").rglob("*.yaml") if configs.read_yaml(file)["kind"] == "Study"
)
SETUPS = sorted((configs.PRESETS / "study" / "setup").glob("*.yaml"))
QUICK = [
    *("refiner.loop.steps=2", "tokenizer.loop.steps=2", "generator.loop.steps=4"),
    *(
        "generator.loop.save_every=2",
        "generator.loop.keep_every=2",
        "measure.metrics.count=8",
        "judge.samples=4",
    ),
]


def tiny(**changes: Any) -> Study:
    return dataclasses.replace(configs.load(Study, "study/tiny"), **changes)


@pytest.fixture(scope="module")
def data(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> StudyData:
    """The drawn images, held out too, and label maps of two halves beside two of them."""
    root = tmp_path_factory.mktemp("labelled")
    for number in range(2):
        shutil.copy(image_folder / "boxes" / f"{number}.png", root / f"{number}.png")
        with Image.open(root / f"{number}.png") as image:
            halves = np.zeros((image.height, image.width), dtype=np.uint8)
        halves[:, halves.shape[1] // 2 :] = 1
        (root / "maps").mkdir(exist_ok=True)
        Image.fromarray(halves).save(root / "maps" / f"{number}.png")
        (root / "images").mkdir(exist_ok=True)
        (root / f"{number}.png").rename(root / "images" / f"{number}.png")
    return StudyData(
        images=image_folder, held_out=image_folder, label_images=root / "images", label_maps=root / "maps"
    )


def planned(data: StudyData, out: Path, *studies: Study, **options: Any) -> Plan:
    return make_plan(studies or [tiny()], data, out, **options)


def by_seed(*values: float) -> dict[int, float]:
    return dict(enumerate(values))


def result(study: Study, row: StudyRow, seed: int, value: float) -> Result:
    """A Frechet distance of samples."""
    return Result(
        study=study.name, row=row.name, seed=seed, metric="gfid", step=240, value=value, stderr=None,
        seconds=1, commit="",
    )  # fmt: skip


# Settings


def test_changes_apply_in_order_and_strictly() -> None:
    setup = configs.load(StudySetup, "study/setup/tiny")
    parts = resolve(
        setup, ["tokenizer.loss.mcr=0.5", "tokenizer.loss.mcr=0.25", "tokenizer.loss.mcr_angles=[10.0, 20]"]
    )
    assert parts.tokenizer.loss.mcr == 0.25
    assert parts.tokenizer.loss.mcr_angles == (10.0, 20.0)
    for change, told in (
        ("tokenizer.loss.mcrr=1.0", "unknown key tokenizer.loss.mcrr; did you mean 'mcr'"),
        ("tokenizer.los.mcr=1.0", "unknown key tokenizer.los.mcr"),
        ("tokenizer.loss.mcr=2e-4", r"tokenizer.loss.mcr must be float.*write 0.0002"),
        ("tokenizer.loss.mcr=-1", "loss.mcr must be >= 0"),
        ("sampler.steps=3", "STAGE one of refiner, tokenizer, generator, measure, judge"),
        ("tokenizer.loss.mcr", "a change must be STAGE.FIELD=VALUE"),
        ("tokenizer.loss.mcr=[1", "is not YAML"),
        ("tokenizer.data.images=elsewhere", "a study sets data.images itself"),
        ("generator.loop.seed=3", "a study sets loop.seed itself"),
    ):
        with pytest.raises((ValueError, TypeError), match=told):
            resolve(setup, [change])


def test_a_study_that_contradicts_itself_is_refused() -> None:
    row = StudyRow(name="a")
    for changes, told in (
        ({"rows": (row, row)}, "rows must differ, got 'a' more than once"),
        ({"seeds": (1, 1)}, "seeds must differ"),
        ({"rows": ()}, "at least one row"),
        ({"name": "a b"}, "letters, digits"),
        ({"faster": "b"}, "no row 'b'"),
        ({"claims": (Claim(text="", metric="ssc", better="full", worse="x"),)}, "no row 'x', which a claim"),
    ):
        with pytest.raises(ValueError, match=told):
            tiny(**changes)
    with pytest.raises(ValueError, match="changes to the presets of tokenizer and refiner would have no"):
        StudyRow(name="vae", tokenizer_from="diffusers:a/b", set=("tokenizer.loss.ssr=1.0",))


@pytest.mark.parametrize("file", STUDIES, ids=lambda file: file.stem)
def test_every_study_loads_and_its_rows_fit(file: Path) -> None:
    study = configs.load(Study, file)
    assert study.name == file.stem
    assert len(resolve_rows(study)) == len(study.rows)


@pytest.mark.parametrize("file", SETUPS, ids=lambda file: file.stem)
def test_every_setup_loads(file: Path) -> None:
    assert resolve(configs.load(StudySetup, file), [])


def test_configs_that_do_not_fit_each_other_are_told_before_anything_runs(
    data: StudyData, tmp_path: Path
) -> None:
    for changes, told in (
        (["tokenizer.model.latent_dim=4"], r"none: the generator's latent shape is \(8, 4, 4\), the token"),
        (
            ["tokenizer.model.latent_dim=4", "generator.model.latent_dim=4"],
            "full: the refiner's latent_dim is 8, the tokenizer's 4",
        ),
        (["refiner.data.augment=flip"], "full: the refiner's data.augment is flip, the tokenizer's none"),
        (["generator.model.num_classes=3"], "has 2 classes; pass --set generator.model.num_classes=2"),
    ):
        with pytest.raises(ValueError, match=told):
            planned(data, tmp_path, changes=changes)
    with pytest.raises(ValueError, match="no row 'ful'; rows: full, none, raw"):
        planned(data, tmp_path, rows=["ful"])
    with pytest.raises(ValueError, match="different names"):
        planned(data, tmp_path, tiny(), tiny())
    with pytest.raises(ValueError, match="label_images and label_maps are needed both"):
        dataclasses.replace(data, label_maps=None)
    with pytest.raises(FileNotFoundError, match="no reference"):
        planned(dataclasses.replace(data, reference=tmp_path / "x.npz"), tmp_path)


# The plan


def kinds(plan: Plan) -> dict[str, int]:
    found = [stage.kind for stage in plan.stages.values()]
    return {kind: found.count(kind) for kind in found}


def test_what_is_shared_is_planned_once(data: StudyData, tmp_path: Path) -> None:
    """Three rows, two seeds: images, features, refiner and raw targets once; the rest for each of the six."""
    plan = planned(data, tmp_path)
    once = {"pack": 1, "features": 1, "refiner": 1, "raw-targets": 1, "reference": 1}
    each = ("tokenizer", "measure", "latents", "generator", "own-reference")
    assert kinds(plan) == once | dict.fromkeys(each, 6) | {"judge": 12}
    none = next(cell for cell in plan.cells if cell.row == "none")
    assert "prior" not in dict(plan.stages[none.tokenizer].inputs)  # nothing in it looks at targets
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
    seen: set[str] = set(plan.places.roots)
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


# Statistics


def test_a_verdict_is_that_of_welchs_interval() -> None:
    a, b = by_seed(2.0, 2.3, 1.9, 2.2), by_seed(2.6, 2.5, 2.9)
    found = compare(a, b, higher=False)
    interval = stats.ttest_ind(list(b.values()), list(a.values()), equal_var=False).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high), rel=1e-9)
    assert found.gain == pytest.approx(np.mean(list(b.values())) - np.mean(list(a.values())))
    assert found.verdict == "shown"
    assert compare(b, a, higher=False).verdict == "contradicted"
    assert compare(b, a, higher=True).verdict == "shown"
    assert compare(by_seed(1.0, 2.0), by_seed(1.2, 2.1), higher=True).verdict == "not shown"


def test_rows_of_the_same_models_are_compared_seed_by_seed() -> None:
    """The seeds are far apart, their differences alike: the paired interval sees it, Welch's does not."""
    a, b = by_seed(10.0, 20.0, 30.0), {2: 31.1, 0: 11.0, 1: 20.9, 7: 500.0}
    interval = stats.ttest_1samp([1.0, 0.9, 1.1], 0).confidence_interval(0.95)
    found = compare(a, b, higher=False, paired=True)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high), rel=1e-9)
    assert found.verdict == "shown"
    assert compare(a, {seed: b[seed] for seed in a}, higher=False).verdict == "not shown"
    study = configs.load(Study, "study/table6-small")
    results = [result(study, row, seed, a[seed] + i) for i, row in enumerate(study.rows) for seed in a]
    assert {found.verdict for _, found in decided(study, results)} == {"contradicted"}
    assert {found.stderr for _, found in decided(study, results)} == {0.0}


def test_without_an_error_bar_nothing_is_shown() -> None:
    one = compare(by_seed(1.0), by_seed(2.0, 2.1), higher=False)
    assert (one.verdict, one.reason) == ("agrees", "one seed, which has no error bar")
    assert one.gain == pytest.approx(1.05)
    assert compare(by_seed(1.0), by_seed(2.0, 2.1), higher=True).verdict == "disagrees"
    assert compare({}, by_seed(2.0), higher=False).reason == "not run yet"
    assert compare(by_seed(1.0), {3: 2.0}, higher=False, paired=True).reason == "not run yet"


def test_needed_seeds_are_those_of_the_t_test() -> None:
    """Two-sided 5 %, power 80 %, as tables of the t test have it: 17 and 64 per group for differences of one
    standard deviation and of half of one; never as few as there are."""
    assert needed_seeds(1.0, 1.0) == needed_seeds(-1.0, 1.0) == "about 17"
    assert needed_seeds(0.5, 1.0) == "about 64"
    assert needed_seeds(100.0, 1.0, more_than=3) == "about 4"
    assert needed_seeds(0.01, 1.0) == "more than 100"
    kept = compare(by_seed(1.0, 2.0, 3.0), by_seed(3.0, 4.0, 5.5), higher=False)
    assert kept.verdict == "not shown"
    assert kept.reason.endswith(": about 6")


def test_mean_error_is_numpys() -> None:
    values = [1.0, 2.0, 4.0]
    assert mean_error(values) == pytest.approx((np.mean(values), stats.sem(values)))
    assert mean_error([3.0]) == (3.0, None)


def test_rank_correlations_are_scipys() -> None:
    generator = np.random.default_rng(0)
    columns = generator.integers(0, 5, (20, 4)).astype(float)  # with ties
    columns[:, 1] = 1.0
    with warnings.catch_warnings(action="ignore", category=stats.ConstantInputWarning):
        expected = [stats.spearmanr(columns[:, k], columns[:, -1]).statistic for k in range(3)]
    np.testing.assert_allclose(_rank_correlations(columns), expected, atol=1e-12)


def test_correlations_turn_both_sides_so_that_larger_is_better() -> None:
    """LPC and rFD are better when low: they agree with the quality here, PSNR is its opposite."""
    found = [
        Point(
            group=f"row {i}", metrics={"lpc": float(-i), "rfid": float(10 - i), "psnr": float(-i)}, quality=i
        )
        for i in range(8)
        for _ in range(3)
    ]
    table = {one.metric: one for one in correlations(found, ["lpc", "psnr", "ssc"], against=["psnr", "rfid"])}
    assert table.keys() == {"lpc", "psnr"}
    assert (table["lpc"].rho, table["psnr"].rho) == pytest.approx((1, -1))
    assert (table["lpc"].low, table["lpc"].high) == pytest.approx((1, 1))
    assert table["lpc"].over["psnr"] == pytest.approx((2, 2, 2))
    assert table["lpc"].over["rfid"] == pytest.approx((0, 0, 0))
    assert correlations(found[:12], ["lpc"]) == []  # four settings


def test_the_interval_of_a_correlation_grows_where_seeds_repeat_each_other() -> None:
    """Thirty tokenizers of six settings tell no more than the six; thirty settings do."""
    generator = np.random.default_rng(0)
    x = generator.normal(size=30)
    y = x + generator.normal(size=30)
    apart = [Point(group=str(i), metrics={"ssc": x[i]}, quality=y[i]) for i in range(30)]
    together = [Point(group=str(i % 6), metrics={"ssc": x[i % 6]}, quality=y[i % 6]) for i in range(30)]
    wide, narrow = (correlations(p, ["ssc"])[0] for p in (together, apart))
    assert wide.high - wide.low > 1.5 * (narrow.high - narrow.low)


def test_a_goal_is_reached_on_the_straight_line_between_two_steps() -> None:
    curve = [(100, 50.0), (200, 30.0), (400, 10.0)]
    assert first_reach(curve, 20.0, higher=False) == 300
    assert first_reach(curve, 50.0, higher=False) == 100
    assert first_reach(curve, 60.0, higher=False) == 100
    assert first_reach(curve, 9.0, higher=False) is None
    assert first_reach([(100, 1.0), (200, 3.0)], 2.0, higher=True) == 150


def test_the_speed_up_is_that_of_the_final_quality() -> None:
    slow = {seed: [(100, 60.0), (400, 40.0 + seed)] for seed in range(3)}
    fast = {seed: [(100, 50.0 + seed), (200, 30.0 + seed), (400, 20.0)] for seed in range(3)}
    found = speed_up(fast, slow)
    assert found is not None
    assert list(found.factors.values()) == pytest.approx([400 / 150] * 3)
    assert found.at_least == frozenset()
    assert found.comparison.verdict == "shown"
    back = speed_up(slow, fast)
    assert back is not None
    assert list(back.factors.values()) == [0, 0, 0]
    assert back.comparison.verdict == "not shown"
    at_once = speed_up({0: [(100, 1.0)]}, slow)
    assert at_once is not None
    assert (at_once.factors, at_once.at_least) == ({0: 4.0}, frozenset({0}))
    both = speed_up({0: [(100, 1.0)], 1: [(100, 1.0)]}, slow)
    assert both is not None
    assert (both.comparison.verdict, both.comparison.low) == ("not shown", None)  # two lower bounds alike
    assert speed_up({5: [(1, 1.0)]}, slow) is None


def test_own_distances_have_no_verdict() -> None:
    """The paper says nothing of them."""
    found = [
        Point(group=f"row {i}", metrics={"ssc": float(i), "psnr": i % 3, "rfid": i % 4}, quality=i)
        for i in range(8)
    ]
    verdicts = {quality: [row[-1] for row in ranks(found, quality)[1]] for quality in ("gfid", "gfid_own")}
    assert verdicts == {"gfid": ["shown", "-", "-"], "gfid_own": ["-", "-", "-"]}


# All of it


@pytest.fixture(scope="module")
def done(data: StudyData, tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """Two rows with one seed, done."""
    plan = planned(data, tmp_path_factory.mktemp("study"), changes=QUICK, rows=["none", "full"], seeds=[0])
    assert run_plan(plan, command="pae study tiny", tell=lambda _: None) == []
    return plan


def read(plan: Plan) -> list[dict[str, str]]:
    with (plan.places.out / "tiny" / "results.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_the_table_is_tidy(done: Plan) -> None:
    rows = read(done)
    assert list(rows[0]) == ["study", "row", "seed", "metric", "step", "value", "stderr", "seconds", "commit"]
    measured = {row["metric"] for row in rows if row["row"] == "full" and not row["step"]}
    assert {"ssc", "lpc", "gsq", "erank", "psnr", "ssim", "lpips", "rfid", "ifid"} <= measured
    judged = {(row["metric"], row["step"]) for row in rows if row["row"] == "full" and row["step"]}
    assert {("gfid", "2"), ("gfid", "4"), ("gfid_own", "4"), ("gfid_floor", "4")} <= judged
    record = read_json(done.places.record(next(c.judges[4] for c in done.cells if c.row == "none")))
    (line,) = (r for r in rows if (r["row"], r["metric"], r["step"]) == ("none", "gfid", "4"))
    assert float(line["value"]) == record["metrics"]["gfid"]["value"]
    assert all(math.isfinite(float(row["value"])) and float(row["seconds"]) > 0 for row in rows)


def test_the_report_stands_alone_and_names_the_papers_numbers(done: Plan) -> None:
    page = (done.places.out / "tiny" / "report.html").read_text(encoding="utf-8")
    assert not re.findall(r'(?:src|href)="http', page)
    for text in ("(0.35)", "(1.86)", "gFD", "one seed, which has no error bar", "agrees", "pae study tiny"):
        assert text in page
    assert page.count("data:image/png;base64,") == 2  # a strip of samples for each row
    assert str(done.places.out) not in page


def test_the_tables_are_markdown_too(done: Plan) -> None:
    """The numbers of results.csv, in a table whose lines all have as many cells."""
    text = (done.places.out / "tiny" / "results.md").read_text(encoding="utf-8")
    (line,) = (r for r in read(done) if (r["row"], r["metric"], r["step"]) == ("none", "gfid", "4"))
    (row,) = re.findall(r"^\| none \| 1 \|.*$", text, re.M)
    assert f"| {float(line['value']):.2f} " in row
    for table in re.findall(r"(?:^\|.*\|$\n?)+", text, re.M):
        assert len({cells.count("|") for cells in table.splitlines()}) == 1
    assert "agrees: one seed, which has no error bar" in text


def test_results_are_read_by_their_last_step(done: Plan) -> None:
    from openpae.study.table import collect

    results = collect(done, ["tiny"])
    (curve,) = curves(results, "tiny", "full", "gfid").values()
    assert [step for step, _ in curve] == [2, 4]
    assert finals(results, "tiny", "full", "gfid") == {0: curve[-1][1]}
    assert [point.quality for point in points(done, ["tiny"])] == [
        -finals(results, "tiny", row, "gfid")[0] for row in ("none", "full")
    ]
    none, full = done.cells
    again = dataclasses.replace(full, row="another generator", judges=none.judges)
    assert len(points(dataclasses.replace(done, cells=(none, full, again)), ["tiny"])) == 2  # tokenizers


def test_what_is_done_is_not_done_again(done: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> None:
        raise AssertionError("a stage was done again")

    monkeypatch.setattr(work, "WORK", dict.fromkeys(work.WORK, never))
    before = read(done)
    assert run_plan(done, tell=lambda _: None) == []
    assert read(done) == before
    assert "0 stages timed" in describe_plan(done, estimates(done), 1)


def test_the_time_of_other_seeds_is_that_of_the_first(done: Plan, data: StudyData) -> None:
    more = planned(data, done.places.out, changes=QUICK, rows=["none", "full"], seeds=[0, 1])
    known = estimates(more)
    assert set(known) == more.stages.keys() - done.stages.keys()
    seconds = {c.row: read_json(done.places.record(c.tokenizer))["seconds"] for c in done.cells}
    for cell in more.cells[2:]:
        assert known[cell.tokenizer].seconds == pytest.approx(seconds[cell.row])
        assert not known[cell.tokenizer].rehearsed


def test_training_state_goes_and_the_weights_stay(done: Plan) -> None:
    from openpae.models.saved import load_generator, load_tokenizer

    for cell in done.cells:
        assert cell.generator is not None
        shapes = [
            load(done.places.folder(folder)).config.latent_shape
            for load, folder in ((load_tokenizer, cell.tokenizer), (load_generator, cell.generator))
        ]
        assert shapes == [(8, 4, 4)] * 2
    assert not list((done.places.out / "stages").rglob("state.pt"))


def test_a_study_that_is_stopped_goes_on_to_the_same_numbers(
    done: Plan, data: StudyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = planned(data, tmp_path, changes=QUICK, rows=["none"], seeds=[0])
    whole = dict(work.WORK)

    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    for kind in ("tokenizer", "latents", "judge"):  # before it, in turn
        monkeypatch.setattr(work, "WORK", whole | {kind: stopped})
        with pytest.raises(KeyboardInterrupt):
            run_plan(plan, tell=lambda _: None)
    monkeypatch.setattr(work, "WORK", whole)
    run_plan(plan, tell=lambda _: None)
    values = [
        {(r["metric"], r["step"]): r["value"] for r in read(each) if r["row"] == "none"}
        for each in (plan, done)
    ]
    assert values[0] == values[1]


def test_a_study_that_was_moved_in_the_middle_goes_on(
    done: Plan, data: StudyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The config of a run names folders; those of a run that is not done learn where it is now."""
    plan = planned(data, tmp_path / "old", changes=QUICK, rows=["none"], seeds=[0])

    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    before = [stage for stage in plan.stages.values() if stage.kind in ("pack", "features")]
    for stage in before:
        once.run_stage(stage, plan.places, commit="", quiet=True)
    with monkeypatch.context() as patch:
        patch.setattr(once, "write_json", stopped)  # trained, and killed before it was recorded
        with pytest.raises(KeyboardInterrupt):
            once.run_stage(plan.stages[plan.cells[0].tokenizer], plan.places, commit="", quiet=True)
    (tmp_path / "old").rename(tmp_path / "new")
    moved = planned(data, tmp_path / "new", changes=QUICK, rows=["none"], seeds=[0])
    assert run_plan(moved, tell=lambda _: None) == []
    values = [
        {(r["metric"], r["step"]): r["value"] for r in read(each) if r["row"] == "none"}
        for each in (moved, done)
    ]
    assert values[0] == values[1]


def test_a_row_whose_training_is_not_finite_does_not_stop_the_others(
    data: StudyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = planned(data, tmp_path, changes=QUICK, rows=["none"], seeds=[0, 1])
    first = plan.cells[0].tokenizer
    whole = dict(work.WORK)

    def train(stage: Any, places: Any, quiet: bool) -> Any:
        if stage.id == first:
            raise FloatingPointError("training is not finite at step 1")
        return whole["tokenizer"](stage, places, quiet)

    monkeypatch.setattr(work, "WORK", whole | {"tokenizer": train})
    (told,) = run_plan(plan, tell=lambda _: None)
    assert "none, seed 0" in told
    assert "not finite" in told
    assert {row["seed"] for row in read(plan)} == {"1"}


def test_a_rehearsal_times_what_was_never_done(data: StudyData, tmp_path: Path) -> None:
    plan = planned(data, tmp_path, changes=QUICK, rows=["none"], seeds=[0])
    known = estimates(plan, rehearse=True)
    assert known.keys() == plan.stages.keys()
    assert all(estimate.rehearsed and estimate.seconds >= 0 for estimate in known.values())
    assert not (tmp_path / "stages").exists()


@pytest.mark.filterwarnings("ignore:eRank of .* images in 48 channels")
def test_a_tokenizer_from_elsewhere_is_measured_and_generated_from(data: StudyData, tmp_path: Path) -> None:
    """Two functions of a file: latents 3 x 4 x 4 by picking pixels."""
    file = tmp_path / "pick.py"
    file.write_text(
        "import torch\nimage_size = 32\n"
        "def encode(images):\n    return images[:, :, ::8, ::8]\n"
        "def decode(z):\n    return z.repeat_interleave(8, 2).repeat_interleave(8, 3).clamp(0, 1)\n"
    )
    row = StudyRow(name="pick", tokenizer_from=f"python:{file}", set=("generator.model.latent_dim=3",))
    only = StudyRow(name="features", tokenizer_from="encoder:random-tiny/8", generate=False)
    study = tiny(rows=(row, only), claims=(), faster=None, seeds=(0,))
    plan = planned(data, tmp_path / "out", study, changes=QUICK)
    assert run_plan(plan, tell=lambda _: None) == []
    metrics = {name: {r["metric"] for r in read(plan) if r["row"] == name} for name in ("pick", "features")}
    assert {"psnr", "lpc", "gfid"} <= metrics["pick"]
    assert {"gsq", "erank", "ssc"} <= metrics["features"]
    assert not {"psnr", "gfid"} & metrics["features"]


@pytest.mark.slow
def test_processes_give_the_numbers_of_one(done: Plan, data: StudyData, tmp_path: Path) -> None:
    plan = planned(data, tmp_path, changes=QUICK, rows=["none", "full"], seeds=[0])
    assert run_plan(plan, workers=2, tell=lambda _: None) == []
    numbers = [[(r["row"], r["metric"], r["step"], r["value"]) for r in read(each)] for each in (plan, done)]
    assert numbers[0] == numbers[1]


@pytest.mark.slow
def test_torchrun_gives_the_numbers_of_one_process(done: Plan, data: StudyData, tmp_path: Path) -> None:
    """Gradients are summed in another order: the numbers agree to rounding."""
    places = ["--images", data.images, "--held-out", data.held_out, "--out", tmp_path]
    maps = ["--label-images", data.label_images, "--label-maps", data.label_maps]
    chosen = ["--set", *QUICK, "--rows", "none", "--seeds", "0"]
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*start, "-m", "openpae", "study", "study/tiny", *places, *maps, *chosen]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(list(map(str, command)), check=True, env=environment, capture_output=True)
    with (tmp_path / "tiny" / "results.csv").open(encoding="utf-8") as file:
        found = {(r["metric"], r["step"]): float(r["value"]) for r in csv.DictReader(file)}
    expected = {(r["metric"], r["step"]): float(r["value"]) for r in read(done) if r["row"] == "none"}
    assert found == pytest.approx(expected, rel=0.01, abs=1e-4)


def test_the_command_tells_a_plan(done: Plan, data: StudyData, capsys: pytest.CaptureFixture[str]) -> None:
    where = ["--images", str(data.images), "--held-out", str(data.held_out), "--out", str(done.places.out)]
    maps = ["--label-images", str(data.label_images), "--label-maps", str(data.label_maps)]
    chosen = ["--set", *QUICK, "--rows", "none", "full", "--seeds", "0"]
    cli.main(["study", "study/tiny", *where, *maps, *chosen, "--dry-run"])
    assert f"{len(done.stages)} stages, {len(done.stages)} of them done" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        cli.main(["study", *where])
    assert stop.value.code == 2
    assert "needs at least one STUDY" in capsys.readouterr().err


def test_images_are_those_of_the_study_or_all_given(
    data: StudyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A data set is taken whole: the study's label maps never meet somebody else's images."""
    monkeypatch.chdir(tmp_path)
    for arguments, told in (
        (["study/table2a-small"], "no images at data/tiny-imagenet-100/train"),
        (["study/table2a-small", "--images", str(data.images)], "--images was given without --held-out"),
        (["study/table2a-small", "--label-maps", "maps"], "--label-maps was given without --images"),
        (["study/table2a-full"], "study/setup/full names no images"),
    ):
        with pytest.raises(SystemExit) as stopped:
            cli.main(["study", *arguments])
        assert stopped.value.code == 2
        assert told in capsys.readouterr().err.replace("\n", " ")
    for place in ("tiny-imagenet-100/train", "tiny-imagenet-100/val"):
        shutil.copytree(data.images, tmp_path / "data" / place)
    for place, source in (("images", data.label_images), ("masks", data.label_maps)):
        assert source is not None
        shutil.copytree(source, tmp_path / "data" / "camvid-256" / "val" / place)
    found = own_data([configs.load(Study, name) for name in ("study/table2a-small", "study/table7-small")])
    assert found.images == Path("data/tiny-imagenet-100/train")
    assert found.label_maps == Path("data/camvid-256/val/masks")
