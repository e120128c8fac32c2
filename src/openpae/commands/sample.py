"""Commands that make images."""

from __future__ import annotations

from pathlib import Path

from openpae import config as configs
from openpae.commands.console import (
    Device,
    Generator,
    Images,
    Out,
    Precision,
    Progress,
    Tokenizer,
    at_least_one,
)


def reconstruct(
    tokenizer: Tokenizer,
    images: Images,
    out: Out,
    /,
    count: int | None = None,
    batch_size: int = 16,
    device: Device = "auto",
) -> None:
    """Encode and decode images, write them as PNG under their own names, and print the PSNR.

    Args:
        tokenizer: a tokenizer folder or a run folder of pae train-tokenizer.
        images: folder of images, or packed images; each is centre-cropped to the tokenizer's size.
        out: folder for the reconstructions.
        count: images to take, from the first on; all by default.
        batch_size: images per forward pass; lower it if memory runs out.
        device: auto takes a GPU if there is one.
    """
    at_least_one(count=count, batch_size=batch_size)
    import torch

    from openpae.checkpoint import load_tokenizer
    from openpae.data.images import PackedImages, open_images
    from openpae.eval.reconstruction import ReconstructionMetrics
    from openpae.eval.streams import source_batches
    from openpae.report import to_image
    from openpae.train.settings import pick_device

    where = pick_device(device)
    model = load_tokenizer(tokenizer).to(where)
    source = open_images(images)
    rows = range(len(source) if count is None else min(count, len(source)))
    metrics = ReconstructionMetrics()
    with Progress("reconstructing", "img") as progress, torch.no_grad():
        done = 0
        for x in source_batches(source, model.config.image_shape, batch_size, rows):
            y = model.reconstruct(x.to(where)).float().cpu()
            metrics.update(x, y)
            for index, pixels in zip(range(done, done + len(y)), y, strict=True):
                name = f"{index:06d}" if isinstance(source, PackedImages) else source.name(index)
                target = (out / name).with_name(f"{Path(name).stem}.png")
                target.parent.mkdir(parents=True, exist_ok=True)
                to_image(pixels).save(target)
            done += len(y)
            progress(done, len(rows))
    for estimate in metrics.compute().values():
        print(estimate)


def sample(
    tokenizer: Tokenizer,
    generator: Generator,
    out: Out,
    /,
    count: int = 64,
    classes: tuple[int, ...] | None = None,
    seed: int = 0,
    steps: int = 249,
    shift: float = 0.4,
    guidance: float = 2.5,
    guidance_start: float = 0.25,
    batch_size: int = 32,
    precision: Precision = "fp32",
    columns: int = 8,
    device: Device = "auto",
) -> None:
    """Draw images with a generator and write samples.npz (ADM layout) and grid.png.

    Args:
        tokenizer: decodes the latents; the one that the generator was trained with.
        generator: a generator folder or a run folder of pae train-generator.
        out: folder for the samples.
        count: how many images.
        classes: class indices to draw, taken in turn; all classes by default.
        seed: sample i depends on (seed, i) alone, not on batch size or machine.
        steps: Euler steps.
        shift: of the time grid; smaller spends more steps near the noise.
        guidance: strength of classifier-free guidance; 1 is none.
        guidance_start: guide only where t >= this (0 = noise, 1 = data).
        batch_size: images at once.
        precision: of the networks; the path itself is followed in float32.
        columns: of the grid.
        device: auto takes a GPU if there is one.
    """
    at_least_one(count=count, batch_size=batch_size, columns=columns)
    import numpy as np
    import torch

    from openpae.checkpoint import check_pair, load_generator, load_tokenizer
    from openpae.eval.reconstruction import quantize
    from openpae.report import image_grid
    from openpae.sampling import SamplerConfig, balanced_labels, evaluations, sample_images
    from openpae.storage import whole_file, write_json
    from openpae.train.engine import autocast
    from openpae.train.settings import pick_device

    facts = check_pair(tokenizer, generator)
    where = pick_device(device)
    config = SamplerConfig(steps=steps, shift=shift, guidance=guidance, guidance_start=guidance_start)
    decoder, model = (
        load_tokenizer(tokenizer, decode_only=True).to(where),
        load_generator(generator).to(where),
    )
    labels = balanced_labels(count, model.config.num_classes)
    if classes is not None:
        labels = torch.tensor(classes)[torch.arange(count) % len(classes)]
    levels: list[torch.Tensor] = []
    shown: list[torch.Tensor] = []
    with Progress("sampling", "img") as progress, autocast(where, precision):
        for images in sample_images(decoder, model, labels, config, seed=seed, batch_size=batch_size):
            levels.append(quantize(images).permute(0, 2, 3, 1).cpu())
            if len(shown) * batch_size < 256:  # a picture that can still be looked at
                shown.append(images.cpu())
            progress(sum(map(len, levels)), count)
    out.mkdir(parents=True, exist_ok=True)
    with whole_file(out / "samples.npz") as partial, partial.open("wb") as file:
        np.savez(file, torch.cat(levels).numpy(), labels.numpy())
    image_grid(torch.cat(shown)[:256], columns).save(out / "grid.png")
    record = {
        "count": count,
        "seed": seed,
        "labels": "class-balanced" if classes is None else list(classes),
        "solver": "euler",
        "nfe": evaluations(config),
        "precision": precision,
        **configs.to_dict(config),
        **facts,
    }
    write_json(out / "samples.json", record)
    print(f"{count} samples in {out / 'samples.npz'}, picture in {out / 'grid.png'}")
