"""Training a tokenizer: frozen and fine-tuned encoders, cached features, broken images."""

from __future__ import annotations

import pickle
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from openpae.data.images import ImageFolder, PackedImages
from openpae.data.shards import Shards
from openpae.data.training import TrainingLatents
from openpae.engine.journal import read_log
from openpae.engine.loop import fit
from openpae.models.encoders import encoder_fingerprint, load_encoder
from openpae.models.saved import load_tokenizer
from openpae.objective.settings import TokenizerLoss
from openpae.storage.model_folder import identity_of
from openpae.train.settings import TokenizerRun
from openpae.train.tokenizer import TokenizerTask
from tests.engine.runs import L1_ONLY, LOOP, OPTIM, curve, same, train, with_loop


def test_the_frozen_encoder_does_not_change(tokenizer_run: TokenizerRun, tmp_path: Path) -> None:
    task = TokenizerTask(replace(tokenizer_run, optim=replace(OPTIM, lr=0.1)))
    before = {name: value.clone() for name, value in task.model.state_dict().items()}
    fit(task, tmp_path, task.run.optim, LOOP, quiet=True)
    after = task.model.state_dict()
    frozen = {name for name in before if name.startswith("encoder.")}
    assert frozen
    assert all(torch.equal(before[name], after[name]) for name in frozen)
    assert encoder_fingerprint(task.model.encoder) == encoder_fingerprint(load_encoder("random-tiny"))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == before.keys() - frozen


def test_a_finetuned_encoder_is_trained_and_averaged(tokenizer_run: TokenizerRun, tmp_path: Path) -> None:
    run = replace(tokenizer_run, model=replace(tokenizer_run.model, fusion="finetune"))
    train(run, tmp_path)
    loaded = load_tokenizer(tmp_path)
    images = torch.rand(1, 3, 32, 32)
    start = load_encoder("random-tiny")
    assert not torch.allclose(loaded.features(images), start(loaded.preprocess(images)), atol=1e-4)
    assert identity_of(tmp_path).made_with == encoder_fingerprint(start)


def test_broken_images_are_named_while_training_goes_on(
    tokenizer_run: TokenizerRun, image_folder: Path, tmp_path: Path
) -> None:
    images = Path(shutil.copytree(image_folder, tmp_path / "images"))
    (images / "discs" / "9.png").write_text("no image")
    data = replace(tokenizer_run.data, images=images, skip_broken=True)
    with pytest.warns(UserWarning, match=r"discs/9.png cannot be decoded.*another image takes its place"):
        train(replace(tokenizer_run, data=data), tmp_path / "run")


def test_training_on_cached_features_is_training_on_computed_ones(
    tokenizer_run: TokenizerRun, packed: PackedImages, tmp_path: Path
) -> None:
    """The first losses are equal up to the rounding to float16, 5e-4 of a feature; the cache is made on
    first use and used ever after."""
    tokenizer_run = with_loop(tokenizer_run, steps=1, log_every=1)
    data = replace(tokenizer_run.data, images=packed.shards.folder, augment="flip")
    cached = replace(tokenizer_run, data=replace(data, feature_cache=tmp_path / "features"))
    train(replace(tokenizer_run, data=data), tmp_path / "computed")
    train(cached, tmp_path / "cached")
    assert Shards(tmp_path / "features", kind="features").shape == (2, 16, 48)
    for line, expected in zip(curve(tmp_path / "cached"), curve(tmp_path / "computed"), strict=True):
        assert line == pytest.approx(expected, rel=5e-3)
    before = (tmp_path / "features" / "index.json").stat().st_mtime_ns
    TokenizerTask(cached)
    assert (tmp_path / "features" / "index.json").stat().st_mtime_ns == before


def test_cached_features_that_cannot_be_right_are_rejected(
    tokenizer_run: TokenizerRun, tmp_path: Path
) -> None:
    data = replace(tokenizer_run.data, augment="flip", feature_cache=tmp_path / "features")
    with pytest.raises(ValueError, match=r"needs packed images; make them with: pae pack"):
        TokenizerTask(replace(tokenizer_run, data=data))
    with pytest.raises(ValueError, match=r"feature_cache cannot serve model.fusion finetune"):
        replace(tokenizer_run, data=data, model=replace(tokenizer_run.model, fusion="finetune"))


def test_a_loss_switched_off_is_not_computed(tokenizer_run: TokenizerRun, tmp_path: Path) -> None:
    run = replace(tokenizer_run, loss=L1_ONLY)
    assert train(run, tmp_path).keys() == {"psnr", "ssim"}
    assert "autoencoder/lpips" not in read_log(tmp_path)[0]
    assert read_log(tmp_path)[0]["autoencoder/loss"] == read_log(tmp_path)[0]["autoencoder/l1"]
    with pytest.raises(ValueError, match=r"loss.lpips must be >= 0, got -1.0"):
        TokenizerLoss(lpips=-1.0)


def test_image_folders_are_those_of_the_config(tokenizer_run: TokenizerRun) -> None:
    task = TokenizerTask(tokenizer_run)
    assert task.inputs["images"] == ImageFolder(tokenizer_run.data.images).fingerprint()
    assert task.held_out is not None
    assert len(task.held_out) == 10


def test_data_can_be_pickled_for_worker_processes(tokenizer_run: TokenizerRun, latents: Shards) -> None:
    """What a spawned reader unpickles gives the same batches."""
    for data in (TokenizerTask(tokenizer_run).images, TrainingLatents(latents, seed=0)):
        there = pickle.loads(pickle.dumps(data))
        for a, b in zip(data.__getitems__([3, 11]), there.__getitems__([3, 11]), strict=True):
            assert same(a, b)


@pytest.mark.parametrize(
    ("changes", "compiled"),
    [({}, {"modulator", "decoder"}), ({"fusion": "none", "latent_dim": 48}, {"decoder"})],
    ids=["PAE", "RAE"],
)
def test_the_modules_that_a_tokenizer_compiles(
    tokenizer_run: TokenizerRun,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    compiled: set[str],
) -> None:
    seen: list[nn.Module] = []
    monkeypatch.setattr(nn.Module, "compile", lambda self: seen.append(self))
    run = replace(tokenizer_run, model=replace(tokenizer_run.model, **changes))
    task = TokenizerTask(with_loop(run, compile=True))
    assert {name for name, part in task.model.named_modules() if any(part is one for one in seen)} == compiled
