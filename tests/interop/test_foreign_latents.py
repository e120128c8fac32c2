"""Latent caches of other programs are converted row by row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from openpae.data.shards import Shards
from openpae.data.training import TrainingLatents
from openpae.interop.foreign_latents import import_latents
from tests.conftest import kill_points

SHAPE = (4, 3, 2)
Rows = tuple[Tensor, Tensor, Tensor]


def write(folder: Path, counts: tuple[int, ...] = (5, 1, 6), dtype: torch.dtype = torch.float32) -> Rows:
    """A cache as the scripts of LightningDiT leave it; returns all its rows."""
    folder.mkdir()
    parts = []
    for number, count in enumerate(counts):
        latents, flips = (torch.randn(count, *SHAPE, dtype=dtype) for _ in range(2))
        labels = torch.randint(0, 7, (count,))
        content = {"latents": latents, "latents_flip": flips, "labels": labels}
        save_file(
            content, folder / f"latents_rank00_shard{number:03d}.safetensors", metadata={"total_size": "9"}
        )
        parts.append((latents, flips, labels))
    latents, flips, labels = (torch.cat(column) for column in zip(*parts, strict=True))
    return latents, flips, labels


def convert(source: Path, out: Path, **changes: Any) -> Shards:
    settings: dict[str, Any] = {"image_size": 32, "latent_shape": SHAPE, "per_shard": 5, "chunk": 2}
    return import_latents(source, out, tokenizer_fingerprint="0123456789abcdef", **(settings | changes))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_row_arrives_to_the_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    latents, flips, labels = write(tmp_path / "theirs", dtype=dtype)
    seen: list[tuple[int, int]] = []
    shards = convert(tmp_path / "theirs", tmp_path / "ours", progress=lambda *done: seen.append(done))
    rows = shards.gather(np.arange(12))
    assert rows.dtype == dtype
    assert torch.equal(rows, torch.stack([latents, flips], dim=1))
    assert shards.labels.tolist() == labels.tolist()
    assert seen == [(5, 12), (10, 12), (12, 12)]
    both = torch.cat([latents, flips]).double().numpy()
    np.testing.assert_allclose(shards.index["mean"], both.mean(axis=(0, 2, 3)), atol=1e-9)
    np.testing.assert_allclose(shards.index["std"], both.std(axis=(0, 2, 3)), atol=1e-9)
    assert shards.attributes["tokenizer"] == "0123456789abcdef"
    assert len(shards.attributes["classes"]) == int(labels.max()) + 1
    shards.verify()
    batch = TrainingLatents(shards, seed=0).__getitems__([0, 1, 2])
    assert batch.latents.shape == (3, *SHAPE)


def test_without_mirror_images_there_is_one_version(tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    latents, labels = torch.randn(3, *SHAPE), torch.tensor([0, 2, 1])
    save_file({"latents": latents, "labels": labels}, tmp_path / "theirs" / "a.safetensors")
    shards = convert(tmp_path / "theirs", tmp_path / "ours", num_classes=1000)
    assert torch.equal(shards.gather(np.arange(3)), latents[:, None])
    assert len(shards.attributes["classes"]) == 1000


def test_a_killed_import_goes_on(tmp_path: Path) -> None:
    latents, flips, _ = write(tmp_path / "theirs")
    out = tmp_path / "ours"
    for deaths, _ in enumerate(kill_points(lambda: convert(tmp_path / "theirs", out), out)):
        if deaths > 2:
            break
    shards = convert(tmp_path / "theirs", out)
    assert torch.equal(shards.gather(np.arange(12)), torch.stack([latents, flips], dim=1))


def test_what_is_no_such_cache_is_named(tmp_path: Path) -> None:
    write(tmp_path / "theirs")
    with pytest.raises(ValueError, match=r"holds latents \(4, 3, 2\), but the tokenizer makes \(8, 4, 4\)"):
        convert(tmp_path / "theirs", tmp_path / "ours", latent_shape=(8, 4, 4))
    with pytest.raises(ValueError, match=r"labels in .* must lie in \[0, 0\], got"):
        convert(tmp_path / "theirs", tmp_path / "ours", num_classes=1)
    with pytest.raises(FileNotFoundError, match=r"no \.safetensors files in"):
        convert(tmp_path, tmp_path / "ours")
    file = tmp_path / "theirs" / "z.safetensors"
    save_file({"latents": torch.randn(2, *SHAPE), "labels": torch.zeros(2, dtype=torch.int64)}, file)
    with pytest.raises(ValueError, match=r"z.safetensors holds .* with or without latents_flip"):
        convert(tmp_path / "theirs", tmp_path / "ours")
    save_file({"latents": torch.randn(2, *SHAPE), "labels": torch.zeros(3, dtype=torch.int64)}, file)
    with pytest.raises(ValueError, match=r"z.safetensors must hold latents \(N, C, h, w\)"):
        convert(tmp_path / "theirs", tmp_path / "ours")
    save_file({"images": torch.zeros(1)}, file)
    with pytest.raises(ValueError, match=r"z.safetensors must hold latents, labels .*got images"):
        convert(tmp_path / "theirs", tmp_path / "ours")
    file.write_bytes(b"\0" * 40)
    with pytest.raises(ValueError, match=r"z.safetensors is damaged"):
        convert(tmp_path / "theirs", tmp_path / "ours")
    assert not (tmp_path / "ours").exists()
