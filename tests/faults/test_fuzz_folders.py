"""Whatever happens to a file of a folder of ours, pae info says what it is or gives one line."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openpae.commands.describe import describe
from tests.engine.runs import same, state_of
from tests.faults.running import run, workspace

FOLDERS = ["packed", "latents", "tokenizer", "generator", "generator-run"]
JUNK = [
    b"",
    b"{}",
    b"[]",
    b"3",
    b"null",
    b'"x"',
    b'{"step": "x"}',
    b"kind: 3\n",
    b"kind: GeneratorRun\nloop: 3\n",
]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("folders")
    workspace(root)
    return root


@st.composite
def spoiling(draw: st.DrawFn) -> Callable[[bytes], bytes]:
    """A change of a file's content."""
    place, bit = draw(st.floats(0, 1, exclude_max=True)), draw(st.integers(0, 7))
    kind = draw(st.sampled_from(["flip", "flip", "head", "cut", "junk", "noise"]))
    junk, noise = draw(st.sampled_from(JUNK)), draw(st.binary(min_size=1, max_size=8))

    def spoil(content: bytes) -> bytes:
        at = int(place * len(content))
        match kind:
            case "flip":
                return (
                    content[:at] + bytes(byte ^ 1 << bit for byte in content[at : at + 1]) + content[at + 1 :]
                )
            case "head":  # readers stumble over headers
                at = int(place * min(64, len(content)))
                return content[:at] + noise + content[at + len(noise) :]
            case "cut":
                return content[:at]
            case "junk":
                return junk
        return content[:at] + noise + content[at:]

    return spoil


def check(home: Path, name: str, data: st.DataObject) -> None:
    folder = home / name
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name[0] != ".")
    file = data.draw(st.sampled_from(files))
    sound = file.read_bytes()
    if data.draw(st.integers(0, 9)):
        file.write_bytes(data.draw(spoiling())(sound))
    else:
        file.unlink()
    try:
        line = said(folder)
    finally:
        file.write_bytes(sound)
    assert line is None or (line.strip() and "\n" not in line.strip())


def said(folder: Path) -> str | None:
    try:
        describe(folder, verify=True)
    except (ValueError, TypeError, OSError) as error:  # what the command turns into one line
        return str(error)
    return None


@settings(max_examples=40)
@pytest.mark.parametrize("name", FOLDERS)
@given(data=st.data())
def test_a_spoiled_file_gives_facts_or_one_line(home: Path, name: str, data: st.DataObject) -> None:
    check(home, name, data)


@pytest.mark.slow
@settings(max_examples=1500, derandomize=False)
@pytest.mark.parametrize("name", FOLDERS)
@given(data=st.data())
def test_many_spoiled_files_give_facts_or_one_line(home: Path, name: str, data: st.DataObject) -> None:
    check(home, name, data)


def check_resume(home: Path, seed: int) -> None:
    """A run whose newest checkpoint is spoiled ends in the same weights, or in one line."""
    random, copy = Random(seed), home / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(home / "generator-run", copy / "generator-run")
    shutil.copytree(home / "latents", copy / "latents")
    newest = copy / "generator-run" / "checkpoints" / "step-00000002"
    file = random.choice(sorted(newest.iterdir()))
    content = file.read_bytes()
    at = random.randrange(len(content))
    file.write_bytes(random.choice([content[:at], content[:at] + b"\xff" + content[at + 1 :], *JUNK[:3]]))
    outcome = run("pae train-generator generator-run/config.yaml generator-run", copy)
    assert outcome.code in (0, 2), outcome.everything
    assert "Traceback" not in outcome.everything
    if outcome.code == 0 and file.name != "README.md":
        assert same(state_of(copy / "generator-run"), state_of(home / "generator-run"))


@pytest.mark.parametrize("seed", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in range(1, 40))])
def test_a_run_goes_on_past_a_spoiled_checkpoint_or_gives_one_line(home: Path, seed: int) -> None:
    check_resume(home, seed)


def test_the_command_says_so(home: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(home / "generator-run", tmp_path / "run")
    (copy / "config.yaml").write_text("kind: GeneratorRun\nloop: 3\n")
    outcome = run("pae info run", tmp_path)
    assert (outcome.code, outcome.line) == (2, "run/config.yaml is no config of a run: it has no loop.steps")
