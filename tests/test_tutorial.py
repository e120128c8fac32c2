"""The tutorial runs from folder to report at tiny size: its commands, in order."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest

from openpae import cli
from openpae.storage.files import read_json

TEXT = (Path(__file__).parent.parent / "docs" / "tutorial.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(bash|yaml)\n(.*?)```", TEXT.replace("\\\n    ", ""), re.S)
# What makes it tiny: the page's presets and numbers -> smaller ones. Each must stand in the page.
SMALLER = {
    "/quickstart": "/tiny",
    "--size 64": "--size 32",
    "encoder:efficientnet-lite0/8": "encoder:random-tiny/8",
    "--loop.steps 400": "--loop.steps 2",
    "--loop.steps 2500 --loop.evaluate-every 500": "--loop.steps 2",
    "--loop.steps 5000": "--loop.steps 2",
    "--count 500 --lpc-count 50": "--count 10 --lpc-count 1 --lpips random --extractor random",
    "--model.num-classes 10": "--model.num-classes 2",
    "--count 80 --steps 40": "--count 6 --steps 2",
    "samples.npz": "samples.npz --extractor random",
    "study/setup/own": "study/setup/tiny",
    "generator.model.num_classes=10": (
        "generator.model.num_classes=2, judge.curve=false, judge.samples=4, measure.metrics.count=8, "
        "refiner.loop.steps=2, tokenizer.loop.steps=2, generator.loop.steps=2"
    ),
    "seeds: [0, 1, 2]": "seeds: [0]",
}


def smaller(text: str) -> str:
    for old, new in SMALLER.items():
        text = text.replace(old, new)
    return text


def test_everything_that_is_made_smaller_stands_in_the_page() -> None:
    code = "".join(content for _, content in BLOCKS)
    assert [old for old in SMALLER if old not in code] == []


@pytest.mark.filterwarnings("ignore:eRank of .* images", "ignore:only 6 samples")
def test_the_tutorial_runs_from_folder_to_report(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for part in ("train", "val"):
        shutil.copytree(image_folder, tmp_path / "photos" / part)
    done = []
    for kind, content in BLOCKS:
        if kind == "yaml":
            name = content.splitlines()[0].removeprefix("# ")
            (tmp_path / name).write_text(smaller(content), encoding="utf-8")
            continue
        for line in content.splitlines():
            program, *arguments = shlex.split(smaller(line))
            assert program == "pae"
            cli.main([*arguments, "--debug"])
            done.append(arguments[0])
    assert "2 (4 to 6 images each)" in capsys.readouterr().out  # what pae info says first
    assert set(done) == {
        *("info", "pack", "train-refiner", "train-tokenizer", "reconstruct", "profile"),
        *("cache-latents", "train-generator", "sample", "evaluate", "study"),
    }
    for made in (
        "profile/profile.html",
        "samples/grid.png",
        "study/mine/report.html",
        "study/mine/results.csv",
    ):
        assert (tmp_path / "runs" / made).is_file()
    assert len(list((tmp_path / "runs" / "reconstructions").rglob("*.png"))) == 10
    record = read_json(tmp_path / "runs" / "samples" / "evaluation.json")
    assert {"frechet", "frechet_floor"} <= record["metrics"].keys()


def test_the_paths_that_the_page_tells_of_are_those_that_the_commands_write() -> None:
    """What stands in the text as `runs/...` is named by a command above it, or made below its folder."""
    code = "".join(content for kind, content in BLOCKS if kind == "bash")
    folders = set(re.findall(r"(?:runs|data)/[\w-]+", code))
    told = set(re.findall(r"`((?:runs|data)/[\w-]+)", TEXT))
    assert told <= folders
