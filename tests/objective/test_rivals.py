"""Mixtures and VFM alignment: values by definition in NumPy, gradients, limits, place in the task."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from openpae import config as configs
from openpae.data.images import PackedImages
from openpae.models.configs import LowPassConfig
from openpae.models.layers import to_grid, to_tokens
from openpae.models.lpips import LPIPS
from openpae.models.upsampling import low_pass_down
from openpae.objective.losses import gram_alignment
from openpae.objective.rivals import mixture_consistency, mixtures, vfm_alignment
from openpae.objective.settings import TokenizerLoss
from openpae.objective.terms import prior_terms
from openpae.runtime.draws import Draws
from openpae.train.settings import TokenizerRun
from openpae.train.tokenizer import TokenizerTask


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def array(x: Tensor) -> Any:
    return x.detach().double().numpy()


def test_mixtures_against_numpy() -> None:
    z, a = torch.randn(3, 4, 2, 5), torch.tensor([0.0, 0.3, 0.5])
    for per, axes in (("token", (0,)), ("sample", (0, 1, 2))):
        out = mixtures(z, a, per)
        for i in range(3):
            mixed = (1 - a[i].item()) * array(z)[i] + a[i].item() * array(z)[(i + 1) % 3]
            mixed /= np.sqrt((mixed**2).mean(axis=axes, keepdims=True) + 1e-6)
            np.testing.assert_allclose(array(out)[i], mixed, atol=1e-6)


def test_mixture_consistency_against_its_definition() -> None:
    lpips, a = LPIPS("alex"), torch.tensor([0.1, 0.5, 0.0])
    mixed, parents = (
        torch.rand(3, 3, 32, 32, requires_grad=True),
        torch.rand(3, 3, 32, 32, requires_grad=True),
    )
    features = [[*lpips.features(images)] for images in (mixed, parents)]
    loss = mixture_consistency(mixed, parents, a, features[0], features[1], lpips.distance)
    expected = 0.0
    for i in range(3):
        for weight, j in ((1 - a[i].item(), i), (a[i].item(), (i + 1) % 3)):
            distance = lpips(mixed[i : i + 1], parents[j : j + 1]).item()
            expected += weight * (np.abs(array(mixed)[i] - array(parents)[j]).mean() + distance) / 3
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    slopes = torch.autograd.grad(loss, (mixed, parents), allow_unused=True)
    assert slopes[0].abs().sum() > 0
    assert slopes[1] is None
    same = mixture_consistency(parents, parents, torch.zeros(3), features[1], features[1], lpips.distance)
    assert same.item() == pytest.approx(0, abs=1e-6)


def test_vfm_alignment_against_numpy() -> None:
    z, f, project = (
        torch.randn(2, 6, 4, requires_grad=True),
        torch.randn(2, 6, 7),
        nn.Linear(4, 7, bias=False),
    )
    weight, margins = array(project.weight), (0.4, 0.2)

    def unit(x: Any) -> Any:
        return x / np.linalg.norm(x, axis=-1, keepdims=True)

    def literal(latent: Any) -> float:
        single = np.maximum(0, 1 - margins[0] - (unit(latent @ weight.T) * unit(array(f))).sum(-1)).mean()
        grams = [unit(x) @ unit(x).transpose(0, 2, 1) for x in (latent, array(f))]
        return float(single + np.maximum(0, np.abs(grams[0] - grams[1]) - margins[1]).mean())

    loss = vfm_alignment(z, f, project, margins)
    assert loss.item() == pytest.approx(literal(array(z)), rel=1e-5)
    (slope,) = torch.autograd.grad(loss, z)
    step = np.zeros(z.shape)
    step[1, 2, 3] = 1e-5
    numeric = (literal(array(z) + step) - literal(array(z) - step)) / 2e-5
    assert slope[1, 2, 3].item() == pytest.approx(numeric, rel=1e-3)


def test_vfm_alignment_is_zero_within_its_margins() -> None:
    f, project = torch.randn(2, 6, 4), nn.Linear(4, 4, bias=False)
    with torch.no_grad():
        project.weight.copy_(torch.eye(4))
    assert vfm_alignment(3 * f, f, project) == 0
    assert vfm_alignment(-f, f, project).item() == pytest.approx(
        1.5
    )  # cosines are -1, their matrix is the same
    assert vfm_alignment(torch.randn(2, 6, 4), f, project, (1.0, 1.0)) < 2
    with pytest.raises(ValueError, match=r"latent and features must hold the same tokens"):
        vfm_alignment(torch.randn(2, 5, 4), f, project)


def test_a_low_pass_for_the_target_of_ssr_alone() -> None:
    z, target = torch.randn(2, 8, 4, 4), torch.randn(2, 16, 8)
    low_pass = LowPassConfig(strength=0.9)
    plain, smooth = (prior_terms(z, target, TokenizerLoss(ssr_low_pass=one)) for one in (None, low_pass))
    smoothed = to_tokens(low_pass_down(to_grid(target, 4, 4), 4, 4, low_pass))
    assert smooth["ssr"] == gram_alignment(to_tokens(z), smoothed) != plain["ssr"]
    assert smooth["scr"] == plain["scr"]
    inner = prior_terms(z, target, TokenizerLoss(ssr_gram="inner"))
    assert inner["ssr"] == gram_alignment(to_tokens(z), target, "inner")


def task(packed: PackedImages, **loss: Any) -> TokenizerTask:
    run = configs.load(TokenizerRun, "tokenizer/tiny")
    off = {"ssr": 0.0, "scr": 0.0, "mcr": 0.0, "gan": 0.0, "lpips_net": "random"}
    return TokenizerTask(
        dataclasses.replace(
            run,
            prior=None,
            data=dataclasses.replace(run.data, images=packed.shards.folder),
            loss=TokenizerLoss(**(off | loss)),
            loop=dataclasses.replace(run.loop, steps=4, global_batch_size=4, device_batch_size=4),
        )
    )


def first_update(one: TokenizerTask) -> tuple[Any, Any, Draws]:
    batch = next(iter(one.batches(range(1))))
    draws = Draws(0, 0, range(4), 4, torch.device("cpu"))
    (update,) = one.updates(batch, draws, 0)
    return update, batch, draws


def test_both_are_terms_of_the_task(packed: PackedImages) -> None:
    one = task(packed, mix=0.5, va=0.3, lpips_share=0.75)
    update, batch, draws = first_update(one)
    logs, lpips = update.logs, one.lpips
    assert lpips is not None
    assert one.projection is not None
    total = logs["l1"] + logs["lpips"] + 0.5 * logs["mix"] + 0.3 * logs["va"]
    torch.testing.assert_close(update.loss.detach(), total)
    x = batch.images.float() / 255
    with torch.no_grad():
        z, features = one.model.encode(x), one.model.features(x)
        torch.testing.assert_close(logs["va"], vfm_alignment(to_tokens(z), features, one.projection))
        a = draws.uniform("mix share")[:3] / 2  # three of four images, the share of LPIPS
        parents, mixed = one.model.decode(z[:3]), one.model.decode(mixtures(z[:3], a))
        maps = [lpips.features(images) for images in (mixed, parents)]
        expected = mixture_consistency(mixed, parents, a, maps[0], maps[1], lpips.distance)
        torch.testing.assert_close(logs["mix"], expected, rtol=1e-4, atol=1e-6)
    update.loss.backward()
    assert one.projection.weight.grad is not None
    assert one.projection.weight.grad.abs().sum() > 0
    assert any(
        one.projection.weight is weight for weight in one.optimizers["autoencoder"].param_groups[0]["params"]
    )


def test_mixtures_stand_beside_mcr(packed: PackedImages) -> None:
    """The same draws give the same MCR with and without them."""
    alone, both = (first_update(task(packed, mcr=0.5, mix=mix))[0].logs for mix in (0.0, 0.5))
    torch.testing.assert_close(alone["mcr"], both["mcr"])
    assert "mix" in both.keys() - alone.keys()


def test_no_weight_no_part(packed: PackedImages, tmp_path: Path) -> None:
    plain = task(packed)
    assert plain.projection is None
    assert plain.players.keys() == {"autoencoder"}
    assert first_update(plain)[0].logs.keys() == {"l1", "lpips"}
