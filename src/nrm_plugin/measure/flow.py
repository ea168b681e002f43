r"""Flow graphs: how relevance goes from groups of neurons to groups of neurons, through a few chosen layers.

A layer splits all walks into its groups, the **rest** of its neurons, and the walks that are **off** the layer:
absorbed above it, or around it. Each of these is an event, so every cut sums to one and every edge is a joint
relevance:

.. math:: \mu(A \cap B), \quad A \text{ of one layer}, B \text{ of the next}, \qquad
          \sum_B \mu(A \cap B) = \mu(A), \quad \sum_A \mu(A \cap B) = \mu(B)

Which groups are shown, and that the others are lumped, is ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from ..events.event import Atom, Event, at
from ..recording.taps import Tap
from .flow_graph import TOP, Array, FlowError, FlowGraph, FlowLayer, check_thresholds, chosen
from .groups import summed
from .partitions import Names, partition


class Measure(Protocol):
    """What a flow asks of a :class:`~nrm_plugin.RelevanceMeasure`."""

    batch: int

    def __call__(self, event: Any) -> Tensor: ...
    def marginal(self, layer: Any, over: Any = ..., *, joint: Any = ...) -> Any: ...
    def joints(self, layers: Any, over: Any = ...) -> list[Tensor]: ...
    def sink(self, layer: Any) -> Tensor: ...
    def bypass(self, layer: Any) -> Tensor: ...


@dataclass(frozen=True)
class _Chosen:
    """A layer, the groups that are shown, and labels of all neurons: place of the group, or of the rest.

    Where all channels are shown, their joint relevance may cost no pass for each.
    """

    atom: Atom
    layer: FlowLayer
    labels: Tensor
    is_all_channels: bool

    @property
    def count(self) -> int:
        return len(self.layer.groups)

    def cut(self, values: Tensor) -> Tensor:
        """``(…, groups and perhaps rest)`` to ``(…, groups + 1)``."""
        missing = self.count + 1 - values.shape[-1]
        return torch.nn.functional.pad(values, (0, missing))

    @property
    def shown(self) -> Event:
        """The walks through a group that is shown."""
        return self.atom[self.labels < self.count]


def flow_graph(
    mu: Measure,
    layers: Sequence[tuple[Any, Tap]],
    over: Any = "channel",
    *,
    top: int | None = TOP,
    min_mass: float | None = None,
    coverage: float | None = None,
    names: Mapping[str, Names] | None = None,
    sample: int | None = None,
) -> FlowGraph:
    """The flow of relevance through some layers, from the output down.

    Args:
        mu: The measure.
        layers: Layers and their taps, each below the one before.
        over: As in :meth:`~nrm_plugin.RelevanceMeasure.flow`.
        top: As there.
        min_mass: As there.
        coverage: As there.
        names: As there.
        sample: As there.
    """
    check_thresholds(top, min_mass, coverage)
    number = _sample(mu, sample)
    if len(layers) < 1:
        raise FlowError("a flow needs at least one layer.")
    limits = (top, min_mass, coverage)
    masses = mu.marginal([layer for layer, _ in layers])  # one pass for all layers
    kinds = {layer: (_of(over, layer, "channel"), _of(names, layer, None)) for layer, _ in layers}
    parts = [_choose(mu, layer, tap, masses[layer], *kinds[layer], limits, number) for layer, tap in layers]
    both = mu.joints([part.atom for part in parts], _kinds(parts)) if len(parts) > 1 else []
    joints = tuple(
        _joint(mu, upper, lower, found[number], number)
        for (upper, lower), found in zip(pairwise(parts), both, strict=True)
    )
    shown = parts[0].shown
    for part in parts[1:]:
        shown = shown & part.shown
    return FlowGraph(tuple(part.layer for part in parts), joints, float(mu(shown)[number]))


def _sample(mu: Measure, sample: int | None) -> int:
    if sample is None and mu.batch > 1:
        raise FlowError(f"a flow is of one sample, and the measure has {mu.batch}: say which by sample=, from 0.")
    number = 0 if sample is None else sample
    if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < mu.batch:
        raise FlowError(f"sample={sample!r}: the measure has samples 0 to {mu.batch - 1}.")
    return number


def _of(value: Any, layer: Any, default: Any) -> Any:
    """What is said of one layer, where a mapping says something else for some."""
    if value is None:
        return default
    return value.get(layer, default) if isinstance(value, Mapping) else value


def _choose(
    mu: Measure, layer: Any, tap: Tap, relevance: Tensor, over: Any, names: Names | None,
    limits: tuple[Any, Any, Any], number: int,
) -> _Chosen:  # fmt: skip
    groups = partition(tap, over, names)
    masses = summed(relevance, tap, groups.labels)[number].double().cpu().numpy()
    outside, masses = float(masses[groups.count :].sum()), masses[: groups.count]
    masses = np.pad(masses, (0, groups.count - len(masses)))
    kept = chosen(masses, *limits)
    rest = outside + float(np.delete(masses, kept).sum())
    places = torch.full((groups.count + 1,), len(kept), dtype=torch.long)
    places[kept] = torch.arange(len(kept))
    found = FlowLayer(
        tap.names[0] if not isinstance(layer, str) and tap.names else str(layer),
        tuple(kept),
        tuple(groups.names(group) for group in kept),
        tuple(float(masses[group]) for group in kept),
        rest,
        groups.count - len(kept),
        float(mu.sink(layer)[number]),
        float(mu.bypass(layer)[number]),
    )
    is_all = isinstance(over, str) and over == "channel" and kept == list(range(groups.count))
    return _Chosen(_atom(layer), found, places[groups.labels], is_all)


def _atom(layer: str | nn.Module | Atom) -> Atom:
    return layer if isinstance(layer, Atom) else at(layer)


def _kinds(parts: Sequence[_Chosen]) -> list[str | Tensor]:
    """Labels of each layer; ``"channel"`` where it and a neighbour show all of them, which may spare passes."""
    near = [parts[max(0, place - 1) : place + 2] for place in range(len(parts))]
    return [
        "channel" if part.is_all_channels and any(other.is_all_channels for other in others if other is not part)
        else part.labels for part, others in zip(parts, near, strict=True)
    ]  # fmt: skip


def _joint(mu: Measure, upper: _Chosen, lower: _Chosen, both: Tensor, number: int) -> Array:
    """``(K_upper + 2, K_lower + 2)``; each of the four parts is a query of its own, none is what others leave over."""
    joint = np.zeros((upper.count + 2, lower.count + 2))
    joint[:-1, :-1] = upper.cut(lower.cut(both).T).T.double().cpu().numpy()
    leaving = mu.marginal(upper.atom, over=upper.labels, joint=~lower.atom)[number]
    joint[:-1, -1] = upper.cut(leaving).double().cpu().numpy()
    joining = mu.marginal(lower.atom, over=lower.labels, joint=~upper.atom)[number]
    joint[-1, :-1] = lower.cut(joining).double().cpu().numpy()
    joint[-1, -1] = float(mu(~upper.atom & ~lower.atom)[number])
    return joint
