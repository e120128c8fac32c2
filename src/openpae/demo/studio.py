"""What the demo computes: from pictures, angles, classes and seeds to pictures and sentences."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from PIL import Image
from sklearn.cluster import KMeans
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]
from torch import Tensor

from openpae.data.openmoji import CATEGORIES
from openpae.data.pixels import image_grid, label_pictures, pca_pictures, thumbnails, to_image
from openpae.demo.inputs import as_pixels
from openpae.eval.reconstruction import psnr
from openpae.geometry.clusters import spectral_clusters
from openpae.geometry.metrics import (
    latent_perturbation_consistency,
    majority_labels,
    spatial_structure_consistency,
)
from openpae.models.generator import LatentGenerator
from openpae.models.lpips import LPIPS
from openpae.models.lpips_weights import load_perceptual
from openpae.models.saved import check_pair, load_generator, load_tokenizer
from openpae.models.tokenizer import Autoencoder
from openpae.objective.losses import perturb, reached_angle
from openpae.runtime.draws import initial_noise
from openpae.sampling.interpolation import interpolate_images, interpolate_seeds
from openpae.sampling.sampler import sample_images
from openpae.sampling.settings import SamplerConfig
from openpae.storage.model_folder import read_classes, trained_classes

Picture = str | Path | Image.Image | None
"""An image file, a drawing, or an empty field."""
ANGLES = (0.0, 15.0, 30.0, 42.5, 60.0, 75.0, 85.0)
"""Degrees of the strip below a move; MCR trains at 42.5 and 85."""
_SIDE = 256  # longer side of the pictures of the page, in pixels
_LARGEST_ANGLE = 89.99  # the tangent of 90 degrees is infinite


@dataclass(frozen=True)
class Encoded:
    """A picture, what the tokenizer makes of it, and what that says."""

    pictures: tuple[Image.Image, ...]
    """Picture, decode, latent as colours, colour segments, clusters of the latent."""
    text: str


@dataclass(frozen=True)
class Studio:
    """A tokenizer, and the generator of its latents if there is one.

    Args:
        tokenizer: with its encoder, in evaluation mode.
        generator: makes latents by class; None leaves samples out.
        classes: label -> name, for the classes that the generator saw.
    """

    tokenizer: Autoencoder
    generator: LatentGenerator | None = None
    classes: dict[int, str] = field(default_factory=dict)

    @classmethod
    def load(
        cls, tokenizer: str | Path, generator: str | Path | None, device: torch.device, *, emoji: bool = False
    ) -> Studio:
        """Load from model or run folders.

        Args:
            tokenizer: folder of the tokenizer.
            generator: folder of the generator, or None.
            device: device of both.
            emoji: name the classes after the nine groups of emoji where the folder names none.

        Raises:
            FileNotFoundError: no such folder.
            ValueError: the two do not belong together, or weights are damaged.
        """
        if generator is None:
            return cls(load_tokenizer(tokenizer).to(device))
        check_pair(tokenizer, generator)
        model = load_generator(generator).to(device)
        count = model.config.num_classes
        known = read_classes(generator)
        default = CATEGORIES if emoji else [f"class {label}" for label in range(count)]
        names = default if known is None else known[0]
        return cls(
            load_tokenizer(tokenizer).to(device),
            model,
            {label: names[label] for label in trained_classes(generator, count)},
        )

    @cached_property
    def lpips(self) -> LPIPS:
        """AlexNet's LPIPS; the first use downloads its weights if they are not in the cache."""
        return load_perceptual("alex").to(self.tokenizer.device)

    def encode(self, picture: Picture, segments: int = 4) -> Encoded:
        """Encode and decode a picture; measure PSNR, SSC and LPC of this picture alone.

        Args:
            picture: the picture.
            segments: groups of similar colour in the picture, at least 2. They stand in for the label map
                that SSC compares with.
        """
        x, z = self._latent(picture)
        y = self._decode(z)
        labels = colour_segments(x[0], segments)
        grid = majority_labels(labels[None], *z.shape[-2:])[0]
        cells = len(torch.unique(grid))
        shown = [x, y, pca_pictures(z, _SIDE), label_pictures(labels[None], _SIDE)]
        lines = [f"**Decode.** PSNR {float(psnr(x, y)[0]):.1f} dB (higher is nearer to the picture)."]
        if cells < 2:
            shown.append(label_pictures(torch.zeros_like(grid)[None], _SIDE))
            lines.append("**SSC** is not defined here: the picture has one colour on the grid of the latent.")
        else:
            shown.append(label_pictures(spectral_clusters(z[0], cells)[None], _SIDE))
            ssc = spatial_structure_consistency(z, labels[None]).value
            lines.append(
                f"**SSC** {ssc:.2f}, from 0 to 1, higher is better: so far the clusters of the latent agree "
                f"with {cells} groups of similar colour. Published values use label maps and many pictures."
            )
        lpc = latent_perturbation_consistency(z, self._decode_at, self.lpips).value
        lines.append(
            f"**LPC** {lpc:.3f}, lower is better: the mean LPIPS between decodes of the latent before and "
            "after moves in one random direction."
        )
        return Encoded(tuple(_enlarged(one) for one in shown), "\n\n".join(lines))

    def move(
        self, picture: Picture, angle: float, seed: int = 0
    ) -> tuple[Image.Image, Image.Image, Image.Image, str]:
        """Move the latent of a picture on its sphere in a random direction, as MCR does.

        Args:
            picture: the picture.
            angle: degrees, in [0, 90].
            seed: seed of the direction.

        Returns:
            The decode, the decode of the moved latent, a strip at `ANGLES`, and a sentence from the numbers.
        """
        if not 0 <= angle <= 90:
            raise ValueError(f"the angle must lie in [0, 90] degrees, got {angle}")
        _, z = self._latent(picture)
        direction = initial_noise(seed, [0], self._shape(z)).to(z)
        path = torch.cat([self._moved(z, direction, one) for one in (0.0, angle, 90.0, *ANGLES)])
        images = self._decode(path)
        start, moved, end = torch.split(images[:3], 1)
        with torch.no_grad():
            start = self._on_device(start)
            change, most = (float(self.lpips(self._on_device(one), start)) for one in (moved, end))
        reached = float(reached_angle(z, path[1:2]))
        text = (
            f"Moved by {reached:.1f} degrees. LPIPS between the two decodes is **{change:.3f}** (0 is the "
            f"same picture). At 90 degrees, where nothing of the latent is left, it is {most:.3f}."
        )
        if change > 0 and most > 0:
            text += f" So this move makes {100 * change / most:.0f} % of that change."
        return _enlarged(start), _enlarged(moved), _strip(images[3:]), text

    def between_pictures(self, first: Picture, last: Picture, frames: int = 7) -> tuple[Image.Image, str]:
        """Decodes of latents between two pictures at equal angles, and a sentence on their steps."""
        a, b = (as_pixels(one, self.tokenizer.config.image_shape) for one in (first, last))
        images = interpolate_images(self.tokenizer, a, b, int(frames))
        return _strip(images), self._steps(images)

    def between_seeds(
        self, name: str, seeds: tuple[int, int], frames: int = 7, steps: int = 20, guidance: float = 2.0
    ) -> tuple[Image.Image, str]:
        """Samples of one class from noise between the noises of two seeds, and a sentence on their steps."""
        generator = self._generator()
        first, last = (_seed(one) for one in seeds)
        images = interpolate_seeds(
            self.tokenizer,
            generator,
            _sampler(steps, guidance),
            seeds=(first, last),
            label=self._label(name),
            frames=int(frames),
        )
        return _strip(images), self._steps(images)

    def generate(
        self, name: str, count: int = 4, steps: int = 20, guidance: float = 2.0, seed: int = 0
    ) -> tuple[Image.Image, str]:
        """Samples of one class in a grid, and a sentence on what was done."""
        generator = self._generator()
        labels = torch.full((int(count),), self._label(name))
        config = _sampler(steps, guidance)
        images = torch.cat(list(sample_images(self.tokenizer, generator, labels, config, seed=_seed(seed))))
        guided = "no guidance" if guidance == 1 else f"guidance {guidance:g}"
        return _strip(images, columns=4), f"{count} samples of {name}: {config.steps} steps, {guided}."

    def _steps(self, images: Tensor) -> str:
        with torch.no_grad():
            steps = self.lpips(self._on_device(images[1:]), self._on_device(images[:-1])).cpu()
            ends = float(self.lpips(self._on_device(images[-1:]), self._on_device(images[:1])))
        number = int(steps.argmax())
        return (
            f"LPIPS between the ends is {ends:.3f}. The largest step between neighbours is "
            f"**{float(steps[number]):.3f}**, from frame {number + 1} to frame {number + 2}. The mean step "
            f"is {float(steps.mean()):.3f}."
        )

    def _latent(self, picture: Picture) -> tuple[Tensor, Tensor]:
        x = as_pixels(picture, self.tokenizer.config.image_shape)[None]
        with torch.no_grad():
            return x, self.tokenizer.encode(self._on_device(x)).float().cpu()

    def _moved(self, z: Tensor, direction: Tensor, angle: float) -> Tensor:
        return perturb(z, direction, min(angle, _LARGEST_ANGLE), self.tokenizer.config.sphere)

    def _decode(self, z: Tensor) -> Tensor:
        with torch.no_grad():
            return self._decode_at(z).cpu()

    def _decode_at(self, z: Tensor) -> Tensor:
        return self.tokenizer.decode(self._on_device(z)).clamp(0, 1).float()

    def _on_device(self, values: Tensor) -> Tensor:
        return values.to(self.tokenizer.device)

    def _generator(self) -> LatentGenerator:
        if self.generator is None:
            raise ValueError("there is no generator: start pae demo with one to draw samples")
        return self.generator

    def _label(self, name: str) -> int:
        for label, known in self.classes.items():
            if known == name:
                return label
        raise ValueError(f"unknown class {name!r}; known: {', '.join(self.classes.values())}")

    @staticmethod
    def _shape(z: Tensor) -> tuple[int, int, int]:
        channels, height, width = z.shape[1:]
        return channels, height, width


def colour_segments(pixels: Tensor, count: int) -> Tensor:
    """Group the pixels of a picture (3, H, W) by colour (k-means): labels (H, W) int64.

    There are at most `count` groups, fewer where the picture has fewer colours.
    """
    colours = pixels.permute(1, 2, 0).reshape(-1, 3).numpy()
    known = len(torch.unique((pixels * 255).round().reshape(3, -1), dim=1).T)
    with threadpool_limits(limits=1):
        groups = KMeans(max(1, min(int(count), known)), n_init=1, random_state=0).fit_predict(colours)
    return torch.from_numpy(groups).long().view(pixels.shape[1:])


def _sampler(steps: int, guidance: float) -> SamplerConfig:
    return SamplerConfig(solver="multistep", steps=int(steps), guidance=float(guidance))


def _seed(value: float | None) -> int:
    if value is None or value != int(value) or value < 0:
        raise ValueError(f"a seed must be an integer >= 0, got {value}")
    return int(value)


def _enlarged(images: Tensor) -> Image.Image:
    return to_image(images[0]).resize(_fitting(images), Image.Resampling.NEAREST)


def _fitting(images: Tensor) -> tuple[int, int]:
    h, w = images.shape[-2:]
    times = _SIDE / max(h, w)
    return max(1, round(w * times)), max(1, round(h * times))


def _strip(images: Tensor, columns: int | None = None) -> Image.Image:
    """Images side by side, or in rows of `columns`, doubled where they are small."""
    longer = max(images.shape[-2:])
    if longer < _SIDE:
        images = torch.nn.functional.interpolate(images, scale_factor=max(1, 128 // longer), mode="nearest")
    else:
        images = thumbnails(images, _SIDE)
    return image_grid(images, columns=columns or len(images), gap=4)
