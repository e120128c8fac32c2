"""Write the tables of docs/performance.md from the models themselves.

    python tools/make_performance.py --plans

`--plans` also plans every preset of the paper's size, which takes some ten minutes of one core.
Parameters, products and kept activations are counted on PyTorch's meta device, where a model has shapes and
no numbers, so that the largest costs nothing. What depends on a machine is computed from the constants below.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from openpae import config as configs
from openpae.models.configs import SIZES, LightningDiTConfig, PAEConfig
from openpae.models.dit import LightningDiT
from openpae.models.tokenizer import tokenizer_class
from openpae.plan.estimate import plan_data, plan_run
from openpae.plan.settings import PlanSettings
from openpae.train.settings import GeneratorRun, RefinerRun, TokenizerRun

PAGE = Path(__file__).parent.parent / "docs" / "performance.md"
IMAGENET = 1_281_167
# Dense bf16 of an H100 SXM (NVIDIA's data sheet) times the share that we aim at. The public code's 284
# images/s of XL/1 on an H800 are a share of 0.20.
SPEED = 989e12 * 0.4
ROOM = 80e9 * 0.9  # of an H100; the rest is fragments and buffers
# Bytes per second and GPU: one 400 Gbit/s NIC a GPU between nodes, NVLink inside one of eight.
LINK, NVLINK = 50e9, 450e9
DISK = 1e9  # bytes per second at which one process writes a checkpoint: our assumption
# 419 unexpected interruptions in 54 days on 16,384 GPUs (Llama 3, arXiv:2407.21783, Sec. 3.3.4).
GPU_HOURS_PER_FAILURE = 54 * 24 * 16384 / 419
ADAM_BYTES = 4 + 4 + 8 + 4  # per trained parameter: weight, gradient, two moments, average, all float32
COPY_BYTES = (
    2  # per trained parameter: autocast's copy in bf16, from the forward to the end of the backward pass
)
FILE_BYTES = 4 + 8 + 4 + 4  # in a checkpoint: weight, two moments, average, exported weight
VFM_PARAMETERS = 304e6
STAGES = ("refiner", "tokenizer", "generator")


def kept_bytes(build: Callable[[], nn.Module], call: Callable[[Any, int], Any]) -> float:
    """Bytes per image that autograd keeps for the backward pass under bf16 autocast, weights aside.

    The model runs under fake tensors, on one image and on two. The difference leaves out what does not grow
    with the batch, such as the bf16 copies of the weights.
    """

    def kept(images: int) -> int:
        sizes: dict[int, tuple[int, Tensor]] = {}

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            sizes[storage._cdata] = (storage.nbytes(), tensor)  # the tensor too, so that no address is reused
            return tensor

        with FakeTensorMode():
            module = build()
            own = {t.untyped_storage()._cdata for t in [*module.parameters(), *module.buffers()]}
            with (
                torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
                torch.autocast("cpu", torch.bfloat16),
            ):
                call(module, images)
            return sum(size for key, (size, _) in sizes.items() if key not in own)

    return float(kept(2) - kept(1))


def products(call: Callable[[], Any]) -> float:
    """Floating-point operations of the matrix products in a call; a multiply-add counts as two."""
    with FlopCounterMode(display=False) as counter:
        call()
    return float(counter.get_total_flops())


def trained(module: nn.Module) -> int:
    """Parameters that are trained."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def generator_row(size: str) -> dict[str, float]:
    """Parameters, operations and memory of one generator on 16 x 16 latents, per image."""
    config = LightningDiTConfig.of_size(size)

    def call(model: Any, images: int) -> Tensor:
        x, t = torch.empty(images, *config.latent_shape), torch.empty(images)
        out: Tensor = model(x, t, torch.zeros(images, dtype=torch.long))
        return out

    with torch.device("meta"):
        model = LightningDiT(config)
        forward = products(lambda: call(model, 1))
    kept = kept_bytes(lambda: LightningDiT(config), call)
    return {"parameters": trained(model), "forward": forward, "kept": kept}


def tokenizer_row(size: int) -> dict[str, float]:
    """Parameters, operations and memory of the main tokenizer at an image size, per image, VFM aside."""
    config = PAEConfig(encoder="dinov2-l", image_size=size)

    def build() -> Any:
        return tokenizer_class(config)(config)

    def images_of(model: Any, images: int) -> tuple[Tensor, Tensor]:
        x = torch.empty(images, 3, size, size)
        return x, torch.empty(images, math.prod(config.grid_shape), model.spec.dim)

    def decode(model: Any, images: int) -> Any:
        return model.decode(torch.empty(images, *config.latent_shape))

    with torch.device("meta"):
        model = build()
        encoding = products(lambda: model.encode(*images_of(model, 1)))
        decoding = products(lambda: decode(model, 1))
    return {
        "parameters": trained(model),
        "encode": encoding,
        "decode": decoding,
        "kept": kept_bytes(build, lambda model, images: model(*images_of(model, images))),
        "kept decode": kept_bytes(build, decode),
    }


def vgg_products(size: int) -> float:
    """Operations of VGG16's thirteen convolutions, which LPIPS runs once per image."""
    channels = ((3, 64, 64), (64, 128, 128), (128, 256, 256, 256), (256, 512, 512, 512), (512, 512, 512, 512))
    total = 0.0
    for stage, widths in enumerate(channels):
        side = size // 2**stage
        total += sum(2 * 9 * a * b * side**2 for a, b in itertools.pairwise(widths))
    return total


def vgg_kept(size: int) -> float:
    """Bytes in bf16 that VGG16 keeps of a picture whose gradient is wanted: maps before and after ReLU."""
    stages = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))
    return sum(2 * 2 * width * count * (size // 2**i) ** 2 for i, (width, count) in enumerate(stages))


def vit_products(tokens: int, dim: int, layers: int, patch: int) -> float:
    """Operations of a plain ViT: 24 D^2 per token and layer, attention 4 N D, patch embedding."""
    return tokens * (layers * (24 * dim**2 + 4 * tokens * dim) + 2 * 3 * patch**2 * dim)


def tables(plans: bool = False) -> dict[str, str]:
    """The page's tables by name, that of the planned presets only if asked for."""
    generators = {size: generator_row(size) for size in SIZES}
    tokenizers = {size: tokenizer_row(size) for size in (256, 512)}
    planned = {"presets": _preset_table()} if plans else {}
    return planned | {
        "generators": _generator_table(generators),
        "tokenizers": _tokenizer_table(tokenizers),
        "scale": _scale_table(generators["xl"]),
        "data": _data_table(),
        "failures": _failure_table(generators),
    }


def _markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, *rows)]
    return "\n".join([lines[0], "|---" * len(head) + "|", *lines[1:]])


def _generator_table(rows: Mapping[str, Mapping[str, float]]) -> str:
    head = ("size, patch 1", "parameters, M", "forward, GFLOP an image", "training, GFLOP an image")
    head += (
        "state, GB",
        "kept, MB an image, bf16",
        "images that fit 80 GB",
        "images/s, H100",
        "80 epochs, H100 days",
    )
    found = []
    for size, row in rows.items():
        state, rate = row["parameters"] * ADAM_BYTES, SPEED / (3 * row["forward"])
        copies = row["parameters"] * COPY_BYTES
        found.append(
            (
                *(size, f"{row['parameters'] / 1e6:.1f}"),
                *(f"{row['forward'] / 1e9:.1f}", f"{3 * row['forward'] / 1e9:.0f}", f"{state / 1e9:.1f}"),
                *(f"{row['kept'] / 1e6:.0f}", f"{(ROOM - state - copies) / row['kept']:.0f}", f"{rate:.0f}"),
                f"{80 * IMAGENET / rate / 86400:.1f}",
            )
        )
    return _markdown(head, found)


def _tokenizer_table(rows: Mapping[int, Mapping[str, float]]) -> str:
    head = ("image", "VFM, GFLOP", "encode, GFLOP", "decode, GFLOP", "VGG16 of one picture, GFLOP")
    head += ("full objective, TFLOP an image", "kept, GB an image, bf16", "images that fit 80 GB")
    head += ("images/s, H100", "50 epochs, H100 days")
    found = []
    for size, row in rows.items():
        vfm, vgg = vit_products((size // 16) ** 2 + 5, 1024, 24, 14), vgg_products(size)
        # VFM forward; encoder once and decoder three times, each with a backward pass of twice its cost;
        # VGG16 on four pictures, and back to the pixels of three at the cost of a forward pass.
        whole = vfm + 3 * row["encode"] + 9 * row["decode"] + 7 * vgg
        kept = row["kept"] + 2 * row["kept decode"] + 3 * vgg_kept(size)
        state = row["parameters"] * (ADAM_BYTES + COPY_BYTES) + 2 * VFM_PARAMETERS
        found.append(
            (
                *(str(size), f"{vfm / 1e9:.0f}", f"{row['encode'] / 1e9:.0f}", f"{row['decode'] / 1e9:.0f}"),
                *(f"{vgg / 1e9:.0f}", f"{whole / 1e12:.2f}", f"{kept / 1e9:.2f}"),
                *(f"{(ROOM - state) / kept:.0f}", f"{SPEED / whole:.0f}"),
                f"{50 * IMAGENET / (SPEED / whole) / 86400:.1f}",
            )
        )
    return _markdown(head, found)


def _scale_table(xl: Mapping[str, float]) -> str:
    head = ("GPUs", "images a GPU and step, batch 1,024", "computing, ms", "reducing 2.7 GB of gradients, ms")
    head += ("global batch at 16 a GPU", "computing, ms", "80 epochs at that, hours")
    found = []
    for gpus in (8, 64, 256, 1000):
        each = 3 * xl["forward"] / SPEED
        reducing = 2 * 4 * xl["parameters"] * (gpus - 1) / gpus / (LINK if gpus > 8 else NVLINK)
        hours = 80 * IMAGENET / (16 * gpus) * max(16 * each, reducing) / 3600
        found.append(
            (
                *(
                    f"{gpus:,}",
                    f"{1024 / gpus:.1f}",
                    f"{1e3 * each * 1024 / gpus:.0f}",
                    f"{1e3 * reducing:.0f}",
                ),
                *(f"{16 * gpus:,}", f"{1e3 * 16 * each:.0f}", f"{hours:.1f}"),
            )
        )
    return _markdown(head, found)


def _data_table() -> str:
    sizes = {
        "packed images, 256 x 256 RGB": 3 * 256**2,
        "packed images, 512 x 512 RGB": 3 * 512**2,
        "latents 32x16x16 and mirrored, bf16": 2 * 2 * 32 * 16 * 16,
        "latents 32x32x32 and mirrored, bf16": 2 * 2 * 32 * 32 * 32,
        "VFM features 256 x 1,024, float16": 2 * 256 * 1024,
        "labels and the order of an epoch, int64 each": 16,
    }
    head = ("what", "bytes an image", "ImageNet-1k, GB", "a billion, TB")
    return _markdown(
        head, ((k, f"{v:,}", f"{v * IMAGENET / 1e9:,.2f}", f"{v / 1e3:,.2f}") for k, v in sizes.items())
    )


def _failure_table(rows: Mapping[str, Mapping[str, float]]) -> str:
    head = (
        "generator",
        "checkpoint, GB",
        "writing, s",
        "GPUs",
        "hours between failures",
        "best interval, min",
    )
    found = []
    for size in ("xl", "1p6b"):
        amount = FILE_BYTES * rows[size]["parameters"]
        for gpus in (8, 64, 1000):
            cost, between = amount / DISK, GPU_HOURS_PER_FAILURE / gpus * 3600
            best = math.sqrt(2 * cost * between)
            lost = cost / best + best / (2 * between)
            found.append(
                (
                    *(size, f"{amount / 1e9:.1f}", f"{cost:.0f}", f"{gpus:,}", f"{between / 3600:,.0f}"),
                    *(f"{best / 60:.0f}", f"{100 * lost:.2f}"),
                )
            )
    return _markdown((*head, "time lost, %"), found)


def large_presets() -> dict[str, Any]:
    """The presets that set a device batch, which are those of the paper's size, by name."""
    kinds = [RefinerRun, TokenizerRun, GeneratorRun]
    files = sorted(file for kind in STAGES for file in (configs.PRESETS / kind).glob("*.yaml"))
    runs = {f"{file.parent.name}/{file.stem}": configs.load_one_of(kinds, file) for file in files}
    return {name: run for name, run in runs.items() if run.loop.device_batch_size is not None}


def _preset_table() -> str:
    head = ("preset", "device batch", "peak, GiB", "largest that fits", "with all blocks checkpointed")
    head += ("checkpoint, GB", "H100 hours at 40 %")
    rows = []
    for name, run in large_presets().items():
        plan = plan_data(plan_run(run, PlanSettings(card="h100", utilisation=0.4)))
        plain, *checkpointed = [fit["largest"] for fit in plan["fits"]]
        rows.append(
            (
                *(f"`{name}`", f"{plan['device_batch_size']}", f"{plan['peak']['total'] / 2**30:.1f}"),
                *(f"{plain}", f"{checkpointed[0]}" if checkpointed else "-"),
                *(f"{plan['checkpoint_bytes'] / 1e9:.1f}", f"{plan['gpu_hours']:,.0f}"),
            )
        )
    return _markdown(head, rows)


def page(plans: bool = False) -> str:
    """The page with its tables between their marks.

    Raises:
        ValueError: the page lacks a mark.
    """
    text = PAGE.read_text(encoding="utf-8")
    for name, table in tables(plans).items():
        start, end = f"<!-- {name} -->", f"<!-- end {name} -->"
        if start not in text or end not in text:
            raise ValueError(f"{PAGE.name} holds no marks {start} and {end}")
        text = f"{text.partition(start)[0]}{start}\n{table}\n{end}{text.partition(end)[2]}"
    return text


if __name__ == "__main__":
    PAGE.write_text(page("--plans" in sys.argv[1:]), encoding="utf-8")
