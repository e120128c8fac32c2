"""What users give that cannot work, the command they type, and the one line that they get.

One table for two readers: test_cases.py runs every row, tools/make_errors.py writes docs/errors.md from it.
"""

from __future__ import annotations

import os
import shlex
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from openpae import cli
from openpae.storage.files import file_hash, read_json, write_json
from tests.faults.running import GENERATOR, TOKENIZER, Case

# How things are spoiled


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


PACK = "pae pack images out --size 16"
SAMPLE = "pae sample tokenizer generator out --count 2 --steps 1 --device cpu"
BROKEN = both(
    edited("images/cats/1.png", lambda content: content[:200]),
    written("images/dogs/9.jpg", "<html>404</html>"),
)
RUN = """kind: GeneratorRun
latents: latents
optim: {lr: 0.1}
loop: {steps: 5, global_batch_size: 2}
"""
LIBRARY = r"(?<=cannot be decoded: )[^;]*"


def image(given: str, spoil: Callable[[], object], says: str, **more: object) -> Case:
    return Case(
        group="Images",
        given=given,
        spoil=spoil,
        command=PACK,
        says=says + "; remove the file, or pass --skip-broken$",
        **more,  # type: ignore[arg-type]
    )


def taken(given: str, spoil: Callable[[], object]) -> Case:
    return Case(
        group="Images that are taken as a viewer shows them",
        given=given,
        spoil=spoil,
        command=PACK,
        says=r"^7 images of 2 classes in out labels: 0 cats \(4\), 1 dogs \(3\)$",
        code=0,
    )


def folder(given: str, spoil: Callable[[], object], says: str, command: str = PACK, **more: object) -> Case:
    return Case(
        group="Folders of images",
        given=given,
        spoil=spoil,
        command=command,
        says=says,
        **more,  # type: ignore[arg-type]
    )


def config(given: str, text: str, says: str, foreign: str = "") -> Case:
    return Case(
        group="Configs",
        given=given,
        spoil=written("my.yaml", text),
        command="pae train-generator my.yaml run",
        says=says,
        foreign=foreign,
    )


def cache(given: str, spoil: Callable[[], object], command: str, says: str, **more: object) -> Case:
    return Case(
        group="Packed images, features and latents",
        given=given,
        spoil=spoil,
        command=command,
        says=says,
        **more,  # type: ignore[arg-type]
    )


def model(given: str, spoil: Callable[[], object], command: str, says: str, **more: object) -> Case:
    return Case(
        group="Models, checkpoints and runs",
        given=given,
        spoil=spoil,
        command=command,
        says=says,
        **more,  # type: ignore[arg-type]
    )


CASES: tuple[Case, ...] = (
    image(
        "a PNG cut short",
        edited("images/cats/1.png", lambda content: content[:200]),
        r"images/cats/1.png cannot be decoded: image file is truncated.*",
        foreign=LIBRARY,
    ),
    image(
        "a web page named .jpg",
        written("images/cats/9.jpg", "<html>404</html>"),
        r"9.jpg cannot be decoded: no known image format \(BMP GIF JPEG PNG PPM TIFF WEBP\)",
    ),
    image(
        "an empty file",
        written("images/cats/9.png", ""),
        "9.png cannot be decoded: no known image format .*",
    ),
    image("an animated GIF", frames("gif"), "9.gif .*: it has 3 frames or pages, save one as .*"),
    image("an animated PNG", frames("png"), "9.png .*: it has 3 frames or pages, save one as .*"),
    image("an animated WebP", frames("webp"), "9.webp cannot be decoded: it has 3 frames or pages, save .*"),
    image("a TIFF of several pages", frames("tif"), "9.tif cannot be decoded: it has 3 frames or pages, .*"),
    image(
        "32-bit pixels, whose range is not known",
        saved("images/cats/9.tif", Image.new("F", (4, 4))),
        r"its pixels are 32-bit numbers \(mode F\) of unknown range, save 8 or 16 bits",
    ),
    image(
        "a strip of 1 x 60,000 pixels",
        saved("images/cats/9.png", Image.new("L", (1, 60_000))),
        "its sides are 1 x 60000 pixels, more than 100 to 1; crop it",
    ),
    image(
        "a decompression bomb (a few bytes that claim 400 million pixels)",
        bomb,
        r"9.png cannot be decoded: Image size \(400000000 pixels\) exceeds limit of 178956970 pixels.*",
        foreign=LIBRARY,
    ),
    image(
        "a HEIC photo",
        written("images/cats/9.heic", b"\0\0\0\x18ftypheic"),
        "9.heic .* no known image format .*",
    ),
    image(
        "a file that the system cannot read",
        lambda: os.symlink("/proc/self/mem", "images/cats/9.png"),
        "9.png cannot be decoded: Input/output error",
    ),
    Case(
        group="Images",
        given="two broken files, and the wish to skip them",
        spoil=BROKEN,
        command=f"{PACK} --skip-broken",
        says=r"^5 images of 2 classes in out labels: 0 cats \(2\), 1 dogs \(3\) "
        "left out 2 broken files: .*cats/1.png .*; .*dogs/9.jpg .*",
        code=0,
        foreign=r"image file is truncated[^;]*",
    ),
    Case(
        group="Images",
        given="a broken file whose name is not UTF-8",
        spoil=lambda: Path(os.fsdecode(b"images/cats/caf\xe9.png")).write_text("x"),
        command=f"{PACK} --skip-broken",
        says=r"^6 images of 2 classes in out labels: 0 cats \(3\), 1 dogs \(3\) "
        r"left out 1 broken files: images/cats/caf\\udce9.png cannot",
        code=0,
    ),
    Case(
        group="Images",
        given="nothing but broken files, and the wish to skip them",
        spoil=lambda: [path.write_text("x") for path in Path("images").rglob("*.png")],
        command=f"{PACK} --skip-broken",
        says="out would hold no rows: all 6 items were skipped",
    ),
    Case(
        group="Images",
        given="a broken file in training",
        spoil=written("images/cats/1.png", "x"),
        command=TOKENIZER,
        says="1.png cannot be decoded: .*; remove the file, or pass --data.skip-broken$",
    ),
    Case(
        group="Images",
        given="a broken file in training, and the wish to skip it",
        spoil=written("images/cats/1.png", "x"),
        command=f"{TOKENIZER} --data.skip-broken --loop.steps 3",
        says="^images/cats/1.png cannot be decoded: .*; another image takes its place$",
        code=0,
    ),
    Case(
        group="Images",
        given="a broken file, asked about",
        spoil=written("images/cats/1.png", "x"),
        command="pae info images --verify",
        says="images/cats/1.png cannot be decoded: no known image format",
    ),
    taken("CMYK", saved("images/cats/9.jpg", Image.new("CMYK", (8, 8)))),
    taken("16-bit grey (its upper 8 bits)", saved("images/cats/9.png", Image.new("I;16", (8, 8)))),
    taken("a palette", saved("images/cats/9.png", Image.new("P", (8, 8)))),
    taken("transparent parts (on white)", saved("images/cats/9.png", Image.new("RGBA", (8, 8)))),
    taken("turned by EXIF (upright)", oriented),
    taken("a single pixel", saved("images/cats/9.png", Image.new("RGB", (1, 1)))),
    taken("a JPEG named .png", saved("images/cats/9.png", Image.new("RGB", (8, 8)), format="JPEG")),
    taken(
        "a name that is not UTF-8",
        lambda: (
            os.rename("images/cats/1.png", b"images/cats/caf\xe9.png")
            or shutil.copy("images/cats/0.png", "images/cats/9.png")
        ),
    ),
    folder("no folder", nothing, "^no image folder at imagse$", "pae pack imagse out"),
    folder(
        "an empty folder",
        lambda: os.mkdir("empty"),
        "no images in empty; known endings: ",
        "pae pack empty out",
    ),
    folder(
        "an empty class", lambda: os.mkdir("images/eels"), "images has 1 class folders without images: eels"
    ),
    folder(
        "images beside class folders",
        lambda: shutil.copy("images/cats/0.png", "images/0.png"),
        r"images holds images both directly and in subfolders \(cats\); keep one subfolder per class",
    ),
    folder(
        "classes that differ in case only",
        copied("images/cats", "images/Cats"),
        "the class folders 'Cats' and 'cats' of images differ in case or encoding only; rename one, or merge",
    ),
    folder(
        "a link that leads nowhere",
        lambda: os.symlink("/not/mounted", "images/eels"),
        "images/eels is a link that leads nowhere; repair or remove it",
    ),
    folder(
        "a link to itself",
        lambda: os.symlink("eels", "images/eels"),
        "images/eels is a link that leads nowhere; repair or remove it",
    ),
    folder(
        "a class that leads back to the folder",
        lambda: os.symlink("..", "images/cats/up") or os.symlink(".", "images/all"),
        "of images are the same folder; an image cannot be of two classes: remove the link",
    ),
    folder(
        "two images of one name, to be written as PNGs",
        saved("images/cats/1.jpg", Image.new("RGB", (8, 8))),
        "cats/1.jpg and cats/1.png would both become out/cats/1.png; rename one",
        "pae reconstruct tokenizer images out",
    ),
    folder(
        "a target that holds something else",
        written("out/thesis.tex", "years of work"),
        "out is not empty and holds no images; name a new folder",
    ),
    folder(
        "a target begun with another size",
        ran("pae pack images out --size 8"),
        r"out was begun with another shape \(\[3, 8, 8\] there, \[3, 16, 16\] now\); delete the folder",
    ),
    folder(
        "a disk that fills up",
        nothing,
        "no room for out/00000.npy: .* took 5,000 of 18,432 bytes and no more .*; free some",
        "pae pack images out --size 32",
        largest_file=5_000,
        foreign=r"[\d,]+(?= are free)",
    ),
    config("a misspelt key", RUN + "optin: {}\n", "^my.yaml: unknown key optin; did you mean 'optim'\\?$"),
    config("a missing key", RUN.replace("loop", "# loop"), "my.yaml: missing key loop; it has no default"),
    config(
        "a number that YAML takes for text",
        RUN.replace("0.1", "2e-4"),
        "optim.lr must be float, got '2e-4' .*; in YAML write 0.0002",
    ),
    config("text for a number", RUN.replace("5", "many"), r"loop.steps must be int, got 'many' \(str\)"),
    config("a value out of range", RUN.replace("0.1", "-1"), "optim.lr must be > 0, got -1.0"),
    config("not a number", RUN.replace("0.1", ".nan"), "optim.lr must be a finite number, got nan"),
    Case(
        group="Configs",
        given="the same, as a flag",
        spoil=nothing,
        command=f"{GENERATOR} --optim.weight-decay nan",
        says="^optim.weight_decay must be a finite number, got nan$",
    ),
    config(
        "a choice that is none",
        RUN.replace("steps: 5", "steps: 5, precision: fp8"),
        "loop.precision must be one of 'fp32', .*got 'fp8'",
    ),
    config("a key twice", RUN + "latents: b\n", "key latents stands twice in one mapping"),
    config("no YAML", "kind: [", "my.yaml is not valid YAML: ", foreign="(?<=YAML: ).*"),
    config(
        "code in YAML",
        "kind: !!python/object/apply:os.getcwd []\n",
        "my.yaml is not valid YAML: could not determine a constructor for the tag",
        foreign=' in "<unicode string>.*',
    ),
    config(
        "a config of another stage",
        "kind: TokenizerRun\n",
        "my.yaml is of kind 'TokenizerRun', but a GeneratorRun is needed here",
    ),
    config(
        "megabytes of something else",
        "x" * 2**20,
        "my.yaml is no config: it has 1,048,576 bytes, at most 65,536 are read",
    ),
    Case(
        group="Configs",
        given="no such file or preset",
        spoil=nothing,
        command="pae train-generator generator/tinny run",
        says="no config file or preset 'generator/tinny'; presets: .*generator/tiny",
        foreign="(?<=presets: ).*",
    ),
    cache(
        "a shard cut short",
        edited("latents/00000.npy", lambda content: content[:-8]),
        GENERATOR,
        "latents/00000.npy is damaged or missing: .*; delete it together with index.json and run the command",
        foreign="(?<=or missing: )[^;]*",
    ),
    cache(
        "a flipped bit in the data",
        flipped("latents/00000.npy"),
        "pae info latents --verify",
        "latents/00000.npy is damaged: its checksum is not that of index.json; delete it together with",
    ),
    cache(
        "a flipped bit in packed images",
        flipped("packed/00000.npy"),
        "pae info packed --verify",
        "packed/00000.npy is damaged: its checksum is not that of index.json; delete it together with",
    ),
    cache(
        "a changed statistic",
        json_with("latents/index.json", mean=[0.0] * 8),
        "pae info latents --verify",
        "latents/index.json is damaged: it does not agree with header.json and the shards' .json",
    ),
    cache(
        "labels without a class",
        lambda: np.save("latents/labels.npy", np.full(6, 7)),
        GENERATOR,
        "latents/labels.npy is damaged: labels must be 0 to 1, got 7 to 7",
    ),
    cache(
        "labels that are a pickle",
        lambda: np.save("latents/labels.npy", np.array([Harmless()] * 6), allow_pickle=True),
        GENERATOR,
        "latents/labels.npy is damaged or missing: Object arrays cannot be loaded",
        foreign="(?<=or missing: )[^;]*",
    ),
    cache(
        "an unfinished cache",
        lambda: os.remove("latents/index.json"),
        GENERATOR,
        "latents folder latents is incomplete; run the command that made it again to finish it",
    ),
    cache(
        "images where latents are needed",
        nothing,
        GENERATOR.replace("--latents latents", "--latents packed"),
        "packed holds images, but latents are needed here",
    ),
    cache(
        "more classes than the generator has",
        nothing,
        f"{GENERATOR} --model.num-classes 1",
        "latents has labels up to 1, but model.num_classes is 1",
    ),
    cache(
        "latents of another shape",
        nothing,
        f"{GENERATOR} --model.grid-size 8",
        r"latents holds latents of shape \(8, 4, 4\), the generator is built for \(8, 8, 8\); set model",
    ),
    cache(
        "a cache begun with another tokenizer",
        nothing,
        "pae cache-latents another-tokenizer packed latents --device cpu",
        "latents was begun with another attributes.tokenizer .*; delete the folder or name another",
    ),
    cache(
        "held-out latents of another tokenizer",
        ran("pae cache-latents another-tokenizer packed others --device cpu"),
        f"{GENERATOR} --held-out-latents others",
        "others and latents come from different tokenizers",
    ),
    model(
        "no model",
        nothing,
        SAMPLE.replace(" generator ", " generatr "),
        "no model at generatr: neither model.safetensors nor checkpoints/ in it",
    ),
    model(
        "a generator of another tokenizer",
        nothing,
        SAMPLE.replace(" tokenizer ", " another-tokenizer "),
        "generator makes latents of the tokenizer .*, but another-tokenizer is .*; decode with",
    ),
    model(
        "a tokenizer where a generator is needed",
        nothing,
        SAMPLE.replace(" generator ", " tokenizer "),
        "^tokenizer is no generator: its config is of kind 'PAEConfig'",
    ),
    model(
        "a generator where a tokenizer is needed",
        nothing,
        "pae reconstruct generator images out",
        "generator/config.yaml is of kind 'LightningDiTConfig', but a PAEConfig is needed here",
    ),
    model(
        "weights cut short",
        edited("generator/model.safetensors", lambda content: content[:-8]),
        SAMPLE,
        "generator/model.safetensors is damaged: ",
        foreign="(?<=is damaged: ).*",
    ),
    model(
        "a flipped bit in weights",
        flipped("generator/model.safetensors"),
        SAMPLE,
        "generator is damaged or was edited: weights and config do not give its fingerprint .*; bring",
    ),
    model(
        "a config of another architecture",
        config_with("generator/config.yaml", "hidden_dim: 32", "hidden_dim: 64"),
        SAMPLE,
        "generator is damaged or was edited: weights and config do not give its fingerprint .*; bring",
    ),
    model(
        "a class that the generator does not know",
        nothing,
        f"{SAMPLE} --classes 7",
        "labels must lie in",
    ),
    model(
        "a run folder of another config",
        nothing,
        f"{GENERATOR.replace(' run ', ' generator-run ')} --optim.lr 0.5",
        "generator-run belongs to a run with another config .*optim.lr: 0.001 -> 0.5.*; name another",
    ),
    model(
        "data that have changed since the run began",
        both(moved("latents", "old"), ran("pae cache-latents another-tokenizer packed latents --device cpu")),
        "pae train-generator generator-run/config.yaml generator-run",
        "generator-run was trained with other latents, tokenizer: what its config names has changed since",
    ),
    model(
        "a damaged newest checkpoint: the one before is taken",
        flipped("generator-run/checkpoints/step-00000002/state.pt"),
        "pae train-generator generator-run/config.yaml generator-run",
        r"^checkpoint .*step-00000002 is damaged and was passed over: its checksum is wrong \(state.pt\)$",
        code=0,
    ),
    model(
        "the same, asked about",
        flipped("generator-run/checkpoints/step-00000002/state.pt"),
        "pae info generator-run --verify",
        r"checkpoint generator-run/checkpoints/step-00000002 is damaged: its checksum is wrong \(state.pt\)",
    ),
    model(
        "a checkpoint that would run code when it is read",
        pickled_code,
        "pae train-generator generator-run/config.yaml generator-run",
        "state.pt is refused: it is a pickle that would call .*print when read",
    ),
    model(
        "released weights that would run code when they are read",
        lambda: torch.save({"model": Harmless()}, "weights.pt"),
        "pae import-official weights.pt out",
        "weights.pt is refused: it is a pickle that would call .*print when read",
    ),
    model(
        "samples that are no samples",
        written("samples.npz", "x"),
        "pae evaluate packed --samples samples.npz --extractor random",
        "samples.npz",
    ),
    model(
        "a disk that fills up at the first checkpoint",
        nothing,
        GENERATOR,
        "no room for run/checkpoints/step-00000002: .* took .* bytes and no more .*; free some",
        largest_file=5_000,
        foreign=r"[\d,]+(?= of)|(?<=of )[\d,]+(?= bytes)|[\d,]+(?= are free)",
    ),
)
