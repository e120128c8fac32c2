"""What the README says runs: its Python, its commands, its links, and the command that CI calls."""

from __future__ import annotations

import importlib
import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest

from openpae import cli
from openpae.quickstart import plans, run

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [README, *((ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("commands.md", "hub.md"))]
BLOCKS = "\n".join(re.findall(r"```bash\n(.*?)```", "\n".join(PAGES), re.S)).replace("\\\n", " ")
COMMANDS = re.findall(r"^pae (.*)$", BLOCKS, re.M)


# A dozen emoji are all of one class.
@pytest.mark.filterwarnings("ignore:.* has no image of class")
@pytest.mark.assets
def test_the_python_runs_on_what_the_quickstart_leaves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The whole quickstart on a few emoji, two seconds a stage, then the README's ten lines on its result."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run, "SAMPLER", replace(run.SAMPLER, steps=3))
    timed = plans.timed
    monkeypatch.setattr(
        plans, "timed", lambda stage, name, left, **options: timed(stage, name, left / 5, **options)
    )
    out = Path("runs/quickstart")
    page = run.run_quickstart(out, 1.0, limit=12).report.read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") >= 2
    assert page.count("<svg") >= 4
    assert not re.findall(r'(?:src|href)="http', page)  # nothing is fetched from elsewhere
    for text in (
        "PSNR",
        "Frechet distance",
        "OpenMoji",
        "CC BY-SA 4.0",
        "train tokenizer",
        "global_batch_size",
    ):
        assert text in page
    (code,) = re.findall(r"```python\n(.*?)```", README, re.S)
    names: dict[str, object] = {}
    exec(code, names)
    assert tuple(names["z"].shape) == (4, 32, 8, 8)  # type: ignore[attr-defined]
    assert tuple(names["again"].shape) == (4, 3, 64, 64)  # type: ignore[attr-defined]
    assert tuple(names["pictures"].shape) == (4, 3, 64, 64)  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=r"holds a quickstart with budget 1\.0"):
        run.run_quickstart(out, 2.0, limit=12)
    before = (out / "tokenizer" / "config.yaml").read_bytes()
    run.run_quickstart(out, 1.0, limit=12)  # again: nothing is trained
    assert (out / "tokenizer" / "config.yaml").read_bytes() == before


@pytest.mark.parametrize(("page", "count"), [("extending.md", 2), ("evaluation.md", 1)])
def test_the_python_of_the_pages_runs(page: str, count: int) -> None:
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.S)
    assert len(blocks) == count
    for block in blocks:
        exec(block, {})


def test_the_table_of_the_paper_names_code_that_exists() -> None:
    text = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    table = text[text.index("## Paper -> code") : text.index("## Decisions")]
    names = re.findall(r"`([a-z_]+(?:\.[A-Za-z_]+)+)`", table)
    assert len(names) > 30
    for name in names:
        parts = name.split(".")
        for split in range(len(parts), 0, -1):
            try:
                found: object = importlib.import_module("openpae." + ".".join(parts[:split]))
            except ModuleNotFoundError:
                continue
            for part in parts[split:]:
                found = getattr(found, part)
            break
        else:
            pytest.fail(f"design.md names {name}, which is not there")


def test_there_are_commands_to_check() -> None:
    assert len(COMMANDS) >= 30


@pytest.mark.parametrize("line", COMMANDS)
def test_every_command_line_parses(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parsed as typed; the work itself is cut off by the first file that is not there."""
    monkeypatch.chdir(tmp_path)
    arguments = shlex.split(line)
    if arguments[0] == "quickstart":
        monkeypatch.setattr(run, "run_quickstart", lambda *_, **__: run.Outcome(report=Path("report.html")))
        cli.main(arguments)
        return
    if arguments[0] in ("presets", "env") or arguments[:2] == [
        "sample",
        "openmoji",
    ]:  # they need no file of the user
        cli.main([*arguments, *(["--count", "1", "--steps", "1"] if arguments[0] == "sample" else [])])
        return
    with pytest.raises((FileNotFoundError, SystemExit)) as stop:
        cli.main([*arguments, "--debug"])
    if isinstance(stop.value, SystemExit):
        assert stop.value.code == 2
        pytest.fail(f"pae {line} does not parse")


def test_every_link_leads_somewhere() -> None:
    targets = re.findall(r"\]\(([^)#]+)\)", README)
    assert len(targets) >= 5
    for target in targets:
        if not target.startswith("http"):
            assert (ROOT / target).exists(), f"README links to {target}"


def test_ci_runs_the_test_command_of_the_readme_and_nothing_else() -> None:
    (command,) = re.findall(r"<!-- test command -->\n```bash\n(.*?)```", README, re.S)
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert "pytest -W error" in command
    assert "pytest" not in script  # it reads the command from here
    assert "<!-- test command -->" in script


def test_every_room_and_file_of_the_package_stands_in_the_readme() -> None:
    """The rooms and the files beside them; what is no module lies at the top of the repository, too."""
    (tree,) = re.findall(r"```\n(src/openpae/\n.*?)```", README, re.S)
    for path in (ROOT / "src" / "openpae").iterdir():
        if not path.name.startswith("_") and path.suffix != ".typed":
            name = f"{path.name}/" if path.is_dir() else path.name
            assert re.search(rf"(?:^|\s){re.escape(name)}(?:\s|$)", tree), f"{name} is not in the tree"
