"""The losses of tokenizer and refiner, one equation each. Pure functions, computed in float32.

Letters: B batch, N = h w tokens, C latent channels, D feature width. `latent` and `prior` are tokens
(B, N, C); `z` is a grid (B, C, h, w). Equation numbers are those of arXiv:2605.07915.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from openpae.models.layers import to_sphere
from openpae.objective.flow import Velocity, interpolate

Design = Literal["none", "small", "large", "cascaded"]
Distance = Callable[[Sequence[Tensor], Sequence[Tensor]], Tensor]
"""Distances (B,) of two batches of images from their features, one map per stage: `LPIPS.distance`."""

# Farther decode, nearer decode: r is the anchor, m and l are the medium and the large perturbation.
_PAIRS: dict[str, tuple[tuple[str, str], ...]] = {
    "none": (),
    "small": (("m", "r"),),
    "large": (("l", "r"),),
    "cascaded": (("m", "r"), ("l", "m")),
}


def gram_alignment(latent: Tensor, prior: Tensor, gram: Literal["cosine", "inner"] = "cosine") -> Tensor:
    """Align the Gram matrices of latent and prior tokens (SSR, Eq. 3 of arXiv:2605.07915).

        L = mean_b 1/N^2 ||G(z_b) - G(f_b)||_F^2,   G(x)_ij = cos(x_i, x_j), or x_i . x_j for "inner"

    With cosines C and D may differ, and the loss is invariant to the scale of a token and to a rotation of
    the channels. Our choice: the paper gives neither the normalisation of the tokens nor of the sum
    (docs/deviations.md). Inner products of tokens on the sphere are C cosines, so their loss is C^2 times as
    large where both have C channels. The refiner uses cosines, between Z_T and H_ref (Sec. 3.3).

    Args:
        latent: latent tokens z, (B, N, C). Gradients flow to these.
        prior: refined target tokens f on the same grid, (B, N, D). Treated as a constant.
        gram: the entries of the Gram matrices.

    Returns:
        Scalar, in [0, 4] for cosines; 0 where both Gram matrices agree.

    Raises:
        ValueError: the two do not hold the same B images of N tokens.
    """
    if latent.shape[:2] != prior.shape[:2]:
        raise ValueError(
            f"latent and prior must hold the same tokens, got (B, N) = {tuple(latent.shape[:2])} and "
            f"{tuple(prior.shape[:2])}; resample the prior to the latent grid first"
        )
    z, f = latent.float(), prior.detach().float()
    if gram == "cosine":
        z, f = F.normalize(z, dim=-1), F.normalize(f, dim=-1)
    # Autocast would compute the products in bfloat16 despite .float(), with two digits per cosine.
    with torch.autocast(z.device.type, enabled=False):
        return (z @ z.mT - f @ f.mT).square().mean()


def semantic_alignment(
    latent: Tensor, prior: Tensor, which: Literal["pooled", "tokens", "both"] = "both"
) -> Tensor:
    """Align the directions of pooled latents and of tokens with the prior (SCR, Eq. 5).

        L = (1 - cos(pool f, pool z)) + mean_i (1 - cos(f_i, z_i)),   pool = mean over the tokens

    It uses no learned head. Table 3(c) compares the first part ("pooled"), the second ("tokens") and both.

    Args:
        latent: latent tokens z, (B, N, C). Gradients flow to these.
        prior: refined target tokens f, (B, N, C). Treated as a constant.
        which: the parts to add.

    Returns:
        Scalar, the mean over the batch, in [0, 2] per part; 0 where the directions agree, 2 per part where
        they are opposite.

    Raises:
        ValueError: the two differ in shape, or `which` is unknown.
    """
    if latent.shape != prior.shape:
        raise ValueError(
            f"latent and prior must have one shape (B, N, C), got {tuple(latent.shape)} and "
            f"{tuple(prior.shape)}; refine the prior to the latent's channels and grid first"
        )
    if which not in ("pooled", "tokens", "both"):
        raise ValueError(f"which must be 'pooled', 'tokens' or 'both', got {which!r}")
    z, f = latent.float(), prior.detach().float()
    parts = []
    if which != "tokens":
        parts.append(1 - F.cosine_similarity(z.mean(dim=1), f.mean(dim=1), dim=-1).mean())
    if which != "pooled":
        parts.append(1 - F.cosine_similarity(z, f, dim=-1).mean())
    return torch.stack(parts).sum()


def perturb(z: Tensor, direction: Tensor, angle_degrees: float, per: str = "token") -> Tensor:
    """Move latents on the sphere by an angle in a direction (Sec. 3.2, before Eq. 4).

        z_theta = sphere(z + tan(theta) e),   e = direction / RMS(direction) of each sample

    A random e is nearly orthogonal to z in C h w dimensions, so the angle between z and z_theta is theta up
    to about a degree for one direction at (32, 16, 16), and theta on average. Our choice: the paper gives the
    angles 42.5 and 85, but not the formula (docs/deviations.md).

    Args:
        z: latents on the sphere, (B, C, h, w). Gradients flow to these.
        direction: standard normal draws, (B, C, h, w), constant. One draw serves every angle of a step: the
            perturbed latents then lie on one arc.
        angle_degrees: theta in degrees, in [0, 90); 0 returns z.
        per: axes of the mean square in the sphere norm, see `to_sphere`.

    Returns:
        z_theta, (B, C, h, w), on the sphere, float32.

    Raises:
        ValueError: z and direction differ in shape, or the angle is out of range.
    """
    if z.shape != direction.shape:
        raise ValueError(
            f"z and direction must have one shape, got {tuple(z.shape)} and {tuple(direction.shape)}"
        )
    if not 0 <= angle_degrees < 90:
        raise ValueError(f"angle_degrees must lie in [0, 90), got {angle_degrees}")
    e = direction.detach().float()
    e = e * torch.rsqrt(e.square().mean(dim=(1, 2, 3), keepdim=True))
    return to_sphere(z.float() + math.tan(math.radians(angle_degrees)) * e, per)


def reached_angle(z: Tensor, moved: Tensor) -> Tensor:
    """Angle between latents and perturbed latents in degrees, mean over the batch; no gradient.

    Args:
        z: latents, (B, C, h, w).
        moved: the result of `perturb`, (B, C, h, w).

    Returns:
        Scalar in [0, 180], of the flattened latents.
    """
    cosine = F.cosine_similarity(z.detach().double().flatten(1), moved.detach().double().flatten(1))
    return torch.rad2deg(torch.acos(cosine.clamp(-1, 1))).mean().float()


def compared_pairs(design: Design) -> tuple[tuple[str, str], ...]:
    """The decodes that MCR compares, as (farther, nearer): r anchor, m medium, l large angle (Table 7).

        none      nothing
        small     x_m with sg(x_r)
        large     x_l with sg(x_r)
        cascaded  x_m with sg(x_r), and x_l with sg(x_m): the paper's, Eq. 4

    Only the farther ones need decodes beside the reconstruction x_r.

    Raises:
        ValueError: unknown design.
    """
    if design not in _PAIRS:
        raise ValueError(f"design must be one of {', '.join(map(repr, _PAIRS))}, got {design!r}")
    return _PAIRS[design]


def consistency(
    farther: Tensor,
    nearer: Tensor,
    farther_features: Sequence[Tensor],
    nearer_features: Sequence[Tensor],
    distance: Distance,
) -> Tensor:
    """One term of MCR, which `terms.image_terms` adds (Eq. 4): pull a farther decode to a nearer one.

        L = |x_a - sg(x_b)|_1 + LPIPS(x_a, sg(x_b))

    The caller computes the features, so that each image passes the perceptual network once a step.

    Args:
        farther: x_a, decodes of the farther latents, (B, 3, H, W). Gradients flow to these.
        nearer: x_b, (B, 3, H, W). Treated as a constant.
        farther_features: perceptual features of x_a, one map per stage. Gradients flow to these.
        nearer_features: perceptual features of x_b. Treated as constants.
        distance: (features, features) -> (B,), such as `LPIPS.distance`.

    Returns:
        Scalar >= 0, mean over pixels and batch; 0 where the decodes agree.

    Raises:
        ValueError: the decodes differ in shape.
    """
    if farther.shape != nearer.shape:
        raise ValueError(f"decodes must have one shape, got {tuple(farther.shape)} and {tuple(nearer.shape)}")
    pixels = F.l1_loss(farther.float(), nearer.detach().float())
    constant = [feature.detach() for feature in nearer_features]
    return pixels + distance(farther_features, constant).float().mean()


def discriminator_hinge(real: Tensor, fake: Tensor) -> Tensor:
    """Hinge loss of the discriminator: real logits above 1, fake ones below -1 (Lim & Ye, arXiv:1705.02894).

        L = mean max(0, 1 - D(x)) + mean max(0, 1 + D(x_r))

    Args:
        real: logits of images, (B, ...). Gradients flow to the discriminator.
        fake: logits of detached decodes, (B, ...). Gradients flow to the discriminator.

    Returns:
        Scalar >= 0; 2 for logits of 0.
    """
    return (1 - real.float()).relu().mean() + (1 + fake.float()).relu().mean()


def generator_hinge(fake: Tensor) -> Tensor:
    """Adversarial loss of the autoencoder beside `discriminator_hinge`: L = -mean D(x_r), unbounded.

    Args:
        fake: logits of decodes, (B, ...). Gradients flow through the discriminator to the decodes. Freeze
            the discriminator, else its next step adds these gradients.
    """
    return -fake.float().mean()


def adaptive_weight(reconstruction: Tensor, adversarial: Tensor) -> Tensor:
    """Weight that equalises the gradient norms of adversarial loss and reconstruction (arXiv:2012.09841).

        lambda = clamp(||d L_recon / d W|| / (||d L_adv / d W|| + 1e-4), 0, 1e4)

    W is the last layer of the decoder. The weight is that of one device batch, so k device batches are not
    exactly one batch of k times the size.

    Args:
        reconstruction: gradient of L1 + LPIPS at W, any shape. Treated as a constant.
        adversarial: gradient of the adversarial loss at W. Treated as a constant.

    Returns:
        Scalar in [0, 1e4], without gradient.
    """
    numerator = torch.linalg.vector_norm(reconstruction.detach().float())
    denominator = torch.linalg.vector_norm(adversarial.detach().float()) + 1e-4
    weight: Tensor = (numerator / denominator).clamp(0, 1e4)
    return weight


def kl_penalty(z: Tensor) -> Tensor:
    """KL divergence of the latent's channels from the standard normal, in nats per image (Table 3a).

        L = h w sum_c KL(N(m_c, s_c^2) || N(0, 1)) = h w sum_c (m_c^2 + s_c^2 - 1 - ln s_c^2) / 2

    with mean m_c and variance s_c^2 of channel c over the tokens of the batch. Our choice: the paper gives
    only "KL, 1e-6". A VAE's penalty needs a predicted variance, but this encoder is deterministic. Its mean
    term z^2 / 2 is constant on the sphere, and before the sphere norm it changes only a scale that the norm
    removes. This penalty makes the values of all tokens standard normal: centred channels of equal variance.
    Latent diffusion's weight 1e-6 is meant for the sum over the C h w values.

    Args:
        z: latents on the sphere, (B, C, h, w). Gradients flow to these. The moments are of this device batch.

    Returns:
        Scalar >= 0; 0 where every channel has mean 0 and variance 1. A constant channel counts as
        one of variance 1e-6.
    """
    z = z.float()
    variance, mean = torch.var_mean(z, dim=(0, 2, 3), correction=0)
    per_channel = (mean.square() + variance - 1 - variance.clamp_min(1e-6).log()) / 2
    return z[0, 0].numel() * per_channel.sum()


def denoising_loss(z: Tensor, noise: Tensor, t: Tensor, denoiser: Velocity) -> Tensor:
    """Diffusion loss of a small network on the latent (Table 3a).

        L = mean (v(x_t, t) - (z - e))^2,   x_t = t z + (1 - t) e

    Denoiser and autoencoder minimise it jointly: the gradient flows into the latent through the noisy input
    and through the target. The sphere prevents a shrinking latent. Our choice: the paper gives neither the
    network nor the path; this uses the generator's path (flow.py) and `LatentDenoiser`.

    Args:
        z: latents, (B, C, h, w). Gradients flow to these.
        noise: e, standard normal draws, (B, C, h, w), constant.
        t: positions, (B,), in [0, 1]; 0 is noise, 1 is data.
        denoiser: v, (x_t, t) -> (B, C, h, w). Gradients flow to its weights.

    Returns:
        Scalar >= 0; 2 for a velocity of 0 on latents of unit mean square.

    Raises:
        ValueError: z and noise differ in shape.
    """
    if z.shape != noise.shape:
        raise ValueError(f"z and noise must have one shape, got {tuple(z.shape)} and {tuple(noise.shape)}")
    z, noise = z.float(), noise.detach().float()
    velocity = denoiser(interpolate(z, noise, t), t)
    return F.mse_loss(velocity.float(), z - noise)


def feature_reconstruction(reconstructed: Tensor, features: Tensor) -> Tensor:
    """Reconstruction of the VFM's features from the refined target (Sec. 3.3).

        L = mean (H^ - H_vfm)^2

    The other term of L_refine is `gram_alignment(Z_T, H_ref)`.

    Args:
        reconstructed: H^ = Q_t(Z_T), (B, N, D). Gradients flow to these.
        features: H_vfm, (B, N, D). Treated as a constant.

    Returns:
        Scalar >= 0; 1 for H^ = 0, as tokens of H_vfm have unit variance.

    Raises:
        ValueError: the two differ in shape.
    """
    if reconstructed.shape != features.shape:
        raise ValueError(
            f"features must have one shape, got {tuple(reconstructed.shape)} and {tuple(features.shape)}"
        )
    return F.mse_loss(reconstructed.float(), features.detach().float())
