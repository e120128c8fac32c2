"""The discriminators depend on weights and input alone, and do not change frozen modules."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import ViTConfig, ViTModel

from openpae.models.configs import DiscriminatorConfig
from openpae.models.denoiser import LatentDenoiser
from openpae.models.discriminator import (
    AUGMENT_DRAWS,
    FeatureDiscriminator,
    PatchDiscriminator,
    SpectralConv2d,
    build_discriminator,
    diff_augment,
    frozen,
)
from openpae.objective.losses import denoising_loss, discriminator_hinge, generator_hinge
from openpae.runtime.draws import Draws


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def tiny_vit() -> ViTModel:
    """A ViT with dropout, to be caught if it wakes."""
    config = ViTConfig(
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=64,
        image_size=16,
        patch_size=4,
        hidden_dropout_prob=0.5,
    )
    return ViTModel(config, add_pooling_layer=False)


def features() -> FeatureDiscriminator:
    return FeatureDiscriminator(tiny_vit(), taps=(1, 3), head_dim=8)


def patch() -> PatchDiscriminator:
    return PatchDiscriminator(width=8, num_layers=2)


BOTH = pytest.mark.parametrize("make", [features, patch])
Make = Callable[[], nn.Module]


@BOTH
def test_asking_changes_nothing(make: Make) -> None:
    """In training mode too: the same logits however often it was asked, and not a bit of its state moved."""
    net = make().train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    images = torch.rand(2, 3, 16, 16)
    first = net(images)
    for _ in range(3):
        net(torch.rand(4, 3, 16, 16))
    assert torch.equal(net(images), first)
    assert torch.equal(net.eval()(images), first)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


@BOTH
def test_device_batches_give_the_gradients_of_one_batch(make: Make) -> None:
    net = make().train()
    real, fake = torch.rand(4, 3, 16, 16), torch.rand(4, 3, 16, 16)

    def gradients(parts: int) -> list[Tensor]:
        net.zero_grad()
        for r, f in zip(real.chunk(parts), fake.chunk(parts), strict=True):
            (discriminator_hinge(net(r), net(f)) / parts).backward()
        return [p.grad.clone() for p in net.parameters() if p.grad is not None]

    full, parts = gradients(1), gradients(2)
    assert len(full) == len([p for p in net.parameters() if p.requires_grad])
    torch.testing.assert_close(parts, full, rtol=1e-4, atol=1e-6)


@BOTH
def test_resumed_training_equals_uninterrupted_training(make: Make) -> None:
    """Weights and optimizer state are all there is to save."""

    def train(net: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
        for step in steps:
            generator = torch.Generator().manual_seed(step)
            real, fake = torch.rand(2, 2, 3, 16, 16, generator=generator)
            optimizer.zero_grad()
            discriminator_hinge(net(real), net(fake)).backward()
            optimizer.step()

    def start() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(1)
        net = make().train()
        return net, torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-2)

    (full, full_optimizer), (first, first_optimizer), (second, second_optimizer) = start(), start(), start()
    train(full, full_optimizer, range(4))
    train(first, first_optimizer, range(2))
    second.load_state_dict(first.state_dict())
    second_optimizer.load_state_dict(first_optimizer.state_dict())
    train(second, second_optimizer, range(2, 4))
    saved = second.state_dict()
    assert all(torch.equal(value, saved[name]) for name, value in full.state_dict().items())


@BOTH
def test_it_learns_to_tell_two_kinds_of_images(make: Make) -> None:
    """Noise from smooth images: the hinge loss falls well below the 2 of knowing nothing."""
    net = make().train()
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(30):
        real = F.interpolate(torch.rand(4, 3, 4, 4), size=16, mode="bilinear")
        loss = discriminator_hinge(net(real), net(torch.rand(4, 3, 16, 16)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 1


@BOTH
def test_the_autoencoder_gets_its_gradient_and_the_discriminator_none(make: Make) -> None:
    net = make().train()
    trained = [p for p in net.parameters() if p.requires_grad]
    decoded = torch.rand(2, 3, 16, 16, requires_grad=True)
    with frozen(net):
        loss = generator_hinge(net(decoded))
    loss.backward()
    assert decoded.grad is not None
    assert decoded.grad.abs().sum() > 0
    assert all(p.grad is None for p in net.parameters())
    assert [p for p in net.parameters() if p.requires_grad] == trained


@BOTH
def test_images_of_a_batch_do_not_meet(make: Make) -> None:
    net, images = make().train(), torch.rand(3, 3, 16, 16)
    torch.testing.assert_close(net(images)[1:2], net(images[1:2]), rtol=1e-4, atol=1e-5)


def test_the_backbone_stays_frozen_and_asleep() -> None:
    net = features().train()
    assert net.heads.training
    assert not any(module.training for module in net.backbone.modules())
    trained = {name.split(".")[0] for name, p in net.named_parameters() if p.requires_grad}
    assert trained == {"heads"}
    before = [p.clone() for p in net.backbone.parameters()]
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2, weight_decay=0.1)
    discriminator_hinge(net(torch.rand(2, 3, 16, 16)), net(torch.rand(2, 3, 16, 16))).backward()
    optimizer.step()
    assert all(map(torch.equal, before, net.backbone.parameters()))


def test_feature_logits_one_per_tap_and_token_at_any_size() -> None:
    net = features()
    for size in ((16, 16), (64, 64), (20, 32)):
        assert net(torch.rand(2, 3, *size)).shape == (2, 2, 16)


def test_heads_see_the_layers_they_name() -> None:
    """The first tap's logits do not change with the last block; the second's do."""
    net, images = features(), torch.rand(1, 3, 16, 16)
    before = net(images)
    with torch.no_grad():
        for parameter in net.backbone.layers[2].parameters():  # type: ignore[union-attr, index]
            parameter.add_(0.1 * torch.randn_like(parameter))
    after = net(images)
    assert torch.equal(after[:, 0], before[:, 0])
    assert not torch.allclose(after[:, 1], before[:, 1])


def test_patch_logits_have_the_sizes_of_pix2pix() -> None:
    net = PatchDiscriminator(width=4)
    assert net(torch.rand(1, 3, 256, 256)).shape == (1, 30, 30)
    assert net(torch.rand(1, 3, 64, 64)).shape == (1, 6, 6)
    assert net(torch.rand(1, 3, 24, 24)).shape == (1, 1, 1)


def test_patch_logits_look_at_70_pixels() -> None:
    images = torch.rand(1, 3, 256, 256, requires_grad=True)
    PatchDiscriminator(width=4)(images)[0, 15, 15].backward()
    assert images.grad is not None
    seen = images.grad.abs().sum(dim=(0, 1)).nonzero()
    assert (seen.max(dim=0).values - seen.min(dim=0).values + 1).tolist() == [70, 70]


@pytest.mark.parametrize(("inputs", "outputs", "kernel"), [(3, 16, 4), (64, 32, 3), (48, 48, 1), (32, 1, 4)])
def test_spectral_norm_is_the_largest_singular_value(inputs: int, outputs: int, kernel: int) -> None:
    """At most 5 % too small for random kernels, exact where one direction stands out, 1 at the start."""
    conv = SpectralConv2d(inputs, outputs, kernel)
    torch.testing.assert_close(conv.sigma(), torch.tensor(1.0))
    with torch.no_grad():
        conv.weight.normal_()
        exact = torch.linalg.matrix_norm(conv.weight.flatten(1), 2)
        assert 0.95 * exact <= conv.sigma() <= 1.0001 * exact
        conv.weight += 9 * torch.randn(outputs, 1, 1, 1) * torch.randn(1, inputs, kernel, kernel)
    exact = torch.linalg.matrix_norm(conv.weight.flatten(1), 2)
    torch.testing.assert_close(conv.sigma(), exact, rtol=1e-4, atol=0)


def test_spectral_norm_takes_the_scale_of_the_kernel_away() -> None:
    conv, x = SpectralConv2d(3, 4, 3), torch.rand(1, 3, 8, 8)
    before = conv(x)
    with torch.no_grad():
        conv.weight *= 7
    torch.testing.assert_close(conv(x), before)


def test_spectral_norm_is_float32_under_autocast() -> None:
    conv = SpectralConv2d(16, 16, 3)
    with torch.no_grad():
        conv.weight.normal_()
    with torch.autocast("cpu", torch.bfloat16):
        inside = conv.sigma()
    assert torch.equal(inside, conv.sigma())


def neutral(count: int) -> Tensor:
    """Draws of no colour change, no shift, and a hole in the middle."""
    return torch.tensor([0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5]).repeat(count, 1)


def test_augmentation_of_neutral_draws_only_cuts_a_hole() -> None:
    images = torch.rand(2, 3, 20, 40)
    out = diff_augment(images, neutral(2))
    changed = (out - images).abs().amax(dim=1) > 1e-6
    hole = torch.zeros(2, 20, 40, dtype=torch.bool)
    hole[:, 8:12, 16:24] = True  # a fifth of each side
    assert torch.equal(changed, hole)
    torch.testing.assert_close(out.movedim(1, -1)[hole], torch.full((2 * 4 * 8, 3), 0.5))


def test_augmentation_changes_colour_as_in_the_paper() -> None:
    """Brightness adds; saturation 0 leaves grey; contrast scales about the mean of the image."""
    images, outside = torch.rand(1, 3, 20, 20), torch.ones(20, 20, dtype=torch.bool)
    outside[8:12, 8:12] = False
    draws = neutral(1)
    draws[0, 0] = 0.9
    torch.testing.assert_close(diff_augment(images, draws)[..., outside], images[..., outside] + 0.2)
    draws = neutral(1)
    draws[0, 1] = 0
    grey = images.mean(dim=1, keepdim=True).expand_as(images)
    torch.testing.assert_close(diff_augment(images, draws)[..., outside], grey[..., outside])
    draws = neutral(1)
    draws[0, 2] = 0
    mean = images.mean()
    torch.testing.assert_close(
        diff_augment(images, draws)[..., outside], (mean + (images - mean) / 2)[..., outside]
    )


def test_augmentation_shifts_by_whole_pixels() -> None:
    images = torch.rand(1, 3, 16, 16)
    draws = neutral(1)
    draws[0, 3:] = torch.tensor([0.999, 0.0, 0.999, 0.999])  # down by 2, left by 2; the hole in a corner
    out = diff_augment(images, draws)
    torch.testing.assert_close(out[:, :, 2:13, :13], images[:, :, :11, 2:15])
    torch.testing.assert_close(out[:, :, :2], torch.full((1, 3, 2, 16), 0.5))
    torch.testing.assert_close(out[:, :, :, 14:], torch.full((1, 3, 16, 2), 0.5))


def test_augmentation_is_the_same_for_real_and_fake_and_differs_by_image() -> None:
    draws = torch.rand(4, AUGMENT_DRAWS)
    image = torch.rand(1, 3, 16, 16)
    one, two = diff_augment(image.expand(4, -1, -1, -1), draws), diff_augment(image.repeat(4, 1, 1, 1), draws)
    assert torch.equal(one, two)
    assert not torch.allclose(one[0], one[1])
    torch.testing.assert_close(diff_augment(image, draws[2:3]), one[2:3])


def test_augmentation_follows_the_rows_of_the_engine() -> None:
    """The draws of a device batch are those of its rows of the global batch."""
    images = torch.rand(4, 3, 16, 16)
    device = torch.device("cpu")
    full = Draws(0, 7, range(4), 4, device).uniform("augment", AUGMENT_DRAWS)
    part = Draws(0, 7, range(2, 4), 4, device).uniform("augment", AUGMENT_DRAWS)
    torch.testing.assert_close(diff_augment(images, full)[2:], diff_augment(images[2:], part))


def test_augmentation_passes_gradients() -> None:
    """To every pixel that is still seen, and to none under the hole."""
    images = torch.rand(1, 3, 20, 20, requires_grad=True)
    draws = neutral(1)
    draws[0, 1:3] = 0.3
    (diff_augment(images, draws) * torch.randn(1, 3, 20, 20)).sum().backward()
    assert images.grad is not None
    assert images.grad.isfinite().all()
    assert (images.grad[..., :8, :8].abs() > 0).all()


def test_denoiser_starts_at_no_velocity_and_learns() -> None:
    net = LatentDenoiser(8, width=16, num_layers=2)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    z = torch.ones(16, 8, 4, 4)  # easy to denoise: every latent is the same
    losses = []
    for _ in range(60):
        loss = denoising_loss(z, torch.randn(16, 8, 4, 4), torch.rand(16), net)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[0] == pytest.approx(2, abs=0.2)
    assert losses[-1] < 1


def test_build_reads_a_local_folder(tmp_path: Path) -> None:
    backbone = tiny_vit()
    backbone.save_pretrained(tmp_path)
    config = DiscriminatorConfig(source=str(tmp_path), taps=(1, 3), head_dim=8)
    net = build_discriminator(config)
    assert isinstance(net, FeatureDiscriminator)
    loaded = net.backbone.state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in backbone.state_dict().items())
    assert isinstance(build_discriminator(DiscriminatorConfig(kind="patch", width=4)), PatchDiscriminator)


def test_full_sizes() -> None:
    """Heads on DINO-S of 0.7 M weights each, and pix2pix's PatchGAN of 2.8 M."""
    with torch.device("meta"):
        dino = ViTModel(
            ViTConfig(hidden_size=384, num_attention_heads=6, intermediate_size=1536, patch_size=8)
        )
    heads = FeatureDiscriminator(dino).heads
    assert sum(p.numel() for p in heads.parameters()) == 4 * (384 * 256 + 256 * 256 * 9 + 256 + 2 * 256 + 1)
    assert sum(p.numel() for p in PatchDiscriminator().parameters()) == 2_764_737


def test_errors_name_what_was_given(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"H and W >= 12 for 2 layers of stride 2, got \(1, 3, 8, 16\)"):
        patch()(torch.rand(1, 3, 8, 16))
    with pytest.raises(ValueError, match=r"images must be \(B, 3, H, W\), got \(1, 1, 16, 16\)"):
        features()(torch.rand(1, 1, 16, 16))
    with pytest.raises(ValueError, match=r"taps must lie in \[1, 3\], the blocks of this ViT, got \(1, 4\)"):
        FeatureDiscriminator(tiny_vit(), taps=(1, 4))
    with pytest.raises(ValueError, match=r"counted from 1, in order, got \(3, 1\)"):
        DiscriminatorConfig(taps=(3, 1))
    with pytest.raises(ValueError, match=r"counted from 1, in order, got \(\)"):
        DiscriminatorConfig(taps=())
    with pytest.raises(ValueError, match=r"discriminator\.width must be >= 1, got 0"):
        DiscriminatorConfig(width=0)
    with pytest.raises(ValueError, match=r"draws \(B, 7\), got \(2, 3, 16, 16\) and \(2, 6\)"):
        diff_augment(torch.rand(2, 3, 16, 16), torch.rand(2, 6))
    with pytest.raises(
        FileNotFoundError, match=r"no weights of ViTModel at .*/none'.*discriminator\.kind patch"
    ):
        build_discriminator(DiscriminatorConfig(source=str(tmp_path / "none")))
    config: Any = tiny_vit().config
    config.save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="no weights of ViTModel"):
        build_discriminator(DiscriminatorConfig(source=str(tmp_path)))
