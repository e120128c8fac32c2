"""The losses: invariances, flow of gradients, and values in float64 NumPy."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from openpae.models.layers import to_sphere, to_tokens
from openpae.models.lpips import LPIPS
from openpae.objective.losses import (
    adaptive_weight,
    compared_pairs,
    consistency,
    denoising_loss,
    discriminator_hinge,
    feature_reconstruction,
    generator_hinge,
    gram_alignment,
    kl_penalty,
    perturb,
    reached_angle,
    semantic_alignment,
)

ANGLES = [42.5, 85.0]  # medium and large, Sec. 3.2


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def rotation(n: int) -> Tensor:
    return torch.linalg.qr(torch.randn(n, n))[0]


def array(x: Tensor) -> Any:
    return x.detach().numpy().astype(np.float64)


def on_sphere(*shape: int) -> Tensor:
    return to_sphere(torch.randn(*shape))


def gradients(loss: Tensor, *inputs: Tensor) -> list[bool]:
    """Which inputs get a gradient that is not zero."""
    gradients = torch.autograd.grad(loss, inputs, allow_unused=True)
    return [g is not None and bool(g.abs().sum() > 0) for g in gradients]


def test_gram_alignment_sees_relations_only() -> None:
    """Scaling tokens one by one or rotating the channels moves no cosine, so it may not move the loss."""
    z, f = torch.randn(2, 9, 8), torch.randn(2, 9, 24)
    scaled = torch.rand(2, 9, 1).add(0.1) * z @ rotation(8)
    torch.testing.assert_close(gram_alignment(scaled, f), gram_alignment(z, f))
    assert gram_alignment(f @ rotation(24), f) < 1e-9 < gram_alignment(z, f)


def test_gram_alignment_is_zero_only_where_the_gram_matrices_agree() -> None:
    """One token out of place moves N - 1 of its cosines; opposite cosines everywhere reach the bound."""
    z = torch.randn(1, 9, 8)
    moved = z.clone()
    moved[0, 4] += 0.5 * torch.randn(8)
    assert gram_alignment(z, z) == 0
    assert gram_alignment(moved, z) > 1e-4
    along, against = torch.ones(1, 2, 3), torch.ones(1, 2, 3) * torch.tensor([1.0, -1.0]).view(1, 2, 1)
    torch.testing.assert_close(gram_alignment(along, against), torch.tensor(4 * 2 / 4))  # 2 of 4 entries


def test_gram_alignment_compares_each_image_with_its_own_prior() -> None:
    z, f = torch.randn(3, 9, 8), torch.randn(3, 9, 8)
    each = torch.stack([gram_alignment(z[i : i + 1], f[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(gram_alignment(z, f), each.mean())


def test_gram_alignment_against_numpy() -> None:
    z, f = torch.randn(2, 9, 8), torch.randn(2, 9, 24)
    total = 0.0
    for zb, fb in zip(array(z), array(f), strict=True):
        for i in range(9):
            for j in range(9):
                ours = zb[i] @ zb[j] / math.sqrt((zb[i] @ zb[i]) * (zb[j] @ zb[j]))
                theirs = fb[i] @ fb[j] / math.sqrt((fb[i] @ fb[i]) * (fb[j] @ fb[j]))
                total += (ours - theirs) ** 2
    assert gram_alignment(z, f).item() == pytest.approx(total / (2 * 81), rel=1e-5)


def test_gram_alignment_of_inner_products() -> None:
    """On the sphere they are C cosines, and so is the gradient's scale; off it lengths count."""
    z, f = torch.randn(2, 9, 8, requires_grad=True), torch.randn(2, 9, 8)
    on_sphere = [8**0.5 * F.normalize(x, dim=-1) for x in (z, f)]
    inner = gram_alignment(*on_sphere, "inner")
    torch.testing.assert_close(inner, 64 * gram_alignment(z, f))
    expected = np.mean([(a @ a.T - b @ b.T) ** 2 for a, b in zip(array(z.detach()), array(f), strict=True)])
    assert gram_alignment(z, f, "inner").item() == pytest.approx(expected, rel=1e-5)
    (slope,) = torch.autograd.grad(gram_alignment(z, f, "inner"), z)
    # d/dz of mean (z z^T - f f^T)^2 is 4 (z z^T - f f^T) z / (B N^2).
    gap = z @ z.mT - f @ f.mT
    torch.testing.assert_close(slope, (4 * gap @ z / (2 * 81)).detach())


def test_gram_alignment_ignores_autocast() -> None:
    """Under bf16 autocast a bare product of float32 tensors would be rounded to 8 bits."""
    z = torch.randn(2, 9, 8)
    near = z + 1e-3 * torch.randn_like(z)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = gram_alignment(near, z)
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, gram_alignment(near, z), rtol=1e-6, atol=0)


def test_semantic_alignment_is_zero_for_equal_and_two_a_part_for_opposite_tokens() -> None:
    z = torch.randn(2, 9, 8)
    for which, parts in (("pooled", 1), ("tokens", 1), ("both", 2)):
        assert semantic_alignment(3 * z, z, which).abs() < 1e-6
        torch.testing.assert_close(semantic_alignment(-z, z, which), torch.tensor(2.0 * parts))


def test_semantic_alignment_parts_see_what_they_name() -> None:
    """Shuffling the tokens leaves the pooled part alone; both is the sum of the two."""
    z, f = torch.randn(2, 9, 8), torch.randn(2, 9, 8)
    shuffled = z[:, torch.randperm(9)]
    torch.testing.assert_close(semantic_alignment(shuffled, f, "pooled"), semantic_alignment(z, f, "pooled"))
    assert (semantic_alignment(shuffled, f, "tokens") - semantic_alignment(z, f, "tokens")).abs() > 1e-3
    both = semantic_alignment(z, f, "pooled") + semantic_alignment(z, f, "tokens")
    torch.testing.assert_close(semantic_alignment(z, f), both)


def test_semantic_alignment_against_numpy() -> None:
    z, f = torch.randn(2, 9, 8), torch.randn(2, 9, 8)

    def cos(a: Any, b: Any) -> Any:
        return a @ b / math.sqrt((a @ a) * (b @ b))

    pooled = np.mean([1 - cos(a.mean(0), b.mean(0)) for a, b in zip(array(z), array(f), strict=True)])
    tokens = np.mean([1 - cos(array(z)[b, i], array(f)[b, i]) for b in range(2) for i in range(9)])
    assert semantic_alignment(z, f).item() == pytest.approx(pooled + tokens, rel=1e-5)


def test_alignment_gives_no_gradient_to_the_prior() -> None:
    z, f = torch.randn(2, 9, 8, requires_grad=True), torch.randn(2, 9, 8, requires_grad=True)
    for loss in (gram_alignment(z, f), semantic_alignment(z, f), feature_reconstruction(z, f)):
        assert gradients(loss, z, f) == [True, False]


@pytest.mark.parametrize("angle", ANGLES)
def test_perturbed_latents_lie_on_the_sphere_at_the_angle(angle: float) -> None:
    """At full latent size, mean over directions; per token and at a random and at a constant latent."""
    for z in (on_sphere(64, 32, 16, 16), on_sphere(64, 32, 1, 1).expand(64, 32, 16, 16)):
        moved = perturb(z, torch.randn(64, 32, 16, 16), angle)
        torch.testing.assert_close(moved.square().mean(dim=1), torch.ones(64, 16, 16), rtol=1e-4, atol=0)
        assert reached_angle(z, moved).item() == pytest.approx(angle, abs=0.5)


def test_perturbations_of_one_draw_lie_along_one_direction() -> None:
    """Each token, its two perturbed selves and the direction span a plane: the third singular value is 0."""
    z, direction = on_sphere(2, 8, 3, 3), torch.randn(2, 8, 3, 3)
    arc = [z, *(perturb(z, direction, angle) for angle in ANGLES), direction]
    vectors = torch.stack([to_tokens(x) for x in arc], dim=2).double()  # (B, N, 4, C)
    singular = torch.linalg.svdvals(vectors)
    assert (singular[..., 2] < 1e-5 * singular[..., 0]).all()
    assert (singular[..., 1] > 1e-2 * singular[..., 0]).all()


def test_perturb_against_numpy() -> None:
    z, direction = on_sphere(2, 8, 3, 3), 7 * torch.randn(2, 8, 3, 3)
    for angle in ANGLES:
        out = np.empty((2, 8, 3, 3))
        for b in range(2):
            e = array(direction)[b] / math.sqrt((array(direction)[b] ** 2).mean())
            y = array(z)[b] + math.tan(angle * math.pi / 180) * e
            out[b] = y / np.sqrt((y**2).mean(axis=0, keepdims=True) + 1e-6)
        np.testing.assert_allclose(array(perturb(z, direction, angle)), out, rtol=2e-5, atol=1e-6)


def test_no_angle_gives_back_the_latent() -> None:
    z = on_sphere(2, 8, 3, 3)
    torch.testing.assert_close(perturb(z, torch.randn(2, 8, 3, 3), 0), z, rtol=1e-5, atol=1e-6)


def test_perturb_over_the_full_sample() -> None:
    moved = perturb(on_sphere(2, 8, 3, 3), torch.randn(2, 8, 3, 3), 85, per="sample")
    torch.testing.assert_close(moved.square().mean(dim=(1, 2, 3)), torch.ones(2), rtol=1e-4, atol=0)


def test_gradients_of_a_perturbed_latent_reach_the_latent_alone() -> None:
    z, direction = torch.randn(2, 8, 3, 3, requires_grad=True), torch.randn(2, 8, 3, 3, requires_grad=True)
    weights = torch.randn(2, 8, 3, 3)
    assert gradients((weights * perturb(z, direction, 42.5)).sum(), z, direction) == [True, False]


def test_designs_compare_the_pairs_of_table_7() -> None:
    assert compared_pairs("none") == ()
    assert compared_pairs("small") == (("m", "r"),)
    assert compared_pairs("large") == (("l", "r"),)
    assert compared_pairs("cascaded") == (("m", "r"), ("l", "m"))


@pytest.fixture(scope="module")
def lpips() -> LPIPS:
    torch.manual_seed(0)
    return LPIPS("alex")


def bracket(lpips: LPIPS, a: Tensor, b: Tensor) -> Tensor:
    return consistency(a, b, lpips.features(a), lpips.features(b), lpips.distance)


def test_consistency_is_zero_where_the_decodes_agree(lpips: LPIPS) -> None:
    a, b = torch.rand(2, 3, 32, 32), torch.rand(2, 3, 32, 32)
    assert bracket(lpips, a, a) == 0
    torch.testing.assert_close(bracket(lpips, a, b), (a - b).abs().mean() + lpips(a, b).mean())


def test_consistency_gives_no_gradient_to_the_nearer_side(lpips: LPIPS) -> None:
    """Neither through the pixels nor through the features, in either bracket of the cascade."""
    decodes = {name: torch.rand(1, 3, 32, 32, requires_grad=True) for name in "rml"}
    features = {name: lpips.features(x) for name, x in decodes.items()}  # once each
    reached = {}
    for a, b in compared_pairs("cascaded"):
        loss = consistency(decodes[a], decodes[b], features[a], features[b], lpips.distance)
        gradients = torch.autograd.grad(loss, list(decodes.values()), allow_unused=True, retain_graph=True)
        reached[a, b] = [name for name, g in zip("rml", gradients, strict=True) if g is not None]
    assert reached == {("m", "r"): ["m"], ("l", "m"): ["l"]}


def test_consistency_against_numpy() -> None:
    """With a distance that NumPy can follow: the mean square of one map."""
    a, b, fa, fb = (
        torch.rand(2, 3, 4, 4),
        torch.rand(2, 3, 4, 4),
        torch.rand(2, 5, 2, 2),
        torch.rand(2, 5, 2, 2),
    )
    loss = consistency(a, b, [fa], [fb], lambda p, q: (p[0] - q[0]).square().mean(dim=(1, 2, 3)))
    expected = np.abs(array(a) - array(b)).mean() + ((array(fa) - array(fb)) ** 2).mean()
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_hinge_against_numpy() -> None:
    real, fake = 2 * torch.randn(4, 3, 3), 2 * torch.randn(4, 3, 3)
    expected = np.maximum(0, 1 - array(real)).mean() + np.maximum(0, 1 + array(fake)).mean()
    assert discriminator_hinge(real, fake).item() == pytest.approx(expected, rel=1e-5)
    assert generator_hinge(fake).item() == pytest.approx(-array(fake).mean(), rel=1e-5)


def test_hinge_is_zero_for_separated_logits() -> None:
    """No gradient beyond the margin, and 2 for a discriminator that says 0 to everything."""
    real, fake = torch.full((4,), 1.5, requires_grad=True), torch.full((4,), -1.5, requires_grad=True)
    loss = discriminator_hinge(real, fake)
    assert loss == 0
    assert gradients(loss, real, fake) == [False, False]
    assert discriminator_hinge(torch.zeros(4), torch.zeros(4)) == 2


def test_adaptive_weight_balances_the_gradients() -> None:
    """Weighted, the adversarial gradient is as long as the other; a vanishing one is not blown up."""
    a, b = torch.randn(6, 5, requires_grad=True), 0.01 * torch.randn(6, 5)
    weight = adaptive_weight(a, b)
    expected = np.linalg.norm(array(a)) / (np.linalg.norm(array(b)) + 1e-4)
    assert weight.item() == pytest.approx(expected, rel=1e-5)
    assert not weight.requires_grad
    torch.testing.assert_close((weight * b).norm(), a.detach().norm(), rtol=1e-2, atol=0)
    assert adaptive_weight(a, torch.zeros(6, 5)) == 1e4
    assert adaptive_weight(torch.zeros(6, 5), b) == 0


def test_kl_penalty_against_numpy() -> None:
    z = on_sphere(3, 8, 4, 4) + 0.3 * torch.randn(1, 8, 1, 1)
    total = 0.0
    for c in range(8):
        values = array(z)[:, c].ravel()
        m, v = values.mean(), values.var()
        total += 0.5 * (m**2 + v - 1 - math.log(v))
    assert kl_penalty(z).item() == pytest.approx(16 * total, rel=1e-5)


def test_kl_penalty_is_zero_for_standard_channels_alone() -> None:
    """Unequal channels cost, though on the sphere; dead ones stay finite."""
    z = torch.randn(4, 8, 16, 16)
    standard = (z - z.mean(dim=(0, 2, 3), keepdim=True)) / z.std(dim=(0, 2, 3), keepdim=True, correction=0)
    unequal = to_sphere(z * torch.linspace(0.1, 2, 8).view(1, 8, 1, 1))
    assert kl_penalty(standard).abs() < 1e-2
    assert kl_penalty(unequal) > 100
    dead = torch.zeros(2, 8, 2, 2).requires_grad_()
    loss = kl_penalty(dead)
    assert loss.isfinite()
    (gradient,) = torch.autograd.grad(loss, dead)
    assert gradient.isfinite().all()


def test_kl_penalty_moves_the_latent_towards_equal_channels() -> None:
    z = (torch.randn(4, 8, 4, 4) * torch.linspace(0.2, 2, 8).view(1, 8, 1, 1)).requires_grad_()
    before = kl_penalty(to_sphere(z))
    (gradient,) = torch.autograd.grad(before, z)
    assert kl_penalty(to_sphere(z - 0.01 * gradient)) < before


def test_denoising_loss_against_numpy() -> None:
    z, noise, t = on_sphere(3, 8, 4, 4), torch.randn(3, 8, 4, 4), torch.tensor([0.0, 0.3, 1.0])
    loss = denoising_loss(z, noise, t, lambda x, s: 0.5 * x + s.view(-1, 1, 1, 1))
    total = 0.0
    for b, s in enumerate(array(t)):
        x = s * array(z)[b] + (1 - s) * array(noise)[b]
        total += ((0.5 * x + s - (array(z)[b] - array(noise)[b])) ** 2).mean()
    assert loss.item() == pytest.approx(total / 3, rel=1e-5)


def test_denoising_loss_trains_latent_and_denoiser() -> None:
    """It is 0 for the true velocity, 2 for none, and its gradient reaches both players but not the noise."""
    z, noise, t = on_sphere(8, 8, 8, 8), torch.randn(8, 8, 8, 8), torch.rand(8)
    assert denoising_loss(z, noise, t, lambda x, s: z - noise) == 0
    assert denoising_loss(z, noise, t, lambda x, s: 0 * x).item() == pytest.approx(2, abs=0.1)
    net = nn.Conv2d(8, 8, 1)
    z.requires_grad_()
    noise.requires_grad_()
    loss = denoising_loss(z, noise, t, lambda x, s: net(x))
    assert gradients(loss, z, net.weight, noise) == [True, True, False]


def test_feature_reconstruction_against_numpy() -> None:
    a, b = torch.randn(2, 9, 24), torch.randn(2, 9, 24)
    assert feature_reconstruction(a, b).item() == pytest.approx(((array(a) - array(b)) ** 2).mean(), rel=1e-5)
    assert feature_reconstruction(b, b) == 0


def test_losses_are_float32_for_bfloat16_inputs() -> None:
    z, f = torch.randn(2, 9, 8).bfloat16(), torch.randn(2, 9, 8).bfloat16()
    grid, images = torch.randn(2, 8, 3, 3).bfloat16(), torch.rand(2, 3, 4, 4).bfloat16()
    results = [
        gram_alignment(z, f),
        semantic_alignment(z, f),
        feature_reconstruction(z, f),
        perturb(grid, grid, 42.5),
        kl_penalty(grid),
        denoising_loss(grid, grid, torch.rand(2), lambda x, t: x),
        consistency(images, images, [images], [images], lambda a, b: (a[0] - b[0]).mean(dim=(1, 2, 3))),
        discriminator_hinge(z, f),
        generator_hinge(z),
        adaptive_weight(z, f),
    ]
    assert all(result.dtype == torch.float32 for result in results)


def test_errors_name_what_was_given() -> None:
    tokens, fewer = torch.randn(2, 9, 8), torch.randn(2, 4, 8)
    with pytest.raises(ValueError, match=r"same tokens, got \(B, N\) = \(2, 9\) and \(2, 4\)"):
        gram_alignment(tokens, fewer)
    with pytest.raises(ValueError, match=r"one shape \(B, N, C\), got \(2, 9, 8\) and \(2, 9, 7\)"):
        semantic_alignment(tokens, tokens[..., :7])
    with pytest.raises(ValueError, match="'pooled', 'tokens' or 'both', got 'pool'"):
        semantic_alignment(tokens, tokens, "pool")  # type: ignore[arg-type]
    grid = torch.randn(2, 8, 3, 3)
    with pytest.raises(ValueError, match=r"angle_degrees must lie in \[0, 90\), got 90"):
        perturb(grid, grid, 90)
    with pytest.raises(ValueError, match=r"got \(2, 8, 3, 3\) and \(1, 8, 3, 3\)"):
        perturb(grid, grid[:1], 42.5)
    with pytest.raises(ValueError, match="'none', 'small', 'large', 'cascaded', got 'medium'"):
        compared_pairs("medium")  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match=r"decodes must have one shape, got \(2, 8, 3, 3\) and \(1, 8, 3, 3\)"
    ):
        consistency(grid, grid[:1], [], [], lambda a, b: torch.zeros(2))
    with pytest.raises(
        ValueError, match=r"z and noise must have one shape, got \(2, 8, 3, 3\) and \(1, 8, 3, 3\)"
    ):
        denoising_loss(grid, grid[:1], torch.rand(2), lambda x, t: x)
    with pytest.raises(ValueError, match=r"got \(2, 9, 8\) and \(2, 4, 8\)"):
        feature_reconstruction(tokens, fewer)
