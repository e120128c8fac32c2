"""The report of the quickstart: headings are computed from the record, and the verdict comes first."""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from openpae import config as configs
from openpae.data.images import PackedImages
from openpae.eval.evaluate import evaluate_samples
from openpae.eval.extractors import load_extractor
from openpae.eval.features import features_of
from openpae.eval.image_stream import tensor_images
from openpae.eval.reference import reference_of
from openpae.models.tokenizer import PAE
from openpae.quickstart import plans
from openpae.quickstart.page import Result, metrics_table, quickstart_report
from openpae.sampling.settings import SamplerConfig


def metric(value: float, stderr: float | None = None) -> dict[str, Any]:
    return {"value": value, "stderr": stderr, "n": 1234, "over": "images"}


def record() -> dict[str, Any]:
    """Made-up values that are all different."""
    return {
        "reconstruction": {"metrics": {"psnr": metric(17.25, 0.123), "lpips": metric(0.4321)}},
        "samples": {"kind": "samples", "seed": 9, "metrics": {
            "frechet": metric(61.7), "frechet_floor": metric(12.3), "class_agreement": metric(0.55),
        }},
        "free": {"psnr": 13.75, "frechet": 148.6},
        "recognised": {"shares": {"0": 0.75, "30": 0.5, "60": 0.125}, "decodes": 48, "among": 200},
    }  # fmt: skip


@pytest.fixture
def result(tiny_pae: PAE, packed: PackedImages, tmp_path: Path) -> Result:
    """Random samples, and run folders with the quickstart's configs and empty logs."""
    for name in ("refiner", "tokenizer", "generator"):
        (tmp_path / name).mkdir()
        configs.save(getattr(plans, f"{name}_run")(tmp_path, 0), tmp_path / name / "config.yaml")
        (tmp_path / name / "log.jsonl").touch()
    return Result(
        out=tmp_path, seconds={"train": 90.0, "sample": 30.0}, tokenizer=tiny_pae, held_out=packed,
        record=record(), samples=torch.rand(18, 3, 32, 32), labels=torch.arange(18) % 9,
        sampler=SamplerConfig(steps=3),
    )  # fmt: skip


def test_the_headings_are_computed_from_the_record(result: Result) -> None:
    page = html.unescape(quickstart_report(result).read_text(encoding="utf-8"))
    headings = re.findall("<h2>(.*?)</h2>", page)
    assert "Held-out emoji are reconstructed at 17.2 dB; 75% are recognised" in headings
    assert "Recognised after a rotation on the sphere: 50% after 30 degrees, 12% after 60 degrees" in headings
    generated = "Generated, at a Frechet distance of 62: real pictures are at 12, the mean picture at 149"
    assert generated in headings
    assert "in 2.0 minutes" in page
    for picture in ("reconstructions.png", "samples.png"):
        assert (result.out / picture).is_file()


def test_the_verdict_is_the_first_line(result: Result) -> None:
    verdict = "not usable: <the reasons> & what to do"
    page = quickstart_report(result, verdict).read_text(encoding="utf-8")
    first = re.search('<h1>.*?</h1>\n<p class="lead">(.*?)</p>', page)
    assert first is not None
    assert html.unescape(first[1]) == "Not usable: <the reasons> & what to do."
    usable = quickstart_report(result).read_text(encoding="utf-8")
    assert "usable" not in usable
    assert re.search('<p class="lead">A PAE tokenizer', usable)


def test_the_table_has_each_metric_once_beside_its_baseline() -> None:
    header, rows = metrics_table(record())
    assert header == ["of", "metric", "value", "meaning", "baseline", "over"]
    table = {(row[0], row[1]): row for row in rows}
    assert len(table) == len(rows) == 2 + 3 + 3
    psnr = table["reconstructions", "PSNR ↑"]
    assert (psnr[2], psnr[4], psnr[5]) == ("17.25 ± 0.12", "mean colour of each patch: 13.75", "1,234 images")
    assert table["samples", "Frechet distance ↓"][4] == "mean picture, repeated: 148.6"
    assert table["samples", "class agreement ↑"][4] == ""
    rotated = table["reconstructions", "recognised after 60 degrees ↑"]
    assert (rotated[2], rotated[4], rotated[5]) == ("12%", "chance: 0.5%", "48 emoji")


def test_what_was_not_measured_is_not_in_the_table() -> None:
    _, rows = metrics_table({"reconstruction": {"metrics": {"psnr": metric(17.25)}}})
    assert [row[:3] for row in rows] == [("reconstructions", "PSNR ↑", "17.25")]


def test_every_metric_of_an_evaluation_has_a_title_and_a_meaning() -> None:
    """Titles are words for readers, not names of fields."""
    draws = torch.Generator().manual_seed(0)
    real, samples = torch.rand(2, 8, 3, 32, 32, generator=draws)
    extractor = load_extractor("random")
    reference = reference_of(features_of(tensor_images(real), extractor), "eight images")
    metrics = evaluate_samples(tensor_images(samples), reference, extractor=extractor, min_samples=2)[
        "metrics"
    ]
    assert {"frechet", "frechet_floor", "frechet_ratio", "kid"} <= metrics.keys()
    _, rows = metrics_table({"samples": {"metrics": metrics}})
    for name, row in zip(metrics, rows, strict=True):
        assert row[1] != name or row[3], row
