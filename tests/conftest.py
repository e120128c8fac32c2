"""Fixtures for several test files: tiny models, drawn images, and kills between file operations."""

from __future__ import annotations

import itertools
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from hypothesis import settings
from PIL import Image, ImageDraw

from openpae.data.caches import cache_latents
from openpae.data.images import ImageFolder, PackedImages
from openpae.data.packing import pack_images
from openpae.data.settings import ImageData
from openpae.data.shards import Shards
from openpae.models.configs import DecoderConfig, LightningDiTConfig, PAEConfig
from openpae.models.dit import LightningDiT
from openpae.models.encoders import encoder_fingerprint
from openpae.models.saved import write_tokenizer
from openpae.models.tokenizer import PAE, build_tokenizer
from openpae.storage.model_folder import identity_of
from openpae.train.settings import GeneratorRun, TokenizerRun
from tests.engine.runs import L1_ONLY, LOOP, OPTIM

M = TypeVar("M", bound=torch.nn.Module)

# One thread, as tiny tensors gain nothing from more.
torch.set_num_threads(int(os.environ.get("OPENPAE_TEST_THREADS", "1")))
# A forked child has none of its parent's threads, and would wait for them for ever.
os.register_at_fork(after_in_child=lambda: torch.set_num_threads(1))
settings.register_profile("openpae", derandomize=True, database=None, deadline=None, max_examples=50)
settings.load_profile("openpae")


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny_config() -> PAEConfig:
    """A tokenizer of 32-pixel images to 8 x 4 x 4 latents."""
    decoder = DecoderConfig(hidden_dim=32, num_layers=1, num_heads=2, mlp_dim=64, patch_size=8)
    return PAEConfig(encoder="random-tiny", image_size=32, latent_dim=8, modulator_layers=1, decoder=decoder)


@pytest.fixture
def tiny_pae(tiny_config: PAEConfig) -> PAE:
    """Moved off its initial values, so that no path through it is switched off by a zero."""
    return shaken(build_tokenizer(tiny_config)).eval()


@pytest.fixture(scope="session")
def tiny_dit_config() -> LightningDiTConfig:
    return LightningDiTConfig(
        latent_dim=8, grid_size=4, hidden_dim=32, num_layers=2, num_heads=2, num_classes=2
    )


@pytest.fixture
def tiny_dit(tiny_dit_config: LightningDiTConfig) -> LightningDiT:
    """Moved off its initial values: untrained, its velocity is zero."""
    return shaken(LightningDiT(tiny_dit_config)).eval()


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten drawn PNGs of several sizes in two classes; no picture is its own mirror image."""
    root = tmp_path_factory.mktemp("images")
    for number in range(10):
        folder = root / ("boxes" if number < 6 else "discs")
        folder.mkdir(exist_ok=True)
        width, height = 40 + 7 * (number % 3), 44 - 3 * (number % 4)
        image = Image.new("RGB", (width, height), (20 * number, 255 - 20 * number, 90))
        shape = (3 + number, 5, 14 + number, 25)
        draw = ImageDraw.Draw(image)
        (draw.rectangle if number < 6 else draw.ellipse)(shape, fill=(250, 20 * number, 10))
        draw.line((0, 0, width, 3 * number), fill=(0, 0, 255), width=2)
        image.save(folder / f"{number}.png")
    return root


@pytest.fixture(scope="session")
def packed(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> PackedImages:
    """The same, packed at 32 pixels in shards of four."""
    return pack_images(
        ImageFolder(image_folder), tmp_path_factory.mktemp("data") / "packed", size=32, per_shard=4
    )


@pytest.fixture(scope="session")
def tokenizer_folder(tiny_config: PAEConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved tiny tokenizer."""
    folder = tmp_path_factory.mktemp("tokenizer")
    torch.manual_seed(0)
    model = shaken(build_tokenizer(tiny_config))
    assert model.encoder is not None
    write_tokenizer(folder, model.state_dict(), tiny_config, encoder_fingerprint(model.encoder))
    return folder


@pytest.fixture(scope="session")
def latents(tokenizer_folder: Path, packed: PackedImages, tmp_path_factory: pytest.TempPathFactory) -> Shards:
    """The packed images and their mirror images as latents of that tokenizer, in three shards."""
    from openpae.models.saved import load_tokenizer

    model = load_tokenizer(tokenizer_folder)
    return cache_latents(
        model.encode,
        packed,
        tmp_path_factory.mktemp("data") / "latents",
        image_size=32,
        latent_shape=model.config.latent_shape,
        tokenizer_fingerprint=identity_of(tokenizer_folder).fingerprint,
        batch_size=2,
        per_shard=4,
    )


@pytest.fixture
def tokenizer_run(tiny_config: PAEConfig, image_folder: Path) -> TokenizerRun:
    """Random crops from files, L1 + LPIPS, accumulation, clipping, schedule and EMA."""
    data = ImageData(images=image_folder, evaluation=image_folder, evaluation_images=3, resize=36)
    loss = replace(L1_ONLY, lpips=1.0)
    return TokenizerRun(model=tiny_config, data=data, loss=loss, optim=OPTIM, loop=LOOP)


@pytest.fixture
def generator_run(tiny_dit_config: LightningDiTConfig, latents: Shards) -> GeneratorRun:
    model = replace(tiny_dit_config, class_dropout=0.3)
    return GeneratorRun(
        model=model, latents=latents.folder, held_out_latents=latents.folder, optim=OPTIM, loop=LOOP
    )


@pytest.fixture
def runs(tokenizer_run: TokenizerRun, generator_run: GeneratorRun) -> dict[str, Any]:
    return {"tokenizer": tokenizer_run, "generator": generator_run}


def shaken(model: M) -> M:
    """Add a little noise to every weight that is trained."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def kill_points(action: Callable[[], object], root: Path) -> Iterator[int]:
    """Run an action in child processes, killed before their first, second, ... change to files below root.

    Yields after every death, so that the caller can inspect and remove the files; ends when a child
    finishes. Nothing of the child is unwound or flushed, as with kill -9.
    """
    for survived in itertools.count():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of fork beside threads
            child = os.fork()
        if not child:
            _run_and_die(action, root, survived)
        status = os.waitpid(child, 0)[1]
        assert status in (0, signal.SIGKILL), f"the action itself failed before operation {survived}"
        if status == 0:
            return
        yield survived


def _run_and_die(action: Callable[[], object], root: Path, survived: int) -> None:
    left = survived
    changes = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate"}

    def hook(event: str, args: tuple[object, ...]) -> None:
        nonlocal left
        if event in changes or (event == "open" and str(args[0]).startswith(str(root)) and _writes(args)):
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1

    sys.addaudithook(hook)
    try:
        action()
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def _writes(args: tuple[object, ...]) -> bool:
    flags = args[2]
    return isinstance(flags, int) and bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
