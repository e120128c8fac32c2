"""The result of a quickstart is compared with baselines."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from openpae.data.images import PackedImages
from openpae.eval.extractors import load_extractor
from openpae.eval.features import FeatureSet
from openpae.eval.reference import reference_of
from openpae.models.tokenizer import PAE
from openpae.quickstart.verdict import (
    advice,
    baseline_frechet,
    baseline_psnr,
    patch_colours,
    problems,
    recognised,
)


def record(psnr: float, frechet: float) -> dict[str, Any]:
    return {
        "reconstruction": {"metrics": {"psnr": {"value": psnr}}},
        "samples": {"metrics": {"frechet": {"value": frechet}}},
        "free": {"psnr": 14.0, "frechet": 300.0},
    }


def test_a_result_that_beats_the_baselines_has_no_problem() -> None:
    assert problems(record(14.1, 299.0)) == []


@pytest.mark.parametrize(
    ("psnr", "frechet", "texts"),
    [
        (13.9, 100.0, ["13.9 dB", "14.0 dB"]),
        (20.0, 310.0, ["310", "300"]),
        (6.8, 900.0, ["6.8 dB", "900"]),
        (float("nan"), 100.0, ["nan dB"]),
        (20.0, float("nan"), ["nan"]),
    ],
)
def test_a_result_below_says_why_and_what_to_do(psnr: float, frechet: float, texts: list[str]) -> None:
    line = advice(problems(record(psnr, frechet)), 360.0)
    assert line.startswith("not usable: ")
    for text in (*texts, "--budget 12min", "--pretrained"):
        assert text in line
    assert "\n" not in line


def test_patch_colours_keep_the_mean_of_each_patch_and_nothing_else() -> None:
    x = torch.rand(2, 3, 16, 24)
    y = patch_colours(x, 8)
    cells = y.reshape(2, 3, 2, 8, 3, 8)
    assert (cells - cells[:, :, :, :1, :, :1]).abs().max() == 0
    expected = x.reshape(2, 3, 2, 8, 3, 8).mean(dim=(3, 5))
    torch.testing.assert_close(cells[:, :, :, 0, :, 0], expected)


def test_the_baseline_psnr_is_that_of_numpy(packed: PackedImages) -> None:
    x = packed.shards.gather(np.arange(len(packed))).numpy() / 255.0
    b, c, h, w = x.shape
    means = x.reshape(b, c, h // 4, 4, w // 4, 4).mean(axis=(3, 5))
    flat = np.round(means * 255).repeat(4, axis=2).repeat(4, axis=3) / 255
    expected = (-10 * np.log10(((x - flat) ** 2).mean(axis=(1, 2, 3)))).mean()
    assert baseline_psnr(packed, 4) == pytest.approx(expected, abs=0.02)  # a mean may round to the other side


def test_a_generator_that_repeats_the_mean_is_as_far_as_its_mean_and_all_the_spread() -> None:
    extractor = load_extractor("random")
    real = torch.rand(16, 3, 32, 32)
    seen = FeatureSet(extractor)
    seen.update(real)
    reference = reference_of(seen, "sixteen")
    gaussian = reference.pooled
    (point,) = extractor.features((real.mean(dim=0, keepdim=True) * 255).round() / 255).pooled
    expected = (point.double() - gaussian.mean).square().sum() + gaussian.covariance.trace()
    assert baseline_frechet(real, FeatureSet(extractor), reference) == pytest.approx(
        float(expected), rel=1e-4
    )


class Perfect(PAE):
    """Decodes to the encoded image, and to noise if the latent was moved."""

    def encode(self, images: Tensor, features: Tensor | None = None) -> Tensor:
        self.seen = images
        return super().encode(images, features)

    def decode(self, z: Tensor) -> Tensor:
        known = super().encode(self.seen)
        moved = (known - z).abs().amax(dim=(1, 2, 3)) > 0.1
        noise = torch.rand(self.seen.shape, generator=torch.Generator().manual_seed(1))
        return torch.where(moved[:, None, None, None], noise, self.seen)


def test_a_picture_that_comes_back_is_recognised_and_noise_is_not(
    tiny_pae: PAE, packed: PackedImages
) -> None:
    tiny_pae.__class__ = Perfect
    result = recognised(tiny_pae, packed, (42.5, 85.0), each=1, queries=4)
    assert result["shares"]["0"] == 1.0
    assert result["shares"]["42.5"] == result["shares"]["85"] < 1
    assert result["decodes"] == 4
    assert result["among"] == len(packed)
