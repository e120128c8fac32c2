"""Nothing in a hot loop waits for the device: reads of single values are counted, step by step."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from openpae import config as configs
from openpae.data.images import PackedImages
from openpae.data.shards import Shards
from openpae.engine.loop import fit
from openpae.engine.settings import LoopConfig, OptimConfig
from openpae.models.configs import DiscriminatorConfig, DiTDHConfig, HeadConfig, LightningDiTConfig
from openpae.models.dit import LightningDiT
from openpae.models.ditdh import build_generator
from openpae.objective.settings import TokenizerLoss
from openpae.runtime.draws import Draws, initial_noise
from openpae.sampling.sampler import sample_latents
from openpae.sampling.settings import SamplerConfig
from openpae.train.generator import GeneratorTask
from openpae.train.settings import GeneratorRun, TokenizerRun
from openpae.train.tokenizer import TokenizerTask

_READS = {
    torch.ops.aten._local_scalar_dense.default,  # item, bool, int, float
    torch.ops.aten.nonzero.default,  # how many there are must be known, as for a mask that is an index
    torch.ops.aten.equal.default,
}


class Waits(TorchDispatchMode):
    """Counts the calls that would synchronise with a GPU."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.count = 0
        for name in ("cpu", "numpy", "tolist"):  # on a CPU these do not pass the dispatcher
            monkeypatch.setattr(Tensor, name, self._counting(getattr(Tensor, name)))

    def _counting(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            self.count += 1
            return method(*args, **kwargs)

        return counted

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        masks = func is torch.ops.aten.index.Tensor and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        self.count += func in _READS or masks
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x[0].item(),
        lambda x: bool(x[0] > 0),
        lambda x: float(x[0]),
        lambda x: x.cpu(),
        lambda x: x.tolist(),
        lambda x: x.numpy(),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: torch.equal(x, x + 0),
    ],
)
def test_the_counter_sees_what_waits(wait: Callable[[Tensor], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(5)
    with Waits(monkeypatch) as waits:
        torch.where(x > 0, x, 0).sum()
        assert waits.count == 0
        wait(x)
    assert waits.count > 0


WIDE = DiTDHConfig(
    latent_dim=8,
    grid_size=4,
    hidden_dim=16,
    num_layers=1,
    num_heads=2,
    num_classes=2,
    head=HeadConfig(hidden_dim=32, num_layers=1, num_heads=2),
)


def waits_of(task: Any, size: int, monkeypatch: pytest.MonkeyPatch) -> int:
    """Over losses, backward, clipping and steps of one batch."""
    batch = next(iter(task.batches(range(1))))
    with Waits(monkeypatch) as waits:
        for update in task.updates(batch, Draws(0, 0, range(size), size, torch.device("cpu")), 0):
            update.loss.backward()
            optimizer = task.optimizers[update.player]
            assert optimizer.defaults["fused"]
            weights = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    return waits.count


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("checkpoint_blocks", [0, 1])
def test_a_step_of_the_generator_does_not_wait(
    wide: bool,
    checkpoint_blocks: int,
    tiny_dit_config: LightningDiTConfig,
    latents: Shards,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = GeneratorRun(
        model=WIDE if wide else tiny_dit_config,
        checkpoint_blocks=checkpoint_blocks,
        latents=latents.folder,
        times="uniform" if wide else "logit-normal",
        time_shift=None if wide else 0.7,
        optim=OptimConfig(lr=1e-3),
        loop=LoopConfig(steps=1, global_batch_size=4, precision="fp32", device="cpu"),
    )
    assert waits_of(GeneratorTask(run), 4, monkeypatch) == 0


def test_a_step_of_the_tokenizer_does_not_wait(packed: PackedImages, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both players, and every loss that needs no other network."""
    run = configs.load(TokenizerRun, "tokenizer/tiny")
    loss = TokenizerLoss(
        lpips_net="random",
        gan=0.5,
        gan_start=0.0,
        discriminator_start=0.0,
        discriminator=DiscriminatorConfig(kind="patch", width=4, num_layers=2),
        ssr=0.0,
        mcr=0.5,
        scr=0.0,
        kl=1e-6,
        diffusion=0.1,
    )
    data = dataclasses.replace(run.data, images=packed.shards.folder)
    run = dataclasses.replace(run, data=data, loss=loss)
    size = run.loop.global_batch_size
    assert waits_of(TokenizerTask(run), size, monkeypatch) == 0


def waits_of_sampling(model: Any, steps: int, monkeypatch: pytest.MonkeyPatch, **config: Any) -> int:
    labels = torch.tensor([0, 1, 1])
    noise = initial_noise(0, range(3), model.config.latent_shape)
    with Waits(monkeypatch) as waits:
        sample_latents(model, labels, noise, SamplerConfig(steps=steps, **config))
    return waits.count


@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_sampling_waits_no_more_for_more_steps(
    tiny_dit: LightningDiT, guidance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Labels are checked once; a step asks nothing."""
    for model in (tiny_dit, build_generator(WIDE).eval()):
        few, many = (waits_of_sampling(model, steps, monkeypatch, guidance=guidance) for steps in (2, 9))
        assert few == many


@pytest.mark.parametrize("stage", ["generator", "tokenizer"])
def test_the_loop_waits_no_more_for_more_steps(
    stage: str, packed: PackedImages, latents: Shards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine with everything around a step: health, schedule, average, log. A CPU is asked after every
    step whether it was finite, unless steps may be skipped: then it goes a GPU's way."""
    run: Any = configs.load(GeneratorRun if stage == "generator" else TokenizerRun, f"{stage}/tiny")
    if stage == "generator":
        run = dataclasses.replace(run, latents=latents.folder)
    else:
        run = dataclasses.replace(run, data=dataclasses.replace(run.data, images=packed.shards.folder))
    counts = []
    for steps in (3, 8):
        loop = dataclasses.replace(
            run.loop, steps=steps, on_nonfinite="skip", log_every=100, save_every=100, ema_decay=0.9
        )
        varied = dataclasses.replace(run, loop=loop)
        task: Any = (GeneratorTask if stage == "generator" else TokenizerTask)(varied)
        folder = tmp_path / str(steps)
        folder.mkdir()
        with Waits(monkeypatch) as waits:
            fit(task, folder, varied.optim, loop, quiet=True)
        counts.append(waits.count)
    assert counts[0] == counts[1]
