"""Commands that measure."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Annotated, Literal

import tyro

from openpae.commands.console import Device, Images, Progress, at_least_one


def evaluate(
    images: Images,
    /,
    tokenizer: Path | None = None,
    samples: Path | None = None,
    extractor: Literal["inception", "dinov2", "vgg16", "efficientnet-lite0", "random"] = "vgg16",
    extractor_weights: Path | None = None,
    lpips: Literal["vgg", "alex", "random"] = "vgg",
    lpips_weights: str | None = None,
    count: int | None = None,
    batch_size: int = 32,
    out: Path | None = None,
    device: Device = "auto",
) -> None:
    """Measure a tokenizer's reconstructions, or generated samples, against real images.

    Args:
        images: real images: a folder, or packed images.
        tokenizer: judge its reconstructions of them: PSNR, SSIM, LPIPS, Frechet distance.
        samples: judge these (samples.npz of pae sample) against them: Frechet distance, KID, precision,
            recall.
        extractor: features of the Frechet distance; distances of two extractors do not compare. inception
            is that of published FIDs.
        extractor_weights: inception: its weights file; dinov2: a local folder in place of the hub's.
        lpips: network of LPIPS.
        lpips_weights: its weights, where the package registry can not be reached: a file or folder of the usual
            ones (the lpips package's, torchvision's), or a name of the hub.
        count: real images to take for the reconstructions, from the first on; all by default.
        batch_size: images per forward pass.
        out: where the record (JSON) goes; by default evaluation.json beside what is judged.
        device: auto takes a GPU if there is one.
    """
    at_least_one(count=count, batch_size=batch_size)
    if (tokenizer is None) == (samples is None):
        raise ValueError("evaluate needs either --tokenizer or --samples")
    import torch

    from openpae import checkpoint
    from openpae.critics import load_perceptual
    from openpae.data.images import open_images
    from openpae.eval import records
    from openpae.eval.reference import npz_images
    from openpae.folders import identity_of
    from openpae.storage import read_json, write_json
    from openpae.train.settings import pick_device

    where = pick_device(device)
    source, features = open_images(images), records.load_extractor(extractor, extractor_weights)
    if isinstance(features, torch.nn.Module):
        features = features.to(where)
    if tokenizer is not None:
        model = checkpoint.load_tokenizer(tokenizer).to(where)
        distance = load_perceptual(lpips, lpips_weights).to(where)
        record = records.evaluate_reconstruction(
            model, source, extractor=features, lpips=distance, count=count, batch_size=batch_size
        )
        record["tokenizer"] = identity_of(tokenizer).fingerprint
    else:
        assert samples is not None
        stream = npz_images(samples, batch_size)
        if (first := next(stream, None)) is None:
            raise ValueError(f"{samples} holds no images")
        beside = samples.with_name("samples.json")
        record = records.evaluate_samples(
            itertools.chain([first], stream),
            source,
            extractor=features,
            size=first.shape[-1],
            batch_size=batch_size,
            facts={"sampler": read_json(beside)} if beside.is_file() else None,
        )
    for name, metric in record["metrics"].items():
        error = "" if metric["stderr"] is None else f" +- {metric['stderr']:.2g}"
        print(f"{name:20} {metric['value']:.5g}{error}")
    judged = tokenizer if tokenizer is not None else samples.parent  # type: ignore[union-attr]
    target = judged / "evaluation.json" if out is None else out
    write_json(target, record)
    print(f"record in {target}")


def profile(
    tokenizers: Annotated[tuple[str, ...], tyro.conf.arg(metavar="TOKENIZER")],
    /,
    images: Path,
    out: Path,
    label_maps: Path | None = None,
    label_images: Path | None = None,
    label_count: int = 500,
    ignore: int | None = None,
    scenes: int = 0,
    size: int | None = None,
    count: int = 5000,
    lpc_count: int = 200,
    lpips: Literal["vgg", "alex", "random"] = "vgg",
    lpips_weights: str | None = None,
    extractor: Literal["vgg16", "efficientnet-lite0", "dinov2", "random", "none"] = "vgg16",
    batch_size: int = 32,
    seed: int = 0,
    device: Device = "auto",
) -> None:
    """Measure the geometry of latent spaces (SSC, LPC, GSQ, eRank), and compare them in profile.html.

    A tokenizer is a folder of ours or of diffusers, diffusers:OWNER/NAME, encoder:NAME for the bare features
    of a VFM (encoder:NAME/8 with a token per 8 pixels), or python:FILE.py with your own encode and decode.

    Args:
        tokenizers: what to measure, one or several.
        images: folder of images, best with one subfolder per class (GSQ needs it), or packed images.
        out: folder for profile.json and profile.html.
        label_maps: for SSC: a folder of index PNGs named as their images, or a COCO panoptic JSON.
        label_images: the images of the label maps, if they are others than IMAGES.
        label_count: images with label maps to take, evenly spread.
        ignore: label that does not count, such as that of unlabelled pixels.
        scenes: for SSC without label maps: render so many emoji scenes, whose label maps are exact.
        size: side in pixels of all images; by default the first tokenizer's own.
        count: images to take, evenly spread.
        lpc_count: of these, images for LPC: each is decoded nine times.
        lpips: network of LPIPS.
        lpips_weights: its weights, as for pae evaluate.
        extractor: features of the Frechet distances; none leaves them out.
        batch_size: images per forward pass; lower it if memory runs out.
        seed: of directions, classes, clusters and scenes.
        device: auto takes a GPU if there is one.
    """
    from openpae.eval.measure import MeasureConfig
    from openpae.profile import run_profile
    from openpae.train.settings import pick_device

    with Progress("measuring", "img") as progress:
        found = run_profile(
            tokenizers,
            images,
            out,
            label_maps=label_maps,
            label_images=label_images,
            label_count=label_count,
            ignore=ignore,
            scenes=scenes,
            size=size,
            lpips=lpips,
            lpips_weights=lpips_weights,
            extractor=extractor,
            config=MeasureConfig(count=count, lpc_count=lpc_count, batch_size=batch_size, seed=seed),
            device=pick_device(device),
            progress=progress,
        )
    for one in found:
        print(f"{one.name}  {' x '.join(map(str, one.latent_shape))}  {one.fingerprint}")
        for estimate in one.metrics.values():
            print(f"  {estimate}")
        for name, reason in one.undefined.items():
            print(f"  {name} not defined: {reason}")
    print(f"open {out / 'profile.html'} in a browser")
