"""Planned measures, whose plans were made on other values, in place of recorded measures.

A test that runs with these measures tests programs: every query is first evaluated by a measure at other values, and
its trace becomes the program that answers the query in the test.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

import nrm_plugin
from nrm_plugin.measure.measure import RelevanceMeasure
from nrm_plugin.measure.start import every_one
from nrm_plugin.plan.plan import Plan
from nrm_plugin.plan.planned_measure import PlannedMeasure

PLAN_SETTINGS = ("composite", "residual", "gain_limit", "output", "batched", "uncovered", "max_memory", "slopes")
ARGUMENTS = ("additional_forward_args", "additional_forward_kwargs")

ANSWERS: Counter[str] = Counter()
"""Numbers of queries answered by programs, and of queries answered by recordings, by reason."""


def other_values(inputs: Any) -> Any:
    """Permutes the entries of each tensor; a tensor that is passed twice remains a single tensor."""
    known: dict[int, Tensor] = {}

    def changed(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.numel() == 0 or not isinstance(value.shape, torch.Size):
            return value
        if id(value) not in known:
            draw = torch.Generator().manual_seed(value.numel())
            order = torch.randperm(value.numel(), generator=draw)
            other = value.detach().clone()
            if other.stride() == value.stride():
                with torch.no_grad():
                    other.copy_(value.detach().reshape(-1)[order].reshape(value.shape))
                    if value.is_floating_point():
                        other *= 0.9
                known[id(value)] = other.requires_grad_(value.requires_grad)
            else:  # an expanded tensor
                known[id(value)] = value
        return known[id(value)]

    if isinstance(inputs, Mapping):
        return {key: changed(value) if key != "mask" else value for key, value in inputs.items()}
    if isinstance(inputs, (list, tuple)):
        return type(inputs)([changed(value) for value in inputs])
    return changed(inputs)


class CheckedMeasure(PlannedMeasure):
    """A planned measure that first evaluates every query on a measure at other values."""

    other: PlannedMeasure | None = None

    def _answer(self, method: Any, args: Any, kwargs: Any) -> Any:
        if self._is_answering:
            return super()._answer(method, args, kwargs)
        self._ran = False
        for _ in range(2 if self.other is not None else 0):  # a query with events is traced when it is repeated
            try:
                getattr(self.other, method.__name__)(*args, **kwargs)
            except Exception:  # the test decides whether the query itself fails
                break
        answer = super()._answer(method, args, kwargs)
        ANSWERS["program" if self._ran else self._reason(method.__name__)] += 1
        return answer

    def _run(self, query: Any) -> Any:
        before = self.outputs
        answer = super()._run(query)
        self._ran = True
        outputs, _ = query.program.forward(self._tensors)
        torch.testing.assert_close(every_one(outputs[1], self._planned.references), before, equal_nan=True)
        return answer

    def _reason(self, name: str) -> str:
        if self._programs.reason_not_replayable:
            return f"recorded: {self._programs.reason_not_replayable}"
        return f"recorded: {name}, disabled {sorted(self._programs.disabled_shortcuts)}, {self._programs._recorded}"


def planned(model: Any, inputs: Any, target: Any = None, **keywords: Any) -> RelevanceMeasure:
    """Computes a measure by a plan that was made on other values, in place of :class:`RelevanceMeasure`."""
    settings = {key: keywords[key] for key in PLAN_SETTINGS if key in keywords}
    arguments = {key: keywords[key] for key in ARGUMENTS if key in keywords}
    rest = {key: value for key, value in keywords.items() if key not in settings and key not in arguments}
    others = other_values(inputs)
    if "reference" in rest:
        settings["reference"] = rest["reference"]
    try:
        plan = Plan(model, others, **settings, **arguments)
        other = plan(others, target, **rest, **arguments)
    except Exception:  # the other values may not be valid
        plan, other = Plan(model, inputs, **settings, **arguments), None
    measure = plan(inputs, target, **rest, **arguments)
    measure.__class__, measure.other = CheckedMeasure, other  # type: ignore[attr-defined]
    if "input" in measure.layers:
        measure.variation("input")  # raises the errors that a recorded measure raises when it is constructed
    return measure


class _AlsoPlanned(type):
    def __call__(cls, *args: Any, **kwargs: Any) -> RelevanceMeasure:
        return planned(*args, **kwargs)

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, RelevanceMeasure)


class Planned(RelevanceMeasure, metaclass=_AlsoPlanned):
    """Replacement for :class:`RelevanceMeasure` in a test module."""


@contextmanager
def measures_are_planned(modules: list[Any]) -> Iterator[None]:
    """Context manager that makes the name ``RelevanceMeasure`` in some modules refer to planned measures."""
    plain = RelevanceMeasure  # a local name, since the name is also replaced in this module
    changed = [module for module in (*modules, nrm_plugin) if vars(module).get("RelevanceMeasure") is plain]
    for module in changed:
        module.RelevanceMeasure = Planned
    try:
        yield
    finally:
        for module in changed:
            module.RelevanceMeasure = plain


__all__ = ["ANSWERS", "CheckedMeasure", "measures_are_planned", "other_values", "planned"]
