"""Commands that train, and that prepare the inputs of the next stage."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

from openpae.commands.console import (
    Device,
    Images,
    Out,
    Precision,
    TokenizerPath,
    at_least_one,
    print_classes,
    print_run,
    print_skipped,
    run_of,
    say_on_rank0,
    take_option,
)
from openpae.models.configs import size_fields
from openpae.runtime.terminal import Progress
from openpae.train.settings import GeneratorRun, RefinerRun, TokenizerRun


def train_tokenizer(argv: Sequence[str]) -> None:
    """Train a tokenizer on images: pae train-tokenizer CONFIG RUN_DIR [--field value ...]."""
    run, run_dir = run_of(TokenizerRun, argv, "train-tokenizer")
    operations = _operations(run)
    from openpae.runtime import processes
    from openpae.train.tokenizer import train_tokenizer

    with processes.process_group(run.loop.device), Progress("VFM features", "img") as progress:
        metrics = train_tokenizer(run, run_dir, progress=progress, operations=operations)
        print_run(run_dir, metrics)


def train_refiner(argv: Sequence[str]) -> None:
    """Train the refiner, the targets of SSR and SCR: pae train-refiner CONFIG RUN_DIR [--field value ...]."""
    run, run_dir = run_of(RefinerRun, argv, "train-refiner")
    operations = _operations(run)
    from openpae.runtime import processes
    from openpae.train.refiner import train_refiner

    with processes.process_group(run.loop.device), Progress("VFM features", "img") as progress:
        metrics = train_refiner(run, run_dir, progress=progress, operations=operations)
        print_run(run_dir, metrics)


def train_generator(argv: Sequence[str]) -> None:
    """Train a generator on cached latents: pae train-generator CONFIG RUN_DIR [--field value ...].

    --model.size s, b, l, xl, 1p0b or 1p6b sets layers, width and heads.
    """
    argv, size = take_option(argv, "--model.size")

    def sized(run: GeneratorRun) -> GeneratorRun:
        fields = {} if size is None else size_fields(size)
        return replace(run, model=replace(run.model, **fields))

    run, run_dir = run_of(GeneratorRun, argv, "train-generator", sized)
    operations = _operations(run)
    from openpae.runtime import processes
    from openpae.train.generator import train_generator

    with processes.process_group(run.loop.device):
        print_run(run_dir, train_generator(run, run_dir, operations=operations))


def _operations(run: Any) -> float | None:
    """The operations of an image, if loop.count_operations asks for them. Rank 0 writes the log."""
    if not run.loop.count_operations or int(os.environ.get("RANK", "0")):
        return None
    from openpae.plan.trial import operations_per_image

    return operations_per_image(run)


def cache_latents(
    tokenizer: TokenizerPath,
    images: Images,
    out: Out,
    /,
    size: int | None = None,
    width: int | None = None,
    batch_size: int = 64,
    precision: Precision = "bf16",
    device: Device = "auto",
    skip_broken: bool = False,
    whole_content: bool = False,
) -> None:
    """Encode images and their mirror images once; pae train-generator reads the result.

    Args:
        tokenizer: a tokenizer folder or a run folder of pae train-tokenizer; or of another kind:
            diffusers:FOLDER, python:FILE, encoder:NAME (no pictures can be drawn of its latents).
        images: folder of images, or packed images.
        out: folder for the latents; an interrupted command resumes when it is run again.
        size: side of the images in pixels, or their height if width is given; by default the tokenizer's.
        width: width in pixels; by default the images are square.
        batch_size: images per forward pass.
        precision: precision of the encoder; bf16 is faster on most machines.
        device: auto uses a GPU if there is one.
        skip_broken: leave out files that cannot be decoded, and name them.
        whole_content: compute the fingerprint of a folder of images from all bytes, as in pae pack.
    """
    at_least_one(size=size, width=width, batch_size=batch_size)
    if width is not None and size is None:
        raise ValueError("--width needs --size, the height of the images")
    from openpae.data.images import open_images
    from openpae.interop.any_tokenizer import AnyTokenizer
    from openpae.interop.kinds import home_of
    from openpae.interop.spaces import open_tokenizer
    from openpae.runtime import processes
    from openpae.runtime.device import pick_device
    from openpae.storage.outputs import check_outputs

    check_outputs(into=out, inputs=[home_of(tokenizer), images])
    with processes.process_group(device):
        torch_device = pick_device(device)
        model = AnyTokenizer(open_tokenizer(tokenizer, torch_device), torch_device)
        with Progress("encoding", "img") as progress:
            shards = model.cache_latents(
                open_images(images, full_hash=whole_content),
                out,
                size=None if size is None else (size, size if width is None else width),
                precision=precision,
                batch_size=batch_size,
                skip_broken=skip_broken,
                progress=progress,
            )
        say_on_rank0(f"{len(shards):,} latents {shards.shape[1:]} and their mirror images in {out}")
        print_classes(shards.attributes["classes"], shards.labels)
        print_skipped(shards.index["skipped"])


def fit_targets(
    encoder: str,
    images: Images,
    out: Out,
    /,
    kind: Literal["pca", "random"] = "pca",
    latent_dim: int = 32,
    image_size: int = 256,
    patch_size: int = 16,
    count: int = 10_000,
    batch_size: int = 32,
    seed: int = 0,
    encoder_source: str | None = None,
    device: Device = "auto",
) -> None:
    """Fit raw targets of SSR and SCR: a PCA or random projection of VFM features, not refined (Table 2b).

    Args:
        encoder: name of the VFM, such as dinov2-l.
        images: folder of images, or packed images.
        out: folder for the targets, the --prior of pae train-tokenizer.
        kind: pca fits principal components; random uses no image.
        latent_dim: channels of the tokenizer's latent.
        image_size: side in pixels of the tokenizer's images.
        patch_size: pixels per token and axis of the tokenizer's decoder.
        count: number of images, evenly spread.
        batch_size: images per forward pass.
        seed: seed of the random projection.
        encoder_source: hub name or local folder of the VFM's weights.
        device: auto uses a GPU if there is one.
    """
    at_least_one(latent_dim=latent_dim, image_size=image_size, patch_size=patch_size)
    at_least_one(count=count, batch_size=batch_size)
    from openpae.data.images import open_images
    from openpae.models.encoders import load_encoder
    from openpae.runtime.device import pick_device
    from openpae.storage.outputs import check_outputs
    from openpae.train import targets

    check_outputs(out, inputs=[images])
    source = open_images(images)  # a wrong path is an error before the encoder is loaded
    with Progress("VFM features", "img") as progress:
        targets.fit_targets(
            load_encoder(encoder, encoder_source),
            source,
            out,
            kind=kind,
            latent_dim=latent_dim,
            image_size=image_size,
            patch_size=patch_size,
            count=count,
            batch_size=batch_size,
            seed=seed,
            device=pick_device(device),
            progress=progress,
        )
    print(f"raw targets ({kind}, {latent_dim} channels) in {out}; use: train-tokenizer --prior {out}")
