"""The shape of the package: imports run one way, and every public thing says what it is."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import openpae

ROOT = Path(openpae.__path__[0])
FILES = sorted(ROOT.rglob("*.py"))
# Each module may import only itself and what stands before it. A new module must be given its place here.
ORDER = [
    *(
        "config",
        "storage",
        "weights",
        "folders",
        "card",
        "hub",
        "processes",
        "runtime",
        "assets",
        "layers",
        "backbones",
        "vfms",
        "encoders",
        "upsampling",
        "priors",
        "modulator",
        "tokenizer",
        "dit",
        "ditdh",
        "flow",
        "solvers",
        "guidance",
        "losses",
    ),
    *(
        "critics",
        "lpips_weights",
        "denoiser",
        "discriminator",
        "data",
        "checkpoint",
        "official",
        "sampling",
        "eval",
        "engine",
        "train",
    ),
    *(
        "evaluation",
        "report",
        "sample_files",
        "search",
        "walk",
        "pipeline",
        "diffusers_adapter",
        "export",
        "profile_page",
        "profile",
        "bench",
        "study",
        "describe",
        "quickstart_page",
        "quickstart",
        "commands",
        "cli",
        "__main__",
    ),
]


def imported_modules(file: Path) -> set[str]:
    """`from openpae.losses import gram_alignment`, `from openpae import losses` and `import openpae.losses`
    all count as losses."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("openpae.")}
        elif isinstance(node, ast.ImportFrom) and node.module == "openpae":
            found |= {alias.name for alias in node.names if not alias.name.startswith("__")}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} imports relatively; write the whole name"
            if (node.module or "").startswith("openpae."):
                found.add(str(node.module).split(".")[1])
    return found


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_run_one_way(file: Path) -> None:
    module = file.relative_to(ROOT).parts[0].removesuffix(".py")
    if module == "__init__":  # the public API imports from everywhere
        return
    assert module in ORDER, f"give {module} its place in ORDER"
    ahead = imported_modules(file) - set(ORDER[: ORDER.index(module) + 1])
    assert not ahead, f"{file.name} imports {sorted(ahead)}, which stand after {module} in ORDER"


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


def test_importing_the_package_does_not_wait_for_heavy_ones() -> None:
    """torch is needed by all of it; what only some parts need is imported by those."""
    heavy = ["transformers", "scipy", "sklearn", "matplotlib", "tensorboard", "huggingface_hub"]
    code = f"import sys, openpae, openpae.cli; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
