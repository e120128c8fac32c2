"""Samples depend on seed and index alone; guidance costs only where it acts."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor, nn

from openpae.dit import LightningDiT
from openpae.flow import time_grid
from openpae.sampling import (
    SamplerConfig,
    balanced_labels,
    evaluations,
    initial_noise,
    sample_images,
    sample_latents,
)
from openpae.tokenizer import PAE

SHAPE = (8, 4, 4)


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_noise_of_a_sample_is_its_own_to_the_bit(batch: int) -> None:
    together = initial_noise(5, range(8), SHAPE)
    apart = [initial_noise(5, range(start, min(start + batch, 8)), SHAPE) for start in range(0, 8, batch)]
    assert torch.equal(torch.cat(apart), together)
    assert torch.equal(initial_noise(5, [6, 2], SHAPE), together[[6, 2]])


def test_noise_differs_between_samples_and_seeds() -> None:
    """Also where seed and index are exchanged, or their digits run together."""
    pairs = [(0, 1), (1, 0), (1, 11), (11, 1), (111, 0), (0, 111), (0, 0)]
    noise = torch.cat([initial_noise(seed, [index], SHAPE) for seed, index in pairs]).flatten(1)
    correlation = torch.corrcoef(noise) - torch.eye(len(pairs))
    assert correlation.abs().max() < 0.5
    assert noise.std() == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_images_do_not_depend_on_the_batch_size(tiny_pae: PAE, tiny_dit: LightningDiT, batch: int) -> None:
    labels = balanced_labels(8, 2)
    config = SamplerConfig(steps=6, guidance=2.0, guidance_start=0.3)
    drawn = torch.cat(list(sample_images(tiny_pae, tiny_dit, labels, config, seed=3, batch_size=batch)))
    whole = torch.cat(list(sample_images(tiny_pae, tiny_dit, labels, config, seed=3, batch_size=64)))
    torch.testing.assert_close(drawn, whole, atol=1e-4, rtol=0)
    assert drawn.shape == (8, 3, 32, 32)
    assert drawn.min() >= 0
    assert drawn.max() <= 1
    other = torch.cat(list(sample_images(tiny_pae, tiny_dit, labels, config, seed=4, batch_size=batch)))
    assert (other - drawn).abs().max() > 1e-2


def rows_of(model: nn.Module) -> list[tuple[float, Tensor]]:
    """Records time and labels of every call."""
    calls: list[tuple[float, Tensor]] = []
    model.register_forward_pre_hook(lambda _, args: calls.append((float(args[1][0]), args[2])))
    return calls


@pytest.mark.parametrize(("guidance", "start"), [(2.5, 0.0), (2.5, 0.3), (2.5, 1.0), (1.0, 0.0)])
def test_the_null_class_is_computed_where_guidance_acts_and_nowhere_else(
    tiny_dit: LightningDiT, guidance: float, start: float
) -> None:
    calls = rows_of(tiny_dit)
    config = SamplerConfig(steps=10, shift=0.4, guidance=guidance, guidance_start=start)
    sample_latents(tiny_dit, torch.tensor([0, 1, 1]), initial_noise(0, range(3), SHAPE), config)
    assert [t for t, _ in calls] == pytest.approx(time_grid(11, 0.4)[:-1].tolist())
    for t, labels in calls:
        guided = guidance != 1 and t >= start
        expected = Counter({0: 1, 1: 2, tiny_dit.null_label: 3}) if guided else Counter({0: 1, 1: 2})
        assert Counter(labels.tolist()) == expected


def test_guidance_is_what_its_formula_says(tiny_dit: LightningDiT) -> None:
    """One step from noise: x_0 + v_u + w (v_c - v_u)."""
    noise, labels, zero = initial_noise(0, range(2), SHAPE), torch.tensor([0, 1]), torch.zeros(2)
    with torch.no_grad():
        conditional = tiny_dit(noise, zero, labels)
        null = tiny_dit(noise, zero, torch.full((2,), tiny_dit.null_label))
    config = SamplerConfig(steps=1, guidance=3.0, guidance_start=0.0)
    drawn = sample_latents(tiny_dit, labels, noise, config)
    torch.testing.assert_close(drawn, noise + null + 3 * (conditional - null), atol=1e-5, rtol=1e-5)


def test_latents_leave_in_the_scale_of_the_tokenizer(tiny_dit: LightningDiT) -> None:
    noise, labels = initial_noise(0, range(2), SHAPE), torch.tensor([0, 1])
    config = SamplerConfig(steps=3)
    plain = sample_latents(tiny_dit, labels, noise, config)
    mean, std = torch.arange(8.0), torch.arange(1.0, 9.0)
    tiny_dit.set_statistics(mean, std)
    scaled = sample_latents(tiny_dit, labels, noise, config)
    torch.testing.assert_close(scaled, plain * std.view(-1, 1, 1) + mean.view(-1, 1, 1))


def test_an_untrained_generator_returns_the_noise(tiny_dit: LightningDiT) -> None:
    nn.init.zeros_(tiny_dit.to_velocity.weight)
    nn.init.zeros_(tiny_dit.to_velocity.bias)
    noise = initial_noise(0, range(2), SHAPE)
    assert torch.equal(sample_latents(tiny_dit, torch.tensor([0, 1]), noise, SamplerConfig(steps=4)), noise)


@pytest.mark.parametrize(("count", "classes"), [(10, 5), (11, 5), (3, 5), (0, 5)])
def test_labels_are_balanced(count: int, classes: int) -> None:
    labels = balanced_labels(count, classes)
    numbers = torch.bincount(labels, minlength=classes)
    assert len(labels) == count
    assert numbers.max() - numbers.min() <= 1


@pytest.mark.parametrize("label", [-1, 3])
def test_unknown_labels_are_refused(tiny_dit: LightningDiT, label: int) -> None:
    noise = initial_noise(0, range(2), SHAPE)
    with pytest.raises(
        ValueError, match=rf"must lie in \[0, 2\] \(2 is the null class\), got {min(label, 0)} to"
    ):
        sample_latents(tiny_dit, torch.tensor([0, label]), noise, SamplerConfig(steps=1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps must be >= 1, got 0"),
        ({"shift": 0.0}, "shift must be > 0, got 0.0"),
        ({"guidance_start": 1.5}, r"guidance_start must lie in \[0, 1\], got 1.5"),
    ],
)
def test_settings_that_can_not_be_are_named(changes: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamplerConfig(**changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(("guidance", "start"), [(1.0, 0.0), (2.5, 0.0), (2.5, 0.25), (2.5, 1.0)])
def test_evaluations_count_what_the_sampler_calls(
    tiny_dit: LightningDiT, monkeypatch: pytest.MonkeyPatch, guidance: float, start: float
) -> None:
    config = SamplerConfig(steps=12, guidance=guidance, guidance_start=start)
    rows: list[int] = []
    forward = tiny_dit.forward

    def counted(x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        rows.append(len(x))
        return forward(x, t, labels)

    monkeypatch.setattr(tiny_dit, "forward", counted)
    sample_latents(tiny_dit, torch.tensor([1]), initial_noise(0, [0], (8, 4, 4)), config)
    assert sum(rows) == evaluations(config)
