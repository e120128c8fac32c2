"""Checks of the pretrained pair beyond the metrics of `pae evaluate`, and its pictures.

walk_metrics   is the decode of a moved latent still the same emoji?
copy_metrics   are samples as far from the training pictures as new pictures are?
comparison     the same moves with and without MCR, in labelled rows
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image, ImageDraw
from torch import Tensor

from openpae.data.pixels import image_grid
from openpae.eval.extractors import FeatureExtractor
from openpae.models.lpips import LPIPS
from openpae.models.tokenizer import Autoencoder
from openpae.objective.losses import perturb

ANGLES = (42.5, 85.0)
"""Medium and large angle of MCR, in degrees."""


@dataclasses.dataclass(frozen=True)
class Gallery:
    """One picture of every emoji, as features to look a picture up in."""

    features: Tensor
    """(n, D)."""
    emoji: Tensor
    """Which emoji, (n,)."""
    categories: Tensor
    """Its category, (n,)."""

    def nearest(self, features: Tensor) -> Tensor:
        """The row of the nearest picture (cosine) for each of (m, D): (m,)."""
        similar = F.normalize(features, dim=1) @ F.normalize(self.features, dim=1).T
        return similar.argmax(dim=1)


@torch.no_grad()
def decodes(
    tokenizer: Autoencoder, x: Tensor, angles: Sequence[float] = (0.0, *ANGLES), seed: int = 0
) -> list[Tensor]:
    """Decodes of the latents of images (B, 3, H, W), moved by each angle along one direction an image.

    Args:
        tokenizer: of the pair.
        x: images in [0, 1].
        angles: in degrees; 0 is the reconstruction.
        seed: of the directions.
    """
    z = tokenizer.encode(x)
    direction = torch.randn(z.shape, generator=torch.Generator().manual_seed(seed))
    sphere = tokenizer.config.sphere
    moved = [z if not angle else perturb(z, direction, angle, sphere) for angle in angles]
    return [tokenizer.decode(latent).clamp(0, 1) for latent in moved]


@torch.no_grad()
def walk_metrics(
    tokenizer: Autoencoder,
    x: Tensor,
    own: Tensor,
    gallery: Gallery,
    extractor: FeatureExtractor,
    lpips: LPIPS,
) -> dict[str, Tensor]:
    """Per image: LPIPS of each moved decode to x_r, and whether its nearest picture is the right one.

    Args:
        tokenizer: of the pair.
        x: images in [0, 1], (B, 3, H, W).
        own: the row of each image in the gallery, (B,).
        gallery: one picture of every emoji, these images among them.
        extractor: gives the features of the gallery.
        lpips: the distance.

    Returns:
        By name (`lpips_m`, `same_emoji_m`, `same_category_m` and the same with l): (B,).
    """
    values: dict[str, list[Tensor]] = {}
    for chunk, rows in zip(x.split(64), own.split(64), strict=True):
        still, *moved = decodes(tokenizer, chunk)
        for name, pictures in zip("ml", moved, strict=True):
            nearest = gallery.nearest(extractor.features(pictures).pooled)
            found = {
                f"lpips_{name}": lpips(pictures, still),
                f"same_emoji_{name}": gallery.emoji[nearest] == gallery.emoji[rows],
                f"same_category_{name}": gallery.categories[nearest] == gallery.categories[rows],
            }
            for key, value in found.items():
                values.setdefault(key, []).append(value.float())
    return {key: torch.cat(parts) for key, parts in values.items()}


def copy_distances(features: Tensor, known: Tensor) -> Tensor:
    """Cosine distance of each picture (m, D) to the nearest known one (n, D): (m,), in [0, 2]."""
    return 1 - (F.normalize(features, dim=1) @ F.normalize(known, dim=1).T).amax(dim=1)


def copy_metrics(samples: Tensor, held_out: Tensor) -> dict[str, Tensor]:
    """Whether samples copy, from `copy_distances` of samples and of held-out pictures.

    Returns:
        copies: per sample, whether it is nearer to its nearest training picture than nineteen of twenty
        held-out pictures are to theirs; 0.05 on average where both are distributed alike.
    """
    return {"copies": (samples < torch.quantile(held_out, 0.05)).float()}


def copy_picture(samples: Tensor, held_out: Tensor) -> Figure:
    """Both distributions of `copy_distances`, as shares in bins."""
    figure = Figure(figsize=(6, 3), layout="constrained")
    axes = figure.subplots()
    bins = torch.linspace(0, float(torch.cat([samples, held_out]).max()), 40).tolist()
    for name, values in (("held-out pictures", held_out), ("samples", samples)):
        weights = [1 / len(values)] * len(values)
        axes.hist(values.tolist(), bins=bins, weights=weights, alpha=0.6, label=name)
    axes.set_xlabel("cosine distance to the nearest training picture (VGG16 relu5_3)")
    axes.set_ylabel("share of pictures")
    axes.legend()
    return figure


def labelled(rows: Mapping[str, Tensor], margin: int = 190) -> Image.Image:
    """Rows of pictures (n, 3, H, W) in [0, 1], each under its name at the left."""
    pictures = list(rows.values())
    grid = image_grid(torch.cat(pictures), len(pictures[0]))
    sheet = Image.new("RGB", (margin + grid.width, grid.height), "white")
    sheet.paste(grid, (margin, 0))
    draw = ImageDraw.Draw(sheet)
    step = grid.height / len(rows)
    for number, name in enumerate(rows):
        draw.text((4, (number + 0.5) * step), name, fill="black", anchor="lm", font_size=13)
    return sheet


def comparison(x: Tensor, tokenizers: Mapping[str, Autoencoder]) -> Image.Image:
    """Images, and for each tokenizer by name their decodes at 0, 42.5 and 85 degrees, in labelled rows."""
    rows = {"picture": x}
    for name, tokenizer in tokenizers.items():
        for angle, pictures in zip((0.0, *ANGLES), decodes(tokenizer, x), strict=True):
            rows[f"{name}, {angle:g} degrees" if angle else f"{name}, decode"] = pictures
    return labelled(rows)
