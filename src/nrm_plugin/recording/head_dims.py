"""Dimension of heads in the output of attention, derived from the views that follow."""

from __future__ import annotations

import torch
from torch import Tensor

from .graph import Graph
from .places import Buffer
from .residual_adds import is_weighted


def head_dim(graph: Graph, number: int) -> int | None:
    """Returns the dimension of heads in the output of an attention call, as a negative index.

    Views merge heads and features into the columns that the next layer reads. Windows and chunks are merged with the
    tokens instead. If the views merge no heads, the last of the other dimensions shared with the values is theirs.

    Args:
        graph: The graph of a recording.
        number: The vertex of the call.
    """
    vertex = graph.vertices[number]
    assert vertex.step is not None
    shared: tuple[int, ...] = vertex.step.attention.shared
    shape, queries = vertex.shapes[0], vertex.step.attention.queries
    features = set(range(-len(shape), 0)) - {*shared, queries}
    if len(shared) < 2 or len(features) != 1:
        return shared[-1] if shared else None
    positions = [_positions(shape, dim, vertex.dtypes[0]) for dim in (*shared, queries, *features)]
    *labels, token, feature = _read(graph, number, torch.stack(positions))
    merged = [dim for dim, label in zip(shared, labels, strict=True) if _is_merged(label, feature)]
    others = [dim for dim, label in zip(shared, labels, strict=True) if not _is_merged(label, token)]
    return (merged or others or shared)[-1]


def _positions(shape: torch.Size, dim: int, dtype: torch.dtype) -> Tensor:
    """Returns the position of each element along a dimension."""
    view = [1] * len(shape)
    view[dim] = -1
    return torch.arange(shape[dim], dtype=dtype).view(view).expand(shape)


def _is_merged(label: Tensor, other: Tensor) -> bool:
    """Returns True if two labels vary along the same dimension."""
    return any(all(bool((one.amax(dim) != one.amin(dim)).any()) for one in (label, other)) for dim in range(label.ndim))


def _read(graph: Graph, number: int, values: Tensor) -> Tensor:
    """Returns values of shape ``(K, *shape)`` at the output of a vertex as the next layer with weights reads them."""
    values = values.to(graph.device(Buffer(number, 0)))
    while True:
        readers = ((n, e) for n in range(number - 1, -1, -1) for e, edge in enumerate(graph.vertices[n].edges)
                   if edge == Buffer(number, 0))  # fmt: skip
        number, edge = next(readers, (-1, -1))
        reader = graph.vertices[number]
        if number < 0 or len(reader.shapes) > 1:
            return values
        if reader.step is not None:
            if is_weighted(reader.step) or reader.shapes[0] != values.shape[1:]:
                return values
            continue
        arriving: list[Tensor | None] = [None] * len(reader.edges)
        arriving[edge] = values
        (pushed,) = reader.push(arriving, [None])
        if pushed is None:
            return values
        values = pushed


__all__ = ["head_dim"]
