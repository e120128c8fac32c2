"""Metrics of reconstructions: PSNR, SSIM, LPIPS. Images: (B, 3, H, W) in [0, 1]."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.nn import functional as F

from openpae.data.pixels import check_images, quantize, to_unit
from openpae.eval.estimate import Estimate, mean_of
from openpae.runtime import processes

ImageDistance = Callable[[Tensor, Tensor], Tensor]
"""Distance of two batches of images, one value per pair: (B,). Usually LPIPS."""

SSIM_WINDOW = 11
"""Side of the Gaussian window of SSIM, in pixels (Wang et al., 2004)."""


def psnr(images: Tensor, reconstructions: Tensor) -> Tensor:
    """Peak signal-to-noise ratio per image in dB: (B,).

        -10 log10(mean (x - y)^2),   data range 1

    Infinite for an exact copy.

    Raises:
        ValueError: the shapes differ, or values are not RGB in [0, 1].
    """
    _check_pair(images, reconstructions)
    error = (images.double() - reconstructions.double()).square().mean(dim=(1, 2, 3))
    return -10 * error.log10()


def ssim(images: Tensor, reconstructions: Tensor) -> Tensor:
    """Structural similarity per image (Wang et al., 2004): (B,).

        mean (2 m_x m_y + C1) (2 s_xy + C2) / ((m_x^2 + m_y^2 + C1) (s_xx + s_yy + C2)),
        C1 = 0.01^2, C2 = 0.03^2

    m and s are local means and covariances (divided by N, not N - 1) under a Gaussian window of 11 x 11
    pixels and sigma 1.5. The mean runs over the three colours and the positions where the window fits. Equal
    to scikit-image with `gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=1`.

    Returns:
        Values in [-1, 1], 1 for an exact copy.

    Raises:
        ValueError: the shapes differ, values are not RGB in [0, 1], or images are smaller than the window.
    """
    _check_pair(images, reconstructions)
    if min(images.shape[-2:]) < SSIM_WINDOW:
        raise ValueError(f"SSIM needs images of at least 11 x 11 pixels, got {tuple(images.shape[-2:])}")
    # Image by image: the intermediate tensors of one fit into the processor's cache.
    return torch.stack([_ssim(x, y) for x, y in zip(images, reconstructions, strict=True)])


@torch.no_grad()
def _ssim(x: Tensor, y: Tensor) -> Tensor:
    """SSIM of one image (3, H, W): scalar, float64."""
    x, y = x.double(), y.double()
    moments = torch.stack([x, y, x * x + y * y, x * y]).movedim(2, 0)  # (H, 4, 3, W)
    down = _window_means(moments.reshape(len(moments), -1))
    across = _window_means(down.view(-1, x.shape[2]).mT)  # (W - 10, (H - 10) 4 3)
    mean_x, mean_y, squares, product = across.view(len(across), -1, 4, 3).unbind(2)
    c1, c2 = 0.01**2, 0.03**2
    means, square_means = 2 * mean_x * mean_y, mean_x.square() + mean_y.square()
    luminance = (means + c1) / (square_means + c1)
    structure = (2 * product - means + c2) / (squares - square_means + c2)
    return (luminance * structure).mean()


class ReconstructionMetrics:
    """PSNR, SSIM and LPIPS of a stream of pairs, each with its standard error over images.

    Both images are rounded to 256 levels first, as in saved files.

    Args:
        lpips: distance per image; None leaves LPIPS out.
    """

    def __init__(self, lpips: ImageDistance | None = None) -> None:
        self.lpips = lpips
        self.index: list[int] = []
        self.values: dict[str, list[Tensor]] = {"psnr": [], "ssim": []}
        if lpips is not None:
            self.values["lpips"] = []

    @torch.no_grad()
    def update(self, images: Tensor, reconstructions: Tensor, index: Iterable[int] | None = None) -> None:
        """Add pairs of images.

        Args:
            images: (B, 3, H, W) in [0, 1].
            reconstructions: of the same shape and range.
            index: number of each image among the images of all processes; None continues the count.

        Raises:
            ValueError: the shapes differ, or values are not RGB in [0, 1].
        """
        _check_pair(images, reconstructions)
        start = max(self.index, default=-1) + 1
        self.index.extend(range(start, start + len(images)) if index is None else index)
        x, y = (to_unit(quantize(batch)) for batch in (images, reconstructions))
        self.values["psnr"].append(psnr(x, y).cpu())
        self.values["ssim"].append(ssim(x, y).cpu())
        if self.lpips is not None:
            self.values["lpips"].append(self.lpips(x, y).double().cpu())

    def gather(self) -> None:
        """Give every process the pairs of all. All processes must call it."""
        shares = processes.gather((self.index, self.values))
        self.index = [number for index, _ in shares for number in index]
        self.values = {name: [part for _, values in shares for part in values[name]] for name in self.values}

    def per_image(self) -> dict[str, Tensor]:
        """Each metric's values in the order of the images: (N,) float64.

        Raises:
            ValueError: no images were given.
        """
        if not self.values["psnr"]:
            raise ValueError("no reconstructions were given; call update first")
        order = torch.tensor(self.index).argsort()
        return {name: torch.cat(values)[order] for name, values in self.values.items()}

    def compute(self) -> dict[str, Estimate]:
        """Mean and standard error of each metric: psnr (dB), ssim and, if there is a network, lpips.

        Raises:
            ValueError: no images were given.
        """
        return {name: mean_of(name, values, {"quantized": True}) for name, values in self.per_image().items()}


def _check_pair(images: Tensor, reconstructions: Tensor) -> None:
    if images.shape != reconstructions.shape:
        raise ValueError(
            f"images and reconstructions must have one shape, got {tuple(images.shape)} "
            f"and {tuple(reconstructions.shape)}"
        )
    check_images(images)
    check_images(reconstructions, "reconstructions")


def _window_means(x: Tensor, block: int = 16) -> Tensor:
    """Means under the Gaussian window along the first axis, where it fits: (H, N) to (H - 10, N).

    A product with a banded matrix, computed by blocks along the band.
    """
    window = torch.exp(-0.5 * ((torch.arange(SSIM_WINDOW, dtype=x.dtype) - SSIM_WINDOW // 2) / 1.5) ** 2)
    window = F.pad(window / window.sum(), (0, block))
    band = torch.stack([window.roll(row) for row in range(block)])[:, :-1].to(x.device)
    out = x.new_empty(len(x) - SSIM_WINDOW + 1, x.shape[1])
    for start in range(0, len(out), block):
        part = out[start : start + block]
        inputs = x[start : start + len(part) + SSIM_WINDOW - 1]
        torch.mm(band[: len(part), : len(inputs)], inputs, out=part)
    return out
