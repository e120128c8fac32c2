"""Runs that start from the weights of a saved model: what is taken over, what is new, what stays frozen."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from openpae.commands.describe import describe
from openpae.data.caches import cache_latents
from openpae.data.images import PackedImages
from openpae.models.encoders import FrozenEncoder
from openpae.models.saved import check_pair, load_generator, load_tokenizer, write_tokenizer
from openpae.models.tokenizer import build_tokenizer
from openpae.sampling.pipeline import Pipeline, SamplingModels
from openpae.storage.card import model_card
from openpae.storage.model_folder import (
    checkpoint_path,
    identity_of,
    model_folder,
    new_model_folder,
    read_classes,
    read_parent,
    write_classes,
)
from openpae.train.generator import GeneratorTask, train_generator
from openpae.train.given import start_from
from openpae.train.settings import GeneratorRun, TokenizerRun
from openpae.train.tokenizer import TokenizerTask, train_tokenizer

State = dict[str, torch.Tensor]


def changed(before: State, after: State) -> set[str]:
    """The top-level parts with a tensor that differs."""
    return {
        name.partition(".")[0]
        for name, value in after.items()
        if name not in before or not torch.equal(before[name], value)
    }


@pytest.mark.parametrize(
    ("train", "parts"),
    [
        ("decoder", {"decoder", "deprojector"}),
        ("decoder+projectors", {"decoder", "deprojector", "projector"}),
        ("all", {"decoder", "deprojector", "projector", "modulator"}),
    ],
)
def test_only_the_named_part_of_a_tokenizer_is_trained(
    tokenizer_run: TokenizerRun, tokenizer_folder: Path, tmp_path: Path, train: Any, parts: set[str]
) -> None:
    """With weight decay and an average, as the fixture has both."""
    run = replace(tokenizer_run, init_from=tokenizer_folder, train=train)
    train_tokenizer(run, tmp_path / "run", quiet=True)
    before, after = (load_tokenizer(folder) for folder in (tokenizer_folder, tmp_path / "run"))
    assert changed(before.state_dict(), after.state_dict()) == parts
    images = torch.rand(3, 3, 32, 32)
    assert torch.equal(before.encode(images), after.encode(images)) == (train == "decoder")
    parent = read_parent(model_folder(tmp_path / "run"))
    assert parent is not None
    assert (parent.fingerprint, parent.trained) == (identity_of(tokenizer_folder).fingerprint, train)
    assert parent.fingerprint in model_card({"": model_folder(tmp_path / "run")}, "me/mine", None)
    assert describe(checkpoint_path(tmp_path / "run", 6))["started from"].startswith(parent.fingerprint)


def test_a_finetuned_decoder_resumes_to_the_bit(
    tokenizer_run: TokenizerRun, tokenizer_folder: Path, tmp_path: Path
) -> None:
    run = replace(tokenizer_run, init_from=tokenizer_folder, train="decoder")
    train_tokenizer(run, tmp_path / "one go", quiet=True)
    train_tokenizer(run, tmp_path / "two", quiet=True)
    shutil.rmtree(checkpoint_path(tmp_path / "two", 6))
    train_tokenizer(run, tmp_path / "two", quiet=True)
    one, two = (identity_of(tmp_path / name).fingerprint for name in ("one go", "two"))
    assert one == two


@pytest.mark.parametrize("train", ["decoder", "decoder+projectors"])
def test_a_generator_goes_on_with_a_finetuned_decoder(
    tokenizer_run: TokenizerRun,
    generator_run: GeneratorRun,
    tokenizer_folder: Path,
    tmp_path: Path,
    train: Any,
) -> None:
    """Its latents are those that the new decoder decodes; with other projectors they are not."""
    generator_folder = tmp_path / "generator"
    train_generator(generator_run, generator_folder, quiet=True)
    run = replace(tokenizer_run, init_from=tokenizer_folder, train=train)
    train_tokenizer(run, tmp_path / "run", quiet=True)
    if train != "decoder":
        with pytest.raises(ValueError, match="decode with the tokenizer that the generator was trained with"):
            check_pair(tmp_path / "run", generator_folder)
        return
    facts = check_pair(tmp_path / "run", generator_folder)
    assert facts["tokenizer"] == identity_of(tmp_path / "run").fingerprint
    device = torch.device("cpu")
    models = SamplingModels.load(tmp_path / "run", generator_folder, generator_folder, device=device)
    z = torch.randn(2, *models.generator.config.latent_shape)
    assert torch.equal(models.tokenizer.decode(z), load_tokenizer(tmp_path / "run").decode(z))
    assert not torch.equal(models.tokenizer.decode(z), load_tokenizer(tokenizer_folder).decode(z))
    Pipeline.join(tmp_path / "run", generator_folder).save_pretrained(tmp_path / "pair")
    again = Pipeline.from_pretrained(tmp_path / "pair")
    assert torch.equal(again.tokenizer.decode(z), models.tokenizer.decode(z))


def test_a_run_does_not_resume_from_another_parent(
    tokenizer_run: TokenizerRun, tokenizer_folder: Path, tmp_path: Path
) -> None:
    run = replace(tokenizer_run, init_from=tokenizer_folder, train="decoder")
    train_tokenizer(run, tmp_path / "run", quiet=True)
    assert TokenizerTask(run).inputs["init_from"] == identity_of(tokenizer_folder).fingerprint
    assert TokenizerTask(replace(run, init_from=tmp_path / "run")).inputs != TokenizerTask(run).inputs


def test_saved_copies_name_the_parent_too(
    tokenizer_run: TokenizerRun,
    generator_run: GeneratorRun,
    tokenizer_folder: Path,
    tmp_path: Path,
) -> None:
    """As the checkpoints of the run do, alone and in a pair."""
    run = replace(tokenizer_run, init_from=tokenizer_folder, train="decoder")
    train_tokenizer(run, tmp_path / "tokenizer", quiet=True)
    expected = read_parent(model_folder(tmp_path / "tokenizer"))
    assert expected is not None
    assert expected.fingerprint == identity_of(tokenizer_folder).fingerprint
    tokenizer = load_tokenizer(tmp_path / "tokenizer")
    tokenizer.save_pretrained(tmp_path / "copy", precision="bf16")
    assert read_parent(tmp_path / "copy") == expected
    assert expected.fingerprint in (tmp_path / "copy" / "README.md").read_text(encoding="utf-8")
    train_generator(generator_run, tmp_path / "first", quiet=True)
    train_generator(replace(generator_run, init_from=tmp_path / "first"), tmp_path / "second", quiet=True)
    Pipeline(tokenizer, load_generator(tmp_path / "second")).save_pretrained(tmp_path / "pair")
    for part, source in (("tokenizer", "tokenizer"), ("generator", "second")):
        assert read_parent(tmp_path / "pair" / part) == read_parent(model_folder(tmp_path / source))


def test_the_encoder_that_a_tokenizer_keeps_goes_along(tokenizer_run: TokenizerRun, tmp_path: Path) -> None:
    """As that of the imported release: its weights have no other home."""
    model = build_tokenizer(tokenizer_run.model)
    assert isinstance(model.encoder, FrozenEncoder)
    model.keeps_encoder = True
    with torch.no_grad():
        for parameter in model.encoder.parameters():
            parameter.add_(0.1)
    model.save_pretrained(tmp_path / "kept")
    run = replace(tokenizer_run, init_from=tmp_path / "kept", train="decoder")
    train_tokenizer(run, tmp_path / "run", quiet=True)
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(load_tokenizer(tmp_path / "run").encode(images), model.eval().encode(images))


def test_a_generator_moves_to_other_latents_and_classes(
    generator_run: GeneratorRun,
    packed: PackedImages,
    tmp_path: Path,
) -> None:
    """Latents of more channels, and four classes: the named parts are new, the others are taken over."""
    train_generator(generator_run, tmp_path / "parent", quiet=True)
    config = replace(generator_run.model, latent_dim=12, num_classes=4)
    wider = cache_latents(
        lambda x: torch.cat([x, x.flip(1), x.square(), 1 - x], 1)[..., ::8, ::8],
        packed,
        tmp_path / "latents",
        image_size=32,
        latent_shape=(12, 4, 4),
        tokenizer_fingerprint="0" * 16,
    )
    run = replace(generator_run, model=config, latents=wider.folder, held_out_latents=None)
    run = replace(run, init_from=tmp_path / "parent", init_new=("class_embed", "patch_embed", "to_velocity"))
    moved, parent = GeneratorTask(run), load_generator(tmp_path / "parent").state_dict()
    new = {"class_embed", "patch_embed", "to_velocity"}
    assert changed(parent, dict(moved.model.state_dict())) == new | {"latent_mean", "latent_std"}
    assert torch.allclose(moved.model.latent_mean.flatten(), torch.tensor(wider.index["mean"]))
    with pytest.raises(
        ValueError, match=r"do not fit the config at class_embed.weight; .* init_new: class_em"
    ):
        GeneratorTask(replace(run, init_new=("patch_embed", "to_velocity")))
    train_generator(run, tmp_path / "run", quiet=True)
    record = read_parent(model_folder(tmp_path / "run"))
    assert record is not None
    assert record.fingerprint == identity_of(tmp_path / "parent").fingerprint
    assert "class_embed.weight" in record.new
    assert identity_of(tmp_path / "run").made_with == "0" * 16
    assert "to_velocity.bias" in model_card({"": model_folder(tmp_path / "run")}, "me/mine", None)


def test_unknown_parts_are_named_with_those_that_exist(
    generator_run: GeneratorRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train_generator(generator_run, tmp_path / "run", quiet=True)
    model = GeneratorTask(generator_run).model
    with pytest.raises(ValueError, match="init_new names 'y_embedder', no part of the model; its parts: blo"):
        start_from(model, tmp_path / "run", ["y_embedder"])
    start_from(model, tmp_path / "run", ["class_embed"])
    fingerprint = identity_of(tmp_path / "run").fingerprint
    assert f"fingerprint {fingerprint}; new weights for class_embed (1 tensors)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"init_from": None, "train": "decoder"}, "init_new and train need init_from"),
        ({"start": "patches"}, "start patches would replace the weights of init_from"),
        ({"train": "decoder", "init_new": ("modulator.layers",)}, "modulator.layers cannot be in init_new"),
    ],
)
def test_fields_that_contradict_the_start_are_refused(
    tokenizer_run: TokenizerRun, tokenizer_folder: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        replace(tokenizer_run, **({"init_from": tokenizer_folder} | changes))


def test_losses_of_the_latent_are_refused_where_it_is_frozen(
    tokenizer_run: TokenizerRun, tokenizer_folder: Path
) -> None:
    loss = replace(tokenizer_run.loss, kl=0.1)
    with pytest.raises(ValueError, match=r"loss.kl must be 0 for train decoder"):
        replace(tokenizer_run, init_from=tokenizer_folder, train="decoder", loss=loss)


def test_another_encoder_is_refused(tokenizer_run: TokenizerRun, tmp_path: Path) -> None:
    model = build_tokenizer(tokenizer_run.model)
    with new_model_folder(tmp_path / "other") as folder:
        write_tokenizer(folder, model.state_dict(), tokenizer_run.model, "f" * 16)
    run = replace(tokenizer_run, init_from=tmp_path / "other")
    with pytest.raises(ValueError, match=r"was trained with the encoder f{16}, but model.encoder is"):
        TokenizerTask(run)
    config = replace(tokenizer_run.model, encoder="dinov2-l")
    with pytest.raises(ValueError, match=r"trained with the VFM random-tiny, model.encoder is dinov2-l"):
        TokenizerTask(replace(run, model=config))


def test_new_parts_need_a_parent(generator_run: GeneratorRun) -> None:
    with pytest.raises(ValueError, match="init_new needs init_from"):
        replace(generator_run, init_new=("class_embed",))


def test_the_classes_are_those_of_the_latents_or_else_those_of_the_parent(
    generator_run: GeneratorRun, tmp_path: Path
) -> None:
    """Latents without names, such as imported ones, keep the parent's, unless its embedding is not kept."""
    own_copy = shutil.copytree(generator_run.latents, tmp_path / "latents")  # its names are removed below
    generator_run = replace(generator_run, latents=own_copy)
    train_generator(generator_run, tmp_path / "parent", quiet=True)
    folder = model_folder(tmp_path / "parent")
    own = read_classes(folder)
    assert own is not None
    run = replace(generator_run, init_from=folder, held_out_latents=None)
    write_classes(folder, ["one", own[0][1]], [5, 5])
    with pytest.warns(
        UserWarning, match=r"1 classes go on .* class 0 is 'one' in .*; init_new class_embed gives"
    ):
        assert GeneratorTask(run).classes == own
    assert GeneratorTask(replace(run, init_new=("class_embed",))).classes == own

    header = run.latents / "header.json"
    facts = json.loads(header.read_text())
    del facts["attributes"]["classes"]
    header.write_text(json.dumps(facts))
    index = run.latents / "index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | facts))
    assert GeneratorTask(replace(run, init_new=("class_embed",))).classes is None
    train_generator(run, tmp_path / "moved", quiet=True)
    assert read_classes(tmp_path / "moved") == (["one", own[0][1]], own[1])
    write_classes(folder, ["one"], [5])
    assert GeneratorTask(run).classes is None  # label 1 has no name
