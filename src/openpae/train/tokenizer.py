"""Stage (b): train the tokenizer on images, with the whole objective of the paper (Eq. 2-6)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from openpae.checkpoint import encoder_fingerprint, load_prior, write_tokenizer
from openpae.critics import PerceptualNet, load_perceptual
from openpae.data.caches import Progress, cache_features, cache_targets
from openpae.data.images import ImageSource, open_images
from openpae.data.order import StepBatches, loader
from openpae.data.training import ImageBatch, ImageData, TrainingImages, sound
from openpae.discriminator import (
    AUGMENT_DRAWS,
    DiscriminatorConfig,
    LatentDenoiser,
    build_discriminator,
    diff_augment,
    frozen,
)
from openpae.encoders import Encoder, encoder_architecture, load_encoder
from openpae.eval.records import evaluate_reconstruction, write_evaluation
from openpae.eval.streams import real_images
from openpae.folders import identity_of
from openpae.layers import to_tokens
from openpae.losses import (
    adaptive_weight,
    compared_pairs,
    consistency,
    denoising_loss,
    discriminator_hinge,
    generator_hinge,
    gram_alignment,
    kl_penalty,
    perturb,
    reached_angle,
    semantic_alignment,
)
from openpae.tokenizer import PAE, PAEConfig
from openpae.train.engine import check_run, fit, open_run
from openpae.train.settings import LoopConfig, OptimConfig, adamw, pick_device
from openpae.train.task import Draws, Update


@dataclass(frozen=True, kw_only=True)
class TokenizerLoss:
    """Weights of the tokenizer's losses (Eq. 2, 6); 0 switches a term off and saves its cost. L1 has weight
    1."""

    lpips: float = 1.0
    """Perceptual distance of reconstruction and image."""
    lpips_net: PerceptualNet = "vgg"
    """Its network: vgg as in the paper; alex costs a CPU 25 times less; random needs no weights (for
    trials)."""
    lpips_share: float = 1.0
    """Share of each device batch that LPIPS looks at, in (0, 1]. Less leaves the expected loss as it is and
    saves most of the cost on a CPU."""
    gan: float = 0.5
    """Adversarial loss."""
    gan_weight: Literal["fixed", "adaptive"] = "fixed"
    """adaptive multiplies it by the ratio of gradient norms at the decoder's last layer (VQGAN)."""
    gan_start: float = 0.5
    """Share of the training after which the autoencoder feels the discriminator."""
    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)
    """The network that judges."""
    discriminator_start: float = 0.37
    """Share of the training after which the discriminator learns."""
    ssr: float = 0.2
    """Spatial structure: Gram matrix of the tokens of one image (Eq. 3). Needs a prior."""
    mcr: float = 0.5
    """Manifold continuity: decodes of perturbed latents (Eq. 4)."""
    mcr_design: Literal["small", "large", "cascaded"] = "cascaded"
    """Which decodes are compared (Table 7); for none set mcr to 0."""
    mcr_angles: tuple[float, float] = (42.5, 85.0)
    """Medium and large angle of the perturbation in degrees."""
    mcr_start: float = 0.0
    """Share of the training after which MCR counts; 0 as in the paper. In a run of minutes a decoder that is
    asked for continuity before it can see settles on one grey image (docs/log.md)."""
    mcr_share: float = 1.0
    """Share of each device batch that is perturbed, in (0, 1]; as `lpips_share`, for a CPU."""
    scr: float = 1.0
    """Semantic consistency: pooled latent and tokens (Eq. 5). Needs a prior."""
    scr_tokens: Literal["pooled", "tokens", "both"] = "both"
    """What it compares (Table 3c)."""
    kl: float = 0.0
    """Generic regulariser of Table 3(a); there 1e-6."""
    diffusion: float = 0.0
    """Generic regulariser of Table 3(a): a small denoiser trained jointly on the latent."""
    gradients_every: int = 0
    """Steps between logs of each term's gradient norm at the latent, in shares of their sum; 0 logs none."""

    def __post_init__(self) -> None:
        for name in ("lpips", "gan", "ssr", "mcr", "scr", "kl", "diffusion"):
            if (weight := getattr(self, name)) < 0:
                raise ValueError(f"loss.{name} must be >= 0 (0 switches it off), got {weight}")
        for name in ("gan_start", "discriminator_start", "mcr_start"):
            if not 0 <= (share := getattr(self, name)) <= 1:
                raise ValueError(f"loss.{name} must lie in [0, 1], got {share}")
        if self.gan_start < self.discriminator_start:
            raise ValueError(
                f"loss.gan_start must not come before discriminator_start = {self.discriminator_start}, "
                f"got {self.gan_start}: the autoencoder would be judged by random weights"
            )
        for name in ("lpips_share", "mcr_share"):
            if not 0 < (share := getattr(self, name)) <= 1:
                raise ValueError(f"loss.{name} must lie in (0, 1], got {share}")
        medium, large = self.mcr_angles
        if not 0 < medium < large < 90:
            raise ValueError(f"loss.mcr_angles must be 0 < medium < large < 90, got {self.mcr_angles}")
        if self.gradients_every < 0:
            raise ValueError(f"loss.gradients_every must be >= 0 (0 logs none), got {self.gradients_every}")

    @property
    def needs_prior(self) -> bool:
        """Whether a term compares the latent with refined targets."""
        return self.ssr > 0 or self.scr > 0


@dataclass(frozen=True, kw_only=True)
class TokenizerRun:
    """One training run of a tokenizer."""

    model: PAEConfig = field(default_factory=PAEConfig)
    """The tokenizer."""
    prior: Path | None = None
    """The refined targets of SSR and SCR: a refiner folder or a run folder of pae train-refiner."""
    data: ImageData
    """Its images."""
    loss: TokenizerLoss = field(default_factory=TokenizerLoss)
    """What it is trained for."""
    optim: OptimConfig
    """How it is trained."""
    loop: LoopConfig
    """How long it is trained."""

    def __post_init__(self) -> None:
        if self.data.feature_cache is not None and self.model.fusion == "finetune":
            raise ValueError("data.feature_cache can not serve model.fusion finetune: the features change")
        if self.loss.needs_prior and self.prior is None:
            raise ValueError(
                "loss.ssr and loss.scr need prior, the folder of a refiner; train one with pae "
                "train-refiner, "
                "or set both to 0"
            )
        if self.loop.compile and (self.loss.gradients_every or self.loss.gan_weight == "adaptive"):
            raise ValueError(
                "loop.compile can not be combined with loss.gradients_every or loss.gan_weight adaptive: "
                "both run "
                "backward twice, and a compiled graph gives its buffers away after the first"
            )
        if self.loss.needs_prior and self.model.fusion == "finetune":
            raise ValueError(
                "loss.ssr and loss.scr need a frozen VFM; model.fusion finetune moves its features"
            )


class TokenizerTask:
    """L1 + LPIPS + GAN + SSR + MCR + SCR, the weights of the config before each.

    Args:
        run: the config.
        encoder: the frozen VFM, or None to load the one that the config names.
        progress: called with (done, all) while features are cached.

    Raises:
        ValueError: the prior was made from another encoder, or has other channels than the latent.
    """

    def __init__(
        self, run: TokenizerRun, encoder: Encoder | None = None, progress: Progress | None = None
    ) -> None:
        self.run = run
        self.device = pick_device(run.loop.device)
        source = open_images(run.data.images)
        torch.manual_seed(run.loop.seed)
        trainable = run.model.fusion == "finetune"
        encoder = encoder or load_encoder(run.model.encoder, run.model.encoder_source, trainable=trainable)
        self.model = PAE(run.model, encoder).to(self.device)
        # Before training: a finetuned encoder is told by what it started from.
        self.encoder_print = encoder_fingerprint(encoder)
        self.inputs: Mapping[str, str] = {"images": source.fingerprint(), "encoder": self.encoder_print}
        self.prior = self._load_prior()
        self.images = self._training_images(source, progress)
        loss, steps = run.loss, run.loop.steps
        self.lpips = load_perceptual(loss.lpips_net).to(self.device) if loss.lpips or loss.mcr else None
        self.discriminator_from = math.ceil(loss.discriminator_start * steps)
        self.mcr_from = math.ceil(loss.mcr_start * steps)
        self.gan_from = math.ceil(loss.gan_start * steps)
        self.run_dir: Path | None = None
        """Where the records of evaluations go; None keeps none."""
        self.judged = None if run.data.evaluation is None else open_images(run.data.evaluation)
        self.players, self.optimizers = self._players()
        if run.loop.compile:
            self.model.decoder.compile()
            if self.model.modulator is not None:
                self.model.modulator.compile()

    def batches(self, steps: range) -> Iterable[ImageBatch]:
        """Device batches of images, in the order of (seed, images seen)."""
        loop = self.run.loop
        sampler = StepBatches(steps, loop.global_batch_size, loop.device_batch_size or loop.global_batch_size)
        return sound(loader(self.images, sampler, loop.num_workers, pin=self.device.type == "cuda"))

    def updates(self, batch: ImageBatch, draws: Draws, step: int) -> Iterator[Update]:
        """Autoencoder, then discriminator; one decode of all latents serves both.

        L = L1 + w LPIPS + w GAN + w SSR + w MCR + w SCR + w KL + w diffusion
        """
        for broken in batch.skipped:
            warnings.warn(f"{broken}; another image takes its place", stacklevel=2)
        x = batch.images.float() / 255
        features = batch.features
        if features is None and self.prior is not None:
            features = self.model.features(x)  # once, for the encoder's path and for the prior
        z, decoded, logs = self._decode(x, features, draws, step)
        terms = self._image_terms(x, decoded) | self._latent_terms(z, features, batch.prior, draws)
        weights = self._weights()
        augment = draws.uniform("augment", AUGMENT_DRAWS) if self.discriminator is not None else x
        if self.discriminator is not None and step >= self.gan_from:
            with frozen(self.discriminator):  # or its own update would start from these gradients
                terms["gan"] = generator_hinge(self.discriminator(diff_augment(decoded["r"], augment)))
            if self.run.loss.gan_weight == "adaptive":
                logs["gan_weight"] = weights["gan"] = weights["gan"] * self._adaptive_weight(terms, weights)
        every = self.run.loss.gradients_every
        if every and step % every == 0:
            logs |= _gradient_shares(terms, weights, z)
        loss = torch.stack([weights[name] * term for name, term in terms.items()]).sum()
        yield Update("autoencoder", loss, {name: term.detach() for name, term in terms.items()} | logs)

        if self.discriminator is not None and step >= self.discriminator_from:
            real = self.discriminator(diff_augment(x, augment))
            fake = self.discriminator(diff_augment(decoded["r"].detach(), augment))
            accuracy = ((real > 0).float().mean() + (fake < 0).float().mean()) / 2
            yield Update("discriminator", discriminator_hinge(real, fake), {"accuracy": accuracy.detach()})

    def evaluate(self, step: int) -> dict[str, float]:
        """PSNR (dB), SSIM and LPIPS of held-out images, by the function that `pae evaluate` calls."""
        if self.judged is None:
            return {}
        part = self.run.loop.device_batch_size or self.run.loop.global_batch_size
        count = min(len(self.judged), self.run.data.evaluation_images)
        images = real_images(self.judged, self.run.model.image_size, rows=range(count))
        record = evaluate_reconstruction(
            self.model,
            images,
            extractor=None,
            lpips=self.lpips,
            batch_size=part,
            facts={"lpips": f"lpips-{self.run.loss.lpips_net}"} if self.lpips is not None else None,
        )
        if self.run_dir is not None:
            write_evaluation(record, self.run_dir, step)
        return {name: metric["value"] for name, metric in record["metrics"].items()}

    def write(self, folder: Path, weights: Mapping[str, Tensor]) -> None:
        """Write a tokenizer folder."""
        architecture = encoder_architecture(self.model.encoder)
        write_tokenizer(folder, weights, self.run.model, self.encoder_print, architecture)

    def _decode(
        self, x: Tensor, features: Tensor | None, draws: Draws, step: int
    ) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        """Latents, their decodes r, m, l as far as the design needs them (one batch), and the angles
        reached."""
        loss = self.run.loss
        due = loss.mcr > 0 and step >= self.mcr_from
        wanted = [farther for farther, _ in compared_pairs(loss.mcr_design)] if due else []
        angles = dict(zip("ml", loss.mcr_angles, strict=True))
        logs: dict[str, Tensor] = {}

        def further(z: Tensor) -> list[Tensor]:
            if not wanted:
                return []
            # One direction a sample for every angle: the perturbed latents lie on one arc.
            z = z[: math.ceil(loss.mcr_share * len(z))]
            direction = draws.normal("mcr direction", *z.shape[1:])[: len(z)]
            moved = {name: perturb(z, direction, angles[name], self.run.model.sphere) for name in wanted}
            logs.update({f"angle_{name}": reached_angle(z, latent) for name, latent in moved.items()})
            return list(moved.values())

        z, decodes = self.model(x, features, further)
        return z, dict(zip(["r", *wanted], decodes, strict=True)), logs

    def _image_terms(self, x: Tensor, decoded: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """L1, LPIPS and MCR; each image passes the perceptual network once, the decodes as one batch."""
        terms = {"l1": F.l1_loss(decoded["r"], x)}
        if self.lpips is None:
            return terms
        seen = math.ceil(self.run.loss.lpips_share * len(x))
        shown = {name: images[:seen] for name, images in decoded.items()}
        sizes = [len(images) for images in shown.values()]
        maps = [torch.split(stage, sizes) for stage in self.lpips.features(torch.cat(list(shown.values())))]
        perceived = {name: [stage[i] for stage in maps] for i, name in enumerate(shown)}
        if self.run.loss.lpips:
            with torch.no_grad():
                target = self.lpips.features(x[:seen])
            terms["lpips"] = self.lpips.distance(perceived["r"], target).mean()
        if len(decoded) > 1:
            brackets = []
            for a, b in compared_pairs(self.run.loss.mcr_design):
                nearer = [stage[: len(shown[a])] for stage in perceived[b]]
                pixels = decoded[b][: len(decoded[a])]
                brackets.append(consistency(decoded[a], pixels, perceived[a], nearer, self.lpips.distance))
            terms["mcr"] = torch.stack(brackets).sum()
        return terms

    def _latent_terms(
        self, z: Tensor, features: Tensor | None, prior: Tensor | None, draws: Draws
    ) -> dict[str, Tensor]:
        """SSR and SCR against the prior, and the generic regularisers."""
        loss, terms = self.run.loss, {}
        if self.prior is not None:
            assert features is not None
            target = self.prior(features) if prior is None else prior
            if loss.ssr:
                terms["ssr"] = gram_alignment(to_tokens(z), target)
            if loss.scr:
                terms["scr"] = semantic_alignment(to_tokens(z), target, loss.scr_tokens)
        if loss.kl:
            terms["kl"] = kl_penalty(z)
        if self.denoiser is not None:
            noise, t = draws.normal("denoiser noise", *z.shape[1:]), draws.uniform("denoiser t")
            terms["diffusion"] = denoising_loss(z, noise, t, self.denoiser)
        return terms

    def _weights(self) -> dict[str, float | Tensor]:
        w = self.run.loss
        return {
            "l1": 1.0,
            "lpips": w.lpips,
            "gan": w.gan,
            "ssr": w.ssr,
            "mcr": w.mcr,
            "scr": w.scr,
            "kl": w.kl,
            "diffusion": w.diffusion,
        }

    def _adaptive_weight(self, terms: Mapping[str, Tensor], weights: Mapping[str, float | Tensor]) -> Tensor:
        last = self.model.decoder.to_pixels.weight
        wanted = torch.stack([weights[name] * terms[name] for name in ("l1", "lpips") if name in terms]).sum()
        given = terms["gan"]
        pulls = [torch.autograd.grad(term, last, retain_graph=True)[0] for term in (wanted, given)]
        return adaptive_weight(pulls[0], pulls[1])

    def _players(self) -> tuple[dict[str, nn.Module], dict[str, Optimizer]]:
        run = self.run
        # The denoiser learns in the autoencoder's step; it is a player only so that a checkpoint holds it.
        self.denoiser = LatentDenoiser(run.model.latent_dim).to(self.device) if run.loss.diffusion else None
        self.discriminator = (
            build_discriminator(run.loss.discriminator).to(self.device) if run.loss.gan else None
        )
        players: dict[str, nn.Module] = {"autoencoder": self.model}
        joint: Sequence[nn.Parameter] = self.model.trained_parameters()
        if self.denoiser is not None:
            players["denoiser"] = self.denoiser
            joint = [*joint, *self.denoiser.parameters()]
        optimizers = {"autoencoder": adamw(joint, run.optim)}
        if self.discriminator is not None:
            players["discriminator"] = self.discriminator
            optimizers["discriminator"] = adamw(self.discriminator, run.optim)
        return players, optimizers

    def _load_prior(self) -> nn.Module | None:
        run = self.run
        if not run.loss.needs_prior or run.prior is None:
            return None
        prior, identity = load_prior(run.prior), identity_of(run.prior)
        if identity.made_with != self.encoder_print:
            raise ValueError(
                f"{run.prior} refines features of the encoder {identity.made_with}, but model.encoder is "
                f"{self.encoder_print}; train a refiner for this encoder"
            )
        if prior.latent_dim != run.model.latent_dim:
            raise ValueError(
                f"{run.prior} has {prior.latent_dim} channels, model.latent_dim is {run.model.latent_dim}"
            )
        self.inputs = {**self.inputs, "prior": identity.fingerprint}
        return prior.to(self.device)

    def _training_images(self, source: ImageSource, progress: Progress | None) -> TrainingImages:
        run, folder = self.run, self.run.data.feature_cache
        features = targets = None
        if folder is not None:
            flips = run.data.augment == "flip"
            features = cache_features(
                self.model.features,
                source,
                folder,
                image_size=run.model.image_shape,
                shape=(math.prod(run.model.grid_shape), self.model.spec.dim),
                encoder_print=self.encoder_print,
                flips=flips,
                device=self.device,
                progress=progress,
            )
            if self.prior is not None:
                name = f"{folder.name}-{self.inputs['prior']}"
                targets = cache_targets(
                    self.prior,
                    features,
                    folder.with_name(name),
                    prior_print=self.inputs["prior"],
                    latent_dim=run.model.latent_dim,
                    device=self.device,
                )
        return TrainingImages(
            source,
            size=run.model.image_shape,
            seed=run.loop.seed,
            augment=run.data.augment,
            resize=run.data.resize,
            skip_broken=run.data.skip_broken,
            features=features,
            targets=targets,
        )


def train_tokenizer(
    run: TokenizerRun, run_dir: Path, *, quiet: bool = False, progress: Progress | None = None
) -> dict[str, float]:
    """Train a tokenizer, or go on where an interrupted run of the same folder stopped.

    Args:
        run: the config; run_dir keeps it and refuses another.
        run_dir: gets config.yaml, checkpoints/, log.jsonl and TensorBoard files.
        quiet: no progress bar.
        progress: called with (done, all) while features are cached.

    Returns:
        The last evaluation.
    """
    check_run(run_dir, run)
    task = TokenizerTask(run, progress=progress)
    task.run_dir = run_dir
    open_run(run_dir, run)
    return fit(task, run_dir, run.optim, run.loop, quiet=quiet)


def _gradient_shares(
    terms: Mapping[str, Tensor], weights: Mapping[str, float | Tensor], z: Tensor
) -> dict[str, Tensor]:
    """Norm of each weighted term's gradient at the latent, divided by the sum of these norms."""
    norms = {
        name: torch.linalg.vector_norm(torch.autograd.grad(weights[name] * term, z, retain_graph=True)[0])
        for name, term in terms.items()
    }
    total = torch.stack(list(norms.values())).sum()
    return {f"gradient_share_{name}": norm / total for name, norm in norms.items()}
