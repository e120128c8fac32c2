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
from openpae.models.configs import SIZES, DiTDHConfig, LightningDiTConfig, PAEConfig
from openpae.models.dit import LightningDiT
from openpae.models.ditdh import build_generator
from openpae.models.priors import Refiner
from openpae.models.tokenizer import PAE, tokenizer_class
from openpae.models.vfms import ENCODERS
from openpae.objective.flow import dimension_shift
from openpae.train.settings import GeneratorRun, RefinerRun, TokenizerRun

# These have no model of their own: see tests/study and tests/commands.
OTHERS = {"Study", "StudySetup", "SamplerConfig"}
FILES = sorted(
    file for file in configs.PRESETS.rglob("*.yaml") if configs.read_yaml(file)["kind"] not in OTHERS
)
# A new kind of run must be given its class and its model here.
KINDS: dict[str, Any] = {
    "RefinerRun": RefinerRun,
    "TokenizerRun": TokenizerRun,
    "GeneratorRun": GeneratorRun,
}
MODELS: dict[str, Callable[[Any], nn.Module]] = {
    "RefinerRun": Refiner,
    "TokenizerRun": lambda config: tokenizer_class(config)(config),
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


# VFM -> its width and the pixels of its patch (SPEC section 1): the four of the paper.
PAPERS_ENCODERS = {
    "dinov2-l": (1024, 14),
    "dinov3-l": (1024, 16),
    "siglip2-so": (1152, 16),
    "mae-l": (1024, 16),
}
FULL_LAYER = 12  # D^2 of attention (4) and of an MLP of four times the width (8)


@pytest.mark.parametrize("name", PAPERS_ENCODERS)
def test_the_papers_encoders_have_tokenizers_of_their_own_width(name: str) -> None:
    """Counted by hand: D the VFM's width, 6 modulator layers, C = 32, ViT-L of width W with patches of 16."""
    (d, patch), c, w = PAPERS_ENCODERS[name], 32, 1024
    norm = 2 * d
    attention = 4 * (d * d + d)  # queries, keys, values, output, each with a bias
    modulator = (3 * patch**2 * d + d) + 6 * (4 * norm + 2 * attention + 8 * d * d + 5 * d)
    fusion = 2 * d * d + 2 * d + norm
    projectors = 2 * (4 * d * d + d + 9 * c * d) + c + d  # only the outputs of their attentions have a bias
    block = 2 * 2 * w + 4 * (w * w + w) + 8 * w * w + 5 * w
    decoder = (d * w + w) + w + 24 * block + 2 * w + (w + 1) * 3 * 16**2
    run = configs.load(TokenizerRun, f"tokenizer/{name}-d32")
    assert run.model.encoder == name
    assert run.model.latent_shape == (32, 16, 16)
    assert count(on_meta(PAE, run.model)) == modulator + fusion + projectors + decoder


@pytest.mark.parametrize("name", PAPERS_ENCODERS)
def test_the_papers_encoders_have_refiners_that_fit_their_tokenizers(name: str) -> None:
    (d, _), c, w = PAPERS_ENCODERS[name], 32, 1024
    projector = FULL_LAYER * d * d + 13 * d + (d + 1) * c
    decoder = (c + 1) * w + 4 * (FULL_LAYER * w * w + 13 * w) + 2 * w + (w + 1) * d
    run = configs.load(RefinerRun, f"refiner/{name}")
    assert count(on_meta(Refiner, run.model)) == projector + decoder
    tokenizer = configs.load(TokenizerRun, f"tokenizer/{name}-d32")
    assert run.encoder == tokenizer.model.encoder == name
    assert run.model.feature_dim == ENCODERS[name].dim
    assert run.model.num_heads == ENCODERS[name].num_heads
    assert (run.model.latent_dim, run.model.grid_size) == tokenizer.model.latent_shape[:2]
    assert run.image_size == tokenizer.model.image_size
    assert tokenizer.prior == Path(f"runs/refiner-{name}")


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("dinov3-l-d32", {"model.encoder", "prior"}),
        ("siglip2-so-d32", {"model.encoder", "prior"}),
        ("mae-l-d32", {"model.encoder", "prior"}),
        ("ablation-25ep-dinov2-l-d32", {"loop.steps"}),
        ("ablation-25ep-no-prior", {"loop.steps", "prior", "loss.ssr", "loss.mcr", "loss.scr"}),
    ],
)
def test_tokenizer_presets_differ_from_the_main_one_only_in_what_they_say(
    name: str, fields: set[str]
) -> None:
    main, other = (configs.load(TokenizerRun, f"tokenizer/{preset}") for preset in ("dinov2-l-d32", name))
    assert {line.split(":")[0] for line in configs.differences(main, other)} == fields


@pytest.mark.parametrize(
    ("name", "epochs"),
    [("dinov2-l-d32", 50), ("ablation-25ep-dinov2-l-d32", 25), ("ablation-25ep-no-prior", 25)],
)
def test_tokenizer_presets_last_as_long_as_they_say(name: str, epochs: int) -> None:
    loop = configs.load(TokenizerRun, f"tokenizer/{name}").loop
    assert loop.steps * loop.global_batch_size / 1_281_167 == pytest.approx(epochs, rel=1e-3)


@pytest.mark.parametrize("ssr", ["0", "0.2"])
@pytest.mark.parametrize("mcr", ["0", "0.5"])
@pytest.mark.parametrize("scr", ["0", "1.0"])
def test_flags_reach_every_row_of_table_2a(ssr: str, mcr: str, scr: str) -> None:
    base = configs.load(TokenizerRun, "tokenizer/ablation-25ep-dinov2-l-d32")
    flags = [f"--loss.{name}={value}" for name, value in (("ssr", ssr), ("mcr", mcr), ("scr", scr))]
    run = tyro.cli(TokenizerRun, args=flags, default=base)
    assert (run.loss.ssr, run.loss.mcr, run.loss.scr) == (float(ssr), float(mcr), float(scr))


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
    assert run.model.latent_shape == configs.load(TokenizerRun, "tokenizer/rae-dinov2-b").model.latent_shape
    assert dimension_shift(run.model.latent_shape) == pytest.approx(run.sampler.shift, rel=1e-12)


@pytest.mark.parametrize(
    ("name", "steps", "epochs"), [("xl-80ep", 100_000, 80), ("xl-800ep", 1_000_000, 800)]
)
def test_the_papers_generator_runs_last_as_long_as_they_say(name: str, steps: int, epochs: int) -> None:
    loop = configs.load(GeneratorRun, f"generator/{name}").loop
    assert loop.steps == steps
    assert steps * loop.global_batch_size / 1_281_167 == pytest.approx(epochs, rel=0.01)


def test_the_reference_of_the_docs_is_up_to_date() -> None:
    """Run `python tools/make_config.py` after a change of a config."""
    import importlib.util
    from pathlib import Path

    root = Path(__file__).parent.parent
    spec = importlib.util.spec_from_file_location("make_config", root / "tools" / "make_config.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert (root / "docs" / "config.md").read_text(encoding="utf-8") == module.page()
