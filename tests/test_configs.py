"""Every preset loads strictly and can be built; the paper's sizes are the paper's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import tyro
from torch import nn

from openpae import config as configs
from openpae.dit import SIZES, LightningDiT, LightningDiTConfig
from openpae.ditdh import DiTDHConfig, build_generator
from openpae.flow import dimension_shift
from openpae.priors import Refiner
from openpae.tokenizer import PAE, PAEConfig
from openpae.train.generator import GeneratorRun
from openpae.train.refiner import RefinerRun
from openpae.train.tokenizer import TokenizerRun

FILES = sorted(configs.PRESETS.rglob("*.yaml"))
# A new kind of run must be given its class and its model here.
KINDS: dict[str, Any] = {
    "RefinerRun": RefinerRun,
    "TokenizerRun": TokenizerRun,
    "GeneratorRun": GeneratorRun,
}
MODELS: dict[str, Callable[[Any], nn.Module]] = {
    "RefinerRun": Refiner,
    "TokenizerRun": PAE,
    "GeneratorRun": build_generator,
}


def name_of(file: Path) -> str:
    return file.relative_to(configs.PRESETS).with_suffix("").as_posix()


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def on_meta(model: Callable[[Any], nn.Module], config: Any) -> nn.Module:
    """Built without memory."""
    with torch.device("meta"):
        return model(config)


@pytest.fixture(params=FILES, ids=name_of)
def preset(request: pytest.FixtureRequest) -> tuple[Path, str, Any]:
    kind = configs.read_yaml(request.param)["kind"]
    return request.param, kind, configs.load(KINDS[kind], request.param)


def test_the_papers_presets_are_here() -> None:
    assert {"tokenizer/dinov2-l-d32", "generator/xl-80ep", "generator/xl-800ep"} <= set(map(name_of, FILES))


def test_every_preset_builds(preset: tuple[Path, str, Any]) -> None:
    _, kind, run = preset
    assert count(on_meta(MODELS[kind], run.model)) > 0


def test_every_preset_survives_saving_and_flags(preset: tuple[Path, str, Any], tmp_path: Path) -> None:
    """The run folder's config.yaml is the preset, and the command line without flags changes nothing."""
    _, kind, run = preset
    configs.save(run, tmp_path / "config.yaml")
    assert configs.load(KINDS[kind], tmp_path / "config.yaml") == run
    assert tyro.cli(KINDS[kind], args=[], default=run) == run


def test_the_papers_tokenizer_has_the_papers_size() -> None:
    model = on_meta(PAE, PAEConfig())
    assert count(model.get_submodule("modulator")) == 103_496_704
    assert count(model.get_submodule("decoder")) == 304_149_248
    run = configs.load(TokenizerRun, "tokenizer/dinov2-l-d32")
    assert count(on_meta(PAE, run.model)) == count(model) == 416_627_488
    assert run.model.latent_shape == (32, 16, 16)


@pytest.mark.parametrize("name", ["generator/xl-80ep", "generator/xl-800ep"])
def test_the_papers_generator_has_the_papers_size(name: str) -> None:
    """The 800-epoch recipe adds norms of queries and keys: two weights per channel of a head and layer."""
    config = configs.load(GeneratorRun, name).model
    norms = config.num_layers * 2 * (config.hidden_dim // config.num_heads) if config.qk_norm else 0
    assert config.qk_norm == (name == "generator/xl-800ep")
    assert count(on_meta(LightningDiT, config)) == 674_961_824 + norms


def test_named_sizes_grow() -> None:
    for cls in (LightningDiTConfig, DiTDHConfig):
        counts = [count(on_meta(build_generator, cls.of_size(size))) for size in SIZES]
        assert counts == sorted(counts)
        assert cls.of_size("xl") == cls()


def test_the_baseline_of_the_paper_is_rae_s_generator() -> None:
    run = configs.load(GeneratorRun, "generator/dit-dh-xl")
    assert run.model == DiTDHConfig()
    assert dimension_shift(run.model.latent_shape) == pytest.approx(run.sampler.shift, rel=1e-12)


@pytest.mark.parametrize(
    ("name", "steps", "epochs"), [("xl-80ep", 100_000, 80), ("xl-800ep", 1_000_000, 800)]
)
def test_the_papers_generator_runs_last_as_long_as_they_say(name: str, steps: int, epochs: int) -> None:
    loop = configs.load(GeneratorRun, f"generator/{name}").loop
    assert loop.steps == steps
    assert steps * loop.global_batch_size / 1_281_167 == pytest.approx(epochs, rel=0.01)


def test_the_reference_of_the_docs_is_up_to_date() -> None:
    """Run `python docs/make_config.py` after a change of a config."""
    import importlib.util
    from pathlib import Path

    docs = Path(__file__).parent.parent / "docs"
    spec = importlib.util.spec_from_file_location("make_config", docs / "make_config.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert (docs / "config.md").read_text(encoding="utf-8") == module.page()
