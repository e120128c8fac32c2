"""The pictures of `pae profile`: contents and order of rows and charts."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from openpae.data.images import ImageFolder
from openpae.data.label_maps import Segmented
from openpae.geometry import profile_page
from openpae.geometry.measure import Measured
from openpae.geometry.settings import MeasureConfig
from openpae.interop.spaces import LatentSpace

RADII = (-2, -1, -0.5, -0.1, 0, 0.1, 0.5, 1, 2)
"""rho of LPC's moves (Eq. 10), in the order of the strip."""


class Pages:
    """Collects the rows and charts of a page."""

    def __init__(self) -> None:
        self.shown: dict[str, Any] = {}
        self.lines: dict[str, Any] = {}

    def rows(self, pictures: dict[str, Any], text: str = "") -> None:
        self.shown |= pictures

    def charts(self, lines: dict[str, Any], x: str = "", **options: Any) -> None:
        self.lines |= lines

    def heading(self, text: str) -> None: ...

    def text(self, text: str) -> None: ...


def space(**parts: Any) -> LatentSpace:
    """A tokenizer whose latents are 8 x 8 means of the image; its decoder enlarges them."""
    plain: dict[str, Any] = {
        "name": "means", "kind": "python", "fingerprint": "0", "image_size": 32,
        "encode": lambda x: torch.nn.functional.avg_pool2d(x, 8),
        "decode": lambda z: z.repeat_interleave(8, 2).repeat_interleave(8, 3).clamp(0, 1),
    }  # fmt: skip
    return LatentSpace(**plain | parts)


def test_moves_rise_from_minus_two_to_two() -> None:
    """The decoder collects its latents: z + rho |z| u for rho in order, u drawn for (seed, image)."""
    seen: list[Tensor] = []

    def decode(z: Tensor) -> Tensor:
        seen.append(z)
        return torch.zeros(len(z), 3, 32, 32)

    profile_page._show_moves(Pages(), [space(decode=decode)], torch.rand(2, 3, 32, 32), MeasureConfig(seed=3))  # type: ignore[arg-type]
    assert len(seen) == 2
    for image, strip in enumerate(seen):
        u = np.random.default_rng([3, image]).standard_normal((3, 4, 4))
        u /= np.linalg.norm(u)
        z = strip[4].double().numpy()
        expected = np.stack([z + rho * np.linalg.norm(z) * u for rho in RADII])
        torch.testing.assert_close(strip.double(), torch.from_numpy(expected), rtol=1e-4, atol=1e-5)


def test_singular_values_are_divided_by_the_largest() -> None:
    """The rank axis runs from 0 to 1."""
    measured = Measured(
        name="a", fingerprint="0", latent_shape=(3, 4, 4), metrics={}, undefined={},
        pooled=torch.zeros(5, 3), spectrum=torch.tensor([8.0, 4.0, 1.0]),
    )  # fmt: skip
    page = Pages()
    profile_page._show_spectrum(page, [measured])  # type: ignore[arg-type]
    (lines,) = page.lines.values()
    assert lines["a"] == [(0, 1), (0.5, 0.5), (1, 0.125)]


def test_rows_show_image_latents_and_reconstruction() -> None:
    """Images of one colour equal their reconstructions."""
    images = torch.zeros(2, 3, 32, 32)
    images[0, 0], images[1, 2] = 1, 1  # red, blue
    page = Pages()
    profile_page._show_latents(page, [space()], images)  # type: ignore[arg-type]
    assert list(page.shown) == ["image", "means", "means, decoded"]
    for name in ("image", "means, decoded"):
        row = np.asarray(page.shown[name].convert("RGB"))
        middle = row.shape[1] // 2
        assert (row[5, 5].tolist(), row[5, middle + 5].tolist()) == ([255, 0, 0], [0, 0, 255])


def test_clusters_take_the_colours_of_their_segments_and_void_stays_white() -> None:
    """Latents that follow the map give the picture of the map."""
    labels = torch.zeros(1, 32, 32, dtype=torch.int64)
    labels[:, :, 16:], labels[:, 24:] = 5, 9
    images = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    images[0, 0], images[0, 1] = 255 * (labels[0] == 5), 255 * (labels[0] == 0)
    segmented = Segmented(name="halves", images=images, labels=labels, ignore=9)
    page = Pages()
    profile_page._show_segments(page, [space()], segmented, MeasureConfig())  # type: ignore[arg-type]
    assert list(page.shown) == ["image", "label map", "means"]
    truth, clusters = (np.asarray(page.shown[name].convert("RGB")) for name in ("label map", "means"))
    side = truth.shape[0]
    places = [(side // 4, side // 4), (side // 4, 3 * side // 4), (side - 2, side // 2)]
    assert [clusters[place].tolist() for place in places] == [truth[place].tolist() for place in places]
    assert clusters[places[2]].tolist() == [255, 255, 255]
    assert clusters[places[0]].tolist() != clusters[places[1]].tolist()


def test_neighbours_are_in_the_order_of_their_cosine(image_folder: Any) -> None:
    """The query, then the others by the cosine of centred pooled latents, from known angles."""
    source = ImageFolder(image_folder)
    angles = torch.tensor([0.0, 3.0, 0.1, 2.0, 0.3, 2.5, 0.7, 1.2, 4.0, 5.0])
    pooled = torch.stack([angles.cos(), angles.sin()], dim=1)
    measured = Measured(
        name="a", fingerprint="0", latent_shape=(2, 4, 4), metrics={}, undefined={},
        pooled=pooled, spectrum=torch.ones(2),
    )  # fmt: skip
    order: list[list[int]] = []
    shown = profile_page._shown

    def collect(source: Any, members: Any, size: Any) -> Tensor:
        order.append(list(members))
        return shown(source, members, size)

    profile_page._shown = collect  # type: ignore[assignment]
    try:
        profile_page._show_neighbours(Pages(), [measured], source, np.arange(10), 32)  # type: ignore[arg-type]
    finally:
        profile_page._shown = shown
    x = (pooled - pooled.mean(dim=0)).double().numpy()
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    for query, members in zip((0, 3, 6, 9), order, strict=True):
        expected = sorted((row for row in range(10) if row != query), key=lambda row: -(x[row] @ x[query]))
        assert members == [query, *expected][: len(members)]
        assert len(members) > 3
