"""Which sample an entry of a tensor belongs to, where the first dimension is not the batch.

Attention over windows folds them into the batch, other layers put time or heads first. No layout is assumed here: with
all relevance of some samples negated, the entries that change their sign are theirs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..model.routing import operation
from ..model.targets import sample_sums
from .graph import Buffer, Graph, Place
from .passes import Cost, Vectors, pull

MIXED = 1e-4
"""Relative change of Σ|R| by which entries that mix samples are told."""


class Folding:
    """The sample of each entry of the tensors of a recording.

    Args:
        graph: The graph.
        batch: Number of samples.

    Attributes:
        is_needed: Whether some tensor may not have the samples in its rows.
    """

    def __init__(self, graph: Graph, batch: int) -> None:
        self.graph, self.batch = graph, batch
        self.is_needed = batch > 1 and any(
            list(shape[:1]) != [batch] or _moves_rows(vertex) for vertex in graph.vertices for shape in vertex.shapes
        )
        self._labels: dict[Buffer, Tensor | None] | None = None

    def learn(self, start: Tensor) -> Cost:
        """Finds the samples, once, by passes down from a start vector ``(N, …)``: one more than the batch has bits."""
        cost = Cost()
        if not self.is_needed or self._labels is not None:
            return cost
        signs = _Signs(self.batch)
        samples = torch.arange(self.batch, device=start.device).reshape(-1, *(1,) * (start.ndim - 1))
        for bit in (None, *range((self.batch - 1).bit_length())):
            signs.bit = bit
            negated = start if bit is None else torch.where((samples >> bit) % 2 == 1, -start, start)
            cost += pull(self.graph, [(self.graph.output, {"": negated})], signs)
        self._labels = {buffer: self._told(buffer, signs) for buffer in signs.first}
        return cost

    def _told(self, buffer: Buffer, signs: _Signs) -> Tensor | None:
        """A label for each entry, -1 for an unknown one; None where the rows are the samples."""
        label = signs.labels[buffer]
        if buffer in signs.mixed:
            return torch.full_like(label, -1)
        label = torch.where(signs.first[buffer] == 0, -1, label)
        if len(label) == self.batch if label.ndim else False:
            rows = torch.arange(self.batch, device=label.device).reshape(-1, *(1,) * (label.ndim - 1))
            if bool(((label == rows) | (label == -1)).all()):
                return None
        return label

    def sums(self, tensor: Tensor, place: Place | None) -> Tensor | None:
        """``(N,)``: what the entries of a tensor at some place add up to; None where the samples cannot be told."""
        if self.batch == 1:
            return tensor.sum().reshape(1)
        labels = self._of(place)
        if labels is None:
            return sample_sums(tensor) if tensor.ndim and len(tensor) == self.batch else None
        if bool(((labels < 0) & (tensor != 0)).any()):
            return None
        total = tensor.new_zeros(self.batch)
        return total.index_add_(0, labels.clamp(min=0).flatten().long(), tensor.flatten())

    def spread(self, values: Tensor, place: Place, shape: torch.Size) -> Tensor:
        """One value for each sample, ``(N,)``, at every entry of a tensor of this shape; nan where it is unknown."""
        labels = self._of(place)
        if labels is None:
            return values.reshape(-1, *(1,) * (len(shape) - 1))
        return torch.where(labels < 0, torch.nan, values[labels.clamp(min=0).long()])

    def _of(self, place: Place | None) -> Tensor | None:
        if self._labels is None or place is None:
            return None
        buffer = place if isinstance(place, Buffer) else self.graph.vertices[place[0]].edges[place[1]]
        if buffer is None:
            return None
        if buffer not in self._labels:  # no relevance arrives there
            return torch.full(self.graph.shape(buffer), -1)
        return self._labels[buffer]


class _Signs:
    """Collects which entries change their sign in a pass in which that of some samples was changed."""

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

    def at_edge(self, vertex: int, number: int, vectors: Vectors[str]) -> Vectors[str]:
        return vectors

    def at_sink(self, vertex: int, number: int, kind: str, vectors: Vectors[str], share: Tensor) -> None:
        pass


def _moves_rows(vertex: Any) -> bool:
    """Whether a vertex may hand the rows of a tensor on in another order."""
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
    """A dimension as autograd keeps it, negative ones modulo 2⁶⁴."""
    return (number - (1 << 64) if number >= 1 << 63 else number) % ndim


__all__ = ["Folding"]
