"""Tokenizer and generator as a pipeline of diffusers: its samples are those of openpae."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from openpae.models.configs import DiTDHConfig, GeneratorConfig, HeadConfig, LightningDiTConfig
from openpae.models.ditdh import build_generator
from openpae.models.generator import LatentGenerator
from openpae.models.tokenizer import PAE
from openpae.sampling.sampler import sample_latents
from openpae.sampling.settings import SamplerConfig
from tests.conftest import shaken

pytest.importorskip("diffusers")
# diffusers itself warns of old names that it uses.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")

STEPS = 7
NAMES = ["apple", "boat", "chair"]
SIZES: dict[str, Any] = {
    "latent_dim": 8,
    "grid_size": 4,
    "hidden_dim": 32,
    "num_layers": 2,
    "num_heads": 2,
    "num_classes": 3,
}
CONFIGS: list[GeneratorConfig] = [
    LightningDiTConfig(**SIZES),
    DiTDHConfig(head=HeadConfig(hidden_dim=32, num_layers=1, num_heads=2), **SIZES),
]


def generator_of(config: GeneratorConfig) -> LatentGenerator:
    model = shaken(build_generator(config)).eval()
    model.set_statistics(torch.linspace(-1, 1, 8), torch.linspace(0.5, 2, 8))
    return model


@pytest.fixture
def generator() -> LatentGenerator:
    return generator_of(CONFIGS[0])


@pytest.fixture
def pipeline(tiny_pae: PAE, generator: LatentGenerator) -> Any:
    return quiet(of(tiny_pae, generator, names=NAMES))


def of(*models: Any, **settings: Any) -> Any:
    from openpae.interop.diffusers_pipeline import PAEPipeline

    return PAEPipeline.of(*models, **settings)


def quiet(pipeline: Any) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: type(config).__name__)
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_its_samples_are_those_of_openpae(tiny_pae: PAE, config: GeneratorConfig, guidance: float) -> None:
    """The same grid, guidance on a part of it, statistics and decoder; noise and data have changed sides."""
    generator = generator_of(config)
    noise, labels = torch.randn(2, 8, 4, 4), [0, 2]
    settings = {"guidance": guidance, "guidance_start": 0.3, "guidance_end": 0.8}
    sampler = SamplerConfig(solver="euler", steps=STEPS, shift=0.4, **settings)  # type: ignore[arg-type]
    expected = sample_latents(generator, torch.tensor(labels), noise, sampler)
    call: dict[str, Any] = {
        "class_labels": labels,
        "num_inference_steps": STEPS,
        "guidance_scale": guidance,
        "guidance_start": 0.3,
        "guidance_end": 0.8,
        "latents": noise,
    }
    pipeline = quiet(of(tiny_pae, generator))
    torch.testing.assert_close(pipeline(output_type="latent", **call).images, expected, rtol=1e-4, atol=1e-4)
    images = pipeline(output_type="pt", **call).images
    with torch.no_grad():
        pixels = tiny_pae.decode(expected).clamp(0, 1)
    torch.testing.assert_close(images, pixels, rtol=0, atol=1e-3)
    (pictures,) = pipeline(output_type="pil", return_dict=False, **call)
    assert [picture.size for picture in pictures] == [(32, 32)] * 2


def test_it_comes_back_from_a_folder(pipeline: Any, tmp_path: Path) -> None:
    pipeline.save_pretrained(tmp_path)
    again = quiet(type(pipeline).from_pretrained(tmp_path, low_cpu_mem_usage=False))
    call: dict[str, Any] = {"num_inference_steps": 3, "output_type": "np"}
    labels = pipeline.get_label_ids(["chair", "apple"])
    assert labels == again.get_label_ids(["chair", "apple"]) == [2, 0]
    draws = ((pipeline, labels), (again, ["chair", 0]))
    images = [p(given, generator=torch.Generator().manual_seed(5), **call).images for p, given in draws]
    assert (images[0] == images[1]).all()
    assert images[0].shape == (2, 32, 32, 3)
    assert again.scheduler.config.shift == pytest.approx(2.5)


def test_names_are_those_of_the_generator_unless_others_are_given(
    tiny_pae: PAE, generator: LatentGenerator
) -> None:
    generator.classes = ([*NAMES, "beyond K"], [1, 2, 3, 0])
    assert of(tiny_pae, generator).labels == {"apple": 0, "boat": 1, "chair": 2}
    assert of(tiny_pae, generator, names=["one"]).labels == {"one": 0}


def test_callbacks_see_and_change_the_latents_and_may_stop(pipeline: Any) -> None:
    seen: list[tuple[int, float]] = []

    def look(pipe: Any, number: int, timestep: torch.Tensor, kept: dict[str, Any]) -> dict[str, Any]:
        seen.append((number, float(timestep)))
        pipe._interrupt = number == 2
        return {"latents": torch.zeros_like(kept["latents"])}

    z = pipeline(1, num_inference_steps=STEPS, output_type="latent", callback_on_step_end=look).images
    assert [number for number, _ in seen] == [0, 1, 2]
    assert seen[0][1] == 1000
    assert torch.equal(z, pipeline.transformer.dit.latent_mean.expand_as(z))  # zeros, denormalised


def test_one_number_is_one_image_and_generators_give_each_its_own(pipeline: Any) -> None:
    call: dict[str, Any] = {"num_inference_steps": 2, "output_type": "latent"}
    seeds = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    both = pipeline([1, 1], generator=seeds, **call).images
    alone = pipeline(1, generator=torch.Generator().manual_seed(4), **call).images
    torch.testing.assert_close(both[1:], alone, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(both[0], both[1])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"class_labels": []}, r"class_labels must name classes in \[0, 3\], got \[\]"),
        ({"class_labels": [4]}, r"class_labels must name classes in \[0, 3\], got \[4\]"),
        ({"class_labels": [-1]}, r"class_labels must name classes in \[0, 3\], got \[-1\]"),
        (
            {"class_labels": [1], "latents": torch.zeros(2, 8, 4, 4)},
            r"latents must be \(1, 8, 4, 4\), got \(2, 8, 4, 4\)",
        ),
        (
            {"class_labels": [1], "callback_on_step_end_tensor_inputs": ["prompt"]},
            "knows latents, got prompt",
        ),
    ],
)
def test_what_it_cannot_do_is_one_error(pipeline: Any, call: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pipeline(num_inference_steps=2, **call)


def test_models_that_do_not_belong_together_are_refused(tiny_pae: PAE, pipeline: Any) -> None:
    other = generator_of(LightningDiTConfig(**{**SIZES, "grid_size": 2}))
    with pytest.raises(ValueError, match=r"decodes latents of \(8, 4, 4\), the generator makes \(8, 2, 2\)"):
        of(tiny_pae, other)
    with pytest.raises(ValueError, match="unknown class 'cat'; known: apple, boat, chair"):
        pipeline.get_label_ids("cat")


def test_in_half_precision_it_is_close(pipeline: Any) -> None:
    noise = torch.randn(2, 8, 4, 4)
    call: dict[str, Any] = {"num_inference_steps": 3, "output_type": "latent", "latents": noise}
    exact = pipeline([0, 1], **call).images
    pipeline.to(torch.bfloat16)
    rounded = pipeline([0, 1], **call).images
    spread = pipeline.transformer.dit.latent_std.mean()
    assert 0 < (rounded - exact).abs().mean() < 0.1 * spread
