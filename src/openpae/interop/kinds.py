"""How a tokenizer is named: KIND:SOURCE, or a folder. This file imports no torch.

runs/x                      a folder: an openpae tokenizer or run, or a diffusers model (config.json)
openpae:runs/x              an openpae tokenizer or run
diffusers:OWNER/NAME        an autoencoder of the hub, OWNER/NAME/SUBFOLDER, or a folder
encoder:dinov2-l            features of a frozen VFM, one token per 16 x 16 pixels
encoder:dinov2-l/8          the same, one token per 8 x 8 pixels
targets:dinov2-l/8:runs/r   targets Z_T of a refiner of that VFM, or raw targets
python:my_tokenizer.py      a file with encode(images) and perhaps decode(z); its code is run
"""

from __future__ import annotations

import json
from pathlib import Path

KINDS = ("openpae", "diffusers", "encoder", "targets", "python")
"""Kinds of tokenizers."""


def kind_and_source(tokenizer: str | Path) -> tuple[str, str]:
    """The kind of a tokenizer, and its folder, file or name.

    Raises:
        ValueError: an unknown kind.
    """
    text = str(tokenizer)
    kind, colon, source = text.partition(":")
    if colon and kind in KINDS:
        return kind, source
    folder = Path(text)
    if colon and not folder.exists():
        raise ValueError(f"unknown kind of tokenizer {kind!r} in {text!r}; known: {', '.join(KINDS)}")
    return "diffusers" if _is_diffusers(folder) else "openpae", text


def home_of(tokenizer: str | Path) -> Path | None:
    """Folder or file of a tokenizer, which need not exist; None for a VFM, which has none.

    Raises:
        ValueError: an unknown kind.
    """
    kind, source = kind_and_source(tokenizer)
    if kind == "encoder":
        return None
    return Path(source.partition(":")[2] if kind == "targets" else source)


def _is_diffusers(folder: Path) -> bool:
    try:
        return "_class_name" in json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
