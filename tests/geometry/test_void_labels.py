"""Pixels with the ignored label do not count: SSC against scikit-learn."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.cluster import SpectralClustering
from sklearn.metrics import normalized_mutual_info_score
from torch import Tensor

from openpae.data.images import ImageFolder
from openpae.data.label_maps import read_segmented
from openpae.geometry.measure import measure_tokenizer
from openpae.geometry.metrics import majority_labels, spatial_structure_consistency
from openpae.geometry.settings import MeasureConfig
from openpae.interop.spaces import LatentSpace

pytestmark = pytest.mark.filterwarnings("ignore:eRank of")
VOID = 9


def scene() -> tuple[Tensor, Tensor]:
    """A latent of 6 x 6 tokens, and a map with 4 x 4 pixels per cell: two segments, void rows and corner."""
    labels = torch.zeros(6, 6, dtype=torch.int64)
    labels[:, 3:] = 4
    labels[:2] = VOID
    labels[5, 4:] = VOID
    tokens = torch.randn(6, 6, 8, generator=torch.Generator().manual_seed(1))
    tokens[..., 0] += 1.2 * (labels == 4)
    tokens[:2, :, 1] += 9  # the void forms a third cluster
    return tokens.permute(2, 0, 1)[None], labels.repeat_interleave(4, 0).repeat_interleave(4, 1)[None]


def literal(latent: Tensor, cells: np.ndarray) -> float:
    """NMI over the cells that count, with as many clusters as segments."""
    z = latent.flatten(1).T.double()
    z = z / z.norm(dim=1, keepdim=True)
    affinity = torch.exp(z @ z.T / 0.1).fill_diagonal_(0).numpy()
    counted = cells != VOID
    k = len(set(cells[counted].tolist()))
    clusters = SpectralClustering(k, affinity="precomputed", random_state=0).fit_predict(affinity)
    return float(normalized_mutual_info_score(cells[counted], clusters[counted], average_method="geometric"))


def test_ssc_counts_neither_cells_nor_segment_of_the_void() -> None:
    latents, labels = scene()
    expected = literal(latents[0], labels[0, ::4, ::4].flatten().numpy())
    estimate = spatial_structure_consistency(latents, labels, ignore=VOID)
    assert estimate.value == pytest.approx(expected, abs=1e-6)
    assert estimate.settings["ignore"] == VOID
    assert not math.isclose(
        estimate.value, spatial_structure_consistency(latents, labels).value, abs_tol=0.02
    )


def test_an_image_of_one_segment_and_the_void_is_dropped() -> None:
    latents, labels = scene()
    one = labels.masked_fill(labels == 4, 0)
    estimate = spatial_structure_consistency(
        torch.cat([latents, latents]), torch.cat([one, labels]), ignore=VOID
    )
    assert (estimate.n, estimate.settings["dropped"]) == (1, 1)


def test_a_cell_is_void_only_if_all_its_pixels_are() -> None:
    cell = torch.tensor([[[VOID, VOID, VOID, 3], [VOID, VOID, VOID, VOID]]])
    assert majority_labels(cell, 1, 2, ignore=VOID).tolist() == [[[VOID, 3]]]
    assert majority_labels(cell, 2, 1, ignore=VOID).tolist() == [[[3], [VOID]]]
    assert majority_labels(cell, 1, 2).tolist() == [[[VOID, VOID]]]


def test_a_measurement_ignores_the_void_label(tmp_path: Path) -> None:
    """From label maps on disk to the value."""
    latents, labels = scene()
    for folder in ("images", "maps"):
        (tmp_path / folder).mkdir()
    Image.fromarray(np.zeros((24, 24, 3), np.uint8)).save(tmp_path / "images" / "a.png")
    Image.fromarray(labels[0].numpy().astype(np.uint8)).save(tmp_path / "maps" / "a.png")
    space = LatentSpace(
        name="fixed", kind="python", fingerprint="0", image_size=24, decode=None,
        encode=lambda x: latents.expand(len(x), -1, -1, -1),
    )  # fmt: skip
    segmented = read_segmented(tmp_path / "images", tmp_path / "maps", size=24, ignore=VOID)
    measured = measure_tokenizer(
        space, ImageFolder(tmp_path / "images"), size=24, segmented=segmented, config=MeasureConfig()
    )
    expected = spatial_structure_consistency(latents, labels, ignore=VOID).value
    assert measured.metrics["ssc"].value == pytest.approx(expected, abs=1e-9)
