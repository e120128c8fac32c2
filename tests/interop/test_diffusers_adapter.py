"""The tokenizer inside diffusers: its folders, its pipelines, and a training loop as its scripts have it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from openpae.models.configs import DecoderConfig, PAEConfig
from openpae.models.encoders import load_encoder
from openpae.models.tokenizer import PAE, build_tokenizer
from tests.conftest import shaken

diffusers = pytest.importorskip("diffusers")
# diffusers itself warns of old names that it uses.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


@pytest.fixture
def vae(tiny_pae: PAE) -> Any:
    from openpae.interop.diffusers_adapter import AutoencoderPAE

    return AutoencoderPAE.of(tiny_pae)


@torch.no_grad()
def test_it_is_the_tokenizer_on_images_in_minus_one_to_one(vae: Any, tiny_pae: PAE) -> None:
    images = torch.rand(2, 3, 32, 32)
    latents = vae.encode(2 * images - 1).latents
    torch.testing.assert_close(latents, tiny_pae.encode(images), rtol=0, atol=1e-5)
    torch.testing.assert_close(vae.decode(latents).sample, 2 * tiny_pae.decode(latents) - 1)
    torch.testing.assert_close(vae(2 * images - 1).sample, vae.decode(latents).sample, rtol=0, atol=1e-4)
    assert torch.equal(vae.encode(2 * images - 1, return_dict=False)[0], latents)
    posterior = vae.encode(2 * images - 1).latent_dist
    assert torch.equal(posterior.sample(torch.Generator()), latents)
    assert torch.equal(posterior.mode(), latents)
    assert torch.equal(vae.decode(latents, return_dict=False)[0], vae.decode(latents).sample)
    assert (vae.config.latent_channels, vae.config.sample_size, vae.config.scaling_factor) == (8, 32, 1.0)
    assert 2 ** (len(vae.config.block_out_channels) - 1) == 8  # as pipelines compute the patch size


@torch.no_grad()
def test_it_comes_back_from_a_folder_of_diffusers(vae: Any, tmp_path: Path) -> None:
    """With its encoder, which is fetched from nowhere; and diffusers' own finder of classes knows it."""
    vae.save_pretrained(tmp_path)
    again = type(vae).from_pretrained(tmp_path, low_cpu_mem_usage=False)
    images = 2 * torch.rand(1, 3, 32, 32) - 1
    assert torch.equal(again.encode(images).latents, vae.encode(images).latents)
    assert torch.equal(again(images).sample, vae(images).sample)
    assert not any(parameter.requires_grad for parameter in again.pae.encoder.parameters())
    assert again.pae.config == vae.pae.config


def test_a_transformers_encoder_comes_back_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    from openpae.interop.diffusers_adapter import AutoencoderPAE
    from openpae.models.vfms import ENCODERS

    vit = transformers.ViTMAEModel(
        transformers.ViTMAEConfig(
            hidden_size=24, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48, image_size=64
        )
    )
    vit.save_pretrained(tmp_path / "vfm")
    row = replace(ENCODERS["mae-b"], dim=24, num_heads=2, repo="no/where")
    monkeypatch.setitem(ENCODERS, "tiny-mae", row)
    decoder = DecoderConfig(hidden_dim=32, num_layers=1, num_heads=2, mlp_dim=64, patch_size=16)
    config = PAEConfig(
        encoder="tiny-mae", encoder_source=str(tmp_path / "vfm"), image_size=64, latent_dim=8, decoder=decoder
    )
    tokenizer = shaken(build_tokenizer(config)).eval()
    AutoencoderPAE.of(tokenizer).save_pretrained(tmp_path / "vae")
    again = AutoencoderPAE.from_pretrained(tmp_path / "vae", low_cpu_mem_usage=False)
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(again.encode(2 * images - 1).latents, tokenizer.encode(images))


def test_a_stock_training_loop_learns_on_its_latents(vae: Any) -> None:
    """As diffusers' scripts do it: frozen autoencoder, scaled latents, noise by a scheduler, their model."""
    from diffusers import DDPMScheduler, UNet2DModel

    vae.requires_grad_(False)
    model = UNet2DModel(
        sample_size=4,
        in_channels=vae.config.latent_channels,
        out_channels=vae.config.latent_channels,
        block_out_channels=(32,),
        layers_per_block=1,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        norm_num_groups=8,
    )
    scheduler = DDPMScheduler(num_train_timesteps=100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    pixel_values = 2 * torch.rand(8, 3, 32, 32) - 1
    losses = []
    for _ in range(60):
        with torch.no_grad():
            latents = vae.encode(pixel_values.to(vae.dtype)).latents * vae.config.scaling_factor
        noise = torch.randn_like(latents)
        timesteps = torch.randint(0, scheduler.config.num_train_timesteps, (len(latents),))
        noisy = scheduler.add_noise(latents, noise, timesteps)
        loss = nn.functional.mse_loss(model(noisy, timesteps).sample, noise)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    with torch.no_grad():
        decoded = vae.decode(latents / vae.config.scaling_factor).sample
    assert decoded.shape == pixel_values.shape


def test_a_stock_pipeline_decodes_with_it(vae: Any, tmp_path: Path) -> None:
    """Saved and loaded with the pipeline, too."""
    from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel

    dit = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=8,
        out_channels=8,
        num_layers=1,
        sample_size=4,
        patch_size=1,
        num_embeds_ada_norm=1000,
    ).eval()
    pipeline = DiTPipeline(transformer=dit, vae=vae, scheduler=DDIMScheduler())
    pipeline.set_progress_bar_config(disable=True)
    draw = {"class_labels": [1, 2], "num_inference_steps": 2, "guidance_scale": 1.0, "output_type": "np"}
    images = pipeline(generator=torch.manual_seed(0), **draw).images
    assert images.shape == (2, 32, 32, 3)
    pipeline.save_pretrained(tmp_path)
    again = DiTPipeline.from_pretrained(tmp_path, low_cpu_mem_usage=False)
    again.set_progress_bar_config(disable=True)
    assert (again(generator=torch.manual_seed(0), **draw).images == images).all()


@torch.no_grad()
def test_scripts_may_cast_it(vae: Any, tmp_path: Path) -> None:
    """They move a frozen autoencoder to half precision. It answers in that, but keeps its own weights."""
    images = 2 * torch.rand(2, 3, 32, 32) - 1
    latents, decoded = vae.encode(images).latents, vae(images).sample
    vae.save_pretrained(tmp_path)
    half = type(vae).from_pretrained(tmp_path, torch_dtype=torch.bfloat16, low_cpu_mem_usage=False)
    vae.to("cpu", dtype=torch.bfloat16)
    assert torch.equal(vae.encode(images).latents, latents)
    for model in (vae, half):
        assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
        rounded = model.encode(images.to(torch.bfloat16)).latents
        assert rounded.dtype == torch.bfloat16
        assert 0 < (rounded.float() - latents).abs().mean() < 0.03
        sample = model.decode(latents.to(torch.bfloat16)).sample
        assert sample.dtype == torch.bfloat16
        assert 0 < (sample.float() - decoded).abs().mean() < 0.05


def test_what_diffusers_could_not_build_again_is_refused(tiny_config: PAEConfig) -> None:
    from openpae.interop.diffusers_adapter import AutoencoderPAE

    class Own(nn.Module):
        spec = load_encoder("random-tiny").spec

        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            return pixels

    with pytest.raises(ValueError, match=r"an encoder of your own \(Own\) cannot be saved by diffusers"):
        AutoencoderPAE.of(PAE(tiny_config, Own()))
    decoder = replace(tiny_config.decoder, patch_size=12)
    odd = PAE(replace(tiny_config, image_size=48, decoder=decoder))
    with pytest.raises(ValueError, match="a power of 2, got 12"):
        AutoencoderPAE.of(odd)


def test_without_its_encoder_it_decodes(tiny_config: PAEConfig, tmp_path: Path) -> None:
    from openpae.interop.diffusers_adapter import AutoencoderPAE

    vae = AutoencoderPAE.of(PAE(tiny_config).eval())
    vae.save_pretrained(tmp_path)
    again = AutoencoderPAE.from_pretrained(tmp_path, low_cpu_mem_usage=False)
    z = torch.randn(1, 8, 4, 4)
    assert torch.equal(again.decode(z).sample, vae.decode(z).sample)
    with pytest.raises(RuntimeError, match="built without its encoder"):
        again.encode(torch.zeros(1, 3, 32, 32))
