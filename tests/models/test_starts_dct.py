"""The start `dct`: a tokenizer begins as a cosine transform of its patches."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from openpae.models.configs import DecoderConfig, PAEConfig
from openpae.models.starts import _patterns, fit_readout, start_as_transform
from openpae.models.tokenizer import PAE, build_tokenizer

CONFIG = PAEConfig(
    encoder="random-tiny",
    image_size=32,
    latent_dim=16,
    modulator_layers=1,
    decoder=DecoderConfig(hidden_dim=64, num_layers=1, num_heads=2, mlp_dim=64, patch_size=8),
)


def smooth_images(count: int, seed: int) -> Tensor:
    """Images whose amplitude falls as 1 / f, in [0, 1]."""
    noise = torch.randn(count, 3, 5, 5, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(0.5 + 0.2 * noise, size=32, mode="bicubic").clamp(0, 1)


def psnr(a: Tensor, b: Tensor) -> float:
    return float(-10 * (a - b.clamp(0, 1)).square().mean().log10())


def fitted(model: PAE) -> float:
    """PSNR on images outside of the fit."""
    train, other = smooth_images(64, 0), smooth_images(16, 1)
    with torch.no_grad():
        fit_readout(model, train, model.features(train))
        return psnr(other, model.reconstruct(other))


def test_the_patterns_are_orthonormal_and_begin_with_the_mean() -> None:
    patterns, scale = _patterns(8, 8, 40)
    flat = patterns.flatten(1)
    torch.testing.assert_close(flat @ flat.T, torch.eye(40), atol=1e-5, rtol=0)
    assert patterns[0].std() < 1e-6
    assert (scale[1:] >= scale[:-1] - 1e-6).all()


def test_the_patterns_give_the_same_coefficients_of_an_enlarged_patch() -> None:
    """Of a smooth patch: a ramp, drawn at 8 and at 64 pixels."""
    coefficients = []
    for size in (8, 64):
        patterns, _ = _patterns(8, size, 12)
        ramp = (torch.arange(size) + 0.5) / size
        coefficients.append((patterns * ramp[None, None, :, None]).sum(dim=(1, 2, 3)))
    torch.testing.assert_close(coefficients[0], coefficients[1], atol=0.05, rtol=0)


def test_it_decodes_images_before_training() -> None:
    torch.manual_seed(0)
    start = build_tokenizer(CONFIG)
    assert isinstance(start, PAE)
    plain = fitted(start)
    start_as_transform(start)
    transform = fitted(start)
    flat = smooth_images(16, 1)
    colours = torch.nn.functional.interpolate(torch.nn.functional.avg_pool2d(flat, 8), scale_factor=8)
    assert transform > plain + 3
    assert transform > psnr(flat, colours)
    with torch.no_grad():
        assert math.isclose(float(start.encode(flat).square().mean()), 1, rel_tol=1e-4)


@pytest.mark.parametrize(
    ("change", "text"),
    [({"fusion": "add"}, "fusion modulate, got add"), ({"latent_dim": 80}, "width of at least 79")],
)
def test_unsuitable_models_are_refused(change: dict[str, object], text: str) -> None:
    model = build_tokenizer(replace(CONFIG, **change))  # type: ignore[arg-type]
    assert isinstance(model, PAE)
    with pytest.raises(ValueError, match=text):
        start_as_transform(model)
