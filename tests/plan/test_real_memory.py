"""Planned memory beside the resident memory of real steps on this CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from openpae import config as configs
from openpae.data.caches import cache_latents
from openpae.data.images import PackedImages
from openpae.plan.fakes import Run
from openpae.plan.trial import planned_run, try_run
from openpae.train.settings import GeneratorRun, RefinerRun, TokenizerRun
from tests.plan import real_memory

PAGE = 4096
# Every freed block of 64 KiB goes back to the system at once, as under the plan.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_MMAP_MAX_": "1000000"}


def refiner(packed: PackedImages, _: Path) -> Run:
    changes = {
        "data.images": str(packed.shards.folder),
        "data.resize": 128,
        "image_size": 128,
        "model.grid_size": 16,
        "model.latent_dim": 32,
        "model.decoder_dim": 512,
        "model.decoder_layers": 6,
        "model.decoder_heads": 8,
        "loop.global_batch_size": 8,
    }
    return configs.changed(configs.load(RefinerRun, "refiner/tiny"), changes)


def tokenizer(packed: PackedImages, _: Path) -> Run:
    changes = {
        "data.images": str(packed.shards.folder),
        "data.resize": 128,
        "model.image_size": 128,
        "model.latent_dim": 32,
        "model.width": 256,
        "model.decoder.hidden_dim": 384,
        "model.decoder.num_layers": 6,
        "model.decoder.num_heads": 6,
        "model.decoder.mlp_dim": 1536,
        "loss.mcr": 0.5,
        "loop.global_batch_size": 4,
    }
    return configs.changed(configs.load(TokenizerRun, "tokenizer/tiny"), changes)


def generator(packed: PackedImages, folder: Path) -> Run:
    changes = {
        "model.latent_dim": 32,
        "model.grid_size": 16,
        "model.hidden_dim": 384,
        "model.num_layers": 6,
        "model.num_heads": 6,
        "model.num_classes": 10,
        "loop.global_batch_size": 8,
    }
    run = configs.changed(configs.load(GeneratorRun, "generator/tiny"), changes)

    def encode(images: Tensor) -> Tensor:
        return torch.randn(len(images), *run.model.latent_shape)

    cache_latents(
        encode,
        packed,
        folder / "latents",
        image_size=32,
        latent_shape=run.model.latent_shape,
        tokenizer_fingerprint="",
        batch_size=2,
    )
    return configs.changed(run, {"latents": str(folder / "latents")})


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is read from Linux's /proc")
@pytest.mark.parametrize("build", [refiner, tokenizer, generator])
def test_real_steps_need_what_is_planned(build: Any, packed: PackedImages, tmp_path: Path) -> None:
    run = build(packed, tmp_path)
    configs.save(run, tmp_path / "run.yaml")
    command = [sys.executable, real_memory.__file__, str(tmp_path / "run.yaml")]
    done = subprocess.run(command, env=os.environ | ALLOCATOR, stdout=subprocess.PIPE, text=True, check=True)
    measured = int(done.stdout)
    planned = try_run(planned_run(run), round_to=PAGE).peak.total
    print(f"{build.__name__}: planned {planned / 2**20:.1f} MiB, measured {measured / 2**20:.1f} MiB")
    assert measured > 200 * 2**20, "large enough that what libraries keep does not count"
    assert planned == pytest.approx(measured, rel=0.1)
