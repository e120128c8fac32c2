"""Training a generator: either class, checkpointed blocks, positions, sizes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from openpae import config as configs
from openpae.cli import main
from openpae.commands.console import run_of, take_option
from openpae.commands.describe import describe
from openpae.data.images import PackedImages
from openpae.data.shards import Shards
from openpae.engine.journal import read_log
from openpae.engine.loop import fit
from openpae.engine.run_folder import open_run
from openpae.engine.settings import LoopConfig, OptimConfig
from openpae.models.configs import DiTDHConfig, GeneratorConfig, HeadConfig, LightningDiTConfig
from openpae.models.dit import LightningDiT
from openpae.models.ditdh import DiTDH
from openpae.models.saved import load_generator, load_tokenizer
from openpae.objective.flow import dimension_shift
from openpae.plan.trial import operations_per_image
from openpae.runtime.draws import Draws, initial_noise
from openpae.sampling.sampler import sample_latents
from openpae.sampling.settings import SamplerConfig
from openpae.storage.model_folder import checkpoint_path, identity_of
from openpae.train.generator import GeneratorTask, train_generator
from openpae.train.settings import GeneratorRun
from tests.by_hand import double_precision
from tests.engine.group import HEADROOM, growth_of

WIDE = DiTDHConfig(
    latent_dim=8,
    grid_size=4,
    hidden_dim=16,
    num_layers=2,
    num_heads=2,
    num_classes=2,
    head=HeadConfig(hidden_dim=32, num_layers=1, num_heads=2),
)


@pytest.fixture
def run(tiny_dit_config: LightningDiTConfig, latents: Shards) -> GeneratorRun:
    return GeneratorRun(
        model=tiny_dit_config,
        latents=latents.folder,
        held_out_latents=latents.folder,
        optim=OptimConfig(lr=1e-2),
        loop=LoopConfig(steps=4, global_batch_size=8, precision="fp32", ema_decay=0.5, device="cpu"),
    )


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    return load_generator(run_dir).state_dict()


def test_a_generator_with_a_wide_head_is_trained_saved_and_described(
    run: GeneratorRun, tmp_path: Path
) -> None:
    wide = replace(run, model=WIDE, times="uniform", time_shift=None, cosine=0.0)
    before = GeneratorTask(wide).evaluate(0)
    after = train_generator(wide, tmp_path, quiet=True)
    assert after["mse"] < before["mse"]
    model = load_generator(tmp_path)
    assert isinstance(model, DiTDH)
    assert model.config == WIDE
    assert model.frequencies.std() > 0.5  # the fixed random frequencies came along
    assert configs.load(GeneratorRun, tmp_path / "config.yaml") == wide
    folder = checkpoint_path(tmp_path, 4)
    assert describe(folder, verify=True)["what"] == "a generator with a wide head"


@pytest.mark.parametrize("model", [None, WIDE])
def test_checkpointed_blocks_train_the_same_model(
    run: GeneratorRun, tmp_path: Path, model: GeneratorConfig | None
) -> None:
    """To the bit, and under the same fingerprint: the model does not depend on how memory is saved."""
    run = run if model is None else replace(run, model=model)
    prints = []
    for blocks in (0, 1, run.model.num_blocks):
        train_generator(replace(run, checkpoint_blocks=blocks), tmp_path / str(blocks), quiet=True)
        prints.append(identity_of(tmp_path / str(blocks)).fingerprint)
    assert len(set(prints)) == 1


def test_a_run_goes_on_with_more_blocks_checkpointed(run: GeneratorRun, tmp_path: Path) -> None:
    """Where memory runs out, the same folder can go on; the result is that of one go."""
    train_generator(run, tmp_path / "one go", quiet=True)
    halfway = replace(run, loop=replace(run.loop, save_every=2))
    task = GeneratorTask(halfway)
    (tmp_path / "two").mkdir()
    updates = task.updates

    def until_step_2(batch: Any, draws: Draws, step: int) -> Any:
        if step == 2:
            raise KeyboardInterrupt
        return updates(batch, draws, step)

    task.updates = until_step_2  # type: ignore[method-assign]
    open_run(tmp_path / "two", halfway)
    with pytest.raises(KeyboardInterrupt):
        fit(task, tmp_path / "two", run.optim, halfway.loop, quiet=True)
    train_generator(replace(halfway, checkpoint_blocks=2), tmp_path / "two", quiet=True)
    one, two = (identity_of(tmp_path / name).fingerprint for name in ("one go", "two"))
    assert one == two


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"checkpoint_blocks": 3}, r"checkpoint_blocks must lie in \[0, 2\], got 3"),
        ({"checkpoint_blocks": -1}, r"checkpoint_blocks must lie in \[0, 2\]"),
        ({"time_shift": 0.0}, "time_shift must be > 0"),
    ],
)
def test_invalid_settings_are_rejected(run: GeneratorRun, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(run, **changes)


def positions(run: GeneratorRun, count: int) -> torch.Tensor:
    """The training positions that the model is asked at."""
    task = GeneratorTask(replace(run, loop=replace(run.loop, global_batch_size=count)))
    seen: list[torch.Tensor] = []
    task.model.register_forward_pre_hook(lambda _, args: seen.append(args[1]))
    batch = next(iter(task.batches(range(1))))
    next(task.updates(batch, Draws(0, 0, range(count), count, torch.device("cpu")), 0))
    return seen[0]


def test_uniform_positions_are_shifted_by_the_dimension(run: GeneratorRun) -> None:
    """C h w = 8 x 4 x 4 = 128: s = sqrt(32), and the inverse shift makes them uniform again."""
    t = positions(replace(run, times="uniform", time_shift=None), 2000).double()
    s = 32**0.5
    uniform = (t / (s - (s - 1) * t)).sort().values
    expected = (torch.arange(2000) + 0.5) / 2000
    assert (uniform - expected).abs().max() < 0.04  # Kolmogorov's bound at 2000 draws and 1 %: 0.036
    plain = positions(replace(run, time_shift=1.0), 2000)
    assert torch.logit(plain).std() == pytest.approx(1, abs=0.06)


@pytest.mark.parametrize(("model", "checkpoint_blocks"), [(None, 0), (WIDE, 1)])
def test_the_full_model_is_one_graph(
    run: GeneratorRun, tmp_path: Path, model: GeneratorConfig | None, checkpoint_blocks: int
) -> None:
    """Captured in full for training and for evaluation, it trains, averages, is saved and samples as without.

    The graph is run as it is; the test marked slow has kernels written for it."""
    model = replace(model or run.model, num_layers=1)
    run = replace(run, model=model, checkpoint_blocks=checkpoint_blocks)
    with double_precision():
        plain, captured = GeneratorTask(run), GeneratorTask(run)
        captured.model.compile(backend="eager", fullgraph=True)
        compare_runs(run, plain, captured, tmp_path)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # of the compiler's own imports
def test_a_compiled_generator_is_the_same(run: GeneratorRun, tmp_path: Path) -> None:
    """loop.compile, with the compiler's own kernels.

    They round the float32 frequencies of the time features in their own way."""
    compiled = replace(run, loop=replace(run.loop, compile=True))
    with double_precision():
        compare_runs(run, GeneratorTask(run), GeneratorTask(compiled), tmp_path, rounding=1e-6)


def compare_runs(
    run: GeneratorRun, plain: GeneratorTask, other: GeneratorTask, tmp_path: Path, rounding: float = 1e-12
) -> None:
    """Equal but for `rounding`, relative, and for what grows from that of float64 in a few steps of Adam."""
    metrics, samples = [], []
    for name, task in (("plain", plain), ("other", other)):
        (tmp_path / name).mkdir()
        metrics.append(fit(task, tmp_path / name, run.optim, run.loop, quiet=True))
        noise = initial_noise(0, range(2), run.model.latent_shape)
        model = task.model.eval()
        samples.append(sample_latents(model, torch.tensor([0, 1]), noise, SamplerConfig(steps=3)))
    growth = growth_of(run, tmp_path / "plain", metrics[0])
    bound = rounding + HEADROOM * growth.metrics
    assert metrics[1] == pytest.approx(metrics[0], rel=bound)
    torch.testing.assert_close(samples[1], samples[0], rtol=bound, atol=bound)
    ours, theirs = (load_generator(tmp_path / name).state_dict() for name in ("plain", "other"))
    assert ours.keys() == theirs.keys() == plain.model.state_dict().keys()  # no "_orig_mod."
    # Adam divides by the gradient: a weight whose gradient is almost 0 may differ by more than the others.
    differences = torch.cat([(theirs[name] - value).flatten() for name, value in ours.items()])
    largest = rounding * 100 * run.optim.lr + HEADROOM * growth.weights
    assert differences.square().mean().sqrt() <= largest
    raw = plain.model.state_dict()
    assert not torch.equal(raw["to_velocity.weight"], ours["to_velocity.weight"])  # the average was saved


def test_a_lightningdit_is_the_default_kind(run: GeneratorRun) -> None:
    plain = configs.to_dict(run)
    assert plain["model"].pop("kind") == "LightningDiTConfig"
    assert configs.from_dict(GeneratorRun, plain) == run
    assert isinstance(GeneratorTask(run).model, LightningDiT)


def test_the_baseline_runs_from_features_to_images(
    run: GeneratorRun, packed: PackedImages, tmp_path: Path
) -> None:
    """RAE at tiny size, as its two presets have it: a decoder of bare features, DiT-DH on them, images."""
    off = [f"--loss.{name}={value}" for name, value in (("mcr", 0), ("gan", 0), ("latent-noise", 0.8))]
    bare = ["--model.fusion", "none", "--model.latent-dim", "48", "--model.width", "None", *off]
    short = ["--loop.steps", "3", "--loop.global-batch-size", "4"]
    folders = {name: str(tmp_path / name) for name in ("rae", "latents", "generator", "samples")}
    images = ["--data.images", str(packed.shards.folder)]
    main(["train-tokenizer", "tokenizer/tiny", folders["rae"], *images, *bare, *short])
    main(["cache-latents", folders["rae"], str(packed.shards.folder), folders["latents"]])
    wide = replace(WIDE, latent_dim=48)
    config = replace(run, model=wide, held_out_latents=None, times="uniform", time_shift=None, cosine=0.0)
    configs.save(replace(config, latents=Path(folders["latents"])), tmp_path / "run.yaml")
    main(["train-generator", str(tmp_path / "run.yaml"), folders["generator"], *short])
    shift = str(dimension_shift(wide.latent_shape))
    draw = ["--count", "3", "--steps", "2", "--shift", shift, "--guidance", "1"]
    main(["sample", folders["rae"], folders["generator"], folders["samples"], *draw])
    with np.load(tmp_path / "samples" / "samples.npz") as samples:
        assert samples["arr_0"].shape == (3, 32, 32, 3)
    model = load_generator(folders["generator"])
    z = Shards(Path(folders["latents"]), kind="latents").gather(np.arange(10), np.zeros(10, dtype=np.int64))
    normal = model.normalise(z)
    assert normal.std() == pytest.approx(1, abs=0.1)


def test_flags_reach_the_generator_that_the_file_holds(run: GeneratorRun, tmp_path: Path) -> None:
    for model, width in ((run.model, 32), (WIDE, 16)):
        configs.save(replace(run, model=model), tmp_path / "run.yaml")
        argv = [str(tmp_path / "run.yaml"), "out", "--model.num-layers", "3"]
        parsed, _ = run_of(GeneratorRun, argv, "train-generator")
        assert parsed == replace(run, model=replace(model, num_layers=3))
        assert parsed.model.hidden_dim == width


def test_the_command_counts_operations_and_draws_samples(
    run: GeneratorRun, tokenizer_folder: Path, image_folder: Path, tmp_path: Path
) -> None:
    configs.save(run, tmp_path / "run.yaml")
    out = tmp_path / "out"
    argv = ["train-generator", str(tmp_path / "run.yaml"), str(out), "--loop.count-operations"]
    argv += ["--tokenizer", str(tokenizer_folder), "--evaluation-images", str(image_folder)]
    main([*argv, "--extractor", "random", "--evaluation-samples", "8", "--sampler.steps", "2"])
    lines = [line for line in read_log(out) if "teraflops" in line]
    rates = [1e12 * line["teraflops"] / line["images_per_second"] for line in lines]
    assert rates == pytest.approx([operations_per_image(run)] * len(rates))
    assert rates
    (file,) = (out / "evaluations").glob("*.png")
    with Image.open(file) as opened:
        picture = np.asarray(opened)
    side = load_tokenizer(tokenizer_folder).config.image_shape[0]
    assert picture.shape == (2 * (side + 2) - 2, 4 * (side + 2) - 2, 3)
    assert len(np.unique(picture)) > 100


@pytest.mark.parametrize("given", [["--model.size", "b"], ["--model.size=b"]])
@pytest.mark.parametrize("preset", ["generator/xl-80ep", "generator/dit-dh-xl"])
def test_one_flag_sets_the_size(
    given: list[str], preset: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Other flags come on top, and fields that are no size keep the values of the file."""
    seen: list[GeneratorRun] = []
    monkeypatch.setattr(
        "openpae.train.generator.train_generator", lambda run, *_, **__: seen.append(run) or {}
    )
    main(["train-generator", preset, "out", *given, "--model.patch-size", "2"])
    expected = configs.load(GeneratorRun, preset)
    model = replace(expected.model, num_layers=12, hidden_dim=768, num_heads=12, patch_size=2)
    assert seen == [replace(expected, model=model)]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--model.size", "xxl"], "unknown size 'xxl'; known: s, b, l, xl, 1p0b, 1p6b"),
        (["--model.size"], "--model.size needs a value"),
        (["--model.size", "b", "--model.size", "l"], "--model.size is given twice: b, l"),
    ],
)
def test_an_unknown_size_is_rejected(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["train-generator", "generator/tiny", "out", *argv])
    assert message in capsys.readouterr().err


def test_an_option_is_taken_out_of_the_arguments() -> None:
    assert take_option(["a", "--x", "1", "b"], "--x") == (["a", "b"], "1")
    assert take_option(["a", "--xy", "1"], "--x") == (["a", "--xy", "1"], None)
