"""Commands about images and folders."""

from __future__ import annotations

from collections.abc import Mapping

from openpae.commands.console import (
    Folder,
    Images,
    Out,
    at_least_one,
    print_classes,
    print_skipped,
    say_on_rank0,
)
from openpae.runtime.terminal import Progress, say


def pack(
    images: Images,
    out: Out,
    /,
    size: int = 256,
    width: int | None = None,
    skip_broken: bool = False,
    whole_content: bool = False,
) -> None:
    """Decode and centre-crop images once, for training to read from a memory map.

    Args:
        images: class folders, FOLDER#LABELFILE, a tar, zip or npz, WebDataset shards, parquet files, or
            hf:OWNER/NAME#SPLIT of the hub.
        out: folder for the packed images; an interrupted command resumes when it is run again.
        size: side in pixels; the height if width is given.
        width: width in pixels; by default the images are square.
        skip_broken: leave out files that cannot be decoded, and name them.
        whole_content: compute the folder's fingerprint from all bytes of each file. By default it covers the
            size and a few kilobytes. This reads every file once more.
    """
    shape = (size, size if width is None else width)
    at_least_one(size=size, width=shape[1])
    from openpae.data.images import open_source, place_of
    from openpae.data.packing import pack_images
    from openpae.runtime import processes
    from openpae.storage.outputs import check_outputs

    check_outputs(into=out, inputs=[place_of(images)])
    with processes.process_group("cpu"), Progress("packing", "img") as progress:
        source = open_source(images, full_hash=whole_content)
        packed = pack_images(source, out, size=shape, skip_broken=skip_broken, progress=progress)
        say_on_rank0(f"{len(packed):,} images of {len(packed.classes)} classes in {out}")
        print_classes(packed.classes, packed.labels)
        print_skipped(packed.shards.index["skipped"])


def info(folder: Folder, /, verify: bool = False) -> Mapping[str, str]:
    """Print what a folder or file is: a run, a model, a cache, packed images or images of any form.

    Args:
        folder: the folder or file.
        verify: also read every file and compare it with its checksum.
    """
    from openpae.commands.describe import describe

    facts = describe(folder, verify=verify)
    for name, value in facts.items():
        say(f"{name:16} {value}")
    return facts
