"""The best walk of single neurons, by max-product over kernels without sign."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import NRMError
from ..measure.measure import RelevanceMeasure
from ..recording.places import Buffer, Edge
from .walks import check_count, check_one


@dataclass(frozen=True)
class NeuronWalk:
    """The walk of single neurons that carries most.

    Attributes:
        mass: What it carries.
        neurons: For each named tap that it crosses, from the output down, the index of its neuron.

    Examples:
        >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> mu = RelevanceMeasure(net, torch.randn(1, 3), 1, composite=NRMAbsolute())
        >>> list(best_walk(mu).neurons)
        ['2', '1', '0', 'input']
    """

    mass: float
    neurons: dict[str, tuple[int, ...]]


def best_walk(mu: RelevanceMeasure, chunk: int = 256) -> NeuronWalk:
    r"""The walk of single neurons, from the output to an input, with the largest mass.

    .. math:: V(i) = 1 \text{ at inputs}, \; V(j) = \max_i \tilde T_{ij} V(i), \; \max_w \mu(w) = \max_k \mu(k) V(k)

    One max-product pass up and one way back down, exact where no kernel is negative, as with
    :class:`~nrm_plugin.composites.NRMAbsolute`. A step with weights is formed column by column, ``chunk`` at once, so
    that it takes as many vectors as it has outputs: a matter of seconds for small networks, of hours for VGG16.

    Args:
        mu: A measure of one sample, with no negative kernels.
        chunk: Columns formed at once.

    Raises:
        ValueError: Several samples.
        NRMError: A kernel is negative, where the best walk is not made of best parts.

    Examples:
        >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> mu = RelevanceMeasure(net, torch.randn(1, 3), 1, composite=NRMAbsolute())
        >>> walk = best_walk(mu)
        >>> event = at("0")[walk.neurons["0"]] & at("input")[walk.neurons["input"]]
        >>> torch.allclose(mu(event), torch.tensor(walk.mass), atol=1e-5)
        True

    Source: Xiong et al., ICML 2023 (relevant walk search), for the rules of Zennit.
    """
    check_one(mu)
    check_count(chunk, "chunk")
    mu._check_fresh()
    with torch.inference_mode(False), torch.no_grad():
        return _MaxProduct(mu, chunk).walk()


class _MaxProduct:
    def __init__(self, mu: RelevanceMeasure, chunk: int) -> None:
        self.recording, self.graph, self.start, self.chunk = mu._recording, mu._recording.graph, mu._start, chunk
        if bool((self.start < 0).any()):
            raise _negative("the start")
        self.values: dict[Buffer, Tensor] = {}
        for index in range(len(self.graph.vertices) - 1, -1, -1):
            self._push(index)

    def walk(self) -> NeuronWalk:
        place = self.graph.output
        best = (self.start * self.values[place].view_as(self.start)).flatten()
        neuron, mass = int(best.argmax()), float(best.max())
        neurons: dict[str, tuple[int, ...]] = {}
        while True:
            self._note(place, neuron, neurons)
            if not any(edge is not None for edge in self.graph.vertices[place.vertex].edges):
                return NeuronWalk(mass, neurons)
            for number, edge, row in self._columns(place, [neuron]):
                values = (row[0] * self.values[edge].flatten()).max(0)
                if float(values.values) >= 0.999999 * float(self.values[place].flatten()[neuron]):
                    self._note(Edge(place.vertex, number), int(values.indices), neurons)
                    place, neuron = edge, int(values.indices)
                    break
            else:
                raise NRMError("no walk carries anything to an input: all relevance is absorbed.")

    def _note(self, place: Buffer | Edge, neuron: int, neurons: dict[str, tuple[int, ...]]) -> None:
        number = self.recording.taps.index.get(place)
        if number is not None and isinstance(place, Buffer):
            tap = self.recording.taps.all[number]
            shape = tap.shape[1:]
            for name in tap.names[:1]:
                neurons.setdefault(name, tuple(int(i) for i in torch.unravel_index(torch.tensor(neuron), shape)))

    def _push(self, index: int) -> None:
        vertex = self.graph.vertices[index]
        for number, shape in enumerate(vertex.shapes):
            place = Buffer(index, number)
            if not any(edge is not None for edge in vertex.edges):
                self.values[place] = self.start.new_ones(shape)
                continue
            total = self.start.new_zeros(math.prod(shape))
            for first in range(0, len(total), self.chunk):
                units = list(range(first, min(first + self.chunk, len(total))))
                for _, edge, rows in self._columns(place, units):
                    if bool((rows < 0).any()):
                        raise _negative(self.recording.taps.name_at(index))
                    found = (rows * self.values[edge].flatten()).amax(1)
                    total[units] = torch.maximum(total[units], found)
            self.values[place] = total.view(shape)

    def _columns(self, place: Buffer, units: list[int]) -> Iterator[tuple[int, Buffer, Tensor]]:
        """Columns of the kernel, ``(K, in)`` for each edge."""
        vertex = self.graph.vertices[place.vertex]
        eye = self.start.new_zeros((len(units), math.prod(vertex.shapes[place.number])))
        eye[range(len(units)), units] = 1
        arriving: list[Tensor | None] = [None] * len(vertex.shapes)
        arriving[place.number] = eye.view(len(units), *vertex.shapes[place.number])
        if vertex.step is None:
            arriving = [
                eye.new_zeros((len(units), *shape)) if item is None and number == 0 else item
                for number, (item, shape) in enumerate(zip(arriving, vertex.shapes, strict=True))
            ]
        parts, _ = vertex.pull(arriving)
        for number, (part, edge) in enumerate(zip(parts, vertex.edges, strict=True)):
            if part is not None and edge is not None:
                shape = self.graph.shape(edge)
                yield number, edge, torch.stack([row.sum_to_size(shape) for row in part]).flatten(1)


def _negative(what: str) -> NRMError:
    return NRMError(
        f"{what} has negative values, and the best walk is not made of best parts there. Use rules without negative "
        "contributions, such as NRMAbsolute, or top_walks(…, over='neuron')."
    )
