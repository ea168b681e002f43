"""Imports follow the diagram in docs/design.md and what each package says of itself, and have no loops."""

from __future__ import annotations

import ast
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


def modules() -> dict[str, Path]:
    """Every module by its dotted name inside the package; that of a package is ``functional.__init__``."""
    return {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in PACKAGE.rglob("*.py")}


def imported(name: str, path: Path, known: dict[str, Path]) -> Iterator[str]:
    """The modules that a module imports, anywhere in its text."""
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
    """The longest prefix that is a module; the rest are names in it."""
    while parts:
        for name in (".".join(parts), ".".join([*parts, "__init__"])):
            if name in known:
                return name
        parts = parts[:-1]
    return "__init__"


def graph() -> dict[str, set[str]]:
    known = modules()
    return {name: set(imported(name, path, known)) - {name} for name, path in known.items()}


def top(module: str) -> str:
    """The package or module at the top of the tree that a module belongs to."""
    return module.partition(".")[0]


def diagram() -> list[str]:
    """The entries of the diagram in reading order, without the slash of packages."""
    block = re.search(r"```text\n(.*?)```", (ROOT / "docs/design.md").read_text(), re.S)
    assert block
    rows = [line for line in block[1].splitlines() if "─" not in line]
    return [entry.rstrip("/") for row in rows for entry in re.split(r"\s{3,}", row)[0].split()]


def test_the_diagram_has_every_entry_of_the_package_once():
    entries = diagram()
    assert len(set(entries)) == len(entries)
    assert {top(name) for name in modules()} == set(entries), "put a new package into its row of docs/design.md"
    assert len([entry for entry in entries if not entry.startswith("__")]) <= MOST_AT_THE_TOP


def test_a_module_imports_only_from_above():
    place = {entry: number for number, entry in enumerate(diagram())}
    for name, targets in graph().items():
        for target in targets:
            one, other = top(name), top(target)
            assert one == other or place[other] < place[one], f"{name} imports {target}, which is not above it"


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_says_what_it_imports(package: str):
    found = {top(target) for name, targets in graph().items() if top(name) == package for target in targets}
    documented = importlib.import_module(f"nrm_plugin.{package}").__doc__
    assert documented
    said = re.search(r"^Imports: ([\w,\s]+)\.$", documented, re.M)
    assert said
    names = set() if said[1] == "nothing of this package" else set(re.split(r",\s+", said[1]))
    assert names == found - {package}


@pytest.mark.parametrize("package", PACKAGES)
def test_an_init_only_exports(package: str):
    body = ast.parse((PACKAGE / package / "__init__.py").read_text()).body
    assert all(isinstance(node, (ast.Expr, ast.ImportFrom, ast.Assign)) for node in body)


def test_no_module_imports_itself_over_others():
    """Inside packages too, and at the time of a call as well as at the top."""
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


def test_the_public_names_are_listed_once_and_in_order():
    """A stub says where each comes from; the package reads it, and so do type checkers."""
    tree = ast.parse((PACKAGE / "__init__.pyi").read_text())
    imported = [alias.name for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names]
    listed = next(ast.literal_eval(node.value) for node in tree.body if isinstance(node, ast.Assign))
    assert sorted(imported) == sorted(listed)
    assert len(set(listed)) == len(listed)


def test_imports_are_read_in_every_form(tmp_path):
    path = tmp_path / "x.py"
    path.write_text(
        "import nrm_plugin.errors\nfrom . import unknown\nfrom ..kernels.step import Step\n"
        "from nrm_plugin.functional import elementwise\ndef f():\n    from .registry import kernel\n    import torch\n"
    )
    found = set(imported("functional.x", path, modules()))
    assert found == {"errors", "functional.unknown", "kernels.step", "functional.elementwise", "functional.registry"}
