"""Training a generator without a cache: the tokenizer encodes augmented images at each step."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from openpae import Pipeline
from openpae.data.images import PackedImages
from openpae.data.shards import Shards
from openpae.data.training import ImageBatch, LatentBatch
from openpae.engine.settings import LoopConfig, OptimConfig
from openpae.models.configs import LightningDiTConfig, PAEConfig
from openpae.models.saved import load_generator, load_tokenizer, write_tokenizer
from openpae.storage.model_folder import identity_of
from openpae.train.generator import GeneratorTask, train_generator
from openpae.train.online import OnlineLatents
from openpae.train.settings import GeneratorRun


@pytest.fixture
def run(tiny_dit_config: LightningDiTConfig, tokenizer_folder: Path, packed: PackedImages) -> GeneratorRun:
    return GeneratorRun(
        model=tiny_dit_config,
        latents=tokenizer_folder,
        images=packed.shards.folder,
        optim=OptimConfig(lr=1e-2),
        loop=LoopConfig(steps=4, global_batch_size=8, precision="fp32", ema_decay=0.5, device="cpu"),
    )


def test_flips_give_the_latents_of_a_cache(run: GeneratorRun, latents: Shards) -> None:
    """The same images in the same order, mirrored alike; a cache rounds to 8 bits of mantissa."""
    online = GeneratorTask(run)
    cached = GeneratorTask(replace(run, images=None, latents=latents.folder))
    assert isinstance(online.latents, OnlineLatents)
    for made, kept in zip(online.batches(range(3)), cached.batches(range(3)), strict=True):
        assert isinstance(made, ImageBatch)
        assert isinstance(kept, LatentBatch)
        assert torch.equal(made.labels, kept.labels)
        z = online.latents.encode(made.images)
        torch.testing.assert_close(z, kept.latents.float(), rtol=2**-8, atol=1e-4)
    assert online.inputs["tokenizer"] == cached.inputs["tokenizer"]
    assert online.classes == cached.classes


def test_statistics_are_those_of_the_augmented_images(run: GeneratorRun, packed: PackedImages) -> None:
    task = GeneratorTask(replace(run, augment="none"))
    with torch.no_grad():
        z = load_tokenizer(run.latents).encode(packed.shards.gather(range(len(packed))) / 255)  # type: ignore[arg-type]
    mean, std = z.mean((0, 2, 3)), z.std((0, 2, 3), correction=0)
    torch.testing.assert_close(task.model.latent_mean.flatten(), mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(task.model.latent_std.flatten(), std, rtol=1e-4, atol=1e-5)


def test_random_crops_are_trained_on_and_the_pair_samples(run: GeneratorRun, tmp_path: Path) -> None:
    crops = replace(run, augment="crop", resize=36)
    train_generator(crops, tmp_path, quiet=True)
    assert identity_of(tmp_path).made_with == identity_of(run.latents).fingerprint
    assert Pipeline.join(run.latents, tmp_path)([0, 1], steps=2, output="tensor").shape == (2, 3, 32, 32)


def test_a_run_that_goes_on_equals_one_go(run: GeneratorRun, tmp_path: Path) -> None:
    train_generator(run, tmp_path / "one go", quiet=True)
    train_generator(replace(run, loop=replace(run.loop, steps=2)), tmp_path / "two", quiet=True)
    train_generator(run, tmp_path / "two", quiet=True)
    first, second = (load_generator(tmp_path / name).state_dict() for name in ("one go", "two"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_run_does_not_go_on_with_another_tokenizer(
    run: GeneratorRun, tiny_config: PAEConfig, tmp_path: Path
) -> None:
    train_generator(run, tmp_path / "run", quiet=True)
    model = load_tokenizer(run.latents)
    (tmp_path / "other").mkdir()
    state = {name: value + 0.01 for name, value in model.state_dict().items()}
    write_tokenizer(tmp_path / "other", state, tiny_config, identity_of(run.latents).made_with)
    longer = replace(run, latents=tmp_path / "other", loop=replace(run.loop, steps=6))
    with pytest.raises(ValueError, match="tokenizer"):
        train_generator(longer, tmp_path / "run", quiet=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": None, "image_size": 32}, "image_size, augment and resize need images"),
        ({"images": None, "augment": "none"}, "image_size, augment and resize need images"),
        ({"augment": "crop"}, "resize and augment crop must be given both, or neither"),
        ({"resize": 40}, "resize and augment crop must be given both, or neither"),
        ({"image_size": 0}, "image_size must be >= 1, got 0"),
    ],
)
def test_settings_that_do_not_fit_are_refused(
    run: GeneratorRun, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        replace(run, **changes)


def test_what_does_not_fit_the_generator_is_one_line(run: GeneratorRun) -> None:
    with pytest.raises(ValueError, match=r"holds latents of shape \(8, 8, 8\), the generator is built for"):
        GeneratorTask(replace(run, image_size=64))
    with pytest.raises(ValueError, match=r"augment 'crop' needs resize >= 32, got 31"):
        GeneratorTask(replace(run, augment="crop", resize=31))
