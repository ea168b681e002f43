"""Processor time of computations that alternate, peak memory of a process, and profiles."""

from __future__ import annotations

import gc
import multiprocessing
import os
import resource
import statistics
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.cost.ways import PLAIN, Work, message

RETURNING = {"MALLOC_MMAP_THRESHOLD_": str(1 << 16)}
"""Freed memory is returned to the system immediately, so that a peak contains no unused memory."""

WAITING = {"OMP_WAIT_POLICY": "passive"}
"""A thread that waits for others sleeps, so that it uses no processor time."""

Clocks = list[tuple[float, float]]
"""Processor and wall-clock seconds of every round."""


def alternated(work: Work, rounds: int, seconds: float = 20.0, once: Collection[str] = ()) -> dict[str, Clocks]:
    """Runs each computation once a round, until both the rounds and the time are reached or four times the rounds.

    Slow computations therefore run ``rounds`` times, and short ones more often. The first round is not counted.
    Computations in ``once`` have run before, and run in the first counted round only.
    """
    clocks: dict[str, Clocks] = {name: [] for name in work}
    for name, run in work.items():
        if name not in once:
            run()
    started, number = time.perf_counter(), 0
    while number < rounds or (number < 4 * rounds and time.perf_counter() - started < seconds):
        for name, run in work.items():
            if name not in once or number == 0:
                clocks[name].append(clocked(run))
        number += 1
    return clocks


def clocked(run: Callable[[], object]) -> tuple[float, float]:
    """Returns the processor and wall-clock seconds of one run."""
    gc.collect()
    wall, processor = time.perf_counter(), time.process_time()
    run()
    return time.process_time() - processor, time.perf_counter() - wall


def spread(values: Sequence[float]) -> list[float]:
    """Returns the median, smallest and largest."""
    return [round_to(value) for value in (statistics.median(values), min(values), max(values))]


def round_to(value: float, digits: int = 4) -> float:
    """Rounds to a number of significant digits."""
    return float(f"{value:.{digits}g}")


def summary(clocks: dict[str, Clocks]) -> dict[str, Any]:
    """Returns the seconds and multiples of the plain gradient of the same round: median, smallest, largest."""
    plain = clocks[PLAIN]
    return {
        "rounds": len(plain),
        "seconds": {name: spread([processor for processor, _ in runs]) for name, runs in clocks.items()},
        "ratios": {name: spread([a / b for (a, _), (b, _) in pairs(runs, plain)]) for name, runs in clocks.items()},
        "wall ratios": {
            name: spread([a / b for (_, a), (_, b) in pairs(runs, plain)]) for name, runs in clocks.items()
        },
    }


def pairs(runs: Clocks, plain: Clocks) -> list[tuple[tuple[float, float], tuple[float, float]]]:
    """Returns the runs of each round; a computation may have run in the first one only."""
    return list(zip(runs, plain, strict=False))


# -- memory -----------------------------------------------------------------------------------------------------------


def limit_memory(gibibytes: float | None) -> None:
    """Limits the memory of this process, so that a computation that needs more raises an error."""
    if gibibytes is not None:
        size = int(gibibytes * 2**30)
        resource.setrlimit(resource.RLIMIT_DATA, (size, size))


def resident() -> tuple[float, float]:
    """Returns the resident memory of this process and its peak since ``reset``, in MiB."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return tuple(int(lines[key].split()[0]) / 1024 for key in ("VmRSS", "VmHWM"))  # type: ignore[return-value]


def reset() -> None:
    """Sets the peak to the present memory."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")


def forked(run: Callable[..., Any], *arguments: object, seconds: float | None = None) -> Any:
    """Returns the result of a function in a forked process.

    Raises:
        RuntimeError: With the message of the process, if the function raises there or takes longer than ``seconds``.
    """
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_sent, args=(sender, run, arguments))
    process.start()
    sender.close()
    try:
        if receiver.poll(seconds):
            result, error = receiver.recv()
        else:
            process.kill()
            result, error = None, f"more than {seconds:.0f} s"
    except EOFError:
        result, error = None, "the process ended without a result"
    process.join()
    if error is not None:
        raise RuntimeError(error)
    return result


def _sent(sender: Any, run: Callable[..., Any], arguments: tuple[object, ...]) -> None:
    torch.set_num_threads(1)  # the threads of the parent do not exist in a fork, which would wait for them forever
    try:
        sender.send((run(*arguments), None))
    except Exception as error:
        sender.send((None, message(error)))


# -- profiles ---------------------------------------------------------------------------------------------------------


def profile(run: Callable[[], object], seconds: float = 0.2, top: int = 12) -> dict[str, Any]:
    """Returns the shares of the wall-clock time of single tensor operators, and of the time outside of all operators.

    The latter is Python, autograd's engine and the dispatcher. The profiler adds to each call of an operator, so that
    shares are accurate to a few percent.
    """
    run()
    repeats = max(1, min(20, int(seconds / max(clocked(run)[1], 1e-4))))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        started = time.perf_counter()
        for _ in range(repeats):
            run()
        took = time.perf_counter() - started
    operators = [(event.key, event.self_cpu_time_total, event.count) for event in profiler.key_averages()]
    return shares(operators, took, repeats, top)


def shares(operators: list[tuple[str, float, int]], took: float, repeats: int, top: int) -> dict[str, Any]:
    """Returns the profile of operators given by name, own microseconds and calls; other events are not operators."""
    own = [(micro / 1e6 / took, name, calls) for name, micro, calls in operators if is_operator(name)]
    largest = sorted(own, reverse=True)[:top]
    return {
        "seconds": round_to(took / repeats),
        "outside operators": round_to(max(0.0, 1 - sum(share for share, *_ in own)), 2),
        "calls": sum(calls for *_, calls in own) // repeats,
        "operators": {name: [round_to(share, 2), calls // repeats] for share, name, calls in largest},
    }


def is_operator(name: str) -> bool:
    """Returns True if an event of the profiler is a tensor operator, such as ``aten::mul``."""
    return "::" in name and not name.startswith("autograd::")


def threads() -> list[int]:
    """Returns the numbers of threads to measure: one, and all."""
    return sorted({1, os.cpu_count() or 1})
