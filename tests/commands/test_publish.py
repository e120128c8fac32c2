"""The commands that bring models in and give them away, from a terminal."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from openpae.cli import main
from openpae.data.shards import Shards
from openpae.models.saved import check_pair, load_generator, load_tokenizer
from openpae.models.vfms import ENCODERS
from openpae.sampling.pipeline import Pipeline
from openpae.storage.model_folder import identity_of

GOLDEN = Path(__file__).parents[1] / "golden"


def golden(name: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], dict[str, Any]]:
    """Released weights, what goes in and comes out, and the metadata of a golden file."""
    with safe_open(GOLDEN / name, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    weights = {
        key.removeprefix("model."): value for key, value in tensors.items() if key.startswith("model.")
    }
    return weights, tensors, metadata


@pytest.fixture
def released(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Files as the authors publish them: a pickle of each model, statistics, latents; the VFM's config."""
    weights, tensors, metadata = golden("pae_dinov2_tiny.safetensors")
    torch.save({"model": {f"module.{k}": v for k, v in weights.items()}, "epoch": 50}, tmp_path / "pae.pt")
    (tmp_path / "vfm").mkdir()
    (tmp_path / "vfm" / "config.json").write_text(json.dumps(json.loads(metadata["config"])["vfm"]))
    monkeypatch.setitem(ENCODERS, "golden", replace(ENCODERS["dinov2-l"], dim=48, num_heads=3))
    weights, _, _ = golden("lightningdit_tiny.safetensors")
    torch.save({"ema": weights, "model": {}, "opt": {}}, tmp_path / "dit.pt")
    mean, std = torch.randn(1, 8, 1, 1), torch.rand(1, 8, 1, 1) + 0.5
    torch.save({"mean": mean, "std": std}, tmp_path / "latents_stats.pt")
    (tmp_path / "latents").mkdir()
    rows = {"latents": tensors["io.latents"], "latents_flip": tensors["io.latents"].flip(-1)}
    save_file(
        rows | {"labels": torch.tensor([3, 9])}, tmp_path / "latents" / "latents_rank00_shard000.safetensors"
    )
    return tmp_path


def import_tokenizer(folder: Path) -> None:
    main(
        f"import-official {folder}/pae.pt {folder}/tokenizer --encoder golden --encoder-source {folder}/vfm "
        "--decoder-heads 3".split()
    )


@torch.no_grad()
def test_released_files_become_our_folders(released: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The golden numbers come out of what the command wrote, and the folders know each other."""
    import_tokenizer(released)
    main(
        f"import-official {released}/dit.pt {released}/generator --tokenizer {released}/tokenizer "
        f"--statistics {released}/latents_stats.pt".split()
    )
    main(
        f"import-official {released}/latents {released}/cache --tokenizer {released}/tokenizer --classes "
        "10".split()
    )
    printed = capsys.readouterr().out
    assert "tokenizer of 64-pixel images to 8 x 4 x 4 latents" in printed
    assert "LightningDiT of 8 x 4 x 4 latents, 10 classes" in printed
    assert "2 latents (2, 8, 4, 4)" not in printed
    assert "2 latents (8, 4, 4)" in printed
    _, tensors, _ = golden("pae_dinov2_tiny.safetensors")
    tokenizer = load_tokenizer(released / "tokenizer")
    torch.testing.assert_close(
        tokenizer.encode(tensors["io.images"]), tensors["io.latents"], rtol=0, atol=1e-5
    )
    decoded = tokenizer.decode(tensors["io.latents"])
    torch.testing.assert_close(decoded, tensors["io.reconstruction"], rtol=0, atol=1e-5)
    _, tensors, _ = golden("lightningdit_tiny.safetensors")
    generator = load_generator(released / "generator")
    velocity = generator(tensors["io.x"], tensors["io.t"], tensors["io.labels"])
    torch.testing.assert_close(velocity, tensors["io.velocity"], rtol=0, atol=1e-5)
    statistics = torch.load(released / "latents_stats.pt", weights_only=True)
    assert torch.equal(generator.latent_mean, statistics["mean"][0])
    facts = check_pair(released / "tokenizer", released / "generator")
    assert Shards(released / "cache", "latents").attributes["tokenizer"] == facts["tokenizer"]
    assert len(Pipeline.join(released / "tokenizer", released / "generator")([3, 9], steps=1)) == 2


def test_what_an_import_lacks_is_named(released: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        ("dit.pt", "a generator needs the statistics of its latents: --statistics latents_stats.pt"),
        ("latents", "latents belong to a tokenizer: --tokenizer FOLDER"),
        ("pae.pt", "the decoder is 48 wide, none of the paper's (768, 1024, 1152)"),
        ("latents_stats.pt", "neither a tokenizer nor a generator that is known; its names: mean, std"),
        ("nothing.pt", "no weights file at"),
    ):
        with pytest.raises(SystemExit) as left:
            main(["import-official", str(released / arguments), str(released / "out")])
        assert left.value.code == 2
        assert message in capsys.readouterr().err
    assert not (released / "out").exists()


def test_a_generator_without_a_tokenizer_of_ours_can_be_sampled(released: Path) -> None:
    """For example VA-VAE's: its latents can be sampled, but no tokenizer here matches them."""
    main(
        f"import-official {released}/dit.pt {released}/generator --statistics "
        f"{released}/latents_stats.pt".split()
    )
    assert identity_of(released / "generator").made_with == "unknown"
    import_tokenizer(released)
    with pytest.raises(ValueError, match="makes latents of the tokenizer unknown"):
        check_pair(released / "tokenizer", released / "generator")


class Harmless:
    """A pickle that would call os.getcwd, and one that would leave a trace."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.getcwd, ()) if self.folder is None else (os.mkdir, (str(self.folder),))


def test_a_release_that_would_run_code_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for content, call in ((Harmless(), "getcwd"), (Harmless(tmp_path / "ran"), "mkdir")):
        torch.save({"model": {}, "config": content}, tmp_path / "pae.pt")
        with pytest.raises(SystemExit) as left:
            main(["import-official", str(tmp_path / "pae.pt"), str(tmp_path / "out")])
        printed = capsys.readouterr().err
        assert left.value.code == 2
        assert f"{call} when read, and so could run any code (nothing in it was run)" in printed
        assert "get the weights as safetensors" in printed
    assert not (tmp_path / "ran").exists()


def test_push_uploads_or_only_says_what_it_would(
    tokenizer_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    api = huggingface_hub.HfApi
    monkeypatch.setattr(api, "create_repo", lambda _, repo, **kw: calls.append(repo) or f"https://hub/{repo}")
    monkeypatch.setattr(api, "upload_folder", lambda _, **kw: calls.append(kw["repo_id"]))
    main(["push", str(tokenizer_folder), "me/pae", "--licence", "mit", "--dry-run"])
    printed = capsys.readouterr().out
    assert not calls
    assert "  model.safetensors\n" in printed
    assert "license: mit" in printed
    main(["push", str(tokenizer_folder), "me/pae"])
    assert calls == ["me/pae", "me/pae"]
    assert capsys.readouterr().out == "https://hub/me/pae\n"


def test_export_says_how_close_the_graphs_are(
    tokenizer_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from openpae.interop import export

    seen: list[Any] = []

    def fake(model: Any, out: Path, form: str, *, tolerance: float) -> dict[str, float]:
        seen.append((type(model).__name__, out, form, tolerance))
        return {"encode": 1.5e-6}

    monkeypatch.setattr(export, "export_model", fake)
    main(["export", str(tokenizer_folder), str(tmp_path / "out"), "--format", "onnx", "--tolerance", "1e-3"])
    assert seen == [("PAE", tmp_path / "out", "onnx", 1e-3)]
    assert "encode: differs from the model by at most 1.5e-06" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_a_pair_is_exported_as_two_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both or none: an old folder stays as it is."""
    monkeypatch.chdir(tmp_path)
    main(["export", "openmoji", "graphs"])
    files = {str(file.relative_to("graphs")) for file in Path("graphs").rglob("*") if file.is_file()}
    assert files == {
        *("tokenizer/decode.pt2", "tokenizer/encode.pt2", "tokenizer/export.json"),
        *("generator/velocity.pt2", "generator/export.json"),
    }
    with pytest.raises(SystemExit):
        main(["export", "openmoji", "graphs"])
    assert len(files) == len([file for file in Path("graphs").rglob("*") if file.is_file()])
