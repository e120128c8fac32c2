"""The adaptive weight from gradients at the decodes: those of the plain formula, in one backward pass."""

import pytest
import torch
from torch import Tensor, nn

from openpae.models.discriminator import PatchDiscriminator
from openpae.objective.losses import adaptive_weight
from openpae.objective.terms import balance_gan

WEIGHTS = {"l1": 1.0, "lpips": 0.7, "mcr": 0.5, "gan": 0.3}


class _Counted(torch.autograd.Function):
    """The identity, which notes each backward pass."""

    @staticmethod
    def forward(ctx: object, x: Tensor, calls: list[str], name: str) -> Tensor:
        ctx.note = lambda: calls.append(name)  # type: ignore[attr-defined]
        return x.view_as(x)

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        ctx.note()  # type: ignore[attr-defined]
        return gradient, None, None


class Setting:
    """A decoder of two linear layers, and losses in float64 that look at its decodes r, m and l."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.decoder = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5)).double()
        self.perceptual = nn.Sequential(nn.Linear(5, 7), nn.Tanh()).double().requires_grad_(False)
        self.discriminator = nn.Sequential(nn.Linear(5, 7), nn.Tanh()).double().requires_grad_(False)
        self.z = torch.randn(3, 4, 6).double()
        self.x = torch.randn(4, 5).double()
        self.calls: list[str] = []

    def terms(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        decoded = dict(zip("rml", self.decoder(self.z), strict=True))
        seen = self.perceptual(_Counted.apply(torch.cat(list(decoded.values())), self.calls, "perceptual"))
        r, m, _ = seen.chunk(3)
        logits = self.discriminator(_Counted.apply(decoded["r"], self.calls, "discriminator"))
        terms = {
            "l1": (decoded["r"] - self.x).abs().mean(),
            "lpips": (r - self.perceptual(self.x)).square().mean(),
            "mcr": (m - r.detach()).square().mean() + (decoded["l"] - decoded["m"].detach()).abs().mean(),
            "gan": -logits.mean(),
        }
        return terms, decoded

    @property
    def last(self) -> Tensor:
        return self.decoder.get_parameter("2.weight")

    def gradients(self, loss: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(loss, list(self.decoder.parameters())))


def test_value_weight_and_gradients_are_those_of_the_plain_formula() -> None:
    """Each number is a sum of at most some hundred products: 1e-12 leaves room for their rounding."""
    setting = Setting()
    terms, _ = setting.terms()
    pulls = [
        torch.autograd.grad(term, setting.last, retain_graph=True)[0]
        for term in (terms["l1"] + WEIGHTS["lpips"] * terms["lpips"], terms["gan"])
    ]
    weight = WEIGHTS["gan"] * adaptive_weight(pulls[0], pulls[1]).double()
    plain = torch.stack([{**WEIGHTS, "gan": weight}[name] * term for name, term in terms.items()]).sum()
    expected = setting.gradients(plain)

    terms, decoded = setting.terms()
    balanced, loss = balance_gan(terms, WEIGHTS, decoded, setting.last, keep_graph=False)
    assert float(balanced) == pytest.approx(float(weight), rel=1e-6)  # the norms are taken in float32
    assert loss.item() == pytest.approx(plain.item(), rel=1e-6)
    for one, two in zip(setting.gradients(loss), expected, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-7)


def test_the_networks_behind_the_decodes_run_backward_once() -> None:
    setting = Setting()
    terms, decoded = setting.terms()
    _, loss = balance_gan(terms, WEIGHTS, decoded, setting.last, keep_graph=False)
    setting.gradients(loss)
    assert sorted(setting.calls) == ["discriminator", "perceptual"]


def test_terms_can_be_run_backward_again_where_they_are_kept() -> None:
    setting = Setting()
    terms, decoded = setting.terms()
    balance_gan(terms, WEIGHTS, decoded, setting.last, keep_graph=True)
    assert all(gradient.isfinite().all() for gradient in setting.gradients(terms["lpips"] + terms["gan"]))


def test_features_of_a_patch_discriminator_are_its_images() -> None:
    net, images = PatchDiscriminator(width=4, num_layers=1), torch.rand(2, 3, 16, 16)
    assert torch.equal(net(net.features(images)), net(images))
