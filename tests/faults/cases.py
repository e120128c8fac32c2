"""What users give that cannot work, their command, and the one line that it prints.

test_cases.py runs every row, and tools/make_errors.py writes docs/errors.md from them.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from openpae.storage.model_folder import write_classes
from tests.faults.image_cases import IMAGE_CASES
from tests.faults.running import GENERATOR, Case
from tests.faults.spoiling import (
    SAMPLE,
    Harmless,
    both,
    config_with,
    edited,
    flipped,
    json_with,
    moved,
    nothing,
    pickled_code,
    ran,
    written,
)

RUN = """kind: GeneratorRun
latents: latents
optim: {lr: 0.1}
loop: {steps: 5, global_batch_size: 2}
"""


def config(given: str, text: str, says: str, foreign: str = "") -> Case:
    return Case(
        group="Configs",
        given=given,
        spoil=written("my.yaml", text),
        command="pae train-generator my.yaml run",
        says=says,
        foreign=foreign,
    )


def row(group: str, given: str, spoil: Callable[[], object], command: str, says: str, **more: object) -> Case:
    return Case(group=group, given=given, spoil=spoil, command=command, says=says, **more)  # type: ignore[arg-type]


cache = functools.partial(row, "Packed images, features and latents")
model = functools.partial(row, "Models, checkpoints and runs")

CASES: tuple[Case, ...] = (
    *IMAGE_CASES,
    config("a misspelt key", RUN + "optin: {}\n", "^my.yaml: unknown key optin; did you mean 'optim'\\?$"),
    config("a missing key", RUN.replace("loop", "# loop"), "my.yaml: missing key loop; it has no default"),
    config(
        "a number that YAML takes for text",
        RUN.replace("0.1", "2e-4"),
        "optim.lr must be float, got '2e-4' .*; in YAML write 0.0002",
    ),
    config("text for a number", RUN.replace("5", "many"), r"loop.steps must be int, got 'many' \(str\)"),
    config("a value out of range", RUN.replace("0.1", "-1"), "optim.lr must be > 0, got -1.0"),
    config("not a number", RUN.replace("0.1", ".nan"), "optim.lr must be a finite number, got nan"),
    Case(
        group="Configs",
        given="the same, as a flag",
        spoil=nothing,
        command=f"{GENERATOR} --optim.weight-decay nan",
        says="^optim.weight_decay must be a finite number, got nan$",
    ),
    config(
        "a choice that is none",
        RUN.replace("steps: 5", "steps: 5, precision: fp8"),
        "loop.precision must be one of 'fp32', .*got 'fp8'",
    ),
    config("a key twice", RUN + "latents: b\n", "key latents stands twice in one mapping"),
    config("no YAML", "kind: [", "my.yaml is not valid YAML: ", foreign="(?<=YAML: ).*"),
    config(
        "code in YAML",
        "kind: !!python/object/apply:os.getcwd []\n",
        "my.yaml is not valid YAML: could not determine a constructor for the tag",
        foreign=' in "<unicode string>.*',
    ),
    config(
        "a config of another stage",
        "kind: TokenizerRun\n",
        "my.yaml is of kind 'TokenizerRun', but a GeneratorRun is needed here",
    ),
    config(
        "megabytes of something else",
        "x" * 2**20,
        "my.yaml is no config: it has 1,048,576 bytes, at most 65,536 are read",
    ),
    Case(
        group="Configs",
        given="no such file or preset",
        spoil=nothing,
        command="pae train-generator generator/tinny run",
        says="no config file or preset 'generator/tinny'; did you mean 'generator/tiny'\\? presets: .*/tiny",
        foreign="(?<=presets: ).*",
    ),
    cache(
        "a shard cut short",
        edited("latents/00000.npy", lambda content: content[:-8]),
        GENERATOR,
        "latents/00000.npy is damaged or missing: .*; delete it together with index.json and run the command",
        foreign="(?<=or missing: )[^;]*",
    ),
    cache(
        "a flipped bit in the data",
        flipped("latents/00000.npy"),
        "pae info latents --verify",
        "latents/00000.npy is damaged: its checksum is not that of index.json; delete it together with",
    ),
    cache(
        "a flipped bit in packed images",
        flipped("packed/00000.npy"),
        "pae info packed --verify",
        "packed/00000.npy is damaged: its checksum is not that of index.json; delete it together with",
    ),
    cache(
        "a changed statistic",
        json_with("latents/index.json", mean=[0.0] * 8),
        "pae info latents --verify",
        "latents/index.json is damaged: it does not agree with header.json and the shards' .json",
    ),
    cache(
        "labels without a class",
        lambda: np.save("latents/labels.npy", np.full(6, 7)),
        GENERATOR,
        "latents/labels.npy is damaged: labels must be 0 to 1, got 7 to 7",
    ),
    cache(
        "labels that are a pickle",
        lambda: np.save("latents/labels.npy", np.array([Harmless()] * 6), allow_pickle=True),
        GENERATOR,
        "latents/labels.npy is damaged or missing: Object arrays cannot be loaded",
        foreign="(?<=or missing: )[^;]*",
    ),
    cache(
        "an unfinished cache",
        lambda: os.remove("latents/index.json"),
        GENERATOR,
        "latents folder latents is incomplete; run the command that made it again to finish it",
    ),
    cache(
        "images where latents are needed",
        nothing,
        GENERATOR.replace("--latents latents", "--latents packed"),
        "packed holds images, but latents are needed here",
    ),
    cache(
        "more classes than the generator has",
        nothing,
        f"{GENERATOR} --model.num-classes 1",
        "latents has labels up to 1, but model.num_classes is 1",
    ),
    cache(
        "latents of another shape",
        nothing,
        f"{GENERATOR} --model.grid-size 8",
        r"latents holds latents of shape \(8, 4, 4\), the generator is built for \(8, 8, 8\); set model",
    ),
    cache(
        "a cache begun with another tokenizer",
        nothing,
        "pae cache-latents another-tokenizer packed latents --device cpu",
        "latents was begun with another attributes.tokenizer .*; delete the folder or name another",
    ),
    cache(
        "held-out latents of another tokenizer",
        ran("pae cache-latents another-tokenizer packed others --device cpu"),
        f"{GENERATOR} --held-out-latents others",
        "others and latents come from different tokenizers",
    ),
    model(
        "no model",
        nothing,
        SAMPLE.replace(" generator ", " generatr "),
        "no model at generatr: neither model.safetensors nor checkpoints/ in it",
    ),
    model(
        "a generator of another tokenizer",
        nothing,
        SAMPLE.replace(" tokenizer ", " another-tokenizer "),
        "generator makes latents of the tokenizer .*, but another-tokenizer is .*; decode with",
    ),
    model(
        "a generator of a tokenizer of another kind",
        nothing,
        SAMPLE.replace(" tokenizer ", " encoder:random-tiny/8 "),
        "generator makes latents of the tokenizer .*, but encoder:random-tiny/8 is encoder:.*; decode with",
    ),
    model(
        "an unknown kind of tokenizer",
        nothing,
        SAMPLE.replace(" tokenizer ", " difusers:vae "),
        "unknown kind of tokenizer 'difusers' in 'difusers:vae'; known: openpae, diffusers, encoder, targets",
    ),
    model(
        "a tokenizer where a generator is needed",
        nothing,
        SAMPLE.replace(" generator ", " tokenizer "),
        "^tokenizer is no generator: its config is of kind 'PAEConfig'",
    ),
    model(
        "a generator where a tokenizer is needed",
        nothing,
        "pae reconstruct generator images out",
        "generator/config.yaml is of kind 'LightningDiTConfig', but a PAEConfig is needed here",
    ),
    model(
        "weights cut short",
        edited("generator/model.safetensors", lambda content: content[:-8]),
        SAMPLE,
        "generator/model.safetensors is damaged: ",
        foreign="(?<=is damaged: ).*",
    ),
    model(
        "a flipped bit in weights",
        flipped("generator/model.safetensors"),
        SAMPLE,
        "generator is damaged or was edited: weights and config do not give its fingerprint .*; bring",
    ),
    model(
        "a config of another architecture",
        config_with("generator/config.yaml", "hidden_dim: 32", "hidden_dim: 64"),
        SAMPLE,
        "generator is damaged or was edited: weights and config do not give its fingerprint .*; bring",
    ),
    model(
        "a class that the generator does not know",
        nothing,
        f"{SAMPLE} --classes 7",
        "labels must lie in",
    ),
    model(
        "a name of a class of a generator without names",
        nothing,
        f"{SAMPLE} --classes cats",
        "generator keeps no names of its classes, so 'cats' is not known; give numbers from 0 to 1",
    ),
    model(
        "an unknown name of a class",
        lambda: write_classes(Path("generator"), ["cats", "dogs"], [3, 3]),
        f"{SAMPLE} --classes cast",
        "generator has no class 'cast'; did you mean 'cats'",
    ),
    model(
        "a run folder of another config",
        nothing,
        f"{GENERATOR.replace(' run ', ' generator-run ')} --optim.lr 0.5",
        "generator-run belongs to a run with another config .*optim.lr: 0.001 -> 0.5.*; name another",
    ),
    model(
        "data that have changed since the run began",
        both(moved("latents", "old"), ran("pae cache-latents another-tokenizer packed latents --device cpu")),
        "pae train-generator generator-run/config.yaml generator-run",
        "generator-run was trained with other latents, tokenizer: the data that its config names have",
    ),
    model(
        "a damaged newest checkpoint: the one before is taken",
        flipped("generator-run/checkpoints/step-00000002/state.pt"),
        "pae train-generator generator-run/config.yaml generator-run",
        r"^checkpoint .*step-00000002 is damaged and was skipped: its checksum is wrong \(state.pt\)$",
        code=0,
    ),
    model(
        "the same, asked about",
        flipped("generator-run/checkpoints/step-00000002/state.pt"),
        "pae info generator-run --verify",
        r"checkpoint generator-run/checkpoints/step-00000002 is damaged: its checksum is wrong \(state.pt\)",
    ),
    model(
        "a checkpoint that would run code when it is read",
        pickled_code,
        "pae train-generator generator-run/config.yaml generator-run",
        "state.pt is refused: it is a pickle that would call .*print when read",
    ),
    model(
        "released weights that would run code when they are read",
        lambda: torch.save({"model": Harmless()}, "weights.pt"),
        "pae import-official weights.pt out",
        "weights.pt is refused: it is a pickle that would call .*print when read",
    ),
    model(
        "samples that are no samples",
        written("samples.npz", "x"),
        "pae evaluate packed --samples samples.npz --extractor random",
        "samples.npz",
    ),
    model(
        "a disk that fills up at the first checkpoint",
        nothing,
        GENERATOR,
        "no room for run/checkpoints/step-00000002: .* took .* bytes and no more .*; free some",
        largest_file=5_000,
        foreign=r"[\d,]+(?= of)|(?<=of )[\d,]+(?= bytes)|[\d,]+(?= are free)",
    ),
)
