"""Measures every number of the pages on real networks and texts, joint relevance and the known circuit.

``make real`` installs what is compared and runs this command. It downloads networks, photographs and texts (once), runs
all parts of :mod:`benchmarks.real.parts`, one per core, and then writes the committed results, figures and pages. A run
that is interrupted continues where it stopped. ``--quick`` measures a part of the numbers on few samples and writes
nothing but the cache. The cache is the folder ``$NRM_CACHE``; results that were computed before are read from it, so
take an empty folder to compute everything anew.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from benchmarks import numbers, outputs
from nrm_plugin.dataset.atomic_files import write_bytes

from . import packages
from .parts import Part, command, parts_of, seconds_left, startable

ROOT = Path(__file__).parents[2]
FINISHED, RESULTS = "finished.json", "results"
"""The file with the processor seconds of the finished parts, by name, and the folder of results, in that of a run."""
LOGGED, PAUSE, SILENCE = 12, 0.5, 60.0
"""Lines of a log that are shown after a failure, and seconds between two looks at the parts and between two reports."""
say: Callable[[str], None] = lambda text: print(text, flush=True)  # noqa: E731


class RunError(RuntimeError):
    """Raised if a part fails."""


@dataclass
class Running:
    """A part that runs in a process of its own, with its output in a file."""

    part: Part
    process: subprocess.Popen[bytes]
    log: Path
    opened: IO[bytes]
    began: float = field(default_factory=time.monotonic)

    def usage(self) -> float | None:
        """Returns the processor seconds of the process and all that it started, or None if it still runs."""
        ended, status, used = os.wait4(self.process.pid, os.WNOHANG)
        if not ended:
            return None
        self.process.returncode = os.waitstatus_to_exitcode(status)
        self.opened.close()
        return used.ru_utime + used.ru_stime

    def stop(self) -> None:
        """Ends the process and waits for it."""
        if self.process.returncode is None:
            self.process.send_signal(signal.SIGTERM)
            self.process.wait()
        self.opened.close()


def started(part: Part, quick: bool, folder: Path) -> Running:
    """Starts a part on one thread, with the packages of its host on the path."""
    path = [f"{Path(sys.prefix) / 'hosts' / part.host}", f"{ROOT / 'src'}", f"{ROOT}", os.environ.get("PYTHONPATH", "")]
    own = {"PYTHONPATH": os.pathsep.join(filter(None, path)), "OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"}
    environment = {**os.environ, **own}
    log = folder / f"{part.name.replace(' ', '-').replace(':', '').replace(',', '')}.log"
    opened = log.open("wb")
    process = subprocess.Popen(
        [sys.executable, *command(part, quick, f"{folder / RESULTS}")], cwd=ROOT, env=environment,
        stdin=subprocess.DEVNULL, stdout=opened, stderr=subprocess.STDOUT,
    )  # fmt: skip
    return Running(part, process, log, opened)


def minutes(seconds: float) -> str:
    """Returns a duration in words."""
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"


@dataclass
class Run:
    """A run of all parts, which continues an earlier one.

    Args:
        folder: The folder of results, logs and the list of finished parts.
        quick: Whether few samples are measured.
        jobs: Number of parts that run at the same time.
    """

    folder: Path
    quick: bool
    jobs: int

    def __post_init__(self) -> None:
        (self.folder / RESULTS).mkdir(parents=True, exist_ok=True)
        file = self.folder / FINISHED
        self.parts = parts_of(self.quick)
        known = json.loads(file.read_text()) if file.exists() else {}
        self.spent: dict[str, float] = {part.name: known[part.name] for part in self.parts if part.name in known}
        self.running: dict[str, Running] = {}

    def finish_all(self) -> None:
        """Runs the parts that are not finished yet.

        Raises:
            RunError: If a part fails; the parts that run at the same time are ended.
        """
        if self.spent:
            say(f"Continuing: {len(self.spent)} of {len(self.parts)} parts are finished.")
        reported = time.monotonic()
        try:
            while len(self.spent) < len(self.parts):
                for part in startable(self.parts, self.spent, self.running)[: self.jobs - len(self.running)]:
                    self._start(part)
                time.sleep(PAUSE)
                for one in list(self.running.values()):
                    self._look_at(one)
                if time.monotonic() - reported > SILENCE:
                    reported = time.monotonic()
                    say(f"  {self._state()}")
        finally:
            for one in self.running.values():
                one.stop()

    def _start(self, part: Part) -> None:
        place = [one.name for one in self.parts].index(part.name) + 1
        self.running[part.name] = started(part, self.quick, self.folder)
        say(f"[{place}/{len(self.parts)}] {part.name}: started; {self._state()}")

    def _look_at(self, one: Running) -> None:
        used = one.usage()
        if used is None:
            return
        del self.running[one.part.name]
        if one.process.returncode:
            last = one.log.read_text(errors="replace").replace("\r", "\n").splitlines()[-LOGGED:]
            raise RunError("\n".join([f"{one.part.name} failed; the end of {one.log}:", *last]))
        self.spent[one.part.name] = round(used, 2)
        write_bytes(self.folder / FINISHED, json.dumps(self.spent, indent=1).encode())
        taken = time.monotonic() - one.began
        say(f"{one.part.name}: finished in {minutes(taken)}, {minutes(used)} of processor time; {self._state()}")

    def _state(self) -> str:
        now = time.monotonic()
        ages = {name: now - one.began for name, one in self.running.items()}
        left = seconds_left(self.parts, self.spent, self.quick, self.jobs, ages)
        running = ", ".join(f"{name} ({minutes(age)})" for name, age in ages.items() if age > 1)
        return f"about {minutes(left)} left" + (f"; running: {running}" if running else "")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.real.reproduce", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="a part of the numbers on few samples, in ten minutes")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="parts at the same time")
    parser.add_argument("--again", action="store_true", help="repeat parts that an interrupted run has finished")
    options = parser.parse_args(arguments)
    folder = packages.cache() / ("quick" if options.quick else "full")
    if options.again:
        (folder / FINISHED).unlink(missing_ok=True)
    run = Run(folder, options.quick, max(1, options.jobs))
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # the parts end with the run
    try:
        run.finish_all()
    except (KeyboardInterrupt, RunError) as error:
        why = "Interrupted." if isinstance(error, KeyboardInterrupt) else f"{error}"
        say(f"{why}\nFinished parts are kept in {packages.cache()}. To continue, run the same command again.")
        return 130 if isinstance(error, KeyboardInterrupt) else 1
    finally:
        signal.signal(signal.SIGTERM, before)
    say(f"All {len(run.parts)} parts took {minutes(sum(run.spent.values()))} of processor time.")
    if not options.quick:
        outputs.publish(folder / RESULTS)
        numbers.PAGE.write_text(numbers.rendered(numbers.PAGE.read_text()))
        say(f"The results, figures and pages in {ROOT} are written.")
    (folder / FINISHED).unlink()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
