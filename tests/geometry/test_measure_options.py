"""Every setting of a measurement reaches its metric: values equal library calls with the same settings."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from openpae.data.images import ImageFolder
from openpae.data.label_maps import Segmented
from openpae.eval.extractors import load_extractor
from openpae.eval.features import FeatureSet
from openpae.eval.frechet import frechet_distance
from openpae.geometry.interpolation import interpolated_frechet
from openpae.geometry.measure import measure_tokenizer
from openpae.geometry.metrics import (
    effective_rank,
    global_semantic_quality,
    latent_perturbation_consistency,
    spatial_structure_consistency,
)
from openpae.geometry.profile import run_profile
from openpae.geometry.settings import MeasureConfig, ProfileRun
from openpae.interop.spaces import LatentSpace
from openpae.models.lpips import LPIPS
from openpae.models.lpips_weights import load_perceptual
from openpae.storage.files import read_json

pytestmark = [
    pytest.mark.filterwarnings("ignore:eRank of"),
    pytest.mark.filterwarnings("ignore:.*classes hold one image"),
]
CONFIG = MeasureConfig(
    count=14, lpc_count=3, directions=2, sigma=0.3, classes=3, repeats=4, batch_size=5, seed=5
)
ROWS = [round(i * 17 / 13) for i in range(14)]
"""14 of 18 images, evenly spread."""


@pytest.fixture(scope="module")
def lpips() -> LPIPS:
    return load_perceptual("random")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> ImageFolder:
    """18 images of six classes with overlapping colours."""
    root = tmp_path_factory.mktemp("six")
    draws = np.random.default_rng(0)
    for number in range(18):
        folder = root / f"class {number // 3}"
        folder.mkdir(exist_ok=True)
        colour = np.array([15, 30, 5]) * (number // 3)
        pixels = (colour + draws.integers(0, 130, (32, 32, 3))).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:02d}.png")
    return ImageFolder(root)


def encode(images: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.avg_pool2d(images, 4) - 0.4


def decode(z: torch.Tensor) -> torch.Tensor:
    return (z + 0.4).repeat_interleave(4, 2).repeat_interleave(4, 3).clamp(0, 1)


SPACE = LatentSpace(name="means", kind="python", fingerprint="0", image_size=32, encode=encode, decode=decode)


@pytest.fixture(scope="module")
def everything(source: ImageFolder, lpips: LPIPS) -> dict[str, Any]:
    images = torch.stack([torch.from_numpy(np.array(source.read(row))) for row in range(18)])
    images = images.permute(0, 3, 1, 2).contiguous()
    labels = torch.zeros(4, 32, 32, dtype=torch.int64)
    labels[:, :, 16:], labels[:, :8] = 1, 7
    real = FeatureSet(load_extractor("random"))
    real.update(images[ROWS].float() / 255)
    return {
        "images": images,
        "labels": labels,
        "real": real,
        "segmented": Segmented(name="four", images=images[:4], labels=labels, ignore=7),
    }


def test_no_setting_has_its_default() -> None:
    assert all(getattr(CONFIG, part.name) != part.default for part in fields(MeasureConfig))


def test_metrics_equal_library_calls_with_these_settings(
    source: ImageFolder, lpips: LPIPS, everything: dict[str, Any]
) -> None:
    images, real = everything["images"].float() / 255, everything["real"]
    metrics = measure_tokenizer(
        SPACE, source, size=32, segmented=everything["segmented"], lpips=lpips, real=real, config=CONFIG
    ).metrics
    z, labels = encode(images[ROWS]), torch.tensor([row // 3 for row in ROWS])
    y = decode(z)
    decoded = FeatureSet(real.extractor)
    decoded.update(y)
    expected = {
        "ssc": spatial_structure_consistency(
            encode(images[:4]), everything["labels"], sigma=0.3, ignore=7, seed=5
        ),
        "lpc": latent_perturbation_consistency(
            z[[0, 6, 13]], decode, lpips, directions=2, batch_size=5, seed=5
        ),
        "gsq": global_semantic_quality(z, labels, classes=3, repeats=4, seed=5),
        "erank": effective_rank(z),
        "interpolated_frechet": interpolated_frechet(z, decode, real, seed=5),
    }
    for name, estimate in expected.items():
        assert metrics[name].value == pytest.approx(estimate.value, rel=1e-4), name
        assert (metrics[name].stderr or 0) == pytest.approx(estimate.stderr or 0, rel=1e-3), name
        assert metrics[name].n == estimate.n, name
    assert metrics["lpips"].value == pytest.approx(lpips(y, images[ROWS]).mean().item(), rel=1e-4)
    distance = frechet_distance(decoded.pooled.gaussian(), real.pooled.gaussian())
    assert metrics["frechet"].value == pytest.approx(distance, rel=1e-3)


@pytest.mark.parametrize(
    ("name", "value", "metric"),
    [
        ("seed", 6, "gsq"),
        ("seed", 6, "lpc"),
        ("directions", 1, "lpc"),
        ("lpc_count", 4, "lpc"),
        ("classes", 4, "gsq"),
        ("repeats", 3, "gsq"),
        ("sigma", 0.03, "ssc"),
        ("count", 18, "gsq"),
    ],
)
def test_another_setting_gives_another_value(
    source: ImageFolder, lpips: LPIPS, everything: dict[str, Any], name: str, value: Any, metric: str
) -> None:
    """So the test above would fail if one of these were ignored."""
    options = {"size": 32, "segmented": everything["segmented"], "lpips": lpips}
    one, other = (
        measure_tokenizer(SPACE, source, config=config, **options).metrics[metric]  # type: ignore[arg-type]
        for config in (CONFIG, replace(CONFIG, **{name: value}))
    )
    assert (one.value, one.stderr) != pytest.approx((other.value, other.stderr), rel=1e-3)


def test_the_record_holds_every_setting(source: ImageFolder, tmp_path: Path) -> None:
    run = ProfileRun(
        images=source.root,
        out=tmp_path / "out",
        scenes=2,
        size=32,
        lpips="random",
        extractor="none",
        measure=CONFIG,
    )
    run_profile(["encoder:random-tiny/8"], run)
    settings = read_json(tmp_path / "out" / "profile.json")["settings"]
    assert {part.name: settings[part.name] for part in fields(CONFIG)} == {
        part.name: getattr(CONFIG, part.name) for part in fields(CONFIG)
    }
