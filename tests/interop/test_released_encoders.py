"""Released tokenizers with every family of encoders."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from openpae.interop.released import (
    import_tokenizer,
    released_tokenizer_config,
)
from openpae.models.configs import DecoderConfig, PAEConfig
from openpae.models.encoders import FrozenEncoder, load_encoder
from openpae.models.saved import load_tokenizer
from openpae.models.tokenizer import PAE
from openpae.models.vfms import ENCODERS
from openpae.storage.model_folder import identity_of
from tests.conftest import shaken
from tests.interop.released_names import (
    backbone_under_their_names,
    under_their_names,
)
from tests.models.families import FAMILIES, Family, made


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
    hub_model = made(family)
    backbone = backbone_under_their_names(row, hub_model, tmp_path / "vfm")
    assert old_name in backbone
    monkeypatch.setitem(ENCODERS, "tiny", replace(ENCODERS[row], dim=24, num_heads=2))
    hub_model.save_pretrained(tmp_path / "hub")
    plain = replace(ENCODERS[row], dim=24, num_heads=2, merge_by="mean")
    monkeypatch.setitem(ENCODERS, "plain", plain)
    encoder = FrozenEncoder(ENCODERS["tiny"], load_encoder("plain", str(tmp_path / "hub")).backbone)
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
            import_tokenizer(theirs, replace(config, encoder_source=str(tmp_path / "hub")))
    with pytest.raises(ValueError, match=r"do not fit|unexpected"):
        import_tokenizer(
            theirs | {f"{prefix}strange": torch.zeros(1)},
            replace(config, encoder_source=str(tmp_path / "hub")),
        )
