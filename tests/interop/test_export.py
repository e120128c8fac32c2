"""Exported graphs give what the models give, for batches that the export did not see."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from openpae.interop import export
from openpae.models.configs import DiTDHConfig, HeadConfig, PAEConfig
from openpae.models.dit import LightningDiT
from openpae.models.ditdh import DiTDH
from openpae.models.tokenizer import PAE
from openpae.runtime.extras import MissingExtra
from tests.conftest import shaken
from tests.faults.children import run_in_child

HAS_ONNX = all(importlib.util.find_spec(name) for name in ("onnx", "onnxscript", "onnxruntime"))


@torch.no_grad()
def test_a_generator_is_exported(tiny_dit: LightningDiT, tmp_path: Path) -> None:
    tiny_dit.set_statistics(torch.arange(8.0), torch.arange(1.0, 9.0))
    differences = export.export_model(tiny_dit, tmp_path / "out", "torch-export")
    assert differences.keys() == {"velocity"}
    assert differences["velocity"] <= 1e-4
    graph = torch.export.load(tmp_path / "out" / "velocity.pt2").module()
    x, t, labels = torch.randn(7, 8, 4, 4), torch.rand(7), torch.arange(7) % 3
    torch.testing.assert_close(graph(x, t, labels), tiny_dit(x, t, labels), rtol=0, atol=1e-4)
    facts = json.loads((tmp_path / "out" / "export.json").read_text())
    assert facts["graphs"]["velocity"]["inputs"] == {
        "x": ["batch", 8, 4, 4],
        "t": ["batch"],
        "labels": ["batch"],
    }
    assert np.ravel(facts["latent_mean"]).tolist() == list(range(8))
    assert np.ravel(facts["latent_std"]).tolist() == list(range(1, 9))
    assert facts["null_label"] == 2


@pytest.mark.slow
@torch.no_grad()
def test_a_tokenizer_is_exported(tiny_pae: PAE, tmp_path: Path) -> None:
    differences = export.export_model(tiny_pae, tmp_path / "out", "torch-export")
    assert differences.keys() == {"encode", "decode"}
    encode, decode = (
        torch.export.load(tmp_path / "out" / f"{name}.pt2").module() for name in ("encode", "decode")
    )
    images = torch.rand(5, 3, 32, 32)
    z = encode(images)
    torch.testing.assert_close(z, tiny_pae.encode(images), rtol=0, atol=1e-4)
    torch.testing.assert_close(decode(z), tiny_pae.decode(z), rtol=0, atol=1e-4)


@pytest.mark.slow
def test_a_wide_head_is_exported(tmp_path: Path) -> None:
    head = HeadConfig(hidden_dim=48, num_layers=1, num_heads=2)
    sizes = {"latent_dim": 8, "grid_size": 4, "hidden_dim": 32, "num_layers": 1, "num_heads": 2}
    model = shaken(DiTDH(DiTDHConfig(**sizes, num_classes=2, head=head)))  # type: ignore[arg-type]
    assert export.export_model(model, tmp_path / "out", "torch-export")["velocity"] <= 1e-4


@pytest.mark.slow
@pytest.mark.skipif(not HAS_ONNX, reason="needs the extra onnx")
@torch.no_grad()
def test_onnx_files_run_elsewhere(tiny_pae: PAE, tiny_dit: LightningDiT, tmp_path: Path) -> None:
    """In the runtime of another project, by the names of the inputs."""
    import onnxruntime

    def run(name: str, **inputs: torch.Tensor) -> torch.Tensor:
        session = onnxruntime.InferenceSession(tmp_path / name, providers=["CPUExecutionProvider"])
        return torch.from_numpy(session.run(None, {key: x.numpy() for key, x in inputs.items()})[0])

    assert export.export_model(tiny_pae, tmp_path / "a", "onnx").keys() == {"encode", "decode"}
    assert export.export_model(tiny_dit, tmp_path / "b", "onnx").keys() == {"velocity"}
    images = torch.rand(5, 3, 32, 32)
    z = run("a/encode.onnx", images=images)
    torch.testing.assert_close(z, tiny_pae.encode(images), rtol=0, atol=1e-4)
    torch.testing.assert_close(run("a/decode.onnx", latents=z), tiny_pae.decode(z), rtol=0, atol=1e-4)
    x, t, labels = torch.randn(5, 8, 4, 4), torch.rand(5), torch.arange(5) % 3
    velocity = run("b/velocity.onnx", x=x, t=t, labels=labels)
    torch.testing.assert_close(velocity, tiny_dit(x, t, labels), rtol=0, atol=1e-4)


def test_a_graph_that_differs_is_not_written(
    tiny_config: PAEConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the difference is no number."""
    monkeypatch.setattr(export, "_write", lambda part, file, form: file.touch())
    model = PAE(tiny_config)
    for difference in (0.5, float("nan")):
        monkeypatch.setattr(export, "_difference", lambda *_, d=difference: d)
        with pytest.raises(ValueError, match=r"graph decode differs from the model by .*nothing was written"):
            export.export_model(model, tmp_path / "out", "torch-export")
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(export, "_difference", lambda *_: 1e-5)
    assert export.export_model(model, tmp_path / "out", "torch-export") == {
        "decode": 1e-5
    }  # it has no encoder
    with pytest.raises(ValueError, match="out is not empty; name a new folder"):
        export.export_model(model, tmp_path / "out", "torch-export")


def test_missing_packages_are_named(
    tiny_config: PAEConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(MissingExtra, match=r"format onnx needs onnxscript; .*openpae\[onnx\]"):
        export.export_model(PAE(tiny_config), tmp_path / "out", "onnx")


def test_a_full_disk_is_one_error(tiny_dit: LightningDiT, tmp_path: Path) -> None:
    """torch's own writer ends the process."""
    ended = run_in_child(
        lambda: export.export_model(tiny_dit, tmp_path / "out", "torch-export"), largest_file=20_000
    )
    assert ended.error.startswith(f"DiskFull: no room for {tmp_path / 'out'}: "), ended.trace
    assert not (tmp_path / "out").exists()
