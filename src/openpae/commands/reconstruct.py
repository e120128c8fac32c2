"""`pae reconstruct`: encode and decode images."""

from __future__ import annotations

from pathlib import Path

from openpae.commands.console import Device, Images, Out, TokenizerPath, at_least_one, say_on_rank0
from openpae.runtime.terminal import Progress


def reconstruct(
    tokenizer: TokenizerPath,
    images: Images,
    out: Out,
    /,
    count: int | None = None,
    batch_size: int = 16,
    device: Device = "auto",
    overwrite: bool = False,
) -> None:
    """Encode and decode images, write PNGs of the same names, and print PSNR and SSIM.

    torchrun splits the images over processes.

    Args:
        tokenizer: a tokenizer folder or a run folder of pae train-tokenizer.
        images: folder of images, or packed images; each is centre-cropped to the tokenizer's size.
        out: folder for the reconstructions.
        count: number of images, from the first on; all by default.
        batch_size: images per forward pass; lower it if memory runs out.
        device: auto uses a GPU if there is one.
        overwrite: replace files of these names that this command did not make.
    """
    at_least_one(count=count, batch_size=batch_size)
    import torch

    from openpae.data.images import PackedImages, open_images
    from openpae.data.pixels import to_image
    from openpae.eval.image_stream import source_batches
    from openpae.eval.reconstruction import ReconstructionMetrics
    from openpae.models.saved import load_tokenizer
    from openpae.runtime import processes
    from openpae.runtime.device import pick_device
    from openpae.storage.files import atomic_file
    from openpae.storage.outputs import check_claim, claim, run_lock

    source = open_images(images)
    rows = range(len(source) if count is None else min(count, len(source)))
    names = _names([f"{i:06d}" if isinstance(source, PackedImages) else source.name(i) for i in rows], out)
    metrics, inputs = ReconstructionMetrics(), (tokenizer, images)
    with processes.process_group(device), torch.no_grad():
        torch_device = pick_device(device)
        model = load_tokenizer(tokenizer).to(torch_device)
        processes.on_rank0(lambda: check_claim(out, names, inputs=inputs, overwrite=overwrite))
        own, done = processes.rank_slice(len(rows)), 0
        with run_lock(out, "reconstructing"), Progress("reconstructing", "img") as progress:
            processes.on_rank0(lambda: claim(out, names, inputs=inputs, overwrite=overwrite))
            for x in source_batches(source, model.config.image_shape, batch_size, own):
                y = model.reconstruct(x.to(torch_device)).float().cpu()
                part = own[done : done + len(y)]
                metrics.update(x, y, part)
                for row, pixels in zip(part, y, strict=True):
                    (out / names[row]).parent.mkdir(parents=True, exist_ok=True)
                    with atomic_file(out / names[row]) as partial:
                        to_image(pixels).save(partial, format="PNG")
                done += len(y)
                progress(done, len(own))
        metrics.gather()
        for estimate in metrics.compute().values():
            say_on_rank0(str(estimate))


def _names(images: list[str], out: Path) -> list[str]:
    """Name each image's PNG. Two images of one name (a.jpg and a.png) are a ValueError."""
    first: dict[str, str] = {}
    for image in images:
        name = Path(image).with_name(f"{Path(image).stem}.png").as_posix()
        if (other := first.setdefault(name, image)) != image:
            raise ValueError(f"{other} and {image} would both become {out / name}; rename one")
    return list(first)
