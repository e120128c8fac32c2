"""bfloat16 against float32 for every network, and float32 on the device against float32 on the CPU."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from openpae import config as configs
from openpae.models.configs import DiscriminatorConfig, DiTDHConfig, PAEConfig
from openpae.models.discriminator import FeatureDiscriminator, PatchDiscriminator
from openpae.models.ditdh import build_generator
from openpae.models.encoders import empty_encoder
from openpae.models.lpips import LPIPS
from openpae.models.priors import Refiner
from openpae.models.tokenizer import tokenizer_class
from openpae.plan.fakes import empty_discriminator
from openpae.runtime.device import autocast
from openpae.train.settings import GeneratorRun, RefinerRun, TokenizerRun
from tests.gpu.outcome import Outcome

ROUNDING = 2.0**-8
"""Unit roundoff of bfloat16."""
FLOAT32 = 1e-3
"""Bound of the relative difference of two devices in float32."""


@dataclass(frozen=True, kw_only=True)
class Network:
    """A network and its input."""

    module: nn.Module
    inputs: tuple[Tensor, ...]
    """Arguments. The gradient of the first is compared."""
    run: Callable[..., Tensor] | None = None
    """The output of the arguments; None calls the module."""
    kinks: int = 0
    """Number of activations with a kink (ReLU and its like) in a row."""


def compare_precisions(name: str, device: torch.device) -> Outcome:
    """Compare the output and the gradient of the input of a network under autocast with those in float32.

    Each of n products rounds its input and its output to bfloat16. If the errors are independent, their
    relative size grows as the root of n. The bound of the output is u sqrt(n), u = 2^-8. Forward and backward
    pass together have 3 n products. At a kink a share of about u of the slopes changes, which is an error of
    sqrt(u). So the bound of the gradient is sqrt(3 n u^2 + k u) with k kinks.

    Args:
        name: a key of `NETWORKS`.
        device: a GPU takes the published sizes, a CPU tiny ones.
    """
    on_gpu = device.type == "cuda"
    torch.manual_seed(0)
    with torch.device(device):
        network = NETWORKS[name](on_gpu)
        network.module.to(device).eval()
        shake(network.module)
    exact, slope = _evaluate(network, device, "fp32")
    half, half_slope = _evaluate(network, device, "bf16")
    products = sum(weight.ndim > 1 for weight in network.module.parameters())
    bounds = {
        "output": ROUNDING * math.sqrt(products),
        "gradient": math.sqrt(3 * products * ROUNDING**2 + network.kinks * ROUNDING),
    }
    figures = {
        "output error": relative_error(half, exact),
        "gradient error": relative_error(half_slope, slope),
    }
    figures |= {f"{part} bound": bound for part, bound in bounds.items()}
    problems = [
        f"bfloat16 differs by {figures[f'{part} error']:.2g} of the {part}, bound {bound:.2g}"
        for part, bound in bounds.items()
        if not figures[f"{part} error"] < bound
    ]
    if on_gpu:
        network.module.cpu()
        there = dataclasses.replace(network, inputs=tuple(part.cpu() for part in network.inputs))
        output, _ = _evaluate(there, torch.device("cpu"), "fp32")
        figures["float32 error"] = relative_error(exact.cpu(), output)
        if not figures["float32 error"] < FLOAT32:
            problems.append(f"float32 differs by {figures['float32 error']:.2g} from the CPU")
    return Outcome(figures, problems)


def relative_error(value: Tensor, exact: Tensor) -> float:
    """Root mean square of the difference, relative to that of the exact values."""
    return ((value - exact).square().mean() / exact.square().mean()).sqrt().item()


def _evaluate(network: Network, device: torch.device, precision: str) -> tuple[Tensor, Tensor]:
    """The output, and the gradient of its mean square with respect to the first input."""
    first = network.inputs[0].detach().requires_grad_()
    with autocast(device, precision):
        output = (network.run or network.module)(first, *network.inputs[1:]).float()
    (slope,) = torch.autograd.grad(output.square().mean(), first)
    return output.detach(), slope


@torch.no_grad()
def shake(module: nn.Module) -> None:
    """Move trained weights off their start, where zeros switch some paths off, in place."""
    for weight in module.parameters():
        if weight.requires_grad:
            weight.add_(0.01 * torch.randn_like(weight))  # more would blow up wide networks


def _generator(config: Any) -> Network:
    x = torch.randn(2, *config.latent_shape)
    return Network(
        module=build_generator(config),
        inputs=(x, torch.tensor([0.3, 0.7]), torch.tensor([0, 1])),
    )


def _lightning_dit(full: bool) -> Network:
    preset = "generator/xl-80ep" if full else "generator/tiny"
    return _generator(configs.load(GeneratorRun, preset).model)


def _dit_dh(full: bool) -> Network:
    if full:
        return _generator(configs.load(GeneratorRun, "generator/dit-dh-xl").model)
    tiny = configs.load(GeneratorRun, "generator/tiny").model
    fields = {field.name: getattr(tiny, field.name) for field in dataclasses.fields(tiny)}
    head = dataclasses.replace(DiTDHConfig().head, hidden_dim=48, num_heads=4)
    return _generator(DiTDHConfig(**fields, head=head))


def _tokenizer(full: bool) -> Network:
    config: PAEConfig = configs.load(
        TokenizerRun, "tokenizer/dinov2-l-d32" if full else "tokenizer/tiny"
    ).model
    module = tokenizer_class(config)(config, empty_encoder(config.encoder))
    return Network(
        module=module,
        inputs=(torch.rand(2, 3, *config.image_shape),),
        run=lambda images: module(images)[1][0],
    )


def _refiner(full: bool) -> Network:
    config = configs.load(RefinerRun, "refiner/dinov2-l" if full else "refiner/tiny").model
    module = Refiner(config)
    h, w = config.grid_shape
    features = torch.randn(2, h * w, config.feature_dim)
    return Network(module=module, inputs=(features,), run=lambda features: module(features)[1])


def _patch_discriminator(full: bool) -> Network:
    module = PatchDiscriminator() if full else PatchDiscriminator(8, 2)
    return Network(
        module=module, inputs=(torch.rand(2, 3, *(2 * [256 if full else 32])),), kinks=4 if full else 3
    )


def _feature_discriminator(full: bool) -> Network:
    if full:
        return Network(
            module=empty_discriminator(DiscriminatorConfig()),
            inputs=(torch.rand(2, 3, 224, 224),),
            kinks=2,
        )
    from transformers import ViTConfig, ViTModel

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    vit = ViTModel(ViTConfig(**sizes, image_size=32, patch_size=8), add_pooling_layer=False)
    return Network(
        module=FeatureDiscriminator(vit, taps=(1, 2), head_dim=16),
        inputs=(torch.rand(2, 3, 32, 32),),
        kinks=2,
    )


def _lpips(full: bool) -> Network:
    side = 256 if full else 32
    images = torch.rand(2, 2, 3, side, side)
    return Network(module=LPIPS("vgg" if full else "alex"), inputs=tuple(images), kinks=13 if full else 5)


NETWORKS: Mapping[str, Callable[[bool], Network]] = {
    "LightningDiT": _lightning_dit,
    "DiT-DH": _dit_dh,
    "tokenizer": _tokenizer,
    "refiner": _refiner,
    "patch discriminator": _patch_discriminator,
    "feature discriminator": _feature_discriminator,
    "LPIPS": _lpips,
}
"""Builders of published (true) or tiny sizes."""
