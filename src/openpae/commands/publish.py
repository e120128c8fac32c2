"""Commands that bring models in and give them away."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated, Literal

import tyro

from openpae.commands.console import Out

Model = Annotated[Path, tyro.conf.arg(metavar="MODEL")]
Repo = Annotated[str, tyro.conf.arg(metavar="OWNER/NAME")]


def export(
    model: Model,
    out: Out,
    /,
    format: Literal["torch-export", "onnx"] = "torch-export",
    tolerance: float = 1e-4,
) -> None:
    """Write a tokenizer's encode and decode, or a generator's velocity, as graphs that run without openpae.

    Args:
        model: a tokenizer or generator folder, or a run folder.
        out: new folder for the graphs and export.json, which describes them.
        format: torch-export (.pt2 files, for torch.export.load) or onnx (needs the extra openpae[onnx]).
        tolerance: each graph is run beside the model; it may differ by so much.
    """
    from openpae import config as configs
    from openpae.checkpoint import load_generator, load_tokenizer
    from openpae.export import export_model
    from openpae.folders import CONFIG, model_folder

    kind = configs.read_yaml(model_folder(model) / CONFIG).get("kind")
    loaded = load_tokenizer(model) if kind == "PAEConfig" else load_generator(model)
    for name, difference in export_model(loaded, out, format, tolerance=tolerance).items():
        print(f"{name}: differs from the model by at most {difference:.2g}")
    print(f"graphs in {out}")


def push(
    folder: Model,
    repo: Repo,
    /,
    licence: str | None = None,
    private: bool = False,
    dry_run: bool = False,
) -> None:
    """Upload a tokenizer, a generator, or both, with a model card, to the Hugging Face hub.

    Log in first: hf auth login. Only weights, config, card and evaluation.json are uploaded.

    Args:
        folder: a model or run folder, or a folder with the subfolders tokenizer and generator.
        repo: name on the hub; made where it does not exist.
        licence: of the weights, as the hub calls it: apache-2.0, cc-by-sa-4.0, ...
        private: make a new repository that only you can see.
        dry_run: upload nothing; list the files and print the card.
    """
    from openpae import hub
    from openpae.folders import README

    if not dry_run:
        print(hub.push(folder, repo, licence=licence, private=private))
        return
    with tempfile.TemporaryDirectory() as work:
        staged = Path(work) / "model"
        hub.stage(folder, staged, repo, licence=licence)
        for file in sorted(path for path in staged.rglob("*") if path.is_file()):
            print(f"{file.stat().st_size:>14,}  {file.relative_to(staged)}")
        print(f"\n{(staged / README).read_text(encoding='utf-8')}")
