"""Build a run's task without data and downloads, and under fake tensors, which have shapes and no memory."""

from __future__ import annotations

import math
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar
from unittest import mock

import torch
from torch import Tensor, distributed, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    unset_fake_temporarily,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.nn.functional import interpolate
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parallel import distributed as ddp_module

from openpae import config as configs
from openpae.data.training import ImageBatch, LatentBatch
from openpae.engine import loop as loop_module
from openpae.engine import parallel
from openpae.engine.optim import device_batches
from openpae.engine.settings import LoopConfig
from openpae.models.configs import DiscriminatorConfig, GeneratorConfig, RefinerConfig
from openpae.models.discriminator import FeatureDiscriminator, PatchDiscriminator
from openpae.models.ditdh import build_generator
from openpae.models.encoders import empty_encoder
from openpae.models.generator import LatentGenerator
from openpae.models.lpips import LPIPS
from openpae.models.priors import FrozenPrior, Refiner
from openpae.models.vfms import encoder_spec
from openpae.runtime import processes
from openpae.runtime.extras import needs
from openpae.storage.model_folder import CONFIG, model_folder
from openpae.train import generator, refiner, tokenizer
from openpae.train.generator import GeneratorTask
from openpae.train.refiner import RefinerTask
from openpae.train.settings import GeneratorRun, RefinerRun, TokenizerRun
from openpae.train.tokenizer import TokenizerTask

Run = RefinerRun | TokenizerRun | GeneratorRun
AnyTask = RefinerTask | TokenizerTask | GeneratorTask
T = TypeVar("T", RefinerTask, TokenizerTask, GeneratorTask)

_DINO = {"num_hidden_layers": 12, "image_size": 224, "hidden_size": 384, "num_attention_heads": 6}
_DINO |= {"intermediate_size": 1536}
_DINO_B = _DINO | {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072}
VITS: dict[str, dict[str, Any]] = {
    "facebook/dino-vits8": _DINO | {"patch_size": 8},
    "facebook/dino-vits16": _DINO | {"patch_size": 16},
    "facebook/dino-vitb8": _DINO_B | {"patch_size": 8},
    "facebook/dino-vitb16": _DINO_B | {"patch_size": 16},
}
"""Published sizes of the ViTs that discriminators use."""


@contextmanager
def fake_world(processes: int = 1) -> Iterator[FakeTensorMode]:
    """Enter a context where tensors have shapes and no memory, and this process is rank 0 of `processes`.

    Raises:
        ValueError: a process group exists already, or the values of a tensor are read.
    """
    if distributed.is_initialized():
        raise ValueError("pae plan runs in one process; start it without torchrun and give --gpus")
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with ExitStack() as stack:
        if processes > 1:
            from torch.testing._internal.distributed.fake_pg import FakeStore

            distributed.init_process_group("fake", rank=0, world_size=processes, store=FakeStore())
            stack.callback(distributed.destroy_process_group)
        for module, name, stand_in in [*_fake_stand_ins(), *_uncached()]:
            stack.enter_context(mock.patch.object(module, name, stand_in))
        stack.enter_context(without_files())
        if find_spec("transformers") is not None:  # its networks read values when they are built
            from transformers.initialization import no_init_weights

            stack.enter_context(no_init_weights())
        stack.enter_context(warnings.catch_warnings())
        for harmless in ("Accessing the data pointer of FakeTensor", "Grad strides do not match bucket"):
            warnings.filterwarnings("ignore", message=harmless)
        stack.enter_context(_refusing_reads())
        yield stack.enter_context(mode)


@contextmanager
def without_files() -> Iterator[None]:
    """Enter a context where `build_task` reads no files and downloads nothing.

    Frozen networks have their published sizes and their initial weights. A step takes only its first and last
    device batch.
    """
    with ExitStack() as stack:
        for module, name, stand_in in _stand_ins():
            stack.enter_context(mock.patch.object(module, name, stand_in))
        yield


def build_task(run: Run) -> AnyTask:
    """Build the task of a run with random batches, inside `without_files` or `fake_world`."""
    if isinstance(run, GeneratorRun):
        return with_random_batches(GeneratorTask(run), run)
    name, trainable = (
        (run.model.encoder, run.model.fusion == "finetune")
        if isinstance(run, TokenizerRun)
        else (run.encoder, False)
    )
    encoder = empty_encoder(name, trainable=trainable)
    if isinstance(run, TokenizerRun):
        return with_random_batches(TokenizerTask(run, encoder), run)
    return with_random_batches(RefinerTask(run, encoder), run)


def empty_discriminator(config: DiscriminatorConfig) -> PatchDiscriminator | FeatureDiscriminator:
    """Build a discriminator without loading the weights of its frozen network.

    Raises:
        ValueError: the sizes of its source are unknown, and it is no local folder.
    """
    if config.kind == "patch":
        return PatchDiscriminator(config.width, config.num_layers)
    with needs("vfm", "a discriminator on DINO"):
        from transformers import ViTConfig, ViTModel

    if config.source in VITS:
        sizes = ViTConfig(**VITS[config.source])
    else:
        try:
            sizes = ViTConfig.from_pretrained(config.source, local_files_only=True)
        except OSError:
            raise ValueError(
                f"the sizes of loss.discriminator.source {config.source!r} are unknown; give a local "
                f"folder or one of {', '.join(VITS)}"
            ) from None
    return FeatureDiscriminator(ViTModel(sizes, add_pooling_layer=False), config.taps, config.head_dim)


def empty_prior(run: TokenizerRun) -> FrozenPrior:
    """Build the refiner of a run; one of the default sizes if its folder does not exist."""
    assert run.prior is not None
    spec, (h, w) = encoder_spec(run.model.encoder), run.model.grid_shape
    sizes = RefinerConfig(
        feature_dim=spec.dim,
        latent_dim=run.model.latent_dim,
        grid_size=h,
        grid_width=None if w == h else w,
        num_heads=spec.num_heads,
    )
    with suppress(FileNotFoundError):
        sizes = configs.load(RefinerConfig, model_folder(run.prior) / CONFIG)
    return FrozenPrior(Refiner(sizes))


def with_random_batches(task: T, run: Run) -> T:
    """Give a task random batches of the run's shapes. Like a loader, it prepares the next batch early."""
    latents = isinstance(run, GeneratorRun)

    def batches(steps: Sequence[int]) -> Iterator[Any]:
        rows: list[int] = [len(part) for _ in steps for part in planned_batches(run.loop)]
        make = _latent_batch if latents else _image_batch
        coming = make(run, rows[0])
        for count in [*rows[1:], 0]:
            current, coming = coming, make(run, count)
            yield current

    task.batches = batches  # type: ignore[method-assign]
    return task


def _latent_batch(run: Any, count: int) -> LatentBatch:
    latents = torch.randn(count, *run.model.latent_shape, dtype=torch.bfloat16)
    return LatentBatch(latents, torch.randint(run.model.num_classes, (count,)))


def _image_batch(run: Any, count: int) -> ImageBatch:
    tokenizer_run = isinstance(run, TokenizerRun)
    shape = run.model.image_shape if tokenizer_run else run.image_shape
    features = prior = None
    if run.data.feature_cache is not None:
        tokens = math.prod(run.model.grid_shape)
        width = encoder_spec(run.model.encoder if tokenizer_run else run.encoder).dim
        features = torch.randn(count, tokens, width, dtype=torch.float16)
        if tokenizer_run and run.loss.needs_prior:
            prior = torch.randn(count, tokens, run.model.latent_dim, dtype=torch.float16)
    images = torch.randint(256, (count, 3, *shape), dtype=torch.uint8)
    return ImageBatch(images, torch.zeros(count, dtype=torch.long), features, prior)


def _stand_ins() -> list[tuple[Any, str, Any]]:
    """Replacements for functions that read files or a network: module, name, stand-in."""
    files = SimpleNamespace(fingerprint=lambda: "")
    shared = [
        (module, name, stand_in)
        for module in (tokenizer, refiner)
        for name, stand_in in (
            ("open_training", lambda *_: (files, None)),
            ("encoder_fingerprint", lambda *_: ""),
            ("cache_features", lambda *_, **__: None),
            ("TrainingImages", lambda *_, **__: None),
        )
    ]
    return [
        *shared,
        (tokenizer, "cache_targets", lambda *_, **__: None),
        (tokenizer, "load_perceptual", lambda net, *_: LPIPS("alex" if net == "random" else net)),
        (tokenizer, "build_discriminator", empty_discriminator),
        (tokenizer.TokenizerTask, "_load_prior", _load_prior),
        (refiner, "load_anyup", _Upsampler),
        (generator, "_open_latents", _latents),
        (generator, "_classes_of", lambda *_: None),
        (loop_module, "device_batches", planned_batches),
    ]


def _fake_stand_ins() -> list[tuple[Any, str, Any]]:
    """Replacements for functions that read values or reach other processes: module, name, stand-in."""
    return [
        (nn.Module, "to", lambda module, *_, **__: module),  # device and dtype are correct already
        (generator, "build_generator", _generator),
        (parallel, "fingerprint", lambda *_: ""),
        (processes, "gather", lambda value: [value]),
        (parallel, "DistributedDataParallel", _Replicated),
        (parallel, "init_device_mesh", _mesh),
        (ddp_module, "_verify_param_shape_across_processes", lambda *_: None),
    ]


def _uncached() -> list[tuple[Any, str, Any]]:
    """Replacements for cached functions, whose fake results must not outlive the mode."""
    if find_spec("transformers") is None:
        return []
    from transformers.models.dinov3_vit import modeling_dinov3_vit as dinov3

    name = "get_patches_center_coordinates"
    return [(dinov3, name, getattr(dinov3, name).__wrapped__)]


def planned_batches(loop: LoopConfig) -> list[range]:
    """Return the first and last device batch of a step; those between equal the last."""
    parts = device_batches(loop)
    return [parts[0], parts[-1]] if len(parts) > 1 else parts


def _load_prior(task: TokenizerTask) -> nn.Module | None:
    task.inputs = {**task.inputs, "prior": ""}
    return empty_prior(task.run).to(task.device) if task.run.loss.needs_prior else None


def _latents(_: Any, model: GeneratorConfig) -> SimpleNamespace:
    index = dict.fromkeys(("mean", "std"), [1.0] * model.latent_dim)
    return SimpleNamespace(fingerprint=lambda: "", attributes={"tokenizer": ""}, index=index)


def _generator(config: GeneratorConfig, *, checkpoint_blocks: int = 0) -> LatentGenerator:
    model = build_generator(config, checkpoint_blocks=checkpoint_blocks)
    model.set_statistics = lambda *_: None  # type: ignore[method-assign]  # it reads values
    return model


class _Upsampler(nn.Module):
    """Return maps of AnyUp's size. The network itself, from torch hub, is not built."""

    def forward(self, guide: Tensor, features: Tensor) -> Tensor:
        return interpolate(features, guide.shape[-2:])


class _Replicated(DistributedDataParallel):
    """DDP that averages nothing. It keeps the first order of its buckets."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register_comm_hook(None, lambda _, bucket: _done(bucket.buffer()))
        self.reducer: Any = _Reducer(self.reducer)


class _Reducer:
    """DDP's reducer without the reordering of buckets, which copies values."""

    def __init__(self, reducer: Any) -> None:
        self._reducer = reducer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._reducer, name)

    def _rebuild_buckets(self) -> bool:
        return False


def _done(value: Tensor) -> torch.futures.Future[Tensor]:
    done: torch.futures.Future[Tensor] = torch.futures.Future()
    done.set_result(value)
    return done


@contextmanager
def _refusing_reads() -> Iterator[None]:
    """Raise a ValueError with the line that reads values of a fake tensor; on a GPU the host would wait."""
    try:
        yield
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise ValueError(_read_at(error, str(error.func))) from error
    except RuntimeError as error:
        if "not supported for tensor subclasses" not in str(error):  # tolist and numpy
            raise
        raise ValueError(_read_at(error, str(error).split()[0])) from error


def _read_at(error: Exception, operation: str) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    not_theirs = (str(Path(__file__).parent), str(Path(torch.__file__).parent))
    at = [frame for frame in frames if not frame.filename.startswith(not_theirs)][-1]
    return (
        f"{at.filename}:{at.lineno} reads the values of a tensor ({operation}), and a GPU would wait "
        "for them; keep them on the device (torch.where, a mask), or read them with the log"
    )


def _mesh(device: str, shape: tuple[int, ...]) -> DeviceMesh:
    with unset_fake_temporarily():  # the mesh needs real values
        return init_device_mesh(device, shape)
