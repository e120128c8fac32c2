"""Rows of the table of errors: hostile and damaged files."""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from openpae.models.configs import LightningDiTConfig
from openpae.models.dit import LightningDiT
from openpae.storage.files import read_json
from tests.faults.more_cases import EVALUATE, linked, rows, samples, statistics
from tests.faults.running import GENERATOR
from tests.faults.spoiling import SAMPLE, both, config_with, flipped, json_with, rehashed, written
from tests.interop.released_names import generator_under_their_names

CHECKPOINT = Path("generator-run/checkpoints/step-00000002")
RESUME = "pae train-generator generator-run/config.yaml generator-run"
DRY_RUN = "pae push tokenizer me/it --dry-run"
FOREIGN = "pae import-official theirs out --tokenizer tokenizer"
ON_PACKED = EVALUATE.replace("REFERENCE", "packed")


def state_with(change: Callable[[dict], object]) -> Callable[[], object]:  # type: ignore[type-arg]
    """The newest checkpoint's state.pt, changed, with the right checksum; the one before is removed."""

    def spoil() -> None:
        shutil.rmtree(CHECKPOINT.with_name("step-00000001"))
        state = torch.load(CHECKPOINT / "state.pt", weights_only=True)
        change(state)
        torch.save(state, CHECKPOINT / "state.pt")
        rehashed(CHECKPOINT)

    return spoil


def moments(**values: torch.Tensor) -> Callable[[], object]:
    def change(state: dict) -> None:  # type: ignore[type-arg]
        for optimizer in state["optimizers"].values():
            for held in optimizer["state"].values():
                held.update(values)

    return state_with(change)


def listed(**names: str) -> Callable[[], object]:
    """checkpoint.json lists other files than there are."""

    def spoil() -> None:
        shutil.rmtree(CHECKPOINT.with_name("step-00000001"))
        facts = read_json(CHECKPOINT / "checkpoint.json")
        (CHECKPOINT / "checkpoint.json").write_text(json.dumps(facts | {"sha256": facts["sha256"] | names}))

    return spoil


def spoilt_release(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """w.pt, a generator under the authors' names with one tensor changed, and its statistics, s.pt."""
    config = LightningDiTConfig(
        latent_dim=8, grid_size=4, hidden_dim=32, num_layers=2, num_heads=2, num_classes=3
    )
    weights = generator_under_their_names(LightningDiT(config))
    torch.save(weights | {name: change(weights[name])}, "w.pt")
    torch.save({"mean": torch.zeros(8, 1, 1), "std": torch.ones(8, 1, 1)}, "s.pt")


HOSTILE = rows(
    "Hostile and damaged files",
    (
        "an optimizer state of another shape",
        moments(exp_avg_sq=torch.zeros(0)),
        RESUME,
        "the checkpoint's optimizer of .* does not match the config: exp_avg_sq; the checkpoint is damaged",
    ),
    (
        "an optimizer state of another type",
        moments(exp_avg=torch.zeros(3, dtype=torch.int8)),
        RESUME,
        ": exp_avg; the checkpoint is damaged",
    ),
    (
        "an optimizer state of complex numbers, asked about",
        moments(exp_avg_sq=torch.ones(3, dtype=torch.complex64)),
        "pae info generator-run --verify",
        ": exp_avg_sq; the checkpoint is damaged",
    ),
    ("an optimizer state of no tensor", moments(step="two"), RESUME, ": step; take another checkpoint"),
    (
        "more updates than steps",
        moments(step=torch.tensor(1e38)),
        RESUME,
        "the optimizer of generator \\(0\\) counts 1e\\+38 updates in 2 steps; take another checkpoint",
    ),
    (
        "an average of NaN",
        state_with(lambda s: s["ema"].update({n: w * torch.nan for n, w in s["ema"].items()})),
        RESUME,
        "state.pt is no training state: the weights of ema hold NaN or infinity",
    ),
    (
        "names that are none",
        state_with(lambda s: s["players"].update({None: 1})),
        "pae info generator-run --verify",
        "state.pt is no training state: the weights of None must be tensors by name",
    ),
    (
        "a strided tensor of 10^12 numbers",
        moments(exp_avg=torch.zeros(1).expand(10**12)),
        RESUME,
        "state.pt is damaged: it claims a tensor of \\(1000000000000,\\) and holds less",
    ),
    (
        "an optimizer state of another shape, asked about",
        moments(exp_avg_sq=torch.zeros(0)),
        "pae info generator-run --verify",
        "checkpoint .* is damaged: the checkpoint's optimizer of .* exp_avg_sq",
    ),
    (
        "a state of another step",
        state_with(lambda s: s.update(step=7)),
        RESUME,
        "is the training state of step 7, not of",
    ),
    (
        "a state without players",
        state_with(lambda s: s.pop("players")),
        RESUME,
        "is no training state: it has no valid players",
    ),
    (
        "norms that are none",
        state_with(lambda s: s.update(health={"generator": torch.zeros(9)})),
        RESUME,
        "health of generator must be two finite norms >= 0; take another checkpoint",
    ),
    (
        "a list of files that names a device",
        listed(**{"../../../../../dev/zero": "0"}),
        "pae info generator-run --verify",
        "checkpoint.json does not list the files of its folder",
    ),
    (
        "a file that is not listed",
        both(written(str(CHECKPOINT / "more.pt"), "x")),
        "pae info generator-run --verify",
        "checkpoint.json does not list the files of its folder \\(more.pt\\)",
    ),
    (
        "a checkpoint under another step's name",
        lambda: CHECKPOINT.rename(CHECKPOINT.with_name("step-00000009")),
        "pae info generator-run --verify",
        "checkpoint.json belongs to step 2",
    ),
    (
        "a pipe for a config",
        both(lambda: os.remove("generator/config.yaml"), lambda: os.mkfifo("generator/config.yaml")),
        SAMPLE,
        "generator/config.yaml must be a file, got a folder, a pipe or a device",
    ),
    (
        "a device for an index",
        linked("/dev/zero", "latents/index.json"),
        GENERATOR,
        "latents folder latents is incomplete",
    ),
    (
        "latents without a mean",
        lambda: _drop("latents/index.json", "mean"),
        GENERATOR,
        "latents need a tokenizer, and a finite mean",
    ),
    (
        "latents without a tokenizer",
        json_with("latents/index.json", attributes={"classes": ["a", "b"]}),
        GENERATOR,
        "latents need a tok",
    ),
    (
        "log lines without a step",
        both(written("generator-run/log.jsonl", '{"loss": 1}\n')),
        "pae info generator-run",
        "generator-run/log.jsonl is damaged: line 1 must hold a step and numbers; remove it$",
    ),
    (
        "a generator of 200,000 layers",
        config_with("generator/config.yaml", "num_layers: 2", "num_layers: 200000"),
        SAMPLE,
        "generator/config.yaml: num_layers must be <= 1024, got 200000$",
    ),
    (
        "images of 10^12 pixels a side",
        lambda: None,
        "pae pack images out --size 1000000000000",
        "^--size must be <= 16384, got 1000000000000",
    ),
    (
        "released weights that are flat",
        lambda: torch.save({"x_embedder.proj.weight": torch.zeros(4)}, "w.pt"),
        "pae import-official w.pt out --statistics w.pt",
        "x_embedder.proj.weight of the released weights must have 4 axes, none of them empty",
    ),
    (
        "released weights of width 0",
        lambda: torch.save({"x_embedder.proj.weight": torch.zeros(0, 4, 1, 1)}, "w.pt"),
        "pae import-official w.pt out --statistics w.pt",
        "must have 4 axes, none of them empty, got \\(0, 4, 1, 1\\)$",
    ),
    (
        "released weights of NaN",
        lambda: spoilt_release("blocks.0.attn.qkv.bias", lambda value: value * torch.nan),
        "pae import-official w.pt out --statistics s.pt",
        "the weights of this LightningDiT hold NaN or infinity in 1 tensors \\(blocks.0.attn.qkv.bias\\)",
    ),
    (
        "released weights that are quantised",
        lambda: spoilt_release("blocks.0.attn.qkv.weight", lambda value: value.to(torch.int8)),
        "pae import-official w.pt out --statistics s.pt",
        "1 of another type \\(blocks.0.attn.qkv.weight torch.int8 for torch.float32\\)",
    ),
    (
        "released latents without a row",
        lambda: _latents(0, 0),
        FOREIGN,
        "holds no latents",
    ),
    (
        "a label of 2^40",
        lambda: _latents(2, 2**40),
        FOREIGN,
        "would have 1,099,511,627,777 classes, at most 1,048,576 are taken",
    ),
    (
        "an npz with a wrong checksum",
        lambda: _npz(flip=True),
        ON_PACKED,
        "samples.npz is damaged: Bad CRC",
    ),
    (
        "an npz whose entry has no .npy",
        lambda: _npz(name="arr_0"),
        ON_PACKED,
        r"holds no images \(arr_0\)",
    ),
    (
        "an npz compressed in an unknown way",
        lambda: _npz(method=99),
        ON_PACKED,
        "samples.npz is damaged: ",
    ),
    (
        "an encrypted npz",
        lambda: _npz(flag=1),
        ON_PACKED,
        "samples.npz is damaged: .*encrypted",
    ),
    (
        "features of one axis",
        statistics(features=np.zeros(6, np.float32)),
        EVALUATE.replace("REFERENCE", "r.npz"),
        "features must be",
    ),
    (
        "a flipped bit in weights, to be uploaded",
        flipped("tokenizer/model.safetensors"),
        DRY_RUN,
        "tokenizer is damaged or was edited",
    ),
    (
        "weights cut short, to be uploaded",
        lambda: os.truncate("tokenizer/model.safetensors", 99),
        DRY_RUN,
        "tokenizer/model.safetensors is damaged",
    ),
    (
        "a record that is a link, to be uploaded",
        linked("/etc/hostname", "tokenizer/evaluation.json"),
        DRY_RUN,
        "tokenizer/evaluation.json is a link; put the file itself there$",
    ),
    (
        "a record without metrics, to be uploaded",
        written("tokenizer/evaluation.json", "{}"),
        DRY_RUN,
        "^tokenizer/evaluation.json is no record of pae evaluate; remove it$",
    ),
    (
        "a name that the hub cannot have",
        lambda: None,
        "pae push tokenizer me/it/now --dry-run",
        "^me/it/now cannot be a name of the hub",
    ),
    (
        "a name with control characters",
        written("images/cats/a\x1b[31mb\nc.png", "x"),
        "pae pack images out",
        r"^images/cats/a\\x1b\[31mb\\nc.png cannot be decoded: no known image format",
    ),
)


def _drop(file: str, key: str) -> None:
    data = read_json(Path(file))
    del data[key]
    Path(file).write_text(json.dumps(data))


def _latents(rows: int, label: int) -> None:
    os.mkdir("theirs")
    tensors = {"latents": torch.zeros(rows, 8, 4, 4), "labels": torch.full((rows,), label)}
    save_file(tensors, "theirs/latents.safetensors")


def _npz(*, name: str = "arr_0.npy", flip: bool = False, method: int | None = None, flag: int = 0) -> None:
    """samples.npz with one fault of its archive."""
    samples()
    with zipfile.ZipFile("samples.npz") as archive:
        content = archive.read("arr_0.npy")
    with zipfile.ZipFile("samples.npz", "w") as archive:
        archive.writestr(name, content)
    data = bytearray(Path("samples.npz").read_bytes())
    if flip:
        data[400] ^= 1
    for start, at in ((b"PK\3\4", 6), (b"PK\1\2", 8)):  # flags and method stand in both headers
        place = data.rfind(start) + at
        data[place] |= flag
        if method is not None:
            data[place + 2] = method
    Path("samples.npz").write_bytes(data)
