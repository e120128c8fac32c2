"""Stage (b): train the tokenizer on images with the full objective of the paper (Eq. 2-6)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.optim import Optimizer

from openpae.data.caches import Progress, cache_features, cache_targets
from openpae.data.images import ImageSource, Subset, spread
from openpae.data.order import StepBatches
from openpae.data.pixels import image_grid, to_unit
from openpae.data.training import (
    ImageBatch,
    TrainingImages,
    broken_count,
    image_batches,
    open_training,
    raise_on_broken,
)
from openpae.engine.loop import fit
from openpae.engine.optim import adamw, device_batches
from openpae.engine.parallel import distribute, unwrap
from openpae.engine.run_folder import check_run, continued, open_run
from openpae.engine.task import PICTURED, Update
from openpae.eval.evaluate import evaluate_reconstruction, metric_facts, write_evaluation
from openpae.eval.extractors import FeatureExtractor, load_extractor
from openpae.eval.image_stream import real_images, source_batches
from openpae.geometry.measure import measure_tokenizer
from openpae.geometry.settings import MeasureConfig
from openpae.interop.spaces import pae_space
from openpae.models.configs import PerceptualNet
from openpae.models.denoiser import LatentDenoiser
from openpae.models.discriminator import (
    AUGMENT_DRAWS,
    build_discriminator,
    diff_augment,
    frozen,
    norms_once,
)
from openpae.models.encoders import Encoder, encoder_architecture, encoder_fingerprint, load_encoder
from openpae.models.layers import to_tokens
from openpae.models.lpips import LPIPS
from openpae.models.lpips_weights import load_perceptual
from openpae.models.saved import load_prior, write_tokenizer
from openpae.models.starts import start_from_patches, start_local
from openpae.models.tokenizer import tokenizer_class
from openpae.objective.losses import (
    compared_pairs,
    discriminator_hinge,
    generator_hinge,
    perturb,
    reached_angle,
)
from openpae.objective.rivals import mixtures, vfm_alignment
from openpae.objective.terms import (
    BALANCED,
    balance_gan,
    generic_terms,
    gradient_shares,
    image_terms,
    latent_noise,
    prior_terms,
)
from openpae.runtime import processes
from openpae.runtime.device import pick_device
from openpae.runtime.draws import Draws
from openpae.storage.model_folder import Parent, identity_of, write_parent
from openpae.train.given import freeze_rest, kept_encoder, start_tokenizer
from openpae.train.settings import TokenizerRun

_START_IMAGES = 256
"""Number of images for `start_from_patches`, the first of the training."""


class TokenizerTask:
    """The sum of the terms that the config gives a weight, see `updates`.

    Args:
        run: the config.
        encoder: the VFM; None loads the one of the config.
        progress: called with (done, all) while features are cached.

    Raises:
        ValueError: the prior was made from another encoder, or has other channels than the latent.
    """

    def __init__(
        self, run: TokenizerRun, encoder: Encoder | None = None, progress: Progress | None = None
    ) -> None:
        self.run = run
        self.device = pick_device(run.loop.device, "loop.device")
        source, self.held_out = open_training(run.data)
        torch.manual_seed(run.loop.seed)
        trainable = run.model.fusion == "finetune"
        kept = None if run.init_from is None else kept_encoder(run.init_from, run.model)
        encoder = (
            encoder or kept or load_encoder(run.model.encoder, run.model.encoder_source, trainable=trainable)
        )
        self.model = tokenizer_class(run.model)(run.model, encoder)
        self.model.decoder.checkpoint_blocks = run.checkpoint_blocks
        if run.start == "local":
            start_local(self.model)
        self.model.keeps_encoder |= kept is not None
        self.model.to(self.device)
        # Before training: the fingerprint of a finetuned encoder is that of its initial weights.
        self.encoder_fingerprint = encoder_fingerprint(encoder)
        self.inputs: Mapping[str, str] = {"images": source.fingerprint(), "encoder": self.encoder_fingerprint}
        self.parent: Parent | None = None
        """The model from whose weights the run starts."""
        if run.init_from is not None:
            parent = start_tokenizer(self.model, run.init_from, run.init_new, self.encoder_fingerprint)
            self.parent = replace(parent, trained=run.train)
            self.inputs = {**self.inputs, "init_from": parent.fingerprint}
            freeze_rest(self.model, run.train)
        self.prior = self._load_prior()
        self.images = self._training_images(source, progress)
        if run.start == "patches":
            (first,) = raise_on_broken([self.images.__getitems__(list(range(_START_IMAGES)))])
            features = None if first.features is None else first.features.to(self.device)
            start_from_patches(self.model, to_unit(first.images.to(self.device)), features)
        loss, steps = run.loss, run.loop.schedule_steps
        perceptual = loss.lpips > 0 or loss.mcr > 0 or loss.mix > 0
        self.lpips = self._perceptual(loss.lpips_net) if perceptual else None
        self.late_lpips = (
            self._perceptual(loss.lpips_late_net) if perceptual and loss.lpips_late_net else None
        )
        self.late_from = math.ceil(loss.lpips_late_start * steps)
        self.discriminator_from = math.ceil(loss.discriminator_start * steps)
        self.mcr_from = math.ceil(loss.mcr_start * steps)
        self.gan_from = math.ceil(loss.gan_start * steps)
        self.extractor: FeatureExtractor | None = None
        if run.extractor is not None:
            self.extractor = load_extractor(run.extractor, run.extractor_weights, self.device)
        self.run_dir: Path | None = None
        """Folder for the records of evaluations; None writes none."""
        self.players, self.optimizers = self._players()
        if run.loop.compile:
            for name, part in unwrap(self.players["autoencoder"]).named_children():
                if name in ("decoder", "modulator"):  # RAE has no modulator
                    part.compile()

    def batches(self, steps: Sequence[int]) -> Iterable[ImageBatch]:
        """This rank's device batches of images, in the order of (seed, images seen)."""
        loop = self.run.loop
        sampler = StepBatches(steps, loop.global_batch_size, device_batches(loop))
        return image_batches(self.images, sampler, loop.num_workers, pin=self.device.type == "cuda")

    def updates(self, batch: ImageBatch, draws: Draws, step: int) -> Iterator[Update]:
        """Autoencoder, then discriminator; one decode of all latents serves both.

        L = L1 + w LPIPS + w GAN + w SSR + w MCR + w SCR + w mix + w va + w KL + w diffusion
        """
        with norms_once(self.discriminator):  # both players use the same weights of it
            yield from self._updates(batch, draws, step)

    def _updates(self, batch: ImageBatch, draws: Draws, step: int) -> Iterator[Update]:
        x = to_unit(batch.images)
        features = batch.features
        if features is None and (self.prior is not None or self.projection is not None):
            features = self.model.features(x)  # once, for the encoder's path and for the targets
        mixed = self._mixed(draws, len(x))
        z, decoded, logs = self._decode(x, features, draws, step, mixed)
        progress = min(1.0, step / self.run.loop.schedule_steps)
        shift = draws.integers("lpips shift", self.run.loss.lpips_shift + 1, 2)
        late = self.late_lpips is not None and step >= self.late_from
        lpips = self.late_lpips if late else self.lpips
        terms = image_terms(x, decoded, lpips, self.run.loss, shift, mixed)
        if self.prior is not None:
            assert features is not None  # made above, or cached
            target = self.prior(features) if batch.prior is None else batch.prior
            terms |= prior_terms(z, target, self.run.loss)
        if self.projection is not None:
            assert features is not None  # made above, or cached
            margins = self.run.loss.va_margins
            terms["va"] = vfm_alignment(to_tokens(z), features, self.players["projection"], margins)
        terms |= generic_terms(z, self.players.get("denoiser"), draws, self.run.loss)
        weights, shown = self.run.loss.weights_at(progress), None
        augment = draws.uniform("augment", AUGMENT_DRAWS) if self.discriminator is not None else x
        if self.discriminator is not None and step >= self.gan_from:
            with frozen(self.discriminator):  # else its own update would add these gradients
                shown = self.discriminator.features(diff_augment(decoded["r"], augment))
                terms["gan"] = generator_hinge(self.discriminator(shown))
        every = self.run.loss.gradients_every
        due = every > 0 and draws.step % every == 0
        joint: list[Tensor] = []
        if "gan" in terms and self.run.loss.gan_weight == "adaptive":
            # From the called module: the weights of a sharded one are full at this point.
            last = unwrap(self.players["autoencoder"]).get_parameter("decoder.to_pixels.weight")
            logs["gan_weight"], known = balance_gan(terms, weights, decoded, last, keep_graph=due)
            joint, weights["gan"] = [known], logs["gan_weight"]
        if due:
            logs |= gradient_shares(terms, weights, z)
        single = [name for name in terms if not joint or name not in BALANCED]
        loss = torch.stack([*joint, *(weights[name] * terms[name] for name in single)]).sum()
        logs |= {name: term.detach() for name, term in terms.items()}
        yield Update("autoencoder", loss, logs, broken_count(batch, self.run.data))

        if self.discriminator is not None and step >= self.discriminator_from:
            if shown is None:
                shown = self.discriminator.features(diff_augment(decoded["r"].detach(), augment))
            pairs = zip(self.discriminator.features(diff_augment(x, augment)), shown, strict=True)
            # One pass for both, so that ranks average its gradients once.
            both = [torch.cat([real, fake.detach()]) for real, fake in pairs]
            real, fake = self.players["discriminator"](both).chunk(2)
            accuracy = ((real > 0).float().mean() + (fake < 0).float().mean()) / 2
            yield Update("discriminator", discriminator_hinge(real, fake), {"accuracy": accuracy.detach()})

    def evaluate(self, step: int) -> dict[str, float]:
        """PSNR (dB), SSIM, LPIPS and optionally Frechet distance and geometry of held-out images, as in
        `pae evaluate`."""
        if self.held_out is None:
            return {}
        part, loss = len(device_batches(self.run.loop)[0]), self.run.loss
        rows = spread(len(self.held_out), self.run.data.evaluation_images)
        record = evaluate_reconstruction(
            self.model,
            real_images(self.held_out, self.run.model.image_shape, rows=rows),
            extractor=self.extractor,
            lpips=self.late_lpips or self.lpips,
            batch_size=part,
            min_samples=2,  # for a curve over steps, an equal count at every point is enough
            facts={"lpips": f"lpips-{loss.lpips_late_net or loss.lpips_net}"} if self.lpips else None,
        )
        if self.run.geometry:
            images = Subset(self.held_out, rows.tolist())
            record["metrics"] |= processes.on_rank0(lambda: self._geometry(images, part))
        if self.run_dir is not None:
            write_evaluation(record, self.run_dir, step)
        return {name: metric["value"] for name, metric in record["metrics"].items()}

    def picture(self) -> Image.Image | None:
        """Held-out images above their reconstructions; None without held-out images."""
        if self.held_out is None:
            return None
        rows = spread(len(self.held_out), min(PICTURED, self.run.data.evaluation_images))
        (x,) = source_batches(self.held_out, self.run.model.image_shape, len(rows), rows.tolist())
        again = self.model.decode(self.model.encode(x.to(self.device))).clamp(0, 1)
        return image_grid(torch.cat([x.to(again), again]), len(x))

    def _geometry(self, images: Subset, batch_size: int) -> dict[str, Any]:
        """GSQ, eRank and LPC of held-out images, as in `pae profile`."""
        config = MeasureConfig(count=len(images), lpc_count=-(-len(images) // 10), batch_size=batch_size)
        space, size = pae_space(self.model, "this tokenizer", ""), self.run.model.image_shape
        lpips = self.late_lpips or self.lpips
        metrics = measure_tokenizer(space, images, size=size, lpips=lpips, config=config).metrics
        return metric_facts({name: metrics[name] for name in ("lpc", "gsq", "erank") if name in metrics})

    def write(self, folder: Path, weights: Mapping[str, Tensor]) -> None:
        """Write a tokenizer folder."""
        architecture = encoder_architecture(self.model.encoder)
        keep, config = self.model.keeps_encoder, self.run.model
        write_tokenizer(folder, weights, config, self.encoder_fingerprint, architecture, keep_encoder=keep)
        if self.parent is not None:
            write_parent(folder, self.parent)

    def _perceptual(self, net: PerceptualNet) -> LPIPS:
        return load_perceptual(net, self.run.loss.lpips_weights).to(self.device)

    def _decode(
        self, x: Tensor, features: Tensor | None, draws: Draws, step: int, mixed: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        """Latents, the decodes r, m, l, mix that the terms need (in one batch), and the reached angles."""
        loss = self.run.loss
        due = loss.mcr > 0 and step >= self.mcr_from
        names = [farther for farther, _ in compared_pairs(loss.mcr_design)] if due else []
        angles = dict(zip("ml", loss.angles_at(step / self.run.loop.schedule_steps), strict=True))
        logs: dict[str, Tensor] = {}

        def extra_latents(z: Tensor) -> list[Tensor]:
            between = [] if mixed is None else [mixtures(z[: len(mixed)], mixed, self.run.model.sphere)]
            if not names:
                return between
            # One direction per sample for all angles: the perturbed latents lie on one arc.
            z = z[: math.ceil(loss.mcr_share * len(z))]
            direction = draws.normal("mcr direction", *z.shape[1:])[: len(z)]
            moved = {name: perturb(z, direction, angles[name], self.run.model.sphere) for name in names}
            logs.update({f"angle_{name}": reached_angle(z, latent) for name, latent in moved.items()})
            return [*moved.values(), *between]

        noise = latent_noise(draws, loss.latent_noise, self.run.model.latent_shape)
        z, decodes = self.players["autoencoder"](x, features, extra_latents, noise)
        shown = ["r", *names, *([] if mixed is None else ["mix"])]
        return z, dict(zip(shown, decodes, strict=True)), logs

    def _mixed(self, draws: Draws, count: int) -> Tensor | None:
        """Shares of the next image in the mixtures, in [0, 1/2); None without them."""
        loss = self.run.loss
        if not loss.mix:
            return None
        return draws.uniform("mix share")[: math.ceil(min(loss.mcr_share, loss.lpips_share) * count)] / 2

    def _players(self) -> tuple[dict[str, nn.Module], dict[str, Optimizer]]:
        run = self.run
        # The autoencoder's optimizer steps the denoiser; it is a player so that checkpoints hold it.
        self.denoiser = LatentDenoiser(run.model.latent_dim).to(self.device) if run.loss.diffusion else None
        self.projection: nn.Linear | None = None
        if run.loss.va:
            self.projection = nn.Linear(run.model.latent_dim, self.model.spec.dim, bias=False).to(self.device)
        self.discriminator = (
            build_discriminator(run.loss.discriminator).to(self.device) if run.loss.gan else None
        )
        finetuned = run.model.fusion == "finetune"  # a VFM has weights that the features do not use
        players = {"autoencoder": distribute(self.model, run.loop, some_unused=finetuned)}
        joint = [*players["autoencoder"].parameters()]
        if self.denoiser is not None:
            players["denoiser"] = distribute(self.denoiser, run.loop)
            joint += players["denoiser"].parameters()
        if self.projection is not None:
            players["projection"] = distribute(self.projection, run.loop)
            joint += players["projection"].parameters()
        optimizers = {"autoencoder": adamw(joint, run.optim)}
        if self.discriminator is not None:
            players["discriminator"] = distribute(self.discriminator, run.loop, small=True)
            optimizers["discriminator"] = adamw(players["discriminator"], run.optim)
        return players, optimizers

    def _load_prior(self) -> nn.Module | None:
        run = self.run
        if not run.loss.needs_prior or run.prior is None:
            return None
        prior, identity = load_prior(run.prior), identity_of(run.prior)
        if identity.made_with != self.encoder_fingerprint:
            raise ValueError(
                f"{run.prior} refines features of the encoder {identity.made_with}, but model.encoder is "
                f"{self.encoder_fingerprint}; train a refiner for this encoder"
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
                encoder_fingerprint=self.encoder_fingerprint,
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
                    prior_fingerprint=self.inputs["prior"],
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
    run: TokenizerRun,
    run_dir: Path,
    *,
    quiet: bool = False,
    progress: Progress | None = None,
    operations: float | None = None,
) -> dict[str, float]:
    """Train a tokenizer, or resume the run in run_dir. Returns the last evaluation.

    Args:
        run: the config; that of an existing run_dir, but for `run_folder.FREE_FIELDS` and more steps.
        run_dir: gets config.yaml, checkpoints/, log.jsonl, evaluations/ and the files of trackers.
        quiet, operations: see `fit`. progress: called with (done, all) while features are cached.
    """
    run = continued(run_dir, run)
    check_run(run_dir, run)
    task = TokenizerTask(run, progress=progress)
    task.run_dir = run_dir
    open_run(run_dir, run)
    return fit(task, run_dir, run.optim, run.loop, quiet=quiet, operations=operations)
