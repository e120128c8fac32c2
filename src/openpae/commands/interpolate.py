"""`pae interpolate`: images between two images, or between two seeds."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from openpae.commands.console import Device, Out, TokenizerPath
from openpae.commands.sampler import SamplerChoice, load_models
from openpae.config import check_number
from openpae.runtime.terminal import say

if TYPE_CHECKING:
    from torch import Tensor


def interpolate(
    tokenizer: TokenizerPath,
    out: Out,
    /,
    sampler: tyro.conf.OmitArgPrefixes[SamplerChoice],
    images: tuple[Path, Path] | None = None,
    generator: Path | None = None,
    seeds: tuple[int, int] | None = None,
    label: str | None = None,
    frames: int = 9,
    device: Device = "auto",
    overwrite: bool = False,
) -> None:
    """Interpolate between two images, or between two seeds of a generator; write strip.png and the frames.

    Two images are encoded and interpolated along the sphere of latents; the first and last frame are their
    reconstructions. Two seeds give two noises; the noises between them are sampled to images.

    Args:
        tokenizer: a tokenizer folder or a run folder of pae train-tokenizer.
        out: folder for strip.png and frames/.
        images: two image files; each is centre-cropped to the tokenizer's size.
        generator: a generator folder or a run folder of pae train-generator; needs seeds and label.
        seeds: two seeds; the first and last frame are sample 0 of each.
        label: class of the generated images, by number or name.
        frames: number of frames, both ends included.
        device: auto uses a GPU if there is one.
        overwrite: replace a strip.png or frames that this command did not make.
    """
    check_number("--frames", frames, "[2, 10000]")
    from openpae.data.pixels import image_grid, to_image
    from openpae.storage.files import atomic_file, atomic_folder
    from openpae.storage.outputs import check_claim, claim

    generated = (generator, seeds, label)
    if (images is None) == (None in generated) or (
        images is not None and any(x is not None for x in generated)
    ):
        raise ValueError(
            "interpolate needs either --images FIRST LAST, or --generator FOLDER --seeds FIRST LAST --label "
            "CLASS"
        )
    names, inputs = ("frames", "strip.png"), (tokenizer, generator, sampler.autoguidance, *(images or ()))
    check_claim(out, names, inputs=inputs, overwrite=overwrite)
    if images is not None:
        strip = _between_images(tokenizer, images, sampler, frames, device)
    else:
        strip = _between_seeds(tokenizer, generator, seeds, label, sampler, frames, device)  # type: ignore[arg-type]
    claim(out, names, inputs=inputs, overwrite=overwrite)
    with atomic_folder(out / "frames") as partial:
        for number, pixels in enumerate(strip):
            to_image(pixels).save(partial / f"{number:03d}.png")
    with atomic_file(out / "strip.png") as file:
        image_grid(strip, columns=frames).save(file, format="PNG")
    say(f"{frames} frames in {out / 'frames'}, side by side in {out / 'strip.png'}")


def _between_images(
    folder: Path, images: tuple[Path, Path], sampler: SamplerChoice, frames: int, device: str
) -> Tensor:
    import torch

    from openpae.data.crops import center_crop
    from openpae.data.decode import read_image
    from openpae.data.pixels import to_unit
    from openpae.models.saved import load_tokenizer
    from openpae.runtime.device import pick_device
    from openpae.sampling.interpolation import interpolate_images

    if sampler != SamplerChoice():
        raise ValueError("interpolating two images draws no samples: leave the sampler's options out")
    tokenizer = load_tokenizer(folder).to(pick_device(device))
    first, last = (
        to_unit(torch.from_numpy(center_crop(read_image(path), tokenizer.config.image_shape)))
        for path in images
    )
    return interpolate_images(tokenizer, first, last, frames)


def _between_seeds(
    folder: Path,
    generator: Path,
    seeds: tuple[int, int],
    label: str,
    sampler: SamplerChoice,
    frames: int,
    device: str,
) -> Tensor:
    from openpae.data.classes import typed_labels
    from openpae.runtime.device import autocast
    from openpae.sampling.interpolation import interpolate_seeds

    models = load_models(folder, generator, sampler, device)
    names, count = models.generator.class_names, models.generator.config.num_classes
    labels = typed_labels(generator, [label], names, count)
    if len(labels) > 1:
        raise ValueError(f"--label takes one class, got {label}")
    with autocast(models.device, sampler.precision):
        return interpolate_seeds(
            models.tokenizer,
            models.generator,
            sampler.config(),
            seeds=seeds,
            label=labels[0],
            frames=frames,
            batch_size=sampler.batch_size,
            weak=models.weak,
        )
