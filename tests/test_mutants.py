"""The mutation tests: what is configured exists, the sample is fair, and the pages show the stored results."""

from __future__ import annotations

import json
import tomllib
from collections import Counter

from benchmarks import mutants


def test_the_configured_packages_and_tests_exist():
    config = tomllib.loads((mutants.ROOT / mutants.CONFIG).read_text())["cosmic-ray"]
    paths = [*config["module-path"], *(word for word in config["test-command"].split() if word.startswith("tests/"))]
    assert not [path for path in paths if not (mutants.ROOT / path).exists()]


def test_a_sample_contains_the_same_share_of_every_module():
    sizes = {"a.py": 400, "b.py": 100, "c.py": 300}
    specs = [(module, "NumberReplacer", number) for module, size in sizes.items() for number in range(size)]
    one, other = ({f"{prefix}{n}": spec for n, spec in enumerate(specs)} for prefix in ("x", "y"))  # job ids are random
    sample = mutants.sampled(one, 80, 0)
    assert Counter(one[key][0] for key in sample) == {"a.py": 40, "b.py": 10, "c.py": 30}
    assert {one[key] for key in sample} == {other[key] for key in mutants.sampled(other, 80, 0)}
    assert sample != mutants.sampled(one, 80, 1)


def test_the_pages_show_the_results_and_every_survivor_is_judged():
    measured = json.loads(mutants.RESULTS.read_text())
    for path in (mutants.PAGE, mutants.DETAILS):
        assert mutants.rendered(path, measured) == path.read_text()
    for row in measured["packages"].values():
        assert row["mutants"] >= row["tried"] == row["killed"] + row["timed out"] + row["survived"]
    assert len(measured["survivors"]) == sum(row["survived"] for row in measured["packages"].values())
    kinds = {row["judgement"].partition(":")[0] for row in measured["survivors"]}
    assert kinds <= {"equivalent", "speed", "accepted", "detected elsewhere"}


def test_equivalent_mutants_do_not_count_in_the_score():
    counts = {"mutants": 30, "tried": 10, "killed": 6, "timed out": 1, "survived": 3}
    rows = [
        ("kernels.py:3 f", "equivalent: x"),
        ("kernels/base.py:4 g", "equivalent: y"),
        ("kernels.py:5 h", "speed: z"),
    ]
    survivors = [{"place": f"src/nrm_plugin/{place}", "judgement": judgement} for place, judgement in rows]
    measured = {"packages": {"kernels": counts, "events": counts | {"survived": 0}}, "survivors": survivors}
    table = mutants.summary(measured).splitlines()
    assert table[2:] == [
        "| `kernels` | 30 | 10 | 7 | 3 | 2 | 1 | 0 | 87.5% |",
        "| `events` | 30 | 10 | 7 | 0 | 0 | 0 | 0 | 70.0% |",
        "| **all** | 60 | 20 | 14 | 3 | 2 | 1 | 0 | 77.8% |",
    ]
