"""Pictures of several images: which one stands where."""

from __future__ import annotations

import numpy as np
import torch

from openpae.data.pixels import image_grid, label_pictures, quantize, to_image


def test_a_grid_is_filled_row_by_row_from_the_top_left() -> None:
    """Seven images of 4 x 6 pixels in rows of three, with two white pixels between; the last row is short."""
    greys = 30 * torch.arange(7)
    grid = np.asarray(image_grid((greys / 255).view(7, 1, 1, 1).expand(7, 3, 4, 6), columns=3))
    assert grid.shape == (3 * 4 + 2 * 2, 3 * 6 + 2 * 2, 3)
    expected = np.full(grid.shape, 255)
    for number, grey in enumerate(greys.tolist()):
        row, column = divmod(number, 3)
        expected[6 * row : 6 * row + 4, 8 * column : 8 * column + 6] = grey
    assert (grid == expected).all()


def test_names_of_rows_stand_beside_them() -> None:
    """Six black images in two rows: each name is in its row's half of the margin, and the images stay."""
    images = torch.zeros(6, 3, 20, 20)
    plain = np.asarray(image_grid(images, 3))
    named = np.asarray(image_grid(images, 3, rows=["0 cat", "1 dog"]))
    margin = named.shape[1] - plain.shape[1]
    assert (named[:, margin:] == plain).all()
    dark = named[:, :margin].min(axis=2) < 128
    assert dark[:20].any()
    assert not dark[20:22].any()
    assert dark[22:].any()
    assert dark[:20].tolist() != dark[22:].tolist()


def test_a_name_of_any_letters_is_drawn_on_one_line() -> None:
    """Accents are left out, other letters are question marks, and line ends are escaped."""
    images = torch.zeros(1, 3, 20, 20)
    for name, drawn in (
        ("caf\u00e9", "cafe"),
        ("\u732b", "?"),
        ("a\nb\x1b", r"a\nb\x1b"),
        ("x" * 100, "x" * 29 + "..."),
    ):
        pictures = [np.asarray(image_grid(images, 1, rows=[text])) for text in (name, drawn)]
        assert np.array_equal(*pictures)


def test_pixels_keep_their_places_and_colours() -> None:
    pixels = torch.zeros(3, 2, 3)
    pixels[0, 0, 1], pixels[1, 1, 0], pixels[2, 1, 2] = 1, 1, 1
    image = to_image(pixels)
    assert image.size == (3, 2)
    found = {place: image.getpixel(place) for place in ((1, 0), (0, 1), (2, 1), (0, 0))}
    assert found == {(1, 0): (255, 0, 0), (0, 1): (0, 255, 0), (2, 1): (0, 0, 255), (0, 0): (0, 0, 0)}


def test_levels_are_rounded_to_the_nearest() -> None:
    """What a file holds and what a metric measures are one."""
    x = (
        torch.tensor([0.0, 0.4 / 255, 0.6 / 255, 127.4 / 255, 127.6 / 255, 1.0])
        .view(1, 1, 2, 3)
        .expand(1, 3, 2, 3)
    )
    assert quantize(x)[0, 0].flatten().tolist() == [0, 0, 1, 127, 128, 255]
    assert np.asarray(to_image(x[0]))[..., 0].flatten().tolist() == [0, 0, 1, 127, 128, 255]


def test_label_pictures_have_a_colour_for_each_label_and_white_for_none() -> None:
    labels = torch.tensor([[[0, 1], [2, -1]]])
    (picture,) = label_pictures(labels, 2)
    colours = {tuple(round(float(v), 3) for v in picture[:, i, j]) for i in range(2) for j in range(2)}
    assert len(colours) == 4
    assert picture[:, 1, 1].tolist() == [1.0, 1.0, 1.0]
