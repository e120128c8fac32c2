"""Functions that spoil a workspace, and commands, for the table of errors."""

from __future__ import annotations

import shlex
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image

from openpae import cli
from openpae.storage.files import file_hash, read_json, write_json

PACK = "pae pack images out --size 16"
SAMPLE = "pae sample tokenizer generator out --count 2 --steps 1 --device cpu"


def edited(file: str, change: Callable[[bytes], bytes]) -> Callable[[], object]:
    return lambda: Path(file).write_bytes(change(Path(file).read_bytes()))


def written(file: str, content: bytes | str) -> Callable[[], object]:
    def write() -> None:
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        Path(file).write_bytes(content.encode() if isinstance(content, str) else content)

    return write


def flipped(file: str, byte: int = -1) -> Callable[[], object]:
    def flip(content: bytes) -> bytes:
        damaged = bytearray(content)
        damaged[byte] ^= 1
        return bytes(damaged)

    return edited(file, flip)


def saved(file: str, image: Image.Image, **options: object) -> Callable[[], object]:
    return lambda: image.save(file, **options)


def both(*steps: Callable[[], object]) -> Callable[[], object]:
    return lambda: [step() for step in steps]


def ran(command: str) -> Callable[[], object]:
    """What an earlier command of the user left."""
    return lambda: cli.main(shlex.split(command)[1:])


def nothing() -> None:
    """The folder is as it should be; the command asks for the wrong thing."""


def moved(source: str, target: str) -> Callable[[], object]:
    return lambda: shutil.move(source, target)


def copied(source: str, target: str) -> Callable[[], object]:
    return lambda: shutil.copytree(source, target)


def json_with(file: str, **changes: object) -> Callable[[], object]:
    return lambda: write_json(Path(file), read_json(Path(file)) | changes)


def config_with(file: str, old: str, new: str) -> Callable[[], object]:
    return edited(file, lambda content: content.replace(old.encode(), new.encode()))


class Harmless:
    """A pickle of it calls print when it is read: where nothing is printed, no code was run."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return print, ("code was run",)


def pickled_code() -> None:
    """A state.pt that calls a function, with the right checksum."""
    folder = Path("generator-run/checkpoints/step-00000002")
    torch.save({"step": 2, "players": Harmless()}, folder / "state.pt")
    rehashed(folder)


def rehashed(folder: Path) -> None:
    """The right checksums of a checkpoint whose files were changed."""
    names = read_json(folder / "checkpoint.json")["sha256"]
    json_with(str(folder / "checkpoint.json"), sha256={name: file_hash(folder / name) for name in names})()


def frames(ending: str) -> Callable[[], object]:
    pictures = [Image.new("RGB", (8, 8), (80 * number, 0, 0)) for number in range(3)]
    return lambda: pictures[0].save(f"images/cats/9.{ending}", save_all=True, append_images=pictures[1:])


def bomb() -> None:
    """A PNG of a few bytes that claims 400 million pixels."""
    Image.new("1", (1, 1)).save("images/cats/9.png")
    content = bytearray(Path("images/cats/9.png").read_bytes())
    content[16:24] = (20_000).to_bytes(4, "big") * 2
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    Path("images/cats/9.png").write_bytes(content)


def oriented() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (8, 4)).save("images/cats/9.jpg", exif=exif)
