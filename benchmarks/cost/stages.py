"""Processor time of the stages of a first call, in which a plan is made."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from nrm_plugin.plan.model_state import ModelState
from nrm_plugin.plan.planned_measure import PlannedMeasure, TracedRecording
from nrm_plugin.plan.program import Program
from nrm_plugin.plan.simplify import Simplifier
from nrm_plugin.recording import recording
from nrm_plugin.recording.recording import Rerun

REST = "rest"
STAGES: dict[str, tuple[Any, str]] = {
    "state of the model": (ModelState, "__init__"),
    "forward pass and graph, traced": (TracedRecording, "__init__"),
    "rules and query, traced": (PlannedMeasure, "_computed"),
    "simplification": (Simplifier, "__init__"),
    "order of operations": (Program, "__init__"),
    "second run, with two samples": (Rerun, "shapes_of_two"),
    "search for samples": (recording, "find_samples"),
}
"""The method of each stage. A stage does not include stages that it calls. A program is compiled in its first run."""


def stages(run: Callable[[], object]) -> dict[str, float]:
    """Returns the processor seconds of each stage in one run."""
    found: dict[str, float] = dict.fromkeys((*STAGES, REST), 0.0)
    gc.collect()  # otherwise, a stage would include the collection of earlier objects
    with _timed(found):
        started = time.process_time()
        run()
        found[REST] = time.process_time() - started - sum(found.values())
    return found


@contextmanager
def _timed(found: dict[str, float]) -> Iterator[None]:
    inner: list[float] = []

    def wrapped(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            inner.append(0.0)
            started = time.process_time()
            try:
                return method(*args, **kwargs)
            finally:
                took = time.process_time() - started
                found[name] += took - inner.pop()
                if inner:
                    inner[-1] += took

        return timed

    methods = {name: getattr(kind, method) for name, (kind, method) in STAGES.items()}
    try:
        for name, (kind, method) in STAGES.items():
            setattr(kind, method, wrapped(name, methods[name]))
        yield
    finally:
        for name, (kind, method) in STAGES.items():
            setattr(kind, method, methods[name])
