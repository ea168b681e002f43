"""Automatic plans: the first measures are recorded, and a plan is created once inputs of the same shapes recur."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from ..composites import Normalized
from ..events.event import Atom
from ..measure.measure import RelevanceMeasure
from ..model.inputs_and_outputs import Inputs, Output
from .keys import call_key
from .plan import MOST, Plan

PLAIN = 2
"""Number of measures of one form that are recorded before a plan is created. A plan costs several recordings."""
NEVER = 1 << 62
"""Number of recordings, never reached, that rules out further plans after one has needed too much memory."""
PAID = 32
"""Number of measures after which a plan counts as amortized."""
MEMORY = 1 << 30
"""Maximum memory in bytes of the constants of an automatic plan."""


class Measures:
    """Creates measures as :class:`~nrm_plugin.RelevanceMeasure` does, by a plan once inputs of the same shapes recur.

    It is called with the arguments of :class:`~nrm_plugin.RelevanceMeasure`. The first measures for inputs of one form
    (shapes and dtypes) are recorded; later inputs of this form use a plan, with the same results up to rounding. A plan
    is discarded if the model or another setting changes, or if its constants need too much memory. Each plan that is
    discarded early doubles the number of recordings before the next one.

    Source: new in this package.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._settings: tuple[Any, ...] = ()
        self._patience = PLAIN
        self._plan: Plan | None = None
        self._seen: OrderedDict[Hashable, int] = OrderedDict()
        self._answered = self._measured = 0

    def __call__(
        self,
        model: nn.Module,
        inputs: Inputs,
        target: Any = None,
        *,
        composite: Normalized | None,
        start: Any = None,
        against: Any = None,
        reference: Any = None,
        additional_forward_args: Any = None,
        additional_forward_kwargs: Mapping[str, Any] | None = None,
        output: Output | Atom | None = None,
        batched: bool = True,
    ) -> RelevanceMeasure:
        """Returns the relevance measure of a model for the given inputs.

        Args:
            model: As in :class:`~nrm_plugin.RelevanceMeasure`.
            inputs: As in :class:`~nrm_plugin.RelevanceMeasure`.
            target: As in :class:`~nrm_plugin.RelevanceMeasure`.
            composite: Composite that assigns normalized rules.
            start: As in :class:`~nrm_plugin.RelevanceMeasure`.
            against: As in :class:`~nrm_plugin.RelevanceMeasure`.
            reference: As in :class:`~nrm_plugin.RelevanceMeasure`.
            additional_forward_args: As in :class:`~nrm_plugin.RelevanceMeasure`.
            additional_forward_kwargs: As in :class:`~nrm_plugin.RelevanceMeasure`.
            output: As in :class:`~nrm_plugin.RelevanceMeasure`.
            batched: As in :class:`~nrm_plugin.RelevanceMeasure`.

        Raises:
            NRMError: As in :class:`~nrm_plugin.RelevanceMeasure`.
        """
        values = (inputs, additional_forward_args, additional_forward_kwargs, reference)
        settings: dict[str, Any] = {"composite": composite, "output": output, "batched": batched}
        arguments: dict[str, Any] = {
            "additional_forward_args": additional_forward_args,
            "additional_forward_kwargs": additional_forward_kwargs,
            "reference": reference,
        }
        with self._lock:
            plan = self._plan_for(model, values, settings, arguments)
        if plan is None:
            return RelevanceMeasure(model, inputs, target, start=start, against=against, **settings, **arguments)
        return plan._measured(
            inputs, target, start, against, reference, additional_forward_args, additional_forward_kwargs
        )

    @property
    def plan(self) -> Plan | None:
        """The current plan, or None if measures are recorded."""
        return self._plan

    def _plan_for(self, model: nn.Module, values: Any, settings: dict[str, Any], arguments: Any) -> Plan | None:
        """Returns the plan to use for a call, or None if the call should be recorded."""
        given = (model, *settings.values())
        if not _are_same(given, self._settings) or (self._plan is not None and self._plan._has_changed()):
            self._drop()
            self._settings = given
        form = _form(values)
        if form is None or not self._is_repeated(form):
            return None
        if self._plan is None:
            self._plan = Plan(model, values[0], **settings, **arguments)
        elif not self._plan._is_useful(form) or self._is_too_large(self._plan):
            return None
        self._answered += 1
        return self._plan

    def _is_too_large(self, plan: Plan) -> bool:
        """Returns True if a plan needs too much memory. It is then discarded until a setting changes."""
        if plan._count == self._measured:
            return False
        self._measured = plan._count
        is_too_large = plan.memory > MEMORY
        if is_too_large:
            self._drop()
            self._patience = NEVER
        return is_too_large

    def _is_repeated(self, form: Hashable) -> bool:
        """Counts a call. Returns True if its form has recurred often enough to use a plan."""
        self._seen[form] = self._seen.get(form, 0) + 1
        self._seen.move_to_end(form)
        while len(self._seen) > MOST:
            self._seen.popitem(last=False)
        return self._seen[form] > self._patience

    def _drop(self) -> None:
        if self._plan is not None:
            self._patience = PLAIN if self._answered >= PAID else 2 * self._patience
        elif self._patience == NEVER:
            self._patience = PLAIN
        self._plan = None
        self._answered = self._measured = 0
        self._seen.clear()

    def __reduce__(self) -> Any:
        """Reduces the object to its type. Plans are bound to this process, so copies and pickles have none."""
        return Measures, ()


_BY_OWNER: Any = WeakIdKeyDictionary()
_LOCK = threading.Lock()


def measures_of(owner: Any) -> Measures:
    """Returns the :class:`Measures` instance of an object, which is created on first use.

    The instance lives as long as the object and is not copied or pickled with it.
    """
    with _LOCK:
        measures: Measures | None = _BY_OWNER.get(owner)
        if measures is None:
            measures = _BY_OWNER[owner] = Measures()
        return measures


def _are_same(these: tuple[Any, ...], those: tuple[Any, ...]) -> bool:
    if len(these) != len(those):
        return False
    pairs = zip(these, those, strict=True)
    return all(a is b or (type(a) is type(b) and isinstance(a, (Atom, str, int)) and a == b) for a, b in pairs)


def _form(values: Any) -> Hashable | None:
    """Returns a key that identifies the form of a call, or None if the call must always be recorded."""
    if torch._C._len_torch_function_stack() or torch._C._len_torch_dispatch_stack():
        return None  # a mode of the caller may change the computation of the model
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return None  # inside a transform of torch.func, which a measure rejects
    try:
        key, tensors = call_key(values)
    except (TypeError, ValueError, RuntimeError):
        return None
    return key if all(type(tensor) in (Tensor, nn.Parameter) for tensor in tensors) else None


__all__ = ["Measures", "measures_of"]
