"""No command replaces a file that it did not make, writes into an input, or beside another process."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from pathlib import Path

import pytest
from PIL import Image

from openpae.storage.outputs import LOCK, locked
from tests.faults.more_cases import MINE, WALK
from tests.faults.running import GENERATOR, TOKENIZER, Case, run
from tests.faults.spoiling import PACK, SAMPLE

RECONSTRUCT = "pae reconstruct tokenizer large out --device cpu"
PROFILE = (
    "pae profile tokenizer --images packed --out out --extractor none --lpips random --count 4 --lpc-count 2 "
    "--device cpu"
)
SEARCH = (
    "pae search-guidance tokenizer generator packed out --extractor random --samples 2 --scales 2 3 "
    "--starts 0 --ends 1 --steps 1 --device cpu"
)
GENERATE = GENERATOR.replace(" run ", " out ")
TRAIN = TOKENIZER.replace(" run ", " out ")
STUDY = (
    "pae study study/fig1-small --images images --held-out images --set generator.model.num_classes=2 --out"
)
CACHE = "pae cache-latents tokenizer packed out --device cpu"


@pytest.fixture
def copy(ready: Path, tmp_path: Path) -> Path:
    """A fresh copy of the workspace; `large` has its images at a size that the tokenizer takes."""
    shutil.copytree(ready, tmp_path / "copy", symlinks=True)
    shutil.copytree(ready / "images", tmp_path / "copy" / "large")
    for file in (tmp_path / "copy" / "large").rglob("*.png"):
        Image.open(file).resize((48, 40)).save(file)
    return tmp_path / "copy"


def contents(root: Path) -> dict[str, str]:
    """Every file and link below a folder, by its hash; locks do not count."""
    return {
        str(path.relative_to(root)): os.readlink(path)
        if path.is_symlink()
        else hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if (path.is_symlink() or path.is_file()) and path.name != ".output"
    }


@pytest.mark.parametrize("case", MINE, ids=lambda case: case.given)
def test_a_refused_command_changes_nothing(case: Case, copy: Path) -> None:
    with contextlib.chdir(copy):
        case.spoil()
    before = contents(copy)
    outcome = run(case.command, copy)
    assert outcome.code == 2, outcome.everything
    assert contents(copy) == before


TARGETS = {
    f"{SAMPLE} --format png": ("images", "grid.png", "samples.json"),
    f"{SAMPLE} --format npz": ("samples.npz",),
    f"{SAMPLE} --format safetensors": ("samples.safetensors",),
    f"{SAMPLE} --format latents": ("latents.safetensors",),
    WALK: ("frames", "strip.png"),
    RECONSTRUCT: ("cats/0.png", "dogs/3.png"),
    PROFILE: ("profile.json", "profile.html"),
    SEARCH: ("search.json", "best.yaml"),
    TRAIN: ("log.jsonl", "checkpoints", "tensorboard", "evaluations"),
    GENERATE: ("log.jsonl", "profile"),
    "pae train-refiner refiner/tiny out --data.images packed": ("checkpoints",),
    PACK: ("notes",),
    CACHE: ("00000.npy",),
    "pae export generator out": ("velocity.pt2",),
    "pae fit-targets random-tiny images out": ("",),
    "pae quickstart --out out": ("samples.npz", "tokenizer", "report.html"),
    "pae quickstart --out out --pretrained": ("data", "evaluation.json"),
    "pae evaluate packed --samples packed --out out/mine.json": ("mine.json",),
    "pae evaluate packed --save-reference out/mine.npz": ("mine.npz",),
    "pae bench generator --out out/mine.json": ("mine.json",),
    f"{STUDY} out": tuple(f"fig1-small/{name}" for name in ("results.csv", "results.md", "report.html")),
}


@pytest.mark.parametrize(
    ("command", "name", "shape"),
    [(command, name, "plain") for command, names in TARGETS.items() for name in names]
    + [
        (command, TARGETS[command][0], "behind a link")
        for command in (f"{SAMPLE} --format png", WALK, SEARCH)
    ],
)
def test_files_of_the_user_survive_every_command(command: str, name: str, shape: str, copy: Path) -> None:
    home = copy / ("out" if shape == "plain" else "far")
    target = home / name
    if Path(name).suffix or not name:
        target.parent.mkdir(parents=True, exist_ok=True)
        (target if name else home / "notes").parent.mkdir(parents=True, exist_ok=True)
        (target if name else home / "notes").write_text("years of work")
    else:
        shutil.copytree(copy / "images", target)
    if shape != "plain":
        (copy / "out").symlink_to("far")
    before = contents(copy)
    outcome = run(command, copy)
    assert (outcome.code, "Traceback" in outcome.everything) == (2, False), outcome.everything
    assert contents(copy) == before


def test_a_study_says_which_file_is_in_its_way(copy: Path) -> None:
    for name in ("results.md", "results.csv"):
        (copy / "out" / "fig1-small").mkdir(parents=True, exist_ok=True)
        (copy / "out" / "fig1-small" / name).write_text("years of work")
        outcome = run(f"{STUDY} out", copy)
        assert f"out/fig1-small/{name} exists and was not made by this command" in outcome.line


@pytest.mark.parametrize(
    ("command", "inside"),
    [
        (SAMPLE, "tokenizer/out"),
        (SAMPLE, "generator"),
        (WALK, "images/cats/0.png/out"),
        (WALK, "tokenizer"),
        (RECONSTRUCT, "large"),
        (RECONSTRUCT, "large/out"),
        (PROFILE, "packed/out"),
        (SEARCH, "packed"),
        (PACK, "images/out"),
        (CACHE, "packed/out"),
        (CACHE, "tokenizer/out"),
        ("pae export generator out", "generator/out"),
        ("pae fit-targets random-tiny images out", "images/out"),
        (TRAIN, "images/run"),
        (GENERATE, "latents/run"),
        (f"{STUDY} out", "images/study"),
    ],
)
def test_nothing_is_written_into_an_input(command: str, inside: str, copy: Path) -> None:
    before = contents(copy)
    outcome = run(command.replace(" out", f" {inside}"), copy)
    assert (outcome.code, "Traceback" in outcome.everything) == (2, False), outcome.everything
    assert contents(copy) == before


@pytest.mark.parametrize("command", [SAMPLE, f"{SAMPLE} --format png", WALK, RECONSTRUCT, PROFILE, SEARCH])
def test_a_command_replaces_what_it_made_itself_and_a_link_is_kept(command: str, copy: Path) -> None:
    (copy / "out").symlink_to("far")
    for _ in range(2):
        outcome = run(command, copy)
        # Two samples of an untrained generator show no gain of guidance: exit 3, with the record written.
        assert outcome.code == (3 if command == SEARCH else 0), outcome.everything
    assert (copy / "out").is_symlink()
    assert len(list((copy / "far").iterdir())) >= 2


@pytest.mark.parametrize(
    ("command", "name"),
    [
        (f"{SAMPLE} --format png", "images/mine.png"),
        (SAMPLE, "samples.npz"),
        (WALK, "strip.png"),
        (RECONSTRUCT, "cats/0.png"),
        (PROFILE, "profile.html"),
        (SEARCH, "search.json"),
        ("pae bench generator --out out/mine.json", "mine.json"),
    ],
)
def test_overwrite_replaces_what_the_command_names(command: str, name: str, copy: Path) -> None:
    for path in (copy / "out" / name, copy / "out" / "notes"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("years of work")
    outcome = run(f"{command} --overwrite", copy)
    assert outcome.code == (3 if command == SEARCH else 0), outcome.everything
    assert not (copy / "out" / name).is_file() or (copy / "out" / name).read_bytes() != b"years of work"
    assert (copy / "out" / "notes").read_text() == "years of work"


@pytest.mark.parametrize(
    ("command", "doing"),
    [
        (SAMPLE, "sampling"),
        (RECONSTRUCT, "reconstructing"),
        (PACK, "writing"),
        (CACHE, "writing"),
        (SEARCH, "searching"),
    ],
)
def test_a_second_process_in_one_folder_is_refused(command: str, doing: str, copy: Path) -> None:
    with locked(copy / "out", doing):
        outcome = run(command, copy)
        assert {path.name for path in (copy / "out").iterdir()} == {LOCK}, "it claims no names"
    assert outcome.code == 2
    assert outcome.line == f"another process is {doing} in out; wait for it, stop it, or name another folder"
    assert run(command, copy).code == (3 if command == SEARCH else 0)


@pytest.mark.parametrize(
    ("command", "partial"),
    [
        (SAMPLE, ".grid.png.openpae-partial"),
        (SAMPLE, ".samples.npz.openpae-partial"),
        (WALK, ".strip.png.openpae-partial"),
        (f"{SAMPLE} --format png", ".images.openpae-partial"),
        (RECONSTRUCT, "cats/.0.png.openpae-partial"),
        (WALK, ".frames.openpae-old"),
    ],
)
def test_a_planted_link_is_not_followed(command: str, partial: str, copy: Path) -> None:
    (copy / "mine").mkdir()
    (copy / "mine" / "notes").write_text("years of work")
    link = copy / "out" / partial
    link.parent.mkdir(parents=True)
    link.symlink_to(copy / ("mine/notes" if ".png" in partial or ".npz" in partial else "mine"))
    assert run(command, copy).code == 0
    assert (copy / "mine" / "notes").read_text() == "years of work"


def test_reconstructions_are_written_whole_or_not_at_all(copy: Path) -> None:
    """A disk that fills up in the middle of the first file leaves neither it nor a part of it."""
    outcome = run(RECONSTRUCT, copy, largest_file=400)
    assert outcome.code == 2, outcome.everything
    assert "no room for" in outcome.line
    assert not list((copy / "out").rglob("*.png*"))
