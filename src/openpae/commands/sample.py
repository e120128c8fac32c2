"""`pae sample`: draw images with a generator.

`pairs.with_pairs` has split a pair into its two folders before. `SamplingModels.load` opens tokenizer and
generator; of a run folder `storage.model_folder.model_folder` takes the newest checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from openpae.commands.console import Device, GeneratorPath, Out, TokenizerPath, at_least_one
from openpae.commands.sampler import SamplerChoice, load_models
from openpae.runtime.terminal import Progress, say
from openpae.sampling.settings import FILES, Format

if TYPE_CHECKING:
    from torch import Tensor

    from openpae.models.generator import LatentGenerator


@dataclass(frozen=True, kw_only=True)
class SampleRun:
    """Which samples to draw, and their file format."""

    count: int | None = None
    """Number of images; 64 by default. With grid it is `columns` per class."""
    classes: tuple[str, ...] | None = None
    """Numbers or names of classes (2,7 or cat,dog), used in turn; all classes by default, eight of them with
    grid. A list has commas or spaces; a name with a space needs quotes."""
    grid: bool = False
    """Draw `columns` images of each class, so that each row of grid.png is one class."""
    columns: int = 8
    """Columns of grid.png."""
    seed: int = 0
    """Seed of the noise."""
    format: Format = "npz"
    """npz: samples.npz in the layout of ADM; png: a folder of images; safetensors: uint8 images and labels;
    latents: latents and labels, not decoded."""

    # Not in __post_init__: tyro would print the error in its own frame.
    def check(self) -> None:
        """Check the counts.

        Raises:
            ValueError: a count is below 1, or is given together with `grid`.
        """
        at_least_one(count=self.count, columns=self.columns)
        if self.grid and self.count is not None:
            raise ValueError("--grid draws --columns images of each class: leave --count out")

    def labels(
        self, num_classes: int | Sequence[int], chosen: Sequence[int] | None = None
    ) -> tuple[Tensor, str]:
        """Return the class of each sample and its description for the record.

        Args:
            num_classes: as `balanced_labels` takes it.
            chosen: the labels of `classes`; None if none are given.
        """
        import torch

        from openpae.sampling.sampler import balanced_labels

        known = range(num_classes) if isinstance(num_classes, int) else num_classes
        if self.grid:
            spread = torch.linspace(0, len(known) - 1, min(8, len(known))).round().long().tolist()
            rows = list(chosen or [known[i] for i in spread])
            return torch.tensor(rows).repeat_interleave(self.columns), f"{self.columns} each of {rows}"
        count = 64 if self.count is None else self.count
        if chosen is None:
            return balanced_labels(count, num_classes), "class-balanced"
        return torch.tensor(chosen)[torch.arange(count) % len(chosen)], f"in turn {tuple(chosen)}"


def sample(
    tokenizer: TokenizerPath,
    generator: GeneratorPath,
    out: Out,
    /,
    run: tyro.conf.OmitArgPrefixes[SampleRun],
    sampler: tyro.conf.OmitArgPrefixes[SamplerChoice],
    device: Device = "auto",
    overwrite: bool = False,
) -> Mapping[str, Any]:
    """Draw images with a generator; write samples.npz (ADM layout), PNGs or tensors, and grid.png.

    An interrupted command resumes when it is run again. torchrun splits the work over processes; sample i
    depends on (seed, i) alone.

    Args:
        tokenizer: the tokenizer that the generator was trained with; it decodes the latents. A folder,
            diffusers:FOLDER or python:FILE.
        generator: a generator folder or a run folder of pae train-generator.
        out: folder for the samples.
        device: auto uses a GPU if there is one.
        overwrite: replace files of these names that this command did not make.
    """
    from openpae.interop.kinds import home_of
    from openpae.runtime import processes
    from openpae.runtime.device import autocast
    from openpae.sampling.sample_set import SampleSet, write_samples

    run.check()
    config = sampler.config()
    with processes.process_group(device):
        models = load_models(tokenizer, generator, sampler, device)
        labels, scheme = _labels(run, generator, models.generator)
        samples = SampleSet(
            labels=labels,
            scheme=scheme,
            sampler=config,
            seed=run.seed,
            batch_size=sampler.batch_size,
            format=run.format,
            columns=run.columns,
            facts=models.facts,
            class_names=models.generator.class_names,
        )
        with Progress("sampling", "batch") as progress, autocast(models.device, sampler.precision):
            record = write_samples(
                out,
                samples,
                models.tokenizer,
                models.generator,
                weak=models.weak,
                progress=progress,
                inputs=(home_of(tokenizer), generator, sampler.autoguidance),
                overwrite=overwrite,
            )
        if processes.is_rank0():
            picture = "" if run.format == "latents" else f", picture in {out / 'grid.png'}"
            say(f"{len(labels)} samples in {out / FILES[run.format]}{picture}")
    return record


def _labels(run: SampleRun, folder: Path, generator: LatentGenerator) -> tuple[Tensor, str]:
    from openpae.data.classes import typed_labels
    from openpae.storage.model_folder import seen_classes

    names, count = generator.class_names, generator.config.num_classes
    chosen = None if run.classes is None else typed_labels(folder, run.classes, names, count)
    return run.labels(seen_classes(folder, count, chosen), chosen)
