"""Export tokenizers and generators as torch.export archives or ONNX files, which run without this package."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from openpae.models.generator import LatentGenerator
from openpae.models.tokenizer import Autoencoder
from openpae.runtime.extras import require
from openpae.storage.files import atomic_folder, write_json

Format = Literal["torch-export", "onnx"]

_SUFFIX: dict[str, str] = {"torch-export": ".pt2", "onnx": ".onnx"}


@dataclass(frozen=True, kw_only=True)
class _Part:
    """One graph: a module, and example inputs by name with the batch as first axis."""

    name: str
    module: nn.Module
    inputs: Mapping[str, Tensor]
    output: str

    def draw(self, batch: int) -> tuple[Tensor, ...]:
        """Other inputs of the shapes of the examples, with this batch size."""
        generator = torch.Generator().manual_seed(batch)
        return tuple(
            torch.rand(batch, *x.shape[1:], generator=generator)
            if x.is_floating_point()
            else x[torch.arange(batch) % len(x)]
            for x in self.inputs.values()
        )


def check_new(out: Path) -> None:
    """Raise ValueError if a folder for an export holds something already."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is not empty; name a new folder for the export")


@torch.no_grad()
def export_model(
    model: Autoencoder | LatentGenerator, out: Path, format: Format, *, tolerance: float = 1e-4
) -> dict[str, float]:
    """Write the graphs of a model, each checked against the model, and export.json with their description.

    A tokenizer has the graphs `encode` (images in [0, 1] to latents; only with its encoder) and `decode`
    (latents to images, not clamped). A generator has `velocity` (of normalised latents; export.json holds the
    statistics). The batch size is free, the image size is that of the config. Weights and computation are
    float32.

    Args:
        model: on the CPU.
        out: new folder for the files.
        format: "torch-export" (.pt2, for torch.export.load) or "onnx".
        tolerance: largest allowed difference between the outputs of a graph and of the model, for new inputs
            of other batch sizes than in the export.

    Returns:
        The largest difference of each graph.

    Raises:
        ValueError: the folder is not empty, packages of the extra `onnx` are missing, or a graph differs by
            more than the tolerance.
    """
    check_new(out)
    if format == "onnx":
        require("onnx", "format onnx", "onnx", "onnxscript", "onnxruntime")
    parts = _parts_of(model.eval())
    differences: dict[str, float] = {}
    facts: dict[str, Any] = {"format": format, "model": type(model).__name__, "graphs": {}}
    facts["packages"] = {"torch": torch.__version__}
    with atomic_folder(out) as partial:
        for part in parts:
            file = partial / f"{part.name}{_SUFFIX[format]}"
            _write(part, file, format)
            difference = differences[part.name] = _difference(part, file, format)
            if not difference <= tolerance:
                raise ValueError(
                    f"the graph {part.name} differs from the model by {difference:.2g}, more than the "
                    f"{tolerance:.2g} that are allowed; nothing was written"
                )
            facts["graphs"][part.name] = {
                "file": file.name,
                "inputs": {name: ["batch", *x.shape[1:]] for name, x in part.inputs.items()},
                "output": part.output,
                "difference": difference,
            }
        if not isinstance(model, Autoencoder):
            facts["latent_mean"] = model.latent_mean.tolist()
            facts["latent_std"] = model.latent_std.tolist()
            facts["null_label"] = model.null_label
        write_json(partial / "export.json", facts)
    return differences


class _Encode(nn.Module):
    def __init__(self, tokenizer: Autoencoder) -> None:
        super().__init__()
        self.tokenizer = tokenizer

    def forward(self, images: Tensor) -> Tensor:
        return self.tokenizer.encode(images)


class _Decode(nn.Module):
    def __init__(self, tokenizer: Autoencoder) -> None:
        super().__init__()
        self.tokenizer = tokenizer

    def forward(self, latents: Tensor) -> Tensor:
        return self.tokenizer.decode(latents)


def _parts_of(model: Autoencoder | LatentGenerator) -> list[_Part]:
    """The graphs of a model, with batches of two: an export treats a batch of one as a constant."""
    z = torch.rand(2, *model.config.latent_shape)
    if not isinstance(model, Autoencoder):
        inputs = {"x": z, "t": torch.rand(2), "labels": torch.tensor([0, model.null_label])}
        return [_Part(name="velocity", module=model, inputs=inputs, output="velocity")]
    parts = [_Part(name="decode", module=_Decode(model).eval(), inputs={"latents": z}, output="images")]
    if model.encoder is not None:
        images = torch.rand(2, 3, *model.config.image_shape)
        parts.append(
            _Part(name="encode", module=_Encode(model).eval(), inputs={"images": images}, output="latents")
        )
    return parts


def _write(part: _Part, file: Path, format: Format) -> None:
    examples = tuple(part.inputs.values())
    batch = torch.export.Dim("batch", min=1, max=65536)
    shapes = tuple({0: batch} for _ in examples)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporters call deprecated functions
        if format == "torch-export":
            archive = io.BytesIO()  # on a full disk torch's writer ends the process
            torch.export.save(torch.export.export(part.module, examples, dynamic_shapes=shapes), archive)
            file.write_bytes(archive.getbuffer())
            return
        program = torch.onnx.export(
            part.module,
            examples,
            dynamo=True,
            dynamic_shapes=shapes,
            input_names=list(part.inputs),
            output_names=[part.output],
            verbose=False,
        )
        if program is None:
            raise ValueError(f"torch.onnx gave no program for the graph {part.name}")
        program.save(file)


def _difference(part: _Part, file: Path, format: Format) -> float:
    """The largest difference between the graph in the file and the module, for batches of 1 and 3."""
    run = _open_onnx(file, list(part.inputs)) if format == "onnx" else _open_archive(file)
    differences = [
        (run(inputs) - part.module(*inputs)).abs().max() for inputs in (part.draw(batch) for batch in (1, 3))
    ]
    return float(torch.stack(differences).max())  # NaN if any is NaN


def _open_archive(file: Path) -> Callable[[tuple[Tensor, ...]], Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = torch.export.load(file).module()

    def run(inputs: tuple[Tensor, ...]) -> Tensor:
        output: Tensor = module(*inputs)
        return output

    return run


def _open_onnx(file: Path, names: list[str]) -> Callable[[tuple[Tensor, ...]], Tensor]:
    import onnxruntime

    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])

    def run(inputs: tuple[Tensor, ...]) -> Tensor:
        arrays = {name: x.numpy() for name, x in zip(names, inputs, strict=True)}
        (output,) = session.run(None, arrays)
        return torch.from_numpy(output)

    return run
