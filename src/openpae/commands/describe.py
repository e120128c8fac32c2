"""Describe a folder or file: a run, a model, a cache, samples, packed images or images of any form."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from safetensors import safe_open

from openpae import config as configs
from openpae.data.classes import class_list, count_classes
from openpae.data.forms import is_remote
from openpae.data.images import ImageFolder, open_source, place_of
from openpae.data.pixels import hash_of_all, hashes_of, quantize
from openpae.data.shards import Shards
from openpae.engine.checkpoints import verify_checkpoint
from openpae.engine.journal import read_log
from openpae.eval.image_stream import stored_images
from openpae.models.ditdh import GENERATORS
from openpae.models.saved import load_generator, load_prior, load_tokenizer
from openpae.sampling.sample_set import SAMPLES
from openpae.sampling.settings import FILES
from openpae.storage.files import file_hash, read_fields, read_json
from openpae.storage.model_folder import (
    WEIGHTS,
    checkpoint_path,
    checkpoint_steps,
    identity_of,
    read_classes,
    read_parent,
)
from openpae.storage.outputs import read_record
from openpae.storage.pairs import PARTS, is_pair

_KINDS = {
    "PAEConfig": ("a tokenizer", "encoder"),
    "LightningDiTConfig": ("a generator", "made for"),
    "DiTDHConfig": ("a generator with a wide head", "made for"),
    "RefinerConfig": ("a refiner", "encoder"),
    "LinearTargetsConfig": ("raw targets", "encoder"),
}
"""Kind of a model folder's config -> what the folder is, and the name of its second fingerprint."""


def describe(folder: Path, *, verify: bool = False) -> dict[str, str]:
    """Return facts about a folder or file by name, the most important first.

    Args:
        folder: what pae writes or reads.
        verify: also check every shard, weight and image file.

    Raises:
        FileNotFoundError: there is no such folder, or it holds nothing that pae reads.
        ValueError: the folder is damaged.
    """
    if not is_remote(folder) and not place_of(folder).exists():
        raise FileNotFoundError(f"no folder at {folder}")
    if is_pair(folder):
        about = {part: describe(folder / part, verify=verify) for part in PARTS}
        facts = {f"{part} {name}": value for part in PARTS for name, value in about[part].items()}
        return {"what": "a pair: a tokenizer and a generator of its latents", **facts}
    if (folder / "header.json").is_file():
        return _shards(folder, verify)
    if (folder / WEIGHTS).is_file():
        return _model(folder, verify)
    if (folder / "config.yaml").is_file():
        return _run(folder, verify)
    if "samples_sha256" in read_record(folder / SAMPLES):  # else a file of the user
        return _samples(folder, verify)
    source = open_source(folder, full_hash=verify)
    counts = count_classes(source.classes, source.labels)
    facts = {
        "what": "a folder of images" if isinstance(source, ImageFolder) else "images to be packed",
        "images": f"{len(source):,}",
        "classes": f"{len(source.classes)} ({min(counts)} to {max(counts)} images each)",
        "labels": class_list(source.classes, counts),
        "fingerprint": source.fingerprint(),
    }
    if verify:
        for index in range(len(source)):
            source.read(index)
        facts["verified"] = "every image can be decoded"
    return facts


def _shards(folder: Path, verify: bool) -> dict[str, str]:
    if not (folder / "index.json").is_file():
        header = read_fields(folder / "header.json", kind=str, sources=int, per_shard=int)
        done = len(list(folder.glob("[0-9]*.npy")))
        if header["per_shard"] < 1:
            raise ValueError(f"{folder / 'header.json'} is damaged: per_shard must be >= 1")
        total = -(-header["sources"] // header["per_shard"])
        return {
            "what": f"{header['kind']}, incomplete: {done} of {total} shards",
            "what to do": "run the command that makes it again; it resumes",
        }
    shards = Shards(folder)
    classes = shards.attributes.get("classes", [])
    facts = {
        "what": f"cached {shards.index['kind']}" if shards.index["kind"] != "images" else "packed images",
        "rows": f"{len(shards):,} of shape {shards.shape}, {shards.index['dtype']}",
        "classes": str(len(classes)),
        "labels": class_list(classes, count_classes(classes, shards.labels)),
        "skipped files": str(len(shards.index["skipped"])),
    }
    facts |= {
        name: str(shards.attributes[name])
        for name in ("tokenizer", "encoder", "images", "source")
        if name in shards.attributes
    }
    if "mean" in shards.index:
        facts["channel mean"] = _span(shards.index["mean"])
        facts["channel std"] = _span(shards.index["std"])
    if verify:
        shards.verify()
        facts["verified"] = "every shard has its checksum"
    return facts


def _samples(folder: Path, verify: bool) -> dict[str, str]:
    """Facts about a folder of `pae sample`; verified is the hash of all its samples."""
    record = read_fields(folder / SAMPLES, count=int, format=str, samples_sha256=str)
    if record["format"] not in FILES:
        raise ValueError(f"{folder / SAMPLES} is damaged: format must be one of {', '.join(FILES)}")
    target = folder / FILES[record["format"]]
    shown = ("tokenizer", "generator", "seed", "solver", "steps", "guidance", "labels", "precision")
    facts = {
        "what": "samples of a generator",
        "samples": f"{record['count']:,} in {target.name}",
        **{name: _short(record[name]) for name in shown if name in record},
    }
    if verify:
        if not target.exists():
            raise FileNotFoundError(f"no samples at {target}; draw them again")
        if _sha256_of(folder, target) != record["samples_sha256"]:
            raise ValueError(f"{target} was changed: its samples are not those of {SAMPLES}; draw them again")
        facts["verified"] = "the samples are those of the record"
    return facts


def _sha256_of(folder: Path, target: Path) -> str:
    """samples_sha256 of the samples in a file or folder, a few at a time."""
    if target.name == FILES["latents"]:
        return file_hash(target)
    if target.name != FILES["safetensors"]:
        stream = stored_images(folder)
        return hash_of_all(
            digest for batch in stream.batches(64) for digest in hashes_of(quantize(batch.images))
        )
    with safe_open(target, "pt") as file:
        rows = file.get_slice("images")
        parts = (rows[start : start + 64] for start in range(0, rows.get_shape()[0], 64))
        return hash_of_all(digest for part in parts for digest in hashes_of(part))


def _model(folder: Path, verify: bool) -> dict[str, str]:
    data = configs.read_yaml(folder / "config.yaml")
    kind = str(data.get("kind"))
    if kind not in _KINDS:
        raise ValueError(f"{folder / 'config.yaml'} is of kind {kind!r}; known: {', '.join(_KINDS)}")
    identity = identity_of(folder)
    with safe_open(folder / WEIGHTS, "pt") as file:
        sizes = [file.get_slice(key).get_shape() for key in file.keys()]  # noqa: SIM118
    count = sum(math.prod(size) for size in sizes)
    label, relation = _KINDS[kind]
    facts = {
        "what": label,
        "parameters": f"{count:,} in {len(sizes)} tensors",
        "fingerprint": identity.fingerprint,
        relation: identity.made_with,
        **{key: _short(value) for key, value in data.items() if key != "kind"},
    }
    if (parent := read_parent(folder)) is not None:
        facts["started from"] = f"{parent.fingerprint}, trained {parent.trained}"
    if (classes := read_classes(folder)) is not None:
        facts["labels"] = class_list(*classes)
    if (folder / "checkpoint.json").is_file():
        facts["step"] = f"{read_json(folder / 'checkpoint.json').get('step')}"
    if verify:
        if (folder / "checkpoint.json").is_file():
            try:
                verify_checkpoint(folder)
            except ValueError as error:
                raise ValueError(f"checkpoint {folder} is damaged: {error}") from None
        if kind == "PAEConfig":
            load_tokenizer(folder, decode_only=True)
        elif kind in [config.__name__ for config in GENERATORS]:
            load_generator(folder)
        else:
            load_prior(folder)
        facts["verified"] = "weights and config give the fingerprint"
    return facts


def _run(folder: Path, verify: bool) -> dict[str, str]:
    data = configs.read_yaml(folder / "config.yaml")
    steps = checkpoint_steps(folder)
    if not isinstance(loop := data.get("loop"), dict) or type(planned := loop.get("steps")) is not int:
        raise ValueError(f"{folder / 'config.yaml'} is no config of a run: it has no loop.steps")
    facts = {
        "what": f"a run ({data.get('kind')})",
        "checkpoints": ", ".join(f"{step:,}" for step in steps) or "none",
        "progress": f"{steps[-1] if steps else 0:,} of {planned:,} steps",
    }
    if (folder / "log.jsonl").is_file() and (lines := read_log(folder)):
        last: dict[str, float] = {}
        for line in lines:
            last |= line
        facts |= {name: f"{value:.5g}" for name, value in last.items() if name not in ("step", "lr")}
    for step in steps if verify else steps[-1:]:
        inside = _model(checkpoint_path(folder, step), verify)
        shown = ("parameters", "fingerprint", "labels", "verified")
        facts |= {name: inside[name] for name in shown if name in inside}
    return facts


def _span(values: list[float]) -> str:
    return f"{min(values):.3f} to {max(values):.3f}"


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {item}" for key, item in value.items())
    return str(value)
