"""Imports point down, from room to room and from file to file."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

import anyres

ROOT = Path(anyres.__file__).parent
FLOORS = [
    {"allocator", "errors", "shapes"},
    {"extras", "options"},
    {"io", "layers"},
    {"data"},
    {"models"},
    {"tasks"},
    {"inference", "export"},
    {"evaluation"},
    {"training"},
    {"cli"},
    {"__init__", "__main__"},
]
"""A room may import from lower floors and from itself."""


def floor(room: str) -> int:
    return next(i for i, rooms in enumerate(FLOORS) if room in rooms)


def name_of(path: Path) -> str:
    """The name under which a file is imported."""
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in ROOT.rglob("*.py")}


def imported_modules(path: Path) -> set[str]:
    """Our files that a file imports, by name: anywhere in it, also inside functions and for types only."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            inside = {alias.name: f"{node.module}.{alias.name}" for alias in node.names}
            found |= {inside[name] if inside[name] in MODULES else node.module for name in inside}
    return found & MODULES.keys()


def imports(path: Path) -> set[str]:
    """Our rooms that a file imports, anywhere in it."""
    return {module.split(".")[1] for module in imported_modules(path) if "." in module}


def circles(graph: Mapping[str, set[str]]) -> set[frozenset[str]]:
    """The largest sets of names that all lead to each other."""
    reached: dict[str, set[str]] = {}
    for start in graph:
        seen, todo = set[str](), [start]
        while todo:
            new = graph[todo.pop()] - seen
            seen |= new
            todo.extend(new)
        reached[start] = seen
    return {
        frozenset(other for other in reached[name] if name in reached[other]) for name in graph if name in reached[name]
    }


def test_imports_point_down() -> None:
    wrong = []
    for path in ROOT.rglob("*.py"):
        room = path.relative_to(ROOT).parts[0].removesuffix(".py")
        wrong += [
            f"{path.relative_to(ROOT)} imports {other}"
            for other in imports(path)
            if other != room and floor(other) >= floor(room) and floor(room) < len(FLOORS) - 1
        ]
    assert not wrong


def test_no_files_import_each_other_in_a_circle() -> None:
    assert not circles({name: imported_modules(path) for name, path in MODULES.items()})


def test_circles_are_found_whatever_leads_into_and_out_of_them() -> None:
    graph = {"in": {"a"}, "a": {"b"}, "b": {"c", "out"}, "c": {"a"}, "out": set(), "self": {"self"}}
    assert circles(graph) == {frozenset("abc"), frozenset({"self"})}


def test_layers_and_data_know_nothing_of_models() -> None:
    for room in ("layers", "data"):
        for path in (ROOT / room).rglob("*.py"):
            assert imports(path) <= {room, "errors", "shapes", "extras", "io"}, path


def test_help_does_not_wait_for_torch() -> None:
    code = (
        "import sys; sys.argv = ['anyres', '--help']\n"
        "from anyres.cli.main import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "sys.exit(sum(name in sys.modules for name in ('torch', 'timm', 'numpy')))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


@pytest.mark.parametrize("order", ["timm, anyres", "anyres.models._backbone, timm", "anyres.layers.attention, timm"])
def test_importing_the_package_registers_with_timm_whichever_comes_first(order: str) -> None:
    code = f"import {order}; assert timm.is_model('anyres_resformer_small')"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_any_room_may_be_the_first() -> None:
    code = "import anyres.inference.predictor, timm; assert timm.is_model('anyres_resformer_small')"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_importing_the_package_loads_nothing_heavy() -> None:
    code = "import anyres, sys; sys.exit(sum(name in sys.modules for name in ('torch', 'timm', 'numpy')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
