"""`pae search-guidance`: tune scale and interval of guidance on the Frechet distance, by successive halving.

search.json   settings, each distance when it is measured, at the end the best
best.yaml     the best candidate as a sampler, for pae sample --preset
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from openpae import config as configs
from openpae.eval.extractors import FeatureExtractor
from openpae.eval.features import FeatureSet
from openpae.eval.frechet import frechet_distance
from openpae.eval.generation import Evaluation
from openpae.eval.reference import Reference
from openpae.eval.settings import NO_GUIDANCE, Candidate, EvaluationConfig, SearchConfig, with_guidance
from openpae.runtime import processes
from openpae.runtime.device import autocast
from openpae.runtime.provenance import package_versions
from openpae.sampling.guidance import VelocityModel
from openpae.sampling.sampler import Decoder, balanced_labels, evaluations, sample_images
from openpae.sampling.settings import SamplerConfig
from openpae.storage.files import is_number, read_fields, write_json
from openpae.storage.outputs import check_outputs, made_by, make_folder, run_lock

_MEASURED = ("guidance", "guidance_start", "guidance_end", "samples", "frechet")
"""Numbers in each row of `measured`."""


def successive_halving(
    candidates: Sequence[Candidate],
    distance: Callable[[Candidate, int], float],
    *,
    samples: int,
    halving: int,
) -> Candidate:
    """Evaluate all candidates on few samples, the better ones on more, until one is left (arXiv:1502.07943).

    Every round costs about as much as the first. Distances of two rounds do not compare: a Frechet distance
    falls with the number of samples.

    Args:
        candidates: at least one.
        distance: (candidate, number of samples) to a value; lower is better.
        samples: samples per candidate of the first round.
        halving: each round keeps 1 / halving of the candidates, rounded up, and multiplies their samples by
            `halving`.

    Returns:
        The best candidate; of equal ones the first.
    """
    left = list(candidates)
    while len(left) > 1:
        values = {candidate: distance(candidate, samples) for candidate in left}
        left = sorted(left, key=values.__getitem__)[: max(1, math.ceil(len(left) / halving))]
        samples *= halving
    return left[0]


class SampleEvaluator:
    """Measures the Frechet distance of samples with a candidate's guidance.

    Each sample is made once: a candidate of the next round adds to its samples. Under torchrun each process
    makes its share, and all get the distance.

    Args:
        tokenizer: decodes.
        generator: makes the latents, in evaluation mode.
        sampler: all settings but the guidance.
        extractor: gives the features.
        reference: real images or their statistics, in the features of `extractor`.
        search: seed, samples of the first round and their growth.
        num_classes: classes of the labels, see `balanced_labels`.
        batch_size: samples per batch. It changes rounding only.
        precision: fp32 or bf16, of tokenizer and generator. Features are computed in float32.
        weak: guides in place of the null class.
    """

    def __init__(
        self,
        tokenizer: Decoder,
        generator: VelocityModel,
        sampler: SamplerConfig,
        *,
        extractor: FeatureExtractor,
        reference: Reference,
        search: SearchConfig,
        num_classes: int | Sequence[int],
        batch_size: int = 32,
        precision: str = "fp32",
        weak: VelocityModel | None = None,
    ) -> None:
        self.tokenizer, self.generator, self.weak = tokenizer, generator, weak
        self.sampler, self.search = sampler, search
        self.num_classes, self.batch_size, self.precision = num_classes, batch_size, precision
        self.evaluation = Evaluation(extractor, reference, EvaluationConfig())
        self.seen: dict[Candidate, FeatureSet] = {}

    def __call__(self, candidate: Candidate, count: int) -> float:
        """The distance of the candidate's first `count` samples to the reference."""
        seen = self.seen.setdefault(candidate, FeatureSet(self.evaluation.samples.extractor))
        # In the steps of the rounds, so that a resumed search gives equal distances to the bit.
        size = self.search.samples
        while seen.n < count:
            if size > seen.n:
                self._add_samples(candidate, range(seen.n, size), seen)
            size *= self.search.halving
        return frechet_distance(seen.pooled.gaussian(), self.evaluation.reference.pooled)

    def _add_samples(self, candidate: Candidate, indices: range, seen: FeatureSet) -> None:
        sampler, size = with_guidance(self.sampler, candidate), self.batch_size
        parts = [indices[start : start + size] for start in range(0, len(indices), size)]
        own = [parts[i] for i in processes.rank_slice(len(parts))]
        labels = balanced_labels(indices.stop, self.num_classes)
        images = sample_images(
            self.tokenizer,
            self.generator,
            labels,
            sampler,
            seed=self.search.seed,
            batches=own,
            weak=None if sampler.guidance == 1 else self.weak,
        )
        added = FeatureSet(self.evaluation.samples.extractor)
        device = next(self.generator.parameters()).device
        for part in own:
            with autocast(device, self.precision):
                batch = next(images)
            added.update(batch, part)
        added.gather()
        self.evaluation.check_size(added.image_size)
        seen.merge(added)


def search_guidance(
    out: Path,
    evaluator: SampleEvaluator,
    *,
    facts: Mapping[str, Any],
    log: Callable[[str], None] | None = None,
    inputs: Sequence[Path | None] = (),
    overwrite: bool = False,
) -> dict[str, Any]:
    """Search the guidance of the lowest distance. An interrupted call goes on where it stopped.

    Under torchrun every process must call this function, and all get the record.

    Args:
        out: folder for search.json and best.yaml.
        evaluator: measures a candidate.
        facts: further entries of the record, which must be equal to go on: fingerprints, precision.
        log: gets a line for every distance.
        inputs: paths that were read; nothing is written there.
        overwrite: begin again in place of files of these names that this command did not make.

    Returns:
        The record, as in search.json.

    Raises:
        ValueError: the folder holds another search or files of the user, another process searches there, or
            there are too few candidates.
    """
    names = [out / "search.json", out / "best.yaml"]
    ours = names if made_by(out / "search.json", kind="guidance search") else ()
    check_outputs(*names, into=out, inputs=inputs, own=ours, overwrite=overwrite)
    with run_lock(out, "searching"):
        return _search(out, evaluator, facts, log, afresh=not ours)


def _search(
    out: Path,
    evaluator: SampleEvaluator,
    facts: Mapping[str, Any],
    log: Callable[[str], None] | None,
    *,
    afresh: bool,
) -> dict[str, Any]:
    search, sampler = evaluator.search, evaluator.sampler
    candidates = search.candidates(sampler)
    settings = _settings(evaluator, facts)
    record = processes.on_rank0(lambda: _begun(out, settings, afresh=afresh))
    known: dict[tuple[Candidate, int], float] = {
        (_key(row), row["samples"]): row["frechet"] for row in record["measured"]
    }

    def measured(candidate: Candidate, count: int) -> float:
        if (candidate, count) not in known:
            value = known[candidate, count] = processes.broadcast(evaluator(candidate, count))
            row = dict(zip(_MEASURED[:3], candidate, strict=True))
            nfe = evaluations(with_guidance(sampler, candidate))
            record["measured"].append(row | {"samples": count, "nfe": nfe, "frechet": value})
            processes.on_rank0(lambda: write_json(out / "search.json", record))
            if log is not None:
                scale, start, end = candidate
                log(f"{count} samples, guidance {scale:g} from {start:g} to {end:g}: {value:.4f}")
        return known[candidate, count]

    best = successive_halving(candidates, measured, samples=search.samples, halving=search.halving)
    tuned = replace(with_guidance(sampler, best), tuned_on=_tuned_on(evaluator))
    count = max(samples for candidate, samples in known if candidate == best)
    record["verdict"] = _verdict(known[best, count], measured(NO_GUIDANCE, count), count, best)
    record["best"] = configs.to_dict(tuned)
    processes.on_rank0(lambda: _keep(out, record, tuned))
    return record


def _settings(evaluator: SampleEvaluator, facts: Mapping[str, Any]) -> dict[str, Any]:
    reference = evaluator.evaluation.reference
    return {
        "kind": "guidance search",
        "note": f"guidance and interval were tuned on {_tuned_on(evaluator)}. A distance to this reference, "
        "reported of samples with this guidance, is biased: it is the lowest of many. Report it with that "
        "remark and with another seed, and beside it a metric or a reference that was not tuned on.",
        "metric": "frechet",
        "extractor": reference.extractor,
        "extractor_weights": evaluator.evaluation.samples.extractor.weights,
        "reference": reference.name,
        "reference_sha256": reference.sha256,
        "reference_n": reference.pooled.n,
        "sampler": configs.to_dict(evaluator.sampler),
        "search": configs.to_dict(evaluator.search),
        "labels": "class-balanced",
        **facts,
    }


def _verdict(distance: float, unguided: float, count: int, best: Candidate) -> str:
    """Why the best guidance is not usable: no guidance, at half the cost, is as good. Else empty."""
    if best == NO_GUIDANCE or distance < unguided:
        return ""
    return (
        f"not usable: no guidance is at {unguided:.4f} over {count} samples, the best guidance at "
        f"{distance:.4f}; sample without, or search over more --samples"
    )


def _tuned_on(evaluator: SampleEvaluator) -> str:
    reference = evaluator.evaluation.reference
    return (
        f"the Frechet distance of {reference.extractor} to {reference.name} "
        f"({reference.sha256[:12]}), seed {evaluator.search.seed}"
    )


def _begun(out: Path, settings: Mapping[str, Any], *, afresh: bool) -> dict[str, Any]:
    """The record so far; a new one if there is none, or `afresh`."""
    path = out / "search.json"
    if afresh or not path.is_file():
        make_folder(out)
        record = {**settings, "versions": package_versions(), "measured": [], "best": None}
        write_json(path, record)
        return record
    record = read_fields(path, measured=list)
    for row in record["measured"]:
        if not isinstance(row, dict) or not all(is_number(row.get(name)) for name in _MEASURED):
            raise ValueError(f"{path} is damaged: a row of measured lacks one of {', '.join(_MEASURED)}")
    if changed := [key for key, value in settings.items() if record.get(key) != value]:
        facts = ", ".join(f"{key} ({record.get(key)} there, {settings[key]} now)" for key in changed[:3])
        raise ValueError(f"{out} holds another search: another {facts}; name another folder, or delete it")
    return record


def _keep(out: Path, record: Mapping[str, Any], tuned: SamplerConfig) -> None:
    configs.save(tuned, out / "best.yaml")
    write_json(out / "search.json", record)


def _key(row: Mapping[str, Any]) -> Candidate:
    return row["guidance"], row["guidance_start"], row["guidance_end"]
