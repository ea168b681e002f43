"""What a release is checked for; `make package` builds one and runs these checks on it."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from website.package import DATA, NEEDED, ROOT, archive_faults, version, wheel_faults

PACKAGE = ROOT / "src/nrm_plugin"
INFO = f"nrm_plugin-{version()}.dist-info"
WHEEL = {f"nrm_plugin/{path.relative_to(PACKAGE).as_posix()}" for path in PACKAGE.rglob("*.py")}
WHEEL |= {f"nrm_plugin/{name}" for name in DATA} | {f"{INFO}/METADATA", f"{INFO}/licenses/LICENSE"}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]


def test_a_wheel_has_the_package_and_nothing_else():
    assert wheel_faults(WHEEL) == []
    assert wheel_faults(WHEEL - {"nrm_plugin/py.typed"}) == ["lacks nrm_plugin/py.typed"]
    assert wheel_faults(WHEEL | {"tests/nets.py"}) == ["should not have tests/nets.py"]
    assert wheel_faults(WHEEL - {f"{INFO}/licenses/LICENSE"}) == ["lacks its license"]


def test_every_file_that_is_not_a_module_is_known():
    names = {path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*") if path.is_file()}
    assert {name for name in names if not name.endswith((".py", ".pyc"))} == DATA


def test_a_source_archive_has_what_builds_and_tests_it():
    assert archive_faults(set(NEEDED)) == []
    assert archive_faults(NEEDED - {"LICENSE"}) == ["lacks LICENSE"]
    for wrong in ("build/site/index.html", "src/nrm_plugin/__pycache__/x.pyc", "weights.pt", ".venv/bin/python"):
        assert archive_faults(NEEDED | {wrong}) == [f"should not have {wrong}"]
    assert all((ROOT / name).exists() for name in NEEDED)


def test_the_public_host_runs_what_continuous_integration_runs():
    workflow = (ROOT / ".github/workflows/ci.yml").read_text()
    assert re.search(r"run: bash \.ci/run$", workflow, re.M)
    lowest = re.search(r'requires-python = ">=(3\.\d+)"', (ROOT / "pyproject.toml").read_text())
    assert lowest
    assert lowest[1] in workflow


def requirements(*extras: str) -> Iterator[Requirement]:
    for line in (*PROJECT["dependencies"], *(line for extra in extras for line in EXTRAS[extra])):
        yield Requirement(line)


def lower_bound(requirement: Requirement) -> Version:
    (bound,) = (part.version for part in requirement.specifier if part.operator == ">=")
    return Version(bound)


def test_the_oldest_versions_that_are_tested_are_the_oldest_that_are_allowed():
    makefile = (ROOT / "Makefile").read_text()
    extras = re.search(r"^EXTRAS = (.+)$", makefile, re.M)
    assert extras
    bounds = {requirement.name: lower_bound(requirement) for requirement in requirements(*extras[1].split(","))}
    lines = (ROOT / "constraints-oldest.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if "==" in line)
    assert {name: Version(version) for name, version in pins.items()} == bounds
    # Ray and transformers are tried among the hosts, pip comes with Python, the others are tools of the project.
    tools = {"dev", "mutation", "train", "docs", "release"}
    assert EXTRAS.keys() - set(extras[1].split(",")) == {"ray", "text", "real", *tools}


def test_an_extra_asks_for_the_same_version_everywhere():
    bounds: dict[str, set[str]] = {}
    for requirement in requirements(*EXTRAS):
        bounds.setdefault(requirement.name, set()).add(str(requirement.specifier))
    assert {name: versions for name, versions in bounds.items() if len(versions) > 1} == {}


@pytest.mark.parametrize("which", ["oldest", "newest"])
def test_both_ends_of_the_dependencies_are_tested_and_explained(which: str):
    workflow = (ROOT / ".github/workflows/ci.yml").read_text()
    assert f"- which: {which}" in workflow
    assert "run: make test-${{ matrix.which }}" in workflow
    assert f"`make test-{which}`" in (ROOT / "CONTRIBUTING.md").read_text()


def test_templates_ask_for_what_is_needed():
    templates = Path(ROOT / ".github/ISSUE_TEMPLATE")
    bug = (templates / "bug.yml").read_text()
    for word in ("coverage(model, inputs)", "zennit", "torch", "message"):
        assert word in bug
    assert "make test" in (ROOT / ".github/PULL_REQUEST_TEMPLATE.md").read_text()
