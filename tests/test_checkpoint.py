"""Saved models load strictly and know whom they belong to; released weights are imported name by name."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from conftest import shaken
from openpae import config as configs
from openpae.checkpoint import (
    check_pair,
    encoder_fingerprint,
    load_generator,
    load_tokenizer,
    write_generator,
    write_tokenizer,
)
from openpae.dit import LightningDiT, LightningDiTConfig
from openpae.encoders import FrozenEncoder, load_encoder
from openpae.folders import checkpoint_path, checkpoint_steps, identity_of, model_folder
from openpae.official import import_generator, import_tokenizer
from openpae.sampling import SamplerConfig, sample_latents
from openpae.tokenizer import PAE, PAEConfig, build_tokenizer
from openpae.weights import load_strict, read_tensors

GOLDEN = Path(__file__).parent / "golden" / "lightningdit_tiny.safetensors"


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


def under_their_names(model: PAE) -> dict[str, Tensor]:
    """A tokenizer as the authors' release holds it, inverse to the importer and written without it."""
    from openpae.layers import sincos_2d

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
    side, config = model.config.grid_size, model.config
    theirs["delta_encoder.pos_embed"] = sincos_2d(side, side, model.spec.dim)[None]
    width = config.decoder.hidden_dim
    theirs["decoder.decoder_pos_embed"] = torch.cat([torch.zeros(1, width), sincos_2d(side, side, width)])[
        None
    ]
    return theirs


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
    whole, half = load_tokenizer(tokenizer_folder), load_tokenizer(tokenizer_folder, decode_only=True)
    assert half.encoder is None
    assert torch.equal(half.decode(z), whole.decode(z))


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
    with pytest.raises(TypeError, match=r"must be an nn.Module, got int"):
        encoder_fingerprint(3)  # type: ignore[arg-type]


def test_a_field_that_a_later_version_adds_keeps_old_folders_readable(folder: Path) -> None:
    """The fingerprint is over the config as it was written; here `sphere` plays the field of the future."""
    file = folder / "config.yaml"
    state = load_file(folder / "model.safetensors")
    older = {key: value for key, value in configs.read_yaml(file).items() if key != "sphere"}
    made_with = identity_of(folder).made_with
    from openpae.checkpoint import _print_of

    identity = {"fingerprint": _print_of(state, older, made_with), "made_with": made_with}
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
    found = encoder_fingerprint(encoder)
    with pytest.raises(
        ValueError, match=rf"encoder of fingerprint {expected}.*now has {found}.*encoder_source"
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
    (tmp_path / "checkpoints" / ".step-200000000.partial").mkdir()
    (tmp_path / "checkpoints" / "step-best").mkdir()
    assert checkpoint_steps(tmp_path) == [5, 99_999_999, 100_000_000]
    assert model_folder(tmp_path) == checkpoint_path(tmp_path, 100_000_000)
    assert model_folder(checkpoint_path(tmp_path, 5)) == checkpoint_path(tmp_path, 5)
    assert checkpoint_steps(tmp_path / "nothing") == []


def test_strict_loading_lists_every_kind_of_fault() -> None:
    model = nn.ModuleDict({name: nn.Linear(2, 2) for name in "abcde"})
    state = model.state_dict()
    wrong = {key: value for key, value in state.items() if key[0] in "de"} | {"f": torch.zeros(1)}
    wrong["e.bias"] = torch.zeros(3)
    before = {key: value.clone() for key, value in state.items()}
    with pytest.raises(ValueError, match="some weights do not fit the config") as caught:
        load_strict(model, {key: value + 1 for key, value in wrong.items()}, "some weights")
    message = str(caught.value)
    assert "6 keys missing (a.bias, a.weight, b.bias, ...)" in message
    assert "1 unexpected (f)" in message
    assert "1 of another shape (e.bias (3,) for (2,))" in message
    assert all(
        torch.equal(value, before[key]) for key, value in model.state_dict().items()
    )  # nothing half-loaded


# Foreign files


class Harmless:
    """A pickle that would call a function when read: here one that only makes a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.file,)


def test_a_pickle_that_would_run_code_is_refused_and_does_not_run(tmp_path: Path) -> None:
    file, trace = tmp_path / "weights.pt", tmp_path / "it ran"
    torch.save({"model": {"x": torch.zeros(1)}, "extra": Harmless(trace)}, file)
    call = r"weights.pt is refused: it is a pickle that would call \S*Path\.touch when read.*safetensors"
    with pytest.raises(ValueError, match=call):
        read_tensors(file)
    file.write_bytes(pickle.dumps(Harmless(trace), protocol=2))
    with pytest.raises(ValueError, match=r"weights.pt is refused: it is a pickle that would call"):
        read_tensors(file)
    file.write_bytes(pickle.dumps(Harmless(trace)))  # of a protocol that the careful reader does not know
    with pytest.raises(ValueError, match=r"weights.pt is refused: .*get the weights as safetensors"):
        read_tensors(file)
    assert not trace.exists()
    pickle.loads(pickle.dumps(Harmless(trace)))
    assert trace.exists()  # it would have


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150)
@given(data=st.data())
def test_damaged_weights_are_named(tmp_path: Path, data: st.DataObject) -> None:
    """Whatever the bytes lead the reader to, it ends in one error that names the file, or in tensors."""
    name, zipped = data.draw(st.sampled_from([("w.safetensors", True), ("w.pt", True), ("w.pt", False)]))
    file = tmp_path / name
    if name.endswith(".pt"):
        torch.save({"a": torch.zeros(3, 2), "b": {"c": 1}}, file, _use_new_zipfile_serialization=zipped)
    else:
        save_file({"a": torch.zeros(3, 2)}, file)
    content = bytearray(file.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    file.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    message = name
    try:
        read_tensors(file)
    except ValueError as error:
        message = str(error)
    assert name in message


def test_both_kinds_of_files_are_read(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3), "b": torch.randn(2, 2)}
    save_file(tensors, tmp_path / "w.safetensors")
    torch.save(tensors, tmp_path / "w.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    for name in ("w.safetensors", "w.pt"):
        found = read_tensors(tmp_path / name)
        assert all(torch.equal(found[key], value) for key, value in tensors.items())
    with pytest.raises(ValueError, match=r"list.pt must hold a mapping of tensors, got list"):
        read_tensors(tmp_path / "list.pt")
    with pytest.raises(FileNotFoundError, match=r"no weights file at .*none.pt"):
        read_tensors(tmp_path / "none.pt")


# Released weights


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
