"""Commands about images and folders."""

from __future__ import annotations

from openpae.commands.console import Folder, Images, Out, Progress, at_least_one, tell_skipped


def pack(
    images: Images,
    out: Out,
    /,
    size: int = 256,
    skip_broken: bool = False,
) -> None:
    """Decode and centre-crop a folder of images once, so that training reads them from a memory map.

    Args:
        images: folder with one subfolder per class, or with all images.
        out: folder for the packed images; an interrupted packing goes on.
        size: side in pixels.
        skip_broken: leave out files that can not be decoded, and name them.
    """
    at_least_one(size=size)
    from openpae.data.images import ImageFolder, pack_images

    with Progress("packing", "img") as progress:
        packed = pack_images(ImageFolder(images), out, size=size, skip_broken=skip_broken, progress=progress)
    print(f"{len(packed):,} images of {len(packed.classes)} classes in {out}")
    tell_skipped(packed.shards.index["skipped"])


def info(folder: Folder, /, verify: bool = False) -> None:
    """Say what a folder is: a run, a model, a cache, packed images or a folder of images.

    Args:
        folder: any of them.
        verify: also read everything and compare it with the checksums.
    """
    from openpae.describe import describe

    for name, value in describe(folder, verify=verify).items():
        print(f"{name:16} {value}")
