"""The direction of imports between the folders of nybble, as docs/architecture.md states it."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import nybble

SOURCE = Path(__file__).resolve().parents[1] / "src" / "nybble"

# folder (or module) of nybble -> what it may import besides itself
ALLOWED: dict[str, set[str]] = {
    "__init__": {"compress", "core", "engine", "llm"},  # by name, when they are asked for
    "core": set(),
    "quant": {"core"},
    "formats": {"quant", "core"},
    "families": {"quant", "core"},
    "checkpoint": {"families", "formats", "quant", "core"},
    "adapter": {"families", "formats", "quant", "core"},
    "tokenizer": {"core"},
    "cache": {"core"},
    "backends": {"adapter", "checkpoint", "quant", "core", "_native"},
    "engine": {"cache", "backends", "tokenizer", "adapter", "checkpoint", "core"},
    "evaluate": {"engine", "backends", "checkpoint", "store", "tokenizer", "quant", "core"},
    "store": {"core"},
    "llm": {"compress", "engine", "store", "tokenizer", "core"},
    "serve": {"engine", "store", "tokenizer", "core"},
    "compress": {
        "evaluate", "engine", "backends", "checkpoint", "families", "formats", "tokenizer", "quant", "core", "_native",
    },
    "cli": {
        "serve", "compress", "evaluate", "store", "engine", "backends", "checkpoint", "formats", "tokenizer", "core",
    },
}  # fmt: skip
# Packages whose functions may import them: optional, or too slow to import before they are needed.
LATE_IMPORTS = {
    "torch", "transformers", "tokenizers", "numpy", "jinja2", "rich", "markdown_it", "huggingface_hub",
    "prompt_toolkit", "PIL",
}  # fmt: skip


def imports(tree: ast.Module) -> Iterator[tuple[str, bool]]:
    """Each imported module, and whether the import stands inside a function."""
    inside = {
        id(child)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, id(node) in inside
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                yield "." * node.level, id(node) in inside
            elif node.module == "nybble":
                for alias in node.names:
                    yield f"nybble.{alias.name}", id(node) in inside
            else:
                yield node.module or "", id(node) in inside


def violations(folder: str, source: str) -> list[str]:
    """What is wrong with the imports of one file of a folder."""
    found = []
    for module, late in imports(ast.parse(source)):
        if module.startswith("."):
            found.append("relative import: write the full name")
            continue
        parts = module.split(".")
        if late and parts[0] not in LATE_IMPORTS:
            found.append(f"{module} is imported inside a function")
        if parts[0] != "nybble" or len(parts) == 1 or parts[1] in (folder, "__version__"):
            continue
        if parts[1] not in ALLOWED.get(folder, set()):
            found.append(f"{folder} imports {module}")
    return found


def folder_of(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


@pytest.mark.unit
@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_point_the_right_way(path: Path) -> None:
    assert not violations(folder_of(path), path.read_text("utf-8"))


@pytest.mark.unit
def test_every_folder_has_its_directions() -> None:
    known = set(ALLOWED)
    assert {folder_of(path) for path in SOURCE.rglob("*.py")} <= known


@pytest.mark.unit
def test_the_directions_have_no_cycle() -> None:
    order: list[str] = []
    left = {folder: set(targets) - {"_native"} for folder, targets in ALLOWED.items()}
    while left:
        ready = [folder for folder, targets in left.items() if targets <= set(order)]
        assert ready, f"a cycle among {sorted(left)}"
        order += ready
        for folder in ready:
            del left[folder]


@pytest.mark.unit
@pytest.mark.parametrize(
    ("folder", "source", "expected"),
    [
        ("core", "import nybble.engine.load", ["core imports nybble.engine.load"]),
        ("core", "from nybble.engine import load", ["core imports nybble.engine"]),
        ("core", "from nybble import engine", ["core imports nybble.engine"]),
        ("store", "from . import catalog", ["relative import: write the full name"]),
        ("store", "def f():\n    import json", ["json is imported inside a function"]),
        (
            "store",
            "class A:\n    def f(self):\n        import nybble.core",
            ["nybble.core is imported inside a function"],
        ),
        ("engine", "import numpy\nfrom nybble.core import spec\nfrom nybble.engine import text", []),
        ("evaluate", "def f():\n    import torch", []),
        ("evaluate", "from nybble import __version__", []),
        ("unheard_of", "import nybble.core.spec", ["unheard_of imports nybble.core.spec"]),
    ],
)
def test_the_lint_finds_what_it_should(folder: str, source: str, expected: list[str]) -> None:
    assert violations(folder, source) == expected


@pytest.mark.unit
def test_import_nybble_is_light() -> None:
    code = (
        "import nybble, sys; print([m for m in ('torch', 'numpy', 'rich', 'typer', 'tokenizers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.unit
def test_the_version_is_that_of_the_package() -> None:
    project = tomllib.loads((SOURCE.parents[1] / "pyproject.toml").read_text("utf-8"))
    assert nybble.__version__ == project["project"]["version"]


@pytest.mark.unit
def test_the_command_line_needs_no_torch() -> None:
    code = (
        "import nybble.cli.run, nybble.cli.bench, sys; print('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
