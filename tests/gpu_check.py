"""What only a machine with a GPU can show. Run it there: pytest -s tests/gpu_check.py

bfloat16 against float32, every stage and its resume at tiny size, steps that wait for nothing, the speed of
XL/1. What it prints goes to docs/results.md, with the commit and the device.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from openpae import config as configs
from openpae.bench.generator import bench_generator
from openpae.bench.record import record
from openpae.data.images import PackedImages
from openpae.data.shards import Shards
from openpae.models.configs import DiTDHConfig, LightningDiTConfig
from openpae.models.ditdh import build_generator
from openpae.models.saved import load_generator, load_tokenizer
from openpae.runtime.draws import Draws, initial_noise
from openpae.sampling.sampler import sample_latents
from openpae.sampling.settings import SamplerConfig
from openpae.train.generator import GeneratorTask, train_generator
from openpae.train.refiner import train_refiner
from openpae.train.settings import GeneratorRun, RefinerRun, TokenizerRun
from openpae.train.tokenizer import train_tokenizer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU"),
]
CUDA = torch.device("cuda")


@pytest.mark.parametrize("kind", [LightningDiTConfig, DiTDHConfig])
def test_half_precision_changes_the_velocity_little(kind: Any) -> None:
    """Size S at its full grid, weights off their start: float32 on both devices, and bfloat16."""
    model = build_generator(kind.of_size("s")).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))  # more would blow a path of width 2,048 up
    x, t, labels = torch.randn(4, *model.config.latent_shape), torch.rand(4), torch.arange(4)
    with torch.no_grad():
        host = model(x, t, labels)
        model.to(CUDA)
        x, t, labels = x.to(CUDA), t.to(CUDA), labels.to(CUDA)
        exact = model(x, t, labels)
        with torch.autocast("cuda", torch.bfloat16):
            half = model(x, t, labels).float()
    scale = host.std()
    assert (exact.cpu() - host).abs().max() < 1e-2 * scale  # TF32 is off: rounding alone
    assert torch.nn.functional.cosine_similarity(half.flatten(1), exact.flatten(1)).min() > 0.99
    assert (half - exact).square().mean().sqrt() < 0.05 * scale


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_every_stage_trains(precision: str, packed: PackedImages, latents: Shards, tmp_path: Path) -> None:
    """Refiner, tokenizer and generator train, are found complete when called again, and make images."""
    loop = {"device": "cuda", "precision": precision, "steps": 6, "save_every": 3, "global_batch_size": 4}
    stages: list[tuple[type, str, Any]] = [
        (RefinerRun, "refiner/tiny", train_refiner),
        (TokenizerRun, "tokenizer/tiny", train_tokenizer),
        (GeneratorRun, "generator/tiny", train_generator),
    ]
    for kind, preset, train in stages:
        run: Any = configs.load(kind, preset)
        run = dataclasses.replace(run, loop=dataclasses.replace(run.loop, **loop))
        if kind is GeneratorRun:
            run = dataclasses.replace(run, latents=latents.folder)
        else:
            run = dataclasses.replace(run, data=dataclasses.replace(run.data, images=packed.shards.folder))
        folder = tmp_path / preset
        train(run, folder, quiet=True)
        train(run, folder, quiet=True)  # reads the last checkpoint back
    tokenizer = load_tokenizer(tmp_path / "tokenizer/tiny").to(CUDA)
    generator = load_generator(tmp_path / "generator/tiny").to(CUDA)
    noise = initial_noise(0, range(2), generator.config.latent_shape).to(CUDA)
    z = sample_latents(generator, torch.tensor([0, 1], device=CUDA), noise, SamplerConfig(steps=4))
    assert tokenizer.decode(z).isfinite().all()


def test_steps_wait_for_nothing(latents: Shards) -> None:
    """PyTorch raises where the host would wait, in a training step and in sampling."""
    run = configs.load(GeneratorRun, "generator/tiny")
    loop = dataclasses.replace(run.loop, device="cuda", precision="bf16", global_batch_size=4)
    task = GeneratorTask(dataclasses.replace(run, latents=latents.folder, loop=loop))
    batch = next(iter(task.batches(range(1))))
    batch = type(batch)(*(part.to(CUDA) for part in batch))
    noise = initial_noise(0, range(4), run.model.latent_shape).to(CUDA)
    for mode in (0, "error"):  # once without, so that what is set up once is set up
        torch.cuda.set_sync_debug_mode(mode)
        try:
            for update in task.updates(batch, Draws(0, 0, range(4), 4, CUDA), 0):
                update.loss.backward()
                optimizer = task.optimizers[update.player]
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            task.model(noise, torch.full((4,), 0.5, device=CUDA), batch.labels)
        finally:
            torch.cuda.set_sync_debug_mode(0)


@pytest.mark.parametrize("compile", [False, True])
def test_the_speed_of_xl(compile: bool) -> None:
    """Target on an H200: at least 600 training images/s in bfloat16 at batch 256 or the largest that fits."""
    found = record("generator", bench_generator(sizes=("xl",), precision="bf16", compile=compile))
    print(json.dumps({**found, "figures": found["figures"]["xl"]}, indent=1))
    assert found["figures"]["xl"]["train_images_per_second"] > 0
