"""Feature extractors: TensorFlow's resizing, the Inception network, and the preprocessing of each."""

from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import Dinov2Config, Dinov2Model

from openpae.data.pixels import quantize
from openpae.eval.extractors import (
    INCEPTION,
    EfficientNetFeatures,
    InceptionFeatures,
    VggFeatures,
    load_dinov2,
    load_extractor,
    load_inception,
)
from openpae.eval.inception import Inception2015, resize_bilinear_tf1


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def inception() -> InceptionFeatures:
    """The network with random weights that keep activations in range."""
    network = Inception2015()
    generator = torch.Generator().manual_seed(0)
    for name, value in network.state_dict().items():
        if name.endswith("conv.weight"):
            value.copy_(torch.randn(value.shape, generator=generator) * (2 / value[0].numel()) ** 0.5)
        elif name.endswith("bn.bias"):
            value.copy_(torch.randn(value.shape, generator=generator) * 0.1)
    return InceptionFeatures(network)


def pictures(n: int = 2, size: int = 40) -> Tensor:
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("height", "width", "size"), [(5, 7, 9), (12, 8, 5), (6, 6, 6)])
def test_resize_equals_tensorflow_1_written_out(height: int, width: int, size: int) -> None:
    """Source position i * in / out: no half-pixel centers, so output 0 is pixel 0 and nothing is averaged."""
    image = torch.rand(1, 1, height, width)
    x = image[0, 0].numpy()
    expected = np.zeros((size, size), np.float32)
    for i in range(size):
        for j in range(size):
            r, c = np.float32(i * np.float32(height / size)), np.float32(j * np.float32(width / size))
            top, left = int(r), int(c)
            bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
            a = x[top, left] + (x[top, right] - x[top, left]) * (c - left)
            b = x[bottom, left] + (x[bottom, right] - x[bottom, left]) * (c - left)
            expected[i, j] = a + (b - a) * (r - top)
    resized = resize_bilinear_tf1(image, size)[0, 0]
    torch.testing.assert_close(resized, torch.from_numpy(expected), rtol=0, atol=1e-6)


def test_inception_has_the_size_and_names_of_the_published_weights(inception: InceptionFeatures) -> None:
    """21,785,568 parameters of Inception v3 without auxiliary head, and a layer of 1,008 classes."""
    assert sum(p.numel() for p in inception.network.parameters()) == 21_785_568 + 2049 * 1008
    names = {name for name in inception.network.state_dict() if not name.endswith("num_batches_tracked")}
    assert len(names) == 94 * 5 + 2
    assert {"Conv2d_1a_3x3.conv.weight", "Mixed_6d.branch7x7dbl_5.bn.running_var", "fc.bias"} <= names
    assert inception.network.Mixed_7c.branch3x3dbl_3b.conv.weight.shape == (384, 384, 3, 1)


def test_inception_features_are_pool_3_mixed_6_conv_and_unbiased_logits(inception: InceptionFeatures) -> None:
    seen: dict[str, Tensor] = {}
    network = inception.network
    hooks = [
        network.Mixed_6d.branch1x1.register_forward_hook(lambda *a: seen.update(conv=a[2])),
        network.Mixed_7c.register_forward_hook(lambda *a: seen.update(last=a[2])),
    ]
    features = inception.features(pictures())
    for hook in hooks:
        hook.remove()
    assert features.spatial is not None
    assert features.logits is not None
    torch.testing.assert_close(features.pooled, seen["last"].flatten(2).mean(2))
    assert features.spatial.shape == (2, 2023)
    assert torch.equal(
        features.spatial.view(2, 17, 17, 7)[:, 3, 5], seen["conv"][:, :7, 3, 5]
    )  # channels last
    torch.testing.assert_close(features.logits, features.pooled @ network.fc.weight.T)
    assert inception.name == INCEPTION
    assert not inception.train().network.training


def test_inception_rounds_to_256_levels(inception: InceptionFeatures) -> None:
    images = quantize(pictures(1)).float() / 255
    shifted = (images + 0.4 / 255).clamp(0, 1)
    assert torch.equal(inception.features(images).pooled, inception.features(shifted).pooled)


def test_inception_weights_load_strictly(inception: InceptionFeatures, tmp_path: Path) -> None:
    state = {k: v for k, v in inception.network.state_dict().items() if "num_batches" not in k}
    torch.save(state, tmp_path / "inception.pth")
    assert load_inception(tmp_path / "inception.pth").weights == inception.weights
    del state["fc.bias"]
    torch.save(state, tmp_path / "cut.pth")
    with pytest.raises(ValueError, match=r"cut\.pth .* 1 keys missing \(fc\.bias\)"):
        load_inception(tmp_path / "cut.pth")
    with pytest.raises(
        FileNotFoundError, match=r"no Inception weights at .*pt_inception-2015-12-05-6726825d\.pth"
    ):
        load_inception(tmp_path / "none.pth")


def test_inception_weights_are_downloaded_by_default(
    inception: InceptionFeatures, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    requests: list[tuple[str, str]] = []

    def no_way(url: str, target: str, hash_prefix: str) -> None:
        requests.append((url, hash_prefix))
        raise URLError("no way there")

    monkeypatch.setattr(torch.hub, "download_url_to_file", no_way)
    with pytest.raises(
        FileNotFoundError, match=r"no way there.*pt_inception.*--extractor-weights FILE, or .*vgg16"
    ):
        load_extractor("inception")
    ((url, prefix),) = requests
    assert (url.startswith("https://github.com/mseitzer/pytorch-fid/"), prefix) == (True, "6726825d")
    torch.save(
        inception.network.state_dict(), tmp_path / "checkpoints" / "pt_inception-2015-12-05-6726825d.pth"
    )
    assert load_inception().weights == inception.weights  # from an earlier download
    assert len(requests) == 1


def test_missing_weights_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"must be left out, got .*; inception and dinov2 take them"):
        load_extractor("vgg16", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"nothing\.pth"):
        load_extractor("inception", tmp_path / "nothing.pth")
    first, again = load_extractor("random"), load_extractor("random")
    assert (first.name, first.weights) == ("random-vgg16-relu5_3", again.weights)


class Head(nn.Module):
    """Returns the input of an extractor's network."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def extract_features(self, pixels: Tensor) -> Tensor:
        return pixels

    def deep_features(self, images: Tensor) -> Tensor:
        return images.mean(dim=(2, 3))


def test_efficientnet_gets_its_own_range_and_size() -> None:
    extractor = EfficientNetFeatures(Head())
    white = extractor.features(torch.ones(1, 3, 64, 64)).pooled
    torch.testing.assert_close(white, torch.ones(1, 3))  # (255 - 127) / 128
    torch.testing.assert_close(extractor.features(torch.zeros(1, 3, 200, 200)).pooled, -white * 127 / 128)
    image = pictures(1, size=128)
    torch.testing.assert_close(
        extractor.features(image).pooled, ((255 * image - 127) / 128).mean(dim=(2, 3)), rtol=1e-5, atol=1e-6
    )


def test_efficientnet_gives_its_pooled_head() -> None:
    package = pytest.importorskip("efficientnet_lite_pytorch")
    extractor = EfficientNetFeatures(package.EfficientNet.from_name("efficientnet-lite0"))
    assert extractor.features(pictures(size=64)).pooled.shape == (2, 1280)


def test_vgg_passes_images_unchanged() -> None:
    images = pictures()
    extractor = VggFeatures(Head())  # type: ignore[arg-type]
    torch.testing.assert_close(extractor.features(images).pooled, images.mean(dim=(2, 3)))
    assert len(extractor.weights) == 16


@pytest.mark.filterwarnings("default")
def test_dinov2_gives_the_cls_token(tmp_path: Path) -> None:
    config = Dinov2Config(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    model = Dinov2Model(config).eval()
    model.save_pretrained(tmp_path / "dino-tiny")
    extractor = load_dinov2(str(tmp_path / "dino-tiny"))
    images = pictures(size=224)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    with torch.no_grad():
        expected = model((images - mean.view(3, 1, 1)) / std.view(3, 1, 1)).last_hidden_state[:, 0]
    torch.testing.assert_close(extractor.features(images).pooled, expected)
    assert extractor.name == "dino-tiny-cls-224"
    assert extractor.features(pictures(size=40)).pooled.shape == (2, 16)
    with pytest.raises(FileNotFoundError, match="no DINOv2 weights at"):
        load_dinov2(str(tmp_path / "nothing"))
