"""Tokenizers of every kind behind one protocol: values, checks, errors."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from openpae.interop.spaces import LatentSpace, Tokenizer, check_tokenizer, open_tokenizer
from openpae.models.configs import RefinerConfig
from openpae.models.encoders import EncoderInput, encoder_fingerprint, load_encoder
from openpae.models.priors import Refiner
from openpae.models.saved import load_tokenizer, write_prior
from openpae.storage.model_folder import identity_of

needs_diffusers = pytest.mark.skipif(
    importlib.util.find_spec("diffusers") is None, reason="diffusers is not installed"
)
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers.*")


@pytest.fixture
def images() -> Tensor:
    return torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return f"python:{path}"


def space_of(**changes: Any) -> LatentSpace:
    facts: dict[str, Any] = {
        "name": "test",
        "kind": "python",
        "fingerprint": "0" * 16,
        "image_size": 32,
        "encode": lambda x: torch.nn.functional.avg_pool2d(x, 8),
        "decode": lambda z: torch.nn.functional.interpolate(z, scale_factor=8.0),
    }
    return LatentSpace(**facts | changes)


def test_openpae_folder_encodes_and_decodes_as_the_model(tokenizer_folder: Path, images: Tensor) -> None:
    space: Tokenizer = open_tokenizer(str(tokenizer_folder))
    model = load_tokenizer(tokenizer_folder)
    with torch.no_grad():
        z = model.encode(images)
        assert torch.equal(space.encode(images), z)
        assert space.decode is not None
        assert torch.equal(space.decode(z), model.decode(z).clamp(0, 1))
    assert space.fingerprint == identity_of(tokenizer_folder).fingerprint
    assert (space.image_size, space.latent_shape(32)) == ((32, 32), (8, 4, 4))
    assert space.latent_shape(64) == (8, 8, 8)
    check_tokenizer(space, images)


def test_encoder_features_equal_those_of_the_tokenizer(tokenizer_folder: Path, images: Tensor) -> None:
    space = open_tokenizer("encoder:random-tiny/8")
    features = load_tokenizer(tokenizer_folder).features(images)  # (B, N, D) on the same 4 x 4 grid
    torch.testing.assert_close(space.encode(images).flatten(2).mT, features)
    assert space.decode is None
    assert (space.image_size, space.latent_shape(32)) == (128, (48, 4, 4))
    assert open_tokenizer("encoder:random-tiny").latent_shape(32) == (48, 2, 2)
    assert load_encoder("random-tiny").spec.stride == 8  # the patch size of the text decides the resize
    check_tokenizer(space, images)
    with pytest.raises(ValueError, match=r"multiples of 8, got \(1, 3, 36, 36\)"):
        space.latent_shape(36)


def test_targets_are_those_of_the_refiner(tmp_path: Path, images: Tensor) -> None:
    """So the SSC of Z_T can be measured."""
    sizes = RefinerConfig(
        feature_dim=48, latent_dim=8, grid_size=4, num_heads=4, decoder_layers=1, decoder_dim=32,
        decoder_heads=4,
    )  # fmt: skip
    encoder = load_encoder("random-tiny")
    torch.manual_seed(0)
    refiner = Refiner(sizes)
    (tmp_path / "refiner").mkdir()
    write_prior(tmp_path / "refiner", refiner.state_dict(), sizes, encoder_fingerprint(encoder))
    space = open_tokenizer(f"targets:random-tiny/8:{tmp_path / 'refiner'}")
    assert (space.name, space.decode, space.latent_shape(32)) == ("refiner (targets)", None, (8, 4, 4))
    check_tokenizer(space, images)
    with torch.no_grad():
        features = encoder(EncoderInput(encoder.spec, 8)(images))
        expected = refiner.project(features).mT.reshape(3, 8, 4, 4)
    torch.testing.assert_close(space.encode(images), expected)
    with pytest.raises(ValueError, match="must be targets:ENCODER/PIXELS_PER_TOKEN:FOLDER of a refiner"):
        open_tokenizer("targets:random-tiny/8")
    (tmp_path / "other").mkdir()
    write_prior(tmp_path / "other", refiner.state_dict(), sizes, "0" * 16)
    with pytest.raises(
        ValueError, match="refines features of the encoder 0000000000000000, but random-tiny/8"
    ):
        open_tokenizer(f"targets:random-tiny/8:{tmp_path / 'other'}")


def test_python_file_of_two_functions(tmp_path: Path, images: Tensor) -> None:
    text = "import torch\nimage_size = 32\ndef encode(images): return images[:, :2, ::8, ::8] * 2\n"
    text += "def decode(z): return z.new_full((len(z), 3, 32, 32), 0.5)\n"
    space = open_tokenizer(write(tmp_path / "mine.py", text))
    assert (space.name, space.kind, space.image_size, space.latent_shape(32)) == (
        "mine",
        "python",
        32,
        (2, 4, 4),
    )
    check_tokenizer(space, images)
    other = open_tokenizer(write(tmp_path / "other.py", text + "\n"))
    assert space.fingerprint != other.fingerprint
    without = open_tokenizer(write(tmp_path / "without.py", "def encode(images): return images"))
    assert without.decode is None
    assert without.image_size == 256


@needs_diffusers
@pytest.mark.parametrize("name", ["AutoencoderKL", "AutoencoderDC", "AutoencoderTiny", "VQModel"])
def test_diffusers_model_gives_the_mode_of_its_posterior(name: str, tmp_path: Path, images: Tensor) -> None:
    import diffusers

    model = getattr(diffusers, name)(**TINY[name]).eval()
    model.save_pretrained(tmp_path / name)
    space = open_tokenizer(f"diffusers:{tmp_path / name}")
    with torch.no_grad():
        answer = model.encode(images * 2 - 1, return_dict=False)[0]
        z = answer if isinstance(answer, Tensor) else answer.mean
        torch.testing.assert_close(space.encode(images), z)
        assert space.decode is not None
        decoded = (model.decode(z, return_dict=False)[0] + 1) / 2
        torch.testing.assert_close(space.decode(z), decoded.clamp(0, 1))
        check_tokenizer(space, images)
        assert not space.decode(z).requires_grad
    # A folder with a diffusers config needs no prefix. Equal weights have equal fingerprints.
    assert open_tokenizer(str(tmp_path / name)).fingerprint == space.fingerprint
    with torch.no_grad():
        next(model.parameters()).add_(1e-3)
    model.save_pretrained(tmp_path / name)
    assert open_tokenizer(str(tmp_path / name)).fingerprint != space.fingerprint


TINY: dict[str, dict[str, Any]] = {
    "AutoencoderKL": {
        "block_out_channels": (8, 8),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "norm_num_groups": 4,
    },
    "AutoencoderDC": {
        "latent_channels": 4,
        "attention_head_dim": 2,
        "encoder_block_out_channels": (8, 8),
        "decoder_block_out_channels": (8, 8),
        "encoder_layers_per_block": (1, 1),
        "decoder_layers_per_block": (1, 1),
        "encoder_qkv_multiscales": ((), ()),
        "decoder_qkv_multiscales": ((), ()),
    },
    "AutoencoderTiny": {
        "encoder_block_out_channels": (8, 8),
        "decoder_block_out_channels": (8, 8),
        "num_encoder_blocks": (1, 1),
        "num_decoder_blocks": (1, 1),
    },
    "VQModel": {"block_out_channels": (8,), "norm_num_groups": 4, "num_vq_embeddings": 16},
}


@needs_diffusers
def test_diffusers_rae_takes_images_in_0_to_1(tmp_path: Path, images: Tensor) -> None:
    import diffusers

    config = {
        "encoder_type": "mae",
        "encoder_hidden_size": 64,
        "encoder_patch_size": 8,
        "encoder_num_hidden_layers": 1,
        "decoder_hidden_size": 32,
        "decoder_num_hidden_layers": 1,
        "decoder_num_attention_heads": 2,
        "decoder_intermediate_size": 32,
        "patch_size": 8,
        "encoder_input_size": 32,
    }
    model = diffusers.AutoencoderRAE(**config).eval()
    model.save_pretrained(tmp_path)
    space = open_tokenizer(str(tmp_path))
    with torch.no_grad():
        z = model.encode(images, return_dict=False)[0]
        torch.testing.assert_close(space.encode(images), z)
        assert space.decode is not None
        torch.testing.assert_close(space.decode(z), model.decode(z, return_dict=False)[0].clamp(0, 1))
    assert space.latent_shape(32) == (64, 4, 4)


@needs_diffusers
def test_diffusers_weights_must_fit_and_be_an_autoencoder(tmp_path: Path) -> None:
    import diffusers

    diffusers.AutoencoderTiny(**TINY["AutoencoderTiny"]).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"latent_channels": 5}))
    with pytest.raises(ValueError, match=r"do not fit AutoencoderTiny: .*decoder\.layers"):
        open_tokenizer(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps(config | {"_class_name": "UNet2DModel"}))
    with pytest.raises(ValueError, match="no autoencoder of diffusers, but UNet2DModel"):
        open_tokenizer(str(tmp_path))
    with pytest.raises(FileNotFoundError, match="no diffusers autoencoder at"):
        open_tokenizer(f"diffusers:{tmp_path}/none")


@needs_diffusers
def test_a_video_autoencoder_is_refused_by_name(tmp_path: Path, images: Tensor) -> None:
    import diffusers

    small = {
        "base_dim": 4,
        "z_dim": 4,
        "dim_mult": [1, 1],
        "num_res_blocks": 1,
        "temperal_downsample": [False],
    }
    diffusers.AutoencoderKLWan(**small).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"\(AutoencoderKLWan\) takes no images \(3, 3, 32, 32\); only"):
        open_tokenizer(str(tmp_path)).encode(images)


def test_unknown_tokenizers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"kind of tokenizer 'difusers' .* openpae, diffusers, encoder, targets, python"
    ):
        open_tokenizer("difusers:x/y")
    with pytest.raises(FileNotFoundError, match="no model at"):
        open_tokenizer(str(tmp_path))
    with pytest.raises(ValueError, match="unknown encoder 'dino'"):
        open_tokenizer("encoder:dino")
    with pytest.raises(ValueError, match="encoder:NAME/PIXELS_PER_TOKEN"):
        open_tokenizer("encoder:random-tiny/0")
    with pytest.raises(FileNotFoundError, match="no Python file at"):
        open_tokenizer("python:nothing.py")
    with pytest.raises(ValueError, match=r"must define encode\(images\)"):
        open_tokenizer(write(tmp_path / "empty.py", "encode = 3"))
    with pytest.raises(ValueError, match="decode must be a function"):
        open_tokenizer(write(tmp_path / "half.py", "def encode(x): return x\ndecode = 3"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"encode": lambda x: x.flatten(1)},
            r"latents \(B, C, h, w\) for B = 3, got torch.float32 \(3, 3072\)",
        ),
        ({"encode": lambda x: x / 0}, "NaN or infinity"),
        ({"encode": lambda x: torch.rand(len(x), 2, 4, 4)}, "other latents in a second call"),
        (
            {"decode": lambda z: z.repeat(1, 1, 2, 2)},
            r"images \(3, 3, 8, 8\) of \(3, 3, 32, 32\).*made for \(32\)",
        ),
        ({"decode": lambda z: 3 + torch.zeros(3, 3, 32, 32)}, r"images decoded by test must lie in \[0, 1\]"),
        ({"decode": lambda z: torch.rand(3, 3, 32, 32)}, "other images in a second call"),
    ],
    ids=["shape", "finite", "noise", "size", "range", "dropout"],
)
def test_tokenizers_that_break_the_protocol_are_refused(
    changes: dict[str, Any], message: str, images: Tensor
) -> None:
    check_tokenizer(space_of(), images)
    with pytest.raises(ValueError, match=message):
        check_tokenizer(space_of(**changes), images)
