"""The same 60 small pictures in every form that is read."""

from __future__ import annotations

import io
import json
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from scipy.io import savemat

CLASSES = ["n01", "n02", "n03"]
PER_CLASS = 20


def pictures() -> Iterator[tuple[str, int, bytes]]:
    """File name, class and JPEG bytes of each picture; the order of names is that of the classes."""
    rng = np.random.default_rng(0)
    for i in range(PER_CLASS * len(CLASSES)):
        pixels = Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8)).resize((24, 20))
        buffer = io.BytesIO()
        pixels.save(buffer, format="JPEG")
        yield f"{i:03d}.jpg", i // PER_CLASS, buffer.getvalue()


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def class_folders(root: Path) -> Path:
    for name, label, data in pictures():
        folder = root / "folders" / CLASSES[label]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return root / "folders"


def _flat(root: Path) -> Path:
    (root / "val").mkdir()
    for name, _, data in pictures():
        (root / "val" / name).write_bytes(data)
    return root / "val"


def csv_labels(root: Path) -> Path:
    folder = _flat(root)
    lines = ["file,label", *(f"{name},{CLASSES[label]}" for name, label, _ in reversed([*pictures()]))]
    (folder / "labels.csv").write_text("\n".join(lines))
    return Path(f"{folder}#labels.csv")


def ground_truth(root: Path) -> Path:
    """ILSVRC's numbers are not in the order of the WordNet ids, and meta.mat has inner nodes, too."""
    folder, numbers = _flat(root), [2, 3, 1]
    (root / "truth.txt").write_text("\n".join(str(numbers[label]) for _, label, _ in pictures()) + "\n")
    kinds = [("ILSVRC2012_ID", float), ("WNID", object), ("num_children", float)]
    rows = [*((number, wnid, 0) for number, wnid in zip(numbers, CLASSES, strict=True)), (4, "n00", 3)]
    savemat(root / "meta.mat", {"synsets": np.array(rows, dtype=kinds)})
    return Path(f"{folder}#{root / 'truth.txt'}")


def numbered_labels(root: Path) -> Path:
    folder = _flat(root)
    (root / "val.txt").write_text("\n".join(f"{name} {label}" for name, label, _ in pictures()))
    (root / "classes.txt").write_text("\n".join(CLASSES))
    return Path(f"{folder}#{root / 'val.txt'}")


def tar_of_folders(root: Path) -> Path:
    with tarfile.open(root / "train.tar", "w") as tar:
        for name, label, data in reversed([*pictures()]):  # in no order, below a folder that holds everything
            add(tar, f"./train/{CLASSES[label]}/{name}", data)
        add(tar, "./train/n01/._000.jpg", b"a fork that macOS leaves")
    return root / "train.tar"


def tar_of_tars(root: Path) -> Path:
    with tarfile.open(root / "imagenet.tar", "w") as outer:
        for label, wnid in enumerate(CLASSES):
            buffer = io.BytesIO()
            with tarfile.open(fileobj=buffer, mode="w") as inner:
                for name, own, data in pictures():
                    if own == label:
                        add(inner, name, data)
            add(outer, f"{wnid}.tar", buffer.getvalue())
    return root / "imagenet.tar"


def folder_of_tars(root: Path) -> Path:
    (root / "tars").mkdir()
    for label, wnid in enumerate(CLASSES):
        with tarfile.open(root / "tars" / f"{wnid}.tar", "w") as tar:
            for name, own, data in pictures():
                if own == label:
                    add(tar, name, data)
    return root / "tars"


def _shards(root: Path, label_file: Callable[[int], tuple[str, bytes]]) -> Path:
    (root / "shards").mkdir()
    for shard in range(4):
        with tarfile.open(root / "shards" / f"{shard:03d}.tar", "w") as tar:
            for name, label, data in [*pictures()][15 * shard : 15 * shard + 15]:
                ending, content = label_file(label)
                add(tar, name, data)
                add(tar, f"{name.removesuffix('.jpg')}.{ending}", content)
    return root / "shards"


def wds_numbers(root: Path) -> Path:
    folder = _shards(root, lambda label: ("cls", f"{label}\n".encode()))
    (folder / "classnames.txt").write_text("\n".join(CLASSES))
    return folder / "{000..003}.tar"


def wds_json(root: Path) -> Path:
    return _shards(root, lambda label: ("json", json.dumps({"label": CLASSES[label], "w": 24}).encode()))


def parquet(root: Path) -> Path:
    """As `datasets` writes it: a struct of bytes and path, labels as numbers, names in the metadata."""
    features = {"image": {"_type": "Image"}, "label": {"names": CLASSES, "_type": "ClassLabel"}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    schema = pa.schema([("image", image), ("label", pa.int64())], metadata=metadata)
    rows = [{"image": {"bytes": data, "path": name}, "label": label} for name, label, data in pictures()]
    (root / "hub" / "data").mkdir(parents=True)
    for part in range(2):
        table = pa.Table.from_pylist(rows[30 * part : 30 * part + 30], schema=schema)
        file = root / "hub" / "data" / f"train-{part:05d}-of-00002.parquet"
        pq.write_table(table, file, row_group_size=7)
    pq.write_table(
        pa.Table.from_pylist(rows[:2], schema=schema), root / "hub/data/test-00000-of-00001.parquet"
    )
    return root / "hub"


def plain_parquet(root: Path) -> Path:
    rows = [{"img": data, "class": CLASSES[label]} for _, label, data in pictures()]
    pq.write_table(pa.Table.from_pylist(rows), root / "plain.parquet")
    return root / "plain.parquet"


def edm2_zip(root: Path) -> Path:
    with zipfile.ZipFile(root / "edm2.zip", "w") as archive:
        for name, _, data in pictures():
            archive.writestr(f"00000/{name}", data)
        labels = [[f"00000/{name}", label] for name, label, _ in pictures()]
        archive.writestr("dataset.json", json.dumps({"labels": labels}))
        archive.writestr("classes.txt", "\n".join(CLASSES))
    return root / "edm2.zip"


def zip_of_folders(root: Path) -> Path:
    with zipfile.ZipFile(root / "folders.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, label, data in pictures():
            archive.writestr(f"{CLASSES[label]}/{name}", data)
    return root / "folders.zip"


def arrays() -> dict[str, np.ndarray]:
    rows = [*pictures()]
    pixels = np.stack([np.asarray(Image.open(io.BytesIO(data))) for _, _, data in rows])
    labels = np.array([label for _, label, _ in rows])
    return {"images": pixels, "labels": labels, "classes": np.array(CLASSES)}


def npz(root: Path) -> Path:
    np.savez(root / "images.npz", **arrays())  # type: ignore[arg-type]
    return root / "images.npz"


FORMS = {
    maker.__name__: maker
    for maker in (
        *(class_folders, csv_labels, ground_truth, numbered_labels, tar_of_folders, tar_of_tars),
        *(folder_of_tars, wds_numbers, wds_json, parquet, plain_parquet, edm2_zip, zip_of_folders, npz),
    )
}
"""Makes the form below a folder, and returns the path to give."""
