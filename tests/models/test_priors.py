"""Stage (a): the refiner, raw targets and the reference features, against their definitions written out."""

from __future__ import annotations

import math
import urllib.error
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from openpae.models import upsampling
from openpae.models.configs import LinearTargetsConfig, LowPassConfig, RefinerConfig
from openpae.models.layers import to_grid, to_tokens
from openpae.models.priors import FrozenPrior, LinearTargets, Prior, Refiner, fit_pca, random_targets
from openpae.models.upsampling import bilateral_weights, load_anyup, low_pass_down, reference_features
from openpae.objective.losses import feature_reconstruction, gram_alignment

TINY = RefinerConfig(
    feature_dim=24, latent_dim=8, grid_size=4, num_heads=2, decoder_layers=1, decoder_dim=32, decoder_heads=2
)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def test_targets_lie_on_the_sphere() -> None:
    features = torch.randn(2, 16, 24)
    for targets in (Refiner(TINY), random_targets(24, 8), fit_pca([features], 8)):
        z = targets.project(features)
        assert z.shape == (2, 16, 8)
        torch.testing.assert_close(z.square().mean(dim=-1), torch.ones(2, 16), rtol=1e-4, atol=0)


def test_refiner_learns_its_two_losses() -> None:
    """A few steps lower both terms of L_refine: gradients reach P_t and Q_t."""
    features, reference = torch.randn(4, 16, 24), torch.randn(4, 16, 24)
    refiner = Refiner(TINY)
    optimizer = torch.optim.AdamW(refiner.parameters(), lr=3e-3)
    history = []
    for _ in range(40):
        prior, reconstructed = refiner(features)
        terms = feature_reconstruction(reconstructed, features), gram_alignment(prior, reference)
        history.append([term.item() for term in terms])
        optimizer.zero_grad()
        (terms[0] + terms[1]).backward()
        optimizer.step()
    assert all(parameter.grad is not None for parameter in refiner.parameters())
    assert history[-1][0] < history[0][0]
    assert history[-1][1] < 0.7 * history[0][1]


def test_refiner_takes_an_image_at_a_time() -> None:
    """No image of a batch changes the targets of another; cached float16 features do as well as float32."""
    refiner, features = Refiner(TINY), torch.randn(3, 16, 24)
    torch.testing.assert_close(refiner.project(features)[1:2], refiner.project(features[1:2]))
    assert refiner.project(features.half()).dtype == torch.float32


def test_positions_tell_q_which_token_stands_where() -> None:
    refiner = Refiner(TINY)
    same = torch.randn(1, 1, 8).expand(1, 16, 8)
    assert refiner.reconstruct(same).std(dim=1).min() > 1e-3


def test_full_size_refiner_has_64_million_weights() -> None:
    """P_t: one block of 12 D^2 + 13 D at D = 1024 and D x C; Q_t: four such blocks between linear layers."""
    with torch.device("meta"):
        refiner = Refiner(RefinerConfig())
    block = 12 * 1024**2 + 13 * 1024
    p_t = block + 1024 * 32 + 32
    q_t = (32 * 1024 + 1024) + 4 * block + 2 * 1024 + (1024**2 + 1024)
    assert sum(p.numel() for p in refiner.projector.parameters()) == p_t
    assert sum(p.numel() for p in refiner.decoder.parameters()) == q_t
    assert round((p_t + q_t) / 1e6) == 64


def test_frozen_prior_never_changes_and_gives_no_gradient() -> None:
    refiner = Refiner(TINY)
    prior: Prior = FrozenPrior(refiner)
    features = torch.randn(2, 16, 24, requires_grad=True)
    module = FrozenPrior(refiner).train()
    assert not any(m.training for m in module.modules())
    assert not any(p.requires_grad for p in refiner.parameters())
    z = prior(features)
    assert not z.requires_grad
    torch.testing.assert_close(z, refiner.project(features).detach())


def test_pca_agrees_with_numpy_and_needs_one_pass() -> None:
    """In batches of any size, and far from the origin: the same directions as one SVD in float64."""
    features = torch.randn(5, 30, 12) @ torch.diag(torch.linspace(3, 0.3, 12)) + 1000 * torch.rand(12)
    x = features.double().flatten(0, 1).numpy()
    centred = x - x.mean(axis=0)
    directions = np.linalg.svd(centred, full_matrices=False)[2][:4].T  # (D, C)
    directions *= np.sign(directions[np.abs(directions).argmax(axis=0), range(4)])
    for stream in ([features], features.split(2), features.flatten(0, 1).split(7)):
        targets = fit_pca(iter(stream), 4)
        np.testing.assert_allclose(targets.mean.numpy(), x.mean(axis=0), rtol=1e-6)
        np.testing.assert_allclose(targets.basis.numpy(), directions, atol=2e-5)
    z = centred @ directions
    z /= np.sqrt((z**2).mean(axis=1, keepdims=True) + 1e-6)
    targets = fit_pca([features], 4).project(features).flatten(0, 1)
    np.testing.assert_allclose(targets.numpy(), z, atol=2e-3)  # 1000 in float32 has an error of 6e-5


def test_pca_keeps_what_spans_few_directions() -> None:
    """Features of rank C about their mean lose nothing: their centred Gram matrix comes through."""
    centred = torch.randn(4, 16, 8) @ torch.randn(8, 24)
    targets = fit_pca([centred + 3], 8)
    centred = centred - centred.mean(dim=(0, 1))
    assert gram_alignment(targets.project(centred + targets.mean), centred) < 1e-6


def test_random_targets_are_an_orthonormal_basis_and_reproducible() -> None:
    targets = random_targets(24, 8, seed=3)
    torch.testing.assert_close(targets.basis.mT @ targets.basis, torch.eye(8))
    assert torch.equal(targets.basis, random_targets(24, 8, seed=3).basis)
    assert not torch.equal(targets.basis, random_targets(24, 8, seed=4).basis)


def test_linear_targets_are_their_state_dict() -> None:
    fitted = fit_pca([torch.randn(4, 16, 24)], 8)
    loaded = LinearTargets(fitted.config)
    loaded.load_state_dict(fitted.state_dict())
    features = torch.randn(2, 16, 24)
    assert torch.equal(loaded.project(features), fitted.project(features))


def test_targets_ignore_autocast() -> None:
    targets, features = random_targets(24, 8), torch.randn(2, 16, 24)
    images = torch.rand(2, 3, 16, 16)
    with torch.autocast("cpu", torch.bfloat16):
        inside = [targets.project(features), reference_features(features, images, 4, 4, "jbu")]
    outside = [targets.project(features), reference_features(features, images, 4, 4, "jbu")]
    torch.testing.assert_close(inside, outside, rtol=1e-6, atol=1e-6)


# The reference features, written out pixel by pixel and cell by cell in float64.


def naive_blur(maps: Any, sigma: float) -> Any:
    """(D, H, W), a Gaussian of sigma pixels per axis, renormalised at the border."""
    for axis, s in ((1, sigma), (2, sigma)):
        at = np.arange(maps.shape[axis])
        kernel = np.exp(-((at[:, None] - at) ** 2) / (2 * s**2))
        maps = np.moveaxis(np.moveaxis(maps, axis, -1) @ (kernel / kernel.sum(1, keepdims=True)).T, -1, axis)
    return maps


def naive_down(maps: Any, h: int, w: int) -> Any:
    """Mean of the 2 x 2 pixels around the centre of each cell (H / h and W / w even)."""
    _, height, width = maps.shape
    out = np.empty((len(maps), h, w))
    for i in range(h):
        for j in range(w):
            y, x = (2 * i + 1) * height // (2 * h), (2 * j + 1) * width // (2 * w)
            out[:, i, j] = maps[:, y - 1 : y + 1, x - 1 : x + 1].mean(axis=(1, 2))
    return out


def naive_bilateral(image: Any, grid: Any) -> Any:
    """Joint bilateral upsampling of a grid (D, h, w) by an image (3, H, W)."""
    _, h, w = grid.shape
    _, height, width = image.shape
    colours = image.reshape(3, h, height // h, w, width // w).mean(axis=(2, 4))
    out = np.zeros((len(grid), height, width))
    for y in range(height):
        for x in range(width):
            total = 0.0
            for i in range(h):
                for j in range(w):
                    dy, dx = (y + 0.5) * h / height - 0.5 - i, (x + 0.5) * w / width - 0.5 - j
                    if max(abs(dy), abs(dx)) <= 2:
                        colour = ((image[:, y, x] - colours[:, i, j]) ** 2).sum()
                        weight = math.exp(-(dy**2 + dx**2) / 2 - colour / (2 * 0.1**2))
                        out[:, y, x] += weight * grid[:, i, j]
                        total += weight
            out[:, y, x] /= total
    return out


def naive_reference(
    features: Tensor, images: Tensor, h: int, w: int, kind: str, low_pass: str = "blend"
) -> Any:
    """H_ref of each image, (B, h w, D); cells must be square."""
    out = []
    for grid, image in zip(to_grid(features, h, w), images.double().numpy(), strict=True):
        if kind == "jbu":
            full = naive_bilateral(image, grid.double().numpy())
        else:
            full = F.interpolate(grid[None].double(), size=image.shape[1:], mode=kind)[0].numpy()
        blurred = 0.4 * naive_blur(full, 0.5 * image.shape[1] / h)
        low = {"blend": 0.6 * full + blurred, "subtract": full - blurred, "spatial-norm": full}[low_pass]
        tokens = naive_down(low, h, w).reshape(len(full), -1).T
        if low_pass == "spatial-norm":
            tokens = (tokens - 0.4 * tokens.mean(axis=0)) / np.sqrt(tokens.var(axis=0) + 1e-6)
        out.append(tokens)
    return np.stack(out)


def nearest(image: Tensor, grid: Tensor) -> Tensor:
    """An upsampler as `load_anyup` gives one, which looks only at the image's size."""
    return F.interpolate(grid, size=image.shape[-2:], mode="nearest")


@pytest.mark.parametrize(
    ("upsampler", "kind"), [("bilinear", "bilinear"), ("jbu", "jbu"), (nearest, "nearest")]
)
def test_reference_features_against_numpy(upsampler: Any, kind: str) -> None:
    features, images = torch.randn(2, 3 * 5, 6), torch.rand(2, 3, 12, 20)
    expected = naive_reference(features, images, 3, 5, kind)
    targets = reference_features(features, images, 3, 5, upsampler)
    np.testing.assert_allclose(targets.numpy(), expected, atol=2e-5)


@pytest.mark.parametrize("low_pass", ["subtract", "spatial-norm"])
@pytest.mark.parametrize(
    ("upsampler", "kind"), [("bilinear", "bilinear"), ("jbu", "jbu"), (nearest, "nearest")]
)
def test_other_kinds_of_low_pass_against_numpy(upsampler: Any, kind: str, low_pass: Any) -> None:
    features, images = torch.randn(2, 3 * 5, 6), torch.rand(2, 3, 12, 20)
    expected = naive_reference(features, images, 3, 5, kind, low_pass)
    targets = reference_features(features, images, 3, 5, upsampler, LowPassConfig(kind=low_pass))
    np.testing.assert_allclose(targets.numpy(), expected, atol=5e-5)
    if upsampler == "bilinear":
        full = F.interpolate(to_grid(features, 3, 5), size=(12, 20), mode="bilinear")
        down = low_pass_down(full, 3, 5, LowPassConfig(kind=low_pass))
        np.testing.assert_allclose(to_tokens(down).numpy(), expected, atol=5e-5)


@pytest.mark.parametrize("upsampler", ["bilinear", "jbu", nearest])
def test_a_constant_comes_through_every_upsampler(upsampler: Any) -> None:
    """Weights sum to 1 at the border too."""
    features = torch.randn(2, 1, 6).expand(2, 16, 6)
    out = reference_features(features, torch.rand(2, 3, 16, 16), 4, 4, upsampler)
    torch.testing.assert_close(out, features)


def test_bilateral_features_respect_an_edge_in_the_image() -> None:
    """Left half black, right half white, features likewise: none leaks across, as some does without it."""
    images = torch.zeros(1, 3, 32, 32)
    images[..., 16:] = 1
    features = to_tokens(torch.cat([torch.zeros(1, 1, 8, 4), torch.ones(1, 1, 8, 4)], dim=3))
    sharp = LowPassConfig(strength=0)
    guided = reference_features(features, images, 8, 8, "jbu", sharp)
    blind = reference_features(features, torch.zeros_like(images), 8, 8, "jbu", sharp)
    torch.testing.assert_close(guided, features)
    assert (blind - features).abs().max() > 0.1


def test_bilateral_weights_are_local_and_sum_to_one() -> None:
    weights = bilateral_weights(torch.rand(2, 3, 32, 32), 8, 8, slice(3, 7))
    assert weights.shape == (2, 4, 32, 64)
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(2, 4, 32))
    used = weights[0, 0, 0].view(8, 8)
    assert (used[:3, :2] > 0).all()  # pixel (3, 0) stands at cell (0.375, -0.375)
    assert (used[3:] == 0).all()
    assert (used[:, 2:] == 0).all()


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    features, images = torch.randn(2, 16, 6), torch.rand(2, 3, 16, 16)
    in_one_pass = reference_features(features, images, 4, 4, "jbu")
    monkeypatch.setattr(upsampling, "_CHUNK", 2 * 16 * 16 * 3)  # 3 rows at a time, the last chunk has one
    torch.testing.assert_close(reference_features(features, images, 4, 4, "jbu"), in_one_pass)


def test_low_pass_removes_frequencies_beyond_the_grid() -> None:
    """A wave of one cell would be sampled as a constant; the blur removes its share of it, and no mean."""
    wave = torch.cos(2 * math.pi * (torch.arange(32) + 0.5) / 8).expand(1, 1, 32, 32)
    sharp = low_pass_down(wave, 4, 4, LowPassConfig(strength=0))
    smooth = low_pass_down(wave, 4, 4, LowPassConfig(strength=0.4))
    inside = (slice(None), slice(None), slice(1, 3), slice(1, 3))
    torch.testing.assert_close(smooth[inside], 0.6 * sharp[inside], rtol=0.02, atol=0)
    torch.testing.assert_close(low_pass_down(wave + 5, 4, 4, LowPassConfig()), 5 + smooth)


def test_network_upsamplers_get_one_normalised_image_at_a_time() -> None:
    """As AnyUp wants them: ImageNet mean and std, features as a grid."""
    seen = []

    def upsampler(image: Tensor, grid: Tensor) -> Tensor:
        seen.append((image, grid.shape))
        return nearest(image, grid)

    images = torch.rand(2, 3, 8, 8)
    out = reference_features(torch.randn(2, 4, 6, requires_grad=True), images, 2, 2, upsampler)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    guides = torch.cat([image for image, _ in seen])
    torch.testing.assert_close(guides, (images - mean.view(3, 1, 1)) / std.view(3, 1, 1))
    assert [shape for _, shape in seen] == [(1, 6, 2, 2)] * 2
    assert not out.requires_grad


def test_anyup_out_of_reach_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(*_: Any, **__: Any) -> None:
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(torch.hub, "load", no_network)
    with pytest.raises(FileNotFoundError, match=r"wimmerth/anyup .*no route to host.*upsampler jbu"):
        load_anyup()


def test_errors_name_what_was_given() -> None:
    features, images = torch.randn(2, 16, 24), torch.rand(2, 3, 16, 16)
    with pytest.raises(ValueError, match=r"B = 2 images and N = h w = 15 tokens, got \(2, 16, 24\)"):
        reference_features(features, images, 3, 5, "jbu")
    with pytest.raises(ValueError, match=r"not smaller than the grid of 4 x 4, got \(2, 3, 2, 16\)"):
        reference_features(features, images[:, :, :2], 4, 4, "jbu")
    with pytest.raises(ValueError, match=r"'bilinear', 'jbu' or a network \(load_anyup\(\)\), got 'anyup'"):
        reference_features(features, images, 4, 4, "anyup")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"low_pass.strength must lie in \[0, 1\].*got 1.5"):
        LowPassConfig(strength=1.5)
    with pytest.raises(ValueError, match=r"low_pass\.sigma must be > 0, got 0"):
        LowPassConfig(sigma=0)
    with pytest.raises(ValueError, match=r"width D = 24, got \(2, 16, 20\)"):
        Refiner(TINY).project(features[..., :20])
    with pytest.raises(ValueError, match=r"\(N, C\) = \(16, 8\), got \(2, 9, 8\)"):
        Refiner(TINY).reconstruct(torch.randn(2, 9, 8))
    with pytest.raises(ValueError, match="num_heads must divide the width 1024, got 15"):
        RefinerConfig(num_heads=15)
    with pytest.raises(ValueError, match="decoder_dim must be a multiple of 4 for its positions, got 6"):
        RefinerConfig(decoder_dim=6, decoder_heads=2)
    with pytest.raises(ValueError, match="decoder_layers must be >= 1, got 0"):
        RefinerConfig(decoder_layers=0)
    with pytest.raises(ValueError, match=r"latent_dim must lie in \[1, 4\], got 8"):
        LinearTargetsConfig(feature_dim=4, latent_dim=8)
    with pytest.raises(ValueError, match="8 principal components need more than 8 tokens, got 0"):
        fit_pca([], 8)
    with pytest.raises(ValueError, match=r"width D = 24, got \(32, 20\)"):
        fit_pca([features, features[..., :20]], 8)
