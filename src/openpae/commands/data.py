"""Commands about images and folders."""

from __future__ import annotations

from openpae.commands.console import (
    Folder,
    Images,
    Out,
    Progress,
    at_least_one,
    say,
    tell_classes,
    tell_skipped,
)


def pack(
    images: Images,
    out: Out,
    /,
    size: int = 256,
    width: int | None = None,
    skip_broken: bool = False,
    whole_content: bool = False,
) -> None:
    """Decode and centre-crop a folder of images once, so that training reads them from a memory map.

    Args:
        images: folder with one subfolder per class, or with all images.
        out: folder for the packed images; an interrupted packing goes on.
        size: side in pixels, or height where a width is given.
        width: width in pixels of images that are not square.
        skip_broken: leave out files that cannot be decoded, and name them.
        whole_content: let the fingerprint of the folder cover all of every file, and not only its size and a
            few kilobytes; it reads everything once more.
    """
    shape = (size, size if width is None else width)
    at_least_one(size=size, width=shape[1])
    from openpae.data.images import ImageFolder
    from openpae.data.packing import pack_images
    from openpae.storage.outputs import check_outputs

    check_outputs(into=out, inputs=[images])
    with Progress("packing", "img") as progress:
        source = ImageFolder(images, full_hash=whole_content)
        packed = pack_images(source, out, size=shape, skip_broken=skip_broken, progress=progress)
    say(f"{len(packed):,} images of {len(packed.classes)} classes in {out}")
    tell_classes(packed.classes, packed.labels)
    tell_skipped(packed.shards.index["skipped"])


def info(folder: Folder, /, verify: bool = False) -> None:
    """Say what a folder is: a run, a model, a cache, packed images or a folder of images.

    Args:
        folder: any of them.
        verify: also read everything and compare it with the checksums.
    """
    from openpae.commands.describe import describe

    for name, value in describe(folder, verify=verify).items():
        say(f"{name:16} {value}")
