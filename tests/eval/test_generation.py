"""Evaluation of generated images in one pass, and references: properties, files, edge cases, errors."""

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from torch import Tensor, distributed, multiprocessing

from openpae.eval.extractors import INCEPTION, Features
from openpae.eval.features import FeatureSet, features_of
from openpae.eval.frechet import frechet_distance, gaussian_of
from openpae.eval.generation import Evaluation, frechet_floor
from openpae.eval.image_stream import tensor_images
from openpae.eval.reference import open_reference, read_reference, reference_of, save_reference
from openpae.eval.scores import kid, precision_recall
from openpae.eval.settings import EvaluationConfig


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


class PixelFeatures:
    """A linear extractor of 8 x 8 thumbnails: enough to be wrong about order, range and batch size."""

    def __init__(self, name: str = "pixels", seed: int = 0) -> None:
        self.name, self.weights = name, f"seed-{seed}"
        generator = torch.Generator().manual_seed(seed)
        self.matrix = torch.randn(192, 24, generator=generator)

    def features(self, images: Tensor) -> Features:
        x = torch.nn.functional.adaptive_avg_pool2d(images, 8).flatten(1)
        return Features(pooled=x @ self.matrix, spatial=x[:, :10], logits=x @ self.matrix[:, :5])


CONFIG = EvaluationConfig(kid_subsets=3, kid_subset_size=20, splits=2, min_samples=2)


def pictures(n: int, seed: int = 0, size: int = 16) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(n, 3, size, size, generator=generator) * torch.rand(n, 3, 1, 1, generator=generator)


def feature_set(images: Tensor, extractor: PixelFeatures | None = None, batch: int = 16) -> FeatureSet:
    features = FeatureSet(extractor or PixelFeatures())
    for part in images.split(batch):
        features.update(part)
    return features


def test_metrics_do_not_depend_on_batches_and_processes() -> None:
    real, fake = pictures(64), pictures(50, seed=1)
    reference = reference_of(feature_set(real), "real")
    together = Evaluation(PixelFeatures(), reference, CONFIG)
    together.update(fake)
    first, second = (Evaluation(PixelFeatures(), reference, CONFIG) for _ in range(2))
    for start in range(0, 50, 10):  # two processes take turns, as samplers do
        first.update(fake[start : start + 5], torch.arange(start, start + 5))
        second.update(fake[start + 5 : start + 10], torch.arange(start + 5, start + 10))
    first.merge(second.samples)
    (one, _), (two, _) = together.compute(), first.compute()
    assert one.keys() == {
        "frechet", "spatial_frechet", "inception_score", "kid", "mind", "precision", "recall",
    }  # fmt: skip
    for name, estimate in one.items():
        assert two[name].value == pytest.approx(estimate.value, rel=1e-5), name
    samples = together.samples
    assert samples.sha256() == first.samples.sha256()
    assert (samples.n, samples.duplicates(), samples.image_size, reference.pooled.n) == (50, 0, (16, 16), 64)


def measure_a_share(rank: int, store: str, out: str) -> None:
    """One of two processes: measure every second image. Rank 0 saves the result."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    shared = FeatureSet(PixelFeatures())
    mine = torch.arange(rank, 50, 2)
    shared.update(pictures(50)[mine], mine.tolist())
    shared.gather()
    if rank == 0:
        torch.save({"features": shared.features(), "covariance": shared.pooled.gaussian().covariance}, out)
    distributed.destroy_process_group()


def test_two_processes_give_the_features_of_one(tmp_path: Path) -> None:
    multiprocessing.spawn(measure_a_share, (str(tmp_path / "store"), str(tmp_path / "out.pt")), nprocs=2)
    shared, alone = torch.load(tmp_path / "out.pt"), feature_set(pictures(50))
    torch.testing.assert_close(shared["features"], alone.features())
    torch.testing.assert_close(shared["covariance"], alone.pooled.gaussian().covariance, rtol=1e-5, atol=1e-5)


def test_evaluation_is_the_sum_of_its_functions() -> None:
    real = feature_set(pictures(64))
    evaluation = Evaluation(PixelFeatures(), reference_of(real, "real"), CONFIG)
    evaluation.update(pictures(50, seed=1))
    metrics, _ = evaluation.compute()
    x, y = evaluation.samples.features(), real.features()
    assert metrics["frechet"].value == pytest.approx(
        frechet_distance(gaussian_of(x), gaussian_of(y)), rel=1e-6
    )
    assert metrics["kid"] == kid(x, y, subsets=3, subset_size=20)
    assert (metrics["precision"], metrics["recall"]) == precision_recall(x, y)
    spatial = [
        torch.nn.functional.adaptive_avg_pool2d((p * 255).round() / 255, 8).flatten(1)[:, :10]
        for p in (pictures(50, seed=1), pictures(64))
    ]
    literal = frechet_distance(*(gaussian_of(s) for s in spatial))
    assert metrics["spatial_frechet"].value == pytest.approx(literal, rel=1e-5)


def test_samples_are_rounded_as_in_saved_files() -> None:
    fake = (pictures(20) * 255).round() / 255
    plain, noisy = feature_set(fake), feature_set((fake + 0.3 / 255).clamp(0, 1))
    assert torch.equal(plain.features(), noisy.features())


def test_reference_file_reads_back(tmp_path: Path) -> None:
    reference = reference_of(feature_set(pictures(30)), "thirty")
    save_reference(reference, tmp_path / "reference.npz")
    saved = read_reference(tmp_path / "reference.npz", PixelFeatures())
    assert torch.equal(saved.pooled.covariance, reference.pooled.covariance)
    assert saved.spatial is not None
    assert saved.features is not None
    assert reference.features is not None
    assert torch.equal(saved.features, reference.features)
    assert (saved.name, saved.sha256, saved.pooled.n) == ("thirty", reference.sha256, 30)
    assert saved.image_size == (16, 16)
    with pytest.raises(ValueError, match=r"pixels with weights seed-0, but .* pixels with seed-1"):
        read_reference(tmp_path / "reference.npz", PixelFeatures(seed=1))


@pytest.mark.parametrize("count", [12, 30], ids=["fewer than features", "more"])
def test_a_saved_reference_gives_the_same_numbers(count: int, tmp_path: Path) -> None:
    fresh = reference_of(feature_set(pictures(count)), "fresh")
    save_reference(fresh, tmp_path / "reference.npz")
    kept = open_reference(tmp_path / "reference.npz", PixelFeatures())
    results = []
    for reference in (fresh, kept):
        evaluation = Evaluation(
            PixelFeatures(), reference, EvaluationConfig(min_samples=2, kid_subset_size=5)
        )
        evaluation.merge(features_of(tensor_images(pictures(20, seed=1)), PixelFeatures(), 7))
        results.append(evaluation.compute()[0])
    assert results[0].keys() >= {"frechet", "spatial_frechet", "kid", "precision", "recall"}
    for name, estimate in results[0].items():
        assert results[1][name].value == pytest.approx(estimate.value, rel=1e-9), name
    assert fresh.sha256 == kept.sha256


@pytest.fixture
def adm(tmp_path: Path) -> dict[str, np.ndarray]:
    images = (pictures(30) * 255).round().permute(0, 2, 3, 1).to(torch.uint8).numpy()
    features = feature_set(pictures(90, seed=3))
    assert features.spatial is not None
    pooled, spatial = features.pooled.gaussian(), features.spatial.gaussian()
    return {
        "arr_0": images,
        "mu": pooled.mean.numpy(), "sigma": pooled.covariance.numpy(),
        "mu_s": spatial.mean.numpy(), "sigma_s": spatial.covariance.numpy(),
    }  # fmt: skip


def test_adm_file_gives_statistics_from_its_arrays_and_features_from_its_images(
    adm: dict[str, np.ndarray], tmp_path: Path
) -> None:
    np.savez(tmp_path / "adm.npz", **adm)
    reference = read_reference(tmp_path / "adm.npz", PixelFeatures(INCEPTION), batch_size=7)
    assert torch.equal(reference.pooled.mean, torch.from_numpy(adm["mu"]))
    assert reference.spatial is not None
    assert torch.equal(reference.spatial.covariance, torch.from_numpy(adm["sigma_s"]))
    assert reference.features is not None
    torch.testing.assert_close(reference.features, feature_set(pictures(30)).features())
    with pytest.raises(
        ValueError, match="statistics of inception-2015, which do not compare with features of pix"
    ):
        read_reference(tmp_path / "adm.npz", PixelFeatures())


def test_adm_statistics_alone_leave_three_metrics_undefined(
    adm: dict[str, np.ndarray], tmp_path: Path
) -> None:
    del adm["arr_0"]
    np.savez_compressed(tmp_path / "adm.npz", **adm)
    extractor = PixelFeatures(INCEPTION)
    evaluation = Evaluation(extractor, read_reference(tmp_path / "adm.npz", extractor), CONFIG)
    evaluation.update(pictures(40))
    metrics, undefined = evaluation.compute()
    assert metrics.keys() == {"frechet", "spatial_frechet", "inception_score"}
    assert undefined.keys() == {"kid", "mind", "precision", "recall"}
    assert "statistics only" in undefined["kid"]
    assert evaluation.reference.pooled.n is None


def test_npz_of_images_alone_is_a_reference_for_any_extractor(
    adm: dict[str, np.ndarray], tmp_path: Path
) -> None:
    np.savez(tmp_path / "images.npz", adm["arr_0"])
    reference = read_reference(tmp_path / "images.npz", PixelFeatures(), batch_size=8)
    same = reference_of(feature_set(pictures(30)), "x")
    torch.testing.assert_close(reference.pooled.covariance, same.pooled.covariance)
    assert reference.sha256 == same.sha256


def test_sets_that_are_too_small_leave_metrics_undefined() -> None:
    reference = reference_of(feature_set(pictures(64)), "real")
    evaluation = Evaluation(PixelFeatures(), reference, EvaluationConfig(min_samples=2))
    evaluation.update(pictures(3))
    _, undefined = evaluation.compute()
    assert undefined["kid"] == "3 images are fewer than kid_subset_size = 1000"
    assert undefined["precision"] == "3 images have no neighbour 3"
    assert "splits = 10" in undefined["inception_score"]


def test_few_samples_and_duplicates_give_a_warning() -> None:
    reference = reference_of(feature_set(pictures(64)), "real")
    evaluation = Evaluation(PixelFeatures(), reference, EvaluationConfig(kid_subset_size=20))
    images = pictures(30)
    evaluation.update(images)
    with pytest.warns(UserWarning, match=r"only 30 samples \(min_samples = 10000\)"):
        evaluation.compute()
    evaluation.update(images[:10])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        evaluation.compute()
    assert evaluation.samples.duplicates() == 10
    assert any("10 of 40 samples equal an earlier one" in str(w.message) for w in caught)


def test_black_images_give_a_warning() -> None:
    with pytest.warns(UserWarning, match="divided by 255 twice"):
        FeatureSet(PixelFeatures()).update(pictures(4) / 255)


def test_floor_of_real_images_is_that_of_two_sets_without_a_common_image() -> None:
    """The mean over three draws of disjoint sets, SciPy's square root in the Frechet distance."""
    real = torch.randn(400, 12)
    for n in (25, 200):
        values = []
        for seed in (5, 6, 7):
            rows = torch.randperm(400, generator=torch.Generator().manual_seed(seed))
            a, b = (real[part].double().numpy() for part in (rows[:n], rows[n : 2 * n]))
            covariances = [np.cov(x, rowvar=False) for x in (a, b)]
            root = sqrtm(covariances[0] @ covariances[1]).real
            shift = np.square(a.mean(axis=0) - b.mean(axis=0)).sum()
            values.append(shift + np.trace(covariances[0] + covariances[1] - 2 * root))
        floor = frechet_floor(real, n, seed=5)
        assert floor.value == pytest.approx(np.mean(values), rel=1e-4)
        assert floor.std == pytest.approx(np.std(values, ddof=1), rel=1e-3)
        assert floor.settings["samples"] == n
    with pytest.raises(ValueError, match=r"between 2 and 200 \(half of 400 images\), got 201"):
        frechet_floor(real, 201)


def test_images_out_of_shape_or_range_are_refused() -> None:
    features = FeatureSet(PixelFeatures())
    cases = [
        (pictures(2) * 2 - 1, r"must lie in \[0, 1\], got values from -"),
        (pictures(2) * 255, r"divide \[0, 255\] by 255"),
        (pictures(2) * float("nan"), "images hold NaN; look at the weights"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), "must be float in .*, got torch.uint8"),
        (torch.rand(2, 1, 8, 8), r"RGB \(B, 3, H, W\) with B > 0, got \(2, 1, 8, 8\)"),
    ]
    for images, message in cases:
        with pytest.raises(ValueError, match=message):
            features.update(images)
    assert features.n == 0
    features.update(pictures(2))
    with pytest.raises(ValueError, match=r"one size, got \(8, 8\) after \(16, 16\)"):
        features.update(pictures(2, size=8))
    with pytest.raises(ValueError, match="each of the 2 images, got 1 numbers"):
        features.update(pictures(2), [3])


def test_samples_and_references_that_do_not_fit_are_refused() -> None:
    reference = reference_of(feature_set(pictures(20)), "real")
    with pytest.raises(ValueError, match=r"pixels with weights seed-0, but .* by pixels with seed-1"):
        Evaluation(PixelFeatures(seed=1), reference, CONFIG)
    evaluation = Evaluation(PixelFeatures(), reference, CONFIG)
    with pytest.raises(ValueError, match=r"size of the reference, \(16, 16\), got \(32, 32\)"):
        evaluation.update(pictures(2, size=32))
    evaluation.update(pictures(1))
    with pytest.raises(ValueError, match="at least 2 samples, got 1"):
        evaluation.compute()
    with pytest.raises(ValueError, match=r"both sets hold the images 0 \(1 in all\)"):
        evaluation.merge(evaluation.samples)
    with pytest.raises(ValueError, match=r"size of the reference, \(16, 16\), got \(8, 8\)"):
        evaluation.merge(feature_set(pictures(2, size=8)))
    with pytest.raises(ValueError, match=r"cannot merge features of pixels \(seed-1\)"):
        feature_set(pictures(2)).merge(feature_set(pictures(2), PixelFeatures(seed=1)))
    with pytest.raises(ValueError, match="no images were given"):
        FeatureSet(PixelFeatures()).features()


def test_damaged_references_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no reference at"):
        read_reference(tmp_path / "none.npz", PixelFeatures())
    (tmp_path / "text.npz").write_text("no archive")
    with pytest.raises(ValueError, match=r"text\.npz is no npz file"):
        read_reference(tmp_path / "text.npz", PixelFeatures())
    np.savez(tmp_path / "other.npz", labels=np.zeros(3), x=np.zeros(3))
    with pytest.raises(ValueError, match="must hold mu and sigma, or images as arr_0; it holds: labels, x"):
        read_reference(tmp_path / "other.npz", PixelFeatures())
    np.savez(tmp_path / "float.npz", np.zeros((2, 8, 8, 3)))
    with pytest.raises(
        ValueError, match=r"uint8 images \(N, H, W, 3\) from 0 to 255, got float64 \(2, 8, 8, 3\)"
    ):
        read_reference(tmp_path / "float.npz", PixelFeatures())
