"""Raw targets of SSR and SCR, found in one pass instead of trained: PCA or a random projection (Table 2b)."""

from __future__ import annotations

from collections.abc import Iterator
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
    """Write a linear map of the VFM's features that `TokenizerRun.prior` takes in a refiner's place.

    Args:
        encoder: the frozen VFM.
        source: images to fit to; `random` needs none of them.
        folder: gets the targets; must not exist.
        kind: principal components of the features, or a random subspace.
        latent_dim: channels C of the targets.
        image_size: side in pixels to which images are centre-cropped.
        patch_size: pixels per token and axis: that of the tokenizer's decoder.
        count: images to take, evenly spread, or all of them.
        batch_size: images per forward pass.
        seed: of the random subspace.
        device: where the VFM runs.
        progress: called with (done, all) images.

    Raises:
        FileExistsError: the folder is there.
        ValueError: C is larger than the encoder's width, or image_size is no multiple of patch_size.
    """
    if folder.exists():
        raise FileExistsError(f"{folder} is there already; name another folder, or use it as it is")
    if not 1 <= latent_dim <= encoder.spec.dim:
        raise ValueError(
            f"latent_dim must lie in [1, {encoder.spec.dim}], the encoder's width, got {latent_dim}"
        )
    if image_size % patch_size:
        raise ValueError(f"image_size must be a multiple of patch_size = {patch_size}, got {image_size}")
    if kind == "random":
        targets = random_targets(encoder.spec.dim, latent_dim, seed)
    else:
        rows = spread(len(source), count)
        if isinstance(encoder, nn.Module):
            encoder.to(device)
        prepare = EncoderInput(encoder.spec, patch_size).to(device)

        def features() -> Iterator[Tensor]:
            done = 0
            for x in source_batches(source, image_size, batch_size, rows):
                yield encoder(prepare(x.to(device)))
                done += len(x)
                if progress is not None:
                    progress(done, len(rows))

        targets = fit_pca(features(), latent_dim)
    with atomic_folder(folder) as partial:
        write_prior(partial, targets.state_dict(), targets.config, encoder_fingerprint(encoder))
    return targets
