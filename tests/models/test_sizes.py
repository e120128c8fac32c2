"""Images that are not square, and larger ones than in training, from the file to the sample."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from openpae import config as configs
from openpae.cli import main
from openpae.data.caches import cache_latents
from openpae.data.crops import center_crop, resize_to_cover
from openpae.data.images import ImageFolder, PackedImages
from openpae.data.label_maps import read_segmented
from openpae.data.packing import pack_images
from openpae.data.pixels import pca_pictures, thumbnails
from openpae.data.training import TrainingImages
from openpae.eval.image_stream import source_batches
from openpae.geometry.profile import run_profile
from openpae.geometry.settings import MeasureConfig, ProfileRun
from openpae.models.configs import DiTDHConfig, HeadConfig, LightningDiTConfig, PAEConfig, RefinerConfig
from openpae.models.dit import LightningDiT
from openpae.models.ditdh import DiTDH
from openpae.models.encoders import encoder_fingerprint
from openpae.models.layers import sincos_2d
from openpae.models.saved import load_generator, load_tokenizer, write_tokenizer
from openpae.models.tokenizer import PAE, build_tokenizer
from openpae.sampling.sampler import sample_images
from openpae.sampling.settings import SamplerConfig
from openpae.storage.files import atomic_folder
from openpae.storage.model_folder import identity_of
from openpae.train.generator import train_generator
from openpae.train.refiner import train_refiner
from openpae.train.settings import GeneratorRun, RefinerRun, TokenizerRun
from openpae.train.tokenizer import train_tokenizer

WIDE = (32, 48)


@pytest.fixture(scope="module")
def wide(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> PackedImages:
    """The drawn images at 32 x 48."""
    return pack_images(ImageFolder(image_folder), tmp_path_factory.mktemp("wide") / "packed", size=WIDE)


# Files to pixels

sides = st.integers(1, 60)


@given(width=sides, height=sides, h=st.integers(1, 20), w=st.integers(1, 20))
def test_an_image_covers_the_size_with_nothing_to_spare(width: int, height: int, h: int, w: int) -> None:
    resized = resize_to_cover(Image.new("RGB", (width, height)), (h, w))
    assert resized.height >= h
    assert resized.width >= w
    assert resized.height == h or resized.width == w
    assert center_crop(Image.new("RGB", (width, height)), (h, w)).shape == (3, h, w)


def test_the_middle_of_a_wide_crop_is_cut_out() -> None:
    columns = np.repeat(np.arange(60, dtype=np.uint8)[None, :, None], 40, axis=0)
    image = Image.fromarray(np.repeat(columns, 3, axis=2))  # 60 wide, 40 high; brightness is the column
    assert center_crop(image, (40, 50))[0, 0].tolist() == list(range(5, 55))
    assert center_crop(image, (30, 60))[0, 0].tolist() == list(range(60))
    assert (center_crop(image, (40, 40)) == center_crop(image, 40)).all()


def test_packed_images_of_another_shape_are_cut_anew(wide: PackedImages, image_folder: Path) -> None:
    source = ImageFolder(image_folder)
    assert wide.image_shape == WIDE
    for i in range(len(wide)):
        assert (wide.shards.gather(np.array([i]))[0].numpy() == center_crop(source.read(i), WIDE)).all()
    (batch,) = source_batches(wide, (16, 24), batch_size=10)
    assert batch.shape == (10, 3, 16, 24)
    for size, needed in (((32, 56), "32 x 56"), (40, "40 x 40")):
        with pytest.raises(ValueError, match=f"is of 32 x 48 pixels, {needed} are needed"):
            next(source_batches(wide, size, batch_size=10))


def test_pack_takes_a_width(image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["pack", str(image_folder), str(tmp_path / "packed"), "--size", "32", "--width", "48"])
    assert PackedImages(tmp_path / "packed").image_shape == WIDE
    with pytest.raises(SystemExit):
        main(["pack", str(image_folder), str(tmp_path / "none"), "--size", "32", "--width", "0"])
    assert "width must be >= 1, got 0" in capsys.readouterr().err


def test_random_crops_have_the_shape_and_reach_every_edge(tmp_path: Path) -> None:
    """They are cut from an image that covers a box of the crop's shape with shorter side `resize`."""
    places = np.stack(np.meshgrid(np.arange(48), np.arange(32)), axis=-1).astype(np.uint8)  # column, row
    image = np.concatenate([places, np.zeros((32, 48, 1), dtype=np.uint8)], axis=-1)
    Image.fromarray(image).save(tmp_path / "a.png")
    data = TrainingImages(ImageFolder(tmp_path), size=(16, 24), seed=0, augment="crop", resize=32)
    images = data.__getitems__(list(range(200))).images
    assert images.shape == (200, 3, 16, 24)
    rows, columns = images[:, 1], images[:, 0]
    assert (rows.amin(), rows.amax(), columns.amin(), columns.amax()) == (0, 31, 0, 47)
    assert (rows[:, 1:].int() - rows[:, :-1].int() == 1).all()  # cut out of it, not scaled
    with pytest.raises(ValueError, match="needs resize >= 16, got 12"):
        TrainingImages(ImageFolder(tmp_path), size=(16, 24), seed=0, augment="crop", resize=12)


def test_label_maps_are_cut_as_their_images(tmp_path: Path) -> None:
    """A map that is the image's own brightness stays so."""
    for folder in ("images", "maps"):
        (tmp_path / folder).mkdir()
    grey = np.repeat(np.arange(60, dtype=np.uint8)[None], 40, axis=0)
    Image.fromarray(np.repeat(grey[..., None], 3, axis=2)).save(tmp_path / "images" / "a.png")
    Image.fromarray(grey).save(tmp_path / "maps" / "a.png")
    pair = read_segmented(tmp_path / "images", tmp_path / "maps", size=(40, 50))
    assert pair.images.shape == (1, 3, 40, 50)
    assert torch.equal(pair.images[:, 0].long(), pair.labels)


# The tokenizer


def test_a_wide_tokenizer_has_a_wide_grid(tiny_config: PAEConfig) -> None:
    config = replace(tiny_config, image_width=48)
    assert (config.image_shape, config.grid_shape, config.latent_shape) == (WIDE, (4, 6), (8, 4, 6))
    model = build_tokenizer(config)
    assert torch.equal(model.modulator.positions[0], sincos_2d(4, 6, 48))
    assert torch.equal(model.decoder.positions[0], sincos_2d(4, 6, 32))
    z = model.encode(torch.rand(2, 3, *WIDE))
    assert z.shape == (2, 8, 4, 6)
    assert model.decode(z).shape == (2, 3, *WIDE)
    assert model.reconstruct(torch.rand(1, 3, 40, 32)).shape == (1, 3, 40, 32)


@pytest.mark.parametrize("size", [(64, 64), (32, 48), (16, 72)])
def test_another_size_is_seen_through_interpolated_positions(
    tiny_pae: PAE, tiny_config: PAEConfig, size: tuple[int, int]
) -> None:
    """As a tokenizer made for that size, with the same weights and the trained positions resized by hand."""
    made = build_tokenizer(replace(tiny_config, image_size=size[0], image_width=size[1])).eval()
    made.load_state_dict(tiny_pae.state_dict())
    h, w = (side // 8 for side in size)
    for part, width in ((made.modulator, 48), (made.decoder, 32)):
        table = sincos_2d(4, 4, width).T.reshape(1, width, 4, 4)
        part.positions = F.interpolate(table, (h, w), mode="bicubic").reshape(1, width, h * w).mT
    images = torch.rand(2, 3, *size)
    z = tiny_pae.encode(images)
    assert z.shape == (2, 8, h, w)
    torch.testing.assert_close(z, made.encode(images))
    decoded = tiny_pae.decode(z)
    assert decoded.shape == images.shape
    torch.testing.assert_close(decoded, made.decode(z))


@pytest.mark.parametrize(
    ("size", "grid"), [((512, 512), (32, 32)), ((1024, 1024), (64, 64)), ((256, 384), (16, 24))]
)
def test_the_papers_tokenizer_takes_larger_and_wider_images(
    size: tuple[int, int], grid: tuple[int, int]
) -> None:
    """At full size, without memory: trained at 256, or made for the size."""
    images = torch.empty(1, 3, *size, device="meta")
    features = torch.empty(1, grid[0] * grid[1], 1024, device="meta")
    for config in (PAEConfig(), PAEConfig(image_size=size[0], image_width=size[1])):
        with torch.device("meta"):
            model = PAE(config)
        z = model.encode(images, features)
        assert z.shape == (1, 32, *grid)
        assert model.decode(z).shape == images.shape
        assert model.preprocess(images).shape == (1, 3, 14 * grid[0], 14 * grid[1])
    assert PAEConfig(image_size=size[0], image_width=size[1]).latent_shape == (32, *grid)


# The generator

WIDE_DIT = LightningDiTConfig(
    latent_dim=8, grid_size=4, grid_width=6, hidden_dim=32, num_layers=2, num_heads=2, num_classes=2
)


def awake(model: torch.nn.Module) -> torch.nn.Module:
    """Moved off its initial values: untrained, its velocity is zero."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def ask(model: torch.nn.Module, x: Tensor) -> Tensor:
    velocity: Tensor = model(x, torch.full((len(x),), 0.3), torch.zeros(len(x), dtype=torch.long))
    return velocity


@pytest.mark.parametrize("patch", [1, 2])
def test_generators_have_wide_grids(patch: int) -> None:
    head = HeadConfig(hidden_dim=32, num_layers=1, num_heads=2)
    shared = {"latent_dim": 8, "grid_size": 4, "grid_width": 6, "patch_size": patch, "hidden_dim": 32}
    shared |= {"num_layers": 1, "num_heads": 2, "num_classes": 2}
    for model in (LightningDiT(LightningDiTConfig(**shared)), DiTDH(DiTDHConfig(**shared, head=head))):
        assert model.config.latent_shape == (8, 4, 6)
        assert torch.equal(model.positions[0], sincos_2d(4 // patch, 6 // patch, 32))
        x = torch.randn(2, 8, 4, 6)
        moved = x.clone()
        moved[:, :, 0, 5] += 3
        change = (ask(awake(model), moved) - ask(model, x)).norm(dim=1)[0]
        assert change.shape == (4, 6)
        assert change.flatten().argmax() % 6 >= 6 - patch  # rows and columns are not mixed up
        assert change.flatten().argmax() // 6 < patch


def test_a_generator_takes_other_grids_through_interpolated_positions() -> None:
    """As one made for that grid, with the same weights and its tables made by hand."""
    torch.manual_seed(0)
    trained = awake(LightningDiT(WIDE_DIT))
    made = LightningDiT(replace(WIDE_DIT, grid_size=8, grid_width=9)).eval()
    made.load_state_dict(trained.state_dict())
    table = sincos_2d(4, 6, 32).T.reshape(1, 32, 4, 6)
    made.positions = F.interpolate(table, (8, 9), mode="bicubic").reshape(1, 32, 72).mT
    rows, columns = (torch.arange(8) + 0.5) / 2 - 0.5, (torch.arange(9) + 0.5) * 6 / 9 - 0.5
    speeds = 10000.0 ** (-torch.arange(4) / 4)  # heads of 16: 4 pairs for the row, 4 for the column
    angles = torch.cat(
        [
            (rows[:, None, None] * speeds).expand(8, 9, 4),
            (columns[None, :, None] * speeds).expand(8, 9, 4),
        ],
        dim=-1,
    ).repeat_interleave(2, dim=-1)
    made.rope_cos, made.rope_sin = angles.cos().view(72, 16), angles.sin().view(72, 16)
    x = torch.randn(2, 8, 8, 9)
    torch.testing.assert_close(ask(trained, x), ask(made, x))
    with pytest.raises(ValueError, match=r"multiples of patch_size = 2, got \(1, 8, 5, 6\)"):
        ask(LightningDiT(replace(WIDE_DIT, patch_size=2)), torch.randn(1, 8, 5, 6))


# All stages


def test_wide_images_go_through_every_stage(wide: PackedImages, tmp_path: Path) -> None:
    def run(cls: type, name: str, **changes: object) -> object:
        preset = configs.load(cls, name)
        loop = replace(preset.loop, steps=2, global_batch_size=4, save_every=2)
        return replace(preset, loop=loop, **changes)

    data = replace(
        configs.load(TokenizerRun, "tokenizer/tiny").data,
        images=wide.shards.folder,
        evaluation=wide.shards.folder,
        augment="flip",
        feature_cache=tmp_path / "features",
    )
    refiner = configs.load(RefinerRun, "refiner/tiny").model
    train_refiner(
        run(
            RefinerRun,
            "refiner/tiny",
            data=replace(data, evaluation=None),
            image_width=48,
            model=replace(refiner, grid_width=6),
        ),
        tmp_path / "refiner",
        quiet=True,
    )
    tokenizer_run = configs.load(TokenizerRun, "tokenizer/tiny")
    train_tokenizer(
        run(
            TokenizerRun,
            "tokenizer/tiny",
            data=data,
            prior=tmp_path / "refiner",
            model=replace(tokenizer_run.model, image_width=48),
            loss=replace(tokenizer_run.loss, ssr=0.2, mcr=0.5, scr=1.0),
        ),
        tmp_path / "tokenizer",
        quiet=True,
    )
    tokenizer = load_tokenizer(tmp_path / "tokenizer")
    latents = cache_latents(
        tokenizer.encode,
        wide,
        tmp_path / "latents",
        image_size=tokenizer.config.image_shape,
        latent_shape=tokenizer.config.latent_shape,
        tokenizer_fingerprint=identity_of(tmp_path / "tokenizer").fingerprint,
    )
    assert latents.attributes["image_size"] == [32, 48]
    assert latents.shape == (2, 8, 4, 6)
    model = replace(WIDE_DIT, num_classes=len(wide.classes))
    train_generator(
        run(GeneratorRun, "generator/tiny", model=model, latents=tmp_path / "latents"),
        tmp_path / "generator",
        quiet=True,
    )
    generator = load_generator(tmp_path / "generator")
    labels = torch.tensor([0, 1, 0])
    images = torch.cat([*sample_images(tokenizer, generator, labels, SamplerConfig(steps=2), seed=0)])
    assert images.shape == (3, 3, *WIDE)


@pytest.mark.filterwarnings("ignore:eRank of", "ignore:.*classes hold one image")
def test_a_wide_latent_space_is_measured_and_drawn(
    image_folder: Path, tiny_config: PAEConfig, tmp_path: Path
) -> None:
    """Pictures keep their proportions: 32 x 40 and 4 x 5 on the page."""
    model = build_tokenizer(replace(tiny_config, image_width=40))
    assert model.encoder is not None
    with atomic_folder(tmp_path / "wide") as folder:
        write_tokenizer(folder, model.state_dict(), model.config, encoder_fingerprint(model.encoder))
    run = ProfileRun(
        images=image_folder, out=tmp_path / "out", lpips="random", extractor="none", measure=MeasureConfig()
    )
    run_profile([str(tmp_path / "wide")], run)
    record = json.loads((tmp_path / "out/profile.json").read_text())
    assert record["image_size"] == [32, 40]
    assert record["tokenizers"][0]["latent_shape"] == [8, 4, 5]
    assert {"lpc", "psnr"} <= record["tokenizers"][0]["metrics"].keys()
    assert "10 images of 32 x 40 pixels" in (tmp_path / "out/profile.html").read_text(encoding="utf-8")
    assert thumbnails(torch.rand(2, 3, 32, 48), 24).shape == (2, 3, 16, 24)
    assert pca_pictures(torch.randn(2, 8, 4, 6), 24).shape == (2, 3, 16, 24)
    with pytest.raises(ValueError, match="scenes are square, but the images have 32 x 40 pixels"):
        run_profile([str(tmp_path / "wide")], replace(run, scenes=2))


# Impossible sizes


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PAEConfig(image_width=250), "image_width must be a multiple of decoder.patch_size, got 250"),
        (lambda: PAEConfig(image_width=0), "image_width must be >= 1, got 0"),
        (lambda: LightningDiTConfig(grid_width=0), "grid_width must be >= 1, got 0"),
        (lambda: LightningDiTConfig(grid_width=15, patch_size=2), "must divide grid_width, got 2 and 15"),
        (lambda: RefinerConfig(grid_width=0), "grid_width must be >= 1, got 0"),
    ],
)
def test_impossible_sizes_are_named(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()  # type: ignore[operator]


def test_the_refiners_grid_must_be_that_of_its_images() -> None:
    run = configs.load(RefinerRun, "refiner/tiny")
    with pytest.raises(
        ValueError, match="must be 8 pixels for each of the 4 columns of the model's grid, got 48"
    ):
        replace(run, image_width=48)
    with pytest.raises(ValueError, match="for each of the 6 columns of the model's grid, got 32"):
        replace(run, model=replace(run.model, grid_width=6))
