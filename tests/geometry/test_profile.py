"""`pae profile`: metrics, undefined metrics, record, page, errors."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from openpae.data.images import ImageFolder, PackedImages
from openpae.data.label_maps import Segmented
from openpae.eval.estimate import Estimate
from openpae.eval.extractors import load_extractor
from openpae.eval.features import features_of
from openpae.eval.image_stream import real_images, source_batches
from openpae.geometry.measure import METRIC_NAMES, Measured, measure_tokenizer, work_of
from openpae.geometry.metrics import effective_rank, global_semantic_quality, spatial_structure_consistency
from openpae.geometry.profile import run_profile
from openpae.geometry.profile_page import radar_scores
from openpae.geometry.proxies import (
    latent_neighbour_consistency,
    region_self_similarity,
    spectral_energy_concentration,
    velocity_irreducible_variance,
)
from openpae.geometry.settings import MeasureConfig, ProfileRun
from openpae.interop.spaces import open_tokenizer
from openpae.models.lpips import LPIPS
from openpae.models.saved import load_tokenizer

pytestmark = [
    pytest.mark.filterwarnings("ignore:eRank of"),
    pytest.mark.filterwarnings("ignore:.*classes hold one image"),
]
EVERY_METRIC = set(METRIC_NAMES)


@pytest.fixture(scope="module")
def lpips() -> LPIPS:
    torch.manual_seed(0)
    return LPIPS("alex")


@pytest.fixture
def segmented(image_folder: Path) -> Segmented:
    (images,) = source_batches(ImageFolder(image_folder), 32, 10)
    labels = torch.zeros(10, 32, 32, dtype=torch.int64)
    labels[:, :, 10:] = 1
    labels[:, 20:] = 7
    return Segmented(name="test", images=(images * 255).round().byte(), labels=labels, ignore=None)


@pytest.fixture
def maps(image_folder: Path, tmp_path: Path) -> Path:
    """A label map for each image: left, right, and an ignored corner."""
    for file in image_folder.rglob("*.png"):
        with Image.open(file) as image:
            width, height = image.size
        label = np.zeros((height, width), np.uint8)
        label[:, width // 2 :] = 1
        label[:9, :9] = 255
        target = tmp_path / "maps" / file.relative_to(image_folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(label).save(target)
    return tmp_path / "maps"


def test_metrics_equal_those_of_the_library(
    tokenizer_folder: Path, image_folder: Path, segmented: Segmented, lpips: LPIPS
) -> None:
    source, config = ImageFolder(image_folder), MeasureConfig(batch_size=4)
    space, ticks = open_tokenizer(str(tokenizer_folder)), []
    real = features_of(real_images(source, 32), load_extractor("random"), config.batch_size)
    result = measure_tokenizer(
        space, source, size=32, segmented=segmented, lpips=lpips, real=real, config=config, tick=ticks.append
    )
    assert (result.metrics.keys(), result.undefined, result.latent_shape) == (EVERY_METRIC, {}, (8, 4, 4))
    assert sum(ticks) == work_of(source, segmented, config) == 30
    model = load_tokenizer(tokenizer_folder)
    with torch.no_grad():
        (images,) = source_batches(source, 32, 10)
        z, scene = model.encode(images), model.encode(segmented.images.float() / 255)
    labels = torch.from_numpy(source.labels)
    literal = {
        "ssc": spatial_structure_consistency(scene, segmented.labels).value,
        "gsq": global_semantic_quality(z, labels).value,
        "erank": effective_rank(z).value,
    }
    proxies = (
        velocity_irreducible_variance(z, labels),
        spectral_energy_concentration(z),
        latent_neighbour_consistency(z, labels),
        region_self_similarity(scene, segmented.labels),
    )
    literal |= {one.name: one.value for one in proxies if isinstance(one, Estimate)}
    assert len(literal) == 7
    for name, value in literal.items():
        assert result.metrics[name].value == pytest.approx(value, rel=1e-5), name
    torch.testing.assert_close(result.pooled, z.mean(dim=(2, 3)))


def test_the_batch_size_changes_rounding_only(
    tokenizer_folder: Path, image_folder: Path, segmented: Segmented, lpips: LPIPS
) -> None:
    source, space = ImageFolder(image_folder), open_tokenizer(str(tokenizer_folder))
    results = []
    for batch_size in (3, 10):
        config = MeasureConfig(batch_size=batch_size)
        real = features_of(real_images(source, 32), load_extractor("random"), batch_size)
        results.append(
            measure_tokenizer(
                space, source, size=32, segmented=segmented, lpips=lpips, real=real, config=config
            )
        )
    three, ten = (result.metrics for result in results)
    for name, estimate in three.items():
        assert ten[name].value == pytest.approx(estimate.value, rel=1e-4, abs=1e-6), name


def test_undefined_metrics_have_a_reason(tmp_path: Path, packed: Any, segmented: Segmented) -> None:
    packed = PackedImages(packed.shards.folder)  # a copy: other tests use the fixture
    packed.labels = np.zeros(len(packed), np.int64)
    flat = Segmented(name="flat", images=segmented.images, labels=0 * segmented.labels, ignore=None)
    result = measure_tokenizer(open_tokenizer("encoder:random-tiny/8"), packed, size=32, segmented=flat)
    assert result.metrics.keys() == {"erank", "sec"}
    assert result.undefined.keys() == EVERY_METRIC - {"erank", "sec"}
    assert result.undefined["lpc"].startswith("random-tiny (VFM) has no decoder")
    assert result.undefined["ssc"] == "no label map has two segments on the 4 x 4 latent grid"
    assert "one subfolder per class" in result.undefined["gsq"]


class Outline(HTMLParser):
    """Headings and number of pictures of a page; asserts that it loads nothing from elsewhere."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.headings: list[str] = []
        self.pictures, self.tag = 0, ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tag = tag
        source = dict(attrs).get("src") or ""
        assert source.startswith("data:") or not source
        assert tag != "link"
        self.pictures += tag == "img"

    def handle_data(self, data: str) -> None:
        if self.tag == "h2" and data.strip():
            self.headings.append(data)


def test_profile_compares_tokenizers_and_records_everything(
    tokenizer_folder: Path, image_folder: Path, maps: Path, tmp_path: Path
) -> None:
    texts = [str(tokenizer_folder), "encoder:random-tiny/8"]
    steps: list[tuple[int, int]] = []
    run = ProfileRun(
        images=image_folder,
        out=tmp_path / "out",
        label_maps=maps,
        label_images=image_folder,
        ignore=255,
        lpips="random",
        extractor="random",
        measure=MeasureConfig(lpc_count=2),
    )
    run_profile(texts, run, progress=lambda *step: steps.append(step))
    assert steps[-1] == (2 * (10 + 10 + 2), 2 * (10 + 10 + 2))
    record = json.loads((tmp_path / "out/profile.json").read_text())
    ours, bare = record["tokenizers"]
    assert [ours["tokenizer"], bare["tokenizer"]] == texts
    assert ours["metrics"].keys() == EVERY_METRIC
    assert {"value", "stderr", "n", "settings"} <= ours["metrics"]["ssc"].keys()
    assert ours["metrics"]["ssc"]["settings"]["ignore"] == 255
    of_latents = {"ssc", "gsq", "erank", "viv", "sec", "lnc", "srss"}
    assert bare["undefined"].keys() == EVERY_METRIC - of_latents
    assert record["image_size"] == 32
    assert record["images"] == {
        "fingerprint": ImageFolder(image_folder).fingerprint(), "known": 10, "measured": 10,
    }  # fmt: skip
    assert record["extractor"]["name"] == "random-vgg16-relu5_3"
    assert len(record["extractor"]["weights"]) == 16
    assert len(record["lpips"]["weights"]) == len(record["label_maps"]["fingerprint"]) == 16
    assert record["settings"]["lpc_count"] == 2
    assert "torch" in record["versions"]
    page = Outline((tmp_path / "out/profile.html").read_text())
    assert page.headings == [
        "Numbers",
        "At a glance",
        "Latents",
        "Clusters of the tokens beside the label maps",
        "Moves of the latent, decoded",
        "Nearest neighbours",
        "Singular values",
        "Settings",
    ]
    # Latents: image, ours, decoded, bare; clusters: image, maps, two; three moves; four queries of two.
    assert page.pictures == 4 + 4 + 3 + 8


def test_profile_of_one_tokenizer_without_maps(tokenizer_folder: Path, packed: Any, tmp_path: Path) -> None:
    run = ProfileRun(
        images=packed.shards.folder,
        out=tmp_path,
        lpips="random",
        extractor="none",
        size=32,
        measure=MeasureConfig(count=6, lpc_count=1),
    )
    (result,) = run_profile([str(tokenizer_folder)], run)
    assert result.undefined.keys() == {"ssc", "srss", "viv", "frechet", "interpolated_frechet"}
    headings = Outline((tmp_path / "profile.html").read_text()).headings
    assert "At a glance" not in headings
    assert "Clusters of the tokens beside the label maps" not in headings


def test_tokenizers_of_one_name_are_named_by_their_texts(
    tokenizer_folder: Path, image_folder: Path, tmp_path: Path
) -> None:
    texts = ["encoder:random-tiny/8", "encoder:random-tiny/16"]
    run = ProfileRun(images=image_folder, out=tmp_path, size=32, lpips="random", extractor="none")
    results = run_profile(texts, run)
    assert [one.name for one in results] == texts


def test_contradictory_options_are_refused(image_folder: Path, maps: Path, tmp_path: Path) -> None:
    bare = ["encoder:random-tiny"]
    for options, message in (
        ({"scenes": 3, "label_maps": maps}, "either label_maps or scenes"),
        ({"ignore": 3}, "belong to label_maps, which is missing"),
        ({"label_count": 0}, "label_count must be >= 1, got 0"),
        ({"extractor": "none", "extractor_weights": maps}, "extractor none takes no extractor_weights"),
    ):
        with pytest.raises(ValueError, match=message):
            ProfileRun(images=image_folder, out=tmp_path, **options)
    run = ProfileRun(images=image_folder, out=tmp_path)
    with pytest.raises(ValueError, match="more than once"):
        run_profile(bare * 2, run)
    with pytest.raises(ValueError, match="at least one tokenizer"):
        run_profile([], run)
    with pytest.raises(ValueError, match="count must be >= 2, got 1"):
        MeasureConfig(count=1)


def measured(**values: float) -> Measured:
    metrics = {name: Estimate(name=name, value=value, n=1) for name, value in values.items()}
    return Measured(
        name="x",
        fingerprint="",
        latent_shape=(1, 1, 1),
        metrics=metrics,
        undefined={},
        pooled=torch.zeros(1, 1),
        spectrum=torch.ones(1),
    )


def test_the_radar_divides_each_axis_by_the_best() -> None:
    axes = radar_scores([measured(ssc=0.2, lpc=0.5, psnr=30), measured(ssc=0.4, lpc=0.2), measured(lpc=1.4)])
    assert axes == {"SSC": [0.5, 1.0, None], "1 - LPC": [pytest.approx(0.625), 1.0, 0.0]}
    assert radar_scores([measured(gsq=0.0)]) == {"GSQ": [0.0]}  # nothing to divide by
