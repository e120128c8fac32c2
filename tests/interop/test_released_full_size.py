"""Names of released models at full size, on the meta device, where no weight takes memory."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open

from openpae.interop import released as released_module
from openpae.interop.released import (
    import_generator,
    import_tokenizer,
    released_generator_config,
    released_tokenizer_config,
)
from openpae.models.configs import LightningDiTConfig, PAEConfig
from openpae.models.dit import LightningDiT
from openpae.models.encoders import empty_encoder, encoder_architecture, load_encoder
from openpae.models.tokenizer import PAE
from openpae.models.vfms import ENCODERS
from tests.interop.released_names import (
    backbone_under_their_names,
    generator_under_their_names,
    under_their_names,
)

GOLDEN = Path(__file__).parents[1] / "golden" / "lightningdit_tiny.safetensors"


def patterns(names: Any) -> set[str]:
    """Names with every layer number as one."""
    return {re.sub(r"\.\d+\.", ".N.", name) for name in names}


def golden_names(file: str) -> set[str]:
    with safe_open(GOLDEN.with_name(file), "pt") as opened:
        return {key.removeprefix("model.") for key in opened.keys() if key.startswith("model.")}  # noqa: SIM118


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
    hub_model = transformers.Dinov2WithRegistersModel(config)
    state = backbone_under_their_names("dinov2-l", hub_model, tmp_path)
    assert len(state) == 6 + 24 * 18
    assert not patterns(state) & {"encoder.layer.N.attention.q_proj.weight"}
    monkeypatch.setitem(ENCODERS, "tiny", replace(ENCODERS["dinov2-l"], dim=16, num_heads=2))
    loaded = load_encoder("tiny", str(tmp_path), state={f"backbone.{name}": v for name, v in state.items()})
    own = {name: value for name, value in hub_model.state_dict().items() if not name.startswith("layernorm.")}
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
