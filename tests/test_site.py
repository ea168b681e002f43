"""What the site is made of, without building it: `make docs` does that, with warnings as errors."""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
from pathlib import Path

import pytest

import nrm_plugin
from benchmarks import numbers, tables
from notebooks.run import code, notebooks
from nrm_plugin import dataset, errors, functional
from website.check import loaded
from website.pages import NAVIGATION, REFERENCE, directive, documented, home, write

ROOT = Path(__file__).parents[1]
SHOWN = [path for page in REFERENCE for path in documented(page)]


def test_the_navigation_has_every_page_once():
    pages = [f"docs/{path.stem}" for path in (ROOT / "docs").glob("*.md")]
    pages += [f"notebooks/{path.stem}" for path in notebooks()] + [f"reference/{page}" for page in REFERENCE]
    shown = [page for section in NAVIGATION.values() for page in section]
    assert sorted(shown) == sorted([*pages, "CONTRIBUTING", "CHANGELOG"]), "put a new page into website/pages.py"
    assert all(f"\n{page}\n" in home() for page in shown)


def test_the_reference_has_every_public_name_once():
    named = [path.split(".")[1] for path in SHOWN if path.count(".") == 1]
    assert sorted(named) == sorted(nrm_plugin.__all__), "put a new name into website/pages.py"
    assert len(set(SHOWN)) == len(SHOWN)


@pytest.mark.parametrize("module", [dataset, functional])
def test_the_reference_has_every_name_that_a_package_exports(module):
    assert {f"{module.__name__}.{name}" for name in module.__all__} - {
        f"{module.__name__}.{name}" for name in nrm_plugin.__all__
    } == {path for path in SHOWN if path.rpartition(".")[0] == module.__name__}


def test_the_reference_has_every_error():
    found = [name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, Exception)]
    assert sorted(documented("errors")) == sorted(f"nrm_plugin.errors.{name}" for name in found)


def test_the_reference_has_every_name_that_a_page_imports():
    texts = [path.read_text() for path in (ROOT / "docs").glob("*.md")]
    texts += ["".join(cell["source"]) for path in notebooks() for cell in code(json.loads(path.read_text()))]
    found = [line for text in texts for line in re.findall(r"^from (nrm_plugin\.\S+) import (.+)$", text, re.M)]
    assert found
    for module, names in found:
        for name in names.split(", "):
            assert f"{module}.{name}" in SHOWN, f"{module}.{name} is in no reference"


@pytest.mark.parametrize("path", SHOWN)
def test_a_name_of_the_reference_is_documented(path):
    module, _, name = path.rpartition(".")
    assert getattr(importlib.import_module(module), name).__doc__
    assert path in directive(path)


def test_the_most_used_names_come_first():
    assert SHOWN[:3] == ["nrm_plugin.RelevanceMeasure", "nrm_plugin.at", "nrm_plugin.Event"]
    assert directive(SHOWN[0]).startswith(".. autoclass::")
    assert directive(SHOWN[1]).startswith(".. autofunction::")
    assert directive("nrm_plugin.errors.NRMError").startswith(".. autoexception::")


def test_nothing_is_loaded_from_elsewhere():
    for text in ('<script src="https://a.b/c.js">', '<link href="https://a.b/c.css" rel="stylesheet">'):
        assert loaded(text)
    for text in ("@import '//a.b/c.css'", "url(https://a.b/c.woff)"):
        assert loaded(text)
    assert not loaded('<a href="https://a.b">x</a> <img src="images/a.png"> <link rel="canonical" href="https://a.b">')
    for name in ("conf.py", "static/style.css"):
        assert "//" not in (ROOT / "website" / name).read_text()


def test_pages_are_laid_out_as_in_the_repository(tmp_path):
    write(tmp_path / "pages")
    written = {path.relative_to(tmp_path / "pages").with_suffix("").as_posix() for path in tmp_path.rglob("*.[mr]*")}
    assert written == {"index"} | {page for section in NAVIGATION.values() for page in section}


def test_the_numbers_page_is_drawn_from_the_results():
    page = numbers.PAGE.read_text()
    assert numbers.rendered(page) == page


@pytest.mark.parametrize("source", tables.PAGES)
def test_a_table_is_drawn_from_the_results(source):
    page = (ROOT / "docs" / tables.PAGES[source][0]).read_text()
    assert tables.rendered(source, page) == page


@pytest.mark.parametrize("claim", numbers.CLAIMS, ids=lambda claim: claim.text)
def test_a_claim_names_a_command_that_exists(claim):
    assert (ROOT / "docs" / claim.page).exists()
    maker, _, target = claim.command.partition(" ")
    if maker == "make":
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M)
    assert importlib.util.find_spec(f"benchmarks.{claim.source}")  # a module, or a package
