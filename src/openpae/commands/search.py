"""`pae search-guidance`: tune the guidance of a generator."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tyro

from openpae.commands.console import Device, GeneratorPath, Out, ReferencePath, TokenizerPath
from openpae.commands.sampler import SamplerChoice, load_models
from openpae.eval.settings import ExtractorName, SearchConfig


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
    overwrite: bool = False,
) -> None:
    """Tune guidance scale and interval on the Frechet distance, and write search.json and best.yaml.

    pae sample --preset OUT/best.yaml uses the result. Distances of its samples to the same reference are
    biased. An interrupted command resumes when it is run again; torchrun splits the work.

    Args:
        tokenizer: the tokenizer that the generator was trained with; it decodes the latents.
        generator: a generator folder or a run folder of pae train-generator.
        reference: real images (a folder, or packed images), an npz of the ADM layout, or a file of pae
            evaluate --save-reference.
        out: folder for search.json and best.yaml.
        extractor: features of the distance; distances of two extractors are not comparable.
        extractor_weights: weights file of inception, or local folder of dinov2.
        device: auto uses a GPU if there is one.
        overwrite: replace a search.json and best.yaml that this command did not make.
    """
    from openpae.eval.extractors import load_extractor
    from openpae.eval.guidance_search import SampleEvaluator
    from openpae.eval.guidance_search import search_guidance as run_search
    from openpae.eval.reference import open_reference
    from openpae.eval.run import check_reference
    from openpae.interop.kinds import home_of
    from openpae.runtime import processes
    from openpae.storage.model_folder import trained_classes

    with processes.process_group(device):
        models = load_models(tokenizer, generator, sampler, device)
        check_reference(reference, generator)
        network = load_extractor(extractor, extractor_weights, models.device)
        evaluator = SampleEvaluator(
            *(models.tokenizer, models.generator, sampler.config()),
            extractor=network,
            reference=open_reference(reference, network, size=models.image_shape),
            search=search,
            num_classes=trained_classes(generator, models.generator.config.num_classes),
            batch_size=sampler.batch_size,
            precision=sampler.precision,
            weak=models.weak,
        )
        log = print if processes.is_rank0() else None
        inputs = (home_of(tokenizer), generator, reference, sampler.autoguidance, Path(sampler.preset))
        record = run_search(out, evaluator, facts=models.facts, log=log, inputs=inputs, overwrite=overwrite)
        if log is not None:
            _print_best(record, out)
    if record["verdict"]:
        sys.exit(3)


def _print_best(record: Mapping[str, Any], out: Path) -> None:
    best = record["best"]
    if record["verdict"]:
        print(record["verdict"])
    print(
        f"best: guidance {best['guidance']:g} from {best['guidance_start']:g} to {best['guidance_end']:g}, "
        f"kept in {out / 'best.yaml'}; {record['note']}"
    )
