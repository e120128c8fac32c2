"""Commands that measure."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import tyro

from openpae.commands.console import Device, ReferencePath, at_least_one
from openpae.commands.sampler import SamplerChoice
from openpae.eval.settings import EvaluationRun, SamplingOptions
from openpae.geometry.settings import ProfileRun
from openpae.runtime.terminal import Progress, say


def evaluate(
    reference: ReferencePath,
    /,
    run: tyro.conf.OmitArgPrefixes[EvaluationRun],
    sampler: tyro.conf.OmitArgPrefixes[SamplerChoice],
    out: Path | None = None,
    device: Device = "auto",
    overwrite: bool = False,
) -> Mapping[str, Any] | None:
    """Measure reconstructions of a tokenizer, stored samples, or samples of a generator, against real images.

    torchrun splits the work over processes; the numbers are the same.

    Args:
        reference: real images (a folder, or packed images), an npz of the ADM layout (images, statistics or
            both), or a file of --save-reference.
        out: file for the record (JSON); by default evaluation.json beside the measured model or samples.
        device: auto uses a GPU if there is one.
        overwrite: replace files that this command did not make.
    """
    from openpae.eval.reference import is_own_reference
    from openpae.eval.run import run_evaluation
    from openpae.runtime import processes
    from openpae.runtime.device import pick_device
    from openpae.storage.files import write_json
    from openpae.storage.outputs import check_outputs, read_record

    at_least_one(batch_size=sampler.batch_size)
    record_file = run.record_path() if out is None and run.evaluates() else out
    for file in (record_file, run.save_reference):
        if file is not None:
            known = "metrics" in read_record(file) or is_own_reference(file)
            inputs = [path for path in (reference, run.samples) if path is not None and path.is_file()]
            check_outputs(file, inputs=inputs, own=[file] if known else [], overwrite=overwrite)
    options = None
    if run.generator is not None:
        options = SamplingOptions(
            sampler=sampler.config(),
            precision=sampler.precision,
            autoguidance=sampler.autoguidance,
            compile=sampler.compile,
        )
    elif sampler != SamplerChoice(batch_size=sampler.batch_size):
        raise ValueError("the sampler's options say how --generator draws; give it, or leave them out")
    with processes.process_group(device), Progress("measuring", "img") as progress:
        how: dict[str, Any] = {"options": options, "batch_size": sampler.batch_size, "progress": progress}
        record = run_evaluation(reference, run, pick_device(device), **how)
        if not processes.is_rank0():
            return record
    if run.save_reference is not None:
        say(f"reference in {run.save_reference}")
    if record is None or record_file is None:  # both are None, or none is
        return {"reference": str(run.save_reference)}
    _print_metrics(record)
    write_json(record_file, record)
    say(f"record in {record_file}")
    return record


def _print_metrics(record: Mapping[str, Any]) -> None:
    for name, metric in record["metrics"].items():
        error = "" if metric["stderr"] is None else f" +- {metric['stderr']:.2g}"
        say(f"{name:20} {metric['value']:.5g}{error}")
    for name, reason in record.get("undefined", {}).items():
        say(f"{name:20} not defined: {reason}")


def profile(
    tokenizers: Annotated[tuple[str, ...], tyro.conf.arg(metavar="TOKENIZER")],
    /,
    run: tyro.conf.OmitArgPrefixes[ProfileRun],
    device: Device = "auto",
    overwrite: bool = False,
) -> Mapping[str, Any]:
    """Measure and compare the geometry of latent spaces (SSC, LPC, GSQ, eRank, proxies): profile.html.

    A tokenizer is a folder of openpae or diffusers, diffusers:OWNER/NAME, encoder:NAME for the features of a
    VFM (encoder:NAME/8 with a token per 8 pixels), targets:NAME/8:FOLDER for the targets of a refiner, or
    python:FILE.py with your own encode and decode.

    Args:
        tokenizers: one or more tokenizers to measure.
        device: auto uses a GPU if there is one.
        overwrite: replace a profile.json and profile.html that this command did not make.
    """
    from openpae.geometry.profile import run_profile
    from openpae.runtime.device import pick_device
    from openpae.storage.files import read_json

    with Progress("measuring", "img") as progress:
        profiles = run_profile(
            tokenizers, run, device=pick_device(device), progress=progress, overwrite=overwrite
        )
    for one in profiles:
        say(f"{one.name}  {' x '.join(map(str, one.latent_shape))}  {one.fingerprint}")
        for estimate in one.metrics.values():
            say(f"  {estimate}")
        for name, reason in one.undefined.items():
            say(f"  {name} not defined: {reason}")
    return read_json(run.out / "profile.json")
