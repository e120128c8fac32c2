"""Tokenizers of every kind beside a generator: cached, trained on, sampled, evaluated and refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from openpae import Pipeline
from openpae.cli import main
from openpae.data.images import PackedImages
from openpae.data.shards import Shards
from openpae.interop.any_tokenizer import AnyTokenizer, decoded_shape, open_decoder, open_pair
from openpae.interop.spaces import open_tokenizer
from openpae.models.saved import load_generator, load_tokenizer
from openpae.storage.files import read_json
from openpae.storage.model_folder import identity_of

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers.*")

TRAIN = "--model.grid-size 8 --model.latent-dim {} --loop.steps 2 --loop.save-every 2 --loop.device cpu"
QUICK = ("--steps", "2", "--guidance", "1", "--device", "cpu")
FAST = ("--extractor", "random", "--min-samples", "2", "--device", "cpu")


def autoencoder(folder: Path, seed: int = 0, **changes: Any) -> str:
    """A tiny AutoencoderKL of 32-pixel images to 4 x 8 x 8 latents, with a scaling."""
    torch.manual_seed(seed)
    config = {
        "block_out_channels": (8, 8, 8),
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
        "norm_num_groups": 4,
        "sample_size": 32,
        "scaling_factor": 0.5,
        "shift_factor": 0.25,
    }
    diffusers.AutoencoderKL(**config | changes).save_pretrained(folder)
    return f"diffusers:{folder}"


def run(*arguments: object) -> None:
    main([str(argument) for argument in arguments])


def fails(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line of a command that exits with 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as left:
        run(*arguments)
    assert left.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


def trained(root: Path, tokenizer: str, packed: PackedImages, channels: int, *options: object) -> Path:
    """A folder with latents of a tokenizer, and a generator trained on them."""
    run("cache-latents", tokenizer, packed.shards.folder, root / "latents", "--device", "cpu", *options)
    flags = TRAIN.format(channels).split()
    run("train-generator", "generator/tiny", root / "generator", "--latents", root / "latents", *flags)
    return root


@pytest.fixture(scope="module")
def line(packed: PackedImages, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("line")
    return trained(root, autoencoder(root / "vae"), packed, 4)


@pytest.fixture
def images() -> Tensor:
    return torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def test_latents_have_the_scale_that_the_config_wants(tmp_path: Path, images: Tensor) -> None:
    text = autoencoder(tmp_path / "vae")
    model = diffusers.AutoencoderKL.from_pretrained(tmp_path / "vae", low_cpu_mem_usage=False)
    tokenizer = AnyTokenizer(open_tokenizer(text))
    with torch.no_grad():
        raw = model.encode(images * 2 - 1).latent_dist.mean
        torch.testing.assert_close(tokenizer.encode(images), (raw - 0.25) * 0.5)
        expected = (model.decode(raw).sample / 2 + 0.5).clamp(0, 1)
        torch.testing.assert_close(tokenizer.decode((raw - 0.25) * 0.5), expected)
        torch.testing.assert_close(tokenizer.reconstruct(images), expected)


def test_means_and_deviations_of_channels_are_a_scale_too(tmp_path: Path, images: Tensor) -> None:
    mean, std = [0.1, 0.2, 0.3, 0.4], [1.0, 2.0, 3.0, 4.0]
    space = open_tokenizer(autoencoder(tmp_path, latents_mean=mean, latents_std=std, shift_factor=None))
    tokenizer = AnyTokenizer(space)
    columns = [torch.tensor(values).view(4, 1, 1) for values in (mean, std)]
    with torch.no_grad():
        torch.testing.assert_close(
            tokenizer.encode(images), (space.encode(images) - columns[0]) * 0.5 / columns[1]
        )
        assert space.decode is not None
        torch.testing.assert_close(tokenizer.reconstruct(images), space.decode(space.encode(images)))


def test_the_scale_and_the_weights_are_in_the_identity(tmp_path: Path) -> None:
    first = AnyTokenizer(open_tokenizer(autoencoder(tmp_path / "a"))).identity
    assert first == "diffusers:" + open_tokenizer(str(tmp_path / "a")).fingerprint
    others = [
        autoencoder(tmp_path / "b", scaling_factor=0.6),
        autoencoder(tmp_path / "c", shift_factor=0.0),
        autoencoder(tmp_path / "d", seed=1),
    ]
    assert len({first, *(AnyTokenizer(open_tokenizer(text)).identity for text in others)}) == 4


def test_the_cache_holds_latents_and_one_identity_in_either_precision(
    line: Path, packed: PackedImages, tmp_path: Path
) -> None:
    tokenizer = AnyTokenizer(open_tokenizer(f"diffusers:{line / 'vae'}"))
    precision = ("--precision", "fp32", "--device", "cpu")
    run("cache-latents", line / "vae", packed.shards.folder, tmp_path / "z", *precision)
    half, full = Shards(line / "latents", "latents"), Shards(tmp_path / "z", "latents")
    assert half.attributes["tokenizer"] == full.attributes["tokenizer"] == tokenizer.identity
    assert (half.attributes["precision"], full.attributes["precision"]) == ("bf16", "fp32")
    assert (full.attributes["image_size"], full.shape) == (32, (2, 4, 8, 8))
    with torch.no_grad():
        z = tokenizer.encode(packed.shards.gather(np.arange(2)) / 255)
    stored = full.gather(np.arange(2), np.zeros(2, np.int64)).float()
    torch.testing.assert_close(stored, z, rtol=2**-8, atol=1e-4)  # stored with 8 bits of mantissa


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_its_generator_samples(line: Path, tmp_path: Path, precision: str) -> None:
    """A folder with a config of diffusers needs no prefix."""
    run("sample", line / "vae", line / "generator", tmp_path, "--count", 4, "--precision", precision, *QUICK)
    with np.load(tmp_path / "samples.npz") as file:
        assert file["arr_0"].shape == (4, 32, 32, 3)
    record = read_json(tmp_path / "samples.json")
    assert record["tokenizer"] == identity_of(line / "generator").made_with


def test_a_sample_is_the_decoded_latent(line: Path, tmp_path: Path) -> None:
    common = (f"diffusers:{line / 'vae'}", line / "generator")
    run("sample", *common, tmp_path / "images", "--count", 2, "--format", "safetensors", *QUICK)
    run("sample", *common, tmp_path / "latents", "--count", 2, "--format", "latents", *QUICK)
    z = load_file(tmp_path / "latents" / "latents.safetensors")["latents"]
    model = diffusers.AutoencoderKL.from_pretrained(line / "vae", low_cpu_mem_usage=False)
    with torch.no_grad():
        expected = (model.decode(z / 0.5 + 0.25).sample / 2 + 0.5).clamp(0, 1) * 255
    got = load_file(tmp_path / "images" / "samples.safetensors")["images"]
    assert (got.float() - expected).abs().max() <= 1  # rounding to 256 levels


def test_its_samples_and_reconstructions_are_evaluated(
    line: Path, packed: PackedImages, tmp_path: Path
) -> None:
    reference, pair = packed.shards.folder, ("--tokenizer", f"diffusers:{line / 'vae'}")
    drawn = ("--generator", line / "generator", "--sample-count", 4, *QUICK[:4])
    run("evaluate", reference, *pair, *drawn, *FAST, "--out", tmp_path / "samples.json")
    made_with = identity_of(line / "generator").made_with
    assert read_json(tmp_path / "samples.json")["tokenizer"] == made_with
    run("evaluate", reference, *pair, "--lpips", "random", *FAST)
    record = read_json(line / "vae" / "evaluation.json")
    assert (record["kind"], record["tokenizer"]) == ("reconstruction", made_with)


def test_training_evaluates_samples_with_it(line: Path, packed: PackedImages, tmp_path: Path) -> None:
    flags = ("--evaluation-samples", 4, "--extractor", "random", "--sampler.steps", 2)
    run("train-generator", line / "generator" / "config.yaml", tmp_path, "--tokenizer",
        f"diffusers:{line / 'vae'}", "--evaluation-images", packed.shards.folder, *flags)  # fmt: skip
    record = read_json(tmp_path / "evaluations" / "step-00000002.json")
    assert record["tokenizer"] == identity_of(line / "generator").made_with


def test_another_tokenizer_is_refused(
    line: Path,
    tokenizer_folder: Path,
    packed: PackedImages,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    made_with = identity_of(line / "generator").made_with
    other = autoencoder(tmp_path / "vae", seed=1)
    for text in (other, tokenizer_folder):
        message = fails(capsys, "sample", text, line / "generator", tmp_path / "out", *QUICK)
        assert f"makes latents of the tokenizer {made_with}, but {text} is " in message
    message = fails(capsys, "evaluate", packed.shards.folder, "--tokenizer", other, "--generator",
                    line / "generator", "--sample-count", 4, *FAST)  # fmt: skip
    assert f"but {other} is diffusers:" in message
    message = fails(capsys, "train-generator", line / "generator" / "config.yaml", tmp_path / "run",
                    "--tokenizer", other, "--evaluation-images", packed.shards.folder)  # fmt: skip
    assert f"holds latents of the tokenizer {made_with}, but {other} is " in message
    with pytest.raises(ValueError, match="makes latents of the tokenizer"):
        Pipeline.join(other, line / "generator")


def test_a_pipeline_joins_the_two_and_takes_a_folder_of_both(line: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer").symlink_to(line / "vae")
    (tmp_path / "generator").symlink_to(line / "generator")
    joined = Pipeline.join(f"diffusers:{line / 'vae'}", line / "generator")
    first, second = (
        pipeline([0, 1], steps=2, output="tensor")
        for pipeline in (joined, Pipeline.from_pretrained(tmp_path))
    )
    assert first.shape == (2, 3, 32, 32)
    assert torch.equal(first, second)
    half = joined.to(torch.bfloat16)([0, 1], steps=2, output="tensor")
    assert half.dtype == torch.float32
    assert (half - first).abs().mean() < 0.05
    with pytest.raises(ValueError, match="vae is no tokenizer of openpae, so the pair cannot be saved"):
        joined.save_pretrained(tmp_path / "pair")


def test_a_saved_generator_names_its_tokenizer(line: Path, tmp_path: Path) -> None:
    load_generator(line / "generator").save_pretrained(tmp_path / "saved")
    made_with = identity_of(line / "generator").made_with
    assert made_with.startswith("diffusers:")
    assert identity_of(tmp_path / "saved").made_with == made_with
    card = (tmp_path / "saved" / "README.md").read_text()
    assert f"made with the tokenizer `{made_with}`" in card
    assert 'openpae.Pipeline.join("diffusers:...", ' in card
    open_pair(f"diffusers:{line / 'vae'}", tmp_path / "saved")


def test_images_of_another_size_are_encoded_and_drawn(packed: PackedImages, tmp_path: Path) -> None:
    """The grid of the generator decides the size of its samples, not the config of the autoencoder."""
    text = autoencoder(tmp_path / "vae", sample_size=64)
    trained(tmp_path, text, packed, 4, "--size", 32)
    run("sample", text, tmp_path / "generator", tmp_path / "out", "--count", 2, *QUICK)
    with np.load(tmp_path / "out" / "samples.npz") as file:
        assert file["arr_0"].shape == (2, 32, 32, 3)
    tokenizer, _ = open_pair(text, tmp_path / "generator")
    assert decoded_shape(tokenizer, (4, 8, 8)) == (32, 32)
    assert decoded_shape(tokenizer, (4, 8, 12)) == (32, 48)


def test_features_of_a_vfm_are_cached_and_trained_on_but_give_no_pictures(
    packed: PackedImages, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "encoder:random-tiny/4"
    trained(tmp_path, text, packed, 48, "--size", 32)
    assert Shards(tmp_path / "latents").attributes["tokenizer"].startswith("encoder:")
    message = fails(capsys, "sample", text, tmp_path / "generator", tmp_path / "out", *QUICK)
    assert "random-tiny (VFM) has no decoder, so its latents cannot become images" in message
    message = fails(capsys, "evaluate", packed.shards.folder, "--tokenizer", text, "--lpips", "random", *FAST)
    assert "encoder:random-tiny/4 has no folder here for the record; name a file with --out" in message
    run(
        "sample",
        text,
        tmp_path / "generator",
        tmp_path / "drawn",
        "--count",
        2,
        "--format",
        "latents",
        *QUICK,
    )
    assert load_file(tmp_path / "drawn" / "latents.safetensors")["latents"].shape == (2, 48, 8, 8)


OWN = """
import torch
image_size = 32
net = torch.nn.Conv2d(3, 2, 4, stride=4)
torch.nn.init.constant_(net.weight, {weight})
torch.nn.init.zeros_(net.bias)
def encode(images): return net(images)
def decode(z): return z[:, :1].repeat(1, 3, 1, 1).repeat_interleave(4, 2).repeat_interleave(4, 3).sigmoid()
"""


def test_own_code_is_used_alike(
    packed: PackedImages, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [tmp_path / name for name in ("mine.py", "other.py")]
    for file, weight in zip(files, (0.01, 0.02), strict=True):
        file.write_text(OWN.format(weight=weight))
    trained(tmp_path, f"python:{files[0]}", packed, 2)
    run("sample", f"python:{files[0]}", tmp_path / "generator", tmp_path / "out", "--count", 2, *QUICK)
    message = fails(capsys, "sample", f"python:{files[1]}", tmp_path / "generator", tmp_path / "no", *QUICK)
    assert "of the tokenizer python:" in message


def test_weights_of_own_code_are_in_the_fingerprint(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("import torch\nnet = torch.nn.Linear(2, 2)\ndef encode(images): return images\n")
    torch.manual_seed(0)
    first = open_tokenizer(f"python:{file}").fingerprint
    torch.manual_seed(0)
    assert open_tokenizer(f"python:{file}").fingerprint == first
    torch.manual_seed(1)
    assert open_tokenizer(f"python:{file}").fingerprint != first


def test_noisy_code_is_refused_before_it_is_cached(
    packed: PackedImages, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "noisy.py"
    file.write_text("import torch\ndef encode(x): return torch.randn(len(x), 2, 8, 8)\n")
    message = fails(capsys, "cache-latents", f"python:{file}", packed.shards.folder, tmp_path / "z",
                    "--device", "cpu")  # fmt: skip
    assert "encode of noisy gives other latents in a second call" in message
    assert not (tmp_path / "z").exists()


def test_latents_of_a_study_are_not_scaled(line: Path, images: Tensor) -> None:
    """They carry the bare fingerprint, so both kinds of generators are decoded as they were trained."""
    text = f"diffusers:{line / 'vae'}"
    space = open_tokenizer(text)
    raw, identity = open_decoder(text, ("a study makes latents", space.fingerprint))
    assert identity == space.fingerprint
    assert isinstance(raw, AnyTokenizer)
    with torch.no_grad():
        z = space.encode(images)
        assert space.decode is not None
        assert torch.equal(raw.encode(images), z)
        assert torch.equal(raw.decode(z), space.decode(z))


def test_openpae_is_a_kind_too(tokenizer_folder: Path, images: Tensor) -> None:
    identity = identity_of(tokenizer_folder).fingerprint
    for text in (tokenizer_folder, f"openpae:{tokenizer_folder}"):
        model, found = open_decoder(text, ("latents", identity))
        assert found == identity
        assert not isinstance(model, AnyTokenizer)
    own = AnyTokenizer(open_tokenizer(tokenizer_folder))
    assert own.identity == identity
    with torch.no_grad():
        assert torch.equal(own.reconstruct(images), load_tokenizer(tokenizer_folder).reconstruct(images))
    assert decoded_shape(load_tokenizer(tokenizer_folder), (8, 4, 6)) == (32, 48)
