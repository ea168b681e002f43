"""Mutation tests of kernels, events and the measure.

``python -m benchmarks.mutants`` lets cosmic-ray run a random sample of the mutants that benchmarks/mutants.toml
describes, and writes benchmarks/results/mutants.json and the tables of docs/mutants.md and docs/mutants-details.md.
Judgements of known survivors are preserved. A session that was interrupted, build/mutants.sqlite, is continued.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import re
import subprocess
import sys
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.markdown import grid, with_part

ROOT = Path(__file__).parents[1]
CONFIG, SESSION = "benchmarks/mutants.toml", "build/mutants.sqlite"
RESULTS = ROOT / "benchmarks/results/mutants.json"
PAGE, DETAILS = ROOT / "docs/mutants.md", ROOT / "docs/mutants-details.md"
SOURCE = "src/nrm_plugin/"
JUDGEMENTS = ("equivalent", "speed", "accepted")
LIBRARIES = ("torch", "zennit", "captum", "pytest", "hypothesis", "cosmic-ray")
COUNTS = ("mutants", "tried", "killed", "timed out", "survived")
Results = dict[str, Any]


def sampled(mutants: dict[str, tuple[str, str, int]], size: int, seed: int) -> set[str]:
    """Returns the keys of a random sample with the same share of every module."""
    draw = random.Random(seed)
    keys = sorted(mutants, key=mutants.__getitem__)
    draw.shuffle(keys)
    keys.sort(key=lambda key: mutants[key][0])
    return {keys[int((number + 0.5) * len(keys) / size)] for number in range(size)}


def run(*command: str) -> None:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1"}
    subprocess.run(command, cwd=ROOT, env=environment, check=True)


def create_session(size: int, seed: int) -> None:
    """Creates a session in which the mutants outside the sample are skipped."""
    from cosmic_ray.work_db import use_db
    from cosmic_ray.work_item import WorkerOutcome, WorkResult

    run("cosmic-ray", "baseline", CONFIG)
    path = (ROOT / SESSION).with_suffix(".new")
    path.parent.mkdir(exist_ok=True)
    run("cosmic-ray", "init", CONFIG, str(path), "--force")
    run("cr-filter-operators", str(path), CONFIG)
    with use_db(path) as session:
        mutants = {
            item.job_id: (str(mutant.module_path), mutant.operator_name, mutant.occurrence)
            for item in session.pending_work_items
            for mutant in item.mutations
        }
        others = mutants.keys() - sampled(mutants, size, seed)
        session.set_multiple_results(others, WorkResult(WorkerOutcome.SKIPPED, "not sampled"))
    path.rename(ROOT / SESSION)


def results(known: Results) -> Results:
    """Returns the counts of each package, and the survivors with their known judgements."""
    from cosmic_ray.work_db import use_db

    judgements = {(row["before"], row["after"]): row["judgement"] for row in known["survivors"]}
    packages: dict[str, dict[str, int]] = {}
    survivors = []
    with use_db(ROOT / SESSION) as session:
        pairs = [(item.mutations[0], result) for item, result in session.completed_work_items]
    for mutant, result in sorted(pairs, key=lambda pair: (pair[0].module_path, pair[0].start_pos)):
        if result.output == "Filtered operator":
            continue
        counts = packages.setdefault(mutant.module_path.parent.name, dict.fromkeys(COUNTS, 0))
        counts["mutants"] += 1
        if result.test_outcome is None:
            continue
        counts["tried"] += 1
        counts["survived" if not result.is_killed else "timed out" if result.output == "timeout" else "killed"] += 1
        if not result.is_killed:
            lines = result.diff.splitlines()[3:]
            before, after = (" ".join(line[1:].strip() for line in lines if line.startswith(sign)) for sign in "-+")
            place = f"{mutant.module_path}:{mutant.start_pos[0]} {mutant.definition_name}"
            judgement = judgements.get((before, after), "not judged")
            survivors.append({"place": place, "before": before, "after": after, "judgement": judgement})
    environment = {"Python": platform.python_version(), **{name: version(name) for name in LIBRARIES}}
    commit = subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, text=True).strip()
    return {"environment": environment, "commit": commit, "packages": packages, "survivors": survivors}


def summary(measured: Results) -> str:
    """Returns the table of the mutants of each package, with the survivors by judgement, and the score."""
    rows = [[f"`{name}`", *_counted(measured, [name])] for name in measured["packages"]]
    rows.append(["**all**", *_counted(measured, list(measured["packages"]))])
    head = " | ".join(f"of these, {judgement}" for judgement in JUDGEMENTS)
    return grid(f"| package | mutants | tested | detected | survived | {head} | score |", rows)


def _counted(measured: Results, packages: list[str]) -> list[object]:
    counts = Counter[str]()
    for name in packages:
        counts.update(measured["packages"][name])
    judged = Counter(
        row["judgement"].partition(":")[0] for row in measured["survivors"] if _package(row["place"]) in packages
    )
    detected = counts["killed"] + counts["timed out"]
    score = detected / (counts["tried"] - judged["equivalent"])
    shown = (judged[judgement] for judgement in JUDGEMENTS)
    return [counts["mutants"], counts["tried"], detected, counts["survived"], *shown, f"{100 * score:.1f}%"]


def _package(place: str) -> str:
    """The subpackage of a survivor, which was a single module in earlier versions."""
    return re.split(r"[./]", place.removeprefix(SOURCE))[0]


def survivors(measured: Results) -> str:
    """Returns the table of the survivors."""
    rows = []
    for row in measured["survivors"]:
        change = " → ".join(f"`{row[name]}`" for name in ("before", "after")).replace("|", "\\|")
        rows.append([f"`{row['place'].removeprefix(SOURCE)}`", change, row["judgement"]])
    libraries = ", ".join(f"{name} {value}" for name, value in measured["environment"].items())
    place = f"Measured at commit {measured['commit']} with {libraries}."
    return f"{grid('| survivor | change | judgement |', rows)}\n\n{place}"


def rendered(path: Path, measured: Results) -> str:
    """Returns one page with the tables of the results."""
    mark, part = ("summary", summary) if path == PAGE else ("survivors", survivors)
    return with_part(path.read_text(), mark, part(measured))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sample", type=int, default=40, help="number of mutants to try")
    parser.add_argument("--seed", type=int, default=0, help="seed of the sample")
    args = parser.parse_args()
    if not (ROOT / SESSION).exists():
        create_session(args.sample, args.seed)
    run("cosmic-ray", "exec", CONFIG, SESSION)
    measured = results(json.loads(RESULTS.read_text()))
    RESULTS.write_text(json.dumps(measured, indent=1, ensure_ascii=False) + "\n")
    for path in (PAGE, DETAILS):
        path.write_text(rendered(path, measured))


if __name__ == "__main__":
    main()
