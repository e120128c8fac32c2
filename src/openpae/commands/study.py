"""The command that runs studies."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from openpae import config as configs
from openpae.commands.console import at_least_one, tell

if TYPE_CHECKING:
    from openpae.study.settings import StudyData


def study(
    studies: Annotated[tuple[str, ...], tyro.conf.arg(metavar="STUDY")],
    /,
    images: Path | None = None,
    held_out: Path | None = None,
    label_images: Path | None = None,
    label_maps: Path | None = None,
    reference: Path | None = None,
    out: Path = Path("runs/study"),
    set: tuple[str, ...] = (),
    rows: tuple[str, ...] = (),
    seeds: tuple[int, ...] = (),
    workers: int = 1,
    dry_run: bool = False,
) -> None:
    """Run a grid of trainings and measurements, and compare it with the paper: table, verdicts, report.

    What is done is never done again: the same command goes on after an interruption, and studies that
    share an OUT share what they have in common. Under torchrun all processes share each stage.

    Args:
        studies: presets (study/table2a-small) or files, one or several; several also get a report of all.
        images: training images, one subfolder per class; by default those that the studies name
            (data/tiny-imagenet-100 at small size).
        held_out: other images of the same classes, on which tokenizers are measured; given with images.
        label_images: images with label maps, for SSC; without them it is left out.
        label_maps: their maps: index PNGs named as the images, or a COCO panoptic JSON.
        reference: what samples are compared with, an npz in ADM's layout or images; the training images by
            default.
        out: folder for everything.
        set: changes to all rows: STAGE.FIELD=VALUE, such as tokenizer.loop.steps=5000.
        rows: take only these rows, such as one per job of a cluster.
        seeds: in place of the study's own.
        workers: processes; each has its share of the threads, and a GPU of its own where there are several.
        dry_run: only tell what would be done, and how long it takes here.
    """
    at_least_one(workers=workers)
    if not studies:
        raise ValueError(
            "pae study needs at least one STUDY: a preset such as study/table2a-small, or a file"
        )
    from openpae.runtime import processes
    from openpae.storage.outputs import check_outputs
    from openpae.study.plan import make_plan, own_data
    from openpae.study.rehearse import estimates
    from openpae.study.run import describe_plan, run_plan
    from openpae.study.settings import Study

    loaded = [configs.load(Study, name) for name in studies]
    given = {"images": images, "held-out": held_out, "label-images": label_images, "label-maps": label_maps}
    data = dataclasses.replace(_data(given) or own_data(loaded), reference=reference)
    check_outputs(into=out, inputs=[*given.values(), reference])
    plan = make_plan(loaded, data, out, changes=set, rows=rows, seeds=seeds)
    if dry_run:
        known = estimates(plan, rehearse=True, tell=lambda line: print(line, file=sys.stderr))
        print(describe_plan(plan, known, workers))
        return
    where = given | {"reference": reference}
    words = [
        *studies,
        *(["--set", *set] if set else []),
        *(["--rows", *rows] if rows else []),
        *(["--seeds", *map(str, seeds)] if seeds else []),
        *(f"--{name} {_last(path)}" for name, path in where.items() if path is not None),
    ]
    with processes.process_group():
        failed = run_plan(plan, workers=workers, command=f"pae study {' '.join(words)}", tell=tell)
        for one in plan.studies:
            folder = out / one.name
            tell(f"open {folder / 'report.html'} in a browser; numbers in {folder / 'results.csv'}")
    if failed:
        raise FloatingPointError(f"{len(failed)} stages failed: {'; '.join(failed)}")


def _data(given: Mapping[str, Path | None]) -> StudyData | None:
    """The images that the command names; None where it names none. A data set is given whole."""
    from openpae.study.settings import StudyData

    images, held_out = given["images"], given["held-out"]
    if images is not None and held_out is not None:
        return StudyData(
            images=images,
            held_out=held_out,
            label_images=given["label-images"],
            label_maps=given["label-maps"],
        )
    for name, path in given.items():
        if path is not None:
            missing = "images" if images is None else "held-out"
            raise ValueError(
                f"--{name} was given without --{missing}; give both, or neither for the images that the "
                "studies name"
            )
    return None


def _last(path: Path) -> str:
    """The last two parts of a path: a report that is handed around need not tell where a home is."""
    return "/".join(path.resolve().parts[-2:])
