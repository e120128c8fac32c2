"""Train the pretrained release and write it: OpenMoji tokenizer and generator, bf16, cards and metrics.

An interrupted call goes on. About an hour and a half on one core:

    python pretrained/make.py --work runs/openmoji --out pretrained/openmoji
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
import tyro

from openpae import config as configs
from openpae.checkpoint import load_tokenizer
from openpae.data.caches import cache_latents
from openpae.data.openmoji import emoji_catalog, pack_pictures, split_catalog
from openpae.folders import identity_of
from openpae.train.generator import GeneratorRun, train_generator
from openpae.train.refiner import RefinerRun, train_refiner
from openpae.train.tokenizer import TokenizerRun, train_tokenizer

PICTURES = {"train": 3, "held-out": 2}
"""Of each emoji: another background, place and size."""


def main(
    work: Path = Path("runs/openmoji"), out: Path = Path("pretrained/openmoji"), threads: int = 1
) -> None:
    """Render, train all three stages, and write the release.

    Args:
        work: folder for data, caches and runs.
        out: new folder for the release.
        threads: of the processor.
    """
    torch.set_num_threads(threads)
    train(work)


def train(work: Path) -> None:
    """All three stages, from the presets refiner, tokenizer and generator/openmoji."""
    sides = dict(zip(PICTURES, split_catalog(emoji_catalog()), strict=True))
    images = {
        name: pack_pictures(work / "data" / name, sides[name], size=64, pictures=count, seed=seed)
        for seed, (name, count) in enumerate(PICTURES.items())
    }
    refiner = configs.load(RefinerRun, "refiner/openmoji")
    data = dataclasses.replace(refiner.data, images=work / "data" / "train", feature_cache=work / "features")
    train_refiner(dataclasses.replace(refiner, data=data), work / "refiner")

    run = configs.load(TokenizerRun, "tokenizer/openmoji")
    data = dataclasses.replace(
        run.data,
        images=work / "data" / "train",
        evaluation=work / "data" / "held-out",
        feature_cache=work / "features",
    )
    train_tokenizer(dataclasses.replace(run, prior=work / "refiner", data=data), work / "tokenizer")

    tokenizer = load_tokenizer(work / "tokenizer")
    for name, source in images.items():
        cache_latents(
            tokenizer.encode,
            source,
            work / "latents" / name,
            image_size=tokenizer.config.image_shape,
            latent_shape=tokenizer.config.latent_shape,
            tokenizer_print=identity_of(work / "tokenizer").fingerprint,
            flips=False,  # letters and flags do not mirror; the renderer has mirrored what may be
        )
    generator = configs.load(GeneratorRun, "generator/openmoji")
    generator = dataclasses.replace(
        generator, latents=work / "latents" / "train", held_out_latents=work / "latents" / "held-out"
    )
    train_generator(generator, work / "generator")


if __name__ == "__main__":
    tyro.cli(main)
