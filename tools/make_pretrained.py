"""Train the pretrained release and write it: OpenMoji tokenizer and generator, bf16, cards and metrics.

An interrupted call goes on. Two and a half hours on one core:

    python tools/make_pretrained.py --work runs/openmoji --out pretrained/openmoji
"""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor

from openpae import config as configs
from openpae.data.images import PackedImages
from openpae.data.openmoji import CATEGORIES, emoji_catalog, pack_pictures, split_catalog
from openpae.eval.estimate import mean_of
from openpae.eval.evaluate import evaluate_reconstruction, evaluate_samples, metric_facts
from openpae.eval.extractors import load_extractor
from openpae.eval.features import features_of
from openpae.eval.image_stream import real_images, tensor_images
from openpae.eval.reference import reference_of
from openpae.models.lpips_weights import load_perceptual
from openpae.models.saved import check_pair, load_generator, load_tokenizer
from openpae.quickstart.run import SAMPLER, cache_pictures
from openpae.sampling.pipeline import Pipeline
from openpae.sampling.sampler import balanced_labels, sample_images
from openpae.storage import hub
from openpae.storage.files import write_json
from openpae.storage.model_folder import PARTS, README, RECORD
from openpae.train.generator import train_generator
from openpae.train.refiner import train_refiner
from openpae.train.settings import GeneratorRun, RefinerRun, TokenizerRun
from openpae.train.tokenizer import train_tokenizer

PICTURES = {"train": 3, "held-out": 2}
"""Of each emoji: another background, place and size."""
SAMPLES = 540
ABOUT = """## Data, attribution, licences

The models were trained on pictures of [OpenMoji](https://openmoji.org) emoji, rendered at 64 pixels on soft
backgrounds.

| pictures | count | emoji |
|---|---|---|
| training | {train:,} | nine of ten |
| held out and measured | {held_out:,} | the others |

All emojis designed by OpenMoji, the open-source emoji and icon project. Their licence is
[CC BY-SA 4.0](https://creativecommons.org/licenses/by-sa/4.0/). That is why these weights carry it too.

The frozen encoder, EfficientNet-Lite0 (ImageNet; Apache-2.0, package `efficientnet-lite-pytorch`), is not
in the files. It is fetched when images are encoded. LPIPS, in training and measuring, has weights of
torchvision's AlexNet and VGG16 (BSD).

The classes:

{classes}

## How it was trained

`python tools/make_pretrained.py` of the package openpae trained the presets `refiner/openmoji`,
`tokenizer/openmoji` and `generator/openmoji`, one after the other, on one core of a CPU.

| stage | steps | batch |
|---|---|---|
{steps}

The weights in the files are the moving averages, in bf16. The metrics are of these files, computed in
float32. PSNR and the other metrics of the tokenizer are of held-out emoji.

## What it is for, and what not

It shows what PAE does within a minute. It is meant for tests and for teaching. It is small and was trained
for hours on one core, where a model of the paper takes weeks of GPUs.

- Samples show faces with features, busts, hearts, boxes and flags as such. Of animals and vehicles they
  show the colours and shapes.
- It has never seen photographs.
- Distances are in VGG16 features, not Inception's. They do not compare with a published FID.
- `class_agreement` is the share of samples whose nearest training picture in these features has the class
  that was asked for (chance 0.11).
- `class_agreement_of_held_out` is the same of real held-out pictures.
"""


def main(
    work: Path = Path("runs/openmoji"), out: Path = Path("pretrained/openmoji"), threads: int = 1
) -> None:
    """Render, train all three stages, and write the release.

    Args:
        work: folder for data, caches and runs.
        out: folder for the release; replaced if it holds nothing but a saved pair.
        threads: of the processor.
    """
    torch.set_num_threads(threads)
    train(work)
    release(work, out)


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

    cache_pictures(work, images)
    generator = configs.load(GeneratorRun, "generator/openmoji")
    generator = dataclasses.replace(
        generator, latents=work / "latents" / "train", held_out_latents=work / "latents" / "held-out"
    )
    train_generator(generator, work / "generator")


def release(work: Path, out: Path) -> None:
    """The pair in bf16 with its metrics and its card."""
    with tempfile.TemporaryDirectory() as folder:
        pair = Path(folder) / "pair"
        trained = Pipeline.join(work / "tokenizer", work / "generator", decode_only=False)
        trained.save_pretrained(pair, precision="bf16")
        for part, record in measured(work, pair).items():
            write_json(pair / part / RECORD, record)
        hub.stage(pair, out, "pretrained/openmoji", licence="cc-by-sa-4.0")
    loops = {
        name: configs.load(kind, work / name / "config.yaml").loop
        for name, kind in (("refiner", RefinerRun), ("tokenizer", TokenizerRun), ("generator", GeneratorRun))
    }
    about = ABOUT.format(
        train=len(PackedImages(work / "data" / "train")),
        held_out=len(PackedImages(work / "data" / "held-out")),
        classes="\n".join(f"- {number}: {name}" for number, name in enumerate(CATEGORIES)),
        steps="\n".join(
            f"| {name} | {loop.steps:,} | {loop.global_batch_size} |" for name, loop in loops.items()
        ),
    )
    with (out / README).open("a", encoding="utf-8") as file:
        file.write(f"\n{about}")


def measured(work: Path, pair: Path) -> dict[str, dict[str, Any]]:
    """Held-out reconstructions and samples, of the files that are given away."""
    tokenizer, generator = load_tokenizer(pair / "tokenizer"), load_generator(pair / "generator")
    extractor = load_extractor("vgg16")  # not the encoder's own features: that would be circular
    train, held_out = (PackedImages(work / "data" / name) for name in PICTURES)
    streams = {
        "train": real_images(train, 64, name="emoji of the training set"),
        "held-out": real_images(held_out, 64, name="held-out emoji"),
    }
    labels = balanced_labels(SAMPLES, len(CATEGORIES))
    samples = torch.cat(list(sample_images(tokenizer, generator, labels, SAMPLER, seed=0, batch_size=60)))
    facts = {"labels": "class-balanced", "seed": 0, **configs.to_dict(SAMPLER)}
    streams["samples"] = tensor_images(samples, facts=facts | check_pair(*(pair / part for part in PARTS)))
    features = {name: features_of(stream, extractor, 60) for name, stream in streams.items()}
    reconstruction = evaluate_reconstruction(
        tokenizer,
        streams["held-out"],
        extractor=extractor,
        lpips=load_perceptual("vgg"),
        batch_size=64,
        min_samples=2,
    )
    generation = evaluate_samples(
        streams["samples"],
        reference_of(features["train"], streams["train"].name, streams["train"].preprocessing),
        extractor=extractor,
        batch_size=60,
        min_samples=2,
    )
    known = features["train"].features(), torch.tensor(train.labels)
    agreements = {
        "class_agreement": agreement(features["samples"].features(), labels, *known),
        "class_agreement_of_held_out": agreement(
            features["held-out"].features(), torch.tensor(held_out.labels), *known
        ),
    }
    generation["metrics"] |= metric_facts(
        {name: mean_of(name, hits, {"neighbours": 1, "chance": 1 / 9}) for name, hits in agreements.items()}
    )
    return {"tokenizer": reconstruction, "generator": generation}


def agreement(features: Tensor, labels: Tensor, known: Tensor, known_labels: Tensor) -> Tensor:
    """Whether the nearest known picture (cosine) has the same class: (n,) of 0 and 1."""
    similar = F.normalize(features, dim=1) @ F.normalize(known, dim=1).T
    return (known_labels[similar.argmax(dim=1)] == labels).float()


if __name__ == "__main__":
    tyro.cli(main)
