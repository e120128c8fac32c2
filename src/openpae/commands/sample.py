"""Commands that make images."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from openpae import config as configs
from openpae.commands.console import (
    Device,
    GeneratorPath,
    Images,
    Out,
    Precision,
    Progress,
    ReferencePath,
    TokenizerPath,
    at_least_one,
    say,
)
from openpae.eval.settings import ExtractorName, SearchConfig
from openpae.sampling.settings import FILES, Format, SamplerConfig, Solver

if TYPE_CHECKING:
    from torch import Tensor

    from openpae.sampling.pipeline import SamplingModels


@dataclass(frozen=True, kw_only=True)
class SamplerChoice:
    """A preset of the sampler, and flags over it."""

    preset: str = "official-250"
    """official-250 (the paper's guided samples), official-sde (its unguided ones), fast-45, few-15, or a file
    of kind SamplerConfig, such as the best.yaml of pae search-guidance. The flags below change it."""
    solver: Solver | None = None
    """euler, heun and multistep (second order) follow the ODE, sde the SDE; rk45 is adaptive and slow."""
    steps: int | None = None
    """Steps of the time grid."""
    shift: float | None = None
    """Of the time grid; smaller spends more steps near the noise."""
    guidance: float | None = None
    """Strength; 1 is none."""
    guidance_start: float | None = None
    """Guide only where t >= this (0 = noise, 1 = data)."""
    guidance_end: float | None = None
    """Guide only where t <= this."""
    autoguidance: Path | None = None
    """A smaller or less trained generator of the same latents, which guides in place of the null class."""
    batch_size: int = 32
    """Images at once."""
    precision: Precision = "fp32"
    """Of the networks; the path itself is followed in float32."""
    compile: bool = False
    """Compile the generators; worth it for many images."""

    def config(self) -> SamplerConfig:
        """The preset with the flags over it.

        Raises:
            FileNotFoundError: no such preset.
            ValueError: a value that a sampler refuses, or steps for a solver that finds its own.
        """
        at_least_one(batch_size=self.batch_size)
        named = "/" in self.preset or Path(self.preset).is_file()
        preset = configs.load(SamplerConfig, self.preset if named else f"sampler/{self.preset}")
        guidance = ("guidance", "guidance_start", "guidance_end")
        flags = {
            name: value
            for name in ("solver", "steps", "shift", *guidance)
            if (value := getattr(self, name)) is not None
        }
        if flags.keys() & set(guidance):
            flags["tuned_on"] = None
        config = replace(preset, **flags)
        if config.solver == "rk45" and (given := flags.keys() & {"steps", "shift"}):
            raise ValueError(f"solver rk45 finds its own steps: leave --{' and --'.join(sorted(given))} out")
        return config


@dataclass(frozen=True, kw_only=True)
class SampleRun:
    """What is drawn, and how it is kept."""

    count: int | None = None
    """How many images; 64 by default, and with grid `columns` of each class."""
    classes: tuple[int, ...] | None = None
    """Class indices to draw, taken in turn; all classes by default, and with grid eight of them."""
    grid: bool = False
    """Draw `columns` images of each class, so that every row of the picture is one class."""
    columns: int = 8
    """Of the picture."""
    seed: int = 0
    """Another seed, other samples."""
    format: Format = "npz"
    """npz: samples.npz in the layout of ADM; png: a folder of images; safetensors: uint8 images and labels;
    latents: the same of latents, not decoded."""

    # No __post_init__: tyro would put what it raises into a frame of its own.
    def check(self) -> None:
        """Refuse what cannot be drawn.

        Raises:
            ValueError: a count below 1, or one beside `grid`.
        """
        at_least_one(count=self.count, columns=self.columns)
        if self.grid and self.count is not None:
            raise ValueError("--grid draws --columns images of each class: leave --count out")

    def labels(self, num_classes: int | Sequence[int]) -> tuple[Tensor, str]:
        """The class of every sample, and what a record says of them; the classes as `balanced_labels` takes
        them."""
        import torch

        from openpae.sampling.sampler import balanced_labels

        known = range(num_classes) if isinstance(num_classes, int) else num_classes
        if self.grid:
            spread = torch.linspace(0, len(known) - 1, min(8, len(known))).round().long().tolist()
            chosen = list(self.classes or [known[i] for i in spread])
            return torch.tensor(chosen).repeat_interleave(self.columns), f"{self.columns} each of {chosen}"
        count = 64 if self.count is None else self.count
        if self.classes is None:
            return balanced_labels(count, num_classes), "class-balanced"
        return torch.tensor(self.classes)[torch.arange(count) % len(self.classes)], f"in turn {self.classes}"


def reconstruct(
    tokenizer: TokenizerPath,
    images: Images,
    out: Out,
    /,
    count: int | None = None,
    batch_size: int = 16,
    device: Device = "auto",
    overwrite: bool = False,
) -> None:
    """Encode and decode images, write them as PNG under their own names, and print the PSNR.

    Args:
        tokenizer: a tokenizer folder or a run folder of pae train-tokenizer.
        images: folder of images, or packed images; each is centre-cropped to the tokenizer's size.
        out: folder for the reconstructions.
        count: images to take, from the first on; all by default.
        batch_size: images per forward pass; lower it if memory runs out.
        device: auto takes a GPU if there is one.
        overwrite: replace files of these names that this command did not make.
    """
    at_least_one(count=count, batch_size=batch_size)
    import torch

    from openpae.data.images import PackedImages, open_images
    from openpae.data.pixels import to_image
    from openpae.eval.image_stream import source_batches
    from openpae.eval.reconstruction import ReconstructionMetrics
    from openpae.models.saved import load_tokenizer
    from openpae.runtime.device import pick_device
    from openpae.storage.files import atomic_file
    from openpae.storage.outputs import claim, run_lock

    where = pick_device(device)
    model = load_tokenizer(tokenizer).to(where)
    source = open_images(images)
    rows = range(len(source) if count is None else min(count, len(source)))
    names = _names([f"{i:06d}" if isinstance(source, PackedImages) else source.name(i) for i in rows], out)
    claim(out, names, inputs=(tokenizer, images), overwrite=overwrite)
    metrics = ReconstructionMetrics()
    with run_lock(out, "reconstructing"), Progress("reconstructing", "img") as progress, torch.no_grad():
        done = 0
        for x in source_batches(source, model.config.image_shape, batch_size, rows):
            y = model.reconstruct(x.to(where)).float().cpu()
            metrics.update(x, y)
            for name, pixels in zip(names[done : done + len(y)], y, strict=True):
                (out / name).parent.mkdir(parents=True, exist_ok=True)
                with atomic_file(out / name) as partial:
                    to_image(pixels).save(partial, format="PNG")
            done += len(y)
            progress(done, len(rows))
    for estimate in metrics.compute().values():
        print(estimate)


def _names(images: list[str], out: Path) -> list[str]:
    """The name of each image's PNG; ValueError where one would replace another (a.jpg and a.png)."""
    first: dict[str, str] = {}
    for image in images:
        name = Path(image).with_name(f"{Path(image).stem}.png").as_posix()
        if (other := first.setdefault(name, image)) != image:
            raise ValueError(f"{other} and {image} would both become {out / name}; rename one")
    return list(first)


def sample(
    tokenizer: TokenizerPath,
    generator: GeneratorPath,
    out: Out,
    /,
    run: tyro.conf.OmitArgPrefixes[SampleRun],
    sampler: tyro.conf.OmitArgPrefixes[SamplerChoice],
    device: Device = "auto",
    overwrite: bool = False,
) -> None:
    """Draw images with a generator: samples.npz (ADM layout), a folder, or tensors; and grid.png to look at.

    The same command goes on where it was interrupted. torchrun splits the work over processes; sample i
    depends on (seed, i) alone.

    Args:
        tokenizer: decodes the latents; the one that the generator was trained with.
        generator: a generator folder or a run folder of pae train-generator.
        out: folder for the samples.
        device: auto takes a GPU if there is one.
        overwrite: replace what has the names of these files in the folder.
    """
    from openpae.runtime import processes
    from openpae.runtime.device import autocast
    from openpae.sampling.sample_set import SampleSet, write_samples
    from openpae.storage.model_folder import seen_classes

    run.check()
    config = sampler.config()
    with processes.process_group(device):
        models = _load(tokenizer, generator, sampler, device)
        classes = seen_classes(generator, models.generator.config.num_classes, run.classes)
        labels, scheme = run.labels(classes)
        samples = SampleSet(
            labels=labels,
            scheme=scheme,
            sampler=config,
            seed=run.seed,
            batch_size=sampler.batch_size,
            format=run.format,
            columns=run.columns,
            facts=models.facts,
        )
        with Progress("sampling", "batch") as progress, autocast(models.device, sampler.precision):
            write_samples(
                out,
                samples,
                models.tokenizer,
                models.generator,
                weak=models.weak,
                progress=progress,
                inputs=(tokenizer, generator, sampler.autoguidance),
                overwrite=overwrite,
            )
        if processes.is_rank0():
            picture = "" if run.format == "latents" else f", picture in {out / 'grid.png'}"
            say(f"{len(labels)} samples in {out / FILES[run.format]}{picture}")


def interpolate(
    tokenizer: TokenizerPath,
    out: Out,
    /,
    sampler: tyro.conf.OmitArgPrefixes[SamplerChoice],
    images: tuple[Path, Path] | None = None,
    generator: Path | None = None,
    seeds: tuple[int, int] | None = None,
    label: int | None = None,
    frames: int = 9,
    device: Device = "auto",
    overwrite: bool = False,
) -> None:
    """Walk between two images, or between two seeds of a generator; write strip.png and the frames.

    Images are encoded, and the walk goes along the sphere of latents; its ends are their reconstructions.
    Seeds give the noise at both ends, and every noise between is followed to an image.

    Args:
        tokenizer: encodes and decodes.
        out: folder for strip.png and frames/.
        images: two image files; each is centre-cropped to the tokenizer's size.
        generator: with seeds and label: a generator folder or a run folder of pae train-generator.
        seeds: two seeds; the ends are sample 0 of each.
        label: class of the generated images.
        frames: pictures of the walk, the two ends counted.
        device: auto takes a GPU if there is one.
        overwrite: replace a strip.png or frames that this command did not make.
    """
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
        walk = _walk_of_images(tokenizer, images, sampler, frames, device)
    else:
        walk = _walk_of_seeds(tokenizer, generator, seeds, label, sampler, frames, device)  # type: ignore[arg-type]
    claim(out, names, inputs=inputs, overwrite=overwrite)
    with atomic_folder(out / "frames") as partial:
        for number, pixels in enumerate(walk):
            to_image(pixels).save(partial / f"{number:03d}.png")
    with atomic_file(out / "strip.png") as file:
        image_grid(walk, columns=frames).save(file, format="PNG")
    say(f"{frames} frames in {out / 'frames'}, side by side in {out / 'strip.png'}")


def search_guidance(
    tokenizer: TokenizerPath,
    generator: GeneratorPath,
    reference: ReferencePath,
    out: Out,
    /,
    search: tyro.conf.OmitArgPrefixes[SearchConfig],
    sampler: tyro.conf.OmitArgPrefixes[SamplerChoice],
    extractor: ExtractorName = "vgg16",
    extractor_weights: Path | None = None,
    device: Device = "auto",
) -> None:
    """Tune scale and interval of guidance on the Frechet distance, and write search.json and best.yaml.

    pae sample --preset OUT/best.yaml draws with the best. A distance to the same reference is biased from
    then on, and the records say so. The same command goes on where it was interrupted; torchrun splits the
    work.

    Args:
        tokenizer: decodes the latents; the one that the generator was trained with.
        generator: a generator folder or a run folder of pae train-generator.
        reference: real images (a folder, or packed images), an npz of the ADM layout, or a file of pae
            evaluate --save-reference.
        out: folder for the record and the best sampler.
        extractor: features of the distance; distances of two extractors do not compare.
        extractor_weights: inception: its weights file; dinov2: a local folder.
        device: auto takes a GPU if there is one.
    """
    import torch

    from openpae.eval.extractors import load_extractor
    from openpae.eval.guidance_search import SampleEvaluator
    from openpae.eval.guidance_search import search_guidance as run_search
    from openpae.eval.reference import open_reference
    from openpae.eval.run import check_reference
    from openpae.runtime import processes
    from openpae.storage.model_folder import trained_classes

    with processes.process_group(device):
        models = _load(tokenizer, generator, sampler, device)
        check_reference(reference, generator)
        features = load_extractor(extractor, extractor_weights)
        if isinstance(features, torch.nn.Module):
            features = features.to(models.device)
        evaluator = SampleEvaluator(
            models.tokenizer,
            models.generator,
            sampler.config(),
            extractor=features,
            reference=open_reference(reference, features, size=models.tokenizer.config.image_shape),
            search=search,
            num_classes=trained_classes(generator, models.generator.config.num_classes),
            batch_size=sampler.batch_size,
            precision=sampler.precision,
            weak=models.weak,
        )
        log = print if processes.is_rank0() else None
        inputs = (tokenizer, generator, reference, sampler.autoguidance, Path(sampler.preset))
        record = run_search(out, evaluator, facts=models.facts, log=log, inputs=inputs)
        if log is not None:
            best = record["best"]
            if record["verdict"]:
                print(record["verdict"])
            print(
                f"best: guidance {best['guidance']:g} from {best['guidance_start']:g} to "
                f"{best['guidance_end']:g}, kept in {out / 'best.yaml'}; {record['note']}"
            )
        if record["verdict"]:
            sys.exit(3)


def _load(tokenizer: Path, generator: Path, sampler: SamplerChoice, device: str) -> SamplingModels:
    from openpae.runtime.device import pick_device
    from openpae.sampling.pipeline import SamplingModels

    return SamplingModels.load(
        tokenizer,
        generator,
        sampler.autoguidance,
        device=pick_device(device),
        precision=sampler.precision,
        compile=sampler.compile,
    )


def _walk_of_images(
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
        raise ValueError("between two images nothing is sampled: leave the sampler's options out")
    tokenizer = load_tokenizer(folder).to(pick_device(device))
    first, last = (
        to_unit(torch.from_numpy(center_crop(read_image(path), tokenizer.config.image_shape)))
        for path in images
    )
    return interpolate_images(tokenizer, first, last, frames)


def _walk_of_seeds(
    folder: Path,
    generator: Path,
    seeds: tuple[int, int],
    label: int,
    sampler: SamplerChoice,
    frames: int,
    device: str,
) -> Tensor:
    from openpae.runtime.device import autocast
    from openpae.sampling.interpolation import interpolate_seeds

    models = _load(folder, generator, sampler, device)
    with autocast(models.device, sampler.precision):
        return interpolate_seeds(
            models.tokenizer,
            models.generator,
            sampler.config(),
            seeds=seeds,
            label=label,
            frames=frames,
            batch_size=sampler.batch_size,
            weak=models.weak,
        )
