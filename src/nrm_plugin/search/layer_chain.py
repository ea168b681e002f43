"""Sequences of layers with grouped neurons, from the output to the input."""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Sequence

from torch import Tensor

from ..errors import brief
from ..events.event import Atom, Event, at
from ..measure.finite_results import check_finite
from ..measure.groups import Over, check_over, labels_of
from ..measure.joints import propagated
from ..measure.layer_taps import Layer
from ..measure.measure import RelevanceMeasure
from ..measure.memory_budget import width_of
from ..recording.propagation import push


class LayerChain:
    """Sequence of layers from the output to the input, with their neurons divided into groups. Tensors are flattened.

    Args:
        mu: A single-sample measure.
        layers: Layers, each closer to the input than the previous one.
        over: The kind of groups: one for all layers, or one per layer.

    Attributes:
        labels: The group of each neuron in each layer, of shape ``(n_m,)``, on the device of the layer.
        counts: Number of groups in each layer.
        widths: Number of vectors that fit into memory when propagated from each layer to the next.

    Raises:
        ValueError: If no layer is given, or if the number of kinds differs from the number of layers.
        EventError: If a layer is not below the previous one.
    """

    def __init__(self, mu: RelevanceMeasure, layers: Sequence[Layer], over: Over | Sequence[Over]) -> None:
        if isinstance(layers, str) or not len(layers):
            raise ValueError(
                f"layers={brief(layers)}: give a list of one or more layers, from the output to the input."
            )
        self.mu, self.recording = mu, mu._recording
        self.taps = [mu._tap(layer) for layer in layers]
        mu._pairs(layers, "list layers from the output to the input")
        self.atoms = tuple(layer if isinstance(layer, Atom) else at(layer) for layer in layers)
        self.names = tuple(layer if isinstance(layer, str) else str(layer) for layer in layers)
        self.last = len(self.taps) - 1
        kinds = kinds_of_groups(over, len(self.taps))
        devices = [self.recording.graph.device(tap.place) for tap in self.taps]
        groups = [labels_of(tap, kind).reshape(-1) for tap, kind in zip(self.taps, kinds, strict=True)]
        self.labels = [labels.to(device) for labels, device in zip(groups, devices, strict=True)]
        self.counts = [int(labels.max()) + 1 for labels in self.labels]
        self.widths = [
            width_of(self.recording, mu._max_memory, [above.place, below.place])
            for above, below in itertools.pairwise(self.taps)
        ]

    def first(self) -> Tensor:
        """Returns the marginal of the first layer, as a tensor of shape ``(n_0,)``."""
        return self.mu.marginal(self.atoms[0]).flatten()

    def propagate(self, level: int, vectors: Tensor) -> Tensor:
        """Propagates relevance of shape ``(K, n_m)`` from one layer to the next. Returns shape ``(K, n_{m+1})``."""
        upper, lower = self.taps[level : level + 2]
        rows = {number: row.view(upper.tensor_shape) for number, row in enumerate(vectors)}
        arrived = propagated(self.recording, upper, lower, rows)[0].flatten(1)
        check_finite(self.mu, arrived)
        return arrived

    def collect(self, level: int, values: Tensor, bound: bool = False) -> Tensor:
        r"""Applies the transpose of :meth:`propagate` to values of shape ``(K, n_{m+1})``. Returns shape ``(K, n_m)``.

        .. math:: \sum_{i'} \tilde T_{i'i} v(i')

        With ``bound``, the result is an upper bound on the sum with the absolute values of the kernel.
        """
        upper, lower = self.taps[level : level + 2]
        rows = values.view(len(values), *lower.tensor_shape)
        collected, _ = push(self.recording.graph, lower.place, upper.place, rows, bound)
        if collected is None:
            labels = self.labels[level]
            return self.mu._start.new_zeros((len(values), len(labels)), device=labels.device)
        check_finite(self.mu, collected)
        return collected.flatten(1)

    def sums(self, level: int, values: Tensor) -> Tensor:
        """Sums values of shape ``(…, n_m)`` within each group. Returns shape ``(…, groups)``."""
        total = values.new_zeros((*values.shape[:-1], self.counts[level]))
        return total.index_add_(-1, self.labels[level], values)

    def shaped_labels(self) -> tuple[Tensor, ...]:
        """Returns :attr:`labels` in the shapes of the layers."""
        return tuple(labels.reshape(tap.shape[1:]) for labels, tap in zip(self.labels, self.taps, strict=True))


def kinds_of_groups(over: Over | Sequence[Over], count: int) -> list[Over]:
    """Expands ``over`` to a list with one kind of groups per layer.

    Raises:
        ValueError: If a kind is unknown, or if the number of kinds differs from ``count``.
    """
    kinds = [over] * count if isinstance(over, (str, Tensor)) else list(over)
    if len(kinds) != count:
        raise ValueError(f"over= has {len(kinds)} entries for {count} layers; give one for each, or one for all.")
    for kind in kinds:
        check_over(kind)
    return kinds


def intersection(events: Sequence[Event]) -> Event:
    """Returns the intersection of one or more events."""
    return functools.reduce(operator.and_, events)


def check_one_sample(mu: RelevanceMeasure) -> None:
    """Raises an error if the measure does not have exactly one sample."""
    if mu.batch != 1:
        raise ValueError(
            f"relevant walks differ between samples, but the measure has {mu.batch}: construct a measure of one sample."
        )


def check_count(value: object, name: str) -> None:
    """Raises an error if a value is not an integer of at least 1."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name}={brief(value)} must be a whole number of at least 1.")
