"""Whatever a config file holds, the user gets a config or one line: never another exception, never a wait."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openpae import config as configs
from openpae.sampling.settings import SamplerConfig
from openpae.train.settings import GeneratorRun, RefinerRun, TokenizerRun

RUNS: dict[str, type] = {"refiner": RefinerRun, "tokenizer": TokenizerRun, "generator": GeneratorRun}
PRESETS = {name: configs.to_dict(configs.load(kind, f"{name}/tiny")) for name, kind in RUNS.items()}
TEXTS = {name: (configs.PRESETS / name / "tiny.yaml").read_text(encoding="utf-8") for name in RUNS}

plain = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 3),
    st.sampled_from([10**20, -(10**20), 10**400, 2**63, 2**64]),
    st.floats(),
    st.sampled_from(["", "1e-4", "auto", "nan", "random-tiny", "a\0b", "\ud800"]) | st.text(max_size=5),
    st.binary(max_size=3),
)
junk = st.recursive(
    plain, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(plain, inner, max_size=3), max_leaves=6
)


def places(data: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths to all values of a config, mappings included."""
    for key, value in data.items():
        yield (*at, key)
        if isinstance(value, dict):
            yield from places(value, (*at, key))


@st.composite
def spoiled(draw: st.DrawFn, preset: dict[str, Any]) -> dict[str, Any]:
    """A preset with one to three values replaced, keys added or keys removed."""
    data = copy.deepcopy(preset)
    for _ in range(draw(st.integers(1, 3))):
        *path, last = draw(st.sampled_from(list(places(data))))
        place = data
        for key in path:
            place = place[key]
        match draw(st.sampled_from(["replace", "replace", "replace", "remove", "add"])):
            case "replace":
                place[last] = draw(junk)
            case "remove":
                del place[last]
            case "add":
                place[draw(plain)] = draw(junk)
        if not data:
            break
    return data


def check_values(kind: type, data: Any, file: Path) -> None:
    """A config that comes back from a file the same, or one short line."""
    try:
        config = configs.from_dict(kind, data)
    except (ValueError, TypeError) as error:
        check_message(str(error))
        return
    configs.save(config, file)
    assert configs.load(kind, file) == config


def check_text(kind: type, text: str, file: Path) -> None:
    """A config, or one short line that begins with the file's name."""
    file.write_text(text, encoding="utf-8", errors="surrogatepass")
    try:
        configs.load(kind, file)
    except (ValueError, TypeError) as error:
        check_message(str(error), str(file))


def check_message(message: str, begins: str = "") -> None:
    assert message.startswith(begins)
    assert 0 < len(message) < 1000
    assert "\n" not in message


@settings(deadline=5000)
@pytest.mark.parametrize("name", RUNS)
@given(data=st.data())
def test_any_values_give_a_config_or_one_line(
    name: str, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    check_values(
        RUNS[name], data.draw(spoiled(PRESETS[name])), tmp_path_factory.getbasetemp() / "fuzzed.yaml"
    )


@pytest.mark.slow
@settings(deadline=5000, max_examples=2000, derandomize=False)
@pytest.mark.parametrize("name", RUNS)
@given(data=st.data())
def test_many_values_give_a_config_or_one_line(
    name: str, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    check_values(
        RUNS[name], data.draw(spoiled(PRESETS[name])), tmp_path_factory.getbasetemp() / "fuzzed.yaml"
    )


SCRAPS = [
    *(
        "!!int x",
        "!!float x",
        "!!bool x",
        "!!timestamp x",
        "!!binary x",
        "!!null x",
        "!!set {a}",
        "!!omap [a]",
    ),
    *(
        "!!python/object/apply:os.getcwd []",
        "&a [*a]",
        "*a",
        "&a",
        "<<: *a",
        "? [1]\n: 2",
        "- ",
        "|",
        ">",
        "'",
    ),
    *("2024-99-99", "2024-01-01 99:99:99", "1:99", "0x", "0b", "1_", "9" * 5000, "[" * 400, "{a: " * 400),
    *(
        "\t",
        "\0",
        "\x85",
        "\ufeff",
        "---",
        "...",
        "%YAML 9.9",
        "%TAG ! x",
        "~",
        ".inf",
        "-.inf",
        ".nan",
        "1e999",
    ),
]


@st.composite
def scrawled(draw: st.DrawFn, text: str) -> str:
    """A config's text with up to four places overwritten."""
    for _ in range(draw(st.integers(0, 4))):
        start = int(draw(st.floats(0, 1)) * len(text))
        scrap = draw(st.sampled_from(SCRAPS) | st.text(max_size=4))
        text = text[:start] + scrap + text[start + draw(st.integers(0, 12)) :]
    return text


@settings(deadline=5000)
@pytest.mark.parametrize("name", RUNS)
@given(data=st.data())
def test_any_text_gives_a_config_or_one_line(
    name: str, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    check_text(RUNS[name], data.draw(scrawled(TEXTS[name])), tmp_path_factory.getbasetemp() / "fuzzed.yaml")


@pytest.mark.slow
@settings(deadline=5000, max_examples=1000, derandomize=False)
@pytest.mark.parametrize("name", RUNS)
@given(data=st.data())
def test_many_texts_give_a_config_or_one_line(
    name: str, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    check_text(RUNS[name], data.draw(scrawled(TEXTS[name])), tmp_path_factory.getbasetemp() / "fuzzed.yaml")


def test_a_bomb_of_aliases_is_answered_at_once(tmp_path: Path) -> None:
    """Ten levels that name 10^10 values: PyYAML keeps each once, but a message must not write them out."""
    nested = "x"
    for level in range(10):
        nested = f"[&a{level} {nested}" + f", *a{level}" * 9 + "]"
    (tmp_path / "bomb.yaml").write_text(f"kind: SamplerConfig\nsteps: {nested}\n")
    with pytest.raises(TypeError, match=r"steps must be int, got \[\[.*\(list\)") as caught:
        configs.load(SamplerConfig, tmp_path / "bomb.yaml")
    assert len(str(caught.value)) < 1000
