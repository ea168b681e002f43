"""Importing the package: lazily, by deprecated paths with a warning, and with its composites in Zennit's registry.

Covers: nrm_plugin.imports.
"""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
import warnings
from importlib.metadata import version
from pathlib import Path

import pytest

import nrm_plugin
from nrm_plugin.imports import MOVED, warn_deprecated

ROOT = Path(__file__).parents[1]


def printed(code: str) -> str:
    """Standard output of a new interpreter."""
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return process.stdout.strip()


@pytest.mark.parametrize("path", MOVED)
def test_a_deprecated_path_works_and_names_the_new_one(path: str) -> None:
    sys.modules.pop(f"nrm_plugin.{path}", None)
    with pytest.warns(DeprecationWarning, match=re.escape(f"Use nrm_plugin.{MOVED[path]} instead")) as caught:
        old = importlib.import_module(f"nrm_plugin.{path}")
    assert len(caught) == 1
    new = importlib.import_module(f"nrm_plugin.{MOVED[path]}")
    names = [name for name in vars(new) if not name.startswith("__")]
    assert names
    assert all(getattr(old, name) is getattr(new, name) for name in names)


@pytest.mark.slow
def test_the_warning_points_at_the_importing_line(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("\nfrom nrm_plugin.profiles import profile\n")
    process = subprocess.run([sys.executable, "-W", "always", script], capture_output=True, text=True, check=True)
    assert f"{script}:2: DeprecationWarning: the module nrm_plugin.profiles is deprecated" in process.stderr


def test_public_functions_take_precedence_over_deprecated_modules_of_the_same_name() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        for name in MOVED.keys() & set(nrm_plugin.__all__):
            importlib.import_module(f"nrm_plugin.{name}")
            assert callable(getattr(nrm_plugin, name))
    assert {"coverage", "reconstruct", "restriction"} <= MOVED.keys()


def test_importing_an_unknown_module_raises() -> None:
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("nrm_plugin.flow_plot")
    with pytest.raises(AttributeError):
        nrm_plugin.at_all  # noqa: B018


MODULES = sorted(path.stem for path in (ROOT / "src/nrm_plugin").iterdir() if path.suffix in ("", ".py"))


FIRST = """
import os, sys, captum.attr, torchvision, zennit.composites
for statement in sys.argv[1:]:
    process = os.fork()
    if not process:
        exec(statement)
        os._exit("nrm_default" not in zennit.composites.COMPOSITES)
    if os.waitpid(process, 0)[1]:
        print(statement)
"""
"""Prints the statements that fail, or register no composites, as the first import of this package in a process."""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes cannot be forked")
def test_any_module_or_name_can_be_imported_first() -> None:
    modules = [f"import nrm_plugin.{name}" for name in MODULES if not name.startswith("__")]
    names = [f"from nrm_plugin import {name}" for name in ("Absolute", "at", "RelevanceMeasure", "FuseBatchNorm")]
    assert len(modules) > 10
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", FIRST]
    failed = "import nrm_plugin.absent"
    process = subprocess.run([*command, *modules, *names, failed], capture_output=True, text=True, check=True)
    assert process.stdout.splitlines() == [failed], process.stderr


@pytest.mark.zennit
@pytest.mark.slow
@pytest.mark.parametrize("order", ["import nrm_plugin, zennit.composites", "import zennit.composites, nrm_plugin"])
def test_zennit_registers_the_composites_once_both_are_imported(order: str) -> None:
    code = (
        f"{order}; print('nrm_default' in zennit.composites.COMPOSITES, 'nrm_relative' in zennit.composites.COMPOSITES)"
    )
    assert printed(code) == "True True"


@pytest.mark.slow
def test_torch_is_imported_with_the_first_public_name() -> None:
    code = "import sys, nrm_plugin; print('torch' in sys.modules); nrm_plugin.at; print('torch' in sys.modules)"
    assert printed(code).split() == ["False", "True"]


def test_a_star_import_provides_every_public_name() -> None:
    names: dict[str, object] = {}
    exec("from nrm_plugin import *", names)
    assert set(nrm_plugin.__all__) <= names.keys()
    assert set(nrm_plugin.__all__) <= set(dir(nrm_plugin))


def test_the_warning_points_at_the_line_of_the_caller() -> None:
    def inner() -> None:
        warn_deprecated("this", "that")

    with pytest.warns(
        DeprecationWarning, match=r"this is deprecated and will be removed in .* Use that inst"
    ) as caught:
        inner()
    assert caught[0].filename == __file__
    assert "inner()" in Path(__file__).read_text().splitlines()[caught[0].lineno - 1]


def test_all_versions_agree() -> None:
    assert nrm_plugin.__version__ == version("nrm-plugin")
    cited = re.search(r"^version: (.*)$", (ROOT / "CITATION.cff").read_text(), re.M)
    assert cited is None or cited[1].strip("\"'") == nrm_plugin.__version__
    assert not re.search(r"^version = ", (ROOT / "pyproject.toml").read_text(), re.M)
