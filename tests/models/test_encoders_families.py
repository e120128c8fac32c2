"""Every family of encoders at tiny size, saved as on the hub and loaded, against transformers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from openpae.models.configs import DecoderConfig, PAEConfig
from openpae.models.encoders import FrozenEncoder, encoder_fingerprint, load_encoder
from openpae.models.tokenizer import PAE
from openpae.models.vfms import ENCODERS
from tests.models.families import FAMILIES, Family, reference, saved, under_hub_names


@pytest.mark.parametrize("grid", [(4, 4), (5, 3), (2, 8)])
def test_features_are_the_packages_own(
    family: Family, grid: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On every grid: no prefix tokens, no affine last norm, row order, merged where the row says so."""
    hub_model = saved(family, tmp_path, monkeypatch)
    encoder = load_encoder("tiny", str(tmp_path))
    pixels = torch.randn(2, 3, *(side * encoder.spec.stride for side in grid))
    features = encoder(pixels)
    assert features.shape == (2, grid[0] * grid[1], 24)
    torch.testing.assert_close(
        features, reference(family, family.tower(hub_model), pixels), atol=1e-3, rtol=1e-3
    )
    torch.testing.assert_close(features.mean(-1), torch.zeros(features.shape[:2]), atol=1e-5, rtol=0)
    torch.testing.assert_close(
        features.var(-1, correction=0), torch.ones(features.shape[:2]), atol=1e-2, rtol=0
    )


def test_a_sum_of_layers_is_normalised_once(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NAME+2: the outputs of the last two blocks are added, then normalised as the last one alone."""
    hub_model = saved(family, tmp_path, monkeypatch)
    one, two = (load_encoder(name, str(tmp_path)) for name in ("tiny", "tiny+2"))
    pixels = torch.randn(2, 3, 3 * one.spec.stride, 2 * one.spec.stride)
    summed = reference(family, family.tower(hub_model), pixels, layers=2)
    torch.testing.assert_close(two(pixels), summed, atol=1e-3, rtol=1e-3)
    assert not torch.allclose(two(pixels), one(pixels), atol=1e-2)
    assert encoder_fingerprint(one) != encoder_fingerprint(two)
    with pytest.raises(ValueError, match=r"layers, so no sum of its last 9"):
        load_encoder("tiny+9", str(tmp_path))


def test_a_bright_patch_changes_its_own_token_most(encoder: FrozenEncoder) -> None:
    stride = encoder.spec.stride
    dark = torch.zeros(1, 3, 3 * stride, 5 * stride)
    for row, column in ((0, 0), (1, 4), (2, 1)):
        bright = dark.clone()
        bright[..., row * stride : (row + 1) * stride, column * stride : (column + 1) * stride] = 2.0
        moved = (encoder(bright) - encoder(dark)).norm(dim=-1)
        assert moved.argmax() == 5 * row + column


@pytest.mark.parametrize(
    "family", [family for family in FAMILIES if family.positions], ids=lambda family: family.row
)
def test_positions_are_interpolated_to_another_grid(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reference is a model of that grid with a resized table. DINOv3 computes its positions."""
    assert family.positions is not None
    tower = family.tower(saved(family, tmp_path, monkeypatch))
    spec = ENCODERS["tiny"]
    side = 6 * spec.merge
    table = tower.get_parameter(family.positions).detach()
    rows = table.reshape(-1, 24)
    prefix = len(rows) - (4 * spec.merge) ** 2
    square = rows[prefix:].T.reshape(1, 24, 4 * spec.merge, 4 * spec.merge)
    resized = F.interpolate(square, size=(side, side), mode="bicubic", antialias=family.antialias)
    grown = torch.cat([rows[:prefix], resized.reshape(24, -1).T]).reshape(*table.shape[:-2], -1, 24)
    config = tower.config
    config.image_size = (6 * spec.stride,) * 2 if family.row == "internvit-300m" else 6 * spec.stride
    large = type(tower)(config).eval()
    state = {name: value for name, value in tower.state_dict().items() if name != family.positions}
    large.load_state_dict(state | {family.positions: grown})
    pixels = torch.randn(1, 3, 6 * spec.stride, 6 * spec.stride)
    features = load_encoder("tiny", str(tmp_path))(pixels)
    torch.testing.assert_close(features, reference(family, large, pixels), atol=1e-3, rtol=1e-3)


def test_a_step_of_the_tokenizer_does_not_change_the_encoder(encoder: FrozenEncoder) -> None:
    decoder = DecoderConfig(hidden_dim=16, num_layers=1, num_heads=2, mlp_dim=16, patch_size=8)
    config = PAEConfig(
        encoder="tiny", image_size=32, latent_dim=4, modulator_layers=1, width=16, decoder=decoder
    )
    model = PAE(config, encoder).train()
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    images = torch.rand(2, 3, 32, 32)
    F.l1_loss(model.decode(model.encode(images)), images).backward()
    optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    assert not any(module.training for module in encoder.modules())
    assert torch.equal(model.features(images), model.features(images))  # no dropout, no noise of masks


def test_a_finetuned_encoder_gets_gradients(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(family, tmp_path, monkeypatch)
    encoder = load_encoder("tiny", str(tmp_path), trainable=True)
    stride = encoder.spec.stride
    encoder(torch.randn(1, 3, 2 * stride, 2 * stride)).square().sum().backward()
    assert any(bool(parameter.grad.any()) for parameter in encoder.parameters() if parameter.grad is not None)


def test_half_precision_weights_are_widened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers would build the network in the file's precision."""
    hub_model = saved(FAMILIES[0], tmp_path, monkeypatch)
    hub_model.bfloat16().save_pretrained(tmp_path)
    encoder = load_encoder("tiny", str(tmp_path))
    assert {parameter.dtype for parameter in encoder.parameters()} == {torch.float32}
    torch.testing.assert_close(
        encoder.backbone.embeddings.cls_token, hub_model.embeddings.cls_token.float(), rtol=0, atol=0
    )


def test_a_wrong_number_of_register_tokens_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise patch tokens would be dropped as registers."""
    saved(FAMILIES[0], tmp_path, monkeypatch)
    monkeypatch.setitem(ENCODERS, "tiny", replace(ENCODERS["tiny"], num_prefix_tokens=1))
    with pytest.raises(
        ValueError, match=r"gave 20 patch tokens for 4 x 4; its stride or num_prefix_tokens = 1"
    ):
        load_encoder("tiny", str(tmp_path))(torch.zeros(1, 3, 56, 56))


def test_the_row_of_another_size_is_refused(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(family, tmp_path, monkeypatch)
    with pytest.raises(
        ValueError, match=f"are of width 24, but the encoder's row says {ENCODERS[family.row].dim}"
    ):
        load_encoder(family.row, str(tmp_path))
    monkeypatch.setitem(ENCODERS, "tiny", replace(ENCODERS["tiny"], stride=32))
    with pytest.raises(ValueError, match=r"are of patch 1[46], but the encoder's row says (16|32)"):
        load_encoder("tiny", str(tmp_path))


def test_only_the_vision_part_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SigLIP, CLIP and MAE hold more; the pooling head of SigLIP's vision part is left out too."""
    for family in FAMILIES:
        if family.row in ("siglip2-so", "clip-b", "mae-l"):
            hub_model = saved(family, tmp_path / family.row, monkeypatch)
            loaded = load_encoder("tiny", str(tmp_path / family.row)).state_dict()
            own = {name for name, _ in family.tower(hub_model).named_parameters()}
            norm = ENCODERS[family.row].final_norm
            dropped = {name for name in own if name.startswith(("head.", f"{norm}."))}
            assert {name.removeprefix("backbone.") for name in loaded} == own - dropped


def test_internvit_loads_from_the_file_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fused queries, keys and values, other names, another kind of config, and remote code that must not
    run."""
    family = FAMILIES[-1]
    hub_model = saved(family, tmp_path, monkeypatch)
    expected = load_encoder("tiny", str(tmp_path))
    state = under_hub_names(hub_model.state_dict())
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(
        """{"architectures": ["InternVisionModel"], "model_type": "intern_vit_6b", "torch_dtype": "bfloat16",
        "auto_map": {"AutoConfig": "configuration_intern_vit.InternVisionConfig",
                     "AutoModel": "modeling_intern_vit.InternVisionModel"},
        "attention_dropout": 0.0, "drop_path_rate": 0.0, "dropout": 0.0, "hidden_act": "gelu",
        "hidden_size": 24, "image_size": 112, "initializer_factor": 1.0, "initializer_range": 0.02,
        "intermediate_size": 48, "layer_norm_eps": 1e-06, "norm_type": "layer_norm",
        "num_attention_heads": 2, "num_channels": 3, "num_hidden_layers": 2, "patch_size": 14,
        "qk_normalization": false, "qkv_bias": true, "use_bfloat16": true, "use_flash_attn": true}"""
    )
    for remote in ("configuration_intern_vit.py", "modeling_intern_vit.py"):
        (tmp_path / remote).write_text("raise AssertionError('remote code was run')")
    pixels = torch.randn(1, 3, 112, 112)
    assert torch.equal(load_encoder("tiny", str(tmp_path))(pixels), expected(pixels))
