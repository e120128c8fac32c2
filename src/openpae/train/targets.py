"""Raw targets of SSR and SCR, fitted in one pass: PCA or a random projection (Table 2b)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from openpae.data.caches import Progress
from openpae.data.images import ImageSource, spread
from openpae.eval.image_stream import source_batches
from openpae.models.encoders import Encoder, EncoderInput, encoder_fingerprint
from openpae.models.priors import LinearTargets, fit_pca, random_targets
from openpae.models.saved import write_prior
from openpae.storage.files import atomic_folder


@torch.no_grad()
def fit_targets(
    encoder: Encoder,
    source: ImageSource,
    folder: Path,
    *,
    kind: Literal["pca", "random"] = "pca",
    latent_dim: int = 32,
    image_size: int = 256,
    patch_size: int = 16,
    count: int = 10_000,
    batch_size: int = 32,
    seed: int = 0,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> LinearTargets:
    """Write a linear map of VFM features. `TokenizerRun.prior` takes it in place of a refiner.

    Args:
        encoder: the frozen VFM.
        source: images to fit to; `random` uses none.
        folder: folder of the targets; it must not exist.
        kind: principal components of the features, or a random subspace.
        latent_dim: channels C of the targets.
        image_size: side of the centre-cropped images in pixels.
        patch_size: pixels per token and axis, as in the tokenizer's decoder.
        count: number of images, evenly spread over the source.
        batch_size: images per forward pass.
        seed: of the random subspace.
        device: device of the VFM.
        progress: called with (done, all) images.

    Raises:
        FileExistsError: the folder exists.
        ValueError: C exceeds the encoder's width, or image_size is no multiple of patch_size.
    """
    if folder.exists():
        raise FileExistsError(f"{folder} exists already; name another folder, or use this one")
    if not 1 <= latent_dim <= encoder.spec.dim:
        raise ValueError(
            f"latent_dim must lie in [1, {encoder.spec.dim}], the encoder's width, got {latent_dim}"
        )
    if image_size % patch_size:
        raise ValueError(f"image_size must be a multiple of patch_size = {patch_size}, got {image_size}")
    if kind == "random":
        targets = random_targets(encoder.spec.dim, latent_dim, seed)
    else:
        if isinstance(encoder, nn.Module):
            encoder.to(device)
        prepare = EncoderInput(encoder.spec, patch_size).to(device)
        rows = spread(len(source), count)
        images = _reported(source_batches(source, image_size, batch_size, rows), len(rows), progress)
        targets = fit_pca((encoder(prepare(x.to(device))) for x in images), latent_dim)
    with atomic_folder(folder) as partial:
        write_prior(partial, targets.state_dict(), targets.config, encoder_fingerprint(encoder))
    return targets


def _reported(batches: Iterable[Tensor], count: int, progress: Progress | None) -> Iterator[Tensor]:
    """Yield the batches and report the number of images done."""
    done = 0
    for batch in batches:
        yield batch
        done += len(batch)
        if progress is not None:
            progress(done, count)
