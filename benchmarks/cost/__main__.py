"""Time and memory of a measure as multiples of one plain input gradient, next to Zennit and Captum, with targets.

``python -m benchmarks.cost`` measures every net, its peak memory, and one small model of each module of timm, stores
the results as JSON with the environment, writes the tables of docs/cost.md and docs/cost-details.md, and prints them as
measured / target; ``make bench`` installs timm, transformers and LXT and runs it. Nets whose package is not installed
are skipped. ``--nets`` selects nets and leaves the other results unchanged; ``--missing`` measures only what has
no stored result, so that an interrupted run continues; ``--quick`` measures times with one thread only; ``--times``,
``--batches``, ``--peaks`` and ``--timm`` measure one of the four parts; ``--print`` and ``--render`` only print and
only write the stored results.

Each net is measured in its own process. Results are compared first: a plan with a recorded measure at every tap, and
Zennit's relevance with ``residual="sink"`` where every operation is a module with a rule. Computations alternate within
each round; times are processor times, ratios refer to the plain gradient of the same round, and medians and ranges are
stored. Peak memory is that of one process for each computation and batch size. Models of timm are compared in float32
only, and their first call and recorded measure are timed once.

``--profile NET`` prints the operators with the largest own time, the share outside of operators, and the stages of the
first call.
"""

from __future__ import annotations

import argparse
import copy
import fnmatch
import gc
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.cost import page, pages, timm_models
from benchmarks.cost.nets import BATCHED, BATCHES, NETS, Net
from benchmarks.cost.stages import stages
from benchmarks.cost.timing import (
    RETURNING,
    WAITING,
    alternated,
    clocked,
    forked,
    limit_memory,
    profile,
    reset,
    resident,
    round_to,
    summary,
    threads,
)
from benchmarks.cost.ways import (
    AGAIN,
    COMPOSITES,
    FIRST,
    PLAIN,
    PLANNED,
    RECORDED,
    TARGET,
    ZENNIT,
    ZENNIT_FIRST,
    Ways,
    Work,
    check,
    differences,
    faults,
    held,
    message,
    planned,
    without_rule,
)
from benchmarks.speed import environment

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks/results/cost.json"
WAYS = [PLAIN, ZENNIT_FIRST, *(f"{PLANNED}, {name}" for name in COMPOSITES)]
"""The computations whose peak memory is measured."""
SECONDS = 20.0
"""Time for which short computations are repeated."""
SECONDS_OF_TIMM = 900.0
"""Longest time for a model of timm."""


def net_of(name: str) -> Net:
    """Returns a net of the table, or a model of timm."""
    return NETS[name] if name in NETS else timm_models.net(name.removeprefix("timm/"))


# -- in a process of its own ------------------------------------------------------------------------------------------


def one(
    name: str, counts: list[int], rounds: int, light: bool = False, batch: int = 1, seconds: float = SECONDS
) -> dict[str, Any]:
    """Compares all computations of one net, and times them with each number of threads.

    Args:
        name: The net.
        counts: The numbers of threads.
        rounds: Number of rounds.
        light: Whether to omit everything that is not in the table of timm.
        batch: Number of samples.
        seconds: Time for which short computations are repeated.
    """
    torch.set_num_threads(counts[0])
    net = net_of(name)
    model, x = net.made(), net.inputs(batch)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    row: dict[str, Any] = {"net": name, "batch": batch, "parameters": parameters}
    row["without rule"] = without_rule(model)
    ways = Ways(net, model, x)
    exact = not light
    row["differences"] = forked(differences, ways, exact) if net.is_large else differences(ways, exact)
    row["faults"] = faults(row["differences"])
    if row["faults"]:  # times of different results are not comparable
        return {"rows": [{**row, "threads": count} for count in counts]}
    work, row["failed"] = ways.runnable(list(COMPOSITES), (PLAIN, ZENNIT, ZENNIT_FIRST) if light else None)
    explained = {name: plan.explain() for name, plan in ways.plans.items()}
    row["not planned"] = {name: text for name, text in explained.items() if text.startswith("recorded every time")}
    return {"rows": [timed(row, work, count, rounds, light, seconds) for count in counts]}


def timed(of: dict[str, Any], work: Work, count: int, rounds: int, light: bool, seconds: float) -> dict[str, Any]:
    """Times with ``count`` threads; with one thread, also the profiles of plans and the stages of first calls."""
    torch.set_num_threads(count)
    firsts = [f"{way}, {name}" for way in (FIRST, RECORDED) for name in COMPOSITES] if light else ()
    row: dict[str, Any] = {**of, "threads": count, "load": round_to(os.getloadavg()[0], 2)}
    row["processor"] = environment()["processor"]
    if light:
        work = {name: run for name, run in work.items() if not name.startswith(AGAIN)}
    row |= summary(alternated(work, rounds, 0.0 if light else seconds, once=firsts))
    if count == 1 and not light:
        row["profiles"] = {name: profile(work[f"{PLANNED}, {name}"]) for name in COMPOSITES}
        row["stages"] = {name: rounded(stages(work[f"{FIRST}, {name}"])) for name in COMPOSITES}
    return row


def rounded(seconds: dict[str, float]) -> dict[str, float]:
    """Rounds seconds to few digits."""
    return {name: round_to(value, 3) for name, value in seconds.items()}


def peaks_of(name: str) -> dict[str, Any]:
    """Measures the peak memory of a marginal at the input, in MiB in addition to the net, by batch size and way.

    Each is measured in a process of its own, which is forked before any computation.
    """
    torch.set_num_threads(1)
    net = net_of(name)
    model = net.made()
    rows = []
    for batch in (1, 8) if net.is_batched else (1,):
        row: dict[str, Any] = {"net": name, "batch": batch, "MiB": {}, "failed": {}}
        for way in WAYS:
            try:
                row["MiB"] |= forked(peak, net, model, way, batch)
            except RuntimeError as error:
                row["failed"][way] = str(error)
        rows.append(row)
    return {"rows": rows}


def peak(net: Net, model: nn.Module, way: str, batch: int) -> dict[str, float]:
    """Returns the peak of one computation; for a plan, of its first and of its second call, and what it holds.

    A copy of the net runs first with one sample, so that imports and initializations are not counted.
    """
    once(net, copy.deepcopy(model), net.inputs(), way)
    x = net.inputs(batch)
    gc.collect()
    before = resident()[0]
    reset()
    if not way.startswith(PLANNED):
        once(net, model, x, way)
        return {way: round_to(resident()[1] - before)}
    composite = way.removeprefix(f"{PLANNED}, ")
    plan = planned(net, model, x, COMPOSITES[composite]())
    plan(x, TARGET).marginal("input")
    first = resident()[1] - before
    x = x.clone()
    reset()
    plan(x, TARGET).marginal("input")
    found = {f"{FIRST}, {composite}": first, way: resident()[1] - before} | {
        f"{what}, {composite}": size / 2**20 for what, size in held(plan).items()
    }
    return {name: round_to(value) for name, value in found.items()}


def once(net: Net, model: nn.Module, x: Tensor, way: str) -> None:
    """Computes one marginal at the input."""
    if way in (PLAIN, ZENNIT_FIRST):
        check(Ways(net, model, x).others()[way]())
        return
    planned(net, model, x, COMPOSITES[way.removeprefix(f"{PLANNED}, ")]())(x, TARGET).marginal("input")


def spawned(*options: object, **variables: str) -> dict[str, Any]:
    """Runs this module in another process and parses its last line."""
    command = [sys.executable, "-m", "benchmarks.cost", *map(str, options)]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, **variables}, timeout=3600
        )
    except subprocess.TimeoutExpired:
        return {"failed run": "more than an hour"}
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        return {"failed run": message(RuntimeError(lines[-1])).removeprefix("RuntimeError: ")}
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


# -- all of them ------------------------------------------------------------------------------------------------------


def chosen(patterns: list[str], names: list[str]) -> Iterator[str]:
    """Yields the installed nets among those selected."""
    for name in names:
        if any(fnmatch.fnmatchcase(name.lower(), pattern.lower()) for pattern in patterns):
            if net_of(name).is_installed:
                yield name
            else:
                print(f"{name}: skipped, because {net_of(name).package} is not installed", flush=True)


def measured(names: list[str], options: argparse.Namespace) -> None:
    """Times all nets, and stores the results one by one."""
    counts, rounds = ([1], min(options.rounds, 3)) if options.quick else (options.threads, options.rounds)
    for name in missing(names, counts, options, "rows", "threads"):
        found = spawned("--one", name, "--threads", *counts, "--rounds", rounds, *limits_of(options), **WAITING)
        for row in found.get("rows") or [{"net": name, "threads": count, **found} for count in counts]:
            store(options.out, "rows", [row], ("net", "threads"))
            print(page.line(row), flush=True)


def of_timm(names: list[str], options: argparse.Namespace) -> None:
    """Times the models of timm with one thread, each in a forked process, since imports take long."""
    for name in missing(names, [1], options, "timm", "threads"):
        try:
            (row,) = forked(lightly, name, min(options.rounds, 3), options.memory, seconds=SECONDS_OF_TIMM)
        except RuntimeError as error:
            row = {"net": name, "threads": 1, "failed run": str(error)}
        store(options.out, "timm", [row], ("net", "threads"))
        print(page.line(row), flush=True)


def lightly(name: str, rounds: int, memory: float | None) -> list[dict[str, Any]]:
    """Returns the row of one model of timm, measured in this process."""
    limit_memory(memory)
    warnings.simplefilter("ignore")
    rows: list[dict[str, Any]] = one(name, [1], rounds, light=True)["rows"]
    return rows


def batches(names: list[str], options: argparse.Namespace) -> None:
    """Times nets with more than one sample, with one thread."""
    for batch in BATCHES:
        for name in missing(names, [batch], options, "batches", "batch"):
            sizes = ("--threads", 1, "--rounds", options.rounds, "--batch", batch)
            found = spawned("--one", name, *sizes, *limits_of(options))
            for row in found.get("rows") or [{"net": name, "threads": 1, "batch": batch, **found}]:
                store(options.out, "batches", [row], ("net", "batch"))
                print(page.line(row), flush=True)


def peaks(names: list[str], options: argparse.Namespace) -> None:
    """Measures the peak memory of all nets."""
    for name in missing(names, [1], options, "peaks", "batch"):
        found = spawned("--peak", name, *limits_of(options), **RETURNING)
        for row in found.get("rows", []):
            store(options.out, "peaks", [row], ("net", "batch"))
        print(name, found.get("failed run") or [row["MiB"] for row in found["rows"]], flush=True)


def missing(names: list[str], numbers: list[int], options: argparse.Namespace, key: str, by: str) -> Iterator[str]:
    """Yields the nets to measure: all, or with ``--missing`` those without a stored result."""
    stored = json.loads(options.out.read_text()) if options.missing and options.out.exists() else {}
    known = {(row["net"], row[by]) for row in stored.get(key, [])}
    return (name for name in names if not all((name, number) in known for number in numbers))


def limits_of(options: argparse.Namespace) -> tuple[object, ...]:
    """Returns the options that limit the memory of a process, and the time for which it repeats computations."""
    given = {"--memory": options.memory, "--seconds": None if options.seconds == SECONDS else options.seconds}
    return tuple(part for name, value in given.items() if value is not None for part in (name, value))


def store(path: Path, key: str, rows: list[dict[str, Any]], by: tuple[str, ...]) -> None:
    """Replaces the rows of the same nets and settings; the environment is that of the last run."""
    results = json.loads(path.read_text()) if path.exists() else {}
    merged = {tuple(row[name] for name in by): row for row in [*results.get(key, []), *rows]}
    results[key] = list(merged.values())
    results["environment"] = {**environment(), **packages(), "dtype": "float32"}
    path.parent.mkdir(parents=True, exist_ok=True)
    lists = {name: rows for name, rows in results.items() if name != "environment"}
    parts = [f'"environment": {json.dumps(results["environment"])}']
    for name, entries in lists.items():
        parts.append(f'"{name}": [\n' + ",\n".join(json.dumps(row, ensure_ascii=False) for row in entries) + "\n]")
    path.write_text("{" + ",\n".join(parts) + "}\n")


def packages() -> dict[str, str]:
    """Returns the versions of the installed packages that models are taken from."""
    found = {}
    for name in ("nrm-plugin", "timm", "transformers"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def profiled(name: str, count: int) -> None:
    """Prints the profile of a net, next to that of the plain gradient."""
    torch.set_num_threads(count)
    net = net_of(name)
    ways = Ways(net, net.made(), net.inputs())
    plain = ways.others()[PLAIN]
    works = {PLAIN: plain, **{way: run for composite in COMPOSITES for way, run in ways.ours(composite).items()}}
    for way, run in works.items():
        print(page.profile_text(way, profile(run)), end="\n\n", flush=True)
    for composite in COMPOSITES:
        print(page.stages_text(stages(works[f"{FIRST}, {composite}"]), clocked(plain)[0], composite), flush=True)


def main() -> None:
    """Runs the benchmark from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", nargs="+", default=["*"], help="names or patterns (default: all)")
    parser.add_argument("--threads", nargs="+", type=int, default=threads(), help="(default: 1 and all)")
    parser.add_argument("--rounds", type=int, default=7, help="(default: %(default)s)")
    parser.add_argument(
        "--seconds", type=float, default=SECONDS, help="time for which short computations are repeated (default: 20)"
    )
    parser.add_argument("--quick", action="store_true", help="three rounds with one thread, no peak memory")
    parser.add_argument("--times", action="store_true", help="only times of nets")
    parser.add_argument("--batches", action="store_true", help="only times with more than one sample")
    parser.add_argument("--peaks", action="store_true", help="only peak memory")
    parser.add_argument("--timm", action="store_true", help="only one small model of each module of timm")
    parser.add_argument("--missing", action="store_true", help="only what has no stored result")
    parser.add_argument("--memory", type=float, help="most memory of one process, in GiB (default: no limit)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="JSON to write or to read")
    parser.add_argument("--print", action="store_true", help="only print the stored results")
    parser.add_argument("--render", action="store_true", help="only write the tables of the pages")
    parser.add_argument("--profile", metavar="NET", help="print the profile of one net")
    parser.add_argument("--one", metavar="NET", help=argparse.SUPPRESS)
    parser.add_argument("--batch", type=int, default=1, help=argparse.SUPPRESS)
    parser.add_argument("--peak", metavar="NET", help=argparse.SUPPRESS)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    if args.one or args.peak:
        limit_memory(args.memory)
    if args.one:
        print(json.dumps(one(args.one, args.threads, args.rounds, batch=args.batch, seconds=args.seconds)))
    elif args.peak:
        print(json.dumps(peaks_of(args.peak)))
    elif args.profile:
        profiled(args.profile, args.threads[0])
    else:
        if not args.print and not args.render:
            run(args)
        results = json.loads(args.out.read_text())
        if args.out == RESULTS and not args.print:
            pages.write(results)
        if not args.render:
            print(page.overview(results), page.tables(results), sep="\n\n")


def run(args: argparse.Namespace) -> None:
    """Runs the measurements that the options select."""
    is_all = not (args.times or args.batches or args.peaks or args.timm)
    names = list(chosen(args.nets, list(NETS)))
    if is_all or args.times:
        measured(names, args)
    if args.batches or (is_all and not args.quick):
        batches([name for name in names if name in BATCHED], args)
    if args.peaks or (is_all and not args.quick):
        peaks(names, args)
    if args.timm or (is_all and not args.quick):
        models = list(chosen(args.nets, [f"timm/{name}" for name in timm_models.NAMES]))
        of_timm(models, args)


if __name__ == "__main__":
    main()
