"""Three optimizer steps of a tokenizer with all its losses and both players, computed beside the engine."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from openpae.data.images import PackedImages
from openpae.data.settings import ImageData
from openpae.engine.journal import read_log
from openpae.engine.loop import fit
from openpae.engine.run_folder import open_run
from openpae.engine.settings import LoopConfig, OptimConfig
from openpae.models.configs import DiscriminatorConfig, PAEConfig, RefinerConfig
from openpae.models.encoders import encoder_fingerprint, load_encoder
from openpae.models.priors import Refiner
from openpae.models.saved import write_prior
from openpae.objective.settings import TokenizerLoss
from openpae.storage.model_folder import checkpoint_path
from openpae.train.settings import TokenizerRun
from openpae.train.tokenizer import TokenizerTask
from tests.by_hand import (
    BATCH,
    LOOP,
    OPTIM,
    STEPS,
    AdamWByHand,
    Drawn,
    assert_equal,
    averaged,
    cosine,
    double_precision,
    gradients_of,
    gram,
    learning_rate,
    order,
    snapshot,
    stored_images,
    trained,
)
from tests.conftest import shaken
from tests.engine.runs import MACHINE

SEED, PART = 3, 3
SHAPE = (8, 4, 4)
CLIP = 200.0
WEIGHTS = {
    "l1": 1.0, "lpips": 0.7, "gan": 0.3, "ssr": 0.4, "mcr": 0.6, "scr": 0.8, "kl": 1e-3, "diffusion": 0.2
}  # fmt: skip
SEEN, MOVED = 2, 3
"""Of three images: 0.4 of them for LPIPS and 0.9 for MCR, rounded up."""


@pytest.fixture
def exact(packed: PackedImages) -> Iterator[None]:
    with double_precision():
        yield


@pytest.fixture
def run(tiny_config: PAEConfig, packed: PackedImages, exact: None, tmp_path: Path) -> TokenizerRun:
    """Nothing at its default; the discriminator learns from the second step on, and is felt from there."""
    sizes = RefinerConfig(
        feature_dim=48, latent_dim=8, grid_size=4, num_heads=4, decoder_layers=1, decoder_dim=32,
        decoder_heads=4,
    )  # fmt: skip
    (tmp_path / "prior").mkdir()
    prior = shaken(Refiner(sizes))
    write_prior(
        tmp_path / "prior", prior.state_dict(), sizes, encoder_fingerprint(load_encoder("random-tiny"))
    )
    rest = {name: weight for name, weight in WEIGHTS.items() if name != "l1"}
    return TokenizerRun(
        model=replace(tiny_config, sphere="sample"),
        prior=tmp_path / "prior",
        data=ImageData(images=packed.shards.folder, augment="flip"),
        loss=TokenizerLoss(
            lpips_net="random",
            lpips_share=0.4,
            discriminator=DiscriminatorConfig(kind="patch", width=4, num_layers=2),
            discriminator_start=0.1,
            gan_start=0.3,
            mcr_angles=(30.0, 70.0),
            mcr_share=0.9,
            latent_noise=0.5,
            **rest,
        ),
        optim=OptimConfig(**OPTIM, clip=CLIP),
        loop=LoopConfig(**LOOP, device_batch_size=PART, seed=SEED),
    )  # fmt: skip


def augmented(images: Tensor, u: Tensor) -> Tensor:
    """DiffAugment, image by image: brightness, saturation, contrast, a shift by 4 pixels, a hole of 6."""
    out = []
    for image, (brightness, saturation, contrast, down, right, row, column) in zip(
        images, u.tolist(), strict=True
    ):
        x = image - 0.5 + (brightness - 0.5) / 2
        grey = x.mean(dim=0)
        x = grey + (x - grey) * 2 * saturation
        x = x.mean() + (x - x.mean()) * (contrast + 0.5)
        y, z = int(down * 9) - 4, int(right * 9) - 4
        x = torch.nn.functional.pad(x, (4, 4, 4, 4))[:, 4 - y : 36 - y, 4 - z : 36 - z]
        keep = torch.ones(32, 32)
        top, left = int(row * 32) - 3, int(column * 32) - 3
        keep[max(0, top) : max(0, top + 6), max(0, left) : max(0, left + 6)] = 0
        out.append(x * keep + 0.5)
    return torch.stack(out)


def losses(
    task: Any, x: Tensor, draws: Drawn, step: int
) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
    """The terms (Eq. 2-6), other logged values, and the decode of the latent."""
    model, lpips = task.model, task.lpips
    z = model.encode(x)
    level = 0.5 * draws.uniform("latent noise level")
    r = model.decode(z + level[:, None, None, None] * draws.normal("latent noise", *SHAPE))
    e = draws.normal("mcr direction", *SHAPE)[:MOVED]
    e = e / e.square().mean(dim=(1, 2, 3), keepdim=True).sqrt()
    moved, other = {}, {}
    for name, angle in (("m", 30), ("l", 70)):
        latent = z[:MOVED] + math.tan(math.radians(angle)) * e
        latent = latent / (latent.square().mean(dim=(1, 2, 3), keepdim=True) + 1e-6).sqrt()
        moved[name] = model.decode(latent)
        angles = torch.acos(cosine(latent.flatten(1), z[:MOVED].flatten(1)))
        other[f"angle_{name}"] = angles.mean() * 180 / math.pi
    m, large = moved["m"], moved["l"]
    tokens, target = z.flatten(2).mT, task.prior(model.features(x))
    mean, variance = z.mean(dim=(0, 2, 3)), z.var(dim=(0, 2, 3), unbiased=False)
    noise, t = draws.normal("denoiser noise", *SHAPE), draws.uniform("denoiser t")
    at = t[:, None, None, None]
    velocity = task.denoiser(at * z + (1 - at) * noise, t)
    terms = {
        "l1": (r - x).abs().mean(),
        "lpips": lpips(r[:SEEN], x[:SEEN]).mean(),
        "ssr": (gram(tokens) - gram(target)).square().mean(),
        "scr": 2 - cosine(tokens.mean(dim=1), target.mean(dim=1)).mean() - cosine(tokens, target).mean(),
        "mcr": (m - r.detach()[:MOVED]).abs().mean() + (large - m.detach()).abs().mean()
        + lpips(m[:SEEN], r.detach()[:SEEN]).mean() + lpips(large[:SEEN], m.detach()[:SEEN]).mean(),
        "kl": 16 * (mean**2 + variance - 1 - variance.log()).sum() / 2,
        "diffusion": (velocity - (z - noise)).square().mean(),
    }  # fmt: skip
    if step >= 1:
        terms["gan"] = -task.discriminator(augmented(r, draws.uniform("augment", 7))).mean()
    return terms, other, r


def by_hand(
    task: Any, run: TokenizerRun
) -> tuple[dict[str, Tensor], dict[str, Tensor], list[dict[str, float]]]:
    """Weights of all players, average of the autoencoder, and log."""
    images = stored_images(run.data.images)
    own, denoiser, critic = trained(task.model), trained(task.denoiser), trained(task.discriminator)
    joint, average = [*own.values(), *denoiser.values()], snapshot(own)
    players = AdamWByHand(joint, CLIP), AdamWByHand([*critic.values()], CLIP)
    log = []
    for step in range(STEPS):
        rows, bits = order(SEED, step, BATCH, len(images))
        sums = [torch.zeros_like(w) for w in joint], [torch.zeros_like(w) for w in critic.values()]
        logged: dict[str, float] = {}
        for part in (slice(0, PART), slice(PART, BATCH)):
            pairs = zip(rows[part], bits[part], strict=True)
            x = torch.stack([images[row].flip(-1) if bit % 2 else images[row] for row, bit in pairs]) / 255
            draws = Drawn(SEED, step, BATCH, part)
            terms, other, r = losses(task, x, draws, step)
            weights: dict[str, Any] = dict(WEIGHTS)
            if run.loss.gan_weight == "adaptive" and step >= 1:
                last = own["decoder.to_pixels.weight"]
                pulls = terms["l1"] + 0.7 * terms["lpips"], terms["gan"]
                a, b = (torch.autograd.grad(pull, last, retain_graph=True)[0].norm() for pull in pulls)
                other["gan_weight"] = weights["gan"] = 0.3 * min(a / (b + 1e-4), torch.tensor(1e4))
            loss = torch.stack([weights[name] * term for name, term in terms.items()]).sum()
            for sum_, g in zip(sums[0], gradients_of(loss, joint, 2), strict=True):
                sum_ += g
            values = {
                f"autoencoder/{name}": value for name, value in (terms | other | {"loss": loss}).items()
            }
            if step >= 1:
                u = draws.uniform("augment", 7)
                real, fake = (task.discriminator(augmented(y, u)) for y in (x, r.detach()))
                hinge = (1 - real).clamp_min(0).mean() + (1 + fake).clamp_min(0).mean()
                for sum_, g in zip(sums[1], gradients_of(hinge, [*critic.values()], 2), strict=True):
                    sum_ += g
                right = torch.cat([(real > 0).flatten(), (fake < 0).flatten()]).double().mean()
                values |= {"discriminator/loss": hinge, "discriminator/accuracy": right}
            logged = {name: logged.get(name, 0.0) + value.item() / 2 for name, value in values.items()}
        lr = logged["lr"] = learning_rate(step)
        logged["autoencoder/grad_norm"] = players[0].step(sums[0], lr)
        if step >= 1:
            logged["discriminator/grad_norm"] = players[1].step(sums[1], lr)
        average = averaged(average, own)
        log.append(logged)
    names = {"autoencoder": own, "denoiser": denoiser, "discriminator": critic}
    after = {f"{player}.{name}": w.detach() for player, all_ in names.items() for name, w in all_.items()}
    return after, average, log


@pytest.mark.parametrize("gan_weight", ["fixed", "adaptive"])
def test_three_steps_are_those_of_the_formulas(run: TokenizerRun, tmp_path: Path, gan_weight: Any) -> None:
    run = replace(run, loss=replace(run.loss, gan_weight=gan_weight))
    task = TokenizerTask(run)
    for network in (task.model, task.denoiser, task.discriminator):
        shaken(network)
    weights, average, expected = by_hand(copy.deepcopy(task), run)
    open_run(tmp_path / "run", run)
    fit(task, tmp_path / "run", run.optim, run.loop, quiet=True)
    log = read_log(tmp_path / "run")
    for line, other in zip(log, expected, strict=True):
        assert line.keys() - other.keys() == {"step", "images_seen", *MACHINE}
        assert {name: line[name] for name in other} == pytest.approx(other, rel=1e-6)  # the log is float32
    folder = checkpoint_path(tmp_path / "run", STEPS)
    players = torch.load(folder / "state.pt", weights_only=True)["players"]
    values = {f"{player}.{name}": w for player, state in players.items() for name, w in state.items()}
    assert_equal(values, weights)
    assert_equal(load_file(folder / "model.safetensors"), average)
    norms = [line["autoencoder/grad_norm"] for line in log]
    assert min(norms) < CLIP < max(norms), norms
