"""Sites: the parts of a transformer under their common names, derived from the graph of a recording.

The names of model families and layers play no role. A residual add is the sum of a tensor and a branch that depends on
it, where only the sum and the branch read the tensor. A branch that contains attention is an attention block; other
branches are MLPs or token mixers. Site names follow TransformerLens, without ``hook_``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from ..kernels.layer_step import LayerStep
from ..kernels.step import Step
from ..model.zero_one_routes import operation
from .graph import Graph
from .places import Buffer, Edge, Place

SYNONYMS = {"mlp.post": "mlp.neuron", "attn.z": "attn", "cross_attn.z": "cross_attn"}
"""Alternative spellings for the end of a site name."""
PART = re.compile(r"(?P<site>.*attn)\.head\.(?P<head>\d+)|(?P<layer>.*\.neuron)\.(?P<neuron>\d+)")
"""Pattern that matches the names of single heads and neurons of a site."""
PRODUCTS = re.compile("matmul|mm$|bmm|einsum")
WEIGHTED = re.compile(f"{PRODUCTS.pattern}|linear|conv")
"""Pattern that matches functions with weights. Layers are recorded as such if a difference is explained."""
SUMS = ("sum", "add", "sub", "rsub")
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
    """

    vertex: int
    stream: Buffer
    number: int
    inner: list[int]
    attention: list[int]
    crossing: list[int]
    skipped: int = -1


@dataclass
class Block:
    """Consecutive branches of one residual stream, from the input to the output."""

    branches: list[Branch] = field(default_factory=list)


def sites(graph: Graph) -> dict[str, Place]:
    """Returns the place of each site, keyed by name, in the order of the forward pass.

    The name of an attention call, such as ``blocks.1.attn``, refers to its output, with one row per head.

    Args:
        graph: The graph of a recording.
    """
    structure = Structure(graph)
    streams = _streams(structure)
    named: dict[str, Place] = {}
    for prefix, blocks in _prefixes(streams, structure):
        for number, block in enumerate(blocks):
            for name, place in _sites_of(block, structure):
                named[f"{prefix}blocks.{number}.{name}"] = place
    return named


class Structure:
    """Dependencies between the vertices of a graph and the residual adds among them.

    Attributes:
        below: The vertices below each vertex, as bit sets.
        branches: The residual adds, keyed by vertex, in the order of the forward pass.
    """

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        count = len(graph.vertices)
        self.below, self._readers = [0] * count, [0] * count
        for number in range(count - 1, -1, -1):
            for edge in graph.vertices[number].edges:
                if edge is not None:
                    self.below[number] |= self.below[edge.vertex] | 1 << edge.vertex
                    self._readers[self.source(edge).vertex] |= 0 if self._is_view(number) else 1 << number
        self.leaves = sum(1 << number for number, vertex in enumerate(graph.vertices) if vertex.leaf is not None)
        candidates: dict[int, Branch] = {}
        for number in range(count - 1, -1, -1):
            branch = self._residual(number, candidates)
            if branch is not None:
                candidates[number] = branch
        known = {number: branch for number, branch in candidates.items() if self._is_block(branch)}
        for branch in list(known.values()):
            known.pop(branch.skipped, None)
        self.branches = {n: branch for n, branch in known.items() if known.keys().isdisjoint(branch.inner)}

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
        step, edges = self.step(number), self.graph.vertices[number].edges
        if step is None or step.rule not in SUMS or len(edges) != 2 or None in edges:
            return None
        for branch, skip in ((0, 1), (1, 0)):
            top, stream = edges[branch], edges[skip]
            assert top is not None
            assert stream is not None
            top, stream = self.source(top), self.source(stream)
            skipped = []
            while not self.depends(top.vertex, stream.vertex) and stream.vertex in known:
                skipped.append(stream.vertex)
                stream = known[stream.vertex].stream  # skip a previous add, as for parallel attention and MLP
            if top != stream and self.depends(top.vertex, stream.vertex):
                found = self._branch(number, stream, branch)
                is_parallel = len(skipped) == 1 and any(self.depends(top.vertex, v) for v in self._weighted(found))
                return replace(found, skipped=skipped[0]) if is_parallel else found
        return None

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
        place = edges[others[0]] if others else None
        while place is not None and place.vertex in inner:
            step, edges = self.step(place.vertex), self.graph.vertices[place.vertex].edges
            joined = [number for number, edge in enumerate(edges) if edge is not None]
            if step is not None and len(joined) == 2 and PRODUCTS.search(step.rule):
                return Edge(place.vertex, joined[0]), Edge(place.vertex, joined[1])
            place = edges[joined[0]] if joined and (len(joined) == 1 or step is None or step.rule in SUMS) else None
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

        In addition, only the add and the vertices of its branch may read the stream.
        """
        within = self.below[branch.vertex] | 1 << branch.vertex
        if self._readers[branch.stream.vertex] & ~within:
            return False
        return self.is_mixer(branch.inner) or bool(self._weighted(branch))

    def is_linear(self, vertex: int) -> bool:
        """Returns True if a vertex multiplies by weights, like a linear layer or a convolution."""
        step, edges = self.step(vertex), self.graph.vertices[vertex].edges
        if step is None or step.attention is not None or sum(edge is not None for edge in edges) != 1:
            return False
        if isinstance(step, LayerStep):
            return len(_weight_shape(step)) > 1
        return WEIGHTED.search(step.rule) is not None

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


def _weight_shape(step: LayerStep) -> tuple[int, ...]:
    """Returns the shape of a layer's weight, or an empty tuple for layers without weights."""
    weight = getattr(step.layer_call.module, "weight", None)
    return tuple(weight.shape) if isinstance(weight, Tensor) else ()


def _is_idle(step: Step) -> bool:
    """Returns True if a step is the identity in evaluation mode."""
    return step.rule in ("dropout", "identity")


# -- streams and blocks ---------------------------------------------------------------------------------------------


def _streams(structure: Structure) -> list[list[Block]]:
    """Groups residual adds by stream and then by block, in the order of the forward pass."""
    streams: list[list[Branch]] = []
    of_add: dict[int, list[Branch]] = {}
    for branch in structure.branches.values():
        previous = _previous(branch, structure)
        stream = of_add.get(previous, []) if previous is not None else []
        if not stream:
            streams.append(stream)
        stream.append(branch)
        of_add[branch.vertex] = stream
    return [_blocks(stream, structure) for stream in streams]


def _previous(branch: Branch, structure: Structure) -> int | None:
    """Returns the last residual add on which a stream depends, or None if the stream depends on other inputs too."""
    start = branch.stream.vertex
    below = structure.below[start] | 1 << start
    previous = next((vertex for vertex in _bits(below) if vertex in structure.branches), None)
    if previous is None:
        return None
    return previous if structure.inputs_of(start) == structure.inputs_of(previous) else None


def _blocks(branches: Sequence[Branch], structure: Structure) -> list[Block]:
    blocks: list[Block] = []
    for branch in branches:
        is_mixer = not branch.attention and structure.is_mixer(branch.inner)
        own = blocks[-1].branches if blocks else []
        has_attention = any(other.attention for other in own)
        is_full = bool(own) and not own[-1].attention and not (structure.is_mixer(own[-1].inner) and not has_attention)
        is_self = len(branch.attention) > len(branch.crossing)
        is_next = is_self or (not branch.attention and (is_full or (is_mixer and not has_attention)))
        if not own or is_next:
            blocks.append(Block())
        blocks[-1].branches.append(branch)
    is_position = len(blocks) > 1 and _is_position(blocks[0].branches, structure)
    return blocks[1:] if is_position and any(branch.attention for branch in blocks[1].branches) else blocks


def _is_position(branches: Sequence[Branch], structure: Structure) -> bool:
    """Returns True if a block only adds a convolution that encodes positions."""
    return len(branches) == 1 and not branches[0].attention and sum(map(structure.is_linear, branches[0].inner)) == 1


def _prefixes(streams: list[list[Block]], structure: Structure) -> Iterator[tuple[str, list[Block]]]:
    """Yields each stream with the prefix of its site names, such as ``"encoder."``, or none for a single stream."""
    if not streams:
        return
    *others, last = sorted(streams, key=lambda blocks: -blocks[-1].branches[-1].vertex)
    has_cross = any(branch.crossing for block in last for branch in block.branches)
    for number, stream in enumerate(others):
        yield ("encoder." if len(others) == 1 else f"encoder{number}."), stream
    yield ("decoder." if has_cross else ""), last


# -- names ----------------------------------------------------------------------------------------------------------


def _sites_of(block: Block, structure: Structure) -> Iterator[tuple[str, Place]]:
    first, *_ = block.branches
    yield "resid_pre", first.stream
    has_attention = any(branch.attention for branch in block.branches)
    for position, branch in enumerate(block.branches):
        is_last = position == len(block.branches) - 1
        is_mixer = not has_attention and structure.is_mixer(branch.inner)
        yield from _sites_of_branch(branch, "mixer" if is_mixer else "mlp", structure)
        crossing = bool(branch.crossing) and len(branch.attention) == len(branch.crossing)
        name = "resid_post" if is_last else "resid_mid_cross" if crossing else "resid_mid"
        yield name, Buffer(branch.vertex, 0)


def _sites_of_branch(branch: Branch, kind: str, structure: Structure) -> Iterator[tuple[str, Place]]:
    whole = Edge(branch.vertex, branch.number)
    if not branch.attention:
        yield from _of_neurons(kind, branch.inner, structure)
        yield f"{kind}_out", whole
        return
    parts = _parallel(branch, structure)
    own = [vertex for vertex in branch.attention if vertex not in branch.crossing]
    for name, vertices in (("attn", own), ("cross_attn", branch.crossing)):
        for number, vertex in enumerate(reversed(vertices)):
            yield from _of_attention(name if len(vertices) == 1 else f"{name}{number}", vertex, branch, structure)
        if vertices:
            yield f"{name}_out", parts.get("attention", whole)
    if "mlp" in parts:
        place = parts["mlp"]
        top = structure.graph.buffer(place).vertex
        inner = [vertex for vertex in branch.inner if structure.depends(top, vertex)]
        kind = "mixer" if structure.is_mixer(inner) else "mlp"
        yield from _of_neurons(kind, inner, structure)
        yield f"{kind}_out", place


def _parallel(branch: Branch, structure: Structure) -> dict[str, Edge]:
    """Returns the edges of attention and MLP if a single branch adds both."""
    for vertex in [branch.vertex, *branch.inner]:
        step, edges = structure.step(vertex), structure.graph.vertices[vertex].edges
        if step is None or step.rule not in SUMS or len(edges) != 2:
            continue
        joined: dict[str, Edge] = {}
        for number, edge in enumerate(edges):
            members = [] if edge is None else [v for v in branch.inner if structure.depends(edge.vertex, v)]
            if any(vertex in branch.attention for vertex in members):
                joined["attention"] = _without_stream(Edge(vertex, number), branch, structure)
            elif any(map(structure.is_linear, members)):
                joined["mlp"] = Edge(vertex, number)
        if len(joined) == 2:
            return joined
    return {}


def _without_stream(place: Edge, branch: Branch, structure: Structure) -> Edge:
    """Returns the edge that reads the branch itself, given an edge that reads the sum of branch and stream."""
    while True:
        top = structure.source(structure.graph.buffer(place)).vertex
        step, edges = structure.step(top), structure.graph.vertices[top].edges
        is_stream = [edge is not None and structure.source(edge) == branch.stream for edge in edges]
        if step is None or step.rule not in SUMS or len(edges) != 2 or sum(is_stream) != 1:
            return place
        place = Edge(top, is_stream.index(False))


def _of_attention(name: str, vertex: int, branch: Branch, structure: Structure) -> Iterator[tuple[str, Place]]:
    """Yields the sites of the queries, keys, values and output of an attention call."""
    scores = structure.scores(vertex, branch.inner)
    assert scores is not None
    yield from zip((f"{name}.q", f"{name}.k", f"{name}.v"), (*scores, structure.values(vertex)), strict=True)
    yield name, Buffer(vertex, 0)


def _of_neurons(kind: str, inner: Sequence[int], structure: Structure) -> Iterator[tuple[str, Place]]:
    """Yields the sites of the tensors read by the last linear layers of a branch, each tensor once."""
    linear = [vertex for vertex in inner if structure.is_linear(vertex)]
    read: dict[Buffer, list[Edge]] = {}
    for vertex in reversed(linear):
        others = [other for other in linear if other != vertex]
        is_last = not any(structure.depends(other, vertex) for other in others)
        if is_last and any(structure.depends(vertex, other) for other in others):
            edges = structure.graph.vertices[vertex].edges
            number, edge = next((number, edge) for number, edge in enumerate(edges) if edge is not None)
            read.setdefault(structure.undivided(edge), []).append(Edge(vertex, number))
    for number, (buffer, places) in enumerate(read.items()):
        name = f"{kind}.neuron" if len(read) == 1 else f"{kind}.neuron{number}"
        yield name, places[0] if len(places) == 1 else buffer


__all__ = ["PART", "SYNONYMS", "sites"]
