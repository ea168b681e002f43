"""Max-product search for the walks of single neurons with the largest mass, for nonnegative kernels."""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..errors import NRMError
from ..measure.finite_results import check_finite
from ..measure.measure import RelevanceMeasure
from ..measure.memory_budget import width_of
from ..model.devices import on_device_of
from ..recording.places import Buffer, Place
from ..recording.taps import Tap
from .walk_bounds import now


@dataclass(frozen=True)
class NeuronPath:
    """Upper part of a walk of single neurons.

    Attributes:
        place: The tensor at which the path ends.
        neuron: Flat index of the last neuron in this tensor.
        mass: Product of the elements of the start vector and the kernels along the path.
        bound: Largest mass of a walk that continues this path to an input, exact up to rounding.
        number: Creation index. It breaks ties.
        neurons: Flat index of the neuron at each named tap of the path, from the output to the input.
    """

    place: Buffer
    neuron: int
    mass: float
    bound: float
    number: int
    neurons: Mapping[Place, int]

    def __lt__(self, other: NeuronPath) -> bool:
        """Compares by decreasing bound. A heap then returns the path with the largest bound first."""
        return (-self.bound, self.number) < (-other.bound, other.number)


class MaxProduct:
    r"""Upward pass from the inputs that computes the largest mass of a continuation from each neuron to an input.

    .. math:: V(i) = 1 \text{ at inputs}, \qquad V(j) = \max_i \tilde T_{ij} V(i)

    Args:
        mu: A single-sample measure.

    Attributes:
        completions: :math:`V`, the largest mass of a continuation from each neuron, for each tensor, flattened.
        names: The first name of each named tap.

    Raises:
        NRMError: If the start vector or a kernel has negative elements.
    """

    def __init__(self, mu: RelevanceMeasure) -> None:
        self._mu = mu
        self.recording, self.graph, self.start = mu._recording, mu._recording.graph, mu._start.flatten()
        if bool((self.start < 0).any()):
            raise _has_negative_entries("the start vector")
        self.names: dict[Place, str] = {}
        for name in mu.layers:
            self.names.setdefault(mu._tap(name).place, name)
        self.missed, self.expanded = 0.0, 0
        self._numbers = itertools.count()
        self._width = width_of(self.recording, mu._max_memory, None)
        self.completions: dict[Buffer, Tensor] = {}
        for index in range(len(self.graph.vertices) - 1, -1, -1):
            for number in range(len(self.graph.vertices[index].shapes)):
                place = Buffer(index, number)
                self.completions[place] = self._completion(place)

    def walks(self, k: int, deadline: float = math.inf, expansions: int | None = None) -> list[NeuronPath]:
        """Returns the ``k`` walks with the largest mass.

        Fewer walks are returned if no others have nonzero mass, or if the deadline or the limit of expansions is
        reached. Even then, the first walk is completed.
        """
        output = self.graph.output
        prefixes = self._continuations(None, output, self.start, k)
        heapq.heapify(prefixes)
        complete: list[NeuronPath] = []
        limit = math.inf if expansions is None else expansions
        while prefixes and len(complete) < k:
            is_over = self.expanded > 0 and (now() > deadline or self.expanded >= limit)
            if is_over and complete:
                break
            path = heapq.heappop(prefixes)
            if self._is_input(path.place):
                complete.append(path)
                continue
            longer = self._expanded(path, k)
            if is_over and longer:  # with exact bounds, the best continuations lead straight to the largest walk
                heapq.heappush(prefixes, replace(longer.pop(longer.index(min(longer))), bound=math.inf))
            for one in longer:
                heapq.heappush(prefixes, one)
        self.missed = prefixes[0].bound if prefixes else 0.0
        return complete

    def crossed_taps(self, paths: Sequence[NeuronPath]) -> list[Tap]:
        """Returns the named taps that any of the paths crosses, from the output to the input."""
        return [tap for tap in self.recording.taps.all if any(tap.place in path.neurons for path in paths)]

    def _continuations(self, path: NeuronPath | None, place: Buffer, masses: Tensor, k: int) -> list[NeuronPath]:
        """Returns the ``k`` best continuations of a path in a tensor and one more that bounds all others."""
        bounds, chosen = (masses * self.completions[place]).topk(min(len(masses), k + 1))
        crossed = {} if path is None else path.neurons
        paths = []
        for bound, neuron in zip(bounds.tolist(), chosen.tolist(), strict=True):
            if bound > 0:
                neurons = {**crossed, place: neuron} if place in self.names else crossed
                paths.append(NeuronPath(place, neuron, float(masses[neuron]), bound, next(self._numbers), neurons))
        return paths

    def _expanded(self, path: NeuronPath, k: int) -> list[NeuronPath]:
        """Returns the best continuations of a path in all tensors read by its last step."""
        self.expanded += 1
        parts = self._columns(path.place, [path.neuron])
        return [longer for edge, part in parts for longer in self._continuations(path, edge, path.mass * part[0], k)]

    def _is_input(self, place: Buffer) -> bool:
        return all(edge is None for edge in self.graph.vertices[place.vertex].edges)

    def _completion(self, place: Buffer) -> Tensor:
        best = self.start.new_zeros(math.prod(self.graph.shape(place)), device=self.graph.device(place))
        if self._is_input(place):
            return best + 1
        for neurons in torch.split(torch.arange(len(best)), self._width):
            for edge, columns in self._columns(place, neurons.tolist()):
                if bool((columns < 0).any()):
                    raise _has_negative_entries(f"the kernel of {self.recording.taps.name_at(place.vertex)}")
                through = (columns * self.completions[edge]).amax(1)
                best[neurons] = torch.maximum(best[neurons], on_device_of(through, best))
        check_finite(self._mu, best)
        return best

    def _columns(self, place: Buffer, neurons: list[int]) -> Iterator[tuple[Buffer, Tensor]]:
        """Yields kernel columns of the step that computes a tensor, in shape ``(K, in)`` for each input."""
        vertex = self.graph.vertices[place.vertex]
        shape = vertex.shapes[place.number]
        device = self.graph.device(place)
        unit_vectors = self.start.new_zeros((len(neurons), math.prod(shape)), device=device)
        unit_vectors[range(len(neurons)), neurons] = 1
        arriving: list[Tensor | None] = [None] * len(vertex.shapes)
        if vertex.step is None:  # autograd nodes require a gradient for their first output
            arriving[0] = self.start.new_zeros((len(neurons), *vertex.shapes[0]), device=device)
        arriving[place.number] = unit_vectors.view(len(neurons), *shape)
        parts, _ = vertex.pull(arriving)
        for part, edge in zip(parts, vertex.edges, strict=True):
            if part is not None and edge is not None:
                yield edge, torch.stack([row.sum_to_size(self.graph.shape(edge)) for row in part]).flatten(1)


def _has_negative_entries(what: str) -> NRMError:
    return NRMError(
        f"{what} has negative entries, so max-product cannot find the best walk. Use rules without negative "
        "contributions, such as NRMAbsolute, or give the layers: top_walks(mu, layers, over='neuron')."
    )
