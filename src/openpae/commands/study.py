"""`pae study`: run grids of trainings."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from openpae import config as configs
from openpae.commands.console import at_least_one, say_on_rank0
from openpae.runtime.terminal import note

if TYPE_CHECKING:
    from openpae.study.plan import Plan
    from openpae.study.settings import Study, StudyData


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
    power: Path | None = None,
) -> None:
    """Run a grid of trainings and measurements, and compare it with the paper: table, verdicts, report.

    Finished stages are not repeated: an interrupted command resumes when it is run again, and studies with
    the same OUT share their common stages. Under torchrun all processes share each stage.

    Args:
        studies: presets (study/table2a-small) or files; several studies also get a common report.
        images: training images, one subfolder per class; by default the images that the studies name.
        held_out: other images of the same classes, for measuring tokenizers; needs images.
        label_images: images with label maps, for SSC; without them SSC is left out.
        label_maps: their label maps: index PNGs of the same names, or a COCO panoptic JSON.
        reference: images or an npz in ADM's layout to compare samples with; by default the training images.
        out: folder for all results.
        set: changes to all rows: STAGE.FIELD=VALUE, such as tokenizer.loop.steps=5000.
        rows: run only these rows.
        seeds: seeds that replace the study's own.
        workers: number of processes; they divide the threads, and the GPUs if there are several.
        dry_run: print the stages and the estimated time on this machine; run nothing.
        power: results.csv of a pilot; print the differences that more seeds would show, and run nothing.
    """
    at_least_one(workers=workers)
    if not studies:
        raise ValueError("pae study needs at least one STUDY, a file or a preset such as study/table2a-small")
    from openpae.storage.outputs import check_outputs
    from openpae.study.plan import make_plan, own_data
    from openpae.study.rehearse import estimates
    from openpae.study.run import check_results, describe_plan
    from openpae.study.settings import Study

    loaded = [configs.load(Study, name) for name in studies]
    if power is not None:
        _print_power(loaded, power)
        return
    given = {"images": images, "held-out": held_out, "label-images": label_images, "label-maps": label_maps}
    data = dataclasses.replace(_data(given) or own_data(loaded), reference=reference)
    check_outputs(into=out, inputs=[*given.values(), reference])
    plan = make_plan(loaded, data, out, changes=set, rows=rows, seeds=seeds)
    if dry_run:
        known = estimates(plan, rehearse=True, log=note)
        print(describe_plan(plan, known, workers))
        return
    check_results(plan, [*given.values(), reference])
    command = _command(studies, {"set": set, "rows": rows, "seeds": seeds}, given | {"reference": reference})
    _run(plan, workers, command)


def _run(plan: Plan, workers: int, command: str) -> None:
    from openpae.runtime import processes
    from openpae.study.run import run_plan

    with processes.process_group():
        failed = run_plan(plan, workers=workers, command=command, log=say_on_rank0)
        for folder in (plan.layout.out / study.name for study in plan.studies):
            say_on_rank0(f"open {folder / 'report.html'} in a browser; numbers in {folder / 'results.csv'}")
    if failed:
        raise FloatingPointError(f"{len(failed)} stages failed: {'; '.join(failed)}")


def _print_power(studies: Sequence[Study], pilot: Path) -> None:
    from openpae.study.page import markdown_table
    from openpae.study.power import power_table
    from openpae.study.table import read_table

    results = read_table(pilot)
    for study in studies:
        print(f"## {study.name}\n\n{markdown_table(*power_table(study, results))}\n")


def _data(given: Mapping[str, Path | None]) -> StudyData | None:
    """Return the images that the command names, or None. Training and held-out images go together."""
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


def _command(
    studies: Sequence[str], options: Mapping[str, Sequence[object]], paths: Mapping[str, Path | None]
) -> str:
    """Return the command for the report, with the last two parts of each path: a report may be published."""
    words = ["pae study", *studies]
    for name, values in options.items():
        words += [f"--{name}", *map(str, values)] if values else []
    for name, path in paths.items():
        words += [] if path is None else [f"--{name} {'/'.join(path.resolve().parts[-2:])}"]
    return " ".join(words)
