"""The sources of the website. `make docs` builds it, with warnings as errors."""

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
REFERENCED = [path for page in REFERENCE for path in documented(page)]


def test_the_navigation_lists_every_page_once():
    pages = [f"docs/{path.stem}" for path in (ROOT / "docs").glob("*.md")]
    pages += [f"notebooks/{path.stem}" for path in notebooks()] + [f"reference/{page}" for page in REFERENCE]
    listed = [page for section in NAVIGATION.values() for page in section]
    assert sorted(listed) == sorted([*pages, "CONTRIBUTING", "CHANGELOG"]), "add the page to website/pages.py"
    assert all(f"\n{page}\n" in home() for page in listed)


def test_the_reference_lists_every_public_name_once():
    names = [path.split(".")[1] for path in REFERENCED if path.count(".") == 1]
    assert sorted(names) == sorted(nrm_plugin.__all__), "add the name to website/pages.py"
    assert len(set(REFERENCED)) == len(REFERENCED)


@pytest.mark.parametrize("module", [dataset, functional])
def test_the_reference_lists_every_name_that_a_package_exports(module):
    assert {f"{module.__name__}.{name}" for name in module.__all__} - {
        f"{module.__name__}.{name}" for name in nrm_plugin.__all__
    } == {path for path in REFERENCED if path.rpartition(".")[0] == module.__name__}


def test_the_reference_lists_every_error():
    names = [name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, Exception)]
    assert sorted(documented("errors")) == sorted(f"nrm_plugin.errors.{name}" for name in names)


def test_the_reference_lists_every_name_that_a_page_imports():
    texts = [path.read_text() for path in (ROOT / "docs").glob("*.md")]
    texts += ["".join(cell["source"]) for path in notebooks() for cell in code(json.loads(path.read_text()))]
    imports = [line for text in texts for line in re.findall(r"^from (nrm_plugin\.\S+) import (.+)$", text, re.M)]
    assert imports
    for module, names in imports:
        for name in names.split(", "):
            assert f"{module}.{name}" in REFERENCED, f"{module}.{name} is missing from the reference"


@pytest.mark.parametrize("path", REFERENCED)
def test_every_name_in_the_reference_has_a_docstring(path):
    module, _, name = path.rpartition(".")
    assert getattr(importlib.import_module(module), name).__doc__
    assert path in directive(path)


def test_the_reference_starts_with_the_most_used_names():
    assert REFERENCED[:3] == ["nrm_plugin.RelevanceMeasure", "nrm_plugin.at", "nrm_plugin.Event"]
    assert directive(REFERENCED[0]).startswith(".. autoclass::")
    assert directive(REFERENCED[1]).startswith(".. autofunction::")
    assert directive("nrm_plugin.errors.NRMError").startswith(".. autoexception::")


def test_pages_load_nothing_from_other_hosts():
    for text in ('<script src="https://a.b/c.js">', '<link href="https://a.b/c.css" rel="stylesheet">'):
        assert loaded(text)
    for text in ("@import '//a.b/c.css'", "url(https://a.b/c.woff)"):
        assert loaded(text)
    assert not loaded('<a href="https://a.b">x</a> <img src="images/a.png"> <link rel="canonical" href="https://a.b">')
    for name in ("conf.py", "static/style.css"):
        assert "//" not in (ROOT / "website" / name).read_text()


def test_pages_have_the_layout_of_the_repository(tmp_path):
    write(tmp_path / "pages")
    written = {path.relative_to(tmp_path / "pages").with_suffix("").as_posix() for path in tmp_path.rglob("*.[mr]*")}
    assert written == {"index"} | {page for section in NAVIGATION.values() for page in section}


def test_the_numbers_page_is_generated_from_the_results():
    page = numbers.PAGE.read_text()
    assert numbers.rendered(page) == page


@pytest.mark.parametrize(
    ("pages", "source"), [(pages, source) for pages in (tables.PAGES, tables.SUMMARIES) for source in pages]
)
def test_a_table_is_generated_from_the_results(pages, source):
    page = (ROOT / "docs" / pages[source][0]).read_text()
    assert tables.rendered(source, page, pages) == page


@pytest.mark.parametrize("claim", numbers.CLAIMS, ids=lambda claim: claim.text)
def test_a_claim_names_an_existing_command(claim):
    assert (ROOT / "docs" / claim.page).exists()
    maker, _, target = claim.command.partition(" ")
    if maker == "make":
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M)
    assert importlib.util.find_spec(f"benchmarks.{claim.source}")  # a module, or a package
