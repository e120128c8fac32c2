"""Folders that an older version made (commit 268bd01, before the rooms) open and go on."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import openpae
from openpae.cli import main
from openpae.data.images import PackedImages
from openpae.data.shards import Shards

ARCHIVE = Path(__file__).parent / "fixtures" / "rooms-before.tar.xz"


@pytest.fixture
def old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A packed data set, a tokenizer, two interrupted runs, latents, samples and a study."""
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)  # the configs of the runs name their data by relative paths
    return tmp_path


def run(*arguments: str) -> None:
    main(list(arguments))


def test_models_and_caches_open(old: Path) -> None:
    tokenizer = openpae.load_tokenizer(old / "tokenizer")
    images = PackedImages(old / "packed")
    z = tokenizer.encode(images.shards.gather(torch.arange(4).numpy()).float() / 255)
    cached = Shards(old / "latents").gather(torch.arange(4).numpy())[:, 0]
    # The cache was encoded under bfloat16 autocast and holds bfloat16: eight bits of a number of order 1.
    torch.testing.assert_close(cached.float(), z, rtol=0.0, atol=0.1)
    run("info", "tokenizer")
    run("info", "latents", "--verify")


@pytest.mark.parametrize("name", ["bare", "generator"])
def test_an_interrupted_run_goes_on_to_the_weights_that_the_old_version_reached(old: Path, name: str) -> None:
    command = "train-generator" if name == "generator" else "train-tokenizer"
    run(command, f"{name}/config.yaml", name)
    weights = load_file(old / name / "checkpoints" / "step-00000004" / "model.safetensors")
    expected = json.loads((old / f"{name}-step-4.json").read_text())
    assert weights.keys() == expected.keys()
    for key, (_, norm) in expected.items():
        # Two steps of AdamW with lr 1e-3 move an entry by at most 2e-3; rounding alone moves it far less.
        norm_here = float(weights[key].double().norm())
        assert norm_here == pytest.approx(norm, abs=2e-4 * weights[key].numel() ** 0.5 + 1e-6), key


def test_samples_of_an_old_pair_are_complete(old: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The record of the old version still belongs to the same command: nothing is drawn again."""
    before = (old / "samples" / "samples.npz").read_bytes()
    record = json.loads((old / "samples" / "samples.json").read_text())
    assert record["seed"] == 0
    run("evaluate", "packed", "--samples", "samples", "--extractor", "random", "--min-samples", "2")
    assert "frechet" in capsys.readouterr().out
    assert (old / "samples" / "samples.npz").read_bytes() == before


def test_a_finished_study_is_not_done_again(old: Path) -> None:
    stages = {file: file.stat().st_mtime_ns for file in (old / "study" / "stages").glob("*.json")}
    table = (old / "study" / "old" / "results.csv").read_bytes()
    images = ("--images", "packed", "--held-out", "packed")
    run("study", "study.yaml", "--out", "study", *images, "--rows", "none")
    assert {file: file.stat().st_mtime_ns for file in (old / "study" / "stages").glob("*.json")} == stages
    assert (old / "study" / "old" / "results.csv").read_bytes() == table
