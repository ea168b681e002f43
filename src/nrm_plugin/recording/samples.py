"""The samples of a batch: where they are in each tensor of a recording.

The first dimension of a tensor need not be the batch. Attention over windows folds windows into it, other layers put
time or heads first. No layout is assumed: if the relevance of some samples is negated at the output, the entries that
change their sign belong to them. No other module reads the first dimension of a tensor as samples.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import FoldingError
from ..model.routing import operation
from ..model.targets import sample_sums
from .graph import Graph
from .passes import Cost, Vectors, pull
from .places import Buffer, Edge, Place, Sink

MIXED = 1e-4
"""Relative change of Σ|R| above which the entries of a tensor mix samples."""


class Samples:
    """The samples of a recording, and the sample of each entry of its tensors.

    Args:
        graph: The graph.
        count: Number of samples.
        batched: Whether the inputs have a dimension of samples; if not, all of their entries are one sample.

    Attributes:
        is_needed: Whether some tensor may not have the samples in its rows.
    """

    def __init__(self, graph: Graph, count: int, batched: bool) -> None:
        self.graph, self.count, self.batched = graph, count, batched
        self.is_needed = count > 1 and any(
            list(shape[:1]) != [count] or _moves_rows(vertex) for vertex in graph.vertices for shape in vertex.shapes
        )
        self._labels: dict[Buffer, Tensor | None] | None = None

    # -- the dimension of samples -----------------------------------------------------------------------------

    def lifted(self, shape: torch.Size) -> torch.Size:
        """The shape of a tensor with a dimension of samples, which it lacks if the inputs have none."""
        return shape if self.batched else torch.Size((1, *shape))

    def with_samples(self, values: Tensor, dim: int = 0) -> Tensor:
        """Values of a tensor with the dimension of samples of :meth:`lifted`."""
        return values if self.batched else values.unsqueeze(dim)

    def without_samples(self, values: Tensor) -> Tensor:
        """The inverse of :meth:`with_samples`."""
        return values if self.batched else values.squeeze(0)

    # -- the sample of an entry -------------------------------------------------------------------------------

    def find(self, start: Tensor) -> Cost:
        """Finds the sample of each entry, once: one pass from the start vector for each bit of N, and one more."""
        cost = Cost()
        if not self.is_needed or self._labels is not None:
            return cost
        signs = _Signs(self.count)
        samples = torch.arange(self.count, device=start.device).reshape(-1, *(1,) * (start.ndim - 1))
        for bit in (None, *range((self.count - 1).bit_length())):
            signs.bit = bit
            negated = start if bit is None else torch.where((samples >> bit) % 2 == 1, -start, start)
            cost += pull(self.graph, [(self.graph.output, {"": negated})], signs)
        self._labels = {buffer: self._labels_from(buffer, signs) for buffer in signs.first}
        return cost

    def _labels_from(self, buffer: Buffer, signs: _Signs) -> Tensor | None:
        """A label for each entry, -1 if unknown; None where the rows are the samples."""
        label = signs.labels[buffer]
        if buffer in signs.mixed:
            return torch.full_like(label, -1)
        label = torch.where(signs.first[buffer] == 0, -1, label)
        if len(label) == self.count if label.ndim else False:
            rows = torch.arange(self.count, device=label.device).reshape(-1, *(1,) * (label.ndim - 1))
            if bool(((label == rows) | (label == -1)).all()):
                return None
        return label

    def sums(self, tensor: Tensor, place: Place | None) -> Tensor | None:
        """Sums over the entries of each sample at a place, ``(N,)``; None where the samples are unknown."""
        if self.count == 1:
            return tensor.sum().reshape(1)
        labels = self._labels_at(place)
        if labels is None:
            return sample_sums(tensor) if tensor.ndim and len(tensor) == self.count else None
        if bool(((labels < 0) & (tensor != 0)).any()):
            return None
        total = tensor.new_zeros(self.count)
        return total.index_add_(0, labels.clamp(min=0).flatten().long(), tensor.flatten())

    def checked_sums(self, tensor: Tensor, what: str, place: Place | None = None) -> Tensor:
        """Sums over the entries of each sample, ``(N,)``.

        Raises:
            FoldingError: The samples are unknown.
        """
        sums = self.sums(tensor, place)
        if sums is None:
            raise self.error(what)
        return sums

    def spread(self, values: Tensor, place: Place, shape: torch.Size) -> Tensor:
        """One value per sample, ``(N,)``, at every entry of a tensor of this shape; nan where the sample is unknown."""
        labels = self._labels_at(place)
        if labels is None:
            return values.reshape(-1, *(1,) * (len(shape) - 1))
        return torch.where(labels < 0, torch.nan, values[labels.clamp(min=0).long()])

    def error(self, what: str) -> FoldingError:
        """The error for sums over entries of unknown samples."""
        return FoldingError(
            f"the entries of {what} cannot be assigned to samples: its first dimension is not the batch of "
            f"{self.count}, or its entries belong to several samples. Take the measure of one sample at a time."
        )

    def _labels_at(self, place: Place | None) -> Tensor | None:
        if self._labels is None or place is None:
            return None
        buffer = place if isinstance(place, Buffer) else self.graph.vertices[place.vertex].edges[place.number]
        if buffer is None:
            return None
        if buffer not in self._labels:  # no relevance arrives there
            return torch.full(self.graph.shape(buffer), -1)
        return self._labels[buffer]


class _Signs:
    """Collects the entries that change their sign in a pass in which the relevance of some samples was negated."""

    def __init__(self, batch: int) -> None:
        self.kind = torch.int16 if batch < 1 << 15 else torch.int64
        self.bit: int | None = None
        self.first: dict[Buffer, Tensor] = {}
        self.labels: dict[Buffer, Tensor] = {}
        self.mixed: set[Buffer] = set()
        self._size: dict[Buffer, Tensor] = {}

    def at_buffer(self, buffer: Buffer, vectors: Vectors[str]) -> Vectors[str]:
        (vector,) = vectors.values()
        sign, size = vector.sign().to(torch.int8), vector.abs().sum()
        if self.bit is None:
            self.first[buffer], self._size[buffer] = sign, size
            self.labels[buffer] = torch.zeros(vector.shape, dtype=self.kind, device=vector.device)
            return vectors
        if buffer in self.first:
            self.labels[buffer] += (sign != self.first[buffer]).to(self.kind) << self.bit
            if bool((size - self._size[buffer]).abs() > MIXED * self._size[buffer]):
                self.mixed.add(buffer)
        return vectors

    def at_edge(self, edge: Edge, vectors: Vectors[str]) -> Vectors[str]:
        return vectors

    def at_sink(self, sink: Sink, number: int, kind: str, vectors: Vectors[str], share: Tensor) -> None:
        pass


def _moves_rows(vertex: Any) -> bool:
    """Whether a vertex may reorder the rows of a tensor."""
    node = vertex.node
    if vertex.step is not None:
        return vertex.step.rule in ("einsum", "tensordot")
    name = operation(node)
    ndim = len(vertex.shapes[0])
    if name == "Transpose":
        return 0 in (_dim(node._saved_dim0, ndim), _dim(node._saved_dim1, ndim))
    if name == "Permute":
        return _dim(node._saved_dims[0], ndim) != 0
    return name in ("T", "Movedim", "Swapaxes", "Roll", "Flip", "Index", "IndexSelect", "Gather", "Sort", "AsStrided")


def _dim(number: int, ndim: int) -> int:
    """A dimension as autograd stores it, negative ones modulo 2⁶⁴."""
    return (number - (1 << 64) if number >= 1 << 63 else number) % ndim


__all__ = ["Samples"]
