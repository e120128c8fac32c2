"""Feature extractors for distances of generated to real images: one protocol, four networks.

Distances of different extractors do not compare. So every result holds the extractor's name and the
fingerprint of its weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from openpae.data.pixels import quantize
from openpae.eval.inception import Inception2015
from openpae.eval.settings import ExtractorName
from openpae.models.lpips import LPIPS
from openpae.models.lpips_weights import load_lpips
from openpae.models.vfms import IMAGENET_MEAN, IMAGENET_STD
from openpae.runtime.extras import needs
from openpae.storage.assets import fetch
from openpae.storage.files import fingerprint
from openpae.storage.weights import load_strict, read_tensors

INCEPTION = "inception-2015"
"""Name of the extractor of published FID, sFID and IS."""

_INCEPTION_URL = (
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
    "pt_inception-2015-12-05-6726825d.pth"
)


@dataclass(frozen=True, kw_only=True)
class Features:
    """Features of B images."""

    pooled: Tensor
    """(B, F), for Frechet distance, KID, precision and recall."""
    spatial: Tensor | None = None
    """(B, S), for the spatial Frechet distance (sFID); None if the extractor has none."""
    logits: Tensor | None = None
    """(B, K), for the Inception Score; None if the extractor does not classify."""


class FeatureExtractor(Protocol):
    """A frozen network with its preprocessing."""

    @property
    def name(self) -> str:
        """Architecture, layer and preprocessing, in one word."""
        ...

    @property
    def weights(self) -> str:
        """Fingerprint of the weights."""
        ...

    def features(self, images: Tensor) -> Features:
        """Features of images (B, 3, H, W) in [0, 1]."""
        ...


class _Frozen(nn.Module):
    def train(self, mode: bool = True) -> Self:
        """Stay in evaluation mode."""
        return super().train(False)


class InceptionFeatures(_Frozen):
    """The extractor of FID. Images are rounded to 256 levels and resized as in TensorFlow 1.

    Args:
        network: with weights.
    """

    name = INCEPTION

    def __init__(self, network: Inception2015) -> None:
        super().__init__()
        self.network = network
        self.weights = fingerprint(network.state_dict())

    @torch.no_grad()
    def features(self, images: Tensor) -> Features:
        """images in [0, 1]: (B, 3, H, W). Returns pooled (B, 2048), spatial (B, 2023), logits (B, 1008)."""
        pooled, spatial, logits = self.network(quantize(images))
        return Features(pooled=pooled, spatial=spatial, logits=logits)


class EfficientNetFeatures(_Frozen):
    """Pooled head of EfficientNet-Lite0 (ImageNet-1k). Its weights come with a registry package.

    Images are resized to 128 (bicubic with low-pass, clamped to [0, 1]) and mapped by (255 x - 127) / 128.
    Distances do not compare with published FID.

    Args:
        network: an `EfficientNet` of the efficientnet_lite_pytorch package.
    """

    name = "efficientnet-lite0-head-128"

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network.eval().requires_grad_(False)
        self.weights = fingerprint(network.state_dict())

    @torch.no_grad()
    def features(self, images: Tensor) -> Features:
        """images in [0, 1]: (B, 3, H, W). Returns pooled (B, 1280)."""
        pixels = (255 * _resize(images, 128) - 127) / 128
        pixels = pixels.contiguous(memory_format=torch.channels_last)  # twice as fast on a CPU
        grid: Tensor = self.network.extract_features(pixels)  # type: ignore[operator]
        return Features(pooled=grid.mean(dim=(2, 3)))


class VggFeatures(_Frozen):
    """Pooled relu5_3 of VGG16 at the images' own size. Distances do not compare with published FID.

    Args:
        lpips: an LPIPS network of `openpae.models.lpips` with VGG16.
        name: name in records.
    """

    def __init__(self, lpips: LPIPS, name: str = "vgg16-relu5_3") -> None:
        super().__init__()
        self.name = name
        self.lpips = lpips
        self.weights = fingerprint(lpips.state_dict())

    @torch.no_grad()
    def features(self, images: Tensor) -> Features:
        """images in [0, 1]: (B, 3, H, W). Returns pooled (B, 512)."""
        return Features(pooled=self.lpips.deep_features(images))


class DinoFeatures(_Frozen):
    """The CLS token of DINOv2 after its last norm (FD-DINOv2, Stein et al., arXiv:2306.04675).

    Args:
        backbone: a model of the transformers package; its `last_hidden_state` begins with the CLS token.
        source: name of the weights; part of the extractor's name.
        image_size: side to which images are resized (bicubic with low-pass, clamped to [0, 1]).
    """

    mean: Tensor
    std: Tensor

    def __init__(self, backbone: nn.Module, source: str, image_size: int = 224) -> None:
        super().__init__()
        self.name = f"{source}-cls-{image_size}"
        self.image_size = image_size
        self.backbone = backbone.eval().requires_grad_(False)
        self.weights = fingerprint(backbone.state_dict())
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(3, 1, 1), persistent=False)

    @torch.no_grad()
    def features(self, images: Tensor) -> Features:
        """images in [0, 1]: (B, 3, H, W). Returns pooled (B, D)."""
        pixels = (_resize(images, self.image_size) - self.mean) / self.std
        return Features(pooled=self.backbone(pixels).last_hidden_state[:, 0])


def load_extractor(
    name: ExtractorName, weights: Path | None = None, device: torch.device | str = "cpu"
) -> FeatureExtractor:
    """Load a feature extractor.

    Args:
        name: the extractor.
        weights: inception: the file pt_inception-2015-12-05-6726825d.pth; dinov2: a local folder; None
            downloads them. The others take None only.
        device: device of the weights.

    Raises:
        FileNotFoundError: the weights cannot be loaded or downloaded.
        ValueError: the weights do not fit, or the extractor takes none.
    """
    return _built(name, weights).to(device)


def _built(
    name: ExtractorName, weights: Path | None
) -> InceptionFeatures | DinoFeatures | VggFeatures | EfficientNetFeatures:
    if name == "inception":
        return load_inception(weights)
    if name == "dinov2":
        return load_dinov2() if weights is None else load_dinov2(str(weights))
    if weights is not None:
        raise ValueError(
            f"extractor {name} takes its weights from a package, so --extractor-weights must be left out, "
            f"got {weights}; inception and dinov2 take them"
        )
    if name == "efficientnet-lite0":
        return load_efficientnet()
    if name == "vgg16":
        return VggFeatures(load_lpips("vgg"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return VggFeatures(LPIPS("vgg"), name="random-vgg16-relu5_3")


def load_inception(file: Path | None = None) -> InceptionFeatures:
    """Load the Inception extractor.

    Args:
        file: pt_inception-2015-12-05-6726825d.pth of pytorch-fid or torch-fidelity (the same weights), or
            these tensors as safetensors; None downloads it once, into the cache of torch.hub.

    Raises:
        FileNotFoundError: no such file, or the download fails; the message names the address.
        ValueError: other weights.
    """
    if file is None:
        # The name ends with the first digits of the SHA-256, which torch.hub checks.
        file = Path(torch.hub.get_dir()) / "checkpoints" / _INCEPTION_URL.rpartition("/")[2]
        if not file.is_file():
            file.parent.mkdir(parents=True, exist_ok=True)
            _download_inception(file)
    if not file.is_file():
        raise FileNotFoundError(f"no Inception weights at {file}; download {_INCEPTION_URL}")
    network = Inception2015()
    counters = {k: v for k, v in network.state_dict().items() if k.endswith("num_batches_tracked")}
    # Evaluation does not use batch counters, and some files leave them out.
    load_strict(network, {**read_tensors(file), **counters}, f"Inception weights in {file}")
    return InceptionFeatures(network)


def _download_inception(file: Path) -> None:
    prefix = file.stem.rpartition("-")[2]
    try:
        torch.hub.download_url_to_file(_INCEPTION_URL, str(file), hash_prefix=prefix)
    except (OSError, RuntimeError) as error:  # no connection; a file with another hash
        raise FileNotFoundError(
            f"the Inception weights could not be downloaded ({error}); download {_INCEPTION_URL} elsewhere "
            f"and pass it as --extractor-weights FILE, or measure with another extractor (vgg16)"
        ) from None


def load_efficientnet() -> EfficientNetFeatures:
    """Load the EfficientNet-Lite0 extractor with the weights of the registry package.

    Raises:
        FileNotFoundError: the package cannot be downloaded.
    """
    with needs("quickstart", "the extractor efficientnet-lite0"):
        from efficientnet_lite_pytorch import EfficientNet

    network = EfficientNet.from_name("efficientnet-lite0")
    (file,) = fetch("efficientnet-lite0").rglob("*.pth")
    load_strict(network, read_tensors(file), f"weights in {file}")
    return EfficientNetFeatures(network)


def load_dinov2(source: str = "facebook/dinov2-large") -> DinoFeatures:
    """Load the DINOv2 extractor. Published FD-DINOv2 uses the large one.

    Args:
        source: hub name or local folder.

    Raises:
        FileNotFoundError: the weights cannot be loaded or downloaded.
        ValueError: the weights do not fit a DINOv2 model.
    """
    with needs("vfm", "the extractor dinov2"):
        from transformers import AutoModel

    try:
        model, report = AutoModel.from_pretrained(source, output_loading_info=True)
    except OSError as error:
        raise FileNotFoundError(
            f"no DINOv2 weights at {source!r}; give a local folder or a hub name that can be reached "
            f"({str(error).splitlines()[0]})"
        ) from None
    if faults := sorted([*report["missing_keys"], *(str(key) for key in report["mismatched_keys"])]):
        raise ValueError(f"weights at {source!r} do not fit {type(model).__name__}: {', '.join(faults[:5])}")
    return DinoFeatures(model, Path(source).name)


def _resize(images: Tensor, size: int) -> Tensor:
    """Bicubic with low-pass, as in Pillow, so that large images do not alias; clamped to [0, 1]."""
    if images.shape[-2:] == (size, size):
        return images
    resized = F.interpolate(images, size=(size, size), mode="bicubic", align_corners=False, antialias=True)
    return resized.clamp(0, 1)
