"""Foreign weights are read without running what they hold, and loaded strictly."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from openpae.storage.weights import check_finite, load_strict, read_tensors


class Harmless:
    """A pickle that would call a function when read: here one that only makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


def test_a_pickle_that_would_run_code_is_refused_and_does_not_run(tmp_path: Path) -> None:
    file, trace = tmp_path / "weights.pt", tmp_path / "it ran"
    torch.save({"model": {"x": torch.zeros(1)}, "extra": Harmless(trace)}, file)
    call = r"weights.pt is refused: it is a pickle that would call (posix|nt)\.mkdir when read.*safetensors"
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


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.complex64])
def test_weights_that_are_no_floats_are_refused(dtype: torch.dtype) -> None:
    """int8 weights without their scale would be other weights."""
    layer = nn.Linear(2, 1)
    before = layer.weight.clone()
    says = rf"net do not fit the config: 1 of another type \(weight {dtype} for torch.float32\)"
    with pytest.raises(ValueError, match=says):
        load_strict(layer, {"weight": torch.ones(1, 2).to(dtype), "bias": torch.zeros(1)}, "net")
    assert torch.equal(layer.weight, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.float8_e4m3fn])
def test_floats_of_any_size_are_loaded_if_they_are_finite(dtype: torch.dtype) -> None:
    layer = nn.Linear(2, 1)
    state = {"weight": torch.ones(1, 2).to(dtype), "bias": torch.zeros(1, dtype=torch.int64)}
    check_finite(state, "net")
    load_strict(layer, state | {"bias": torch.zeros(1)}, "net")
    assert torch.equal(layer.weight, torch.ones(1, 2))
    for odd in [torch.nan] if dtype == torch.float8_e4m3fn else [torch.nan, torch.inf, -torch.inf]:
        with pytest.raises(
            ValueError, match=r"net hold NaN or infinity in 1 tensors \(weight\); take others"
        ):
            check_finite({"weight": torch.tensor([1.0, odd]).to(dtype), "bias": state["bias"]}, "net")
