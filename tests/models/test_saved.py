"""Saved models load strictly and know whom they belong to; released weights are imported name by name."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from openpae import config as configs
from openpae.models.configs import DecoderConfig, PAEConfig
from openpae.models.dit import LightningDiT
from openpae.models.encoders import FrozenEncoder, encoder_architecture, encoder_fingerprint, load_encoder
from openpae.models.saved import check_pair, load_generator, load_tokenizer, write_generator, write_tokenizer
from openpae.models.tokenizer import PAE, build_tokenizer
from openpae.models.vfms import ENCODERS
from openpae.storage.model_folder import checkpoint_path, checkpoint_steps, identity_of, model_folder
from tests.conftest import shaken


@pytest.fixture
def folder(tokenizer_folder: Path, tmp_path: Path) -> Path:
    """A copy of the saved tokenizer, to be spoiled."""
    return Path(shutil.copytree(tokenizer_folder, tmp_path / "copy"))


@pytest.fixture
def generator_folder(tiny_dit: LightningDiT, tokenizer_folder: Path, tmp_path: Path) -> Path:
    tiny_dit.set_statistics(torch.arange(8.0), torch.arange(1.0, 9.0))
    (tmp_path / "generator").mkdir()
    made_with = identity_of(tokenizer_folder).fingerprint
    write_generator(tmp_path / "generator", tiny_dit.state_dict(), tiny_dit.config, made_with)
    return tmp_path / "generator"


# Saved folders


def test_a_saved_tokenizer_comes_back_to_the_bit(tiny_pae: PAE, tmp_path: Path) -> None:
    assert tiny_pae.encoder is not None
    write_tokenizer(tmp_path, tiny_pae.state_dict(), tiny_pae.config, encoder_fingerprint(tiny_pae.encoder))
    loaded = load_tokenizer(tmp_path)
    assert not loaded.training
    assert loaded.config == tiny_pae.config
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(loaded.encode(images), tiny_pae.encode(images))
    assert torch.equal(loaded.reconstruct(images), tiny_pae.reconstruct(images))
    assert not any(name.startswith("encoder.") for name in load_file(tmp_path / "model.safetensors"))


def test_decoding_alone_needs_no_encoder(tokenizer_folder: Path) -> None:
    z = torch.randn(1, 8, 4, 4)
    full, half = load_tokenizer(tokenizer_folder), load_tokenizer(tokenizer_folder, decode_only=True)
    assert half.encoder is None
    assert torch.equal(half.decode(z), full.decode(z))


def test_a_finetuned_encoder_is_saved_with_its_tokenizer(tiny_config: PAEConfig, tmp_path: Path) -> None:
    model = shaken(build_tokenizer(replace(tiny_config, fusion="finetune"))).eval()
    write_tokenizer(
        tmp_path, model.state_dict(), model.config, encoder_fingerprint(load_encoder("random-tiny"))
    )
    images = torch.rand(1, 3, 32, 32)
    loaded = load_tokenizer(tmp_path)
    assert torch.equal(loaded.encode(images), model.encode(images))
    assert not torch.allclose(model.features(images), load_encoder("random-tiny")(model.preprocess(images)))
    z = model.encode(images)
    assert torch.equal(load_tokenizer(tmp_path, decode_only=True).decode(z), model.decode(z))


def test_a_finetuned_encoder_is_fetched_from_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its weights and architecture are in the folder; where it came from may be gone. The weights may have
    the names of an earlier version of the transformers package, too."""
    import transformers

    vit = transformers.ViTMAEModel(
        transformers.ViTMAEConfig(
            hidden_size=24, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48, image_size=64
        )
    )
    vit.save_pretrained(tmp_path / "vfm")
    row = replace(ENCODERS["mae-b"], dim=24, num_heads=2, repo="no/where")
    monkeypatch.setitem(ENCODERS, "tiny-mae", row)
    decoder = DecoderConfig(hidden_dim=32, num_layers=1, num_heads=2, mlp_dim=64)
    source = str(tmp_path / "vfm")
    sizes = {"image_size": 64, "latent_dim": 8, "decoder": decoder}
    config = PAEConfig(encoder="tiny-mae", encoder_source=source, fusion="finetune", **sizes)  # type: ignore[arg-type]
    model = shaken(build_tokenizer(config)).eval()
    assert model.encoder is not None
    (tmp_path / "trained").mkdir()
    architecture = encoder_architecture(model.encoder)
    assert str(tmp_path) not in str(architecture)
    write_tokenizer(tmp_path / "trained", model.state_dict(), config, "0" * 16, architecture)
    older = {  # of transformers 4
        name.replace("backbone.layers.", "backbone.encoder.layer.").replace(
            ".q_proj.", ".attention.query."
        ): value
        for name, value in model.state_dict().items()
    }
    assert older.keys() != model.state_dict().keys()
    (tmp_path / "older").mkdir()
    write_tokenizer(tmp_path / "older", older, config, "0" * 16, architecture)
    shutil.rmtree(tmp_path / "vfm")
    images = torch.rand(1, 3, 64, 64)
    for folder in ("trained", "older"):
        loaded = load_tokenizer(tmp_path / folder)
        assert torch.equal(loaded.encode(images), model.encode(images))
        loaded.save_pretrained(tmp_path / "saved")
        assert torch.equal(load_tokenizer(tmp_path / "saved").encode(images), model.encode(images))
        assert all(parameter.requires_grad for parameter in loaded.encoder.parameters())  # type: ignore[union-attr]
    with pytest.raises(
        ValueError, match="loaded without its own encoder; load it with its encoder to save it"
    ):
        load_tokenizer(tmp_path / "saved", decode_only=True).save_pretrained(tmp_path / "half")


def test_a_saved_generator_comes_back_to_the_bit(generator_folder: Path, tiny_dit: LightningDiT) -> None:
    loaded = load_generator(generator_folder)
    x, t, labels = torch.randn(2, 8, 4, 4), torch.rand(2), torch.tensor([0, 2])
    assert torch.equal(loaded(x, t, labels), tiny_dit(x, t, labels))
    assert torch.equal(loaded.denormalise(x), tiny_dit.denormalise(x))


def test_identity_follows_weights_config_and_encoder(tiny_pae: PAE, tmp_path: Path) -> None:
    def saved(name: str, state: dict[str, Tensor], config: PAEConfig, encoder: str) -> str:
        (tmp_path / name).mkdir()
        write_tokenizer(tmp_path / name, state, config, encoder)
        assert identity_of(tmp_path / name).made_with == encoder
        return identity_of(tmp_path / name).fingerprint

    state, config = tiny_pae.state_dict(), tiny_pae.config
    moved = state | {"projector.to_latent.bias": state["projector.to_latent.bias"] + 1}
    first = saved("first", state, config, "a")
    assert saved("again", dict(reversed(state.items())), config, "a") == first
    assert saved("elsewhere", state, replace(config, encoder_source="some/folder"), "a") == first
    others = [
        saved("moved", moved, config, "a"),
        saved("sphere", state, replace(config, sphere="sample"), "a"),
        saved("encoder", state, config, "b"),
    ]
    assert len({first, *others}) == 4


def test_encoder_fingerprint_sees_weights_and_normalisation() -> None:
    def encoder(**changes: Any) -> FrozenEncoder:
        base = load_encoder("random-tiny")
        return FrozenEncoder(replace(base.spec, **changes), base.backbone)

    moved = load_encoder("random-tiny")
    with torch.no_grad():
        moved.backbone.cls_token[0, 0, 0] += 1e-6  # type: ignore[index, operator]
    prints = {
        encoder_fingerprint(e)
        for e in (encoder(), moved, encoder(image_std=(1.0, 1.0, 1.0)), encoder(num_prefix_tokens=0))
    }
    assert len(prints) == 4
    assert encoder_fingerprint(encoder(repo="elsewhere")) == encoder_fingerprint(encoder())
    renamed = FrozenEncoder(encoder().spec, nn.Sequential(encoder().backbone))
    assert encoder_fingerprint(renamed) == encoder_fingerprint(encoder())
    with pytest.raises(TypeError, match=r"must be an nn.Module, got int"):
        encoder_fingerprint(3)  # type: ignore[arg-type]


def test_a_field_that_a_later_version_adds_keeps_old_folders_readable(folder: Path) -> None:
    """The fingerprint is over the config as it was written; here `sphere` plays the field of the future."""
    file = folder / "config.yaml"
    state = load_file(folder / "model.safetensors")
    older = {key: value for key, value in configs.read_yaml(file).items() if key != "sphere"}
    made_with = identity_of(folder).made_with
    from openpae.storage.model_folder import _fingerprint_of

    identity = {"fingerprint": _fingerprint_of(state, older, made_with), "made_with": made_with}
    save_file(state, folder / "model.safetensors", metadata=identity)
    file.write_text(
        "".join(line for line in file.read_text().splitlines(True) if not line.startswith("sphere"))
    )
    assert load_tokenizer(folder).config.sphere == "token"


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (lambda f: (f / "model.safetensors").write_bytes(b"\x00" * 64), ValueError, "safetensors is damaged"),
        (lambda f: cut(f / "model.safetensors"), ValueError, "safetensors is damaged"),
        (lambda f: flip(f / "model.safetensors"), ValueError, "is damaged or was edited: .* its fingerprint"),
        (lambda f: edit(f, "sphere: token", "sphere: sample"), ValueError, "is damaged or was edited"),
        (
            lambda f: edit(f, "latent_dim: 8", "latent_dimm: 8"),
            ValueError,
            "unknown key latent_dimm; did you",
        ),
        (
            lambda f: edit(f, "kind: PAEConfig", "kind: Other"),
            ValueError,
            "is of kind 'Other', but a PAEConfig",
        ),
        (lambda f: (f / "config.yaml").unlink(), FileNotFoundError, "config.yaml"),
        (lambda f: (f / "model.safetensors").unlink(), FileNotFoundError, "no model at .*train-tokenizer"),
        (
            lambda f: save_file({"a": torch.zeros(1)}, f / "model.safetensors"),
            ValueError,
            "carries no fingerprint, made_with; it was not saved by openpae",
        ),
    ],
)
def test_a_spoiled_folder_is_refused(
    folder: Path, spoil: Callable[[Path], object], error: type[Exception], message: str
) -> None:
    spoil(folder)
    with pytest.raises(error, match=message):
        load_tokenizer(folder)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-10])


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def edit(folder: Path, old: str, new: str) -> None:
    file = folder / "config.yaml"
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


def test_another_encoder_than_in_training_is_refused(tokenizer_folder: Path) -> None:
    encoder = load_encoder("random-tiny")
    expected = encoder_fingerprint(encoder)
    assert torch.isfinite(load_tokenizer(tokenizer_folder, encoder).encode(torch.rand(1, 3, 32, 32))).all()
    with torch.no_grad():
        encoder.backbone.cls_token.add_(1)  # type: ignore[operator, union-attr]
    actual = encoder_fingerprint(encoder)
    with pytest.raises(
        ValueError, match=rf"encoder of fingerprint {expected}.*now has {actual}.*encoder_source"
    ):
        load_tokenizer(tokenizer_folder, encoder)


def test_a_pair_must_belong_together(generator_folder: Path, tokenizer_folder: Path, folder: Path) -> None:
    facts = check_pair(tokenizer_folder, generator_folder)
    assert facts == {
        "tokenizer": identity_of(tokenizer_folder).fingerprint,
        "generator": identity_of(generator_folder).fingerprint,
    }
    state = load_file(folder / "model.safetensors")
    config = configs.load(PAEConfig, folder / "config.yaml")
    write_tokenizer(folder, {name: value + 1 for name, value in state.items()}, config, "another")
    with pytest.raises(
        ValueError, match=rf"tokenizer {facts['tokenizer']}, but .* is {identity_of(folder).fingerprint}"
    ):
        check_pair(folder, generator_folder)


def test_the_newest_checkpoint_is_chosen_by_its_number(tmp_path: Path) -> None:
    """Not by name (100000000 sorts before 99999999), size or date."""
    for step in (99_999_999, 100_000_000, 5):
        checkpoint_path(tmp_path, step).mkdir(parents=True)
        (checkpoint_path(tmp_path, step) / "model.safetensors").write_bytes(b"x" * step if step == 5 else b"")
    (tmp_path / "checkpoints" / ".step-200000000.openpae-partial").mkdir()
    (tmp_path / "checkpoints" / "step-best").mkdir()
    assert checkpoint_steps(tmp_path) == [5, 99_999_999, 100_000_000]
    assert model_folder(tmp_path) == checkpoint_path(tmp_path, 100_000_000)
    assert model_folder(checkpoint_path(tmp_path, 5)) == checkpoint_path(tmp_path, 5)
    assert checkpoint_steps(tmp_path / "nothing") == []
