"""Every public docstring has an example, and every example runs."""

from __future__ import annotations

import doctest
import inspect
import warnings

import pytest
import torch
import zennit.rules

import nrm_plugin
from nrm_plugin.composites import Named
from tests.text_nets import StubTokenizer, text_net

OF_ZENNIT = ("apply", "copy", "register", "remove")
"""Methods that Zennit calls and documents."""
INHERITED = {kind.__name__ for kind in Named.__subclasses__()}
"""Normalized versions of Zennit's composites, which share the example of their base class."""
PUBLIC = [name for name in nrm_plugin.__all__ if callable(getattr(nrm_plugin, name)) and name not in INHERITED]


def documented():
    """Public classes and functions, and the public methods and properties that these classes define."""
    for name in PUBLIC:
        item = getattr(nrm_plugin, name)
        yield name, item
        if inspect.isclass(item):
            inherited = [base for base in item.__mro__ if base.__name__ == "Recorded"]
            for key, member in [pair for kind in (*inherited, item) for pair in vars(kind).items()]:
                target = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
                if not key.startswith("_") and key not in OF_ZENNIT and inspect.isfunction(target) and target.__doc__:
                    yield f"{name}.{key}", target


ITEMS = dict(documented())


def names():
    """The names that examples may use without an import."""
    return {
        "torch": torch,
        "nn": torch.nn,
        "zennit": zennit,
        "model": text_net("class"),
        "tokenizer": StubTokenizer(),
        **{name: getattr(nrm_plugin, name) for name in nrm_plugin.__all__},
    }


def examples(name):
    """Those of a docstring; those of a method continue the example of its class."""
    tests = doctest.DocTestFinder(recurse=False).find(ITEMS[name], name, globs=names())
    return [test for test in tests if test.examples]


@pytest.mark.medium
@pytest.mark.usefixtures("own_kernels")
@pytest.mark.parametrize("name", ITEMS)
def test_the_examples_of_a_public_docstring_run(name):
    tests = examples(name)
    assert tests, f"{name} has no example"
    for test in tests:
        for before in examples(name.partition(".")[0]) if "." in name else []:
            doctest.DocTestRunner().run(before, clear_globs=False)
            test.globs.update(before.globs)
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("error")
            torch.manual_seed(0)
            report: list[str] = []
            result = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE).run(
                test, out=report.append
            )
        assert result.failed == 0, "".join(report)


def test_an_example_with_a_wrong_result_fails():
    """The runner does not swallow failures."""
    wrong = doctest.DocTestParser().get_doctest(">>> at('conv')[3]\nat('conv')[4]\n", names(), "wrong", None, None)
    assert doctest.DocTestRunner().run(wrong, out=lambda text: None).failed == 1
