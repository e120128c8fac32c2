"""Shards: what was written is read, wherever a writer was killed; damage and foreign folders are named."""

from __future__ import annotations

import io
import itertools
import pickle
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from openpae.data.shard_writer import Part, ShardWriter
from openpae.data.shards import Layout, Shards
from openpae.storage.files import read_json, write_json
from tests.conftest import kill_points

LATENTS = Layout(
    kind="latents",
    dtype="bfloat16",
    shape=(2, 3, 2, 2),
    sources=10,
    per_shard=4,
    attributes={"tokenizer": "abc", "classes": ["x", "y"]},
)


def rows_of(layout: Layout, seed: int = 0) -> Tensor:
    """Random rows for all sources, in the layout's type."""
    numbers = torch.randn(layout.sources, *layout.shape, generator=torch.Generator().manual_seed(seed))
    if layout.dtype == "uint8":
        return (numbers * 50 + 128).clamp(0, 255).to(torch.uint8)
    return (3 * numbers + 1).to(getattr(torch, layout.dtype))


def write(folder: Path, layout: Layout = LATENTS, seed: int = 0) -> Shards:
    """All that is missing, row i with label i % 2."""
    writer, rows = ShardWriter(folder, layout), rows_of(layout, seed)
    for shard in writer.missing():
        span = layout.span(shard)
        writer.write(shard, rows[span.start : span.stop], [i % 2 for i in span])
    return writer.finish()


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("dtype", ["uint8", "float16", "bfloat16", "float32"])
def test_rows_come_back_to_the_bit(tmp_path: Path, dtype: str) -> None:
    layout = replace(LATENTS, kind="features", dtype=dtype)
    shards, rows = write(tmp_path / "s", layout), rows_of(layout)
    assert len(shards) == 10
    assert [len(np.load(path, mmap_mode="r")) for path in sorted((tmp_path / "s").glob("0*.npy"))] == [
        4,
        4,
        2,
    ]
    everything = shards.gather(np.arange(10))
    assert everything.dtype == rows.dtype
    assert torch.equal(everything, rows)
    assert shards.labels.tolist() == [i % 2 for i in range(10)]
    shards.verify()


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 1)), max_size=12))
def test_any_rows_and_versions_are_gathered_over_borders(picks: list[tuple[int, int]]) -> None:
    shards, rows = SHARED["shards"], rows_of(LATENTS)
    numbers, versions = np.array(picks, dtype=np.int64).reshape(-1, 2).T
    assert torch.equal(shards.gather(numbers), rows[numbers])
    assert torch.equal(shards.gather(numbers, versions), rows[numbers, versions])


SHARED: dict[str, Shards] = {}


@pytest.fixture(autouse=True, scope="module")
def _shared(tmp_path_factory: pytest.TempPathFactory) -> None:
    SHARED["shards"] = write(tmp_path_factory.mktemp("shared") / "s")


def test_skipped_items_leave_no_row_even_where_a_whole_shard_is_skipped(tmp_path: Path) -> None:
    writer, rows = ShardWriter(tmp_path / "s", LATENTS), rows_of(LATENTS)
    writer.write(0, rows[[0, 2]], [0, 1], ["one", "three"])
    writer.write(1, rows[:0], [], ["four", "five", "six", "seven"])
    writer.write(2, rows[8:], [1, 0])
    shards = writer.finish()
    assert len(shards) == 4
    assert torch.equal(shards.gather(np.arange(4)), rows[[0, 2, 8, 9]])
    assert shards.labels.tolist() == [0, 1, 1, 0]
    assert shards.index["skipped"] == ["one", "three", "four", "five", "six", "seven"]
    assert np.isfinite(shards.index["mean"]).all()


def test_a_folder_of_nothing_but_skipped_items_is_an_error(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path / "s", LATENTS)
    for shard in writer.missing():
        items = [str(i) for i in LATENTS.span(shard)]
        writer.write(shard, torch.empty(0, *LATENTS.shape), [], items)
    with pytest.raises(ValueError, match="would hold no rows: all 10 items were skipped"):
        writer.finish()


def test_statistics_are_those_of_numpy(tmp_path: Path) -> None:
    """Over rows, versions and places, of the values as they are stored."""
    shards = write(tmp_path / "s")
    stored = rows_of(LATENTS).double().numpy()
    np.testing.assert_allclose(shards.index["mean"], stored.mean((0, 1, 3, 4)), rtol=1e-10)
    np.testing.assert_allclose(shards.index["std"], stored.std((0, 1, 3, 4)), rtol=1e-10)


def test_a_writer_killed_anywhere_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    whole, folder, deaths = content(write(tmp_path / "whole").folder), tmp_path / "s", 0
    for _ in kill_points(lambda: write(folder), folder):
        if not (folder / "index.json").is_file():
            with pytest.raises(FileNotFoundError, match=r"incomplete|does not exist"):
                Shards(folder)
        write(folder)
        assert content(folder) == whole
        shutil.rmtree(folder)
        deaths += 1
    assert deaths >= 20
    assert content(folder) == whole


def test_finished_shards_are_kept(tmp_path: Path) -> None:
    writer, rows = ShardWriter(tmp_path / "s", LATENTS), rows_of(LATENTS)
    writer.write(1, rows[4:8], [0, 1, 0, 1])
    assert ShardWriter(tmp_path / "s", LATENTS).missing() == [0, 2]
    before = (tmp_path / "s" / "00001.npy").stat().st_mtime_ns
    assert torch.equal(write(tmp_path / "s").gather(np.arange(10)), rows)
    assert (tmp_path / "s" / "00001.npy").stat().st_mtime_ns == before


def test_finishing_needs_every_shard(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path / "s", LATENTS)
    writer.write(0, rows_of(LATENTS)[:4], [0] * 4)
    with pytest.raises(ValueError, match="lacks 2 of 3 shards"):
        writer.finish()
    with pytest.raises(FileNotFoundError, match=r"latents folder .* is incomplete; run the command"):
        Shards(tmp_path / "s", kind="latents")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"attributes": {"tokenizer": "xyz", "classes": ["x", "y"]}},
            r"attributes.tokenizer \(abc there, xyz now\)",
        ),
        ({"shape": (1, 3, 2, 2)}, r"shape \(\[2, 3, 2, 2\] there, \[1, 3, 2, 2\] now\)"),
        ({"sources": 11}, r"sources \(10 there, 11 now\)"),
        ({"kind": "features", "dtype": "float16"}, r"dtype .*, kind .*latents there, features now"),
    ],
)
def test_another_layout_is_refused_by_what_differs(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    write(tmp_path / "s")
    with pytest.raises(ValueError, match=f"was begun with another {message}"):
        ShardWriter(tmp_path / "s", replace(LATENTS, **changes))


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="is not empty and holds no latents; name a new folder"):
        ShardWriter(tmp_path, LATENTS)
    assert content(tmp_path) == {"thesis.tex": b"years of work"}


@pytest.mark.parametrize(
    ("rows", "labels", "skipped"),
    [
        (torch.zeros(3, 2, 3, 2, 2), [0] * 3, []),
        (torch.zeros(4, 2, 3, 2, 2), [0] * 3, []),
        (torch.zeros(4, 2, 3, 2, 2), [0] * 4, ["one"]),
        (torch.zeros(4, 2, 3, 2), [0] * 4, []),
    ],
)
def test_rows_that_do_not_fit_are_refused(
    tmp_path: Path, rows: Tensor, labels: list[int], skipped: list[str]
) -> None:
    with pytest.raises(ValueError, match=r"shard 0 of .* must hold 4 rows of \(2, 3, 2, 2\)") as caught:
        ShardWriter(tmp_path / "s", LATENTS).write(0, rows, labels, skipped)
    assert f"{tuple(rows.shape)}, {len(labels)} labels and {len(skipped)} skipped" in str(caught.value)


@settings(max_examples=15)
@given(cuts=st.lists(st.integers(0, 10), max_size=4))
def test_it_does_not_matter_how_a_shard_is_cut_into_parts(
    cuts: list[int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Rows, labels, sums and checksums are the same to the bit; the file is the one that np.save writes."""
    layout, root = replace(LATENTS, per_shard=10), tmp_path_factory.getbasetemp()
    rows, labels = rows_of(layout), [i % 2 for i in range(10)]
    borders = [0, *sorted(cuts), 10]
    for name, ends in (("whole", [0, 10]), ("cut", borders)):
        shutil.rmtree(root / name, ignore_errors=True)
        writer = ShardWriter(root / name, layout)
        parts = [Part(rows=rows[a:b], labels=labels[a:b]) for a, b in itertools.pairwise(ends)]
        writer.write_parts(0, parts)
        writer.finish()
    assert content(root / "cut") == content(root / "whole")
    buffer = io.BytesIO()
    np.save(buffer, rows.view(torch.uint16).numpy())
    assert (root / "whole" / "00000.npy").read_bytes() == buffer.getvalue()


def test_parts_that_do_not_make_up_the_shard_leave_nothing_behind(tmp_path: Path) -> None:
    writer, rows = ShardWriter(tmp_path / "s", LATENTS), rows_of(LATENTS)
    with pytest.raises(
        ValueError, match=r"must hold 4 rows .*, got \(2, 2, 3, 2, 2\), 2 labels and 1 skipped"
    ):
        writer.write_parts(0, [Part(rows=rows[:2], labels=[0, 1], skipped=["x"])])
    assert [path.name for path in (tmp_path / "s").iterdir()] == ["header.json"]


@pytest.mark.parametrize(("dtype", "value"), [("bfloat16", torch.nan), ("float16", 1e6)])
def test_values_that_are_not_finite_are_not_kept(tmp_path: Path, dtype: str, value: float) -> None:
    rows = torch.zeros(4, 2, 3, 2, 2)
    rows[2, 1, 0, 0, 0] = value
    writer = ShardWriter(tmp_path / "s", replace(LATENTS, dtype=dtype))
    with pytest.raises(ValueError, match=f"shard 0 of .* not finite in {dtype}"):
        writer.write(0, rows, [0] * 4)
    assert writer.missing() == [0, 1, 2]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: f.unlink(), "00001.npy is damaged or missing"),
        (lambda f: f.write_bytes(f.read_bytes()[:-8]), "00001.npy is damaged or missing"),
        (lambda f: f.write_bytes(b"nothing of the kind"), "00001.npy is damaged or missing"),
        (
            lambda f: np.save(f, np.zeros((3, 2, 3, 2, 2), np.uint16)),
            r"00001.npy is damaged: it holds \(3, 2, 3",
        ),
    ],
)
def test_damaged_shards_are_named_when_opened(
    tmp_path: Path, spoil: Callable[[Path], object], message: str
) -> None:
    write(tmp_path / "s")
    spoil(tmp_path / "s" / "00001.npy")
    with pytest.raises(ValueError, match=message):
        Shards(tmp_path / "s")


def test_one_changed_bit_is_found_and_mended_as_the_message_says(tmp_path: Path) -> None:
    shards, file = write(tmp_path / "s"), tmp_path / "s" / "00001.npy"
    damaged = bytearray(file.read_bytes())
    damaged[-1] ^= 1
    file.write_bytes(damaged)
    with pytest.raises(
        ValueError, match=r"00001.npy is damaged: its checksum.*delete it together with index.json"
    ):
        Shards(tmp_path / "s").verify()
    file.unlink()
    (tmp_path / "s" / "index.json").unlink()
    mended = write(tmp_path / "s")
    mended.verify()
    assert mended.fingerprint() == shards.fingerprint()


FILES = ["header.json", "index.json", "00000.json", "labels.npy", "00000.npy"]


def verified(folder: Path) -> Shards | str:
    """The shards if all is as it was written, otherwise what is said."""
    try:
        shards = Shards(folder)
        shards.verify()
    except ValueError as error:
        return str(error)
    return shards


@pytest.mark.parametrize("every", [61, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", FILES)
def test_any_flipped_bit_is_found(tmp_path: Path, name: str, every: int) -> None:
    """In data, labels, statistics and names; all but the few that change nothing, such as a line break."""
    sound = write(tmp_path / "s")
    file = tmp_path / "s" / name
    content, passed = file.read_bytes(), 0
    for bit in range(0, 8 * len(content), every):
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        file.write_bytes(damaged)
        found = verified(tmp_path / "s")
        if isinstance(found, str):
            assert re.search(r"s/[a-z0-9]+\.(npy|json) is damaged", found)
        else:
            passed += 1
            assert found.index == sound.index
            assert found.fingerprint() == sound.fingerprint()
            assert name not in ("header.json", "00000.npy")
    assert passed < 0.01 * 8 * len(content) / every + 1


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("index.json", {"dtype": "float8"}, "do not make up shards"),
        ("index.json", {"rows": [4, 4]}, "do not make up shards"),
        ("index.json", {"rows": [4, 4, -1]}, "do not make up shards"),
        ("index.json", {"shape": ["2"]}, "do not make up shards"),
        ("index.json", {"attributes": {"classes": 2}}, "do not make up shards"),
        ("index.json", {"attributes": None, "sha256": 3}, "it has no fitting attributes, sha256"),
        ("index.json", {"dtype": "float16"}, "00000.npy is damaged: it holds uint16, not float16"),
        ("index.json", {"rows": [4, 4, 1]}, r"labels.npy is damaged: it holds \(10,\) int64, not 9 int64"),
        ("index.json", {"attributes": {"classes": ["x"]}}, "labels must be 0 to 0, got 0 to 1"),
    ],
)
def test_an_index_that_was_edited_is_refused_when_opened(
    tmp_path: Path, name: str, changes: dict[str, Any], message: str
) -> None:
    write(tmp_path / "s")
    file = tmp_path / "s" / name
    write_json(file, read_json(file) | changes)
    with pytest.raises(ValueError, match=message):
        Shards(tmp_path / "s")


def test_labels_without_a_class_are_refused_when_opened(tmp_path: Path) -> None:
    write(tmp_path / "s")
    for labels, message in (([2] * 10, "labels must be 0 to 1, got 2 to 2"), ([-1] * 10, "got -1 to -1")):
        np.save(tmp_path / "s" / "labels.npy", np.array(labels))
        with pytest.raises(ValueError, match=message):
            Shards(tmp_path / "s")
    np.save(tmp_path / "s" / "labels.npy", np.array([None] * 10), allow_pickle=True)
    with pytest.raises(ValueError, match=r"labels.npy is damaged or missing: Object arrays cannot be loaded"):
        Shards(tmp_path / "s")


def test_the_kind_is_checked(tmp_path: Path) -> None:
    write(tmp_path / "s")
    with pytest.raises(ValueError, match="holds latents, but images are needed here"):
        Shards(tmp_path / "s", kind="images")
    with pytest.raises(FileNotFoundError, match=r"images folder .*none does not exist"):
        Shards(tmp_path / "none", kind="images")


def test_fingerprint_names_rows_and_labels(tmp_path: Path) -> None:
    first = write(tmp_path / "a").fingerprint()
    assert write(tmp_path / "b").fingerprint() == first
    assert write(tmp_path / "c", seed=1).fingerprint() != first
    writer, rows = ShardWriter(tmp_path / "d", LATENTS), rows_of(LATENTS)
    for shard in writer.missing():  # the same rows, of other classes
        span = LATENTS.span(shard)
        writer.write(shard, rows[span.start : span.stop], [0 for _ in span])
    assert writer.finish().fingerprint() != first


def test_a_process_that_reads_gets_the_folder_and_not_its_content(tmp_path: Path) -> None:
    layout = replace(LATENTS, kind="features", shape=(2, 64, 32), dtype="float32")
    shards = write(tmp_path / "s", layout)
    sent = pickle.dumps(shards)
    assert len(sent) < 1000 < rows_of(layout).nbytes
    assert torch.equal(pickle.loads(sent).gather(np.arange(10)), rows_of(layout))
