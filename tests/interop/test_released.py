"""Released weights are imported name by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from openpae.interop.released import (
    import_generator,
    import_tokenizer,
    read_statistics,
    released_generator_config,
    released_kind,
    released_tokenizer_config,
)
from openpae.models.configs import DiTDHConfig, HeadConfig, LightningDiTConfig
from openpae.models.ditdh import DiTDH
from openpae.models.encoders import load_encoder
from openpae.models.tokenizer import PAE
from openpae.sampling.sampler import sample_latents
from openpae.sampling.settings import SamplerConfig
from tests.conftest import shaken
from tests.interop.released_names import (
    ditdh_under_their_names,
    under_their_names,
)

GOLDEN = Path(__file__).parents[1] / "golden" / "lightningdit_tiny.safetensors"


@pytest.fixture(scope="module")
def released() -> tuple[dict[str, Tensor], LightningDiTConfig, dict[str, Tensor]]:
    """The golden generator under the authors' names, its config, and what it must give."""
    with safe_open(GOLDEN, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        sizes = json.loads(file.metadata()["config"])
    config = LightningDiTConfig(
        latent_dim=sizes["in_channels"],
        grid_size=sizes["input_size"],
        hidden_dim=sizes["hidden_size"],
        num_layers=sizes["depth"],
        num_heads=sizes["num_heads"],
        num_classes=sizes["num_classes"],
        qk_norm=sizes["use_qknorm"],
    )
    theirs = {key.removeprefix("model."): value for key, value in tensors.items() if key.startswith("model.")}
    return theirs, config, tensors


@torch.no_grad()
def test_the_golden_generator_agrees(released: Any) -> None:
    """Velocity, and the results of 19 Euler steps without and with guidance (the null class is the same)."""
    theirs, config, golden = released
    model = import_generator({"ema": theirs, "model": {}}, config)
    velocity = model(golden["io.x"], golden["io.t"], golden["io.labels"])
    torch.testing.assert_close(velocity, golden["io.velocity"], rtol=0, atol=1e-5)
    for name, guidance in (("conditional", 1.0), ("guided", 2.5)):
        sampler = SamplerConfig(steps=19, shift=0.4, guidance=guidance, guidance_start=0.25)
        drawn = sample_latents(model, golden["sample.labels"], golden["sample.noise"], sampler)
        torch.testing.assert_close(drawn, golden[f"sample.{name}"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("wrap", ["", "module.", "_orig_mod.", "module._orig_mod."])
@pytest.mark.parametrize("holder", ["ema", "model", None])
def test_wrappers_around_names_do_not_matter(released: Any, wrap: str, holder: str | None) -> None:
    theirs, config, golden = released
    wrapped = {wrap + name: value for name, value in theirs.items()}
    model = import_generator({holder: wrapped, "step": 3} if holder else wrapped, config)
    velocity = model(golden["io.x"], golden["io.t"], golden["io.labels"])
    torch.testing.assert_close(velocity, golden["io.velocity"], rtol=0, atol=1e-5)


def test_averaged_weights_are_preferred(released: Any) -> None:
    theirs, config, _ = released
    model = import_generator({"model": {}, "ema": theirs}, config)
    assert torch.equal(model.patch_embed.weight, theirs["x_embedder.proj.weight"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("x_embedder.proj.weight"), r"1 keys missing \(patch_embed.weight\)"),
        (lambda s: s.update({"x_embedder.extra": torch.zeros(1)}), "1 unknown names: x_embedder.extra"),
        (
            lambda s: s.update({"blocks.9.attn.proj.bias": torch.zeros(1)}),
            r"1 unexpected \(blocks.9.attn.proj.bias\)",
        ),
        (
            lambda s: s.update({"final_layer.linear.bias": torch.zeros(3)}),
            r"1 of another shape \(to_velocity.bias \(3,\)",
        ),
        (lambda s: s.pop("pos_embed"), "released weights lack pos_embed"),
        (
            lambda s: s.update({"pos_embed": s["pos_embed"] + 1}),
            "pos_embed of the released weights is not the fixed",
        ),
        (
            lambda s: s.update({"feat_rope.freqs_cos": torch.zeros(2, 2)}),
            r"freqs_cos.*shape \(2, 2\).*check image_size",
        ),
        (lambda s: s.update({"step": 3}), "must map names to tensors; not so: step"),
    ],
)
def test_generator_weights_that_do_not_fit_are_refused(
    released: Any, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    theirs, config, _ = released
    state = dict(theirs)
    change(state)
    with pytest.raises(ValueError, match=message):
        import_generator(state, config)


def test_released_tokenizer_weights_arrive_at_their_places(tiny_pae: PAE) -> None:
    """Random weights, renamed to the authors' names and imported, give the same tokenizer."""
    released = {"model": {f"module.{name}": value for name, value in under_their_names(tiny_pae).items()}}
    encoder = load_encoder("random-tiny")
    with torch.no_grad():
        encoder.backbone.cls_token.zero_()  # type: ignore[operator, union-attr]  # the file's weights win
    model = import_tokenizer(released, tiny_pae.config, encoder)
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in tiny_pae.state_dict().items())
    images = torch.rand(1, 3, 32, 32)
    assert torch.equal(model.reconstruct(images), tiny_pae.reconstruct(images))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("latent_compressor.1.bias"), r"1 keys missing \(projector.to_latent.bias\)"),
        (
            lambda s: s.pop("decoder.decoder_layers.0.attention.attention.key.bias"),
            r"1 keys missing \(decoder.blocks.0.attn.qkv.bias\), 2 unexpected",
        ),
        (lambda s: s.update({"loss.logvar": torch.zeros(1)}), "1 unknown names: loss.logvar"),
        (
            lambda s: s.update({"latent_compressor.1.bias": torch.zeros(9)}),
            r"to_latent.bias \(9,\) for \(8,\)",
        ),
        (lambda s: s.pop("decoder.decoder_pos_embed"), "released weights lack decoder.decoder_pos_embed"),
        (
            lambda s: s["delta_encoder.pos_embed"].mul_(2),
            "delta_encoder.pos_embed of the released weights is not",
        ),
    ],
)
def test_tokenizer_weights_that_do_not_fit_are_refused(
    tiny_pae: PAE, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    state = under_their_names(tiny_pae)
    change(state)
    with pytest.raises(ValueError, match=message):
        import_tokenizer(state, tiny_pae.config, load_encoder("random-tiny"))


def test_sizes_are_read_off_the_weights(tiny_pae: PAE, released: Any) -> None:
    theirs, config, _ = released
    assert released_generator_config({"ema": theirs}) == config
    assert released_kind({"ema": theirs}) == "generator"
    state = under_their_names(tiny_pae)
    assert released_kind({"model": state}) == "tokenizer"
    config = released_tokenizer_config({"model": state}, "random-tiny", decoder_heads=2)
    assert config == tiny_pae.config
    with pytest.raises(ValueError, match=r"decoder is 32 wide, none of the paper's \(768, 1024, 1152\)"):
        released_tokenizer_config(state, "random-tiny")
    del state["decoder.decoder_pred.weight"]
    with pytest.raises(ValueError, match=r"released weights lack decoder.decoder_pred.weight"):
        released_tokenizer_config(state, "random-tiny", decoder_heads=2)
    with pytest.raises(
        ValueError, match="neither a tokenizer nor a generator that is known; its names: a, b"
    ):
        released_kind({"b": torch.zeros(1), "a": torch.zeros(1)})


@torch.no_grad()
def test_a_generator_of_rae_comes_in() -> None:
    head = HeadConfig(hidden_dim=48, num_layers=2, num_heads=2)
    config = DiTDHConfig(
        latent_dim=8, grid_size=4, hidden_dim=32, num_layers=3, num_heads=2, num_classes=3, head=head
    )
    expected = shaken(DiTDH(config)).eval()
    theirs = ditdh_under_their_names(expected)
    assert released_kind(theirs) == "generator"
    assert released_generator_config(theirs) == config
    model = import_generator(theirs, config)
    x, t, labels = torch.randn(2, 8, 4, 4), torch.rand(2), torch.tensor([0, 3])
    assert torch.equal(model(x, t, labels), expected(x, t, labels))
    assert model(x, t, labels).abs().max() > 0.01
    theirs["blocks.5.attn.proj.bias"] = torch.zeros(48)
    with pytest.raises(ValueError, match=r"1 unexpected \(head_blocks.2.attn.proj.bias\)"):
        import_generator(theirs, config)


def test_statistics_are_read_in_the_layouts_of_releases(tmp_path: Path) -> None:
    mean, std = torch.randn(8), torch.rand(8) + 0.1
    file = tmp_path / "stats.pt"
    torch.save({"mean": mean.view(1, 8, 1, 1), "std": std.view(1, 8, 1, 1)}, file)  # LightningDiT, PAE
    statistics = read_statistics(file)
    assert torch.equal(statistics[0], mean)
    assert torch.equal(statistics[1], std)
    torch.save({"mean": mean.view(8, 1, 1), "std": std.view(8, 1, 1)}, file)
    assert torch.equal(read_statistics(file)[0], mean)
    place = torch.randn(8, 4, 4)
    torch.save({"mean": place, "var": place.square()}, file)  # RAE
    statistics = read_statistics(file)
    assert torch.equal(statistics[0], place)
    torch.testing.assert_close(statistics[1], (place.double().square() + 1e-5).sqrt().float())
    torch.save({"mean": mean}, file)
    with pytest.raises(ValueError, match=r"stats.pt must hold the tensors mean and std .*got mean"):
        read_statistics(file)
    for odd in ({"mean": mean, "var": 1}, {"mean": mean, "std": std.int()}, {None: 1}):
        torch.save(odd, file)
        with pytest.raises(ValueError, match=r"must hold the tensors mean and std .*, of floats, got"):
            read_statistics(file)
