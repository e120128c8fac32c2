"""Published constants, against other packages or as their authors publish them."""

from __future__ import annotations

import pytest
import torch
from transformers import image_utils

from openpae.models import upsampling, vfms
from openpae.models.discriminator import FeatureDiscriminator
from openpae.models.encoders import EncoderInput
from openpae.models.lpips import LPIPS

PUBLISHED = {
    "IMAGENET_MEAN": image_utils.IMAGENET_DEFAULT_MEAN,
    "IMAGENET_STD": image_utils.IMAGENET_DEFAULT_STD,
    "CLIP_MEAN": image_utils.OPENAI_CLIP_MEAN,
    "CLIP_STD": image_utils.OPENAI_CLIP_STD,
    "HALF": image_utils.IMAGENET_STANDARD_MEAN,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_means_and_deviations_are_those_of_transformers(name: str) -> None:
    assert tuple(getattr(vfms, name)) == tuple(PUBLISHED[name])


@pytest.mark.parametrize(
    ("prefix", "mean", "std"),
    [
        ("dinov2", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ("dinov3", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ("mae", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ("internvit", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ("siglip2", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
        ("clip", (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
        ("efficientnet", (127 / 255,) * 3, (128 / 255,) * 3),
    ],
)
def test_every_vfm_gets_the_pixels_that_it_was_trained_with(
    prefix: str, mean: tuple[float, ...], std: tuple[float, ...]
) -> None:
    rows = {name: spec for name, spec in vfms.ENCODERS.items() if name.startswith(prefix)}
    assert rows
    images = torch.rand(2, 3, 32, 32, dtype=torch.float64)
    for name, spec in rows.items():
        pixels = EncoderInput(spec, spec.stride)(images[:, :, : spec.stride, : spec.stride])
        patch = images[:, :, : spec.stride, : spec.stride]
        expected = (patch - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
        torch.testing.assert_close(pixels, expected.double(), rtol=1e-6, atol=1e-6, msg=name)


def test_lpips_scales_as_its_authors_do() -> None:
    """On 2 x - 1: minus (-0.030, -0.088, -0.188), over (0.458, 0.448, 0.450)."""
    x = torch.rand(2, 3, 64, 64)
    shift = torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1)
    scale = torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1)
    network = LPIPS("alex")
    seen: list[torch.Tensor] = []
    network.stages[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    network.features(x)
    torch.testing.assert_close(seen[0], (2 * x - 1 - shift) / scale, rtol=1e-5, atol=1e-5)


def test_discriminator_and_anyup_see_images_as_imagenet_has_them() -> None:
    from transformers import ViTConfig, ViTModel

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    vit = ViTModel(ViTConfig(image_size=32, patch_size=8, **sizes), add_pooling_layer=False)
    network = FeatureDiscriminator(vit, taps=(1, 2), head_dim=8)
    seen: list[torch.Tensor] = []
    vit.embeddings.register_forward_pre_hook(lambda _, args, kwargs: seen.append(args[0]), with_kwargs=True)
    images = torch.rand(2, 3, 32, 32)
    network(images)
    mean = torch.tensor(image_utils.IMAGENET_DEFAULT_MEAN).view(1, 3, 1, 1)
    std = torch.tensor(image_utils.IMAGENET_DEFAULT_STD).view(1, 3, 1, 1)
    torch.testing.assert_close(seen[0], (images - mean) / std, rtol=1e-5, atol=1e-5)

    def anyup(guide: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        seen.append(guide)
        return torch.nn.functional.interpolate(features, size=guide.shape[-2:])

    upsampling.reference_features(torch.randn(2, 16, 8), images, 4, 4, anyup)
    torch.testing.assert_close(torch.cat(seen[1:]), (images - mean) / std, rtol=1e-5, atol=1e-5)
