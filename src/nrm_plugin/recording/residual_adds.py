"""Residual adds: sums of a residual stream and a branch, found in the graph of a recording.

The names of model families and layers play no role. A residual add is the sum of a tensor and a branch that depends on
it. The tensor may be scaled on its way to the sum. If the branch contains attention, the tensor may also be pooled or
projected by a single linear layer, as where a block changes the width of its stream.

If residual adds are nested, the inner ones are the parts of the block if they contain all of the attention of the
outer one, as in bottlenecks. Otherwise, the outer one is the part, and the inner ones belong to its branch.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from ..kernels.layer_step import LayerStep
from ..kernels.step import Step
from ..model.zero_one_routes import operation
from .graph import Graph
from .places import Buffer, Edge

PRODUCTS = re.compile("matmul|mm$|bmm|einsum")
WEIGHTED = re.compile(f"{PRODUCTS.pattern}|linear|conv")
"""Pattern that matches functions with weights. Layers are recorded as such if a difference is explained."""
SUMS = ("sum", "add", "sub", "rsub")
SCALINGS = ("mul", "div", "neg")
MIXING = re.compile(r"conv|pool|cumsum|cumprod|fft|lstm|gru|rnn|scan|stack|^cat|pad|roll|matmul|mm$|bmm|einsum")


@dataclass
class Branch:
    """Residual add and its branch.

    Attributes:
        vertex: The vertex of the add.
        stream: The tensor to which the branch is added.
        number: Index of the edge of the add that reads the branch.
        inner: The vertices on the paths between the add and the stream.
        attention: The vertices of attention calls in the branch.
        crossing: The attention calls whose values come from another stream.
        skipped: Vertex that adds a parallel branch to the same stream and is included in this add, or -1.
        is_exact: Whether the stream itself is added, rather than a scaled, pooled or projected copy.
    """

    vertex: int
    stream: Buffer
    number: int
    inner: list[int]
    attention: list[int]
    crossing: list[int]
    skipped: int = -1
    is_exact: bool = True


class ResidualAdds:
    """Dependencies between the vertices of a graph and the residual adds among them.

    Attributes:
        below: The vertices below each vertex, as bit sets.
        leaves: The vertices at which the graph ends, as a bit set.
        calls: The vertices that multiply weights by values, as a bit set.
        branches: The residual adds, keyed by vertex, in the order of the forward pass.
        frames: Outer residual adds around others, from the output to the input.
    """

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        count = len(graph.vertices)
        self.below, self._readers = [0] * count, [0] * count
        for number in range(count - 1, -1, -1):
            for edge in graph.vertices[number].edges:
                if edge is not None:
                    self.below[number] |= self.below[edge.vertex] | 1 << edge.vertex
                    self._add_reader(number, edge)
        self.leaves = sum(1 << number for number, vertex in enumerate(graph.vertices) if vertex.leaf is not None)
        steps = enumerate(vertex.step for vertex in graph.vertices)
        self.calls = sum(1 << number for number, step in steps if step is not None and step.attention is not None)
        known = self._candidates()
        for skipped in [branch.skipped for branch in known.values()]:
            known.pop(skipped, None)
        self.branches, self.frames = self._nested(known)

    def _add_reader(self, number: int, buffer: Buffer) -> None:
        """Adds a vertex to the readers of a tensor and, if this is a scaled copy, of the original tensor."""
        if self._is_view(number) or self._scaled(number) is not None:
            return
        while True:
            buffer = self.source(buffer)
            self._readers[buffer.vertex] |= 1 << number
            original = self._scaled(buffer.vertex)
            if original is None:
                return
            buffer = original

    def _candidates(self) -> dict[int, Branch]:
        """Returns all residual adds, including those in the branches of others."""
        count = len(self.graph.vertices)
        sums: dict[int, Branch] = {}
        for number in range(count - 1, -1, -1):
            found = self._residual(number, sums)
            if found is not None:
                sums[number] = found
        known = {number: branch for number, branch in sums.items() if self._is_block(branch)}
        direct = {vertex for branch in known.values() for vertex in self._summands(branch)}
        for number in range(count - 1, -1, -1):
            found = None if number in sums or number in direct else self._projected(number, known)
            if found is not None and self._is_block(found):
                known[number] = found
        return {number: known[number] for number in sorted(known, reverse=True)}

    def _nested(self, known: Mapping[int, Branch]) -> tuple[dict[int, Branch], list[Branch]]:
        """Returns the residual adds that are parts of blocks, and the outer adds around them."""
        parts, frames = dict(known), []
        for number, branch in sorted(known.items()):  # from the output to the inputs, so outer adds come first
            inner = [parts[vertex] for vertex in branch.inner if vertex in parts] if number in parts else []
            if inner and self._is_divided(branch, inner):
                frames.append(parts.pop(number))
            else:
                for part in inner:
                    del parts[part.vertex]
        return parts, frames

    def _is_divided(self, branch: Branch, inner: Sequence[Branch]) -> bool:
        """Returns True if inner residual adds contain a branch's attention or, if it has none, half of its layers.

        Adds of scaled streams count if they contain attention, and sums of attention and its queries or values do not.
        """
        weighted = self._weighted(branch)
        covering = [part for part in inner if (part.is_exact or part.attention) and self._is_projecting(part)]
        covered = {vertex for part in covering for vertex in part.inner}
        return covered.issuperset(branch.attention) and (
            bool(branch.attention) or 2 * len(covered.intersection(weighted)) >= len(weighted)
        )

    def step(self, vertex: int) -> Step | None:
        """Returns the step of a vertex, or None if the vertex is a route."""
        return self.graph.vertices[vertex].step

    def source(self, buffer: Buffer) -> Buffer:
        """Follows views, and other routes with a single input, down to the original tensor."""
        while True:
            if not self._is_view(buffer.vertex):
                return buffer
            (buffer,) = (edge for edge in self.graph.vertices[buffer.vertex].edges if edge is not None)

    def _is_view(self, number: int) -> bool:
        """Returns True if a vertex is a view of another tensor that is not a copy of a model input."""
        vertex = self.graph.vertices[number]
        edges = [edge for edge in vertex.edges if edge is not None]
        if (vertex.step is not None and not _is_idle(vertex.step)) or len(edges) != 1 or len(vertex.shapes) > 1:
            return False
        return self.graph.vertices[edges[0].vertex].leaf is None

    def undivided(self, buffer: Buffer) -> Buffer:
        """Returns the tensor of which a buffer is a view or a part."""
        while True:
            buffer = self.source(buffer)
            vertex = self.graph.vertices[buffer.vertex]
            if vertex.step is not None or len(vertex.edges) != 1 or vertex.edges[0] is None:
                return buffer
            if self.graph.vertices[vertex.edges[0].vertex].leaf is not None:
                return buffer
            (buffer,) = vertex.edges  # type: ignore[assignment]

    def depends(self, vertex: int, on: int) -> bool:
        """Returns True if ``vertex`` is ``on`` or depends on it."""
        return vertex == on or bool(self.below[vertex] >> on & 1)

    def _residual(self, number: int, known: Mapping[int, Branch]) -> Branch | None:
        """Returns the branch that a vertex adds to a residual stream, or None if it is not a residual add."""
        summands = self._summands_of(number)
        for is_exact, (branch, skip) in itertools.product((True, False), ((0, 1), (1, 0)) if summands else ()):
            top, stream = summands[branch], summands[skip]
            stream = stream if is_exact else self._unscaled(stream)
            skipped = []
            while not self.depends(top.vertex, stream.vertex) and stream.vertex in known:
                skipped.append(stream.vertex)
                stream = known[stream.vertex].stream  # skip a previous add, as for parallel attention and MLP
            if top != stream and self.depends(top.vertex, stream.vertex):
                found = replace(self._branch(number, stream, branch), is_exact=is_exact)
                is_parallel = len(skipped) == 1 and any(self.depends(top.vertex, v) for v in self._weighted(found))
                return replace(found, skipped=skipped[0]) if is_parallel else found
        return None

    def _summands_of(self, number: int) -> list[Buffer]:
        """Returns the two tensors that a vertex adds, or an empty list if it is not a sum of two tensors."""
        step, edges = self.step(number), [edge for edge in self.graph.vertices[number].edges if edge is not None]
        is_sum = step is not None and step.rule in SUMS and len(self.graph.vertices[number].edges) == len(edges) == 2
        return [self.source(edge) for edge in edges] if is_sum else []

    def _unscaled(self, buffer: Buffer) -> Buffer:
        """Follows views and products with constants down to the original tensor."""
        while True:
            buffer = self.source(buffer)
            original = self._scaled(buffer.vertex)
            if original is None:
                return buffer
            buffer = original

    def _scaled(self, number: int) -> Buffer | None:
        """Returns the tensor that a vertex multiplies by a constant, or None."""
        step, edges = self.step(number), self.graph.vertices[number].edges
        read = [edge for edge in edges if edge is not None]
        return read[0] if step is not None and step.rule in SCALINGS and len(read) == 1 else None

    def _projected(self, number: int, known: Mapping[int, Branch]) -> Branch | None:
        """Returns the branch that a vertex adds to a pooled or projected stream, or None if there is none.

        The branch contains attention, whose queries, keys and values depend on the stream by linear layers. The other
        summand contains at most one linear layer.
        """
        tops = [summand.vertex for summand in self._summands_of(number)]
        if not tops:
            return None
        own = (self.below[tops[0]] | 1 << tops[0]) ^ (self.below[tops[1]] | 1 << tops[1])
        stream = self._common(number, tops, known) if own & self.calls else None
        for branch, (top, skip) in enumerate((tops, tops[::-1])) if stream is not None else ():
            assert stream is not None
            found = self._branch(number, stream, branch)
            other = [vertex for vertex in found.inner if self.depends(skip, vertex)]
            inner = [vertex for vertex in found.inner if self.depends(top, vertex)]
            attention = [vertex for vertex in found.attention if vertex in inner]
            found = replace(found, inner=inner, attention=attention, is_exact=False)
            is_own = all(self.depends(vertex, stream.vertex) for vertex in self._operands(found))
            if attention and is_own and self._is_plain(other, top) and self._is_projecting(found):
                return found
        return None

    def _common(self, number: int, tops: Sequence[int], known: Mapping[int, Branch]) -> Buffer | None:
        """Returns the last tensor through which both summands read everything below it, or None."""
        below = [self.below[top] | 1 << top for top in tops]
        others = sum(1 << vertex for vertex in known)
        for vertex in _bits(below[0] & below[1]):
            between = self.below[number] & ~self.below[vertex] & ~(1 << vertex)
            if between & others:
                return None
            if self._is_view(vertex) or len(self.graph.vertices[vertex].shapes) > 1:
                continue
            read = (edge for v in _bits(between) for edge in self.graph.vertices[v].edges if edge is not None)
            if not any(self.below[vertex] >> edge.vertex & 1 for edge in read):
                return Buffer(vertex, 0)
        return None

    def _is_plain(self, vertices: Sequence[int], top: int) -> bool:
        """Returns True if vertices contain at most one linear layer, which ``top`` does not read, and no products."""
        linear = [vertex for vertex in vertices if self.is_linear(vertex)]
        steps = [step for v in vertices if v not in linear and (step := self.step(v)) is not None]
        is_shared = any(self.depends(top, vertex) for vertex in linear)
        return len(linear) <= 1 and not is_shared and not any(PRODUCTS.search(step.rule) for step in steps)

    def _operands(self, branch: Branch) -> Iterator[int]:
        """Yields the vertices from which the attention of a branch reads queries, keys and values."""
        for vertex in branch.attention:
            for edge in (self.values(vertex), *(self.scores(vertex, branch.inner) or ())):
                yield self.graph.buffer(edge).vertex

    def _is_projecting(self, branch: Branch) -> bool:
        """Returns True if all queries, keys and values that depend on the stream do so by linear layers."""
        linear = [vertex for vertex in branch.inner if self.is_linear(vertex)]
        operands = [top for top in self._operands(branch) if self.depends(top, branch.stream.vertex)]
        return all(any(self.depends(top, vertex) for vertex in linear) for top in operands)

    def _summands(self, branch: Branch) -> Iterator[int]:
        """Yields the sums of a branch whose result is added without a further linear layer."""
        stack = [self.graph.vertices[branch.vertex].edges[branch.number]]
        while stack:
            edge = stack.pop()
            if edge is None or edge.vertex not in branch.inner or edge.vertex in branch.attention:
                continue
            step = self.step(edge.vertex)
            if step is not None and step.rule in SUMS:
                yield edge.vertex
            if not self.is_linear(edge.vertex):
                stack += self.graph.vertices[edge.vertex].edges

    def _weighted(self, branch: Branch) -> list[int]:
        return [vertex for vertex in branch.inner if vertex in branch.attention or self.is_linear(vertex)]

    def _branch(self, number: int, stream: Buffer, edge: int) -> Branch:
        members = self.below[number] | 1 << number
        inner = [v for v in _bits(members) if v not in (number, stream.vertex) and self.depends(v, stream.vertex)]
        calls = {v: self.scores(v, inner) for v in inner}
        attention = [v for v, scores in calls.items() if scores is not None]
        return Branch(number, stream, edge, inner, attention, [v for v in attention if self._is_cross(v, stream)])

    def values(self, vertex: int) -> Edge:
        """Returns the edge through which an attention call reads its values."""
        step = self.step(vertex)
        assert step is not None
        return Edge(vertex, step.attention.keys[0][0])

    def scores(self, vertex: int, inner: Sequence[int]) -> tuple[Edge, Edge] | None:
        """Returns the edges that read queries and keys, in the fused function or the product that yields the weights.

        Returns None if the vertex is not an attention call or its weights are not computed by a product in the branch.
        """
        step, edges = self.step(vertex), self.graph.vertices[vertex].edges
        if step is None or step.attention is None:
            return None
        others = [n for n, edge in enumerate(edges) if n != self.values(vertex).number and edge is not None]
        if len(others) >= 2:
            return Edge(vertex, others[0]), Edge(vertex, others[1])
        stack = [edges[number] for number in others]
        while stack:
            place = stack.pop()
            if place is None or place.vertex not in inner:
                continue
            step, edges = self.step(place.vertex), self.graph.vertices[place.vertex].edges
            joined = [number for number, edge in enumerate(edges) if edge is not None]
            if step is not None and len(joined) == 2 and PRODUCTS.search(step.rule):
                return Edge(place.vertex, joined[0]), Edge(place.vertex, joined[1])
            if len(joined) == 1 or step is None or step.rule in SUMS:
                stack += [edges[number] for number in reversed(joined)]  # the first is searched first
        return None

    def _is_cross(self, vertex: int, stream: Buffer) -> bool:
        """Returns True if the values of an attention call are independent of some input on which the stream depends."""
        edge = self.graph.vertices[vertex].edges[self.values(vertex).number]
        return edge is not None and bool(self.inputs_of(stream.vertex) & ~self.inputs_of(edge.vertex))

    def inputs_of(self, vertex: int) -> int:
        """Returns the leaf vertices on which a vertex depends, as a bit set."""
        return (self.below[vertex] | 1 << vertex) & self.leaves

    def _is_block(self, branch: Branch) -> bool:
        """Returns True if a branch contains attention, weights or a mixer, unlike the sums inside activation functions.

        In addition, only the add, the vertices of its branch and those above the add may read the stream.
        """
        within = self.below[branch.vertex] | 1 << branch.vertex
        others = self._readers[branch.stream.vertex] & ~within
        if any(not self.depends(vertex, branch.vertex) for vertex in _bits(others)):
            return False
        return bool(self._weighted(branch)) or (branch.is_exact and not others and self.is_mixer(branch.inner))

    def is_linear(self, vertex: int) -> bool:
        """Returns True if a vertex multiplies by weights, like a linear layer or a convolution."""
        step, edges = self.step(vertex), self.graph.vertices[vertex].edges
        if step is None or step.attention is not None or sum(edge is not None for edge in edges) != 1:
            return False
        return is_weighted(step)

    def is_mixer(self, vertices: Sequence[int]) -> bool:
        """Returns True if vertices without attention mix tokens by a convolution, a scan or products of tensors."""
        return any(map(self._is_mixing, vertices))

    def _is_mixing(self, number: int) -> bool:
        vertex, step = self.graph.vertices[number], self.step(number)
        if isinstance(step, LayerStep) and _weight_shape(step):
            return any(size > 1 for size in _weight_shape(step)[2:])
        name = operation(vertex.node).lower() if step is None else f"{step.rule} {step.name.rpartition('.')[2]}"
        below = [self.source(edge).vertex for edge in vertex.edges if edge is not None]
        if name.startswith("cat") and all(map(self.is_linear, below)):
            return False  # of the results of several experts
        return bool(MIXING.search(name)) and (len(below) > 1 or not PRODUCTS.search(name))


def _bits(number: int) -> Iterator[int]:
    while number:
        low = number & -number
        yield low.bit_length() - 1
        number ^= low


def is_weighted(step: Step) -> bool:
    """Returns True if a step multiplies by weights, or by another tensor."""
    if isinstance(step, LayerStep):
        return len(_weight_shape(step)) > 1
    return WEIGHTED.search(step.rule) is not None


def _weight_shape(step: LayerStep) -> tuple[int, ...]:
    """Returns the shape of a layer's weight, or an empty tuple for layers without weights."""
    weight = getattr(step.layer_call.module, "weight", None)
    return tuple(weight.shape) if isinstance(weight, Tensor) else ()


def _is_idle(step: Step) -> bool:
    """Returns True if a step is the identity in evaluation mode."""
    return step.rule in ("dropout", "identity")


__all__ = ["SUMS", "Branch", "ResidualAdds", "is_weighted"]
