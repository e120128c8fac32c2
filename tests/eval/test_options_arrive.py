"""Every option of an evaluation takes effect: the numbers equal those of the library by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from openpae.data.crops import center_crop
from openpae.data.images import ImageFolder
from openpae.eval.extractors import load_extractor
from openpae.eval.features import FeatureSet
from openpae.eval.frechet import frechet_distance
from openpae.eval.run import run_evaluation
from openpae.eval.settings import EvaluationRun, SamplingOptions
from openpae.models.configs import LightningDiTConfig
from openpae.models.dit import LightningDiT
from openpae.models.saved import load_generator, load_tokenizer, write_generator
from openpae.sampling.sampler import balanced_labels, sample_images
from openpae.sampling.settings import SamplerConfig
from openpae.storage.model_folder import identity_of
from tests.conftest import shaken

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def generators(
    tokenizer_folder: Path, tiny_dit_config: LightningDiTConfig, tmp_path_factory: pytest.TempPathFactory
) -> list[Path]:
    """Two that fit the tokenizer."""
    folders = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        folder = tmp_path_factory.mktemp("generator")
        state = shaken(LightningDiT(tiny_dit_config)).state_dict()
        write_generator(folder, state, tiny_dit_config, identity_of(tokenizer_folder).fingerprint)
        folders.append(folder)
    return folders


@pytest.mark.parametrize("form", ["folder", "packed", "npz"])
@pytest.mark.parametrize("count", [4, None])
def test_as_many_images_are_reconstructed_as_asked_for(
    tokenizer_folder: Path, image_folder: Path, packed: Any, tmp_path: Path, form: str, count: int | None
) -> None:
    source = ImageFolder(image_folder)
    pixels = np.stack([center_crop(source.read(row), 32) for row in range(10)])
    reference = {"folder": image_folder, "packed": packed.shards.folder, "npz": tmp_path / "images.npz"}[form]
    if form == "npz":
        np.savez(reference, pixels.transpose(0, 2, 3, 1))
    run = EvaluationRun(
        tokenizer=tokenizer_folder, count=count, extractor="random", lpips="random", min_samples=2
    )
    record = run_evaluation(reference, run, CPU, batch_size=3)
    assert record is not None
    x = torch.from_numpy(pixels[:count]).double() / 255
    with torch.no_grad():
        y = load_tokenizer(tokenizer_folder).reconstruct(x.float())
    levels = (y.double() * 255).round() / 255  # as an image file holds them
    psnr = (-10 * torch.log10((levels - x).square().mean(dim=(1, 2, 3)))).mean().item()
    assert record["images"] == len(x)
    assert record["metrics"]["psnr"]["n"] == len(x)
    # A value that lies half way between two levels may be rounded either way.
    assert record["metrics"]["psnr"]["value"] == pytest.approx(psnr, abs=0.05)


def test_size_crops_the_reference(tokenizer_folder: Path, tmp_path: Path) -> None:
    """To another size than the tokenizer was trained at."""
    draws = np.random.default_rng(0)
    for number in range(3):
        pixels = draws.integers(0, 256, (48, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    run = EvaluationRun(
        tokenizer=tokenizer_folder, size=40, extractor="random", lpips="random", min_samples=2
    )
    record = run_evaluation(tmp_path, run, CPU)
    assert record is not None
    assert record["image_size"] == [40, 40]


def distance(
    tokenizer: Path, generators: list[Path], packed: Any, *, seed: int, weak: bool, bf16: bool
) -> float:
    """Of seven samples, drawn with the library."""
    model, guide = load_generator(generators[0]), load_generator(generators[1]) if weak else None
    config = SamplerConfig(steps=3, guidance=2.0, guidance_start=0.0)
    fake, real = FeatureSet(load_extractor("random")), FeatureSet(load_extractor("random"))
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        labels = balanced_labels(7, 2)
        images = list(
            sample_images(
                load_tokenizer(tokenizer), model, labels, config, seed=seed, weak=guide, batch_size=7
            )
        )
    fake.update(torch.cat(images).float())
    real.update(packed.shards.gather(np.arange(10)).float() / 255)
    return frechet_distance(fake.pooled.gaussian(), real.pooled.gaussian())


@pytest.mark.parametrize(
    ("name", "value"), [("seed", 5), ("autoguidance", True), ("precision", "bf16"), ("sampler", None)]
)
def test_how_samples_are_drawn(
    tokenizer_folder: Path, generators: list[Path], packed: Any, name: str, value: Any
) -> None:
    """Each option off its default, against samples that the library draws; they differ from the default's."""
    options = SamplingOptions(sampler=SamplerConfig(steps=3, guidance=2.0, guidance_start=0.0))
    run = EvaluationRun(
        tokenizer=tokenizer_folder, generator=generators[0], sample_count=7, extractor="random", min_samples=2
    )
    if name == "seed":
        run = replace(run, seed=value)
    elif name == "autoguidance":
        options = replace(options, autoguidance=generators[1])
    elif name == "precision":
        options = replace(options, precision=value)
    record = run_evaluation(packed.shards.folder, run, CPU, options=options)
    assert record is not None
    wanted = {"seed": 5 if name == "seed" else 0, "weak": name == "autoguidance", "bf16": name == "precision"}
    expected = distance(tokenizer_folder, generators, packed, **wanted)  # type: ignore[arg-type]
    plain = distance(tokenizer_folder, generators, packed, seed=0, weak=False, bf16=False)
    measured = record["metrics"]["frechet"]["value"]
    assert measured == pytest.approx(expected, rel=1e-3)
    if name in ("seed", "autoguidance"):
        assert abs(measured / plain - 1) > 0.01
    assert record["sampler"]["precision"] == ("bf16" if name == "precision" else "fp32")
