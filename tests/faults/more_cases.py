"""Rows of the table of errors: files of the user, invalid numbers, damaged files."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from openpae.eval.extractors import load_extractor
from openpae.eval.features import FeatureSet
from openpae.eval.reference import reference_of, save_reference
from tests.faults.running import GENERATOR, Case
from tests.faults.spoiling import SAMPLE, both, written

EVALUATE = "pae evaluate REFERENCE --samples samples.npz --extractor random"
WALK = "pae interpolate tokenizer out --images images/cats/0.png images/dogs/3.png --frames 2 --device cpu"


def rows(group: str, *entries: tuple[str, Callable[[], object], str, str]) -> tuple[Case, ...]:
    """Rows of one group: (given, spoil, command, says)."""
    return tuple(Case(group=group, given=g, spoil=s, command=c, says=says) for g, s, c, says in entries)


def linked(target: str, link: str) -> Callable[[], object]:
    def link_it() -> None:
        Path(link).unlink(missing_ok=True)
        os.symlink(target, link)

    return link_it


def samples() -> None:
    np.savez("samples.npz", np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3), dtype=np.uint8))


def statistics(**change: np.ndarray | None) -> Callable[[], object]:
    """r.npz, a reference that `EVALUATE` opens, with some arrays changed; None leaves one out."""

    def write() -> None:
        samples()
        images = FeatureSet(load_extractor("random", None))
        images.update(torch.rand(4, 3, 32, 32))
        save_reference(reference_of(images, "r"), Path("r.npz"))
        arrays = dict(np.load("r.npz", allow_pickle=False)) | change
        np.savez("r.npz", **{name: value for name, value in arrays.items() if value is not None})

    return write


MINE = rows(
    "Files of the user",
    (
        "a folder of the user's photographs named images",
        lambda: shutil.copytree("images", "out/images"),
        f"{SAMPLE} --format png",
        "^out/images exists and was not made by this command; move it away or name .*--overwrite$",
    ),
    (
        "an npz of the user",
        written("out/samples.npz", "notes"),
        SAMPLE,
        "^out/samples.npz exists and was not made by",
    ),
    (
        "a picture of the user",
        written("out/grid.png", "notes"),
        SAMPLE,
        "^out/grid.png exists and was not made by this",
    ),
    (
        "frames of the user",
        written("out/frames/0.png", "notes"),
        WALK,
        "^out/frames exists and was not made by this",
    ),
    (
        "a target below an input",
        lambda: None,
        SAMPLE.replace(" out ", " generator/out "),
        "^generator/out(/.*)? lies in generator, which is read; name another place to write to$",
    ),
    (
        "a target that is the input",
        lambda: None,
        "pae reconstruct tokenizer images images --device cpu",
        "images/cats/0.png lies in images, which is read; name another place",
    ),
    (
        "reconstructions over files of the user",
        written("out/cats/0.png", "notes"),
        "pae reconstruct tokenizer images out --device cpu",
        "^out/cats/0.png exists and was not made by this command",
    ),
    (
        "a target that holds an input",
        lambda: shutil.copytree("tokenizer", "out/images"),
        f"{SAMPLE.replace(' tokenizer ', ' out/images ')} --format png --overwrite",
        "^out/images is out/images, which is read; name another place",
    ),
    (
        "packed images inside the images",
        lambda: None,
        "pae pack images images/packed",
        "^images/packed lies in images, whi",
    ),
    (
        "a run folder with a log of something else",
        written("run/log.jsonl", "notes"),
        GENERATOR,
        "^run/log.jsonl exists and was not made by this command; move it away or name another folder$",
    ),
    (
        "weights of another program, to be replaced",
        lambda: save_file({"w": torch.zeros(2)}, "model.safetensors"),
        "pae import-official generator/model.safetensors .",
        "holds neither a tokenizer nor a generator|carries no",
    ),
    (
        "a file where a folder is meant",
        written("out", "notes"),
        SAMPLE,
        "^out/.* cannot be written: out is a file",
    ),
    (
        "a file in place of a parent folder",
        written("notes", "mine"),
        "pae pack images notes/out",
        "^notes/out cannot be written: notes is a file, not a folder$",
    ),
    (
        "links in a circle",
        both(linked("b", "out"), linked("out", "b")),
        SAMPLE,
        "out.* is a link in a circle of links",
    ),
    (
        "a lock that is a link",
        both(lambda: os.mkdir("out"), linked("/etc/hostname", "out/.lock")),
        SAMPLE,
        "out/.lock must be a lock file, got a link; remove it$",
    ),
)

_F = 512  # features of the extractor
NUMBERS = rows(
    "Numbers that are none",
    *(
        (
            f"a reference with {what} statistics",
            statistics(**change),
            EVALUATE.replace("REFERENCE", "r.npz"),
            says,
        )
        for what, change, says in (
            (
                "NaN",
                {"mu": np.full(_F, np.nan)},
                "r.npz holds no mu and sigma: statistics of features must be finite",
            ),
            ("infinite", {"sigma": np.full((_F, _F), np.inf)}, "must be finite, got NaN or infinity"),
            (
                "asymmetric",
                {"sigma": np.triu(np.ones((_F, _F)))},
                "must be symmetric: sigma is not the transpose of it",
            ),
            (
                "negative",
                {"sigma": -np.eye(_F)},
                "must be positive semi-definite: sigma has a negative eigenvalue",
            ),
            (
                "complex",
                {"mu": np.full(_F, 1j)},
                "r.npz is damaged: mu must hold real numbers, got complex128",
            ),
            ("no", {"sigma": None}, "^r.npz holds no sigma; it holds: "),
            ("text for", {"mu": np.array(["a"] * _F)}, "mu must hold real numbers, got <U1"),
        )
    ),
    *(
        (
            f"{flag} {value}",
            lambda: None,
            f"{SAMPLE} {flag} {value}",
            f"^{flag} must be a finite number, got {value}$",
        )
        for flag, value in (
            ("--guidance", "nan"),
            ("--guidance", "inf"),
            ("--shift", "nan"),
            ("--guidance-end", "nan"),
        )
    ),
    (
        "a tolerance that is none",
        lambda: None,
        "pae export generator out --tolerance nan",
        "^--tolerance must be a finite",
    ),
    (
        "a scale of a search that is none",
        lambda: None,
        "pae search-guidance tokenizer generator images out --scales nan --device cpu",
        "^scales must be a finite number, got",
    ),
    (
        "a temperature that is none",
        lambda: None,
        "pae profile tokenizer --images images --out out --sigma nan",
        "^sigma must be a finite number",
    ),
)

MORE = MINE + NUMBERS
