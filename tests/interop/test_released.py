"""Released weights are imported name by name."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from openpae.interop import released as released_module
from openpae.interop.released import (
    import_generator,
    import_tokenizer,
    read_statistics,
    released_generator_config,
    released_kind,
    released_tokenizer_config,
)
from openpae.models.configs import DecoderConfig, DiTDHConfig, HeadConfig, LightningDiTConfig, PAEConfig
from openpae.models.dit import LightningDiT
from openpae.models.ditdh import DiTDH
from openpae.models.encoders import FrozenEncoder, empty_encoder, encoder_architecture, load_encoder
from openpae.models.layers import rope_2d, sincos_2d
from openpae.models.saved import load_tokenizer
from openpae.models.tokenizer import PAE
from openpae.models.vfms import ENCODERS
from openpae.sampling.sampler import sample_latents
from openpae.sampling.settings import SamplerConfig
from openpae.storage.model_folder import identity_of
from tests.conftest import shaken
from tests.models.test_vfms import FAMILIES, HUB_INTERNVIT, Family, made

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


def under_their_names(model: PAE) -> dict[str, Tensor]:
    """A tokenizer as the authors' release holds it, inverse to the importer and written without it."""
    theirs: dict[str, Tensor] = {}
    places = [
        ("modulator.patch_embed.", "delta_encoder.patch_embed.proj."),
        ("modulator.fusion.proj.", "delta_encoder.fusion_proj."),
        ("modulator.fusion.norm.", "delta_encoder.final_ln."),
        ("modulator.layers.", "delta_encoder.layers."),
        ("projector.attn.", "latent_compressor.0."),
        ("projector.to_latent.", "latent_compressor.1."),
        ("deprojector.from_latent.", "latent_decompressor.0."),
        ("deprojector.attn.", "latent_decompressor.1."),
        ("decoder.embed.", "decoder.decoder_embed."),
        ("decoder.cls_token", "decoder.trainable_cls_token"),
        ("decoder.norm.", "decoder.decoder_norm."),
        ("decoder.to_pixels.", "decoder.decoder_pred."),
        ("decoder.blocks.", "decoder.decoder_layers."),
        ("encoder.backbone.", "encoder.encoder."),
        ("encoder.merger.", "encoder.mlp1."),
    ]
    parts = [
        (".norm_self.", ".norm1."),
        (".norm_query.", ".norm2_q."),
        (".norm_context.", ".norm2_kv."),
        (".norm_mlp.", ".norm3."),
    ]
    block = [
        (".attn.proj.", ".attention.output.dense."),
        (".norm1.", ".layernorm_before."),
        (".norm2.", ".layernorm_after."),
        (".mlp.fc1.", ".intermediate.dense."),
        (".mlp.fc2.", ".output.dense."),
    ]
    for name, value in model.state_dict().items():
        ours, new = next(pair for pair in places if name.startswith(pair[0]))
        rest = name.removeprefix(ours)
        if ours == "decoder.blocks." and ".attn.qkv." in rest:
            number, kind = rest.split(".")[0], rest.rsplit(".", 1)[1]
            for letter, part in zip(("query", "key", "value"), value.chunk(3), strict=True):
                theirs[f"{new}{number}.attention.attention.{letter}.{kind}"] = part
            continue
        for old, their in {"modulator.layers.": parts, "decoder.blocks.": block}.get(ours, []):
            rest = rest.replace(old, their)
        theirs[new + rest] = value
    (side, _), config = model.config.grid_shape, model.config
    theirs["delta_encoder.pos_embed"] = sincos_2d(side, side, model.spec.dim)[None]
    width = config.decoder.hidden_dim
    theirs["decoder.decoder_pos_embed"] = torch.cat([torch.zeros(1, width), sincos_2d(side, side, width)])[
        None
    ]
    return theirs


@torch.no_grad()
def test_the_golden_generator_agrees(released: Any) -> None:
    """Velocity, and the results of 19 Euler steps without and with guidance (their null class is ours)."""
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
    """Random weights of ours, brought under the authors' names and back, give the same tokenizer."""
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
    found = released_tokenizer_config({"model": state}, "random-tiny", decoder_heads=2)
    assert found == tiny_pae.config
    with pytest.raises(ValueError, match=r"decoder is 32 wide, none of the paper's \(768, 1024, 1152\)"):
        released_tokenizer_config(state, "random-tiny")
    del state["decoder.decoder_pred.weight"]
    with pytest.raises(ValueError, match=r"released weights lack decoder.decoder_pred.weight"):
        released_tokenizer_config(state, "random-tiny", decoder_heads=2)
    with pytest.raises(
        ValueError, match="neither a tokenizer nor a generator that is known; its names: a, b"
    ):
        released_kind({"b": torch.zeros(1), "a": torch.zeros(1)})


# Every family of encoders


def released_backbone(row: str, whole: Any, folder: Path) -> dict[str, Tensor]:
    """The VFM as the authors' classes hold it: names of transformers 4, or of InternViT's own code; without
    the last norm, which they drop; with SigLIP's pooling head, which they keep."""
    whole.save_pretrained(folder)  # under the names of transformers 4, as the hub has them
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    part = {"siglip2-so": "vision_model.", "mae-l": "vit."}.get(row, "")
    state = {name.removeprefix(part): value for name, value in state.items() if name.startswith(part)}
    if row == "internvit-300m-mlp":
        hub: dict[str, Tensor] = {}
        for name, value in state.items():
            for ours, theirs in HUB_INTERNVIT.items():
                name = name.replace(ours, theirs)
            hub[name] = value
        for layer in range(2):
            for kind in ("weight", "bias"):
                qkv = [hub.pop(f"encoder.layers.{layer}.attention.{part}_proj.{kind}") for part in "qkv"]
                hub[f"encoder.layers.{layer}.attn.qkv.{kind}"] = torch.cat(qkv)
        state = hub
    norm = ENCODERS[row].final_norm
    return {name: value for name, value in state.items() if norm is None or not name.startswith(f"{norm}.")}


def family_of(row: str) -> Family:
    return next(family for family in FAMILIES if family.row == row.removesuffix("-mlp"))


@pytest.mark.parametrize(
    ("row", "prefix", "old_name"),
    [
        ("dinov2-l", "encoder.encoder.", "encoder.layer.0.attention.attention.query.weight"),
        ("dinov3-l", "encoder.encoder.", "layer.0.attention.q_proj.weight"),
        ("siglip2-so", "encoder.encoder.", "head.probe"),
        ("mae-l", "encoder.model.", "encoder.layer.1.intermediate.dense.bias"),
        ("internvit-300m-mlp", "encoder.encoder.", "encoder.layers.1.attn.qkv.bias"),
    ],
)
@torch.no_grad()
def test_a_released_tokenizer_of_every_family_comes_in(
    row: str, prefix: str, old_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the config of its VFM is asked for; saved and loaded again, nothing is."""
    family = family_of(row)
    whole = made(family)
    backbone = released_backbone(row, whole, tmp_path / "vfm")
    assert old_name in backbone
    monkeypatch.setitem(ENCODERS, "tiny", replace(ENCODERS[row], dim=24, num_heads=2))
    whole.save_pretrained(tmp_path / "whole")
    plain = replace(ENCODERS[row], dim=24, num_heads=2, merge_by="mean")
    monkeypatch.setitem(ENCODERS, "plain", plain)
    encoder = FrozenEncoder(ENCODERS["tiny"], load_encoder("plain", str(tmp_path / "whole")).backbone)
    decoder = DecoderConfig(hidden_dim=32, num_layers=1, num_heads=2, mlp_dim=64)
    sizes: dict[str, Any] = {"image_size": 64, "latent_dim": 8, "modulator_layers": 1, "decoder": decoder}
    expected = shaken(PAE(PAEConfig(encoder="tiny", **sizes), encoder)).eval()
    theirs = {
        name: value for name, value in under_their_names(expected).items() if not name.startswith("encoder.")
    }
    theirs |= {f"{prefix}{name}": value for name, value in backbone.items()}
    if encoder.merger is not None:
        for number, layer in ((0, "norm"), (1, "fc1"), (3, "fc2")):
            for kind in ("weight", "bias"):
                value = encoder.merger.state_dict()[f"{layer}.{kind}"]
                theirs[f"encoder.mlp1.{number}.{kind}"] = value
    released = {"model": {f"module._orig_mod.{name}": value for name, value in theirs.items()}, "epoch": 3}
    config = released_tokenizer_config(released, "tiny", str(tmp_path / "vfm"), decoder_heads=2)
    assert replace(config, encoder_source=None) == expected.config
    model = import_tokenizer(released, config)
    images = torch.rand(1, 3, 64, 64)
    assert torch.equal(model.features(images), expected.features(images))
    assert torch.equal(model.encode(images), expected.encode(images))
    assert torch.equal(model.reconstruct(images), expected.reconstruct(images))
    model.save_pretrained(tmp_path / "out")
    shutil.rmtree(tmp_path / "vfm")
    again = load_tokenizer(tmp_path / "out")
    assert torch.equal(again.encode(images), expected.encode(images))
    assert not any(parameter.requires_grad for parameter in again.encoder.parameters())  # type: ignore[union-attr]
    again.save_pretrained(tmp_path / "copy")
    assert identity_of(tmp_path / "copy").fingerprint == identity_of(tmp_path / "out").fingerprint
    del theirs[f"{prefix}{old_name}"]
    if row != "siglip2-so":  # whose pooling head is left out anyway
        with pytest.raises(ValueError, match="do not fit"):
            import_tokenizer(theirs, replace(config, encoder_source=str(tmp_path / "whole")))
    with pytest.raises(ValueError, match=r"do not fit|unexpected"):
        import_tokenizer(
            theirs | {f"{prefix}strange": torch.zeros(1)},
            replace(config, encoder_source=str(tmp_path / "whole")),
        )


def test_the_mlp_joins_tokens_as_the_release_does() -> None:
    """Its pixel shuffle, written as it is published: views and transpositions of (B, rows, columns, C)."""
    from openpae.models.backbones import TokenMerger

    merger = TokenMerger(3, 5, 2)
    tokens = torch.randn(2, 4 * 6, 3)
    x = tokens.view(2, 4, 6, 3)
    x = x.view(2, 4, 3, 6).permute(0, 2, 1, 3).reshape(2, 3, 2, 12).permute(0, 2, 1, 3).reshape(2, 6, 12)
    expected = merger.fc2(torch.nn.functional.gelu(merger.fc1(merger.norm(x))))
    torch.testing.assert_close(merger(tokens, 4, 6), expected)


def test_that_mlp_has_no_other_home() -> None:
    with pytest.raises(ValueError, match=r"MLP whose weights only a released tokenizer holds; import one"):
        load_encoder("internvit-300m-mlp", "anywhere")


# Full size, where no weight takes memory


def patterns(names: Any) -> set[str]:
    """Names with every layer number as one."""
    return {re.sub(r"\.\d+\.", ".N.", name) for name in names}


def golden_names(file: str) -> set[str]:
    with safe_open(GOLDEN.with_name(file), "pt") as opened:
        return {key.removeprefix("model.") for key in opened.keys() if key.startswith("model.")}  # noqa: SIM118


def generator_under_their_names(model: LightningDiT) -> dict[str, Tensor]:
    places = [
        ("patch_embed.", "x_embedder.proj."),
        ("time_mlp.", "t_embedder.mlp."),
        ("class_embed.", "y_embedder.embedding_table."),
        ("final_modulation.", "final_layer.adaLN_modulation.1."),
        ("final_norm.", "final_layer.norm_final."),
        ("to_velocity.", "final_layer.linear."),
        ("blocks.", "blocks."),
    ]
    theirs: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        if not name.startswith("latent_"):
            ours, new = next(pair for pair in places if name.startswith(pair[0]))
            rest = name.removeprefix(ours).replace(".modulation.", ".adaLN_modulation.1.")
            theirs[new + rest] = value
    config = model.config
    grid, head = config.token_grid, config.hidden_dim // config.num_heads
    theirs["pos_embed"] = sincos_2d(*grid, config.hidden_dim)[None]
    theirs["feat_rope.freqs_cos"], theirs["feat_rope.freqs_sin"] = rope_2d(*grid, head)
    return theirs


def test_every_name_of_the_full_tokenizer_finds_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """The paper's main model, on the meta device: no name is missing, none is left, every shape fits."""
    vfm = transformers.Dinov2WithRegistersConfig(
        hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, image_size=518, patch_size=14
    )
    architecture = json.loads(vfm.to_json_string(use_diff=False))

    def on_meta(*arguments: Any) -> PAE:
        with torch.device("meta"):
            return PAE(*arguments)

    with torch.device("meta"):
        encoder = empty_encoder("dinov2-l", architecture)
    theirs = under_their_names(on_meta(PAEConfig(), encoder))
    assert patterns(theirs) == patterns(golden_names("pae_dinov2_tiny.safetensors"))
    assert released_tokenizer_config(theirs, "dinov2-l") == PAEConfig()
    monkeypatch.setattr(released_module, "PAE", on_meta)
    model = import_tokenizer({"model": theirs}, PAEConfig(), encoder)
    own = sum(value.numel() for name, value in model.state_dict().items() if not name.startswith("encoder."))
    assert round(own / 1e6) == 417
    theirs.pop("decoder.decoder_layers.23.output.dense.bias")
    with pytest.raises(ValueError, match=r"1 keys missing \(decoder.blocks.23.mlp.fc2.bias\)"):
        import_tokenizer({"model": theirs}, PAEConfig(), encoder)


def test_every_old_name_of_the_full_encoder_finds_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All 24 layers of DINOv2-L under the names of transformers 4, narrow."""
    config = transformers.Dinov2WithRegistersConfig(
        hidden_size=16, num_hidden_layers=24, num_attention_heads=2, image_size=56, patch_size=14
    )
    whole = transformers.Dinov2WithRegistersModel(config)
    state = released_backbone("dinov2-l", whole, tmp_path)
    assert len(state) == 6 + 24 * 18
    assert not patterns(state) & {"encoder.layer.N.attention.q_proj.weight"}
    monkeypatch.setitem(ENCODERS, "tiny", replace(ENCODERS["dinov2-l"], dim=16, num_heads=2))
    loaded = load_encoder("tiny", str(tmp_path), state={f"backbone.{name}": v for name, v in state.items()})
    own = {name: value for name, value in whole.state_dict().items() if not name.startswith("layernorm.")}
    assert own.keys() == loaded.backbone.state_dict().keys()
    assert all(torch.equal(value, own[name]) for name, value in loaded.backbone.state_dict().items())
    assert encoder_architecture(loaded) is not None


def test_every_name_of_the_full_generator_finds_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """XL/1 as in the 80-epoch recipe (no QK-norm) and the 800-epoch one; VA-VAE's is the former."""

    def on_meta(config: LightningDiTConfig) -> LightningDiT:
        with torch.device("meta"):
            return LightningDiT(config)

    monkeypatch.setattr(released_module, "LightningDiT", on_meta)
    for qk_norm in (False, True):
        config = LightningDiTConfig(qk_norm=qk_norm)
        theirs = generator_under_their_names(on_meta(config))
        if qk_norm:
            assert patterns(theirs) == patterns(golden_names("lightningdit_tiny.safetensors"))
        assert released_generator_config(theirs) == config
        model = import_generator({"ema": {f"module.{name}": v for name, v in theirs.items()}}, config)
        assert round(sum(p.numel() for p in model.parameters()) / 1e6) == 675


# The generator of RAE


def rae_names(model: DiTDH) -> dict[str, Tensor]:
    """A DiT-DH as RAE's release holds it: one list of blocks, the opposite velocity."""
    places = [
        ("patch_embed.", "s_embedder.proj."),
        ("head_embed.", "x_embedder.proj."),
        ("to_head.", "s_projector."),
        ("frequencies", "t_embedder.W"),
        ("time_mlp.", "t_embedder.mlp."),
        ("class_embed.", "y_embedder.embedding_table."),
        ("final_modulation.", "final_layer.adaLN_modulation.1."),
        ("final_norm.", "final_layer.norm_final."),
        ("to_velocity.", "final_layer.linear."),
        ("blocks.", "blocks."),
        ("head_blocks.", "blocks."),
    ]
    config = model.config
    theirs: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        if name.startswith("latent_"):
            continue
        ours, new = next(pair for pair in places if name.startswith(pair[0]))
        rest = name.removeprefix(ours).replace(".modulation.", ".adaLN_modulation.1.")
        if ours == "head_blocks.":
            number, _, rest = rest.partition(".")
            rest = f"{int(number) + config.num_layers}.{rest}"
        theirs[new + rest] = -value if ours == "to_velocity." else value
    theirs["pos_embed"] = sincos_2d(*config.token_grid, config.hidden_dim)[None]
    for part, width, heads in (
        ("enc", config.hidden_dim, config.num_heads),
        ("dec", config.head.hidden_dim, config.head.num_heads),
    ):
        cos, sin = rope_2d(*config.token_grid, width // heads)
        theirs |= {f"{part}_feat_rope.freqs_cos": cos, f"{part}_feat_rope.freqs_sin": sin}
    return theirs


@torch.no_grad()
def test_a_generator_of_rae_comes_in() -> None:
    head = HeadConfig(hidden_dim=48, num_layers=2, num_heads=2)
    config = DiTDHConfig(
        latent_dim=8, grid_size=4, hidden_dim=32, num_layers=3, num_heads=2, num_classes=3, head=head
    )
    expected = shaken(DiTDH(config)).eval()
    theirs = rae_names(expected)
    assert released_kind(theirs) == "generator"
    assert released_generator_config(theirs) == config
    model = import_generator(theirs, config)
    x, t, labels = torch.randn(2, 8, 4, 4), torch.rand(2), torch.tensor([0, 3])
    assert torch.equal(model(x, t, labels), expected(x, t, labels))
    assert model(x, t, labels).abs().max() > 0.01
    theirs["blocks.5.attn.proj.bias"] = torch.zeros(48)
    with pytest.raises(ValueError, match=r"1 unexpected \(head_blocks.2.attn.proj.bias\)"):
        import_generator(theirs, config)


# Statistics


def test_statistics_are_read_in_the_layouts_of_releases(tmp_path: Path) -> None:
    mean, std = torch.randn(8), torch.rand(8) + 0.1
    file = tmp_path / "stats.pt"
    torch.save({"mean": mean.view(1, 8, 1, 1), "std": std.view(1, 8, 1, 1)}, file)  # LightningDiT, PAE
    found = read_statistics(file)
    assert torch.equal(found[0], mean)
    assert torch.equal(found[1], std)
    torch.save({"mean": mean.view(8, 1, 1), "std": std.view(8, 1, 1)}, file)
    assert torch.equal(read_statistics(file)[0], mean)
    place = torch.randn(8, 4, 4)
    torch.save({"mean": place, "var": place.square()}, file)  # RAE
    found = read_statistics(file)
    assert torch.equal(found[0], place)
    torch.testing.assert_close(found[1], (place.double().square() + 1e-5).sqrt().float())
    torch.save({"mean": mean}, file)
    with pytest.raises(ValueError, match=r"stats.pt must hold the tensors mean and std .*got mean"):
        read_statistics(file)
