"""Inception Score, KID, MIND, precision and recall: properties, references, errors."""

import numpy as np
import pytest
import scipy.special
import torch
from torch import Tensor

from openpae.eval.frechet import frechet_distance, gaussian_of
from openpae.eval.scores import inception_score, kid, monge_inception_distance, precision_recall
from openpae.eval.settings import EvaluationConfig


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def features(n: int, width: int = 12, shift: float = 0.0, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=torch.Generator().manual_seed(99))
    return torch.randn(n, width, generator=generator) @ mixing + shift


def test_inception_score_runs_from_one_to_the_number_of_classes() -> None:
    assert inception_score(torch.zeros(40, 8), splits=4).value == pytest.approx(1)
    confident = 2000.0 * torch.eye(8).repeat(5, 1)  # softmax underflows to exact zeros
    assert inception_score(confident, splits=1).value == pytest.approx(8)


def test_inception_score_equals_its_definition() -> None:
    logits = torch.randn(103, 6) * 2
    p = scipy.special.softmax(logits.double().numpy()[np.random.RandomState(2020).permutation(103)], axis=1)
    scores = []
    for i in range(5):
        part = p[i * 103 // 5 : (i + 1) * 103 // 5]
        scores.append(np.exp(np.mean([np.sum(q * np.log(q / part.mean(0))) for q in part])))
    estimate = inception_score(logits, splits=5)
    assert estimate.value == pytest.approx(np.mean(scores), rel=1e-9)
    assert estimate.std == pytest.approx(np.std(scores), rel=1e-9)


@pytest.mark.parametrize(
    ("sizes", "subsets", "m"),
    [((50, 60), 4, 11), ((50, 60), 40, 11), ((1100, 1050), 3, 1000)],
    ids=["own kernels", "one kernel", "one kernel in tiles"],
)
def test_kid_equals_its_definition_on_the_subsets_of_torch_fidelity(
    sizes: tuple[int, int], subsets: int, m: int
) -> None:
    x, y = features(sizes[0]).double(), features(sizes[1], shift=0.5, seed=1).double()
    draw, values = np.random.RandomState(7), []
    for _ in range(subsets):
        a = x.numpy()[draw.choice(len(x), m, replace=False)]
        b = y.numpy()[draw.choice(len(y), m, replace=False)]
        xx, yy, xy = ((p @ q.T / 12 + 1) ** 3 for p, q in ((a, a), (b, b), (a, b)))
        within = xx.sum() - np.trace(xx) + yy.sum() - np.trace(yy)
        values.append(within / (m * (m - 1)) - 2 * xy.mean())
    estimate = kid(x, y, subsets=subsets, subset_size=m, seed=7)
    assert estimate.value == pytest.approx(np.mean(values), rel=1e-9)
    assert estimate.std == pytest.approx(np.std(values), rel=1e-9)


def test_kid_of_a_set_and_itself_counts_each_image_with_its_copy() -> None:
    """One subset of all rows: the pairs i = j are left out within a set, and not between the sets."""
    x = features(30).double()
    kernel = (x @ x.T / 12 + 1) ** 3
    m, trace = 30, kernel.trace()
    expected = 2 * (kernel.sum() - trace) / (m * (m - 1)) - 2 * kernel.sum() / m**2
    for subsets in (1, 2):  # own kernels, one kernel
        assert kid(x, x, subsets=subsets, subset_size=m).value == pytest.approx(float(expected), rel=1e-9)


def test_the_error_of_kid_in_float32_is_bounded_by_the_rounding_of_its_products() -> None:
    """Each of the F products and sums of x . y / F rounds once; the cube triples the relative error."""
    width = 64
    x, y = features(300, width).relu(), features(300, width, seed=1).relu()  # x . y has no cancellation
    exact = kid(x.double(), y.double(), subsets=3, subset_size=200).value
    largest = float((torch.cat([x, y]).double() @ torch.cat([x, y]).double().T / width + 1).max() ** 3)
    unit = torch.finfo(torch.float32).eps / 2
    value = kid(x, y, subsets=3, subset_size=200).value
    assert abs(value - exact) <= 4 * largest * 3 * (width + 4) * unit


def test_kid_has_no_bias_where_the_frechet_distance_has() -> None:
    """Two samples of one distribution: KID is zero within its error, the Frechet distance is not."""
    x, y = features(600), features(600, seed=1)
    estimate = kid(x, y, subsets=40, subset_size=100)
    assert estimate.std is not None
    assert abs(estimate.value) < estimate.std
    assert frechet_distance(gaussian_of(x[:40]), gaussian_of(y[:40])) > 1


def test_precision_and_recall_equal_their_definition() -> None:
    x, y = features(90, 4), features(110, 4, shift=1.0, seed=1)
    shares = precision_recall(x, y, k=3, block=32)
    a, b = x.double().numpy(), y.double().numpy()

    def covered(points: np.ndarray, centres: np.ndarray) -> float:
        radii = [np.sort(np.linalg.norm(centres - c, axis=1))[3] for c in centres]
        distances = np.array([[np.linalg.norm(p - c) for c in centres] for p in points])
        return np.mean((distances <= radii).any(axis=1))

    assert shares[0].value == pytest.approx(covered(a, b), rel=1e-4)
    assert shares[1].value == pytest.approx(covered(b, a), rel=1e-4)
    assert 0.1 < shares[0].value < 0.95
    assert shares == precision_recall(x, y, k=3, block=1000)


def test_precision_and_recall_separate_two_failures() -> None:
    y = features(200, 4)
    y[100:] += 1000
    same = precision_recall(y, y)
    assert [e.value for e in same] == [1, 1]
    one_mode = precision_recall(features(100, 4, seed=1), y)
    assert one_mode[0].value > 0.9
    assert one_mode[1].value < 0.51
    assert [e.value for e in precision_recall(y - 5000, y)] == [0, 0]


def test_bad_settings_are_refused() -> None:
    x = features(10)
    with pytest.raises(ValueError, match="splits must be between 1 and the 10 samples, got 11"):
        inception_score(x, splits=11)
    with pytest.raises(ValueError, match="between 2 and the 10 samples of the smaller set, got 1000"):
        kid(x, features(2000))
    with pytest.raises(ValueError, match="got k = 10 for 10 samples and 20 reference images"):
        precision_recall(x, features(20), k=10)
    with pytest.raises(ValueError, match=r"of one width, got \(10, 12\) and \(10, 4\)"):
        kid(x, features(10, 4), subset_size=5)
    with pytest.raises(ValueError, match="kid_subset_size must be >= 2, got 1"):
        EvaluationConfig(kid_subset_size=1)


def test_precision_and_recall_do_not_depend_on_the_blocks() -> None:
    """Blocks share products between rows and columns; every share equals that of the direct formula."""
    x, y, k = features(53), features(41, shift=0.8, seed=1), 3
    radii = [torch.cdist(s.double(), s.double()).kthvalue(k + 1, dim=1).values for s in (x, y)]
    across = torch.cdist(x.double(), y.double())
    expected = [
        float((across <= radii[1]).any(dim=1).double().mean()),
        float((across <= radii[0][:, None]).any(dim=0).double().mean()),
    ]
    assert 0 < min(expected) < max(expected) < 1
    for block in (1, 7, 16, 100):
        assert [share.value for share in precision_recall(x, y, k=k, block=block)] == pytest.approx(expected)


def test_mind_against_numpy() -> None:
    draw = np.random.default_rng(1)
    x, y = draw.normal(size=(40, 6)), draw.normal(size=(40, 6)) + 0.5
    u = np.random.default_rng(2020).standard_normal((1000, 6))
    u /= np.linalg.norm(u, axis=1, keepdims=True)
    values = [3 * 6 * np.mean((np.sort(x @ one) - np.sort(y @ one)) ** 2) for one in u]
    result = monge_inception_distance(torch.from_numpy(x), torch.from_numpy(y))
    assert result.value == pytest.approx(np.mean(values), rel=1e-5)
    assert result.stderr == pytest.approx(np.std(values, ddof=1) / 1000**0.5, rel=1e-4)


def test_mind_of_a_shift_is_three_times_its_square() -> None:
    """The mean of (u . d)^2 over the sphere is |d|^2 / F."""
    x, shift = torch.randn(500, 8), torch.linspace(-1, 1, 8)
    result = monge_inception_distance(x, x + shift, projections=20_000)
    # (u . d)^2 has a standard deviation below sqrt(2) of its mean: 1 % over 20,000 directions.
    assert result.value == pytest.approx(3 * float(shift.square().sum()), rel=0.04)
    assert monge_inception_distance(x, x[torch.randperm(500)]).value == pytest.approx(0, abs=1e-9)


def test_mind_draws_from_the_larger_set() -> None:
    x = torch.randn(300, 5)
    part = monge_inception_distance(x[:100], x)
    assert part.settings == {"samples": 100, "reference": 300, "used": 100, "seed": 2020}
    assert 0 < part.value < 1
    with pytest.raises(ValueError, match="features must be"):
        monge_inception_distance(x, torch.randn(10, 4))
