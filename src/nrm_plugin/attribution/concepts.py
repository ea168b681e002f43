"""Conditional and joint relevance with the interface of zennit-crp (Concept Relevance Propagation)."""

from __future__ import annotations

import functools
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from zennit.core import Composite

from ..composites import Uncovered, normalize
from ..errors import EventError, brief
from ..events.event import Atom, Event, at
from ..kernels.normalization import Residual
from ..model.inputs_and_outputs import Output
from ..plan.reuse import measures_of
from .base import Layer, Unit, as_tuple, in_unit, reference_of, rules_for, unwrapped

Condition = Mapping[str, Any]
OUTPUT = "y"
"""Key of the explained outputs in a condition."""


def condition_event(condition: Condition) -> Event | None:
    """Converts a condition to the event that a walk crosses one of the given channels in each of its layers.

    Args:
        condition: Mapping from layer names to channels, such as ``{"features.28": [3], "y": [281]}``; ``"y"`` is
            ignored.

    Returns:
        The event, or None if the condition names no layer and is therefore satisfied by every walk.

    Raises:
        EventError: If the condition is not a mapping or if its channels are not a list of numbers.

    Examples:
        >>> condition_event({"features.28": [3], "features.14": [5, 8], "y": [281]})
        at('features.28').channel([3]) & at('features.14').channel([5, 8])
    """
    if not isinstance(condition, Mapping):
        raise EventError(
            f"a condition is a mapping such as {{'features.28': [3], 'y': [281]}}, got {type(condition).__name__}."
        )
    atoms = [at(layer).channel(_numbers(layer, ids)) for layer, ids in condition.items() if layer != OUTPUT]
    return functools.reduce(operator.and_, atoms) if atoms else None


class ConceptNRM:
    """Conditional and joint relevance with the interface of zennit-crp's ``CondAttribution``.

    Walks that bypass a layer of the condition, for example through a skip connection, do not satisfy it. Conditions can
    refer to different layers, in any order. Conditions with the same outputs share one forward pass.

    Args:
        model: The network; ``torch.nn.DataParallel`` is unwrapped.
        composite: As in :class:`~nrm_plugin.RelevanceMeasure`.
        residual: As in :class:`~nrm_plugin.RelevanceMeasure`.
        gain_limit: As in :class:`~nrm_plugin.RelevanceMeasure`.
        uncovered: As in :class:`~nrm_plugin.RelevanceMeasure`.
        output: As in :class:`~nrm_plugin.RelevanceMeasure`.

    Examples:
        >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.Flatten(), nn.Linear(20, 10))
        >>> conditions = [{"2": [3], "y": [7]}, {"2": [0, 1], "0": [2], "y": [7]}]
        >>> ConceptNRM(net).attribute(torch.randn(6, 3, 6, 6), conditions).shape
        torch.Size([2, 6, 3, 6, 6])
    """

    def __init__(
        self,
        model: nn.Module,
        composite: Composite | None = None,
        residual: Residual | None = None,
        gain_limit: float | None = None,
        uncovered: Uncovered | None = None,
        *,
        output: Output | Atom | None = None,
    ) -> None:
        self.model = unwrapped(model)
        self.composite = normalize(composite, residual, gain_limit, uncovered)
        self._has_rules = composite is not None
        self.output = output

    def attribute(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        conditions: Sequence[Condition],
        layer: Layer = "input",
        additional_forward_args: Any = None,
        conditional: bool = False,
        unit: Unit = "output",
        *,
        against: Any = None,
        baselines: Any = None,
    ) -> Tensor:
        """Computes the relevance of each neuron in a layer under each condition.

        Args:
            inputs: Inputs of shape ``(N, …)``, or a tuple of such tensors.
            conditions: Mappings from layer names to channels, and from ``"y"`` to the explained outputs. Every
                condition is applied to every sample. If a condition selects several outputs, they are weighted by their
                values, as in zennit-crp.
            layer: Layer whose relevance is returned: a name, module or ``at(…)``.
            additional_forward_args: Additional arguments for the model.
            conditional: Whether to divide by the mass of the condition: ``μ(j | condition)`` instead of
                ``μ(j & condition)``.
            unit: ``"output"`` for relevance in units of the explained outputs, as in zennit-crp before it sums heat
                maps over channels; ``"measure"`` for relevance as a fraction of the explained outputs.
            against: Another output to contrast with, or ``"rest"`` for all other classes. If given, the relevance
                explains the difference between the two; each condition must then contain exactly one output. See
                :class:`~nrm_plugin.RelevanceMeasure`.
            baselines: Baselines in Captum's format. If given, the relevance explains the change of the outputs relative
                to the baselines; see ``reference`` of :class:`~nrm_plugin.RelevanceMeasure`.

        Returns:
            Relevance of shape ``(conditions, N, *shape)``.

        Raises:
            EventError: If no condition is given, a condition is invalid, or ``against`` is given and a condition does
                not contain exactly one output.
            UnknownLayerError: If the model has no layer with one of the given names.

        Examples:
            >>> net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
            >>> x = torch.randn(5, 3)
            >>> channels = ConceptNRM(net).attribute(x, [{"0": [k], "y": [1]} for k in range(4)])
            >>> torch.allclose(channels.sum(0), NRM(net).attribute(x, target=1), atol=1e-5)
            True
        """
        groups: dict[tuple[int, ...] | None, list[int]] = {}
        events = [condition_event(condition) for condition in conditions]
        if not events:
            raise EventError(
                "no condition was given; pass a list of mappings such as [{'features.28': [3], 'y': [1]}]."
            )
        outputs = [_explained(condition) for condition in conditions]
        for number, chosen in enumerate(outputs):
            groups.setdefault(chosen, []).append(number)
        relevance: dict[int, Tensor] = {}
        for chosen, numbers in groups.items():
            with torch.enable_grad():
                measure = measures_of(self)(
                    self.model,
                    inputs,
                    composite=rules_for(baselines, self.composite, self._has_rules),
                    output=self.output,
                    additional_forward_args=additional_forward_args,
                    reference=reference_of(baselines, as_tuple(inputs)[0]),
                    **_explanation(chosen, against),
                )
            total = measure.output
            if against is None and baselines is None:
                total = (_mask(chosen, measure.outputs) * measure.outputs).flatten(1).sum(1)
            named = [event for event in (events[number] for number in numbers) if event is not None]
            given, joint = (named, None) if conditional else (None, named)
            rows = iter(measure.marginal(layer, given=given, joint=joint) if named else ())
            for number in numbers:
                row = measure.marginal(layer) if events[number] is None else next(rows)
                relevance[number] = in_unit(row, total, unit)
        return torch.stack([relevance[number] for number in range(len(events))])


def _explanation(chosen: tuple[int, ...] | None, against: Any) -> dict[str, Any]:
    """Returns the :class:`~nrm_plugin.RelevanceMeasure` arguments that explain the chosen outputs."""
    if against is None:
        return {"start": functools.partial(_start, chosen)}
    if chosen is None or len(chosen) != 1:
        raise EventError(
            "against= compares one output with others; every condition must contain it, as in {'y': [281]}."
        )
    return {"target": chosen[0], "against": against}


def _mask(chosen: tuple[int, ...] | None, outputs: Tensor) -> Tensor:
    """Returns a mask of shape ``(N, K)`` of the chosen outputs. None selects all outputs."""
    if chosen is None:
        return torch.ones_like(outputs)
    out_of_range = [number for number in chosen if not -outputs.shape[1] <= number < outputs.shape[1]]
    if out_of_range:
        raise EventError(f"'y' names output {out_of_range[0]}, but there are {outputs.shape[1]}.")
    mask = torch.zeros_like(outputs)
    mask[:, list(chosen)] = 1
    return mask


def _start(chosen: tuple[int, ...] | None, outputs: Tensor) -> Tensor:
    """Returns the start vector: the mask of a single output or the values of several outputs."""
    mask = _mask(chosen, outputs)
    return mask if bool(mask.flatten(1).sum(1).eq(1).all()) else mask * outputs


def _explained(condition: Condition) -> tuple[int, ...] | None:
    return tuple(_numbers(OUTPUT, condition[OUTPUT])) if OUTPUT in condition else None


def _numbers(layer: str, ids: Any) -> list[int]:
    numbers = ids.tolist() if hasattr(ids, "tolist") else ids
    numbers = [numbers] if isinstance(numbers, int) and not isinstance(numbers, bool) else numbers
    if not isinstance(numbers, (list, tuple, range)):
        raise EventError(f"the condition on {brief(layer)} is {brief(ids)}; give a list of channel numbers.")
    try:
        return [operator.index(number) for number in numbers]
    except TypeError as error:
        raise EventError(f"the condition on {brief(layer)} is {brief(ids)}; give a list of channel numbers.") from error
