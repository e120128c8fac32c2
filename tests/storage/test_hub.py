"""Saved models by name and by folder, and what is uploaded of them; no test reaches the hub."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import yaml
from safetensors.torch import load_file

import openpae
from openpae import config as configs
from openpae.models.configs import DiTDHConfig, HeadConfig, PAEConfig
from openpae.models.dit import LightningDiT
from openpae.models.ditdh import DiTDH
from openpae.models.saved import load_tokenizer, write_generator
from openpae.models.tokenizer import PAE
from openpae.storage import card, hub
from openpae.storage.model_folder import checkpoint_path, identity_of, read_classes, write_classes

RECORD = {"metrics": {"psnr": {"value": 27.5, "stderr": 0.25}, "rfid": {"value": 1.5, "stderr": None}}}


@pytest.fixture
def pair(tiny_dit: LightningDiT, tokenizer_folder: Path, tmp_path: Path) -> Path:
    """A folder with a tokenizer and a generator of its latents, as a run leaves them."""
    folder = tmp_path / "pair"
    shutil.copytree(tokenizer_folder, folder / "tokenizer")
    (folder / "generator").mkdir()
    made_with = identity_of(tokenizer_folder).fingerprint
    write_generator(folder / "generator", tiny_dit.state_dict(), tiny_dit.config, made_with)
    return folder


class FakeHub:
    """What `huggingface_hub` would be asked, and a copy of what it would be given."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.calls: list[dict[str, Any]] = []

    def create_repo(self, repo: str, **options: Any) -> str:
        self.calls.append({"repo": repo, **options})
        return f"https://hub/{repo}"

    def upload_folder(self, *, repo_id: str, folder_path: Path, **options: Any) -> None:
        shutil.copytree(folder_path, self.folder)


@pytest.fixture
def fake_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeHub:
    fake = FakeHub(tmp_path / "uploaded")
    monkeypatch.setattr(
        huggingface_hub.HfApi, "create_repo", lambda _, *args, **kw: fake.create_repo(*args, **kw)
    )
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", lambda _, **kw: fake.upload_folder(**kw))
    return fake


def front_matter(card: str) -> dict[str, Any]:
    matter: dict[str, Any] = yaml.safe_load(card.split("---")[1])
    return matter


# Finding


def test_a_folder_goes_before_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("owner/name").mkdir(parents=True)
    assert hub.find_model("owner/name") == Path("owner/name")
    with pytest.raises(ValueError, match=r"owner.name is a folder and has no revision 'v1'"):
        hub.find_model("owner/name", "v1")
    with pytest.raises(FileNotFoundError, match=r"no folder at /no/where, and it is no name of the hub"):
        hub.find_model("/no/where")


def test_a_name_is_downloaded(monkeypatch: pytest.MonkeyPatch, tokenizer_folder: Path, tiny_pae: PAE) -> None:
    asked: dict[str, Any] = {}

    def download(name: str, **options: Any) -> str:
        asked.update(options, name=name)
        return str(tokenizer_folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    model = PAE.from_pretrained("owner/name", revision="v1")
    images = torch.rand(1, 3, 32, 32)
    assert torch.equal(model.encode(images), load_tokenizer(tokenizer_folder).encode(images))
    assert (asked["name"], asked["revision"]) == ("owner/name", "v1")
    assert {"model.safetensors", "config.yaml", "tokenizer/model.safetensors"} <= set(asked["allow_patterns"])
    assert not any("*" in pattern or ".pt" in pattern for pattern in asked["allow_patterns"])  # no pickles


def test_a_hub_that_does_not_answer_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: object, **__: object) -> None:
        raise huggingface_hub.errors.LocalEntryNotFoundError("cannot find\nthe files")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(
        FileNotFoundError, match=r"hub did not give it \(cannot find the files\).*hf download o/n"
    ):
        LightningDiT.from_pretrained("o/n")


def test_commands_never_ask_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    with pytest.raises(FileNotFoundError, match="no model at owner/name"):
        load_tokenizer("owner/name")


# Saving


def test_what_is_saved_comes_back_to_the_bit_and_keeps_its_name(pair: Path, tmp_path: Path) -> None:
    """Also of a run folder: there the newest checkpoint is taken."""
    run = tmp_path / "run"
    shutil.copytree(pair / "tokenizer", checkpoint_path(run, 7))
    tokenizer, generator = PAE.from_pretrained(run), LightningDiT.from_pretrained(pair / "generator")
    tokenizer.save_pretrained(tmp_path / "a")
    generator.save_pretrained(tmp_path / "b")
    assert identity_of(tmp_path / "a") == identity_of(pair / "tokenizer")
    assert identity_of(tmp_path / "b") == identity_of(pair / "generator")
    for kind, folder, model in ((PAE, "a", tokenizer), (LightningDiT, "b", generator)):
        again = kind.from_pretrained(tmp_path / folder)
        assert not again.training
        assert again.config == model.config
        state = model.state_dict()
        assert all(torch.equal(value, state[name]) for name, value in again.state_dict().items())
    card = (tmp_path / "b" / "README.md").read_text()
    assert "openpae.LightningDiT.from_pretrained(" in card
    assert identity_of(tmp_path / "b").fingerprint in card


def test_half_precision_halves_the_parameters_and_keeps_the_statistics(pair: Path, tmp_path: Path) -> None:
    generator = LightningDiT.from_pretrained(pair / "generator")
    generator.set_statistics(torch.rand(8) + 1 / 3, torch.rand(8) + 1 / 3)
    generator.save_pretrained(tmp_path / "half", precision="bf16")
    saved = load_file(tmp_path / "half" / "model.safetensors")
    kept = {name for name, value in saved.items() if value.dtype == torch.float32}
    assert kept == {"latent_mean", "latent_std"}
    again = LightningDiT.from_pretrained(tmp_path / "half")
    assert torch.equal(again.latent_mean, generator.latent_mean)
    assert again.patch_embed.weight.dtype == torch.float32
    torch.testing.assert_close(again.patch_embed.weight, generator.patch_embed.weight, rtol=2**-8, atol=0)


def test_a_model_of_ones_own_must_say_what_it_belongs_to(tmp_path: Path, tiny_pae: PAE) -> None:
    head = HeadConfig(hidden_dim=48, num_layers=1, num_heads=2)
    model = DiTDH(
        DiTDHConfig(
            latent_dim=8, grid_size=4, hidden_dim=32, num_layers=1, num_heads=2, num_classes=2, head=head
        )
    )
    with pytest.raises(ValueError, match=r"this DiTDH does not know with what it was made.*identity_of"):
        model.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()
    model.made_with = "0123456789abcdef"
    model.save_pretrained(tmp_path / "model")
    assert DiTDH.from_pretrained(tmp_path / "model").made_with == "0123456789abcdef"
    tiny_pae.save_pretrained(tmp_path / "tokenizer")  # it holds its encoder, so it knows
    assert PAE.from_pretrained(tmp_path / "tokenizer").made_with is not None


def test_only_a_saved_model_is_replaced(pair: Path, tmp_path: Path) -> None:
    generator = LightningDiT.from_pretrained(pair / "generator")
    generator.save_pretrained(tmp_path / "out")
    generator.save_pretrained(tmp_path / "out")
    (tmp_path / "out" / "state.pt").touch()
    with pytest.raises(ValueError, match=r"out holds something else than a saved model \(state.pt\)"):
        generator.save_pretrained(tmp_path / "out")
    with pytest.raises(ValueError, match=r"name a new folder"):
        generator.save_pretrained(tmp_path)
    assert (pair / "generator" / "model.safetensors").is_file()


# Giving away


def test_an_upload_is_the_model_and_its_card(fake_hub: FakeHub, pair: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(pair / "tokenizer", checkpoint_path(run, 3))
    (checkpoint_path(run, 3) / "state.pt").touch()
    (run / "log.jsonl").touch()
    (run / "evaluation.json").write_text(json.dumps(RECORD))
    assert hub.push(run, "me/pae", licence="cc-by-sa-4.0", private=True) == "https://hub/me/pae"
    assert fake_hub.calls == [{"repo": "me/pae", "private": True, "exist_ok": True}]
    names = sorted(path.name for path in fake_hub.folder.iterdir())
    assert names == ["README.md", "config.yaml", "evaluation.json", "model.safetensors"]
    assert identity_of(fake_hub.folder) == identity_of(pair / "tokenizer")
    card = (fake_hub.folder / "README.md").read_text()
    assert front_matter(card) == {
        "library_name": "openpae",
        "tags": ["openpae", "tokenizer"],
        "license": "cc-by-sa-4.0",
    }
    for text in (
        "# pae\n",
        '\ntokenizer = openpae.PAE.from_pretrained("me/pae")\n',
        "| psnr | 27.5 | 0.25 |\n| rfid | 1.5 |  |\n",
        "The weights are under cc-by-sa-4.0.",
        "- latent_dim: 8\n",
    ):
        assert text in card
    count = sum(v.numel() for v in load_file(fake_hub.folder / "model.safetensors").values())
    assert f"{count:,} weights" in card


def test_names_of_classes_go_up_with_the_generator(fake_hub: FakeHub, pair: Path) -> None:
    """In the folder and, made harmless for Markdown, in the card."""
    names = ["cat", "a|b\n<b>", *(f"c{label}" for label in range(30))]
    write_classes(pair / "generator", names, [1] * len(names))
    hub.push(pair, "me/pair")
    assert read_classes(fake_hub.folder / "generator") == (names, [1] * len(names))
    card = (fake_hub.folder / "README.md").read_text()
    assert "\n- classes: 0 cat; 1 a/b\\n&lt;b>; 2 c0; " in card
    assert "; 19 c17; ...\n" in card
    assert "pipeline(class_labels=['cat', 'a|b\\n<b>'], seed=0)" in card


def test_a_pair_goes_up_as_one(fake_hub: FakeHub, pair: Path) -> None:
    hub.push(pair, "me/pair")
    card = (fake_hub.folder / "README.md").read_text()
    assert front_matter(card)["tags"] == ["openpae", "generator", "tokenizer"]
    assert "license" not in front_matter(card)
    assert "No licence of the weights is stated." in card
    assert 'openpae.Pipeline.from_pretrained("me/pair")' in card
    for part in ("tokenizer", "generator"):
        assert identity_of(fake_hub.folder / part) == identity_of(pair / part)


def test_models_upload_themselves(fake_hub: FakeHub, pair: Path) -> None:
    generator = LightningDiT.from_pretrained(pair / "generator")
    assert generator.push_to_hub("me/dit", licence="mit") == "https://hub/me/dit"
    assert identity_of(fake_hub.folder) == identity_of(pair / "generator")


def test_a_folder_of_this_machine_is_not_published(fake_hub: FakeHub, tiny_pae: PAE, tmp_path: Path) -> None:
    """encoder_source is no part of what a model is; a hub name stays, as others can follow it."""
    for source, published in ((str(tmp_path), None), ("facebook/dinov2-base", "facebook/dinov2-base")):
        tiny_pae.config = replace(tiny_pae.config, encoder_source=source)
        tiny_pae.save_pretrained(tmp_path / "model")
        hub.push(tmp_path / "model", "me/pae")
        found = configs.load(PAEConfig, fake_hub.folder / "config.yaml")
        assert found.encoder_source == published
        assert identity_of(fake_hub.folder) == identity_of(tmp_path / "model")
        PAE.from_pretrained(fake_hub.folder, decode_only=True)  # its fingerprint still fits
        shutil.rmtree(fake_hub.folder)


def test_a_refused_upload_is_one_clear_error(pair: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (client_error, _) = huggingface_hub.errors.HfHubHTTPError.__bases__

    def refuse(*_: object, **__: object) -> None:
        raise client_error("name or service\nnot known")

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", refuse)
    with pytest.raises(
        ConnectionError, match=r"me/pae was not uploaded \(name or service not known\); log in"
    ):
        hub.push(pair, "me/pae")


def test_what_a_card_calls_is_there() -> None:
    for kind in card._KINDS.values():
        assert callable(getattr(openpae, kind.loader).from_pretrained)


def test_the_python_of_the_docs_runs(pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (Path(__file__).parents[2] / "docs" / "hub.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.S)
    blocks = [block for block in blocks if "diffusers" not in block]  # those need the extra
    assert len(blocks) == 2
    monkeypatch.chdir(tmp_path)
    pair.rename(tmp_path / "quickstart")
    (tmp_path / "runs").mkdir()
    (tmp_path / "quickstart").rename(tmp_path / "runs" / "quickstart")
    names: dict[str, Any] = {}
    for block in blocks:
        exec(block, names)
    assert [image.size for image in names["images"]] == [(32, 32)] * 2
    assert names["tensor"].shape == (2, 3, 32, 32)
    half = names["half"](class_labels=[0, 1], steps=5, seed=0, output="tensor")
    torch.testing.assert_close(half.float(), names["tensor"], rtol=0, atol=0.25)  # bfloat16
    again = openpae.Pipeline.from_pretrained("models/pair")
    torch.testing.assert_close(again([0, 1], steps=5, output="tensor"), names["tensor"], rtol=0, atol=0.05)


def test_only_models_have_cards(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no model at"):
        hub.stage(tmp_path, tmp_path / "out", "me/x")
    assert not (tmp_path / "out").exists()
