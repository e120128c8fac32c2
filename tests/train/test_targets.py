"""Raw targets from a command: a tokenizer takes them in place of a refiner (Table 2b)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from openpae.cli import main
from openpae.data.images import open_images
from openpae.engine.journal import read_log
from openpae.eval.image_stream import source_batches
from openpae.models.encoders import EncoderInput, load_encoder
from openpae.models.saved import load_prior
from openpae.train.targets import fit_targets

SIZES = ["--latent-dim", "8", "--image-size", "32", "--patch-size", "8"]


def run(*arguments: str | Path) -> None:
    main([str(argument) for argument in arguments])


def features(folder: Path) -> np.ndarray:
    """Tokens (n, D) of all images, in float64."""
    encoder = load_encoder("random-tiny")
    prepare, source = EncoderInput(encoder.spec, 8), open_images(folder)
    batches = source_batches(source, 32, 4, range(len(source)))
    return torch.cat([encoder(prepare(x)) for x in batches]).double().flatten(0, 1).numpy()


def test_pca_finds_the_principal_directions(image_folder: Path, tmp_path: Path) -> None:
    run("fit-targets", "random-tiny", image_folder, tmp_path / "pca", *SIZES)
    basis = load_prior(tmp_path / "pca").targets.basis.double().numpy()
    rows = features(image_folder)
    _, _, directions = np.linalg.svd(rows - rows.mean(axis=0), full_matrices=False)
    overlap = np.linalg.svd(basis.T @ directions[:8].T, compute_uv=False)
    np.testing.assert_allclose(overlap, 1, atol=1e-5)  # the same subspace


def test_random_targets_span_an_orthonormal_subspace(image_folder: Path, tmp_path: Path) -> None:
    run("fit-targets", "random-tiny", image_folder, tmp_path / "random", *SIZES, "--kind", "random")
    basis = load_prior(tmp_path / "random").targets.basis
    torch.testing.assert_close(basis.mT @ basis, torch.eye(8), atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["pca", "random"])
def test_a_tokenizer_trains_with_them(image_folder: Path, tmp_path: Path, kind: str) -> None:
    run("fit-targets", "random-tiny", image_folder, tmp_path / "raw", *SIZES, "--kind", kind)
    run(
        "train-tokenizer", "tokenizer/tiny", tmp_path / "run", "--data.images", image_folder,
        "--prior", tmp_path / "raw", "--loss.ssr", "0.2", "--loss.scr", "1", "--loss.gan", "0",
        "--loop.steps", "2", "--loop.global-batch-size", "4",
    )  # fmt: skip
    last = read_log(tmp_path / "run")[-1]
    assert last["step"] == 2
    assert last["autoencoder/ssr"] > 0
    assert last["autoencoder/scr"] > 0


def test_invalid_settings_are_named(image_folder: Path, tmp_path: Path) -> None:
    encoder, source = load_encoder("random-tiny"), open_images(image_folder)
    with pytest.raises(ValueError, match=r"latent_dim must lie in \[1, 48\], the encoder's width, got 64"):
        fit_targets(encoder, source, tmp_path / "a", latent_dim=64)
    with pytest.raises(ValueError, match="image_size must be a multiple of patch_size = 16, got 40"):
        fit_targets(encoder, source, tmp_path / "a", image_size=40)
    assert not (tmp_path / "a").exists()
    with pytest.raises(FileExistsError, match="name another folder"):
        fit_targets(encoder, source, tmp_path)
