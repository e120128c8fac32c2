"""Benches: counts by an independent counter, measured figures at tiny size, records and how they compare."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from openpae.bench import generator, record, tokenizer
from openpae.cli import main
from openpae.models.configs import SIZES, DiTDHConfig, GeneratorConfig, HeadConfig, LightningDiTConfig
from openpae.models.ditdh import build_generator
from openpae.train.settings import GeneratorRun

PLAIN = LightningDiTConfig(latent_dim=8, grid_size=4, hidden_dim=32, num_layers=3, num_heads=2, num_classes=5)
WIDE = DiTDHConfig(
    latent_dim=8,
    grid_size=4,
    hidden_dim=16,
    num_layers=2,
    num_heads=2,
    num_classes=5,
    head=HeadConfig(hidden_dim=48, num_layers=2, num_heads=4),
)


def counted(function: Callable[[], object]) -> int:
    """Operations by PyTorch's own counter, which does not know the CPU's fused attention."""
    counter = FlopCounterMode(display=False)
    with sdpa_kernel(SDPBackend.MATH), counter:
        function()
    return counter.get_total_flops()


@pytest.mark.parametrize(
    "config", [PLAIN, replace(PLAIN, patch_size=2, grid_width=6), WIDE, replace(WIDE, patch_size=2)]
)
@pytest.mark.parametrize("batch", [1, 3])
def test_operations_are_those_that_pytorch_counts(config: GeneratorConfig, batch: int) -> None:
    model, x = build_generator(config), torch.randn(batch, *config.latent_shape)
    measured = counted(lambda: model(x, torch.rand(batch), torch.zeros(batch, dtype=torch.long)))
    assert measured == batch * generator.forward_flops(config)


def test_the_backward_pass_has_twice_those_of_the_forward_pass() -> None:
    """But for the gradients of the latents and of the time's features, which nobody needs."""
    model, x = build_generator(PLAIN), torch.randn(1, 8, 4, 4)
    measured = counted(lambda: model(x, torch.rand(1), torch.zeros(1, dtype=torch.long)).sum().backward())
    unneeded = 2 * 16 * 8 * 32 + 2 * 256 * 32
    assert measured == generator.count(PLAIN)["train_flops"] - unneeded


def test_xl_has_the_operations_of_its_forerunner() -> None:
    """DiT-XL/2 has 118.6 billion multiplications of the same sizes (arXiv:2212.09748); SwiGLU's hidden width
    keeps the count of its MLP."""
    measured = generator.count(LightningDiTConfig())
    assert measured["parameters"] == 674_961_824
    assert measured["forward_flops"] == pytest.approx(2 * 118.6e9, rel=0.01)


def test_every_size_is_counted_and_one_is_measured() -> None:
    measured = generator.bench_generator(
        sizes=("s",), patch_size=2, batch_size=1, steps=1, sample_steps=2, precision="fp32"
    )
    assert list(measured.figures) == list(SIZES)
    small = measured.figures["s"]
    assert small["train_images_per_second"] > 0
    assert small["sample_images_per_second"] > 0
    assert 0 < small["peak_memory_gib"] < 64
    assert small["model_flops_utilisation"] is None  # nobody knows a CPU's peak
    assert (
        measured.settings["sample_evaluations"] == 4 - 1
    )  # guided from t = 0.25 on; the first step is before
    for size in ("b", "1p6b"):
        assert measured.figures[size]["parameters"] > small["parameters"]
        assert measured.figures[size]["train_images_per_second"] is None


def test_nothing_is_measured_on_a_cpu_unless_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generator, "pick_device", lambda _: torch.device("cpu"))
    measured = generator.bench_generator()
    assert all(measured.figures[size]["batch_size"] is None for size in SIZES)


def test_the_batch_is_halved_until_it_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def measured(run: GeneratorRun, steps: int, sampler: Any) -> dict[str, float]:
        tried.append(run.loop.global_batch_size)
        if tried[-1] > 64:
            raise torch.cuda.OutOfMemoryError("too much")
        return {"train_images_per_second": 1.0}

    monkeypatch.setattr(generator, "pick_device", lambda _: torch.device("cuda"))
    monkeypatch.setattr(generator, "device_name", lambda _: "NVIDIA H200")
    monkeypatch.setattr(generator, "_measured", measured)
    measured = generator.bench_generator(sizes=("s",))
    assert tried == [256, 128, 64]
    work = measured.figures["s"]["train_flops"]
    assert measured.figures["s"]["model_flops_utilisation"] == pytest.approx(work / 989e12)
    tried.clear()
    with pytest.raises(torch.cuda.OutOfMemoryError):  # a size that was asked for is not changed
        generator.bench_generator(sizes=("s",), batch_size=128)
    assert tried == [128]


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H200", 989e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("AMD EPYC 9R14, 2 cores", None),
        ("NVIDIA L40", None),
    ],
)
def test_the_peak_of_a_device_is_known_or_not(name: str, peak: float | None) -> None:
    assert generator.device_peak(name) == peak


def test_utilisation_is_only_for_the_precision_of_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generator, "device_name", lambda _: "NVIDIA A100-SXM4-80GB")
    figures: dict[str, float | None] = {"train_images_per_second": 100.0, "train_flops": 312e10}
    device = torch.device("cuda")
    assert generator.utilisation(figures, device, "bf16") == pytest.approx(1.0)
    assert generator.utilisation(figures, device, "fp32") is None


def test_the_tokenizers_step_is_timed() -> None:
    measured = tokenizer.bench_tokenizer(preset="tokenizer/tiny", steps=1)
    assert measured.figures.keys() == {"baseline_seconds", "full_seconds", "ratio", "images_per_second"}
    assert all(value > 0 for value in measured.figures.values())
    assert measured.settings["batch_size"] == 8


def test_a_record_says_where_it_comes_from() -> None:
    measured = record.record("tokenizer", record.Measured(figures={"rate": 2.0}, settings={"rows": 3}))
    assert measured["bench"] == "tokenizer"
    assert measured["machine"]["torch"] == torch.__version__
    assert measured["machine"]["threads"] == torch.get_num_threads()
    assert "cores" in measured["machine"]["device"]
    assert json.loads(json.dumps(measured)) == measured


def made(figures: dict[str, Any], **settings: Any) -> dict[str, Any]:
    return record.record("tokenizer", record.Measured(figures=figures, settings=settings))


def test_records_compare_figure_by_figure() -> None:
    first = made({"a": 3.0, "group": {"b": 4, "c": None, "only here": 1.0}, "zero": 1.0}, rows=3, kind="x")
    second = made({"a": 2.0, "group": {"b": 8, "c": 5.0}, "zero": 0.0}, rows=4, kind="x")
    second["machine"]["device"] = "another"
    figures, different = record.compare(first, second)
    assert [(one.name, one.ratio) for one in figures] == [("a", 1.5), ("group.b", 0.5), ("zero", None)]
    assert different == [f"device: {first['machine']['device']} and another", "rows: 3 and 4"]


def run(*arguments: str | Path) -> None:
    main([str(argument) for argument in arguments])


def test_the_command_writes_prints_and_compares(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rates = iter((10.0, 15.0, 20.0))
    monkeypatch.setattr(tokenizer, "bench_tokenizer", lambda: record.Measured(figures={"rate": next(rates)}))
    run("bench", "tokenizer", "--out", tmp_path / "first.json")
    assert json.loads(capsys.readouterr().out) == json.loads((tmp_path / "first.json").read_text())
    run("bench", "tokenizer", "--compare", tmp_path / "first.json")
    assert capsys.readouterr().out.splitlines()[-1].split() == ["rate", "15", "10", "1.500"]
    run("bench", "tokenizer", "--compare", tmp_path / "first.json", "--json")
    (figure,) = json.loads(capsys.readouterr().out)["comparison"]
    assert (figure["name"], figure["value"], figure["other"]) == ("rate", 20.0, 10.0)


def test_a_record_of_another_bench_is_refused_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tokenizer, "bench_tokenizer", lambda: pytest.fail("measured"))
    (tmp_path / "other.json").write_text(json.dumps({"bench": "generator", "figures": {}}))
    for file, message in (
        ("other.json", "must hold a record of pae bench tokenizer"),
        ("none.json", "No such file"),
    ):
        with pytest.raises(SystemExit) as stop:
            run("bench", "tokenizer", "--compare", tmp_path / file)
        assert stop.value.code == 2
        assert message in capsys.readouterr().err


def test_options_of_the_generator_reach_it_and_no_other_bench(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[dict[str, Any]] = []
    monkeypatch.setattr(
        generator, "bench_generator", lambda **options: seen.append(options) or record.Measured(figures={})
    )
    options = ["--sizes", "s", "b", "--batch-size", "2", "--compile", "--patch-size", "2"]
    run("bench", "generator", *options)
    assert seen == [{"sizes": ("s", "b"), "batch_size": 2, "compile": True, "patch_size": 2}]
    with pytest.raises(SystemExit):
        run("bench", "tokenizer", "--sizes", "s")
    assert "--sizes belongs to pae bench generator" in capsys.readouterr().err
