"""PSNR, SSIM, LPIPS of pairs of images: properties, references, edge cases, errors."""

import math

import numpy as np
import pytest
import scipy.ndimage
import torch
from torch import Tensor

from openpae.data.pixels import quantize
from openpae.eval.estimate import Estimate, jackknife_error, mean_of
from openpae.eval.reconstruction import ReconstructionMetrics, psnr, ssim


def pair(n: int = 4, size: int = 24, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.nn.functional.avg_pool2d(torch.rand(n, 3, size + 4, size + 4, generator=generator), 5, 1)
    return images, (images + 0.05 * torch.randn(images.shape, generator=generator)).clamp(0, 1)


def distance(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).abs().mean(dim=(1, 2, 3))


def test_psnr_has_a_closed_form_for_a_constant_error() -> None:
    images = torch.full((2, 3, 8, 8), 0.5)
    torch.testing.assert_close(psnr(images, images + 0.1), torch.full((2,), 20.0).double(), rtol=0, atol=1e-5)
    assert psnr(images, images).isinf().all()


def test_ssim_is_one_for_a_copy_and_symmetric() -> None:
    images, noisy = pair()
    torch.testing.assert_close(ssim(images, images), torch.ones(4).double())
    torch.testing.assert_close(ssim(images, noisy), ssim(noisy, images))
    assert (ssim(images, noisy) < 0.999).all()
    assert (ssim(images, 1 - images) < 0).all()  # a negative inverts the structure


def test_ssim_equals_the_formula_of_scikit_image() -> None:
    """Gaussian filters as scipy has them (truncated at radius 5), borders cut, then the mean."""
    images, noisy = pair(n=2)
    for x, y, value in zip(images.double().numpy(), noisy.double().numpy(), ssim(images, noisy), strict=True):
        planes = []
        for a, b in zip(x, y, strict=True):
            blur = lambda z: scipy.ndimage.gaussian_filter(z, 1.5, truncate=3.5)[5:-5, 5:-5]  # noqa: E731
            ma, mb = blur(a), blur(b)
            va, vb, cab = blur(a * a) - ma**2, blur(b * b) - mb**2, blur(a * b) - ma * mb
            c1, c2 = 0.01**2, 0.03**2
            planes.append((2 * ma * mb + c1) * (2 * cab + c2) / ((ma**2 + mb**2 + c1) * (va + vb + c2)))
        assert float(value) == pytest.approx(np.mean(planes), rel=1e-9)


def test_metrics_do_not_depend_on_batches_and_their_order() -> None:
    images, noisy = pair(n=9)
    together, parts = ReconstructionMetrics(distance), ReconstructionMetrics(distance)
    together.update(images, noisy)
    for rows in ([1, 3, 5, 7], [0, 2], [4, 6, 8]):  # the shares of two processes
        parts.update(images[rows], noisy[rows], rows)
    for name, values in together.per_image().items():
        torch.testing.assert_close(parts.per_image()[name], values)
    one, two = together.compute(), parts.compute()
    assert one.keys() == {"psnr", "ssim", "lpips"}
    for name, estimate in one.items():
        assert two[name].value == pytest.approx(estimate.value, rel=1e-6)
        assert estimate.n == 9
    assert "lpips" not in ReconstructionMetrics().values


def test_metrics_equal_those_of_saved_files() -> None:
    images, noisy = pair()
    metrics = ReconstructionMetrics(distance)
    metrics.update(images, noisy)
    x, y = quantize(images).float() / 255, quantize(noisy).float() / 255
    torch.testing.assert_close(metrics.per_image()["psnr"], psnr(x, y))
    torch.testing.assert_close(metrics.per_image()["lpips"], distance(x, y).double())
    estimate = metrics.compute()["psnr"]
    assert estimate.stderr == pytest.approx(float(psnr(x, y).std()) / 2)
    assert estimate.settings == {"quantized": True}


def test_quantize_rounds_to_the_nearest_level() -> None:
    levels = torch.arange(256).float().view(1, 1, 16, 16).expand(1, 3, 16, 16)
    assert torch.equal(quantize((levels / 255 + 0.4 / 255).clamp(0, 1)), levels.to(torch.uint8))


def test_mean_of_exact_copies_is_infinite_without_an_error_bar() -> None:
    images, _ = pair()
    metrics = ReconstructionMetrics()
    metrics.update(images, images)
    estimate = metrics.compute()["psnr"]
    assert math.isinf(estimate.value)
    assert estimate.stderr is None


def test_estimates() -> None:
    estimate = mean_of("psnr", torch.tensor([1.0, 3.0]), {})
    assert (estimate.value, estimate.stderr) == (2, pytest.approx(1))
    assert str(estimate) == "psnr 2 +- 1 (2 images)"
    assert mean_of("psnr", torch.tensor([1.0]), {}).stderr is None
    assert str(Estimate(name="frechet", value=1.25, n=9)) == "frechet 1.25 (9 images)"
    x = torch.randn(12).double()
    left_out = torch.stack([torch.cat([x[:i], x[i + 1 :]]).mean() for i in range(12)])
    assert jackknife_error(left_out) == pytest.approx(float(x.std()) / math.sqrt(12))  # exact for a mean
    with pytest.raises(ValueError, match="psnr needs at least one value"):
        mean_of("psnr", torch.empty(0), {})


def test_bad_pairs_are_refused() -> None:
    images, noisy = pair()
    with pytest.raises(ValueError, match=r"one shape, got \(4, 3, 24, 24\) and \(3, 3, 24, 24\)"):
        psnr(images, noisy[:3])
    with pytest.raises(ValueError, match=r"reconstructions must lie in \[0, 1\], got values from .* clamp"):
        ssim(images, noisy + 1)
    with pytest.raises(ValueError, match=r"11 x 11 pixels, got \(10, 24\)"):
        ssim(images[:, :, :10], noisy[:, :, :10])
    with pytest.raises(ValueError, match="call update first"):
        ReconstructionMetrics().compute()
