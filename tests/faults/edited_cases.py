"""Rows of the table of errors: numbers beyond any use, weights that are not finite, edited records."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from openpae import cli
from openpae.config import read_yaml
from openpae.storage import model_folder
from tests.faults.cases import CASES
from tests.faults.hostile_cases import HOSTILE
from tests.faults.more_cases import MORE, WALK, rows
from tests.faults.running import TOKENIZER, Case
from tests.faults.spoiling import SAMPLE, both, json_with, nothing, written

SEARCH = (
    "pae search-guidance tokenizer generator packed out --extractor random --samples 4 --scales 1 2 "
    "--steps 1 --device cpu"
)
SEEDS = "pae interpolate tokenizer out --generator generator --label 0 --seeds 1 2 --steps 1 --device cpu"
STUDY = "name: s\ntitle: s\nsetup: study/quick\nkind: Study\nrows: [{name: a}]\n"
COLUMNS = "study,row,seed,metric,step,value,stderr,seconds,commit\n"


def weighted(folder: str, value: float) -> Callable[[], object]:
    """All weights have one value, and the fingerprints are right."""

    def spoil() -> None:
        made_with = model_folder.identity_of(folder).made_with
        state = load_file(f"{folder}/model.safetensors")
        state = {k: torch.full_like(v, value) if "latent" not in k else v for k, v in state.items()}
        own = _save(folder, state, made_with)
        if folder == "tokenizer":
            _save("generator", load_file("generator/model.safetensors"), own)

    return spoil


def _save(folder: str, state: dict[str, torch.Tensor], made_with: str) -> str:
    own = model_folder._fingerprint_of(state, read_yaml(Path(folder, "config.yaml")), made_with)
    facts = {"fingerprint": own, "made_with": made_with}
    save_file(state, f"{folder}/model.safetensors", metadata=facts)
    return own


def searched(**changes: object) -> Callable[[], object]:
    """A search that was done, with a changed record."""

    def spoil() -> None:
        cli.main(shlex.split(SEARCH)[1:])
        json_with("out/search.json", **changes)()

    return spoil


def metrics(**metric: object) -> Callable[[], object]:
    return written("tokenizer/evaluation.json", json.dumps({"metrics": {"psnr": metric}}))


_BEYOND: tuple[Case, ...] = rows(
    "Numbers beyond any use",
    *(
        (f"{flag.removeprefix('--')} of {words}", nothing, f"{command} {flag} {value}", says)
        for flag, words, value, command, says in (
            (
                "--classes",
                "20 digits",
                "9" * 20,
                SAMPLE,
                "so '9{20}' is not known; give numbers from",
            ),
            ("--seed", "20 digits", "9" * 20, SAMPLE, "^--seed must be below 2\\^63, got 20 digits$"),
            ("--label", "19 digits", "9" * 18, SEEDS, r"^labels must lie in \[0, 2\] \(2 is the null class"),
            ("--frames", "10^12", "1000000000000", SEEDS, "^--frames must be <= 10000, got 1000000000000$"),
            ("--frames", "10^12, of two images", "1000000000000", WALK, "^--frames must be <= 10000"),
            ("--gpus", "10^12", "1000000000000", "pae plan generator/tiny", "^--gpus must be <= 1e\\+06"),
            ("--workers", "10^6", "1000000", "pae study study/quick", "^--workers must be <= 1024"),
            ("--budget", "10^6 hours", "1000000h", "pae quickstart --out q", "^budget must be at most 1000h"),
            ("--loop.num-workers", "10^6", "1000000", TOKENIZER, "^loop.num_workers must be <= 1024"),
            (
                *("--loop.global-batch-size", "2^62", str(2**62), TOKENIZER),
                "^loop.global_batch_size must be <= 1.67772e\\+07",
            ),
            ("--samples", "10^12", "1000000000000", SEARCH, "^samples must be <= 1e\\+08"),
        )
    ),
)

_DIVERGED = rows(
    "Weights that are not finite",
    (
        "a generator of NaN",
        weighted("generator", float("nan")),
        SEEDS,
        "^the weights of generator hold NaN or infinity in .* tensors",
    ),
    (
        "a tokenizer of infinity, asked about",
        weighted("tokenizer", float("inf")),
        "pae info tokenizer --verify",
        "^the weights of tokenizer hold NaN or infinity in .* tensors",
    ),
    (
        "a tokenizer of NaN, to be uploaded",
        weighted("tokenizer", float("nan")),
        "pae push tokenizer me/it --dry-run",
        "^the weights of tokenizer hold NaN or infinity in .* tensors",
    ),
    (
        "a tokenizer that overflows",
        weighted("tokenizer", 3e38),
        SEEDS,
        "^pixels hold NaN; look at the weights",
    ),
    (
        "a tokenizer that overflows, and samples",
        weighted("tokenizer", 3e38),
        SAMPLE,
        "^images hold NaN; look at the weights",
    ),
    ("a tokenizer that overflows, and images", weighted("tokenizer", 3e38), WALK, "^pixels hold NaN"),
)

_RECORDS = rows(
    "Edited records",
    (
        "a list of no classes",
        written("generator/classes.json", '{"classes": []}'),
        SAMPLE,
        "^generator/classes.json is damaged: no class has a training image$",
    ),
    (
        "a list of classes that is none, to be uploaded",
        written("generator/classes.json", "[]"),
        "pae push generator me/it --dry-run",
        "^generator/classes.json is damaged: it must hold a mapping, got list$",
    ),
    *(
        (
            f"a metric of {words}, to be uploaded",
            metrics(**metric),
            "pae push tokenizer me/it --dry-run",
            "^tokenizer/evaluation.json is no record of pae evaluate; remove it$",
        )
        for words, metric in (
            ("NaN", {"value": float("nan"), "stderr": None}),
            ("400 digits", {"value": 10**400, "stderr": None}),
            ("an infinite error", {"value": 1.0, "stderr": float("inf")}),
        )
    ),
    (
        "an unfinished cache whose header is empty",
        both(lambda: os.remove("packed/index.json"), written("packed/header.json", "{}")),
        "pae info packed",
        "^packed/header.json is damaged: it has no fitting kind, per_shard, sources$",
    ),
    (
        "latents whose mean is text",
        json_with("latents/index.json", mean="x"),
        "pae info latents",
        "latents need a tokenizer, and a finite mean and std for each channel",
    ),
    (
        "a search without what it measured",
        searched(measured=None),
        SEARCH,
        "^out/search.json is damaged: it has no fitting measured$",
    ),
    (
        "a search that measured NaN",
        searched(measured=[dict.fromkeys(("guidance", "samples", "frechet"), float("nan"))]),
        SEARCH,
        "^out/search.json is damaged: a row of measured lacks one of guidance, ",
    ),
    (
        "a bench without figures",
        written("b.json", '{"bench": "generator"}'),
        "pae bench generator --compare b.json",
        "^b.json is damaged: it has no fitting figures, machine, settings$",
    ),
    *(
        (
            f"results of a pilot with {words}",
            both(written("s.yaml", STUDY), written("r.csv", COLUMNS + line)),
            "pae study s.yaml --power r.csv",
            says,
        )
        for words, line, says in (
            ("NaN", "s,a,0,psnr,,nan,,1,x\n", "^r.csv is damaged in line 2: .* must be finite numbers$"),
            ("a cut line", "s,a,0\n", "^r.csv is damaged in line 2: "),
        )
    ),
)

ROWS = CASES + MORE + HOSTILE + _BEYOND + _DIVERGED + _RECORDS
"""All rows of the page."""
