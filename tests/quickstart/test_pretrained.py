"""The pretrained release: small, complete, attributed, and as good as its card says."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from openpae import cli
from openpae.data.openmoji import CATEGORIES
from openpae.models.saved import check_pair
from openpae.quickstart import run
from openpae.quickstart.run import PRETRAINED, SAMPLER, show_pretrained
from openpae.sampling.pipeline import Pipeline
from openpae.storage.files import read_json
from openpae.storage.model_folder import PARTS, README, RECORD, WEIGHTS
from openpae.storage.pairs import list_models

CARD = (PRETRAINED / README).read_text(encoding="utf-8")


def test_it_is_small_and_its_parameters_are_bf16() -> None:
    files = [file for file in PRETRAINED.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 40e6
    for part in PARTS:
        with safe_open(PRETRAINED / part / WEIGHTS, "pt") as file:
            kinds = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
        assert {kind for name, kind in kinds.items() if not name.startswith("latent_")} == {"BF16"}
    assert set(check_pair(*(PRETRAINED / part for part in PARTS))) == set(PARTS)


def test_the_card_attributes_the_pictures_and_repeats_the_records() -> None:
    for text in ("OpenMoji", "CC BY-SA 4.0", "EfficientNet-Lite0", "Apache-2.0", "license: cc-by-sa-4.0"):
        assert text in " ".join(CARD.split())
    for category in CATEGORIES:
        assert category in " ".join(CARD.split())
    rows = dict(re.findall(r"^\| (\w+) \| (-?[\d.]+) \|", CARD, re.M))
    for part in PARTS:
        for name, metric in read_json(PRETRAINED / part / RECORD)["metrics"].items():
            if name in ("psnr", "class_agreement"):  # frechet and kid stand in both
                assert float(rows[name]) == pytest.approx(metric["value"], rel=1e-4)


def test_its_classes_have_names() -> None:
    pipeline = Pipeline.from_pretrained("openmoji-pae")
    assert pipeline.generator.classes is not None
    names, counts = pipeline.generator.classes
    assert names == list(CATEGORIES)
    assert f"| training | {sum(counts):,} |" in CARD
    named, numbered = (
        pipeline(classes, steps=2, sampler=SAMPLER, output="tensor") for classes in (["Flags"], [8])
    )
    assert torch.equal(named, numbered)


def test_its_images_follow_the_class_and_the_seed() -> None:
    pipeline = Pipeline.from_pretrained(PRETRAINED)
    first, same = (pipeline([0, 8], steps=3, sampler=SAMPLER, output="tensor") for _ in range(2))
    other = pipeline([0, 8], steps=3, sampler=SAMPLER, output="tensor", seed=1)
    assert torch.equal(first, same)
    assert (first - other).abs().mean() > 0.02
    assert first.shape == (2, 3, 64, 64)


@pytest.mark.assets
def test_the_quickstart_shows_what_the_card_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forty of the held-out pictures reconstruct as well as all of them do; of samples there is no claim."""
    monkeypatch.setattr(run, "SAMPLER", replace(SAMPLER, steps=3))
    page = show_pretrained(tmp_path / "out", limit=20).read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") >= 3
    for text in ("PSNR", "OpenMoji", "class agreement", "CC BY-SA 4.0", "% are recognised"):
        assert text in page
    here = read_json(tmp_path / "out" / "evaluation.json")["reconstruction"]["metrics"]["psnr"]
    card = read_json(PRETRAINED / "tokenizer" / RECORD)["metrics"]["psnr"]
    assert here["value"] == pytest.approx(card["value"], abs=4 * (here["stderr"] + card["stderr"]))
    with pytest.raises(ValueError, match="holds a quickstart with"):
        show_pretrained(tmp_path / "out", limit=21)


def test_pretrained_and_a_budget_exclude_each_other(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["quickstart", "--pretrained", "--budget", "3min"])
    assert stopped.value.code == 2
    assert "--pretrained trains nothing" in capsys.readouterr().err


def test_the_first_pair_is_at_hand_too() -> None:
    """Docs, benchmarks and published numbers are of it: three times as small, trained for two hours."""
    folder = PRETRAINED.with_name("openmoji")
    assert list_models() == ["openmoji", "openmoji-pae"]
    assert set(check_pair(*(folder / part for part in PARTS))) == set(PARTS)
    images = Pipeline.from_pretrained("openmoji")([0, 8], steps=2, sampler=SAMPLER, output="tensor")
    assert images.shape == (2, 3, 64, 64)
    assert images.isfinite().all()
