"""Objects and code that behave differently have different fingerprints, and equal ones equal fingerprints."""

from __future__ import annotations

import enum
import functools
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from nrm_plugin import NRMDefault
from nrm_plugin.dataset.fingerprints import content_hash, described, digest, is_installed, package_version, user_code
from tests.dataset.edited_source import edited_module

SOURCE = """
import functools, math, torch
LIMIT = 3
TABLE = {"a": [1, 2]}

class Helper:
    factor = 2
    @staticmethod
    def twice(x): return x * 2
    @property
    def value(self): return self.twice(self.factor)

class Child(Helper):
    def run(self, x): return super().value + x

helper = Helper()

def decorated(function):
    @functools.wraps(function)
    def call(x): return function(x) + 1
    return call

@decorated
def inner(x): return torch.exp(x)

def outer(x, scale=2.0, *, shift=0):
    def nested(y): return y + LIMIT
    return nested(inner(x)) * scale + Child().run(TABLE["a"][0]) + math.pi + helper.factor
"""
EDITS = {
    "name of a function of torch": ("torch.exp", "torch.log"),
    "constant": ("function(x) + 1", "function(x) + 2"),
    "global number": ("LIMIT = 3", "LIMIT = 4"),
    "global table": ("[1, 2]", "[1, 3]"),
    "default": ("scale=2.0", "scale=2.5"),
    "keyword default": ("shift=0", "shift=1"),
    "attribute of a class": ("factor = 2", "factor = 3"),
    "static method": ("return x * 2", "return x * 3"),
    "property": ("self.twice(self.factor)", "self.factor"),
    "base class": ("class Child(Helper)", "class Child(object)"),
    "method": ("super().value + x", "super().value - x"),
    "nested function": ("return y + LIMIT", "return y - LIMIT"),
    "removed decorator": ("@decorated\n", ""),
    "attribute of a module": ("math.pi", "math.e"),
}
NO_CHANGE = {
    "comment": ("def inner(x):", "# nothing\n\ndef inner(x):"),
    "unused function": ("def outer", "def unused(): return 1\n\ndef outer"),
    "docstring": ("def run(self, x): ", 'def run(self, x):\n        "runs"\n        '),
    "order of definitions": ("LIMIT = 3\nTABLE", "LATER = 1\nLIMIT = 3\nTABLE"),
}


def outer(*edits: tuple[str, str]) -> Any:
    return edited_module("somebodys", SOURCE, *edits).outer


@pytest.mark.parametrize("name", EDITS)
def test_code_that_a_function_refers_to_is_part_of_it(name: str) -> None:
    assert user_code(outer(EDITS[name])) != user_code(outer())
    assert described(outer(EDITS[name])) != described(outer())


@pytest.mark.parametrize("name", NO_CHANGE)
def test_text_that_does_nothing_is_not_part_of_it(name: str) -> None:
    assert described(outer(NO_CHANGE[name])) == described(outer())


def test_the_code_names_functions_and_classes() -> None:
    names = {f"somebodys.{name}" for name in ("outer", "inner", "Helper", "Helper.twice", "Helper.value", "Child")}
    assert names < set(user_code(outer()))
    assert not any(name.startswith(("torch", "functools", "math")) for name in user_code(outer()))


class Colour(enum.Enum):
    RED = 1
    BLUE = 2


class Slotted:
    __slots__ = ("value",)

    def __init__(self, value: int) -> None:
        self.value = value


def scaled(x: float, by: float = 1.0) -> float:
    return x * by


DIFFERENT = {
    "partial": (functools.partial(scaled, by=2.0), functools.partial(scaled, by=3.0)),
    "partial of positions": (functools.partial(scaled, 1.0), functools.partial(scaled, 2.0)),
    "dtype": (torch.float32, torch.float64),
    "device": (torch.device("cpu"), torch.device("meta")),
    "enum": (Colour.RED, Colour.BLUE),
    "bytes": (b"a", b"b"),
    "path": (Path("a"), Path("b")),
    "array": (np.arange(3), np.arange(3) + 1),
    "array of another type": (np.arange(3), np.arange(3).astype(np.int32)),
    "slots": (Slotted(1), Slotted(2)),
    "lambda": (lambda x: x.exp(), lambda x: x.log()),
    "dictionary by object": ({Colour.RED: 1}, {Colour.BLUE: 1}),
    "bound method": ("a".join, "b".join) if False else (Slotted(1).__init__, Slotted(2).__init__),
    "complex": (1j, 2j),
    "slice": (slice(1), slice(2)),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_values_that_differ_have_different_descriptions(name: str) -> None:
    first, second = DIFFERENT[name]
    assert described(first) != described(second)
    assert described(first) == described(first)


def test_content_of_samples() -> None:
    image = Image.fromarray(np.arange(27, dtype=np.uint8).reshape(3, 3, 3))
    other = image.copy()
    other.putpixel((1, 1), (0, 0, 0))
    samples = [
        image, other, (torch.zeros(2), 1), (torch.zeros(2), 2), (torch.zeros(1, 2), 1), (torch.zeros(2).double(), 1),
        {"x": torch.zeros(2)}, {"y": torch.zeros(2)}, [np.zeros(2)], np.array(["a", None], object), "text", None,
        Slotted(1), Slotted(2), torch.zeros(2).to_sparse(), torch.view_as_complex(torch.ones(2)).conj(),
    ]  # fmt: skip
    hashes = [content_hash(sample) for sample in samples]
    assert len(set(hashes)) == len(samples)
    assert [content_hash(sample) for sample in samples] == hashes
    assert content_hash(image.copy()) == hashes[0]


def test_installed_code_is_known_by_its_version() -> None:
    assert all(is_installed(kind) for kind in (torch.nn.Linear, dict, functools.partial, NRMDefault, Image.Image))
    assert not is_installed(outer())
    assert not is_installed(Slotted)
    assert package_version("torch.nn.modules") == version("torch")
    assert package_version("PIL.Image") == version("pillow")
    assert package_version("somebodys") == "?"
    assert described(torch.relu) == described(torch.relu) != described(torch.tanh)


@pytest.mark.slow
def test_descriptions_are_the_same_in_another_process() -> None:
    program = (
        "from tests.dataset.test_fingerprints import *; from nrm_plugin.dataset.fingerprints import digest\n"
        "print(digest([described(outer()), described(NRMDefault()), described({'a', 'b', 'c'})]))"
    )
    root = Path(__file__).parents[2]
    printed = (
        subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, check=True,
            env={**os.environ, "PYTHONPATH": f"{root / 'src'}:{root}", "PYTHONHASHSEED": "7"},
        ).stdout.strip()
    )  # fmt: skip
    assert printed == digest([described(outer()), described(NRMDefault()), described({"a", "b", "c"})])
