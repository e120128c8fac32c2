"""Samples depend on seed and index alone. The null class is computed only inside the guidance interval."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from openpae.models.configs import LightningDiTConfig
from openpae.models.dit import LightningDiT
from openpae.models.tokenizer import PAE
from openpae.objective.flow import time_grid
from openpae.runtime.draws import SampleNoise, initial_noise
from openpae.sampling.sampler import (
    balanced_labels,
    evaluations,
    sample_batches,
    sample_images,
    sample_latents,
)
from openpae.sampling.settings import SamplerConfig
from tests.conftest import shaken

SHAPE = (8, 4, 4)


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_the_noise_of_a_sample_does_not_depend_on_the_batch(batch: int) -> None:
    together = initial_noise(5, range(8), SHAPE)
    apart = [initial_noise(5, range(start, min(start + batch, 8)), SHAPE) for start in range(0, 8, batch)]
    assert torch.equal(torch.cat(apart), together)
    assert torch.equal(initial_noise(5, [6, 2], SHAPE), together[[6, 2]])


def test_noise_differs_between_samples_and_seeds() -> None:
    """Also if seed and index are exchanged, or their digits concatenate to the same text."""
    pairs = [(0, 1), (1, 0), (1, 11), (11, 1), (111, 0), (0, 111), (0, 0)]
    noise = torch.cat([initial_noise(seed, [index], SHAPE) for seed, index in pairs]).flatten(1)
    correlation = torch.corrcoef(noise) - torch.eye(len(pairs))
    assert correlation.abs().max() < 0.5
    assert noise.std() == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_the_noise_of_the_steps_does_not_depend_on_the_batch(batch: int) -> None:
    """The first draw is the initial noise, and later draws are independent of it."""
    noise = SampleNoise(5, range(8), SHAPE)
    together = torch.stack([noise.draw() for _ in range(4)])
    apart = []
    for start in range(0, 8, batch):
        part = SampleNoise(5, range(start, min(start + batch, 8)), SHAPE)
        apart.append(torch.stack([part.draw() for _ in range(4)]))
    assert torch.equal(torch.cat(apart, dim=1), together)
    assert torch.equal(together[0], initial_noise(5, range(8), SHAPE))
    correlation = torch.corrcoef(together[:, 0].flatten(1)) - torch.eye(4)
    assert correlation.abs().max() < 0.5


@pytest.mark.parametrize("solver", ["euler", "heun", "multistep", "adams", "sde", "rk45"])
@pytest.mark.parametrize("batch", [1, 3, 8])
def test_images_do_not_depend_on_the_batch_size(
    tiny_pae: PAE, tiny_dit: LightningDiT, batch: int, solver: Any
) -> None:
    labels = balanced_labels(8, 2)
    config = SamplerConfig(solver=solver, steps=6, guidance=2.0, guidance_start=0.3, tolerance=0.1)
    images = torch.cat(list(sample_images(tiny_pae, tiny_dit, labels, config, seed=3, batch_size=batch)))
    at_once = torch.cat(list(sample_images(tiny_pae, tiny_dit, labels, config, seed=3, batch_size=64)))
    torch.testing.assert_close(images, at_once, atol=1e-4, rtol=0)
    assert images.shape == (8, 3, 32, 32)
    assert images.min() >= 0
    assert images.max() <= 1
    other = torch.cat(list(sample_images(tiny_pae, tiny_dit, labels, config, seed=4, batch_size=batch)))
    assert (other - images).abs().max() > 1e-2


def test_batches_may_come_in_any_order(tiny_pae: PAE, tiny_dit: LightningDiT) -> None:
    """So that processes can share them, and an interrupted run can go on."""
    labels, config = balanced_labels(8, 2), SamplerConfig(solver="sde", steps=40, guidance=1.0)
    latents = torch.cat(list(sample_batches(tiny_dit, labels, config, [range(8)], seed=1)))
    images = torch.cat(list(sample_images(tiny_pae, tiny_dit, labels, config, seed=1)))
    rows = [[5, 2, 7], [0], [1, 6, 3, 4]]
    parts = sample_batches(tiny_dit, labels, config, rows, seed=1)
    decoded = sample_images(tiny_pae, tiny_dit, labels, config, seed=1, batches=rows)
    for indices, part, pixels in zip(rows, parts, decoded, strict=True):
        torch.testing.assert_close(part, latents[indices], atol=1e-4, rtol=0)
        torch.testing.assert_close(pixels, images[indices], atol=1e-4, rtol=0)


def rows_of(model: nn.Module) -> list[tuple[float, Tensor]]:
    """Records time and labels of every call."""
    calls: list[tuple[float, Tensor]] = []
    model.register_forward_pre_hook(lambda _, args: calls.append((float(args[1][0]), args[2])))
    return calls


@pytest.mark.parametrize(
    ("guidance", "start", "end"),
    [(2.5, 0.0, 1.0), (2.5, 0.3, 1.0), (2.5, 0.3, 0.6), (2.5, 1.0, 1.0), (1.0, 0.0, 1.0)],
)
def test_the_null_class_is_computed_only_inside_the_interval(
    tiny_dit: LightningDiT, guidance: float, start: float, end: float
) -> None:
    calls = rows_of(tiny_dit)
    config = SamplerConfig(steps=10, guidance=guidance, guidance_start=start, guidance_end=end)
    sample_latents(tiny_dit, torch.tensor([0, 1, 1]), initial_noise(0, range(3), SHAPE), config)
    assert [t for t, _ in calls] == pytest.approx(time_grid(11, 0.4)[:-1].tolist())
    for t, labels in calls:
        guided = guidance != 1 and start <= t <= end
        expected = Counter({0: 1, 1: 2, tiny_dit.null_label: 3}) if guided else Counter({0: 1, 1: 2})
        assert Counter(labels.tolist()) == expected


def test_skipping_the_null_class_saves_a_fifth_and_changes_nothing(tiny_dit: LightningDiT) -> None:
    """Against a sampler, written out below, that computes the null class at every step, with weight zero
    outside the interval."""
    noise, labels, null = initial_noise(0, range(2), SHAPE), torch.tensor([0, 1]), torch.full((2,), 2)
    config = SamplerConfig(steps=249, shift=0.4, guidance=2.5, guidance_start=0.3)
    counted = rows_of(tiny_dit)
    samples = sample_latents(tiny_dit, labels, noise, config)
    evaluated = sum(len(rows) for _, rows in counted) / 2
    counted.clear()
    x, grid = noise.double(), time_grid(250, 0.4).tolist()
    with torch.no_grad():
        for t, t_next in pairwise(grid):
            times = torch.full((2,), t)
            v, u = (tiny_dit(x.float(), times, rows).double() for rows in (labels, null))
            x = x + (t_next - t) * (u + (2.5 if t >= 0.3 else 1.0) * (v - u))
    unskipped = sum(len(rows) for _, rows in counted) / 2
    torch.testing.assert_close(samples, tiny_dit.denormalise(x.float()), atol=1e-4, rtol=1e-4)
    assert evaluated == evaluations(config)
    assert unskipped == 2 * 249
    assert evaluated <= 0.8 * unskipped


def test_the_interval_includes_its_ends_in_float32() -> None:
    """0.1 + 0.2 is not 0.3 in float64, but it is in float32."""
    config = SamplerConfig(guidance_start=0.3, guidance_end=0.6)
    assert config.guides_at(0.1 + 0.2)
    assert config.guides_at(0.2 + 0.4)
    assert not config.guides_at(0.2999)
    assert not config.guides_at(0.6001)
    assert not SamplerConfig(guidance=1.0, guidance_start=0.0).guides_at(0.5)


def test_guidance_follows_its_formula(tiny_dit: LightningDiT) -> None:
    """One step from noise: x_0 + v_u + w (v_c - v_u)."""
    noise, labels, zero = initial_noise(0, range(2), SHAPE), torch.tensor([0, 1]), torch.zeros(2)
    with torch.no_grad():
        conditional = tiny_dit(noise, zero, labels)
        null = tiny_dit(noise, zero, torch.full((2,), tiny_dit.null_label))
    config = SamplerConfig(steps=1, guidance=3.0, guidance_start=0.0)
    samples = sample_latents(tiny_dit, labels, noise, config)
    torch.testing.assert_close(samples, noise + null + 3 * (conditional - null), atol=1e-5, rtol=1e-5)


def weaker(config: LightningDiTConfig) -> LightningDiT:
    """A shallower generator of the same latents."""
    torch.manual_seed(1)
    return shaken(LightningDiT(replace(config, num_layers=1, hidden_dim=16))).eval()


def test_a_weaker_generator_guides_in_place_of_the_null_class(
    tiny_dit: LightningDiT, tiny_dit_config: LightningDiTConfig
) -> None:
    """One step from noise: x_0 + v_weak + w (v - v_weak), both of the class; not outside the interval."""
    weak = weaker(tiny_dit_config)
    noise, labels, zero = initial_noise(0, range(2), SHAPE), torch.tensor([0, 1]), torch.zeros(2)
    with torch.no_grad():
        v, v_weak = tiny_dit(noise, zero, labels), weak(noise, zero, labels)
    config = SamplerConfig(steps=1, guidance=3.0, guidance_start=0.0)
    samples = sample_latents(tiny_dit, labels, noise, config, weak=weak)
    torch.testing.assert_close(samples, noise + v_weak + 3 * (v - v_weak), atol=1e-5, rtol=1e-5)
    strong, weak_calls = rows_of(tiny_dit), rows_of(weak)
    config = SamplerConfig(steps=10, guidance=2.0, guidance_start=0.3)
    sample_latents(tiny_dit, labels, noise, config, weak=weak)
    assert [t for t, _ in strong] == pytest.approx(time_grid(11, 0.4)[:-1].tolist())
    assert [t for t, _ in weak_calls] == [t for t, _ in strong if t >= 0.3]
    assert len(strong) + len(weak_calls) == evaluations(config)


def test_a_weaker_generator_must_fit(tiny_dit: LightningDiT, tiny_dit_config: LightningDiTConfig) -> None:
    noise, labels = initial_noise(0, range(2), SHAPE), torch.tensor([0, 1])

    def guided_by(weak: LightningDiT, guidance: float = 2.0) -> None:
        sample_latents(tiny_dit, labels, noise, SamplerConfig(steps=1, guidance=guidance), weak=weak)

    with pytest.raises(ValueError, match=r"latent shape of the other, \(8, 4, 4\), got \(4, 4, 4\)"):
        guided_by(LightningDiT(replace(tiny_dit_config, latent_dim=4)))
    with pytest.raises(ValueError, match="number of classes of the other, 2, got 5"):
        guided_by(LightningDiT(replace(tiny_dit_config, num_classes=5)))
    weak = weaker(tiny_dit_config)
    with pytest.raises(ValueError, match="guides only where guidance is not 1"):
        guided_by(weak, guidance=1.0)
    weak.set_statistics(torch.zeros(8), torch.full((8,), 1.5))
    with pytest.raises(ValueError, match="normalises latents by other statistics"):
        guided_by(weak)


@pytest.mark.parametrize("guidance", [1.0, 1.5])
def test_the_solvers_converge_to_the_adaptive_reference(tiny_dit: LightningDiT, guidance: float) -> None:
    """The velocity jumps at the ends of the guidance interval. The reference splits the path there."""
    noise, labels = initial_noise(0, range(2), SHAPE), torch.tensor([0, 1])
    common = {"guidance": guidance, "guidance_start": 0.3, "guidance_end": 0.8}
    reference = sample_latents(
        tiny_dit, labels, noise, SamplerConfig(solver="rk45", tolerance=1e-4, **common)
    )
    errors = {}
    for solver in ("euler", "heun", "multistep", "adams"):
        for steps in (20, 160):
            samples = sample_latents(
                tiny_dit, labels, noise, SamplerConfig(solver=solver, steps=steps, **common)
            )
            errors[solver, steps] = float((samples - reference).abs().max())
    for solver in ("euler", "heun", "multistep", "adams"):
        assert errors[solver, 160] < 0.15 * errors[solver, 20]
        assert errors[solver, 160] < 0.02
    assert errors["adams", 20] < errors["multistep", 20] < errors["euler", 20]


def test_the_sde_needs_a_source_of_noise(tiny_dit: LightningDiT) -> None:
    config = SamplerConfig(solver="sde", steps=2, guidance=1.0)
    with pytest.raises(ValueError, match="give it a SampleNoise"):
        sample_latents(tiny_dit, torch.tensor([0]), initial_noise(0, [0], SHAPE), config)
    noise = SampleNoise(0, [0], SHAPE)
    assert sample_latents(tiny_dit, torch.tensor([0]), noise, config).shape == (1, *SHAPE)


class OwnGenerator(nn.Module):
    """The least that sampling needs of a generator."""

    config = SimpleNamespace(latent_shape=SHAPE)
    null_label = 2

    def __init__(self) -> None:
        super().__init__()
        self.target = nn.Parameter(torch.arange(128.0).view(SHAPE) / 64)

    def denormalise(self, x: Tensor) -> Tensor:
        return x

    def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        """The velocity towards one point of data."""
        return (self.target - x) / (1 - t).view(-1, 1, 1, 1)


@pytest.mark.parametrize("solver", ["euler", "heun", "multistep", "rk45"])
def test_any_module_with_the_protocol_can_be_sampled(solver: Any) -> None:
    own = OwnGenerator()
    config = SamplerConfig(solver=solver, steps=5, guidance=1.0, tolerance=1e-2)
    if solver == "rk45":  # it evaluates the velocity at t = 1, where this one is infinite
        own.forward = lambda x, t, labels: own.target.expand_as(x)  # type: ignore[method-assign]
    (samples,) = sample_batches(own, torch.tensor([0, 1]), config, [range(2)])
    expected = own.target + (initial_noise(0, range(2), SHAPE) if solver == "rk45" else 0)
    torch.testing.assert_close(samples, expected.expand(2, *SHAPE), atol=1e-4, rtol=1e-4)


def test_latents_are_in_the_scale_of_the_tokenizer(tiny_dit: LightningDiT) -> None:
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
        ({"guidance_end": -0.5}, r"guidance_end must lie in \[0, 1\], got -0.5"),
        ({"guidance_start": 0.6, "guidance_end": 0.5}, "must not exceed guidance_end, got 0.6 and 0.5"),
        ({"tolerance": 0.0}, r"tolerance must lie in \(0, 1\), got 0.0"),
    ],
)
def test_invalid_settings_are_refused(changes: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamplerConfig(**changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("solver", ["euler", "heun", "multistep", "adams", "sde"])
@pytest.mark.parametrize(
    ("guidance", "start", "end"),
    [(1.0, 0.0, 1.0), (2.5, 0.0, 1.0), (2.5, 0.25, 1.0), (2.5, 0.25, 0.7), (2.5, 1.0, 1.0)],
)
def test_evaluations_count_the_calls_of_the_generator(
    tiny_dit: LightningDiT, guidance: float, start: float, end: float, solver: Any
) -> None:
    config = SamplerConfig(solver=solver, steps=12, guidance=guidance, guidance_start=start, guidance_end=end)
    calls = rows_of(tiny_dit)
    sample_latents(tiny_dit, torch.tensor([1]), SampleNoise(0, [0], SHAPE), config)
    assert sum(len(labels) for _, labels in calls) == evaluations(config)


def test_the_adaptive_solver_has_no_fixed_number_of_evaluations() -> None:
    assert evaluations(SamplerConfig(solver="rk45")) is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_decoding_beside_sampling_changes_nothing(tiny_pae: PAE, tiny_dit: LightningDiT) -> None:
    pae, dit, labels = tiny_pae.cuda(), tiny_dit.cuda(), balanced_labels(8, 2)
    config = SamplerConfig(solver="sde", steps=6, guidance=2.0)
    samples = torch.cat(list(sample_images(pae, dit, labels, config, batch_size=3)))
    batches = [range(0, 3), range(3, 6), range(6, 8)]
    with torch.no_grad():
        one_by_one = [pae.decode(z).clamp(0, 1).cpu() for z in sample_batches(dit, labels, config, batches)]
    assert torch.equal(samples, torch.cat(one_by_one))
    assert torch.equal(
        SampleNoise(0, range(3), SHAPE, "cuda").draw().cpu(), initial_noise(0, range(3), SHAPE)
    )
