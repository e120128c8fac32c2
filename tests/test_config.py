"""Strict configs: what is written comes back the same, and nothing else comes in."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import pytest
import tyro
from hypothesis import given
from hypothesis import strategies as st

from openpae import config as configs


@dataclass(frozen=True, kw_only=True)
class Inner:
    """Part of the sample config."""

    rate: float = 0.5
    """A number."""
    steps: int = 3
    """A count."""

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise ValueError(f"inner.steps must be >= 0, got {self.steps}")


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One field of each kind that a config may have."""

    name: str
    """Has no default."""
    flag: bool = False
    """A switch."""
    folder: Path = Path("data")
    """A path."""
    choice: Literal["one", "two", 3] = "one"
    """A choice."""
    pair: tuple[float, float] = (0.1, 0.2)
    """Two numbers."""
    sizes: tuple[int, ...] = ()
    """Any number of counts."""
    note: str | None = None
    """Text or nothing."""
    inner: Inner = field(default_factory=Inner)
    """A config in a config."""
    other: Inner | None = None
    """A config or nothing."""


@dataclass(frozen=True, kw_only=True)
class Other:
    """Another part, for fields that choose."""

    name: str = "x"
    """A text."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A field that takes one of two configs."""

    part: Inner | Other = field(default_factory=Inner)
    """Either."""


numbers = st.floats(allow_nan=False, allow_infinity=False)
inners = st.builds(Inner, rate=numbers, steps=st.integers(0, 2**63 - 1))
samples = st.builds(
    Sample,
    name=st.text(),
    flag=st.booleans(),
    folder=st.text(min_size=1).map(Path),
    choice=st.sampled_from(["one", "two", 3]),
    pair=st.tuples(numbers, numbers),
    sizes=st.lists(st.integers(-(2**63) + 1, 2**63 - 1)).map(tuple),
    note=st.none() | st.text(),
    inner=inners,
    other=st.none() | inners,
)


def written(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "sample.yaml"
    file.write_text(text, encoding="utf-8")
    return file


@given(sample=samples)
def test_what_is_saved_is_loaded(sample: Sample, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Every float to the bit, every text to the letter: names like "no", "1e3" or a line break included."""
    file = tmp_path_factory.getbasetemp() / "any.yaml"
    configs.save(sample, file)
    assert configs.load(Sample, file) == sample


@given(sample=samples)
def test_plain_data_and_configs_are_one(sample: Sample) -> None:
    assert configs.from_dict(Sample, configs.to_dict(sample)) == sample


@given(old=samples, new=samples)
def test_configs_differ_where_their_fields_do(old: Sample, new: Sample) -> None:
    assert not configs.differences(old, old)
    assert bool(configs.differences(old, new)) == (old != new)


def test_differences_name_the_field_and_both_values() -> None:
    old = Sample(name="x", other=Inner(rate=0.25))
    new = replace(old, inner=Inner(steps=4), other=None)
    assert configs.differences(old, new) == [
        "inner.steps: 3 -> 4",
        "other: (absent) -> None",
        "other.rate: 0.25 -> (absent)",
        "other.steps: 3 -> (absent)",
    ]


@given(sample=samples.filter(lambda sample: sample.other is not None))
def test_flags_leave_what_they_do_not_name(sample: Sample) -> None:
    """The command line takes a loaded config as its default."""
    assert tyro.cli(Sample, args=[], default=sample) == sample
    changed = tyro.cli(Sample, args=["--inner.rate", "2e-4", "--flag"], default=sample)
    assert changed == replace(sample, flag=True, inner=replace(sample.inner, rate=2e-4))


@pytest.mark.parametrize("part", [Inner(steps=7), Other(name="kind")])
def test_a_field_that_chooses_says_which(part: Inner | Other, tmp_path: Path) -> None:
    plain = configs.to_dict(Choice(part=part))
    assert plain["part"]["kind"] == type(part).__name__
    configs.save(Choice(part=part), tmp_path / "choice.yaml")
    assert configs.load(Choice, tmp_path / "choice.yaml") == Choice(part=part)


def test_a_field_that_chooses_takes_the_first_unless_told() -> None:
    assert configs.from_dict(Choice, {"part": {"steps": 2}}) == Choice(part=Inner(steps=2))
    old, new = Choice(), Choice(part=Other())
    assert "part.kind: Inner -> Other" in configs.differences(old, new)


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        ({"kind": "Third"}, ValueError, "part.kind must be one of Inner, Other, got 'Third'"),
        ({"kind": "Other", "steps": 1}, ValueError, "unknown key part.steps; known keys: name"),
        ({"kind": None}, ValueError, "part.kind must be one of Inner, Other, got None"),
        (3, TypeError, "part must be a mapping of keys, got 3 (int)"),
    ],
)
def test_a_wrong_choice_is_named(data: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        configs.from_dict(Choice, {"part": data})
    assert str(caught.value) == message


def test_a_file_of_one_of_several_kinds(tmp_path: Path) -> None:
    configs.save(Other(name="y"), tmp_path / "part.yaml")
    assert configs.load_one_of((Inner, Other), tmp_path / "part.yaml") == Other(name="y")
    with pytest.raises(ValueError, match="is of kind 'Other', but a Inner or a Choice is needed here"):
        configs.load_one_of((Inner, Choice), tmp_path / "part.yaml")


def test_saving_replaces_the_file_in_one_move(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    configs.save(Inner(rate=0.25), file)
    configs.save(Inner(rate=0.75), file)
    assert configs.load(Inner, file) == Inner(rate=0.75)
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


def test_integers_serve_as_floats_and_nothing_else_is_converted() -> None:
    inner = configs.from_dict(Inner, {"rate": 2})
    assert inner.rate == 2.0
    assert type(inner.rate) is float


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        ({"steps": 1.0}, TypeError, "inner.steps must be int, got 1.0 (float)"),
        ({"steps": True}, TypeError, "inner.steps must be int, got True (bool)"),
        ({"rate": False}, TypeError, "inner.rate must be float, got False (bool)"),
        ({"rate": "2e-4"}, TypeError, "inner.rate must be float, got '2e-4' (str); in YAML write 0.0002"),
        ({"rate": "1e-7"}, TypeError, "inner.rate must be float, got '1e-7' (str); in YAML write 1.0e-07"),
        ({"steps": "1e3"}, TypeError, "inner.steps must be int, got '1e3' (str); in YAML write 1000"),
        ({"steps": "0.5"}, TypeError, "inner.steps must be int, got '0.5' (str)"),
        ({"rate": "nan"}, TypeError, "inner.rate must be float, got 'nan' (str)"),
        ({"rate": float("nan")}, ValueError, "inner.rate must be a finite number, got nan"),
        ({"rate": float("inf")}, ValueError, "inner.rate must be a finite number, got inf"),
        ({"rate": None}, TypeError, "inner.rate must be float, got None (NoneType)"),
        ({"ratte": 1.0}, ValueError, "unknown key inner.ratte; did you mean 'rate'?"),
        ({"zzz": 1.0}, ValueError, "unknown key inner.zzz; known keys: rate, steps"),
        ({"\n": 1.0}, ValueError, "unknown key inner.'\\n'; known keys: rate, steps"),
        ({7: 1.0}, ValueError, "unknown key inner.7; known keys: rate, steps"),
        ([1, 2], TypeError, "inner must be a mapping of keys, got [1, 2] (list)"),
        ({"steps": -1}, ValueError, "inner.steps must be >= 0, got -1"),
    ],
)
def test_a_fault_below_is_named_with_its_place(data: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        configs.from_dict(Sample, {"name": "x", "inner": data})
    assert str(caught.value) == message


LARGE = f"{str(2**1024)[:38]}...{str(2**1024)[-39:]}"


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        ({}, ValueError, "missing key name; it has no default"),
        ({"name": "x", "choice": "three"}, ValueError, "choice must be one of 'one', 'two', 3, got 'three'"),
        ({"name": "x", "choice": True}, ValueError, "choice must be one of 'one', 'two', 3, got True"),
        ({"name": "x", "pair": [1.0]}, ValueError, "pair must hold 2 values, got 1"),
        ({"name": "x", "pair": [1.0, "a"]}, TypeError, "pair[1] must be float, got 'a' (str)"),
        ({"name": "x", "sizes": 3}, TypeError, "sizes must be a list, got 3 (int)"),
        ({"name": "x", "sizes": "12"}, TypeError, "sizes must be a list, got '12' (str)"),
        ({"name": "x", "folder": 3}, TypeError, "folder must be Path, got 3 (int)"),
        ({"name": "x", "note": 3}, TypeError, "note must be str, got 3 (int)"),
        ({"name": False}, TypeError, "name must be str, got False (bool)"),
        ({"name": "x", "choice": 3.0}, ValueError, "choice must be one of 'one', 'two', 3, got 3.0"),
        ({"name": "x", "choice": [1]}, ValueError, "choice must be one of 'one', 'two', 3, got [1]"),
        ({"name": "x", "sizes": [2**63]}, ValueError, f"sizes[0] must be below 2^63, got {2**63}"),
        ({"name": "x", "pair": [0, 2**1024]}, ValueError, f"pair[1] must be below 1.8e308, got {LARGE}"),
        ({"name": "x", "folder": "\0"}, ValueError, "folder must be a path without character 0, got '\\x00'"),
        ({"name": ["x"] * 99}, TypeError, "name must be str, got ['x', 'x', 'x', 'x', 'x', ...] (list)"),
    ],
)
def test_a_fault_at_the_top_is_named(data: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        configs.from_dict(Sample, data)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rate: 2e-4", "rate must be float, got '2e-4' (str); in YAML write 0.0002"),
        ("rate: .nan", "rate must be a finite number, got nan"),
        ("rate: 1.0\nrate: 2.0", "key rate stands twice in one mapping"),
        ("rate: {a: 1, a: 2}", "key a stands twice in one mapping"),
        ("rate: 2024-99-99", "is not valid YAML: month must be in 1..12"),
        ("rate: !!bool maybe", "is not valid YAML: 'maybe'"),
        ("rate: " + "[" * 1000, "is not valid YAML: maximum recursion depth exceeded"),
        ("rate: " + "9" * 5000, "is not valid YAML: Exceeds the limit"),
        ("rate: *a" + "9" * 5000, 'in "<unicode string>", line 2, column 7:'),
        ("? [1]\n: 2", "is not valid YAML"),
        ("note: " + "x" * 2**16, "is no config: it has 65,554 bytes, at most 65,536 are read"),
        ("steps: 0x1" + "0" * 5000, "steps must be below 2^63, got a very large int"),
        ("steps: yes", "steps must be int, got True (bool)"),
        ("steps: 2024-01-01", "steps must be int, got datetime.date(2024, 1, 1) (date)"),
        ("rate: [1", "is not valid YAML"),
        ("rate: !!python/object/apply:os.getcwd []", "is not valid YAML"),
        ("rate: 1.0\n---\nrate: 2.0", "is not valid YAML"),
    ],
)
def test_traps_of_yaml_are_errors_that_name_the_file(tmp_path: Path, text: str, message: str) -> None:
    file = written(tmp_path, f"kind: Inner\n{text}")
    with pytest.raises((ValueError, TypeError)) as caught:
        configs.load(Inner, file)
    assert str(file) in str(caught.value)
    assert message in str(caught.value)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "must hold keys and values, got NoneType"),
        (b"- 1\n- 2\n", "must hold keys and values, got list"),
        (b"kind: Inner\nrate: \xff\n", "is not valid YAML"),
        (b"rate: 1.0\n", "is of kind None, but a Inner is needed here"),
        (b"kind: Other\nrate: 1.0\n", "is of kind 'Other', but a Inner is needed here"),
        (b"kind: [Inner]\nrate: 1.0\n", r"is of kind \['Inner'\], but a Inner is needed here"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "other.yaml"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        configs.load(Inner, file)


def test_presets_are_found_by_name() -> None:
    assert configs.find("tokenizer/tiny") == configs.PRESETS / "tokenizer" / "tiny.yaml"


def test_an_unknown_preset_is_answered_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"no config file or preset 'tokenizer/tinny'.*tokenizer/tiny"
    ):
        configs.find("tokenizer/tinny")
    with pytest.raises(FileNotFoundError, match="no config file or preset"):
        configs.find(tmp_path)  # a folder is no config


def test_a_config_that_can_not_be_written_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    configs.save(Inner(), tmp_path / "a.yaml")
    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match=r"a.yaml cannot be written: No space left on device"):
        configs.save(Inner(steps=4), tmp_path / "a.yaml")
    assert [path.name for path in tmp_path.iterdir()] == ["a.yaml"]
    assert configs.load(Inner, tmp_path / "a.yaml") == Inner()


@dataclass(frozen=True, kw_only=True)
class Numbers:
    share: float | None = 0.5
    count: int = 1
    betas: tuple[float, ...] = (0.9, 0.95)
    free: float = 0.0
    name: str = "x"

    def __post_init__(self) -> None:
        configs.check_fields(self, "n.", share="(0, 1]", count="[1, 65536]", betas="[0, 1)")


@pytest.mark.parametrize(
    "fields",
    [
        {"share": 1.0},
        {"share": math.nextafter(0, 1)},
        {"share": None},
        {"count": 1},
        {"count": 65536},
        {"betas": (0.0, math.nextafter(1, 0))},
        {"betas": ()},
        {"free": -1e308},
    ],
)
def test_the_closed_ends_of_an_interval_are_allowed(fields: dict[str, Any]) -> None:
    assert Numbers(**fields) == Numbers(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"share": 0.0}, "n.share must lie in (0, 1], got 0.0"),
        ({"share": math.nextafter(1, 2)}, "n.share must lie in (0, 1], got 1.0000000000000002"),
        ({"count": 0}, "n.count must be >= 1, got 0"),
        ({"count": 65537}, "n.count must be <= 65536, got 65537"),
        ({"betas": (0.9, 1.0)}, "n.betas must lie in [0, 1), got (0.9, 1.0)"),
        ({"share": math.nan}, "n.share must be a finite number, got nan"),
        ({"free": math.inf}, "n.free must be a finite number, got inf"),
        ({"free": math.nan}, "n.free must be a finite number, got nan"),
    ],
)
def test_numbers_outside_of_their_interval_are_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        Numbers(**fields)


def test_an_integer_that_no_float_holds_is_outside() -> None:
    with pytest.raises(ValueError, match=r"^n.count must be <= 65536, got 1000\d*\.\.\.0*$"):
        Numbers(count=10**400)
