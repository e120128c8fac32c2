"""A cache of refined targets belongs to one prior and to one cache of features."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from openpae.data.caches import cache_features, cache_targets
from openpae.data.images import PackedImages
from openpae.data.shards import Shards


@pytest.fixture
def features(packed: PackedImages, tmp_path: Path) -> Shards:
    return cache_features(
        lambda x: torch.nn.functional.avg_pool2d(x, 8).flatten(2).mT,
        packed, tmp_path / "features", image_size=32, shape=(16, 3), encoder_fingerprint="0", flips=True,
        batch_size=4, per_shard=4,
    )  # fmt: skip


def filled(features: Shards, folder: Path, **changes: Any) -> Shards:
    options: dict[str, Any] = {"prior_fingerprint": "one", "latent_dim": 3, "per_shard": 4}
    return cache_targets(lambda x: 2 * x.float(), features, folder, **options | changes)


def test_targets_are_those_of_the_features_row_by_row(features: Shards, tmp_path: Path) -> None:
    found = filled(features, tmp_path / "targets")
    rows = torch.arange(10).numpy()
    assert torch.equal(found.gather(rows), 2 * features.gather(rows))
    assert found.attributes["prior"] == "one"
    assert found.labels.tolist() == features.labels.tolist()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prior_fingerprint": "two"}, r"attributes.prior \(one there, two now\)"),
        ({"latent_dim": 4}, r"shape \(\[2, 16, 3\] there, \[2, 16, 4\] now\)"),
    ],
)
def test_another_prior_is_refused(
    features: Shards, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    filled(features, tmp_path / "targets")
    with pytest.raises(ValueError, match=f"begun with another {message}"):
        filled(features, tmp_path / "targets", **changes)
