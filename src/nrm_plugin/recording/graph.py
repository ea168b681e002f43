"""The graph of a recording: its vertices are autograd nodes, its buffers their outputs, and its edges their inputs.

A step is a vertex whose node has a :class:`~nrm_plugin.kernels.step.Step`, which propagates relevance by a kernel. All
other vertices are 0/1 routes: they only copy values, and autograd itself propagates relevance through them. Vertices
are numbered in walk order, from the output to the inputs.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeGuard

import torch
from torch import Tensor

from ..errors import UnsupportedOperationError
from ..kernels.step import Step, step_of
from ..model.autocast import is_short_format, working_dtype
from ..model.trace_guards import holds
from ..model.zero_one_routes import is_whole, operation, written
from .indexed_routes import IndexedRoute, indexed_route
from .places import Buffer, Edge, Place

_IN_ANY_FORMAT = frozenset(
    """
    Alias View ReshapeAlias UnsafeView Transpose Permute T Squeeze Unsqueeze Expand Select Slice Split SplitWithSizes
    Unbind Clone Cat Stack Where MaskedFill Maximum Minimum Amax Amin AccumulateGrad
    """.split()
)
"""Routes through which autograd can propagate float32 relevance, whatever the dtype of their tensors."""

_WITH_CONSTANTS = frozenset(
    [
        "cat",
        "stack",
        "where",
        "maskedfill",
        "constantpadnd",
        "copyslices",
        "copy",
        "maxunpool2d",
        "maxunpool3d",
        "maximum",
        "minimum",
        "tril",
        "triu",
        "im2col",
        "diagembed",
    ]
)


@dataclass
class Vertex:
    """Node in the graph of a recording: a step, which propagates relevance by a kernel, or a route, which copies.

    Attributes:
        node: Node of the autograd graph.
        step: The step, or None for a route.
        edges: The buffer from which each input is read, or None for a constant.
        shapes: Shape of each output.
        dtypes: The dtype of relevance at each output.
        arriving: The dtype of relevance at each input, or None for a constant.
        devices: The device of each input, or None for a constant; None if all are on the device of the outputs.
        is_short: Whether the vertex is a route with an input or output in lower precision than float32.
        leaf: The leaf tensor if the graph ends at this vertex, or None.
        is_identity: Whether the vertex is a route that returns its input, such as a view in the same shape.
    """

    node: Any
    step: Step | None
    edges: tuple[Buffer | None, ...]
    shapes: tuple[torch.Size, ...]
    dtypes: tuple[torch.dtype, ...]
    arriving: tuple[torch.dtype | None, ...]
    devices: tuple[torch.device | None, ...] | None = None
    is_short: bool = False
    leaf: Tensor | None = None
    is_identity: bool = False
    _constant_share: tuple[Tensor, ...] | None = field(default=None, repr=False)

    def pull(self, relevance: list[Tensor | None], absolute: bool = False) -> tuple[list[Tensor | None], Any]:
        """Propagates relevance of shape ``(K, *shape)`` from each output to each edge.

        Returns:
            The relevance at each edge, in the dtype given by :attr:`arriving` and on the device of the input; and the
            absorbed fraction, or None.
        """
        if self.step is not None:
            (single,) = relevance
            assert single is not None
            parts, residual = (self.step.pull_absolute if absolute else self.step.pull)(single)
            return self._converted(parts), residual
        if self.index is not None:
            return self._converted(self.index.pull(relevance)), None
        if self.is_identity:
            return relevance, None
        count = next(len(item) for item in relevance if item is not None)
        rows = [self._route([item if item is None else item[k] for item in relevance]) for k in range(count)]
        return self._converted(_columns(rows)), None

    @property
    def is_route_of_vectors(self) -> bool:
        """True if the vertex is a route through which :meth:`route` can propagate a single vector."""
        return self.step is None and self.index is None

    def route(self, relevance: list[Tensor | None]) -> list[Tensor | None]:
        """Propagates a single relevance vector of shape ``(*shape)`` through a route. Otherwise like :meth:`pull`."""
        return relevance if self.is_identity else self._converted(self._route(relevance))

    def push(self, values: list[Tensor | None], absorbed: list[Tensor | None]) -> list[Tensor | None]:
        """Applies the transpose of :meth:`pull`. ``absorbed`` contains the values at the sink of each output."""
        if self.devices is not None and (self.step is not None or self.index is not None):
            home = self.node._input_metadata[0].device
            values = [value if value is None else value.to(home) for value in values]
        if self.step is not None:
            return [self.step.push(tuple(values), absorbed[0])]
        known = [value for value in values if value is not None]
        if not known:
            return [None] * len(self.shapes)
        if self.index is not None:
            rows_of = self.index.push(values)
            return [row.to(dtype) for row, dtype in zip(rows_of, self.dtypes, strict=True)]
        with torch.inference_mode(False), torch.enable_grad():
            seeds = self._seeds()
            parts = self._route(list(seeds))
            # A node that is called directly does not sum over the dimensions in which an input was broadcast.
            pairs = [
                (part.sum_to_size(value.shape[1:]), value.to(part.dtype))
                for part, value in zip(parts, values, strict=True)
                if value is not None and _carries(part)
            ]
            if not pairs:
                return [None] * len(self.shapes)
            rows = [
                torch.autograd.grad([p for p, _ in pairs], seeds, [v[k] for _, v in pairs], True, allow_unused=True)
                for k in range(len(known[0]))
            ]
        return _columns(rows)

    def forget(self) -> None:
        """Frees the cached tensors of a route, which are recomputed on demand."""
        self._constant_share = None
        self.__dict__.pop("index", None)

    def _converted(self, parts: Sequence[Tensor | None]) -> list[Tensor | None]:
        if self.devices is not None:
            pairs = zip(parts, self.devices, strict=True)
            parts = [part if part is None or device is None else part.to(device) for part, device in pairs]
        return [
            part if part is None or dtype in (None, part.dtype) else part.to(dtype)
            for part, dtype in zip(parts, self.arriving, strict=True)
        ]

    def _seeds(self) -> list[Tensor]:
        """Returns zeros that require a gradient, in the shape of each output."""
        outputs = zip(self.shapes, self.dtypes, self.node._input_metadata, strict=True)
        return [torch.zeros(shape, dtype=dtype, device=m.device).requires_grad_() for shape, dtype, m in outputs]

    @functools.cached_property
    def index(self) -> IndexedRoute | None:
        """Index form of the route, or None if autograd can propagate float32 relevance without rounding."""
        if not self.is_short or operation(self.node) in _IN_ANY_FORMAT:
            return None
        device = self.node._input_metadata[0].device
        seeds = [
            torch.zeros(shape, dtype=m.dtype, device=device)
            for shape, m in zip(self.shapes, self.node._input_metadata, strict=True)
        ]
        return indexed_route(self._route, seeds, [edge is not None for edge in self.edges])

    def _route(self, relevance: list[Tensor | None]) -> list[Tensor | None]:
        try:
            parts = self.node(*relevance)
        except RuntimeError as error:
            if "modified by an inplace operation" not in str(error):
                raise
            raise UnsupportedOperationError(
                f"the model overwrites an index or a mask of {operation(self.node)!r} in place after the call, so "
                "autograd no longer has its values. Write to a copy, `mask = mask & other` instead of `mask &= "
                "other`."
            ) from error
        return list(parts) if isinstance(parts, (tuple, list)) else [parts]

    @property
    def may_hold_constants(self) -> bool:
        """True if the vertex is a route that may combine computed values with constants."""
        return self.step is None and operation(self.node).lower() in _WITH_CONSTANTS

    def constant_share(self) -> tuple[Tensor, ...] | None:
        """Returns a 0/1 indicator of the constant elements of each output, or None if there are no constants."""
        if not self.may_hold_constants:
            return None
        if self.index is not None:
            shares = tuple(
                (origin == 0).to(dtype) for origin, dtype in zip(self.index.origins, self.dtypes, strict=True)
            )
            return shares if any(bool(share.any()) for share in shares) else None
        if self._constant_share is None:
            with torch.inference_mode(False), torch.enable_grad():
                seeds = self._seeds()
                # If they are called directly, some nodes return gradients for constants, too.
                parts = zip(self._route(list(seeds)), self.edges, strict=True)
                totals = [part.sum() for part, edge in parts if edge is not None and _carries(part)]
                columns = (
                    torch.autograd.grad(totals, seeds, allow_unused=True, materialize_grads=True)
                    if totals
                    else [torch.zeros_like(seed) for seed in seeds]
                )
            shares = tuple(1 - column.detach() for column in columns)
            held = torch.stack([share.any() for share in shares])
            self._constant_share = () if holds("no constants", lambda: ~held.any()) else shares
        return self._constant_share or None


@dataclass(frozen=True)
class Marks:
    """For each vertex and edge, which of several marked tensors and sinks walks can reach below it, as bit sets.

    Attributes:
        below_vertex: The marks below each vertex.
        below_edge: The marks below each edge of each vertex, including the marks of the edge itself and of its buffer.
    """

    below_vertex: list[int]
    below_edge: list[tuple[int, ...]]


class Graph:
    """Autograd graph between an output tensor and the leaf tensors on which it depends.

    Args:
        output: The output tensor, which must have a ``grad_fn``.
        leaves: The leaf tensors at which relevance ends. Tensors that do not depend on any of them are constants.
        contrast: Node of a contrast between the outputs, at which the graph starts, or None to start at the output.
    """

    def __init__(self, output: Tensor, leaves: Sequence[Tensor], contrast: Any = None) -> None:
        root, number = written(output.grad_fn, output.output_nr) if contrast is None else (contrast, 0)
        edges = _edges_in_walk_order(root)
        self.nodes = _depending(edges, leaves)
        position = {node: index for index, node in enumerate(self.nodes)}
        self.vertices = [_vertex(node, edges[node], position) for node in self.nodes]
        self.position = position
        self._count_uses()
        self.output = Buffer(0, number)

    def _count_uses(self) -> None:
        """Counts the consumers that read the output of each step, directly or through views of the whole tensor."""
        uses = [0] * len(self.vertices)
        for index, vertex in enumerate(self.vertices):
            for edge in vertex.edges:
                if edge is None:
                    continue
                uses[edge.vertex] += uses[index] if vertex.step is None and is_whole(vertex.node) else 1
        for vertex, count in zip(self.vertices, uses, strict=True):
            if vertex.step is not None:
                vertex.step.uses = count

    def shape(self, buffer: Buffer) -> torch.Size:
        """Returns the shape of the tensor in a buffer."""
        return self.vertices[buffer.vertex].shapes[buffer.number]

    def buffer(self, place: Place) -> Buffer:
        """Returns the buffer at a place. For an edge, this is the buffer from which it is read."""
        buffer = self.vertices[place.vertex].edges[place.number] if isinstance(place, Edge) else place
        assert buffer is not None, "constants are no places"
        return buffer

    def device(self, place: Place) -> torch.device:
        """Returns the device of the tensor at a place, a buffer or an edge."""
        buffer = self.buffer(place)
        device: torch.device = self.vertices[buffer.vertex].node._input_metadata[buffer.number].device
        return device

    def marks_below(self, marks: Mapping[Place, int]) -> Marks:
        """Computes the marked places that walks can cross below each vertex and edge.

        Args:
            marks: Bit set of each marked place, a buffer or an edge.
        """
        vertices: list[int] = [0] * len(self.vertices)
        edges: list[tuple[int, ...]] = [()] * len(self.vertices)
        for index in range(len(self.vertices) - 1, -1, -1):
            bits = tuple(
                marks.get(Edge(index, number), 0)
                | (0 if buffer is None else marks.get(buffer, 0) | vertices[buffer.vertex])
                for number, buffer in enumerate(self.vertices[index].edges)
            )
            edges[index] = bits
            vertices[index] = functools.reduce(operator.or_, bits, 0)
        return Marks(vertices, edges)


def _carries(part: Tensor | None) -> TypeGuard[Tensor]:
    """Returns True if the result of a route depends on the relevance. It does not for overwritten inputs."""
    return part is not None and part.requires_grad


def _columns(rows: list[Any]) -> list[Tensor | None]:
    """Stacks the relevance vectors of each edge, given one list over the edges for each vector."""
    if len(rows) == 1:
        return [None if part is None else part.unsqueeze(0) for part in rows[0]]
    return [None if column[0] is None else torch.stack(column) for column in zip(*rows, strict=True)]


_Edges = dict[Any, list[tuple[Any, int]]]
"""The nodes that each node reads, with the indices of their outputs. Writes to whole tensors are skipped."""


def _edges_in_walk_order(root: Any) -> _Edges:
    """Sorts nodes topologically, in the direction of relevance propagation.

    Graphs can be deep, so the depth-first search does not use recursion.
    """
    edges: _Edges = {root: _edges(root)}
    order: list[Any] = []
    stack = [(root, iter(edges[root]))]
    while stack:
        node, rest = stack[-1]
        for below, _ in rest:
            if below is not None and below not in edges:
                edges[below] = _edges(below)
                stack.append((below, iter(edges[below])))
                break
        else:
            order.append(node)
            stack.pop()
    return {node: edges[node] for node in reversed(order)}


def _depending(edges: _Edges, leaves: Sequence[Tensor]) -> list[Any]:
    """Returns the first node and all other nodes that depend on at least one of the leaf tensors."""
    inputs = {id(leaf) for leaf in leaves}
    depending: set[Any] = set()
    for node, read in reversed(edges.items()):
        if id(getattr(node, "variable", None)) in inputs or any(below in depending for below, _ in read):
            depending.add(node)
    first, *others = edges
    return [first, *(node for node in others if node in depending)]


def _edges(node: Any) -> list[tuple[Any, int]]:
    """Returns the nodes that a node reads, with the indices of their outputs. Skips writes to whole tensors."""
    return [written(below, number) for below, number in node.next_functions]


def _vertex(node: Any, read: list[tuple[Any, int]], position: dict[Any, int]) -> Vertex:
    edges = tuple(Buffer(position[below], number) if below in position else None for below, number in read)
    step = step_of(node)
    leaf = getattr(node, "variable", None)
    outputs = node._input_metadata if step is None else node._input_metadata[:1]  # a Function uses only the first
    shapes, formats = zip(*((torch.Size(m.shape), m.dtype) for m in outputs), strict=True)
    metadata = [lower._input_metadata[number] if lower in position else None for lower, number in read]
    below = [None if one is None else one.dtype for one in metadata]
    devices = tuple(None if one is None else one.device for one in metadata)
    is_on_one_device = {*devices} <= {None, outputs[0].device}
    return Vertex(
        node,
        step,
        edges,
        shapes,
        tuple(working_dtype(one) for one in formats),
        tuple(None if one is None else working_dtype(one) for one in below),
        None if is_on_one_device else devices,
        step is None and any(one is not None and is_short_format(one) for one in (*formats, *below)),
        leaf,
        step is None and is_on_one_device and is_whole(node) and _is_same_form(outputs, metadata),
    )


def _is_same_form(some: Sequence[Any], others: Sequence[Any]) -> bool:
    """Returns True if the metadata of two lists of tensors have the same shapes and dtypes."""
    forms = [[None if m is None else (torch.Size(m.shape), m.dtype) for m in metadata] for metadata in (some, others)]
    return forms[0] == forms[1]
