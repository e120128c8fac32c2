"""Steps under fake tensors: what they need, by hand; on one process and on many; that they read nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import distributed

from openpae import config as configs
from openpae.engine.task import Update
from openpae.models.configs import DiscriminatorConfig
from openpae.models.encoders import empty_encoder
from openpae.objective.settings import TokenizerLoss
from openpae.plan.fakes import Run, fake_world
from openpae.plan.trial import Trial, operations_per_image, planned_run, try_run
from openpae.train.generator import GeneratorTask
from openpae.train.settings import GeneratorRun, RefinerRun, TokenizerRun

KINDS: dict[str, type[Any]] = {
    "refiner": RefinerRun,
    "tokenizer": TokenizerRun,
    "generator": GeneratorRun,
}


def tiny(stage: str, **changes: Any) -> Run:
    run: Run = dataclasses.replace(configs.load(KINDS[stage], f"{stage}/tiny"), **changes)
    return run


def tried(run: Run, gpus: int = 1, **loop: Any) -> Trial:
    return try_run(planned_run(run, **loop), gpus, round_to=1)


ADVERSARIAL = TokenizerLoss(
    lpips_net="random",
    gan=0.5,
    gan_start=0.5,
    discriminator_start=0.25,
    discriminator=DiscriminatorConfig(kind="patch", width=4, num_layers=2),
    ssr=0.0,
    mcr=0.5,
    scr=0.0,
    gradients_every=4,
)


@pytest.mark.parametrize("stage", KINDS)
def test_what_lasts_is_counted_by_hand(stage: str) -> None:
    """float32: a weight has 4 bytes, its moments 8, its average 4; gradients do not last."""
    trial = tried(tiny(stage))
    assert trial.lasting["optimizer"] == pytest.approx(8 * trial.trained, rel=0.01)  # and step counters
    averaged = stage != "refiner"
    assert trial.lasting["average"] == 4 * trial.exported * averaged
    assert trial.lasting["gradients"] == 0
    assert trial.lasting["weights"] == pytest.approx(4 * (trial.trained + trial.frozen), rel=0.15)  # buffers
    assert trial.peak.total > sum(trial.lasting.values())


def test_activations_grow_with_the_device_batch_and_nothing_else_does() -> None:
    small, large = (tried(tiny("generator"), global_batch_size=64, device_batch_size=n) for n in (8, 16))
    assert large.peak.bytes["activations"] == pytest.approx(2 * small.peak.bytes["activations"], rel=0.1)
    for kind in ("weights", "gradients", "optimizer", "average"):
        assert large.lasting[kind] == small.lasting[kind]
    assert large.operations == pytest.approx(small.operations)


def test_checkpointed_blocks_need_less_memory_and_more_operations() -> None:
    for run, blocks in ((tiny("generator"), 2), (tiny("tokenizer"), 1)):
        kept = tried(run, global_batch_size=64)
        again = tried(dataclasses.replace(run, checkpoint_blocks=blocks), global_batch_size=64)
        assert again.peak.total < kept.peak.total
        assert kept.most_operations < again.most_operations < 4 / 3 * kept.most_operations


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_many_processes_keep_gradients_in_buckets_or_weights_in_shards(parallel: str) -> None:
    alone, many = tried(tiny("generator")), tried(tiny("generator"), 4, parallel=parallel)
    assert not distributed.is_initialized()
    assert (many.trained, many.device_batch) == (alone.trained, alone.device_batch // 4)
    if parallel == "ddp":
        assert many.lasting["gradients"] == 4 * many.trained
        assert many.lasting["optimizer"] == alone.lasting["optimizer"]
    else:
        assert many.lasting["average"] == pytest.approx(alone.lasting["average"] / 4, rel=0.1)  # padding
        assert many.lasting["optimizer"] == pytest.approx(alone.lasting["optimizer"] / 4, rel=0.1)


def test_every_loss_counts_at_the_dearest_step_and_phases_in_the_mean() -> None:
    run = tiny("tokenizer", loss=ADVERSARIAL)
    trial = try_run(planned_run(run), phases=True)
    without = try_run(planned_run(tiny("tokenizer", loss=dataclasses.replace(ADVERSARIAL, gan=0.0))))
    mean = sum(trial.operations.values())
    assert sum(without.operations.values()) < trial.most_operations
    assert mean < trial.most_operations
    assert trial.peak.total > without.peak.total


def test_a_planted_read_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = GeneratorTask.updates

    def reading(task: Any, *args: Any) -> Iterator[Update]:
        for update in honest(task, *args):
            update.loss.item()
            yield update

    monkeypatch.setattr(GeneratorTask, "updates", reading)
    with pytest.raises(ValueError, match=r"test_trial\.py:\d+ reads the values of a tensor .*_local_scalar"):
        tried(tiny("generator"))


READS: list[Any] = [
    lambda x: x.tolist(),
    lambda x: x.numpy(),
    lambda x: x.nonzero(),
    lambda x: x[x > 0],
    bool,
]


@pytest.mark.parametrize("read", READS)
def test_other_reads_are_refused(read: Any) -> None:
    with pytest.raises(ValueError, match="reads the values"), fake_world():
        read(torch.empty(2).sum() if read is bool else torch.empty(2))


def test_a_real_run_goes_on_as_before(tmp_path: Any) -> None:
    """Nothing of the fake world stays: networks move, groups are closed, the encoder's tables are real."""
    tried(tiny("tokenizer"), 2)
    assert not distributed.is_initialized()
    assert torch.nn.Linear(2, 2).to(torch.float64).weight.dtype == torch.float64
    assert torch.ones(2).sum().item() == 2


PARAMETERS = {
    "dinov2-b": 86.6,
    "dinov2-g": 1136.5,
    "dinov3-h": 840.6,
    "siglip2-b": 85.8,
    "mae-b": 85.8,
    "clip-b": 85.8,
    "internvit-300m": 304.0,
    "efficientnet-lite0": 3.0,
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_every_family_of_encoders_is_built_from_its_row(name: str) -> None:
    """Published parameters in millions, of the vision tower without head, mask token or last norm."""
    with fake_world():
        encoder = empty_encoder(name)
        side = encoder.spec.stride
        with torch.autocast("cpu", torch.bfloat16):
            features = encoder(torch.empty(2, 3, 2 * side, 3 * side))
        assert features.shape == (2, 6, encoder.spec.dim)
        millions = sum(weight.numel() for weight in encoder.parameters()) / 1e6
    assert millions == pytest.approx(PARAMETERS[name], abs=0.1)


@pytest.mark.parametrize("stage", KINDS)
def test_operations_of_an_image_do_not_depend_on_the_batch(stage: str) -> None:
    """A step of the config's own batches needs as many for each image as the small one that is counted."""
    run = tiny(stage)
    expected = tried(run, global_batch_size=32, device_batch_size=16).most_operations
    assert operations_per_image(run) == pytest.approx(expected, rel=0.02)
    assert expected > 0
