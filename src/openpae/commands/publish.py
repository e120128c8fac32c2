"""Commands that import, export and upload models."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from openpae.commands.console import Out
from openpae.runtime.terminal import Progress, say

Model = Annotated[Path, tyro.conf.arg(metavar="MODEL")]
Repo = Annotated[str, tyro.conf.arg(metavar="OWNER/NAME")]


def import_official(
    file: Annotated[Path, tyro.conf.arg(metavar="FILE")],
    out: Out,
    /,
    encoder: str = "dinov2-l",
    encoder_source: str | None = None,
    decoder_heads: int | None = None,
    tokenizer: Path | None = None,
    statistics: Path | None = None,
    classes: int | None = None,
) -> None:
    """Import released weights (PAE's, LightningDiT of VA-VAE, DiT-DH of RAE) or an existing latent cache.

    Sizes are read from the weights, and every tensor must be used. Pickles are read without running code.

    Args:
        file: a tokenizer or generator file (.pt, .safetensors), or a folder of safetensors shards with
            latents, latents_flip and labels.
        out: new folder for the tokenizer, the generator or the latents.
        encoder: VFM of a tokenizer (dinov2-l, dinov3-l, siglip2-so, mae-l, internvit-300m-mlp). The file
            holds its weights; its config comes from the hub.
        encoder_source: hub name or local folder with the config.json of a tokenizer's VFM.
        decoder_heads: attention heads of a tokenizer's decoder, if it has none of the paper's sizes.
        tokenizer: folder of the imported tokenizer that a generator or latents belong to.
        statistics: file with mean and std of a generator's latents (latents_stats.pt).
        classes: number of classes of latents; by default the largest label plus one.
    """
    from openpae.interop.released import released_kind
    from openpae.storage.outputs import check_outputs
    from openpae.storage.weights import read_tensors

    check_outputs(into=out, inputs=[file, tokenizer, statistics])
    if file.is_dir():
        _import_latents(file, out, tokenizer, classes)
        return
    released = read_tensors(file)
    if released_kind(released) == "tokenizer":
        _import_tokenizer(released, out, encoder, encoder_source, decoder_heads)
    else:
        _import_generator(released, out, tokenizer, statistics)


def _import_tokenizer(
    released: dict[str, Any], out: Path, encoder: str, source: str | None, decoder_heads: int | None
) -> None:
    from openpae.interop import released as released_module
    from openpae.storage.model_folder import identity_of

    config = released_module.released_tokenizer_config(released, encoder, source, decoder_heads)
    released_module.import_tokenizer(released, config).save_pretrained(out)
    c, h, w = config.latent_shape
    say(f"tokenizer of {config.image_size}-pixel images to {c} x {h} x {w} latents in {out}")
    say(f"fingerprint {identity_of(out).fingerprint}")


def _import_generator(
    released: dict[str, Any], out: Path, tokenizer: Path | None, statistics: Path | None
) -> None:
    from openpae.interop import released as released_module
    from openpae.storage.model_folder import identity_of

    if statistics is None:
        raise ValueError("a generator needs the statistics of its latents: --statistics latents_stats.pt")
    generator = released_module.import_generator(
        released, released_module.released_generator_config(released)
    )
    generator.set_statistics(*released_module.read_statistics(statistics))
    # Without its tokenizer the generator can sample latents, but no tokenizer here decodes them.
    generator.made_with = "unknown" if tokenizer is None else identity_of(tokenizer).fingerprint
    generator.save_pretrained(out)
    c, h, w = generator.config.latent_shape
    say(f"{type(generator).__name__} of {c} x {h} x {w} latents, {generator.null_label} classes, in {out}")


def _import_latents(source: Path, out: Path, tokenizer: Path | None, classes: int | None) -> None:
    from openpae import config as configs
    from openpae.interop.foreign_latents import import_latents
    from openpae.models.configs import PAEConfig
    from openpae.storage.model_folder import CONFIG, identity_of, model_folder

    if tokenizer is None:
        raise ValueError("latents belong to a tokenizer: --tokenizer FOLDER (import that first)")
    config = configs.load(PAEConfig, model_folder(tokenizer) / CONFIG)
    with Progress("importing", "latents") as progress:
        shards = import_latents(
            source,
            out,
            tokenizer_fingerprint=identity_of(tokenizer).fingerprint,
            image_size=config.image_size,
            latent_shape=config.latent_shape,
            num_classes=classes,
            progress=progress,
        )
    say(f"{len(shards):,} latents {shards.shape[1:]} in {out}")


def export(
    model: Model,
    out: Out,
    /,
    format: Literal["torch-export", "onnx"] = "torch-export",
    tolerance: float = 1e-4,
) -> None:
    """Export a tokenizer's encode and decode, or a generator's velocity, as graphs that run without openpae.

    Args:
        model: a tokenizer or generator folder, a run folder, or a pair.
        out: new folder for the graphs and their description, export.json; with a pair, for a folder of each.
        format: torch-export (.pt2 files, for torch.export.load) or onnx (needs the extra openpae[onnx]).
        tolerance: largest allowed difference between the outputs of graph and model.
    """
    from openpae import config as configs
    from openpae.interop.export import check_new, export_model
    from openpae.models.saved import load_generator, load_tokenizer
    from openpae.storage.files import atomic_folder
    from openpae.storage.model_folder import CONFIG, model_folder
    from openpae.storage.outputs import check_outputs
    from openpae.storage.pairs import PARTS, is_pair

    def export_one(folder: Path, to: Path) -> None:
        kind = configs.read_yaml(model_folder(folder) / CONFIG).get("kind")
        loaded = load_tokenizer(folder) if kind == "PAEConfig" else load_generator(folder)
        for name, difference in export_model(loaded, to, format, tolerance=tolerance).items():
            say(f"{name}: differs from the model by at most {difference:.2g}")

    check_outputs(into=out, inputs=[model])
    if is_pair(model):
        check_new(out)
        with atomic_folder(out) as partial:
            for part in PARTS:
                export_one(model / part, partial / part)
    else:
        export_one(model, out)
    say(f"graphs in {out}")


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
        repo: name on the hub; it is created if it does not exist.
        licence: licence of the weights, as the hub names it: apache-2.0, cc-by-sa-4.0, ...
        private: create a new repository as private.
        dry_run: upload nothing; list the files and print the card.
    """
    from openpae.storage import hub
    from openpae.storage.model_folder import README

    if not dry_run:
        print(hub.push(folder, repo, licence=licence, private=private))
        return
    with tempfile.TemporaryDirectory() as work:
        staged = Path(work) / "model"
        hub.stage(folder, staged, repo, licence=licence)
        for file in sorted(path for path in staged.rglob("*") if path.is_file()):
            say(f"{file.stat().st_size:>14,}  {file.relative_to(staged)}")
        print(f"\n{(staged / README).read_text(encoding='utf-8')}")
