"""Do the tests notice an error in the core? Mutation testing of kernels, events and measure.

    python -m benchmarks.mutants [--module kernels] [--sample N] [--seed 0] [--survivors] [--log FILE]

The operators of cosmic-ray change one thing at a time in a module: a sign, a comparison, a number, a condition. Each
such mutant should make a test fail. No file is changed: the package is imported and the tests are collected once, and
a process is forked for each mutant, in which the functions have the mutated code. It runs the tests that cover the
mutated line, fast and effective ones first, until one fails or the processor time for a mutant is spent.
Writes benchmarks/results/mutants.json and the tables of docs/mutants.md; existing judgements of survivors are
preserved. Needs a system with fork (Linux, macOS) and `pip install "nrm-plugin[mutation,test]"`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import signal
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.mutant import LEFT_OUT, MODULES, OPERATORS, ROOT, Mutant, Places, apply, mutants_of, sampled, source_of

RESULTS = ROOT / "benchmarks/results/mutants.json"
PAGE = ROOT / "docs/mutants.md"
TESTS = (
    "kernels measure oracles bad_input joints restriction cost precision folding calls doctests heads rules graphs "
    "attribution explain relative walks"
).split()
Key = tuple[str, ...]
Found = dict[str, Any]


@dataclass
class Test:
    """One collected test, the lines it covers, and its kills so far."""

    item: Any
    seconds: float
    lines: dict[str, set[int]]
    kills: int = 0

    @property
    def rank(self) -> float:
        return (self.seconds + 1e-3) / (1 + self.kills)


class Trial:
    """Plugin of pytest that runs mutants against the tests of a session instead of the tests themselves.

    Args:
        mutants: The mutants to try.
        budget: Processor seconds of tests for one mutant.
        log: File to which outcomes are appended; its entries are reused.
    """

    def __init__(self, mutants: list[Mutant], budget: float, log: Path | None) -> None:
        self.mutants, self.budget, self.log = mutants, budget, log
        self.outcomes: dict[Key, str] = {}
        self._failed = False

    def pytest_runtest_logreport(self, report: Any) -> None:
        self._failed = self._failed or report.failed

    def pytest_runtestloop(self, session: Any) -> bool:
        known = (
            [json.loads(line) for line in self.log.read_text().splitlines()] if self.log and self.log.exists() else []
        )
        self.outcomes = {tuple(row["key"]): row["outcome"] for row in known}
        tests = self._crossed(session.items)
        todo = [mutant for mutant in self.mutants if mutant.key not in self.outcomes]
        for number, mutant in enumerate(todo):
            began = time.time()
            outcome, test = self._tried(mutant, self._chosen(tests, mutant))
            self.outcomes[mutant.key] = outcome
            row = {"key": mutant.key, "line": mutant.line, "outcome": outcome, "test": test, "s": time.time() - began}
            if self.log:
                with self.log.open("a") as file:
                    file.write(json.dumps(row) + "\n")
            if outcome != "killed":
                print(f"{number + 1}/{len(todo)} {outcome}: {mutant.module}:{mutant.line} {mutant.after}", flush=True)
        return True

    def _chosen(self, tests: list[Test], mutant: Mutant) -> list[Test]:
        """The tests that cover the statement; else the function; else, for code run at import, the module."""
        whole = Places(source_of(mutant.module).read_text())
        size = range(1, len(whole.text) + 1)
        function = {line for line in size if whole.function(line) == mutant.function != "<module>"}
        for lines in (set(mutant.lines), function, set(size)):
            found = [test for test in tests if lines & test.lines.get(mutant.module, set())]
            if found:
                return _in_turn(found)
        return []

    def _tried(self, mutant: Mutant, tests: list[Test]) -> tuple[str, str | None]:
        reader, writer = os.pipe()
        child = os.fork()
        if not child:
            os.close(reader)
            limit = int(self.budget + 10 + max((test.seconds for test in tests), default=0))
            resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + 5))
            resource.setrlimit(resource.RLIMIT_DATA, (1 << 33, 1 << 33))
            self._run_forked(mutant, tests, writer)
        os.close(writer)
        with os.fdopen(reader) as pipe:
            reply = pipe.read()
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status):
            return ("timed out" if os.WTERMSIG(status) in (signal.SIGXCPU, signal.SIGKILL) else "killed"), None
        if not reply:
            return "survived", None
        kind, place = reply.split(maxsplit=1)
        if kind == "error":
            raise RuntimeError(f"{mutant.key} could not be tried: {place}")
        if kind == "rejected":
            return "killed", f"import: {place}"
        tests[int(place)].kills += 1
        return "killed", tests[int(place)].item.nodeid

    def _run_forked(self, mutant: Mutant, tests: list[Test], writer: int) -> None:
        _quiet()
        reply = b""
        try:
            try:
                apply(mutant)
            except (TypeError, NameError, AttributeError, KeyError, IndexError) as error:  # not importable
                reply = f"rejected {error!r}".encode()
            else:
                for number, (test, following) in enumerate(zip(tests, [*tests[1:], None], strict=True)):
                    self._run(test.item, following and following.item)
                    if self._failed:
                        reply = f"killed {number}".encode()
                        break
                    if time.process_time() > self.budget:
                        break
        except BaseException as error:
            reply = f"error {error!r}".encode()
        os.write(writer, reply)
        os._exit(0)

    def _run(self, item: Any, following: Any) -> None:
        item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)

    def _crossed(self, items: list[Any]) -> list[Test]:
        """Coverage and duration of every test, from a run without a mutant."""
        file = Path(tempfile.mkstemp()[1])
        child = os.fork()
        if not child:
            _quiet()
            rows = []
            try:
                for item, following in zip(items, [*items[1:], None], strict=True):
                    self._failed, crossed, began = False, defaultdict(set), time.process_time()
                    sys.settrace(_tracer(crossed))
                    self._run(item, following)
                    sys.settrace(None)
                    lines = {module: sorted(found) for module, found in crossed.items()}
                    rows.append((time.process_time() - began, lines, self._failed))
            finally:
                file.write_text(json.dumps(rows))
                os._exit(0)
        os.waitpid(child, 0)
        rows = json.loads(file.read_text())
        file.unlink()
        failed = [item.nodeid for item, (_, _, has_failed) in zip(items, rows, strict=False) if has_failed]
        if failed or len(rows) < len(items):
            raise SystemExit(f"tests fail without a mutant: {failed or items[len(rows)].nodeid}")
        sets = [{module: set(found) for module, found in lines.items()} for _, lines, _ in rows]
        print(f"{len(items)} tests, {sum(row[0] for row in rows):.0f} s", flush=True)
        return [Test(item, row[0], lines) for item, row, lines in zip(items, rows, sets, strict=True)]


def _in_turn(tests: list[Test]) -> list[Test]:
    """Fast and effective tests first, but one of every test function before the second of any."""
    turns: dict[str, int] = defaultdict(int)
    ranked = []
    for test in sorted(tests, key=lambda test: test.rank):
        function = test.item.nodeid.partition("[")[0]
        ranked.append((turns[function], test.rank, len(ranked), test))
        turns[function] += 1
    return [test for *_, test in sorted(ranked, key=lambda row: row[:3])]


def _quiet() -> None:
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 1)
    os.dup2(nothing, 2)


def _tracer(crossed: dict[str, set[int]]) -> Any:
    files = {str(source_of(module)): module for module in MODULES}

    def entered(frame: Any, event: str, _: object) -> Any:
        module = files.get(frame.f_code.co_filename)
        if module is None:
            return None
        lines = crossed[module]

        def stepped(inner: Any, event: str, _: object) -> Any:
            lines.add(inner.f_lineno)
            return stepped

        return stepped

    return entered


def tried(mutants: list[Mutant], tests: Sequence[str], match: str, budget: float, log: Path | None) -> dict[Key, str]:
    """Outcome of each mutant: killed, timed out or survived."""
    import hypothesis
    import pytest
    import torch

    torch.set_num_threads(1)
    hypothesis.settings.register_profile(
        "mutants", derandomize=True, database=None, deadline=None, print_blob=False,
        suppress_health_check=list(hypothesis.HealthCheck),
        phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate],
    )  # fmt: skip
    hypothesis.settings.load_profile("mutants")
    os.chdir(ROOT)
    sys.path[:0] = [str(ROOT / "src"), str(ROOT)]
    trial = Trial(mutants, budget, log)
    options = "-q -s --tb=no --assert=plain -p no:cacheprovider -p no:xdist".split()
    pytest.main(
        ["-m", "not slow", "-k", match, *options, *(f"tests/test_{name}.py" for name in tests)], plugins=[trial]
    )
    return trial.outcomes


# -- results and page -------------------------------------------------------------------------------------------------

JUDGEMENTS = {
    "equivalent": "no input distinguishes the mutant from the original",
    "speed": "the same numbers at a higher cost in time or memory",
    "accepted": "a difference that the package does not specify",
}
UNJUDGED = {"judgement": "not judged", "why": ""}


def counted(made: list[Mutant], outcomes: dict[Key, str], before: Found) -> Found:
    """Counts by module, and the survivors with their existing judgements."""
    judged = {_key(row): {"judgement": row["judgement"], "why": row["why"]} for row in before.get("survivors", [])}
    found = {"modules": dict(before.get("modules", {})), "survivors": []}
    for module in MODULES:
        own = [mutant for mutant in made if mutant.module == module]
        if not own:
            found["survivors"] += [row for row in before.get("survivors", []) if row["module"] == module]
            continue
        kinds = [outcomes[mutant.key] for mutant in own if mutant.key in outcomes]
        counts = {kind: kinds.count(kind) for kind in ("killed", "timed out", "survived")}
        found["modules"][module] = {"made": len(own), "tried": len(kinds), **counts}
        for mutant in sorted(own, key=lambda mutant: mutant.line):
            if outcomes.get(mutant.key) == "survived":
                found["survivors"].append({**mutant.row, **judged.get(mutant.key, UNJUDGED)})
    return found


def recounted(made: list[Mutant], outcomes: dict[Key, str], before: Found) -> Found:
    """The counts after the previous survivors were tried again."""
    found: Found = {"modules": {name: dict(counts) for name, counts in before["modules"].items()}, "survivors": []}
    lines = {mutant.key: mutant.line for mutant in made}
    for row in before["survivors"]:
        outcome = outcomes.get(_key(row), "survived")
        if outcome == "survived":
            found["survivors"].append({**row, "line": lines.get(_key(row), row["line"])})
        else:
            found["modules"][row["module"]]["survived"] -= 1
            found["modules"][row["module"]][outcome] += 1
    return found


def _key(row: Found) -> Key:
    return tuple(row[name] for name in ("module", "function", "operator", "before", "after"))


def rendered(page: str, found: Found) -> str:
    """The page with the tables of the results."""
    lines = ["| module | mutants | tried | killed | timed out | survived | equivalent survivors | score |"]
    lines += ["|---|---|---|---|---|---|---|---|"]
    for module, counts in found["modules"].items():
        own = [row for row in found["survivors"] if row["module"] == module]
        equivalent = sum(row["judgement"] == "equivalent" for row in own)
        detected = counts["killed"] + counts["timed out"]
        numbers = [counts[kind] for kind in ("made", "tried", "killed", "timed out", "survived")]
        score = f"{100 * detected / (counts['tried'] - equivalent):.1f} %"
        lines.append(f"| `{module}.py` | {' | '.join(map(str, numbers))} | {equivalent} | {score} |")
    for module in found["modules"]:
        own = [row for row in found["survivors"] if row["module"] == module]
        lines += ["", f"## Survivors in {module}.py", ""]
        lines += ["| where | change | judgement |", "|---|---|---|"] if own else ["None."]
        for row in own:
            change = " → ".join(f"`{part}`" for part in _difference(row["before"], row["after"]))
            lines.append(f"| `{row['function']}` | {change} | {row['judgement']}: {row['why']} |".replace(": |", " |"))
    place = ", ".join(f"{name} {value}" for name, value in found["environment"].items())
    settings = found["settings"]
    lines += ["", f"Measured with {place}; seed {settings['seed']}, {settings['budget']:g} s of tests for each mutant."]
    head, rest = page.split("<!-- measured -->")
    _, tail = rest.split("<!-- end -->")
    return head + "<!-- measured -->\n" + "\n".join(lines) + "\n<!-- end -->" + tail


def _difference(before: str, after: str, around: int = 24) -> tuple[str, str]:
    """The differing parts of both lines, with some context."""
    shorter = min(len(before), len(after))
    start = next((n for n in range(shorter) if before[n] != after[n]), shorter)
    end = next((n for n in range(shorter - start) if before[-1 - n] != after[-1 - n]), shorter - start)
    first = max(0, start - around)
    texts = []
    for text in (before, after):
        last = min(len(text), len(text) - end + around)
        shown = ("…" if first else "") + text[first:last] + ("…" if last < len(text) else "")
        texts.append(shown.replace("|", "\\|"))
    return texts[0], texts[1]


def _environment() -> dict[str, str]:
    names = ("torch", "zennit", "captum", "pytest", "hypothesis", "cosmic-ray")
    return {"Python": platform.python_version(), **{name: version(name) for name in names}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--module", choices=MODULES, help="only this module")
    parser.add_argument("--sample", type=int, help="number of mutants to try, drawn at random (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the sample and of the order")
    parser.add_argument("--budget", type=float, default=5.0, help="processor seconds of tests for one mutant")
    parser.add_argument("--tests", nargs="+", default=TESTS, help="names of test files, without `test_`")
    parser.add_argument("--match", default="", help="only tests with matching names, as with pytest's -k")
    parser.add_argument("--survivors", action="store_true", help="only survivors in the stored results")
    parser.add_argument("--log", type=Path, help="file to append outcomes to; mutants in it are not tried again")
    parser.add_argument("--list", action="store_true", help="only list the mutants")
    parser.add_argument("--render", action="store_true", help="only render the page from the stored results")
    args = parser.parse_args()
    before = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    if args.render:
        PAGE.write_text(rendered(PAGE.read_text(), before))
        return
    modules = [args.module] if args.module else MODULES
    survived = {_key(row) for row in before.get("survivors", [])}
    only = {(key[1], key[2]) for key in survived} if args.survivors else None
    made = sampled([mutant for module in modules for mutant in mutants_of(module, only)], None, args.seed)
    if args.list:
        for mutant in made:
            print(f"{mutant.module}:{mutant.line} {mutant.function}\n  - {mutant.before}\n  + {mutant.after}")
        return
    chosen = [mutant for mutant in made if mutant.key in survived] if args.survivors else made[: args.sample]
    outcomes = tried(chosen, args.tests, args.match, args.budget, args.log)
    found = (recounted if args.survivors else counted)(made, outcomes, before)
    settings = {"seed": args.seed, "budget": args.budget, "operators": OPERATORS, "left out": LEFT_OUT}
    settings = before["settings"] if args.survivors else settings
    found = {"environment": _environment(), "settings": settings, **found}
    RESULTS.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    PAGE.write_text(rendered(PAGE.read_text(), found))


if __name__ == "__main__":
    main()
