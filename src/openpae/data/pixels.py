"""Tensors of pixels: value ranges, checks, hashes, grids, and pictures of latents and labels."""

from __future__ import annotations

import hashlib
import math
import unicodedata
from collections.abc import Iterable, Sequence

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from openpae.runtime.escape import one_line
from openpae.runtime.extras import needs

_LONGEST_NAME = 32
"""Characters of a name beside a row of a grid."""


def to_unit(levels: Tensor) -> Tensor:
    """Levels in [0, 255], any shape, as float32 in [0, 1]."""
    return levels.float() / 255


def check_images(images: Tensor, name: str = "images") -> None:
    """Raise ValueError for anything but a batch of RGB images (B, 3, H, W) in [0, 1]."""
    if images.ndim != 4 or images.shape[1] != 3 or images.shape[0] == 0:
        raise ValueError(f"{name} must be RGB (B, 3, H, W) with B > 0, got {tuple(images.shape)}")
    if not images.is_floating_point():
        raise ValueError(f"{name} must be float in [0, 1], got {images.dtype}; divide uint8 images by 255")
    low, high = float(images.min()), float(images.max())
    _refuse_nan(low, name)
    if not (low >= 0 and high <= 1):
        raise ValueError(
            f"{name} must lie in [0, 1], got values from {low:.4g} to {high:.4g}; clamp a decoder's output, "
            f"map [-1, 1] by (x + 1) / 2, divide [0, 255] by 255"
        )


def quantize(images: Tensor) -> Tensor:
    """Round images in [0, 1] to 256 levels: uint8, same shape.

    Raises:
        ValueError: not RGB images in [0, 1].
    """
    check_images(images)
    return (images.float() * 255).round().to(torch.uint8)


def hashes_of(levels: Tensor) -> list[bytes]:
    """A hash of 16 bytes for each image of levels, uint8 (B, 3, H, W), over its pixels with channels last."""
    pixels = levels.permute(0, 2, 3, 1).contiguous().cpu().numpy()
    return [hashlib.blake2b(image.tobytes(), digest_size=16).digest() for image in pixels]


def hash_of_all(hashes: Iterable[bytes]) -> str:
    """SHA-256 over the sorted results of `hashes_of`, hexadecimal: independent of the order."""
    return hashlib.sha256(b"".join(sorted(hashes))).hexdigest()


def image_grid(images: Tensor, columns: int, gap: int = 2, *, rows: Sequence[str] = ()) -> Image.Image:
    """Images (n, 3, H, W) in [0, 1] in rows of `columns`, on white, with the names of the rows on their left.

    Names are drawn in ASCII: accents are left out, and other letters are question marks.
    """
    n, _, height, width = images.shape
    grid = torch.ones(3, -(-n // columns) * (height + gap) - gap, columns * (width + gap) - gap)
    for i, image in enumerate(images.detach().float().cpu()):
        top, left = i // columns * (height + gap), i % columns * (width + gap)
        grid[:, top : top + height, left : left + width] = image
    return _with_names(to_image(grid), rows, height + gap) if rows else to_image(grid)


def _with_names(picture: Image.Image, names: Sequence[str], step: int) -> Image.Image:
    """A picture with a name on the left of each row of `step` pixels."""
    texts = [_drawable(name) for name in names]
    font = ImageFont.load_default(max(10, min(24, step // 5)))
    margin = 8 + math.ceil(max(font.getlength(text) for text in texts))
    named = Image.new("RGB", (picture.width + margin, picture.height), "white")
    named.paste(picture, (margin, 0))
    draw = ImageDraw.Draw(named)
    for row, text in enumerate(texts):
        draw.text((margin - 4, row * step + step // 2), text, fill="black", font=font, anchor="rm")
    return named


def _drawable(name: str) -> str:
    """A name in the letters of Pillow's own font, on one line, not too long."""
    letters = unicodedata.normalize("NFKD", one_line(name))
    text = "".join(c for c in letters if not unicodedata.combining(c)).encode("ascii", "replace").decode()
    return text if len(text) <= _LONGEST_NAME else f"{text[: _LONGEST_NAME - 3]}..."


def to_image(pixels: Tensor) -> Image.Image:
    """Pixels (3, H, W) in [0, 1] as a Pillow image.

    Raises:
        ValueError: a pixel is NaN.
    """
    _refuse_nan(float(pixels.min()), "pixels")
    levels = (pixels.detach().float().cpu().clamp(0, 1) * 255).round().to(torch.uint8)
    return Image.fromarray(levels.permute(1, 2, 0).numpy())


def _refuse_nan(lowest: float, name: str) -> None:
    """Raise ValueError if the lowest value is NaN: as a uint8 it would be a colour."""
    if math.isnan(lowest):
        raise ValueError(
            f"{name} hold NaN; look at the weights of the model, and at guidance and shift of the sampler"
        )


def pca_pictures(z: Tensor, size: int) -> Tensor:
    """Latents as colours: the first three principal components of all tokens, (B, 3, H, W) in [0, 1].

    Args:
        z: latents, (B, C, h, w). Colours are comparable only within the batch.
        size: longer side of the pictures in pixels; each token becomes a square.
    """
    tokens = z.float().permute(0, 2, 3, 1).reshape(-1, z.shape[1])
    centred = tokens - tokens.mean(dim=0)
    _, _, directions = torch.linalg.svd(centred, full_matrices=False)
    scores = centred @ directions[:3].T
    low, high = (torch.quantile(scores, q, dim=0) for q in (0.01, 0.99))
    colours = ((scores - low) / (high - low).clamp(min=1e-8)).clamp(0, 1)
    pictures = colours.view(len(z), *z.shape[-2:], -1).permute(0, 3, 1, 2)
    if pictures.shape[1] < 3:  # fewer than three latent channels
        empty = pictures.new_zeros(len(z), 3 - pictures.shape[1], *z.shape[-2:])
        pictures = torch.cat([pictures, empty], dim=1)
    return torch.nn.functional.interpolate(pictures, size=_fitting(z, size), mode="nearest")


def label_pictures(labels: Tensor, size: int) -> Tensor:
    """Label maps (B, h, w) in 20 colours, negative labels white: (B, 3, H, W) in [0, 1].

    The longer side becomes `size` pixels.
    """
    with needs("report", "a picture of labels"):
        from matplotlib import colormaps

    table = [colormaps["tab20"](k % 20)[:3] for k in [*range(0, 20, 2), *range(1, 20, 2)]]
    colours = torch.tensor([*table, (1.0, 1.0, 1.0)])
    index = torch.where(labels < 0, len(table), labels.remainder(len(table)))
    return torch.nn.functional.interpolate(
        colours[index].permute(0, 3, 1, 2), size=_fitting(labels, size), mode="nearest"
    )


def thumbnails(images: Tensor, size: int) -> Tensor:
    """Images (B, 3, H, W) in [0, 1], scaled so that the longer side is `size`."""
    x = images.detach().float().cpu()
    shape = _fitting(x, size)
    if x.shape[-2:] == shape:
        return x
    scaled = torch.nn.functional.interpolate(x, shape, mode="bicubic", antialias=True)
    return scaled.clamp(0, 1)


def _fitting(pictures: Tensor, size: int) -> tuple[int, int]:
    """(H, W) in the proportion of pictures (..., h, w), the longer side `size`."""
    h, w = pictures.shape[-2:]
    return (max(1, round(h * size / max(h, w))), max(1, round(w * size / max(h, w))))


def framed(images: Tensor, colours: Sequence[str], width: int = 4) -> Tensor:
    """Images (B, 3, H, W) in [0, 1], each with a border of its colour (such as "#2f9e6e") over its edge."""
    framed = images.detach().float().cpu().clone()
    for image, colour in zip(framed, colours, strict=True):
        rgb = torch.tensor([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])[:, None, None]
        inner = image[:, width:-width, width:-width].clone()
        image[:] = rgb
        image[:, width:-width, width:-width] = inner
    return framed
