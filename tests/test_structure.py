"""The shape of the package: imports run one way, and every public thing says what it is."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import openpae

ROOT = Path(openpae.__path__[0])
FILES = sorted(ROOT.rglob("*.py"))
# From the ground up. A room may import only rooms of lower floors, and no other room of its own floor.
FLOORS = [
    ("runtime",),
    ("config",),
    ("storage",),
    ("report", "data", "models", "engine"),
    ("objective", "interop"),
    ("sampling",),
    ("eval",),
    ("geometry",),
    ("train",),
    ("quickstart", "study", "bench", "plan", "demo"),
    ("commands",),
    ("cli",),
    ("__main__",),
]
# Inside a room, a file may import only files that stand before it. A new file must be given its place here.
FILES_OF = {
    "runtime": "escape names extras signals processes terminal children device draws provenance cards",
    "storage": "pairs files outputs weights registry assets model_folder card hub",
    "data": "settings crops shards shard_writer pixels classes fingerprints listing colour decode "
    "records npz archives label_files parquet arrays hub_images forms backgrounds order readers "
    "images packing caches openmoji training label_maps scenes",
    "models": "configs precision layers lpips lpips_weights backbones vfms encoders upsampling priors "
    "modulator decoder tokenizer starts generator dit ditdh denoiser discriminator saved",
    "engine": "pace settings trackers optim task ema health journal parallel state_file checkpoints "
    "diagnosis run_folder loop",
    "objective": "settings flow losses rivals terms",
    "interop": "kinds foreign_latents released diffusers_models spaces any_tokenizer diffusers_adapter "
    "diffusers_pipeline export",
    "sampling": "settings solvers guidance sampler sample_set arguments pipeline interpolation",
    "eval": "settings image_stream estimate frechet inception reconstruction scores extractors features "
    "reference generation evaluate guidance_search run",
    "geometry": "settings clusters metrics proxies interpolation measure profile_page profile",
    "train": "settings given targets refiner tokenizer online generator",
    "study": "settings shared stage plan work verdicts table correlations power once page rehearse run",
    "bench": "record noise generator tokenizer",
    "plan": "settings memory fakes trial estimate text",
    "quickstart": "workers plans verdict page run",
    "commands": "fields completion console pairs presets describe env data train sampler sample "
    "reconstruct interpolate search measure publish study bench plan demo",
    "demo": "inputs studio page",
}
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def names_imported(file: Path) -> Iterator[str]:
    """The full names that a file imports."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} imports relatively; write the full name"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imported(file: Path) -> Iterator[tuple[str, ...]]:
    """The modules of the package that a file imports, as (room, file) or (room,)."""
    for name in names_imported(file):
        parts = name.split(".")
        if parts[0] == "openpae" and len(parts) > 1 and not parts[1].startswith("__"):
            yield tuple(parts[1:3])


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_run_one_way(file: Path) -> None:
    parts = file.relative_to(ROOT).with_suffix("").parts
    room = parts[0]
    if room == "__init__":  # the public API imports from everywhere
        return
    assert room in FLOOR_OF, f"give {room} its floor in FLOORS"
    inside = FILES_OF.get(room, "").split()
    if len(parts) > 1 and parts[1] != "__init__":
        assert parts[1] in inside, f"give {room}/{parts[1]} its place in FILES_OF"
    for module in imported(file):
        if module[0] != room:
            assert FLOOR_OF[module[0]] < FLOOR_OF[room], f"{file.name} imports {'.'.join(module)} from above"
        elif len(module) > 1 and len(parts) > 1 and module[1] in inside:
            before = inside.index(module[1]) < inside.index(parts[1])
            assert before, f"{room}/{parts[1]} imports {module[1]}, which stands after it in FILES_OF"


def test_every_file_of_a_room_has_its_place() -> None:
    for room, names in FILES_OF.items():
        there = {file.stem for file in (ROOT / room).glob("*.py")} - {"__init__"}
        assert sorted(there) == sorted(names.split()), room


@pytest.mark.parametrize("room", FILES_OF)
def test_a_room_says_what_is_where(room: str) -> None:
    text = ast.get_docstring(ast.parse((ROOT / room / "__init__.py").read_text(encoding="utf-8"))) or ""
    assert set(FILES_OF[room].split()) - set(re.findall(r"`(\w+)", text)) == set()


def test_three_rooms_import_torch_distributed() -> None:
    """The rest asks `runtime.processes`, and so works for one process too."""
    parallel = ("torch.distributed", "torch.nn.parallel")
    rooms = {
        file.relative_to(ROOT).parts[0]
        for file in FILES
        for name in names_imported(file)
        if name.startswith(parallel)
    }
    assert rooms == {"runtime", "engine", "plan"}


def undocumented(node: ast.AST, at: str) -> Iterator[str]:
    """Public functions, classes and methods without a docstring, however deep in classes."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            if child.name.startswith("_"):
                continue
            name = f"{at}.{child.name}"
            inherited = isinstance(child, ast.FunctionDef) and _takes_over(child, node)
            if not ast.get_docstring(child) and not inherited:
                yield name
            if isinstance(child, ast.ClassDef):
                yield from undocumented(child, name)


def _takes_over(function: ast.FunctionDef, owner: ast.AST) -> bool:
    """A method that only means what its base class says of it (PyYAML's construct_mapping, for one)."""
    bases = owner.bases if isinstance(owner, ast.ClassDef) else []
    return any(isinstance(base, ast.Attribute) and base.attr == "SafeLoader" for base in bases)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_every_public_name_is_documented(file: Path) -> None:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    if file.read_text(encoding="utf-8").strip():
        assert ast.get_docstring(tree), f"{file.name} does not say what it is about"
    assert not list(undocumented(tree, file.stem))


def test_the_check_for_docstrings_sees_what_it_should() -> None:
    tree = ast.parse("class A:\n  'x'\n  def f(self): ...\n  def _g(self): ...\ndef h(): ...\nclass _B: ...")
    assert list(undocumented(tree, "m")) == ["m.A.f", "m.h"]
