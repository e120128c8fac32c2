"""Samples on disk: formats, resumption and the record."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from openpae.data.pixels import quantize
from openpae.eval.features import FeatureSet
from openpae.models.dit import LightningDiT
from openpae.models.tokenizer import PAE
from openpae.sampling import sample_set as sample_set_module
from openpae.sampling import sampler as sampler_module
from openpae.sampling.sample_set import SampleSet, write_samples
from openpae.sampling.sampler import balanced_labels, sample_batches, sample_images
from openpae.sampling.settings import FILES, Format, SamplerConfig
from tests.conftest import kill_points

Write = Callable[..., dict[str, Any]]


def sample_set(**changes: Any) -> SampleSet:
    """Five samples in parts of two."""
    sampler = SamplerConfig(solver="sde", steps=2, guidance=1.0)
    common = {"labels": balanced_labels(5, 2), "scheme": "class-balanced", "sampler": sampler, "seed": 3}
    return SampleSet(**{**common, "batch_size": 2, "columns": 3, "facts": {"generator": "abc"}, **changes})


@pytest.fixture
def write(tiny_pae: PAE, tiny_dit: LightningDiT) -> Write:
    def run(out: Path, samples: SampleSet | None = None, **more: Any) -> dict[str, Any]:
        return write_samples(out, samples or sample_set(), tiny_pae, tiny_dit, **more)

    return run


@pytest.fixture
def levels(tiny_pae: PAE, tiny_dit: LightningDiT) -> Tensor:
    """The same five samples from the sampler, (5, 3, 32, 32) uint8."""
    samples = sample_set()
    batches = sample_images(tiny_pae, tiny_dit, samples.labels, samples.sampler, seed=3, batch_size=2)
    return quantize(torch.cat(list(batches)))


def test_an_npz_equals_that_of_numpy(write: Write, levels: Tensor, tmp_path: Path) -> None:
    write(tmp_path / "out")
    np.savez(tmp_path / "theirs.npz", levels.permute(0, 2, 3, 1).numpy(), balanced_labels(5, 2).numpy())
    assert (tmp_path / "out" / "samples.npz").read_bytes() == (tmp_path / "theirs.npz").read_bytes()
    with np.load(tmp_path / "out" / "samples.npz") as file:
        assert file["arr_0"].shape == (5, 32, 32, 3)
        assert file["arr_1"].tolist() == [0, 1, 0, 1, 0]


def test_a_folder_of_pngs_holds_the_same(write: Write, levels: Tensor, tmp_path: Path) -> None:
    write(tmp_path, sample_set(format="png"))
    names = sorted(path.name for path in (tmp_path / "images").iterdir())
    assert names == [f"{index:06d}.png" for index in range(5)]
    for index, name in enumerate(names):
        with Image.open(tmp_path / "images" / name) as image:
            assert np.array_equal(np.asarray(image), levels[index].permute(1, 2, 0).numpy())


def test_tensors_hold_the_same(write: Write, levels: Tensor, tmp_path: Path, tiny_dit: LightningDiT) -> None:
    write(tmp_path / "images", sample_set(format="safetensors"))
    tensors = load_file(tmp_path / "images" / "samples.safetensors")
    assert torch.equal(tensors["images"], levels)
    assert tensors["labels"].tolist() == [0, 1, 0, 1, 0]
    write(tmp_path / "latents", sample_set(format="latents"))
    tensors = load_file(tmp_path / "latents" / "latents.safetensors")
    samples = sample_set()
    rows = [range(0, 2), range(2, 4), range(4, 5)]
    z = torch.cat(list(sample_batches(tiny_dit, samples.labels, samples.sampler, rows, seed=3)))
    assert torch.equal(tensors["latents"], z)
    assert tensors["labels"].dtype == torch.int64
    assert not (tmp_path / "latents" / "grid.png").exists()


def test_the_record_is_complete(write: Write, levels: Tensor, tmp_path: Path) -> None:
    """Its hash of the samples is that of an evaluation."""
    record = write(tmp_path)
    assert json.loads((tmp_path / "samples.json").read_text()) == record
    expected = {
        "count": 5, "labels": "class-balanced", "seed": 3, "solver": "sde", "steps": 2, "shift": 0.4,
        "guidance": 1.0, "nfe": 3, "generator": "abc", "format": "npz", "tuned_on": None, "processes": 1,
    }  # fmt: skip
    assert {key: record[key] for key in expected} == expected
    assert "tolerance" not in record  # that of rk45
    features = FeatureSet(extractor_of_nothing())
    features.update(levels.float() / 255)
    assert record["samples_sha256"] == features.sha256()
    with Image.open(tmp_path / "grid.png") as picture:
        assert picture.size == (3 * 34 - 2, 2 * 34 - 2)


def extractor_of_nothing() -> Any:
    from openpae.eval.extractors import Features

    class Nothing:
        name, weights = "nothing", "none"

        def features(self, images: Tensor) -> Features:
            return Features(pooled=images.flatten(1)[:, :4])

    return Nothing()


def test_an_adaptive_solver_has_no_steps_to_record() -> None:
    record = sample_set(sampler=SamplerConfig(solver="rk45", tolerance=1e-3)).as_record()
    assert record["tolerance"] == 1e-3
    assert record["nfe"] is None
    assert not {"steps", "shift"} & record.keys()


@pytest.mark.parametrize("kind", ["npz", pytest.param("png", marks=pytest.mark.slow)])
def test_a_kill_at_any_moment_changes_nothing(write: Write, tmp_path: Path, kind: Format) -> None:
    """Kill before each change to the folder in turn, and call again: the files equal those of an
    uninterrupted call, and no folder looks complete before samples.json exists."""
    sampler = SamplerConfig(steps=1, guidance=1.0)
    samples = sample_set(format=kind, sampler=sampler, labels=balanced_labels(3, 2))
    write(tmp_path / "complete", samples)
    out = tmp_path / "out"
    deaths = 0
    for _ in kill_points(lambda: write(out, samples), tmp_path):
        deaths += 1
        before = (out / "samples.json").is_file()
        write(out, samples)
        assert contents(out) == contents(tmp_path / "complete")
        if before:  # a complete folder stays unchanged
            assert not (out / "parts").exists()
        shutil.rmtree(out)
    assert deaths > 15


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


def test_a_resumed_call_samples_the_missing_parts_only(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stop(Exception):
        pass

    def stop(done: int, total: int) -> None:
        assert total == 3
        if done == 2:
            raise Stop

    with pytest.raises(Stop):
        write(tmp_path / "out", progress=stop)
    sampled: list[list[int]] = []
    original = sampler_module.sample_batches

    def watched(*arguments: Any, **more: Any) -> Any:
        rows = [list(batch) for batch in arguments[3]]
        sampled.extend(rows)
        return original(*arguments[:3], rows, **more)

    monkeypatch.setattr(sampler_module, "sample_batches", watched)
    write(tmp_path / "out")
    assert sampled == [[4]]
    write(tmp_path / "complete")
    assert contents(tmp_path / "out") == contents(tmp_path / "complete")
    sampled.clear()
    write(tmp_path / "out")  # complete: nothing is sampled
    assert sampled == []


def test_a_batch_is_written_before_the_next_but_one_is_decoded(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_pae: PAE
) -> None:
    """So that 50,000 samples need the memory of one batch."""
    events: list[str] = []
    decode, write_shard = tiny_pae.decode, sample_set_module.ShardWriter.write
    monkeypatch.setattr(tiny_pae, "decode", lambda z: events.append("decode") or decode(z))
    monkeypatch.setattr(
        sample_set_module.ShardWriter, "write", lambda *rest: events.append("write") or write_shard(*rest)
    )
    write(tmp_path)
    assert events[0] == "decode"  # one latent, for the size of the images
    assert events[1:] == ["decode", "write"] * 3


@pytest.mark.parametrize(
    ("changes", "fact"),
    [
        ({"seed": 4}, r"seed \(3 there, 4 now\)"),
        ({"facts": {"generator": "abd"}}, r"generator \(abc there, abd now\)"),
        ({"sampler": SamplerConfig(solver="sde", steps=3, guidance=1.0)}, r"steps \(2 there, 3 now\)"),
        ({"batch_size": 3}, r"batch_size \(2 there, 3 now\)"),
        ({"labels": balanced_labels(6, 2)}, r"count \(5 there, 6 now\)"),
    ],
)
def test_other_samples_are_never_mixed_in(
    write: Write, tmp_path: Path, changes: dict[str, Any], fact: str
) -> None:
    write(tmp_path / "complete")
    with pytest.raises(ValueError, match=rf"holds other samples: another .*{fact}"):
        write(tmp_path / "complete", sample_set(**changes))

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "part", progress=stop)
    with pytest.raises(ValueError, match=rf"was begun with another .*{fact}"):
        write(tmp_path / "part", sample_set(**changes))


def test_a_diverged_generator_writes_no_samples(write: Write, tmp_path: Path, tiny_dit: LightningDiT) -> None:
    tiny_dit.latent_mean.fill_(torch.nan)
    with pytest.raises(ValueError, match="hold NaN"):
        write(tmp_path)
    with pytest.raises(ValueError, match="not finite"):
        write(tmp_path / "latents", sample_set(format="latents"))
    assert not (tmp_path / "samples.json").exists()


def test_every_format_has_its_file() -> None:
    for kind, name in FILES.items():
        assert replace(sample_set(), format=kind).as_record()["format"] == kind
        assert name
