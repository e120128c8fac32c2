"""The tokenizer's task: flow of gradients from each term, and parts that are computed once."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from openpae import config as configs
from openpae.data.images import PackedImages
from openpae.data.training import ImageBatch
from openpae.engine.settings import LoopConfig
from openpae.engine.task import Update
from openpae.models.configs import DiscriminatorConfig
from openpae.models.layers import to_tokens
from openpae.models.saved import load_prior, load_tokenizer
from openpae.objective.settings import TokenizerLoss
from openpae.objective.terms import gradient_shares, latent_noise
from openpae.runtime.draws import Draws
from openpae.train.refiner import train_refiner
from openpae.train.settings import RefinerRun, TokenizerRun
from openpae.train.tokenizer import TokenizerTask, train_tokenizer

FULL: dict[str, Any] = {
    "lpips_net": "random",
    "gan": 0.5,
    "gan_start": 0.0,
    "discriminator_start": 0.0,
    "discriminator": DiscriminatorConfig(kind="patch", width=4, num_layers=2),
}


@pytest.fixture(scope="module")
def refiner(packed: PackedImages, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny trained refiner."""
    folder = tmp_path_factory.mktemp("refiner") / "run"
    run = configs.load(RefinerRun, "refiner/tiny")
    data = dataclasses.replace(run.data, images=packed.shards.folder)
    train_refiner(dataclasses.replace(run, data=data, loop=short(run.loop)), folder, quiet=True)
    return folder


def short(loop: LoopConfig, **changes: Any) -> LoopConfig:
    return dataclasses.replace(loop, **{"steps": 4, "global_batch_size": 4, "save_every": 2, **changes})


def a_run(
    packed: PackedImages, refiner: Path, loop: dict[str, Any] | None = None, **loss: Any
) -> TokenizerRun:
    run = configs.load(TokenizerRun, "tokenizer/tiny")
    return dataclasses.replace(
        run,
        prior=refiner,
        data=dataclasses.replace(run.data, images=packed.shards.folder),
        loss=TokenizerLoss(**(FULL | loss)),
        loop=short(run.loop, **(loop or {})),
    )


def updates_of(task: TokenizerTask, step: int = 0) -> list[Update]:
    batch: ImageBatch = next(iter(task.batches(range(step, step + 1))))
    draws = Draws(0, step, range(len(batch.images)), len(batch.images), torch.device("cpu"))
    return list(task.updates(batch, draws, step))


def test_every_term_is_there_and_weighted(packed: PackedImages, refiner: Path) -> None:
    """The loss is the sum of the logged terms times the paper's weights (Eq. 2, 6)."""
    autoencoder, discriminator = updates_of(TokenizerTask(a_run(packed, refiner)))
    logs = autoencoder.logs
    weights = {"l1": 1.0, "lpips": 1.0, "gan": 0.5, "ssr": 0.2, "mcr": 0.5, "scr": 1.0}
    total = sum(weight * logs[name] for name, weight in weights.items())
    torch.testing.assert_close(autoencoder.loss.detach(), torch.as_tensor(total))
    assert discriminator.player == "discriminator"


def test_the_players_do_not_touch_each_other(packed: PackedImages, refiner: Path) -> None:
    task = TokenizerTask(a_run(packed, refiner))
    assert task.discriminator is not None
    autoencoder, discriminator = updates_of(task)
    autoencoder.loss.backward()
    assert all(p.grad is None for p in task.discriminator.parameters())
    assert any(p.grad is not None for p in task.model.decoder.parameters())
    task.model.zero_grad(set_to_none=True)
    discriminator.loss.backward()
    assert all(p.grad is None for p in task.model.parameters())
    assert any(p.grad is not None for p in task.discriminator.parameters())


def test_images_pass_each_network_once(
    packed: PackedImages, refiner: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four images, decodes r, m and l: one decoder pass of 12, perceptual passes of 4 and 12, one VFM
    pass; images and decodes r meet the frozen part of the discriminator once for both players."""
    task = TokenizerTask(a_run(packed, refiner))
    assert task.lpips is not None
    assert task.discriminator is not None
    seen: dict[str, list[int]] = {"decode": [], "perceive": [], "encode": [], "discriminate": []}

    def count(owner: Any, method: str, name: str) -> None:
        original = getattr(owner, method)

        def counted(x: Tensor, *rest: Any) -> Any:
            seen[name].append(len(x))
            return original(x, *rest)

        monkeypatch.setattr(owner, method, counted)

    count(task.model, "decode", "decode")
    count(task.lpips, "features", "perceive")
    count(task.model.encoder, "forward", "encode")
    count(task.discriminator, "features", "discriminate")
    updates_of(task)
    assert seen["decode"] == [12]
    assert sorted(seen["perceive"]) == [4, 12]
    assert seen["encode"] == [4]
    assert seen["discriminate"] == [4, 4]


@pytest.mark.parametrize(("design", "decodes"), [("small", 2), ("large", 2), ("cascaded", 3)])
def test_a_design_decodes_no_more_than_it_compares(
    packed: PackedImages, refiner: Path, design: str, decodes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = TokenizerTask(a_run(packed, refiner, mcr_design=design))
    sizes: list[int] = []
    original = task.model.decode
    monkeypatch.setattr(task.model, "decode", lambda z: sizes.append(len(z)) or original(z))  # type: ignore[func-returns-value]
    updates_of(task)
    assert sizes == [4 * decodes]


def test_switched_off_terms_cost_and_log_nothing(packed: PackedImages, refiner: Path) -> None:
    off = {"gan": 0.0, "ssr": 0.0, "mcr": 0.0, "scr": 0.0, "lpips": 0.0}
    task = TokenizerTask(dataclasses.replace(a_run(packed, refiner, **off), prior=None))
    assert task.prior is task.lpips is task.discriminator is task.denoiser is None
    (only,) = updates_of(task)
    assert set(only.logs) == {"l1"}


def test_starts_are_shares_of_the_training(packed: PackedImages, refiner: Path) -> None:
    run = a_run(packed, refiner, {"steps": 10}, discriminator_start=0.4, gan_start=0.6)
    task = TokenizerTask(run)
    players = {step: [update.player for update in updates_of(task, step)] for step in (3, 4, 5, 6)}
    assert players[3] == ["autoencoder"]
    assert players[4] == ["autoencoder", "discriminator"]
    assert "gan" not in updates_of(task, 5)[0].logs
    assert "gan" in updates_of(task, 6)[0].logs


def test_gradient_shares_are_norms_at_the_latent() -> None:
    """Of 2 x sum(3 z), whose gradient is 6 everywhere, and of 0.5 x sum(z^2), whose gradient is z."""
    z = torch.randn(2, 3, 4, 4, requires_grad=True)
    shares = gradient_shares({"a": 3 * z.sum(), "b": z.square().sum()}, {"a": 2.0, "b": 0.5}, z)
    norms = 6 * z.numel() ** 0.5, float(z.detach().norm())
    for name, norm in zip("ab", norms, strict=True):
        assert float(shares[f"gradient_share_{name}"]) == pytest.approx(norm / sum(norms), rel=1e-5)


def test_gradient_shares_are_logged_of_every_term_at_its_steps(packed: PackedImages, refiner: Path) -> None:
    """Each is the norm of the gradient that its term alone, with its weight, has at the latent."""
    task = TokenizerTask(a_run(packed, refiner, gradients_every=2, diffusion=0.1, kl=1e-6))
    logs = updates_of(task, 0)[0].logs
    shares = {name for name in logs if name.startswith("gradient_share_")}
    terms = ("l1", "lpips", "gan", "ssr", "mcr", "scr", "kl", "diffusion")
    assert shares == {f"gradient_share_{name}" for name in terms}
    assert not any(name.startswith("gradient_share_") for name in updates_of(task, 1)[0].logs)


def test_the_angles_reached_are_near_those_asked_for(packed: PackedImages, refiner: Path) -> None:
    """At 128 dimensions a direction is orthogonal only on average; at the paper's 8,192 see test_losses."""
    logs = updates_of(TokenizerTask(a_run(packed, refiner)))[0].logs
    assert float(logs["angle_m"]) == pytest.approx(42.5, abs=5)
    assert float(logs["angle_l"]) == pytest.approx(85, abs=7)


def test_cached_targets_are_those_of_the_prior(packed: PackedImages, refiner: Path, tmp_path: Path) -> None:
    run = a_run(packed, refiner)
    cached = dataclasses.replace(run, data=dataclasses.replace(run.data, feature_cache=tmp_path / "features"))
    live, kept = (updates_of(TokenizerTask(each))[0].logs for each in (run, cached))
    for name in ("ssr", "scr", "l1"):
        torch.testing.assert_close(kept[name], live[name], rtol=2e-2, atol=1e-3)  # float16 on the disk


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_two_players_resume_to_the_bit(
    packed: PackedImages, refiner: Path, tmp_path: Path, precision: str
) -> None:
    """Stopped after two of four steps by losing its last checkpoint, then gone on."""
    run = a_run(
        packed, refiner, {"precision": precision, "ema_decay": 0.5}, gan_weight="adaptive", diffusion=0.1
    )
    train_tokenizer(run, tmp_path / "full", quiet=True)
    train_tokenizer(run, tmp_path / "parts", quiet=True)
    import shutil

    shutil.rmtree(tmp_path / "parts" / "checkpoints" / "step-00000004")
    train_tokenizer(run, tmp_path / "parts", quiet=True)
    states = [
        torch.load(tmp_path / name / "checkpoints" / "step-00000004" / "state.pt", weights_only=True)
        for name in ("full", "parts")
    ]
    for player in ("autoencoder", "discriminator", "denoiser"):
        one, two = (state["players"][player] for state in states)
        assert all(torch.equal(one[name], two[name]) for name in one)


def test_the_prior_must_fit(packed: PackedImages, refiner: Path) -> None:
    run = a_run(packed, refiner)
    with pytest.raises(ValueError, match=r"8 channels, model\.latent_dim is 4"):
        TokenizerTask(dataclasses.replace(run, model=dataclasses.replace(run.model, latent_dim=4)))
    with pytest.raises(ValueError, match="need prior, a refiner's folder"):
        dataclasses.replace(run, prior=None)


def test_compiling_rejects_a_second_backward(packed: PackedImages, refiner: Path) -> None:
    with pytest.raises(ValueError, match=r"loop\.compile cannot be combined"):
        a_run(packed, refiner, {"compile": True}, gradients_every=10)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ssr": -0.1}, r"loss\.ssr must be >= 0"),
        ({"gan_start": 0.1, "discriminator_start": 0.2}, "must not come before discriminator_start = 0.2"),
        ({"gan_start": 1.5}, r"gan_start must lie in \[0, 1\]"),
        ({"mcr_angles": (85.0, 42.5)}, "loss.mcr_angles must be medium < large"),
        ({"lpips_share": 0.0}, r"lpips_share must lie in \(0, 1\]"),
    ],
)
def test_invalid_losses_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TokenizerLoss(**changes)


@pytest.mark.parametrize("fusion", ["add", "concat", "finetune"])
def test_every_fusion_of_table_3b_trains(
    packed: PackedImages, refiner: Path, tmp_path: Path, fusion: str
) -> None:
    run = a_run(packed, refiner, ssr=0.0, scr=0.0)
    model = dataclasses.replace(run.model, fusion=fusion)  # type: ignore[arg-type]
    run = dataclasses.replace(run, prior=None, model=model)
    train_tokenizer(run, tmp_path / "run", quiet=True)
    assert load_tokenizer(tmp_path / "run").config.fusion == fusion


RAE: dict[str, Any] = {"ssr": 0.0, "mcr": 0.0, "scr": 0.0, "latent_noise": 0.8}


def a_rae(packed: PackedImages, **loss: Any) -> TokenizerRun:
    """The baseline: the decoder alone is trained, on noisy features of the VFM."""
    run = configs.load(TokenizerRun, "tokenizer/tiny")
    model = dataclasses.replace(run.model, fusion="none", latent_dim=48, width=None)
    data = dataclasses.replace(run.data, images=packed.shards.folder)
    weights = TokenizerLoss(**(FULL | RAE | loss))
    return dataclasses.replace(run, model=model, data=data, loss=weights, loop=short(run.loop))


def test_the_decoder_of_an_rae_is_trained_and_nothing_else(packed: PackedImages, tmp_path: Path) -> None:
    run = a_rae(packed)
    before = TokenizerTask(run).model.state_dict()
    train_tokenizer(run, tmp_path, quiet=True)
    after = load_tokenizer(tmp_path).state_dict()
    moved = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert moved
    assert all(name.startswith("decoder.") for name in moved)


def test_the_decoder_sees_noise_of_every_strength(packed: PackedImages) -> None:
    """Uniform from 0 to 0.8, one strength an image; the latent itself stays clean."""
    task = TokenizerTask(a_rae(packed))
    noise = latent_noise(Draws(0, 0, range(400), 400, torch.device("cpu")), 0.8, (48, 4, 4))
    assert noise is not None
    strengths = noise.square().mean(dim=(1, 2, 3)).sqrt().sort().values
    assert (strengths - 0.8 * (torch.arange(400) + 0.5) / 400).abs().max() < 0.8 * 0.09
    seen: list[Tensor] = []
    task.model.decoder.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    batch: ImageBatch = next(iter(task.batches(range(1))))
    draws = Draws(0, 0, range(len(batch.images)), len(batch.images), torch.device("cpu"))
    next(task.updates(batch, draws, 0))
    clean = task.model.features(batch.images.float() / 255)
    added = latent_noise(draws, 0.8, (48, 4, 4))
    assert added is not None
    torch.testing.assert_close(seen[0], clean + to_tokens(added), atol=1e-3, rtol=1e-3)


def test_no_noise_is_drawn_unless_asked() -> None:
    assert latent_noise(Draws(0, 0, range(4), 4, torch.device("cpu")), 0.0, (48, 4, 4)) is None


@pytest.mark.parametrize("name", ["ssr", "scr", "kl", "diffusion", "gradients_every"])
def test_losses_of_a_latent_that_is_fixed_are_rejected(packed: PackedImages, name: str) -> None:
    with pytest.raises(ValueError, match=rf"loss.{name} must be 0 for model.fusion none"):
        a_rae(packed, **{name: 1})


def test_a_saved_refiner_is_the_prior_that_training_uses(packed: PackedImages, refiner: Path) -> None:
    task = TokenizerTask(a_run(packed, refiner))
    assert task.prior is not None
    features = torch.randn(2, 16, 48)
    torch.testing.assert_close(task.prior(features), load_prior(refiner)(features))
    assert not any(p.requires_grad for p in task.prior.parameters())


def test_lpips_share_looks_at_the_first_images(
    packed: PackedImages, refiner: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = TokenizerTask(a_run(packed, refiner, lpips_share=0.5, mcr=0.0))
    assert task.lpips is not None
    sizes: list[int] = []
    original = task.lpips.features

    def counted(images: Tensor) -> Sequence[Tensor]:
        sizes.append(len(images))
        return original(images)

    monkeypatch.setattr(task.lpips, "features", counted)
    updates_of(task)
    assert sizes == [2, 2]
