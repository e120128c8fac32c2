"""How long our functions take beside those of other packages: ratios of CPU time on one thread.

Both sides get the same inputs in one process, in turn; the median of the rounds counts. A ratio above 1 says
that ours needs less. Packages that are not installed are left out.

    OMP_NUM_THREADS=1 python benchmarks/peers.py --rounds 3
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import tyro
from torch import Tensor
from torch.nn import functional as F

from openpae.data.images import PackedImages
from openpae.data.pixels import to_image
from openpae.data.shard_writer import ShardWriter
from openpae.data.shards import Layout
from openpae.data.training import TrainingImages
from openpae.eval.frechet import frechet_distance, gaussian_of
from openpae.eval.reconstruction import ssim
from openpae.eval.scores import kid, precision_recall
from openpae.geometry.clusters import spectral_clusters
from openpae.models.lpips import LPIPS

Run = Callable[[], Any]
Pair = tuple[Run, Run]


def main(samples: int = 10_000, rounds: int = 3, only: str = "") -> None:
    """Print a table.

    Args:
        samples: rows of the features; 2,048 columns.
        rounds: how often each side runs.
        only: part of a name; others are left out.
    """
    torch.set_num_threads(1)
    pairs = {
        "SSIM, 16 images of 256 px, float64 (scikit-image)": ssim_pair,
        "random crop 384 to 256 with flip (torchvision, tensors)": lambda: crop_pair(files=False),
        "random crop 384 to 256 with flip (torchvision, ImageFolder)": lambda: crop_pair(files=True),
        "spectral clustering, 256 tokens (scikit-learn)": clusters_pair,
        "LPIPS as a metric, AlexNet (lpips)": lambda: lpips_pair("alex", loss=False),
        "LPIPS as a metric, VGG16 (lpips)": lambda: lpips_pair("vgg", loss=False),
        "LPIPS as a loss, AlexNet (lpips)": lambda: lpips_pair("alex", loss=True),
        "LPIPS as a loss, VGG16 (lpips)": lambda: lpips_pair("vgg", loss=True),
        f"Frechet distance, {samples:,} x 2,048 (torch-fidelity)": lambda: frechet_pair(samples),
        f"KID, {samples:,} x 2,048, 10 subsets (torch-fidelity)": lambda: kid_pair(samples),
        f"precision and recall, {samples:,} x 2,048 (torch-fidelity)": lambda: shares_pair(samples),
    }
    print("| work | ours, s | theirs, s | ratio |\n|---|---|---|---|")
    for name, make in pairs.items():
        if only not in name:
            continue
        try:
            ours, theirs = make()
        except ImportError as error:
            print(f"| {name} | | {error} | |")
            continue
        times = [(seconds(ours), seconds(theirs)) for _ in range(rounds)]
        one, two = (median(column) for column in zip(*times, strict=True))
        print(f"| {name} | {one:.3f} | {two:.3f} | {two / one:.2f} |", flush=True)


def seconds(run: Run) -> float:
    """CPU time of the process in one run."""
    start = time.process_time()
    run()
    return time.process_time() - start


def features(count: int, seed: int) -> Tensor:
    """Correlated features that are not negative, as those of an Inception network, (count, 2048)."""
    mixing = torch.randn(64, 2048, generator=torch.Generator().manual_seed(99)) / 8
    generator = torch.Generator().manual_seed(seed)
    noise = 0.5 * torch.randn(count, 2048, generator=generator)
    return 0.5 * (torch.randn(count, 64, generator=generator) @ mixing + noise).relu()


def frechet_pair(count: int) -> Pair:
    """Moments of two sets, and their distance."""
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

    x, y = features(count, 0), features(count, 1)
    return (
        lambda: frechet_distance(gaussian_of(x), gaussian_of(y)),
        lambda: fid_statistics_to_metric(fid_features_to_statistics(x), fid_features_to_statistics(y), False),
    )


def kid_pair(count: int) -> Pair:
    """Ten subsets of 1,000."""
    from torch_fidelity.defaults import DEFAULTS
    from torch_fidelity.metric_kid import kid_features_to_metric

    x, y = features(count, 0), features(count, 1)
    settings = {**DEFAULTS, "verbose": False, "kid_subsets": 10}
    return lambda: kid(x, y, subsets=10), lambda: kid_features_to_metric(x, y, **settings)


def shares_pair(count: int) -> Pair:
    """Three neighbours."""
    from torch_fidelity.defaults import DEFAULTS
    from torch_fidelity.metric_prc import prc_features_to_metric

    x, y = features(count, 0), features(count, 1)
    settings = {**DEFAULTS, "verbose": False}
    return lambda: precision_recall(x, y), lambda: prc_features_to_metric(x, y, **settings)


def ssim_pair() -> Pair:
    """float64, Gaussian window."""
    from skimage.metrics import structural_similarity

    generator = torch.Generator().manual_seed(0)
    x = torch.rand(16, 3, 256, 256, generator=generator)
    y = (x + 0.1 * torch.randn(x.shape, generator=generator)).clamp(0, 1)
    window = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 1}

    def theirs() -> list[float]:
        pairs = zip(x.double().numpy(), y.double().numpy(), strict=True)
        return [structural_similarity(a, b, channel_axis=0, **window) for a, b in pairs]

    return lambda: ssim(x, y), theirs


def crop_pair(*, files: bool) -> Pair:
    """64 images of 256 out of 384 pixels, half of them mirrored.

    Ours reads packed images. Torchvision gets tensors from the same memory map, or decodes JPEG files.
    """
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import v2

    folder = Path(tempfile.mkdtemp())
    layout = Layout(
        kind="images",
        dtype="uint8",
        shape=(3, 384, 384),
        sources=256,
        per_shard=256,
        attributes={"classes": ["all"], "source": "0" * 16},
    )
    writer = ShardWriter(folder / "packed", layout)
    smooth = F.interpolate(torch.rand(256, 3, 24, 24), size=384, mode="bicubic")
    pixels = (255 * (smooth + 0.03 * torch.randn_like(smooth)).clamp(0, 1)).byte()
    writer.write(0, pixels, [0] * 256)
    writer.finish()
    source = PackedImages(folder / "packed")
    images = TrainingImages(source, size=256, seed=0, augment="crop", resize=384)
    steps = [v2.RandomCrop(256), v2.RandomHorizontalFlip()]
    if files:
        (folder / "files" / "all").mkdir(parents=True)
        for row, image in enumerate(pixels[:64]):
            to_image(image / 255).save(folder / "files" / "all" / f"{row:02d}.jpg", quality=90)
        decoded = ImageFolder(folder / "files", v2.Compose([*steps, v2.PILToTensor()]))
        theirs = lambda: torch.stack([decoded[row][0] for row in range(64)])  # noqa: E731
    else:
        transform, gather = v2.Compose(steps), source.shards.gather
        theirs = lambda: torch.stack([transform(gather(np.array([row]))[0]) for row in range(64)])  # noqa: E731
    return lambda: images.__getitems__(list(range(64))), theirs


def lpips_pair(net: Any, *, loss: bool) -> Pair:
    """Four pairs of 128 pixels, random weights; as a loss with the gradient at the first image."""
    import lpips

    ours, theirs = LPIPS(net), lpips.LPIPS(net=net, pnet_rand=True, verbose=False).eval()
    theirs.requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    x, y = torch.rand(2, 4, 3, 128, 128, generator=generator)

    def run(distance: Callable[[Tensor, Tensor], Tensor]) -> None:
        image = x.clone().requires_grad_(loss)
        with torch.set_grad_enabled(loss):
            value = distance(image, y).mean()
        if loss:
            value.backward()

    return lambda: run(ours), lambda: run(lambda a, b: theirs(a, b, normalize=True))


def clusters_pair() -> Pair:
    """Twenty latents of 16 x 16 tokens, eight clusters, ten starts of k-means."""
    from sklearn.cluster import SpectralClustering

    generator = torch.Generator().manual_seed(0)
    smooth = F.interpolate(torch.randn(20, 32, 4, 4, generator=generator), size=16, mode="bicubic")
    latents = smooth + 0.3 * torch.randn(20, 32, 16, 16, generator=generator)

    def theirs() -> None:
        for latent in latents:
            z = F.normalize(latent.flatten(1).T.double(), dim=-1)
            affinity = torch.exp((z @ z.T - 1) / 0.1).fill_diagonal_(0).numpy()
            SpectralClustering(8, affinity="precomputed", random_state=0).fit_predict(affinity)

    return lambda: [spectral_clusters(latent, 8) for latent in latents], theirs


if __name__ == "__main__":
    tyro.cli(main)
