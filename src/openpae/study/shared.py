"""Networks, label maps and features of real images that the stages of a process share, each made once."""

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
    """Load LPIPS."""
    return load_perceptual(net).to(device)


@functools.cache
def extractor(name: ExtractorName, weights: Path | None, device: torch.device) -> FeatureExtractor:
    """Load a feature extractor."""
    network = load_extractor(name, weights)
    if isinstance(network, nn.Module):
        network.to(device)
    return network


@functools.cache
def segmented(images: Path, maps: Path, size: int, count: int, ignore: int | None) -> Segmented:
    """Read images with label maps, for SSC."""
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
    """Compute features of the images on which tokenizers are measured."""
    source = open_images(images)
    stream = real_images(source, size, rows=chosen_rows(source, config.count))
    return features_of(stream, extractor(name, weights, device), config.batch_size)


@functools.cache
def reference(file: Path, name: ExtractorName, weights: Path | None, device: torch.device) -> Reference:
    """Read the reference of samples from an npz file."""
    return read_reference(file, extractor(name, weights, device))
