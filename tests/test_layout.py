"""Tests mirror the package: the tests of ``nrm_plugin.P.M`` are in tests/P/test_M.py.

A test file that covers several modules lists them in its docstring: ``Covers: nrm_plugin.P.M, nrm_plugin.P.N.``
"""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

TESTS = Path(__file__).parent
SOURCE = TESTS.parent / "src"
OTHER_FOLDERS = {"hosts", "pins"}
"""Tests with other packages, and recorded results."""


@functools.cache
def modules() -> set[str]:
    """Dotted names of all modules of the package, without ``__init__`` and ``__main__``."""
    paths = (SOURCE / "nrm_plugin").rglob("*.py")
    return {".".join(path.relative_to(SOURCE).with_suffix("").parts) for path in paths if "__" not in path.name}


def mirrored(path: Path) -> str:
    """Dotted name of the module that a test file belongs to by its path."""
    folder = path.relative_to(TESTS).parent
    return ".".join(["nrm_plugin", *folder.parts, path.stem.removeprefix("test_")])


def expected(module: str) -> Path:
    """Path of the tests of a module, from the root of the repository."""
    *folders, name = module.split(".")[1:]
    return Path("tests", *folders, f"test_{name}.py")


@functools.cache
def covered(text: str) -> list[str]:
    """Dotted names in the lines ``Covers: …`` of the docstring of a test file."""
    lists = re.findall(r"^Covers:\s+([\w.,\s]*?)\.$", ast.get_docstring(ast.parse(text)) or "", re.M)
    return [name for names in lists for name in re.split(r",\s+", names)]


def files() -> list[Path]:
    return sorted(TESTS.rglob("test_*.py"))


def test_every_file_in_a_folder_tests_one_module():
    paths = [path for path in files() if path.parent != TESTS and path.parent.name not in OTHER_FOLDERS]
    expected_modules = {path.relative_to(TESTS.parent): mirrored(path) for path in paths}
    unmatched = [f"{path}: no module {name}" for path, name in expected_modules.items() if name not in modules()]
    assert not unmatched, "\n".join(["rename these files, or move them to tests/:", *unmatched])


def test_every_module_has_tests():
    tested = {mirrored(path) for path in files()}
    tested.update(name for path in files() for name in covered(path.read_text()))
    missing = [f"{name}: {expected(name)}" for name in sorted(modules() - tested)]
    assert not missing, "\n".join(["add these files, or name the modules after `Covers:` in a docstring:", *missing])


def test_covered_modules_exist():
    named = {(path.name, name) for path in files() for name in covered(path.read_text())}
    assert not sorted((file, name) for file, name in named if name not in modules())


def test_paths_and_docstrings_name_modules():
    text = '"""Some tests.\n\nCovers: nrm_plugin.a.b, nrm_plugin.c,\nnrm_plugin.d.\n"""\n\nCovers = "nrm_plugin.e."\n'
    assert covered(text) == ["nrm_plugin.a.b", "nrm_plugin.c", "nrm_plugin.d"]
    assert covered('"""Covers: nothing"""\nx = 1\n') == []
    assert mirrored(TESTS / "measure/test_flow.py") == "nrm_plugin.measure.flow"
    assert mirrored(TESTS / "test_rules.py") == "nrm_plugin.rules"
    assert expected("nrm_plugin.measure.flow") == Path("tests/measure/test_flow.py")
