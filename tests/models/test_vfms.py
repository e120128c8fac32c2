"""Every family of the table, tiny: built from a config of transformers, saved as the hub has it, loaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from openpae.models.configs import DecoderConfig, PAEConfig
from openpae.models.encoders import FrozenEncoder, load_encoder
from openpae.models.tokenizer import PAE
from openpae.models.vfms import ENCODERS

VIT = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
}
TEXT = {**VIT, "num_hidden_layers": 1, "vocab_size": 20, "max_position_embeddings": 4}
TEXT |= {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}


@dataclass(frozen=True, kw_only=True)
class Family:
    """How a family is made at tiny size, and what its weights are called."""

    row: str
    """Its row of the table, of which the tiny one is a copy."""
    whole: Callable[[], Any]
    """The model that the hub's file holds, on a grid of 4 x 4 tokens (8 x 8 before a merge)."""
    tower: Callable[[Any], Any] = lambda whole: whole
    """The part of it that is the encoder."""
    positions: str | None = "embeddings.position_embeddings"
    """Table of positions; None where they are computed."""
    antialias: bool = False
    """Whether the package interpolates it with antialias, as DINOv2's own code does for its registers."""


def siglip() -> Any:
    vision = {**VIT, "image_size": 64, "patch_size": 16}
    return transformers.SiglipModel(transformers.SiglipConfig(vision_config=vision, text_config=TEXT))


def clip() -> Any:
    vision = {**VIT, "image_size": 64, "patch_size": 16}
    config = transformers.CLIPConfig(vision_config=vision, text_config=TEXT, projection_dim=8)
    return transformers.CLIPModel(config)


def mae() -> Any:
    decoder = {"decoder_hidden_size": 16, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2}
    config = transformers.ViTMAEConfig(
        **VIT, **decoder, decoder_intermediate_size=16, image_size=64, hidden_dropout_prob=0.5
    )
    return transformers.ViTMAEForPreTraining(config)


def dinov3() -> Any:
    config = transformers.DINOv3ViTConfig(
        **VIT, image_size=64, patch_size=16, num_register_tokens=4, drop_path_rate=0.5, pos_embed_jitter=2.0
    )
    return transformers.DINOv3ViTModel(config)


def dinov2(model: str, **changes: Any) -> Any:
    config = getattr(transformers, f"{model}Config")(
        **{key: value for key, value in VIT.items() if key != "intermediate_size"},
        image_size=56,
        patch_size=14,
        hidden_dropout_prob=0.5,
        **changes,
    )
    return getattr(transformers, f"{model}Model")(config)


def internvit() -> Any:
    config = transformers.InternVLVisionConfig(
        **VIT, image_size=112, attention_bias=True, hidden_dropout_prob=0.5
    )
    return transformers.InternVLVisionModel(config)


FAMILIES = [
    Family(
        row="dinov2-l",
        whole=lambda: dinov2("Dinov2WithRegisters", num_register_tokens=4),
        antialias=True,
    ),
    Family(row="dinov2-l-noreg", whole=lambda: dinov2("Dinov2")),
    Family(
        row="dinov2-g",
        whole=lambda: dinov2("Dinov2WithRegisters", num_register_tokens=4, use_swiglu_ffn=True),
        antialias=True,
    ),
    Family(row="dinov3-l", whole=dinov3, positions=None),
    Family(
        row="siglip2-so",
        whole=siglip,
        tower=lambda whole: whole.vision_model,
        positions="embeddings.position_embedding.weight",
    ),
    Family(row="mae-l", whole=mae, tower=lambda whole: whole.vit),
    Family(
        row="clip-b",
        whole=clip,
        tower=lambda whole: whole.vision_model,
        positions="embeddings.position_embedding.weight",
    ),
    Family(row="internvit-300m", whole=internvit),
]


@pytest.fixture(params=FAMILIES, ids=lambda family: family.row)
def family(request: pytest.FixtureRequest) -> Family:
    return request.param


def made(family: Family) -> Any:
    """With random numbers where the package puts zeros and ones, so that no part is switched off."""
    torch.manual_seed(0)
    whole = family.whole().eval()
    with torch.no_grad():
        for parameter in whole.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return whole


def saved(family: Family, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Save it, and give the table a row for it: "tiny"."""
    whole = made(family)
    whole.save_pretrained(folder)
    monkeypatch.setitem(ENCODERS, "tiny", replace(ENCODERS[family.row], dim=24, num_heads=2))
    return whole


@pytest.fixture
def encoder(family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FrozenEncoder:
    saved(family, tmp_path, monkeypatch)
    return load_encoder("tiny", str(tmp_path))


def reference(family: Family, tower: Any, pixels: Tensor) -> Tensor:
    """Features by the package's class alone: its last hidden states, normalised without scale and shift."""
    spec = ENCODERS[family.row]
    told: dict[str, Any] = {"output_hidden_states": True}
    told |= {"interpolate_pos_encoding": True} if family.row[:3] in ("sig", "cli", "mae") else {}
    if family.row == "mae-l":
        tower.config.mask_ratio = 0.0
    with torch.no_grad():
        output = tower(pixels, **told)
    hidden = output.hidden_states[-1]
    tokens = hidden[:, spec.num_prefix_tokens :]
    if family.row == "mae-l":  # shuffled; the class tells how to put them back
        tokens = tokens.gather(1, output.ids_restore[..., None].expand_as(tokens))
    tokens = np.asarray(tokens, dtype=np.float64)
    if family.row == "internvit-300m":
        h, w = (side // 28 for side in pixels.shape[-2:])
        tokens = tokens.reshape(len(tokens), h, 2, w, 2, -1).mean((2, 4)).reshape(len(tokens), h * w, -1)
    centred = tokens - tokens.mean(-1, keepdims=True)
    return torch.from_numpy(centred / centred.std(-1, keepdims=True)).float()


@pytest.mark.parametrize("grid", [(4, 4), (5, 3), (2, 8)])
def test_features_are_the_packages_own(
    family: Family, grid: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the grid: prefix tokens dropped, last norm neutral, row order, merged where the row says."""
    whole = saved(family, tmp_path, monkeypatch)
    encoder = load_encoder("tiny", str(tmp_path))
    pixels = torch.randn(2, 3, *(side * encoder.spec.stride for side in grid))
    features = encoder(pixels)
    assert features.shape == (2, grid[0] * grid[1], 24)
    torch.testing.assert_close(features, reference(family, family.tower(whole), pixels), atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(features.mean(-1), torch.zeros(features.shape[:2]), atol=1e-5, rtol=0)
    torch.testing.assert_close(
        features.var(-1, correction=0), torch.ones(features.shape[:2]), atol=1e-2, rtol=0
    )


def test_a_bright_patch_lights_its_own_token(encoder: FrozenEncoder) -> None:
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
    """As a model made for that grid, whose table was resized by hand. DINOv3 computes its own."""
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
    found = load_encoder("tiny", str(tmp_path))(pixels)
    torch.testing.assert_close(found, reference(family, large, pixels), atol=1e-3, rtol=1e-3)


def test_a_step_of_the_tokenizer_leaves_it_as_it_was(encoder: FrozenEncoder) -> None:
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


def test_a_finetuned_one_gets_gradients(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(family, tmp_path, monkeypatch)
    encoder = load_encoder("tiny", str(tmp_path), trainable=True)
    stride = encoder.spec.stride
    encoder(torch.randn(1, 3, 2 * stride, 2 * stride)).square().sum().backward()
    assert any(bool(parameter.grad.any()) for parameter in encoder.parameters() if parameter.grad is not None)


def edit_weights(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    file = folder / "model.safetensors"
    state = load_file(file)
    change(state)
    save_file(state, file, metadata={"format": "pt"})


def any_weight(state: dict[str, Tensor]) -> str:
    """A weight of the vision tower, in the middle of it."""
    tower = (name for name in sorted(state) if not name.startswith(("text_model.", "decoder.")))
    return next(name for name in tower if name.endswith(("layernorm_before.weight", "norm1.weight")))


def test_a_weight_that_is_missing_is_named(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers would fill it with random numbers and only warn."""
    saved(family, tmp_path, monkeypatch)
    edit_weights(tmp_path, lambda state: state.__delitem__(any_weight(state)))
    with pytest.raises(ValueError, match=r"do not fit \w+: missing: .*(norm1|layernorm_before)\.weight"):
        load_encoder("tiny", str(tmp_path))


def test_a_weight_that_no_part_knows_is_named(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(family, tmp_path, monkeypatch)
    edit_weights(tmp_path, lambda state: state.update({"adapter.strange": torch.zeros(2)}))
    with pytest.raises(ValueError, match=r"do not fit \w+: unknown: adapter\.strange"):
        load_encoder("tiny", str(tmp_path))


def test_a_weight_of_another_shape_is_named(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(family, tmp_path, monkeypatch)
    edit_weights(tmp_path, lambda state: state.update({any_weight(state): torch.zeros(5)}))
    with pytest.raises(ValueError, match=r"do not fit \w+: of another shape: .*(norm1|layernorm_before)"):
        load_encoder("tiny", str(tmp_path))


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


def test_half_precision_weights_are_widened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers would build the whole network in the file's precision."""
    whole = saved(FAMILIES[0], tmp_path, monkeypatch)
    whole.bfloat16().save_pretrained(tmp_path)
    encoder = load_encoder("tiny", str(tmp_path))
    assert {parameter.dtype for parameter in encoder.parameters()} == {torch.float32}
    torch.testing.assert_close(
        encoder.backbone.embeddings.cls_token, whole.embeddings.cls_token.float(), rtol=0, atol=0
    )


def test_other_register_tokens_than_the_rows_are_found_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else patch tokens would be dropped for registers."""
    saved(FAMILIES[0], tmp_path, monkeypatch)
    monkeypatch.setitem(ENCODERS, "tiny", replace(ENCODERS["tiny"], num_prefix_tokens=1))
    with pytest.raises(
        ValueError, match=r"gave 20 patch tokens for 4 x 4; its stride or num_prefix_tokens = 1"
    ):
        load_encoder("tiny", str(tmp_path))(torch.zeros(1, 3, 56, 56))


def test_a_damaged_file_is_named(family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(family, tmp_path, monkeypatch)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"weights or config at .* are damaged"):
        load_encoder("tiny", str(tmp_path))


class Code:
    """Would run when unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Callable[..., object], tuple[Path]]:
        return Path.touch, (self.file,)


def test_a_pickle_that_would_run_code_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Older hub folders hold pickles; one of nothing but tensors is read."""
    whole = saved(FAMILIES[0], tmp_path, monkeypatch)
    (tmp_path / "model.safetensors").unlink()
    torch.save(whole.state_dict(), tmp_path / "pytorch_model.bin")
    assert load_encoder("tiny", str(tmp_path)).spec.dim == 24
    torch.save({"embeddings.cls_token": Code(tmp_path / "ran")}, tmp_path / "pytorch_model.bin")
    with pytest.raises(
        ValueError, match=r"is refused: it is a pickle that would call .*nothing in it was run"
    ):
        load_encoder("tiny", str(tmp_path))
    assert not (tmp_path / "ran").exists()
    (tmp_path / "pytorch_model.bin").write_bytes(b"rubbish")
    with pytest.raises(ValueError, match=r"weights or config at .* are damaged: "):
        load_encoder("tiny", str(tmp_path))


def test_a_config_of_wrong_types_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(FAMILIES[0], tmp_path, monkeypatch)
    (tmp_path / "config.json").write_text('{"hidden_size": "wide"}')
    with pytest.raises(ValueError, match=r"weights or config at .* are damaged: .*hidden_size"):
        load_encoder("tiny", str(tmp_path))


HUB_INTERNVIT = {
    "embeddings.cls_token": "embeddings.class_embedding",
    "embeddings.position_embeddings": "embeddings.position_embedding",
    "embeddings.patch_embeddings.projection": "embeddings.patch_embedding",
    "encoder.layer.": "encoder.layers.",
    "attention.projection_layer": "attn.proj",
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "lambda_": "ls",
}


def test_internvit_loads_in_the_layout_of_its_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fused queries, keys and values, other names, another kind of config with remote code beside it."""
    family = FAMILIES[-1]
    whole = saved(family, tmp_path, monkeypatch)
    expected = load_encoder("tiny", str(tmp_path))
    state: dict[str, Tensor] = {}
    for name, value in whole.state_dict().items():
        for ours, hub in HUB_INTERNVIT.items():
            name = name.replace(ours, hub)
        state[name] = value
    for layer in range(2):
        for kind in ("weight", "bias"):
            parts = [state.pop(f"encoder.layers.{layer}.attention.{part}_proj.{kind}") for part in "qkv"]
            state[f"encoder.layers.{layer}.attn.qkv.{kind}"] = torch.cat(parts)
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


def test_only_the_vision_part_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a whole SigLIP, CLIP or MAE; the pooling head of SigLIP's vision part is left out too."""
    for family in FAMILIES:
        if family.row in ("siglip2-so", "clip-b", "mae-l"):
            whole = saved(family, tmp_path / family.row, monkeypatch)
            found = load_encoder("tiny", str(tmp_path / family.row)).state_dict()
            own = {name for name, _ in family.tower(whole).named_parameters()}
            norm = ENCODERS[family.row].final_norm
            dropped = {name for name in own if name.startswith(("head.", f"{norm}."))}
            assert {name.removeprefix("backbone.") for name in found} == own - dropped


def test_loading_prints_no_table_of_what_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    saved(FAMILIES[6], tmp_path, monkeypatch)
    verbosity = transformers.logging.get_verbosity()
    capfd.readouterr()
    load_encoder("tiny", str(tmp_path))
    assert "UNEXPECTED" not in "".join(capfd.readouterr())
    assert transformers.logging.get_verbosity() == verbosity


def test_the_docs_table_is_the_tables() -> None:
    """docs/encoders.md: every row with its facts."""
    lines = (Path(__file__).parents[2] / "docs" / "encoders.md").read_text(encoding="utf-8").splitlines()
    found = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| `")
    ]
    expected = [
        [
            f"`{name}`",
            f"`{spec.repo}`" if spec.repo else "-",
            *(str(number) for number in (16 * spec.stride, spec.stride // spec.merge)),
            *(str(number) for number in (spec.dim, spec.num_heads, spec.num_prefix_tokens)),
        ]
        for name, spec in ENCODERS.items()
    ]
    assert [row[:7] for row in found] == expected
    assert all(row[7] for row in found)  # its licence
