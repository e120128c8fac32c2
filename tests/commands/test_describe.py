"""`pae info` of samples."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from openpae.commands.describe import describe
from openpae.models.dit import LightningDiT
from openpae.models.tokenizer import PAE
from openpae.sampling.sample_set import SampleSet, write_samples
from openpae.sampling.settings import FILES, Format, SamplerConfig


@pytest.fixture(params=[*FILES])
def samples(request: pytest.FixtureRequest, tiny_pae: PAE, tiny_dit: LightningDiT, tmp_path: Path) -> Path:
    """Five samples in each format."""
    chosen = SampleSet(
        labels=torch.tensor([0, 1, 0, 1, 0]),
        scheme="class-balanced",
        sampler=SamplerConfig(steps=2),
        batch_size=2,
        format=request.param,
        columns=3,
        facts={"generator": "abc"},
    )
    write_samples(tmp_path / "out", chosen, tiny_pae, tiny_dit)
    return tmp_path / "out"


def change(samples: Path, format: Format) -> None:
    """One pixel or number of one sample."""
    target = samples / FILES[format]
    if format == "npz":
        with np.load(target) as file:
            images, labels = file["arr_0"], file["arr_1"]
        images[3, 0, 0, 0] ^= 1
        np.savez(target, images, labels)
    elif format == "png":
        file = target / "000003.png"
        pixels = np.array(Image.open(file))
        pixels[0, 0, 0] ^= 1
        Image.fromarray(pixels).save(file)
    else:
        tensors = load_file(target)
        name = "images" if format == "safetensors" else "latents"
        tensors[name][3, 0, 0, 0] += 1
        save_file(tensors, target)


def test_a_file_of_the_user_with_this_name_is_no_record(image_folder: Path) -> None:
    (image_folder / "samples.json").write_text('{"mine": 1}')
    try:
        assert describe(image_folder)["what"] == "a folder of images"
    finally:
        (image_folder / "samples.json").unlink()  # the folder is shared


def test_samples_are_described_and_verified(samples: Path) -> None:
    """A changed sample is noticed, whatever the format."""
    format = next(name for name, file in FILES.items() if (samples / file).exists())
    facts = describe(samples, verify=True)
    assert facts["what"] == "samples of a generator"
    assert facts["samples"] == f"5 in {FILES[format]}"
    assert facts["generator"] == "abc"
    assert facts["verified"] == "the samples are those of the record"
    change(samples, format)
    assert "verified" not in describe(samples)
    with pytest.raises(ValueError, match=r"was changed: its samples are not those of samples\.json"):
        describe(samples, verify=True)
