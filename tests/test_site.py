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
from website.check import loaded
from website.pages import REFERENCE, ROOT_PAGES, as_page, public_names, reference

ROOT = Path(__file__).parents[1]
CONFIG = (ROOT / "mkdocs.yml").read_text()
NAVIGATION = re.findall(r"[\w/-]+\.md", CONFIG)


def test_the_navigation_has_every_page_once():
    pages = [path.name for path in (ROOT / "docs").glob("*.md")]
    pages += [*ROOT_PAGES.values(), *(f"reference/{page}.md" for page in reference())]
    pages += [f"notebooks/{path.stem}.md" for path in notebooks()]
    assert sorted(NAVIGATION) == sorted(pages), "put a new page into the navigation of mkdocs.yml"


def test_the_reference_has_every_public_name():
    named = re.findall(r"^::: nrm_plugin\.(\w+)", "\n".join(reference()[page] for page in [*REFERENCE, "errors"]), re.M)
    assert sorted(set(named) - {"errors"}) == sorted(nrm_plugin.__all__) == sorted(public_names())
    for _, modules in REFERENCE.values():
        assert all(importlib.util.find_spec(f"nrm_plugin.{module}") for module in modules)


def test_the_reference_has_every_name_that_a_page_imports():
    shown = set(re.findall(r"^::: nrm_plugin\.(\S+)", "\n".join(reference().values()), re.M))
    texts = [path.read_text() for path in (ROOT / "docs").glob("*.md")]
    texts += ["".join(cell["source"]) for path in notebooks() for cell in code(json.loads(path.read_text()))]
    found = [line for text in texts for line in re.findall(r"^from nrm_plugin\.(\S+) import (.+)$", text, re.M)]
    assert found
    for module, names in found:
        for name in names.split(", "):
            assert module == "errors" or f"{module}.{name}" in shown, f"nrm_plugin.{module}.{name} is in no reference"


@pytest.mark.parametrize("path", re.findall(r"^::: nrm_plugin\.(\S+)", "\n".join(reference().values()), re.M))
def test_a_name_of_the_reference_is_documented(path):
    module, _, name = path.rpartition(".")
    found = getattr(importlib.import_module(f"nrm_plugin.{module}" if module else "nrm_plugin"), name)
    assert found is nrm_plugin.errors or found.__doc__ or not callable(found)


def test_nothing_is_fetched_for_the_site():
    assert re.search(r"^  font: false$", CONFIG, re.M)
    for plugin in ("privacy", "social", "analytics", "extra_javascript", "http:", "https:"):
        assert plugin not in CONFIG
    for text in ('<script src="https://a.b/c.js">', '<link href="https://a.b/c.css" rel="stylesheet">'):
        assert loaded(text)
    for text in ("@import '//a.b/c.css'", "url(https://a.b/c.woff)"):
        assert loaded(text)
    assert not loaded('<a href="https://a.b">x</a> <img src="images/a.png"> <link rel="canonical" href="https://a.b">')


def test_links_of_the_root_lead_to_pages():
    text = "[a](docs/measure.md) ![b](docs/images/c.png) [d](CONTRIBUTING.md) [e](README.md)"
    assert as_page(text) == "[a](measure.md) ![b](images/c.png) [d](contributing.md) [e](index.md)"


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
