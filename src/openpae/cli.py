"""The command `pae`: one subcommand per act, each a thin call of a library function."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import tyro

from openpae import __version__
from openpae import config as configs

T = TypeVar("T")

Images = Annotated[Path, tyro.conf.arg(metavar="IMAGES")]
Out = Annotated[Path, tyro.conf.arg(metavar="OUT")]
Tokenizer = Annotated[Path, tyro.conf.arg(metavar="TOKENIZER")]
Generator = Annotated[Path, tyro.conf.arg(metavar="GENERATOR")]
Folder = Annotated[Path, tyro.conf.arg(metavar="FOLDER")]


def main(argv: Sequence[str] | None = None) -> None:
    """Run a subcommand; exit 0 if it succeeded, 2 with one line if it could not, 130 or 143 if it was
    stopped."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    name = arguments[0] if arguments else "--help"
    if name in ("-h", "--help"):
        print(_overview())
        return
    if name == "--version":
        print(f"openpae {__version__}")
        return
    if name not in COMMANDS:
        sys.exit(_fail(f"unknown command {name!r}; known: {', '.join(COMMANDS)}"))
    from openpae.train.engine import Stopped  # torch takes a second; --help does not need it

    try:
        COMMANDS[name](arguments[1:])
    except Stopped as stop:
        print(f"pae: {stop}", file=sys.stderr)
        sys.exit(128 + stop.signum)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # whoever read our output has left, such as head
        sys.stderr.close()
        sys.exit(1)
    except (ValueError, TypeError, OSError, FloatingPointError) as error:
        if debug:
            raise
        sys.exit(_fail(str(error)))
    except RuntimeError as error:
        if debug or "out of memory" not in str(error):
            raise
        sys.exit(_fail(f"{error}; lower --batch-size or loop.device_batch_size"))


def pack(
    images: Images,
    out: Out,
    /,
    size: int = 256,
    skip_broken: bool = False,
) -> None:
    """Decode and centre-crop a folder of images once, so that training reads them from a memory map.

    Args:
        images: folder with one subfolder per class, or with all images.
        out: folder for the packed images; an interrupted packing goes on.
        size: side in pixels.
        skip_broken: leave out files that can not be decoded, and name them.
    """
    _at_least_one(size=size)
    from openpae.data.images import ImageFolder, pack_images

    with _progress("packing", "img") as progress:
        packed = pack_images(ImageFolder(images), out, size=size, skip_broken=skip_broken, progress=progress)
    print(f"{len(packed):,} images of {len(packed.classes)} classes in {out}")
    _tell_skipped(packed.shards.index["skipped"])


def train_tokenizer(argv: Sequence[str]) -> None:
    """Train a tokenizer on images: pae train-tokenizer CONFIG RUN_DIR [--field value ...]."""
    from openpae.train.tokenizer import TokenizerRun, train_tokenizer

    run, run_dir = _run_of(TokenizerRun, argv, "train-tokenizer")
    with _progress("VFM features", "img") as progress:
        metrics = train_tokenizer(run, run_dir, progress=progress)
    _tell_run(run_dir, metrics)


def train_refiner(argv: Sequence[str]) -> None:
    """Train the targets of SSR and SCR on images: pae train-refiner CONFIG RUN_DIR [--field value ...]."""
    from openpae.train.refiner import RefinerRun, train_refiner

    run, run_dir = _run_of(RefinerRun, argv, "train-refiner")
    with _progress("VFM features", "img") as progress:
        metrics = train_refiner(run, run_dir, progress=progress)
    _tell_run(run_dir, metrics)


def train_generator(argv: Sequence[str]) -> None:
    """Train a generator on cached latents: pae train-generator CONFIG RUN_DIR [--field value ...]."""
    from openpae.train.generator import GeneratorRun, train_generator

    run, run_dir = _run_of(GeneratorRun, argv, "train-generator")
    _tell_run(run_dir, train_generator(run, run_dir))


def cache_latents(
    tokenizer: Tokenizer,
    images: Images,
    out: Out,
    /,
    batch_size: int = 64,
    precision: Literal["fp32", "bf16"] = "bf16",
    device: Literal["auto", "cpu", "cuda"] = "auto",
    skip_broken: bool = False,
) -> None:
    """Encode images and their mirror images once; the generator trains on the result.

    Args:
        tokenizer: a tokenizer folder or a run folder of pae train-tokenizer.
        images: folder of images, or packed images.
        out: folder for the latents; an interrupted run goes on.
        batch_size: images per forward pass.
        precision: bf16 is quicker on most machines.
        device: auto takes a GPU if there is one.
        skip_broken: leave out files that can not be decoded, and name them.
    """
    _at_least_one(batch_size=batch_size)
    from openpae import checkpoint
    from openpae.data import caches
    from openpae.data.images import open_images
    from openpae.train.engine import autocast
    from openpae.train.settings import pick_device

    where = pick_device(device)
    model = checkpoint.load_tokenizer(tokenizer).to(where)

    def encode(x: Any) -> Any:
        with autocast(where, precision):
            return model.encode(x)

    with _progress("encoding", "img") as progress:
        shards = caches.cache_latents(
            encode,
            open_images(images),
            out,
            image_size=model.config.image_size,
            latent_shape=model.config.latent_shape,
            tokenizer_print=checkpoint.identity_of(tokenizer).fingerprint,
            precision=precision,
            batch_size=batch_size,
            device=where,
            skip_broken=skip_broken,
            progress=progress,
        )
    print(f"{len(shards):,} latents {shards.shape[1:]} and their mirror images in {out}")
    _tell_skipped(shards.index["skipped"])


def reconstruct(
    tokenizer: Tokenizer,
    images: Images,
    out: Out,
    /,
    count: int | None = None,
    batch_size: int = 16,
    device: Literal["auto", "cpu", "cuda"] = "auto",
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
    _at_least_one(count=count, batch_size=batch_size)
    import torch

    from openpae.checkpoint import load_tokenizer
    from openpae.data.images import PackedImages, open_images
    from openpae.eval.reconstruction import ReconstructionMetrics
    from openpae.eval.records import source_batches
    from openpae.report import to_image
    from openpae.train.settings import pick_device

    where = pick_device(device)
    model = load_tokenizer(tokenizer).to(where)
    source = open_images(images)
    rows = range(len(source) if count is None else min(count, len(source)))
    metrics = ReconstructionMetrics()
    with _progress("reconstructing", "img") as progress, torch.no_grad():
        done = 0
        for x in source_batches(source, model.config.image_size, batch_size, rows):
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
    precision: Literal["fp32", "bf16"] = "fp32",
    columns: int = 8,
    device: Literal["auto", "cpu", "cuda"] = "auto",
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
    _at_least_one(count=count, batch_size=batch_size, columns=columns)
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
    with _progress("sampling", "img") as progress, autocast(where, precision):
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


def evaluate(
    images: Images,
    /,
    tokenizer: Path | None = None,
    samples: Path | None = None,
    extractor: Literal["inception", "dinov2", "vgg16", "efficientnet-lite0", "random"] = "vgg16",
    extractor_weights: Path | None = None,
    lpips: Literal["vgg", "alex", "random"] = "vgg",
    count: int | None = None,
    batch_size: int = 32,
    out: Path | None = None,
    device: Literal["auto", "cpu", "cuda"] = "auto",
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
        count: real images to take for the reconstructions, from the first on; all by default.
        batch_size: images per forward pass.
        out: where the record (JSON) goes; by default evaluation.json beside what is judged.
        device: auto takes a GPU if there is one.
    """
    _at_least_one(count=count, batch_size=batch_size)
    if (tokenizer is None) == (samples is None):
        raise ValueError("evaluate needs either --tokenizer or --samples")
    import torch

    from openpae import checkpoint
    from openpae.data.images import open_images
    from openpae.eval import records
    from openpae.eval.reference import npz_images
    from openpae.storage import read_json, write_json
    from openpae.train.settings import pick_device
    from openpae.train.tokenizer import load_perceptual

    where = pick_device(device)
    source, features = open_images(images), records.load_extractor(extractor, extractor_weights)
    if isinstance(features, torch.nn.Module):
        features = features.to(where)
    if tokenizer is not None:
        model = checkpoint.load_tokenizer(tokenizer).to(where)
        distance = load_perceptual(lpips).to(where)
        record = records.evaluate_reconstruction(
            model, source, extractor=features, lpips=distance, count=count, batch_size=batch_size
        )
        record["tokenizer"] = checkpoint.identity_of(tokenizer).fingerprint
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
    extractor: Literal["vgg16", "efficientnet-lite0", "dinov2", "random", "none"] = "vgg16",
    batch_size: int = 32,
    seed: int = 0,
    device: Literal["auto", "cpu", "cuda"] = "auto",
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
        extractor: features of the Frechet distances; none leaves them out.
        batch_size: images per forward pass; lower it if memory runs out.
        seed: of directions, classes, clusters and scenes.
        device: auto takes a GPU if there is one.
    """
    from openpae.eval.measure import MeasureConfig
    from openpae.profile import run_profile
    from openpae.train.settings import pick_device

    with _progress("measuring", "img") as progress:
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


def info(folder: Folder, /, verify: bool = False) -> None:
    """Say what a folder is: a run, a model, a cache, packed images or a folder of images.

    Args:
        folder: any of them.
        verify: also read everything and compare it with the checksums.
    """
    from openpae.describe import describe

    for name, value in describe(folder, verify=verify).items():
        print(f"{name:16} {value}")


def bench(what: Literal["loader", "metrics", "tokenizer"], /, out: Path | None = None) -> None:
    """Measure how fast a part is on this machine.

    Args:
        what: loader: latents per second and core from a warm cache; metrics: the Frechet distance of 50,000
            images, beside torch-fidelity's if that is installed; tokenizer: a step of the quickstart's full
            objective beside one of L1 + LPIPS.
        out: also write the result (JSON) here.
    """
    from openpae.bench import bench_loader, bench_metrics, bench_tokenizer
    from openpae.storage import write_json

    benches: dict[str, Callable[[], dict[str, Any]]] = {
        "loader": bench_loader,
        "metrics": bench_metrics,
        "tokenizer": bench_tokenizer,
    }
    result = benches[what]()
    print(json.dumps(result, indent=1))
    if out is not None:
        write_json(out, result)


def quickstart(
    out: Path = Path("runs/quickstart"),
    budget: str = "12min",
    seed: int = 0,
) -> None:
    """Train a small tokenizer and generator on emoji, sample, measure, and write report.html: all in one
    command.

    Args:
        out: folder for everything; the same command goes on where it was interrupted.
        budget: time for all of it: 3min, 12min, 2h.
        seed: of weights, data order and noise.
    """
    from openpae.quickstart import parse_budget, run_quickstart

    report = run_quickstart(out, parse_budget(budget), seed=seed)
    print(f"open {report} in a browser")


def _run_of(kind: type[T], argv: Sequence[str], command: str) -> tuple[T, Path]:
    """Config file and run folder first, flags over the file."""
    paths = [argument for argument in argv[:2] if not argument.startswith("-")]
    if len(paths) < 2:
        if any(argument in ("-h", "--help") for argument in argv) and not paths:
            print(
                f"usage: pae {command} CONFIG RUN_DIR [--field value ...]\n\n  with CONFIG, --help lists "
                "the fields"
            )
            sys.exit(0)
        if not paths:
            raise ValueError(
                f"pae {command} needs CONFIG and RUN_DIR: pae {command} CONFIG RUN_DIR [--field value]"
            )
    loaded = configs.load(kind, paths[0])
    run = tyro.cli(kind, default=loaded, args=list(argv[len(paths) :]), prog=f"pae {command} CONFIG RUN_DIR")
    if len(paths) < 2:
        raise ValueError(
            f"pae {command} needs a run folder after the config: pae {command} {paths[0]} RUN_DIR"
        )
    return run, Path(paths[1])


class _progress:
    """A progress bar as the callable (done, all) that the library takes."""

    def __init__(self, what: str, unit: str) -> None:
        from tqdm import tqdm

        self.bar = tqdm(desc=what, unit=unit, disable=None if sys.stderr.isatty() else True, file=sys.stderr)

    def __enter__(self) -> Callable[[int, int], None]:
        return self.update

    def update(self, done: int, total: int) -> None:
        """Move the bar to `done` of `total`."""
        self.bar.total = total
        self.bar.update(done - self.bar.n)

    def __exit__(self, *_: object) -> None:
        self.bar.close()


def _tell_run(run_dir: Path, metrics: dict[str, float]) -> None:
    shown = ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())
    print(f"done: {run_dir}" + (f" ({shown})" if shown else ""))


def _tell_skipped(names: Sequence[str]) -> None:
    if names:
        print(f"left out {len(names)} broken files: {'; '.join(names[:5])}{' ...' if len(names) > 5 else ''}")


def _at_least_one(**numbers: int | None) -> None:
    for name, number in numbers.items():
        if number is not None and number < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {number}")


def _fail(message: str) -> int:
    print(f"pae: error: {message}", file=sys.stderr)
    return 2


def _command(function: Callable[..., None], name: str) -> Callable[[Sequence[str]], None]:
    def run(argv: Sequence[str]) -> None:
        tyro.cli(function, args=list(argv), prog=f"pae {name}")

    run.__doc__ = function.__doc__
    return run


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    "quickstart": _command(quickstart, "quickstart"),
    "pack": _command(pack, "pack"),
    "train-refiner": train_refiner,
    "train-tokenizer": train_tokenizer,
    "cache-latents": _command(cache_latents, "cache-latents"),
    "train-generator": train_generator,
    "sample": _command(sample, "sample"),
    "reconstruct": _command(reconstruct, "reconstruct"),
    "evaluate": _command(evaluate, "evaluate"),
    "profile": _command(profile, "profile"),
    "info": _command(info, "info"),
    "bench": _command(bench, "bench"),
}


def _overview() -> str:
    rows = "\n".join(
        f"  {name:18} {(function.__doc__ or '').strip().splitlines()[0]}"
        for name, function in COMMANDS.items()
    )
    return (
        f"openpae {__version__}: prior-aligned autoencoders for latent diffusion\n\nusage: pae COMMAND "
        f"...\n\n{rows}\n\n"
        "  pae COMMAND --help lists the options; --debug shows the traceback of an error"
    )
