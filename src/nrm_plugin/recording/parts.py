"""Recordings with limited memory, divided into parts of which only one stores its tensors at a time.

The first run of the model determines the structure of the recording. If the tensors of the steps exceed the limit, they
are freed. When a pass arrives at a step, the model is run again, and only the steps of one part, which are consecutive,
keep their tensors. The outputs of some modules, such as transformer blocks, are stored: in later runs, these modules
return the stored outputs without running, unless they contain steps of the part. The structure, and thus the names of
taps (hook points) and the order of all sums, is always taken from the first run.

Kernels are discarded after relevance has been propagated through them and constructed again for further passes.
"""

from __future__ import annotations

import bisect
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..errors import StaleMeasureError
from ..kernels.layer_step import LayerStep
from ..kernels.step import Step
from ..model.devices import on_one_device
from .stored_outputs import (
    WORTH,
    StoredCall,
    are_kept,
    bytes_of,
    entries,
    is_container,
    kept,
    mapped,
    size_of,
    versions,
)

End = Callable[[Tensor], Tensor]
"""Function that returns a copy of a tensor at which walks end."""


class PartRecorded(BaseException):
    """Raised to stop a run of the model once the part has been recorded.

    It is not a subclass of ``Exception``, which the model may catch.
    """


class Watcher(Protocol):
    """Interface of objects that are notified of module calls and steps (calls with a kernel) during a run."""

    def on_step(self, step: Step, output: Tensor) -> None:
        """Called for each step, with the output of the call."""

    def watch(self, module: nn.Module, name: str) -> None:
        """Called for each module before the model runs."""

    def enter(self, module: nn.Module, name: str, call: int, args: Any, kwargs: Any, end: End) -> None:
        """Called before a module without a rule runs. ``end`` returns a copy of a tensor at which walks end."""

    def leave(self, module: nn.Module, output: Any, gates: Any) -> None:
        """Called after a module without a rule has run."""


@dataclass
class _Open:
    """Module that is running, with the index of the call, the number of steps before it, and its arguments."""

    module: nn.Module
    name: str
    call: int
    first: int
    args: list[tuple[Tensor, int]]


class FirstRun:
    """Observer of the first run of the model, which frees the tensors of all steps once they exceed the limit.

    Args:
        limit: Memory limit in bytes.
        drop: Callback for when the limit is exceeded.
        reference: The first run on the reference, whose tensors and differences count toward the limit, or None.

    Attributes:
        steps: The steps, in execution order.
        sizes: Size of each step in bytes.
        values: A few output elements of each step.
        stored: The calls whose outputs are stored; none of these calls contains another.
        is_over: Whether the limit was exceeded.
    """

    def __init__(self, limit: int, drop: Callable[[], None] = lambda: None, reference: FirstRun | None = None) -> None:
        self.limit, self._drop = limit, drop
        self.reference = reference
        self.steps: list[Step] = []
        self.sizes: list[int] = []
        self.values: list[Tensor] = []
        self.stored: list[StoredCall] = []
        self.is_over: bool = reference is not None and reference.is_over
        self._total: int = 0 if reference is None else reference._total
        self._open: list[_Open] = []

    def on_step(self, step: Step, output: Tensor) -> None:
        step.number, step.holder = len(self.steps), _UNFINISHED
        has_image = isinstance(step, LayerStep) and step.layer_call.image is not None
        self.steps.append(step)
        self.sizes.append(size_of(output) * (1 + has_image if self.reference is None else 3))
        self.values.append(entries(output))
        self._total += self.sizes[-1]
        if self.is_over:
            step.empty()
        elif self._total > self.limit:
            self.is_over = True
            self._drop()
            for known in (*self.steps, *(self.reference.steps if self.reference is not None else ())):
                known.empty()

    def watch(self, module: nn.Module, name: str) -> None:
        return None

    def enter(self, module: nn.Module, name: str, call: int, args: Any, kwargs: Any, end: End) -> None:
        if is_container(module):
            self._open.append(_Open(module, name, call, len(self.steps), versions(args, kwargs)))

    def leave(self, module: nn.Module, output: Any, gates: Any) -> None:
        if not is_container(module):
            return
        one = self._open.pop()
        while one.module is not module:  # discard inner calls that raised an error that the model caught
            one = self._open.pop()
        inside = sum(self.sizes[one.first :])
        is_written = any(tensor._version != version for tensor, version in one.args)
        if is_written or inside > self.limit or not are_kept(output, one.first, gates):
            return
        if inside >= WORTH * bytes_of(output):
            while self.stored and self.stored[-1].first >= one.first:
                self.stored.pop()
            self.stored.append(StoredCall(one.name, one.call, one.first, len(self.steps), mapped(output, kept)))

    def apart(self, part: range) -> dict[tuple[str, int], StoredCall]:
        """Returns the calls with stored outputs that contain no step of a part, keyed by module name and call index."""
        return {(one.name, one.call): one for one in self.stored if one.stop <= part.start or one.first >= part.stop}

    def keep(self) -> None:
        """Makes all steps keep their tensors. Called if the limit was not exceeded."""
        for step in self.steps:
            step.holder = None


class _Unfinished:
    """Placeholder, during the first run, for the object that recomputes freed tensors. This run never needs any."""

    def fill(self, step: Step) -> None:
        return None


_UNFINISHED = _Unfinished()


class Repeat:
    """Observer of a later run of the model, which keeps only the tensors of one part (consecutive steps).

    Args:
        first: The first run of the model.
        part: Step indices of the part.
        stored: The calls replaced by their stored outputs, keyed by module name and call index.

    Attributes:
        steps: The steps of the part in this run.
        values: A few output elements of each of these steps.
    """

    def __init__(self, first: FirstRun, part: range, stored: Mapping[tuple[str, int], StoredCall]) -> None:
        self._first, self._part, self._stored = first, part, stored
        self._replaced = {name for name, _ in stored}
        self._open: list[tuple[nn.Module, StoredCall | None, End]] = []
        self._number = 0
        self.steps: list[Step] = []
        self.values: list[Tensor] = []

    def on_step(self, step: Step, output: Tensor) -> None:
        number, self._number = self._number, self._number + 1
        known = self._first.steps[number] if number < len(self._first.steps) else None
        if known is None or (type(known), known.rule, known.shape) != (type(step), step.rule, step.shape):
            raise StaleMeasureError(_CHANGED.format(name=step.name))
        step.uses = known.uses
        if number in self._part:
            self.steps.append(step)
            self.values.append(entries(output))
        else:
            step.empty()
        if number + 1 == self._part.stop:
            raise PartRecorded

    def is_wanted(self) -> bool:
        """Returns True if the next step belongs to the part."""
        return self._number in self._part

    def is_same(self) -> bool:
        """Returns True if the steps of the part have the same outputs as in the first run."""
        known = self._first.values[self._part.start : self._part.stop]
        if len(self.values) != len(known):
            return False
        both = on_one_device([*known, *self.values])
        return _are_close(torch.cat(both[: len(known)]), torch.cat(both[len(known) :]))

    def watch(self, module: nn.Module, name: str) -> None:
        if name in self._replaced:
            module.__dict__["forward"] = functools.partial(self._forward, module.forward)

    def enter(self, module: nn.Module, name: str, call: int, args: Any, kwargs: Any, end: End) -> None:
        if name in self._replaced:
            self._open.append((module, self._stored.get((name, call)), end))

    def _forward(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Runs the innermost running module or returns the stored output of its call."""
        _, stored, end = self._open[-1]
        if stored is None:
            return forward(*args, **kwargs)
        self._number = stored.stop
        return stored.output(end)

    def leave(self, module: nn.Module, output: Any, gates: Any) -> None:
        while any(one is module for one, _, _ in self._open):
            if self._open.pop()[0] is module:
                break


class Parts:
    """Recording that is divided into parts (consecutive steps), of which at most one stores its tensors.

    Args:
        first: The first run of the model.
        run: Function that runs the model again under a watcher. If there is a reference, the model first runs on the
            reference under a second watcher.

    Attributes:
        current: The part that stores its tensors, or None.
        forget: Callback for when the tensors of a part are freed.
    """

    def __init__(self, first: FirstRun, run: Callable[[Repeat, Repeat | None], object]) -> None:
        self._first, self._run = first, run
        self._stubs = [dict(step.__dict__) for step in first.steps]
        self._uses_stored = True
        self.current: range | None = None
        self.forget: Callable[[], None] = lambda: None
        self._twins: list[Step] = []
        for step in first.steps:
            step.holder = self

    @functools.cached_property
    def ranges(self) -> list[range]:
        """Step indices of each part, in execution order. Must not be read before the graph is constructed."""
        return divided(self._first)

    def fill(self, step: Step) -> None:
        """Recomputes the tensors of the part that contains a step. Frees the tensors of the previous part."""
        place = bisect.bisect_right([part.start for part in self.ranges], step.number) - 1
        part = self.ranges[place]
        if part == self.current:
            return
        self.empty()
        run = self._recorded(part)
        if run is None and self._uses_stored:
            self._uses_stored = False  # a module has side effects besides returning its output
            run = self._recorded(part)
        if run is None:
            raise StaleMeasureError(_CHANGED.format(name=step.name))
        for number, twin in zip(part, run.steps, strict=True):
            known = self._first.steps[number]
            twin.__dict__.update(name=known.name, call=known.call, uses=known.uses, number=number, holder=self)
            known.__dict__ = twin.__dict__  # from now on, both are the same step
        self._twins, self.current = run.steps, part

    def empty(self) -> None:
        """Frees the tensors of the current part."""
        for number in self.current or ():
            step = self._first.steps[number]
            step.__dict__ = self._stubs[number] | {"uses": step.uses, "holder": self}
        self._twins, self.current = [], None
        self.forget()

    def _recorded(self, part: range) -> Repeat | None:
        """Runs the model again to record a part. Returns None if the results differ from the first run."""
        firsts = [one for one in (self._first, self._first.reference) if one is not None]
        apart = [one.apart(part) if self._uses_stored else {} for one in firsts]
        common = {key for key in apart[0] if all(key in calls for calls in apart)}
        repeats = [
            Repeat(one, part, {key: calls[key] for key in common}) for one, calls in zip(firsts, apart, strict=True)
        ]
        try:
            self._run(repeats[0], repeats[1] if len(repeats) > 1 else None)
        except PartRecorded:
            pass
        except Exception:
            if common:
                return None
            raise
        return repeats[0] if all(repeat.is_same() for repeat in repeats) else None


def divided(first: FirstRun) -> list[range]:
    """Divides the steps into parts within the limit, preferably between calls whose outputs are stored."""
    starts = set(range(len(first.steps) + 1))
    for call in first.stored:
        starts -= set(range(call.first + 1, call.stop))
    for step in first.steps:
        for below in step.joined:
            if isinstance(step, LayerStep) or below.uses <= 1:
                starts -= set(range(below.number + 1, step.number + 1))
    bounds = sorted(starts)
    sums = [0]
    for size in first.sizes:
        sums.append(sums[-1] + size)
    ranges, start = [], 0
    for here, after in zip(bounds, [*bounds[1:], None], strict=True):
        is_full = after is None or sums[after] - sums[start] > first.limit
        if is_full and here > start:
            ranges.append(range(start, here))
            start = here
    return ranges


def _are_close(one: Tensor, two: Tensor) -> bool:
    """Returns True if the results of two runs agree up to rounding. The order of sums may differ."""
    scale = torch.nan_to_num(one, posinf=0, neginf=0).abs().amax()
    return torch.allclose(one, two.to(one.dtype), rtol=1e-3, atol=1e-6 * float(scale), equal_nan=True)


_CHANGED = (
    "the recording exceeds max_memory, so the model runs again for a part of it, and it no longer computes what it "
    "computed when the measure was constructed, at {name!r}. Query the measure in the contexts and with the hooks in "
    "which it was constructed, and leave inputs and model unchanged; a model that draws random numbers, or keeps "
    "state between calls, needs a measure without max_memory."
)

__all__ = ["FirstRun", "Parts", "Repeat", "Watcher", "divided"]
