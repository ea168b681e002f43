"""Imports follow the diagram in docs/design.md and the docstring of each package, and have no cycles."""

from __future__ import annotations

import ast
import functools
import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src/nrm_plugin"
PACKAGES = sorted(path.parent.name for path in PACKAGE.glob("*/__init__.py"))
MOST_AT_THE_TOP = 18
MOST_LINES = 450
LONGEST_BODY = 45


def modules() -> dict[str, Path]:
    """Every module by its dotted name inside the package, such as ``functional.__init__``."""
    return {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in PACKAGE.rglob("*.py")}


def imported(name: str, path: Path, known: dict[str, Path]) -> Iterator[str]:
    """The modules that a module imports, at the top and inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ["nrm_plugin", *name.split(".")][: -node.level] if node.level else []
            prefix = ".".join([*base, *([node.module] if node.module else [])])
            targets = [f"{prefix}.{alias.name}" for alias in node.names]
        else:
            continue
        for target in targets:
            if target == "nrm_plugin" or target.startswith("nrm_plugin."):
                yield _module(target.split(".")[1:], known)


def _module(parts: list[str], known: dict[str, Path]) -> str:
    """The longest prefix that is a module; the remaining parts are names in it."""
    while parts:
        for name in (".".join(parts), ".".join([*parts, "__init__"])):
            if name in known:
                return name
        parts = parts[:-1]
    return "__init__"


@functools.cache
def graph() -> dict[str, set[str]]:
    known = modules()
    return {name: set(imported(name, path, known)) - {name} for name, path in known.items()}


def top(module: str) -> str:
    """The top-level package or module that contains a module."""
    return module.partition(".")[0]


def diagram() -> list[str]:
    """The entries of the diagram in reading order, without the trailing slash of packages."""
    block = re.search(r"```text\n(.*?)```", (ROOT / "docs/design.md").read_text(), re.S)
    assert block
    rows = [line for line in block[1].splitlines() if "─" not in line]
    return [entry.rstrip("/") for row in rows for entry in re.split(r"\s{3,}", row)[0].split()]


def test_the_diagram_lists_every_package_and_module_once():
    entries = diagram()
    assert len(set(entries)) == len(entries)
    assert {top(name) for name in modules()} == set(entries), "add the package to its row of docs/design.md"
    assert len([entry for entry in entries if not entry.startswith("__")]) <= MOST_AT_THE_TOP


@pytest.mark.medium
def test_modules_import_only_from_above():
    position = {entry: number for number, entry in enumerate(diagram())}
    for name, targets in graph().items():
        for target in targets:
            importer, source = top(name), top(target)
            is_above = importer == source or position[source] < position[importer]
            assert is_above, f"{name} imports {target}, which is not above it"


@pytest.mark.medium
@pytest.mark.parametrize("package", PACKAGES)
def test_the_docstring_of_a_package_lists_its_imports(package: str):
    imports = {top(target) for name, targets in graph().items() if top(name) == package for target in targets}
    docstring = importlib.import_module(f"nrm_plugin.{package}").__doc__
    assert docstring
    line = re.search(r"^Imports: ([\w,\s]+)\.$", docstring, re.M)
    assert line
    documented = set() if line[1] == "nothing of this package" else set(re.split(r",\s+", line[1]))
    assert documented == imports - {package}


@pytest.mark.parametrize("package", PACKAGES)
def test_the_init_of_a_package_only_exports(package: str):
    body = ast.parse((PACKAGE / package / "__init__.py").read_text()).body
    assert all(isinstance(node, (ast.Expr, ast.ImportFrom, ast.Assign)) for node in body)


def test_imports_have_no_cycles():
    """Inside packages too, and including the imports inside functions."""
    edges, done, path = graph(), set(), list[str]()

    def visit(name: str) -> None:
        assert name not in path, " → ".join([*path, name])
        if name not in done:
            path.append(name)
            for target in sorted(edges[name]):
                visit(target)
            done.add(path.pop())

    for name in edges:
        visit(name)


def test_no_module_is_long():
    lines = {name: len(path.read_text().splitlines()) for name, path in modules().items()}
    assert {name: count for name, count in lines.items() if count > MOST_LINES} == {}


@pytest.mark.medium
def test_no_function_has_a_long_body():
    bodies = {}
    for name, path in modules().items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                body = node.body[1:] if ast.get_docstring(node) else node.body
                bodies[f"{name}.{node.name}"] = body[-1].end_lineno - body[0].lineno + 1 if body else 0
    assert {name: count for name, count in bodies.items() if count > LONGEST_BODY} == {}


def test_the_stub_lists_every_public_name_once():
    """The package and type checkers read where each name comes from in the stub."""
    tree = ast.parse((PACKAGE / "__init__.pyi").read_text())
    imported = [alias.name for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names]
    listed = next(ast.literal_eval(node.value) for node in tree.body if isinstance(node, ast.Assign))
    assert sorted(imported) == sorted(listed)
    assert len(set(listed)) == len(listed)


def test_every_form_of_import_is_recognized(tmp_path):
    path = tmp_path / "x.py"
    path.write_text(
        "import nrm_plugin.errors\nfrom . import scatter\nfrom ..kernels.step import Step\n"
        "from nrm_plugin.functional import elementwise\ndef f():\n    from .registry import kernel\n    import torch\n"
    )
    names = set(imported("functional.x", path, modules()))
    assert names == {"errors", "functional.scatter", "kernels.step", "functional.elementwise", "functional.registry"}
