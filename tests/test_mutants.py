"""The mutation test: what it leaves out, how mutants get into the imported package, and that the page tells all."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import mutants
from benchmarks.mutant import MODULES, Mutant, Places, sampled

ROOT = Path(__file__).parents[1]
CODE = '''\
Kind = int | str


class Outer:
    """Text."""

    def method(self, ä: int | None = 3, *, b: bool = True) -> int | str:
        assert ä is not None
        if ä > 0 and (
            b
        ):
            raise ValueError(f"{ä + 1}")
        return "ä" + str(ä | 1)
'''


def place(text: str, count: int = 0) -> tuple[int, int]:
    """Line and column of a piece of text."""
    start = -1
    for _ in range(count + 1):
        start = CODE.index(text, start + 1)
    return CODE[:start].count("\n") + 1, start - (CODE[:start].rfind("\n") + 1)


def test_annotations_messages_assertions_and_aliases_are_left_out():
    places = Places(CODE)
    for out in (place("| str\n"), place("| None"), place("| str:"), place("is not"), place("+ 1")):
        assert places.are_left_out(out), out
    for kept in (place("3"), place("True"), place("> 0"), place("and"), place("+ str"), place("| 1")):
        assert not places.are_left_out(kept), kept


def test_a_line_knows_its_function_and_its_statement():
    places = Places(CODE)
    assert places.function(place("Kind")[0]) == "<module>"
    assert places.function(place("Text")[0]) == "Outer"
    assert places.function(place("and (")[0]) == "Outer.method"
    assert list(places.statement(place("b\n")[0])) == [9, 10, 11]
    assert list(places.statement(place("return")[0])) == [13]


def made(module: str, number: int, before: str = "a", after: str = "b") -> Mutant:
    return Mutant(module, "f", "NumberReplacer", number, before, f"{after}{number}", range(1), "")


def test_any_first_part_of_the_sample_has_all_modules_alike():
    every = [
        made(module, number) for module, count in zip(MODULES, (400, 100, 300), strict=True) for number in range(count)
    ]
    assert sampled(every, 80, 0) == sampled(every, None, 0)[:80]
    assert sampled(every, 80, 0) != sampled(every, 80, 1)
    for size in (40, 80, 800):
        found = [mutant.module for mutant in sampled(every, size, 0)]
        for module, share in zip(MODULES, (0.5, 0.125, 0.375), strict=True):
            assert abs(found.count(module) - share * size) <= 1
    formal = Mutant(
        "events", "f", "ReplaceTrueWithFalse", 1, "zip(a, strict=True)", "zip(a, strict=False)", range(1), ""
    )
    assert formal not in sampled([*every, formal], None, 0)


SCRIPT = """
import torch
from benchmarks.mutant import Mutant, apply, source_of
from nrm_plugin import RelevanceMeasure, at, kernels, rules

def change(module, old, new):
    code = source_of(module).read_text()
    assert code.count(old) >= 1, old
    apply(Mutant(module, "", "", 0, "", "", range(1), code.replace(old, new, 1)))

gain, made = kernels.gain, at("conv").index
change("kernels", "mul_((limit - 1) * limit)", "mul_((limit + 1) * limit)")
assert float(gain(torch.tensor([0.25]), 2.0)) == 2.5
change("kernels", "DENSE_LIMIT = 4096", "DENSE_LIMIT = 7")
assert kernels.DENSE_LIMIT == 7
change("kernels", "is_stochastic = True", "is_stochastic = False")
assert not kernels.IdentityKernel().is_stochastic
change("kernels", "size: int = 1 << 16", "size: int = 1")
assert len(list(kernels.blocks(torch.zeros(3, 2)))) == 6
change("events", "along_channel: bool = False", "along_channel: bool = True")
assert at("conv").along_channel
index = at("conv")[3].index
change("events", "@dataclass(frozen=True)\\nclass Index", "@dataclass(frozen=False)\\nclass Index")
index.value = 4
mu = RelevanceMeasure(torch.nn.Linear(2, 2), torch.ones(1, 2), 0)
mu._check_fresh = lambda: 1 / 0
for name in ("sink", "bypass"):
    try:
        getattr(mu, name)("input")
    except ZeroDivisionError:
        print("refused", name)
change("measure", "    @query\\n    def sink(", "    def sink(")
mu.sink("input")
"""


@pytest.mark.slow
def test_a_mutant_gets_into_the_imported_package():
    path = os.pathsep.join([str(ROOT / "src"), str(ROOT)])
    command = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "refused sink\nrefused bypass\n"


def test_the_page_is_drawn_from_the_results_and_every_survivor_is_judged():
    found, page = json.loads(mutants.RESULTS.read_text()), mutants.PAGE.read_text()
    assert mutants.rendered(page, found) == page
    for module, counts in found["modules"].items():
        survivors = [row for row in found["survivors"] if row["module"] == module]
        assert counts["survived"] == len(survivors)
        assert counts["tried"] == counts["killed"] + counts["timed out"] + counts["survived"] <= counts["made"]
        for row in survivors:
            assert row["judgement"] in mutants.JUDGEMENTS
            assert row["why"]
