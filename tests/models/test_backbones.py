"""Weights of encoders are loaded strictly; a damaged or unsuitable file is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from openpae.models.backbones import TokenMerger
from openpae.models.encoders import load_encoder
from tests.models.families import FAMILIES, Family, saved


def edit_weights(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    file = folder / "model.safetensors"
    state = load_file(file)
    change(state)
    save_file(state, file, metadata={"format": "pt"})


def any_weight(state: dict[str, Tensor]) -> str:
    """The name of a weight inside the vision tower."""
    tower = (name for name in sorted(state) if not name.startswith(("text_model.", "decoder.")))
    return next(name for name in tower if name.endswith(("layernorm_before.weight", "norm1.weight")))


def test_a_weight_that_is_missing_is_named(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers would fill it with random numbers and warn."""
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


def test_a_damaged_file_is_named(family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(family, tmp_path, monkeypatch)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"weights or config at .* are damaged"):
        load_encoder("tiny", str(tmp_path))


class Code:
    """An object whose unpickling runs code."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Callable[..., object], tuple[Path]]:
        return Path.touch, (self.file,)


def test_a_pickle_that_would_run_code_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Older hub folders hold pickles; a pickle of tensors alone is read."""
    hub_model = saved(FAMILIES[0], tmp_path, monkeypatch)
    (tmp_path / "model.safetensors").unlink()
    torch.save(hub_model.state_dict(), tmp_path / "pytorch_model.bin")
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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 5000}, "num_hidden_layers of an encoder must lie in"),
        ({"image_size": [2**40, 2]}, "image_size of an encoder must lie in"),
        ({"layer_norm_eps": float("nan")}, "layer_norm_eps of an encoder must be a finite number"),
        ({"num_hidden_layers": 1024}, "the config asks for .* weights, the file holds "),
        ({"hidden_size": 2**14}, "the config asks for .* weights, the file holds "),
        ({"num_attention_heads": 4}, "number of heads 4, but the encoder's row says 2"),
    ],
)
def test_a_config_that_does_not_fit_its_weights_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], message: str
) -> None:
    """encoder.json of a tokenizer: nothing huge is allocated, and no number changes the features."""
    saved(FAMILIES[0], tmp_path, monkeypatch)
    state = load_encoder("tiny", str(tmp_path)).state_dict()
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(ValueError, match=message):
        load_encoder("tiny", str(file), state=state)


def test_loading_prints_no_table_of_unused_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    saved(FAMILIES[6], tmp_path, monkeypatch)
    verbosity = transformers.logging.get_verbosity()
    capfd.readouterr()
    load_encoder("tiny", str(tmp_path))
    assert "UNEXPECTED" not in "".join(capfd.readouterr())
    assert transformers.logging.get_verbosity() == verbosity


def test_the_mlp_joins_tokens_as_the_release_does() -> None:
    """Its pixel shuffle, written as it is published: views and transpositions of (B, rows, columns, C)."""

    merger = TokenMerger(3, 5, 2)
    tokens = torch.randn(2, 4 * 6, 3)
    x = tokens.view(2, 4, 6, 3)
    x = x.view(2, 4, 3, 6).permute(0, 2, 1, 3).reshape(2, 3, 2, 12).permute(0, 2, 1, 3).reshape(2, 6, 12)
    expected = merger.fc2(torch.nn.functional.gelu(merger.fc1(merger.norm(x))))
    torch.testing.assert_close(merger(tokens, 4, 6), expected)
