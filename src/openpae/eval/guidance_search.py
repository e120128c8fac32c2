"""`pae search-guidance`: tune scale and interval of guidance on the Frechet distance, by successive halving.

search.json   settings, every distance as soon as it is measured, at the end the best; says what was tuned
best.yaml     the best as a sampler, for pae sample --preset
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
from openpae.sampling.sampler import Decoder, balanced_labels, decoded, evaluations, sample_batches
from openpae.sampling.settings import SamplerConfig
from openpae.storage.files import read_json, write_json
from openpae.storage.outputs import check_outputs, made_by, make_folder


def successive_halving(
    candidates: Sequence[Candidate],
    judge: Callable[[Candidate, int], float],
    *,
    samples: int,
    halving: int,
) -> Candidate:
    """Evaluate all over few samples, the better ones over more, until one is left (arXiv:1502.07943).

    Every round costs about as much as the first. Values of one round compare, those of two do not: a Frechet
    distance falls with the number of samples.

    Args:
        candidates: at least one.
        judge: (candidate, number of samples) to a value; lower is better.
        samples: of the first round.
        halving: the share that goes on is 1 / halving, rounded up, and the samples grow by as much.

    Returns:
        The best; of equal ones the first.
    """
    left = list(candidates)
    while len(left) > 1:
        values = {candidate: judge(candidate, samples) for candidate in left}
        left = sorted(left, key=values.__getitem__)[: max(1, math.ceil(len(left) / halving))]
        samples *= halving
    return left[0]


class SampleEvaluator:
    """Draws samples with a candidate's guidance and gives their Frechet distance.

    Samples are drawn once: a candidate that goes on adds to those that it has. Under torchrun each process
    draws its share, and all get the distance.

    Args:
        tokenizer: decodes.
        generator: makes the latents, in evaluation mode.
        sampler: all but the guidance.
        extractor: of the features.
        reference: what the samples are compared with, in these features.
        search: seed, first number of samples and their growth.
        num_classes: of class-balanced labels, as `balanced_labels` takes them.
        batch_size: samples at once; it changes no distance beyond rounding.
        precision: of the networks that draw: fp32 or bf16. What measures works in float32.
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
        # In the steps in which the rounds ask for them, so that a resumed search finds the same to the bit.
        size = self.search.samples
        while seen.n < count:
            if size > seen.n:
                self._draw(candidate, range(seen.n, size), seen)
            size *= self.search.halving
        return frechet_distance(seen.pooled.gaussian(), self.evaluation.reference.pooled)

    def _draw(self, candidate: Candidate, indices: range, seen: FeatureSet) -> None:
        sampler, size = with_guidance(self.sampler, candidate), self.batch_size
        parts = [indices[start : start + size] for start in range(0, len(indices), size)]
        own = [parts[i] for i in processes.rank_slice(len(parts))]
        labels = balanced_labels(indices.stop, self.num_classes)
        weak = None if sampler.guidance == 1 else self.weak
        latents = sample_batches(self.generator, labels, sampler, own, seed=self.search.seed, weak=weak)
        batches = decoded(self.tokenizer, latents)
        fresh = FeatureSet(self.evaluation.samples.extractor)
        device = next(self.generator.parameters()).device
        for part in own:
            with autocast(device, self.precision):
                images = next(batches)
            fresh.update(images, part)
        fresh.gather()
        self.evaluation.check_size(fresh.image_size)
        seen.merge(fresh)


def search_guidance(
    out: Path,
    judge: SampleEvaluator,
    *,
    facts: Mapping[str, Any],
    tell: Callable[[str], None] | None = None,
    inputs: Sequence[Path | None] = (),
) -> dict[str, Any]:
    """Find the guidance of the lowest distance; an interrupted call goes on where it was.

    Under torchrun every process must call it, and all get the record.

    Args:
        out: folder for search.json and best.yaml.
        judge: measures a candidate.
        facts: what else the record should say and what must agree to go on: fingerprints, precision.
        tell: gets a line for every distance.
        inputs: what was read for it; nothing is written there.

    Returns:
        The record, as in search.json.

    Raises:
        ValueError: the folder holds another search or files of the user, or there are too few candidates.
    """
    names = [out / "search.json", out / "best.yaml"]
    ours = names if made_by(out / "search.json", kind="guidance search") else ()
    check_outputs(*names, into=out, inputs=inputs, own=ours)
    search, sampler = judge.search, judge.sampler
    candidates = search.candidates(sampler)
    settings = _settings(judge, facts)
    record = processes.on_rank0(lambda: _begun(out, settings))
    known: dict[tuple[Candidate, int], float] = {
        (_key(row), row["samples"]): row["frechet"] for row in record["measured"]
    }

    def measured(candidate: Candidate, count: int) -> float:
        if (candidate, count) not in known:
            value = known[candidate, count] = processes.broadcast(judge(candidate, count))
            row = dict(zip(("guidance", "guidance_start", "guidance_end"), candidate, strict=True))
            nfe = evaluations(with_guidance(sampler, candidate))
            record["measured"].append(row | {"samples": count, "nfe": nfe, "frechet": value})
            processes.on_rank0(lambda: write_json(out / "search.json", record))
            if tell is not None:
                scale, start, end = candidate
                tell(f"{count} samples, guidance {scale:g} from {start:g} to {end:g}: {value:.4f}")
        return known[candidate, count]

    best = successive_halving(candidates, measured, samples=search.samples, halving=search.halving)
    tuned = replace(with_guidance(sampler, best), tuned_on=_tuned_on(judge))
    count = max(samples for candidate, samples in known if candidate == best)
    record["verdict"] = _verdict(known[best, count], measured(NO_GUIDANCE, count), count, best)
    record["best"] = configs.to_dict(tuned)
    processes.on_rank0(lambda: _keep(out, record, tuned))
    return record


def _settings(judge: SampleEvaluator, facts: Mapping[str, Any]) -> dict[str, Any]:
    reference = judge.evaluation.reference
    return {
        "kind": "guidance search",
        "note": f"guidance and interval were tuned on {_tuned_on(judge)}. A distance to this reference, "
        "reported of samples with this guidance, is biased: it is the lowest of many. Report it with that "
        "remark and with another seed, and beside it a metric or a reference that was not tuned on.",
        "metric": "frechet",
        "extractor": reference.extractor,
        "extractor_weights": judge.evaluation.samples.extractor.weights,
        "reference": reference.name,
        "reference_sha256": reference.sha256,
        "reference_n": reference.pooled.n,
        "sampler": configs.to_dict(judge.sampler),
        "search": configs.to_dict(judge.search),
        "labels": "class-balanced",
        **facts,
    }


def _verdict(found: float, free: float, count: int, best: Candidate) -> str:
    """One line where the best guidance is worth nothing, else nothing: no guidance costs half as much."""
    if best == NO_GUIDANCE or found < free:
        return ""
    return (
        f"not usable: no guidance is at {free:.4f} over {count} samples, the best guidance at {found:.4f}; "
        "sample without, or search over more --samples"
    )


def _tuned_on(judge: SampleEvaluator) -> str:
    reference = judge.evaluation.reference
    return (
        f"the Frechet distance of {reference.extractor} to {reference.name} "
        f"({reference.sha256[:12]}), seed {judge.search.seed}"
    )


def _begun(out: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The record so far, or a new one."""
    path = out / "search.json"
    if not path.is_file():
        make_folder(out)
        record = {**settings, "versions": package_versions(), "measured": [], "best": None}
        write_json(path, record)
        return record
    record = read_json(path)
    if changed := [key for key, value in settings.items() if record.get(key) != value]:
        facts = ", ".join(f"{key} ({record.get(key)} there, {settings[key]} now)" for key in changed[:3])
        raise ValueError(f"{out} holds another search: another {facts}; name another folder, or delete it")
    return record


def _keep(out: Path, record: Mapping[str, Any], tuned: SamplerConfig) -> None:
    configs.save(tuned, out / "best.yaml")
    write_json(out / "search.json", record)


def _key(row: Mapping[str, Any]) -> Candidate:
    return row["guidance"], row["guidance_start"], row["guidance_end"]
