"""What the stages of one process share: networks, label maps, features of real images, each made once."""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from torch import nn

from openpae.data.images import chosen_rows, open_images
from openpae.data.label_maps import Segmented, read_segmented
from openpae.eval.extractors import FeatureExtractor, load_extractor
from openpae.eval.features import FeatureSet, features_of
from openpae.eval.image_stream import real_images
from openpae.eval.reference import Reference, read_reference
from openpae.eval.settings import ExtractorName
from openpae.geometry.settings import MeasureConfig
from openpae.models.configs import PerceptualNet
from openpae.models.lpips import LPIPS
from openpae.models.lpips_weights import load_perceptual


@functools.cache
def perceptual(net: PerceptualNet, device: torch.device) -> LPIPS:
    """LPIPS."""
    return load_perceptual(net).to(device)


@functools.cache
def extractor(name: ExtractorName, weights: Path | None, device: torch.device) -> FeatureExtractor:
    """A feature extractor."""
    found = load_extractor(name, weights)
    if isinstance(found, nn.Module):
        found.to(device)
    return found


@functools.cache
def segmented(images: Path, maps: Path, size: int, count: int, ignore: int | None) -> Segmented:
    """Images with label maps, for SSC."""
    return read_segmented(images, maps, size=size, count=count, ignore=ignore)


@functools.cache
def measured_features(
    images: Path,
    size: int,
    name: ExtractorName,
    weights: Path | None,
    config: MeasureConfig,
    device: torch.device,
) -> FeatureSet:
    """Features of the images on which tokenizers are measured."""
    source = open_images(images)
    stream = real_images(source, size, rows=chosen_rows(source, config.count))
    return features_of(stream, extractor(name, weights, device), config.batch_size)


@functools.cache
def reference(file: Path, name: ExtractorName, weights: Path | None, device: torch.device) -> Reference:
    """What samples are compared with, from an npz file."""
    return read_reference(file, extractor(name, weights, device))
