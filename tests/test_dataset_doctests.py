"""The examples in the docstrings of the package run with the printed results."""

from __future__ import annotations

import doctest
import importlib

import pytest
import torch

import nrm_plugin

MODULES = """
    crops example_search examples glocal mean_conditionals prototypes ranking relevance_matrix statistics
""".split()
FINDER = doctest.DocTestFinder(recurse=True)
FOUND = {
    test.name: test
    for module in MODULES
    for test in FINDER.find(importlib.import_module(f"nrm_plugin.dataset.{module}"))
    if test.examples
}


@pytest.mark.parametrize("name", FOUND)
def test_the_example_of_a_docstring_runs(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    test = FOUND[name]
    public = {key: getattr(nrm_plugin, key) for key in nrm_plugin.__all__}
    test.globs = {**test.globs, "torch": torch, "nn": torch.nn, **public}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        report: list[str] = []
        flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
        result = doctest.DocTestRunner(optionflags=flags).run(test, out=report.append)
    assert result.failed == 0, "".join(report)


def test_there_are_examples():
    assert len(FOUND) >= 11
