"""SSC, LPC, GSQ, eRank: invariances, values by definition, edge cases, errors."""

import math

import numpy as np
import pytest
import torch
from sklearn.cluster import SpectralClustering
from torch import Tensor

from openpae.geometry.clusters import spectral_clusters
from openpae.geometry.metrics import (
    effective_rank,
    global_semantic_quality,
    latent_perturbation_consistency,
    majority_labels,
    moved_latents,
    nearest_neighbours,
    singular_values,
    spatial_structure_consistency,
    unit_directions,
)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def rotation(n: int) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))[0].float()


def rotate(latents: Tensor) -> Tensor:
    return torch.einsum("bchw,cd->bdhw", latents, rotation(latents.shape[1]))


def scenes(n: int = 3, noise: float = 1.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Latents (n, 8, 6, 6) whose tokens follow a map of up to four segments, and the map (n, 24, 24)."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randint(0, 4, (n, 3, 3), generator=generator)
    coarse[:, 0, 0], coarse[:, 0, 1] = 0, 1
    segments = coarse.repeat_interleave(2, 1).repeat_interleave(2, 2)
    directions = torch.randn(4, 8, generator=generator)
    latents = 3 * directions[segments].permute(0, 3, 1, 2)
    latents = latents + noise * torch.randn(latents.shape, generator=generator)
    return latents, segments.repeat_interleave(4, 1).repeat_interleave(4, 2)


def entropy(p: np.ndarray) -> float:
    return -sum(q * math.log(q) for q in p.flatten() if q > 0)


def literal_nmi(a: np.ndarray, b: np.ndarray) -> float:
    joint = np.array([[np.mean((a == i) & (b == j)) for j in np.unique(b)] for i in np.unique(a)])
    ha, hb = entropy(joint.sum(1)), entropy(joint.sum(0))
    return (ha + hb - entropy(joint)) / math.sqrt(ha * hb)


def literal_affinity(latent: Tensor, sigma: float) -> np.ndarray:
    z = latent.flatten(1).T.double().numpy()
    affinity = np.zeros((len(z), len(z)))
    for i in range(len(z)):
        for j in range(len(z)):
            if i != j:
                cosine = z[i] @ z[j] / np.linalg.norm(z[i]) / np.linalg.norm(z[j])
                affinity[i, j] = math.exp(cosine / sigma)
    return affinity


@pytest.mark.parametrize("sigma", [0.1, 0.5])
def test_ssc_equals_scikit_learns_spectral_clustering_and_a_literal_nmi(sigma: float) -> None:
    latents, labels = scenes(noise=2.0)
    values = []
    for latent, label in zip(latents, labels[:, ::4, ::4].flatten(1).numpy(), strict=True):
        clustering = SpectralClustering(len(np.unique(label)), affinity="precomputed", random_state=0)
        values.append(literal_nmi(label, clustering.fit_predict(literal_affinity(latent, sigma))))
    estimate = spatial_structure_consistency(latents, labels, sigma=sigma)
    assert estimate.value == pytest.approx(np.mean(values), abs=1e-6)
    assert estimate.stderr == pytest.approx(np.std(values, ddof=1) / math.sqrt(3), abs=1e-6)
    assert 0.05 < estimate.value < 0.95


def test_ssc_depends_on_angles_only() -> None:
    """Neither a rotation of the channels nor the scale of a token changes a cosine."""
    latents, labels = scenes(noise=2.0)
    base = spatial_structure_consistency(latents, labels)
    scaled = rotate(latents) * (0.5 + torch.rand(3, 1, 6, 6))
    assert spatial_structure_consistency(scaled, labels).value == pytest.approx(base.value, abs=1e-6)


def test_ssc_is_one_for_tokens_that_follow_the_segments_and_low_for_noise() -> None:
    latents, labels = scenes(noise=0.01)
    assert spatial_structure_consistency(latents, labels).value == pytest.approx(1)
    renamed = labels * 7 + 3  # only equality of labels counts
    assert spatial_structure_consistency(latents, renamed).value == pytest.approx(1)
    noise = torch.randn(3, 8, 6, 6, generator=torch.Generator().manual_seed(0))
    assert spatial_structure_consistency(noise, labels).value < 0.5


def test_ssc_drops_and_counts_images_of_one_segment() -> None:
    latents, labels = scenes()
    labels[1] = 4
    estimate = spatial_structure_consistency(latents, labels)
    assert (estimate.n, estimate.settings["dropped"]) == (2, 1)
    with pytest.raises(ValueError, match="at least two segments on its grid, got none in 1"):
        spatial_structure_consistency(latents[1:2], labels[1:2])


def test_majority_labels_count_pixels() -> None:
    labels = torch.tensor([[[5, 5, 2, 2], [5, 1, 3, 3], [0, 0, 0, 0], [0, 0, 0, 7]]])
    assert majority_labels(labels, 2, 2).tolist() == [[[5, 2], [0, 0]]]  # 2 ties with 3
    assert majority_labels(labels, 2, 2, ignore=5).tolist() == [[[1, 2], [0, 0]]]
    assert majority_labels(labels, 2, 2, ignore=0).tolist() == [
        [[5, 2], [0, 7]]
    ]  # one cell has no other label
    generator = torch.Generator().manual_seed(0)
    maps = torch.randint(0, 3, (2, 12, 20), generator=generator)
    for image, grid in zip(maps, majority_labels(maps, 3, 4), strict=True):
        for i in range(3):
            for j in range(4):
                cell = image[4 * i : 4 * i + 4, 5 * j : 5 * j + 5].flatten()
                assert grid[i, j] == cell.bincount().argmax()


def decode(z: Tensor) -> Tensor:
    return torch.sigmoid(z[:, :3].repeat_interleave(2, 2).repeat_interleave(2, 3))


def distance(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).square().mean(dim=(1, 2, 3)) + (a - b).abs().amax(dim=(1, 2, 3))


def test_lpc_equals_its_definition() -> None:
    latents = torch.randn(5, 4, 3, 3)
    radii = (0.1, 0.5, 1.0, 2.0)
    weights = {rho: 1 / rho / 13.5 for rho in radii}  # 1 / 0.1 + 1 / 0.5 + 1 + 1 / 2 = 13.5
    values = []
    for i, z in enumerate(latents):
        total = 0.0
        for u in unit_directions(z, 2, seed=3, image=i):
            for rho in radii:
                step = rho * z.norm() * u
                plus, minus = (distance(decode((z + s * step)[None]), decode(z[None])) for s in (1, -1))
                total += weights[rho] * float(plus + minus) / 2 / 2
        values.append(total)
    estimate = latent_perturbation_consistency(latents, decode, distance, directions=2, seed=3)
    assert estimate.value == pytest.approx(np.mean(values), rel=1e-5)
    assert estimate.stderr == pytest.approx(np.std(values, ddof=1) / math.sqrt(5), rel=1e-5)
    assert estimate.settings == {"directions": 2, "radii": "0.1 0.5 1.0 2.0", "seed": 3}


def test_lpc_of_a_constant_decoder_is_zero() -> None:
    estimate = latent_perturbation_consistency(
        torch.randn(3, 4, 3, 3), lambda z: torch.full((len(z), 3, 6, 6), 0.5), distance
    )
    assert (estimate.value, estimate.stderr) == (0, 0)


@pytest.mark.parametrize("batch_size", [1, 5, 9, 20, 1000])
def test_lpc_does_not_depend_on_the_batch_size(batch_size: int) -> None:
    latents = torch.randn(4, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    seen = []

    def watched(z: Tensor) -> Tensor:
        seen.append(len(z))
        return decode(z)

    estimate = latent_perturbation_consistency(latents, watched, distance, batch_size=batch_size)
    base = latent_perturbation_consistency(latents, decode, distance)
    assert estimate.value == pytest.approx(base.value, rel=1e-5)
    assert max(seen) <= batch_size
    assert sum(seen) == 4 * 9


def test_directions_have_unit_norm_and_depend_on_seed_and_image() -> None:
    z = torch.randn(4, 3, 3)
    u = unit_directions(z, 3, seed=1, image=2)
    torch.testing.assert_close(u.flatten(1).norm(dim=1), torch.ones(3))
    assert torch.equal(u, unit_directions(z, 3, seed=1, image=2))
    assert not torch.equal(u, unit_directions(z, 3, seed=1, image=3))
    moved = moved_latents(z, u[0], (0.5,))
    torch.testing.assert_close((moved[0] - z).norm(), z.norm() / 2)
    torch.testing.assert_close(moved[0] + moved[1], 2 * z)  # no re-projection: the pair is symmetric


def clusters(classes: int, per_class: int, spread: float, dim: int = 12) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(classes).repeat_interleave(per_class)
    centres = torch.randn(classes, dim, generator=generator)
    latents = centres[labels][:, :, None, None] + spread * torch.randn(
        len(labels), dim, 2, 2, generator=generator
    )
    return latents, labels


def test_gsq_equals_its_definition() -> None:
    latents, labels = clusters(5, 8, 2.0)
    x = latents.double().numpy().mean(axis=(2, 3))
    x -= x.mean(0)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    hits = []
    for i in range(len(x)):
        others = [j for j in range(len(x)) if j != i]
        hits.append(labels[max(others, key=lambda j: x[i] @ x[j])] == labels[i])
    estimate = global_semantic_quality(latents, labels)
    assert estimate.value == pytest.approx(np.mean(hits))
    assert estimate.stderr == pytest.approx(np.std(hits, ddof=1) / math.sqrt(40))
    assert 0.2 < estimate.value < 1
    assert (estimate.over, estimate.settings["classes"]) == ("images", 5)


def test_gsq_is_one_for_separated_classes_and_ignores_rotation_shift_and_scale() -> None:
    latents, labels = clusters(6, 5, 0.01)
    assert global_semantic_quality(latents, labels).value == 1
    blurred, labels = clusters(6, 5, 2.0)
    base = global_semantic_quality(blurred, labels)
    assert global_semantic_quality(4 * rotate(blurred) + 7, labels).value == pytest.approx(base.value)


def test_gsq_draws_classes_by_the_seed() -> None:
    latents, labels = clusters(12, 6, 2.0)
    estimate = global_semantic_quality(latents, labels, classes=4, repeats=5)
    assert (estimate.n, estimate.over, estimate.settings["classes"], estimate.settings["known_classes"]) == (
        5, "repeats", 4, 12,
    )  # fmt: skip
    assert estimate == global_semantic_quality(latents, labels, classes=4, repeats=5)
    assert estimate.value > global_semantic_quality(latents, labels).value  # fewer classes are easier
    assert estimate.std is not None
    assert estimate.std > 0


def test_gsq_warns_of_classes_with_one_image() -> None:
    latents, labels = clusters(3, 4, 0.01)
    with pytest.warns(UserWarning, match="2 of 3 classes hold one image"):
        estimate = global_semantic_quality(latents[3:9], labels[3:9])
    assert estimate.value == pytest.approx(4 / 6)


def test_nearest_neighbours_do_not_depend_on_blocks() -> None:
    x = torch.randn(50, 6)
    assert torch.equal(nearest_neighbours(x, block=7), nearest_neighbours(x))


def test_effective_rank_equals_its_definition() -> None:
    latents = torch.randn(40, 5, 3, 3) * torch.tensor([4.0, 2, 1, 0.5, 0.1]).view(5, 1, 1)
    x = latents.double().numpy().mean(axis=(2, 3))
    s = np.sqrt(np.linalg.eigvalsh(x.T @ x))
    p = s / s.sum()
    estimate = effective_rank(latents)
    assert estimate.value == pytest.approx(math.exp(entropy(p)) / 5, rel=1e-5)
    assert estimate.stderr is not None
    assert 0 < estimate.stderr < 0.1
    assert singular_values(latents).tolist() == pytest.approx(sorted(s, reverse=True), rel=1e-5)


def test_effective_rank_runs_from_one_direction_to_isotropy() -> None:
    assert effective_rank(torch.eye(6).repeat(4, 1)).value == pytest.approx(1)
    line = torch.randn(30, 1) * torch.randn(1, 6)
    assert effective_rank(line).value == pytest.approx(1 / 6, rel=1e-5)
    latents = torch.randn(30, 6, 2, 2) * torch.arange(1, 7).view(6, 1, 1)
    assert effective_rank(rotate(latents)).value == pytest.approx(effective_rank(latents).value, rel=1e-5)
    with pytest.warns(UserWarning, match=r"3 images in 6 channels cannot exceed 0\.50"):
        assert effective_rank(latents[:3]).value <= 0.5


def test_bad_input_is_refused() -> None:
    latents, labels = scenes()
    with pytest.raises(ValueError, match="LPC is not defined without a decoder"):
        latent_perturbation_consistency(latents, None, distance)
    with pytest.raises(ValueError, match=r"radii must be positive, got 0\.5, 0"):
        latent_perturbation_consistency(latents, decode, distance, radii=(0.5, 0))
    with pytest.raises(ValueError, match="directions and batch_size must be at least 1, got 0 and 32"):
        latent_perturbation_consistency(latents, decode, distance, directions=0)
    with pytest.raises(ValueError, match=r"multiple of the 6 x 6 latent grid, got 20 x 24"):
        spatial_structure_consistency(latents, labels[:, :20])
    with pytest.raises(ValueError, match=r"each of the 3 images, got \(2, 24, 24\)"):
        spatial_structure_consistency(latents, labels[:2])
    with pytest.raises(ValueError, match=r"integers \(B, H, W\), got torch.float32"):
        majority_labels(labels.float(), 6, 6)
    with pytest.raises(ValueError, match=r"sigma must be at least 0\.01, got 0"):
        spectral_clusters(latents[0], 2, sigma=0)
    with pytest.raises(ValueError, match="between 1 and the 36 tokens of a latent, got 37"):
        spectral_clusters(latents[0], 37)
    with pytest.raises(ValueError, match="at least two classes, got 1"):
        global_semantic_quality(latents, torch.zeros(3, dtype=torch.long))
    with pytest.raises(ValueError, match=r"each of the 3 latents, got torch.float32 \(3,\)"):
        global_semantic_quality(latents, torch.zeros(3))
    with pytest.raises(ValueError, match="not defined for latents that are all zero"):
        effective_rank(torch.zeros(9, 4))
    with pytest.raises(ValueError, match="latents hold NaN or infinity"):
        effective_rank(latents / 0)
    with pytest.raises(ValueError, match=r"latents must be \(B, C, h, w\) with B > 0, got \(3, 8, 36\)"):
        spatial_structure_consistency(latents.flatten(2), labels)
