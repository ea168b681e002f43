"""Sites: the parts of a transformer under their common names, derived from the graph of a recording.

The names of model families and layers play no role. The branches of residual adds are attention if they contain an
attention call, and otherwise MLPs or token mixers. Attention starts a block. An outer residual add around the branches
of a single attention, as in bottlenecks, delimits a block. Site names follow TransformerLens, without ``hook_``.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from .graph import Graph
from .places import Buffer, Edge, Place
from .residual_adds import SUMS, Branch, ResidualAdds

SYNONYMS = {r"(mlp\d*)\.post(\d*)$": r"\1.neuron\2", r"(attn\d*)\.z$": r"\1"}
"""Patterns of alternative spellings for the end of a site name, with their replacements."""
PART = re.compile(r"(?P<site>.*attn\d*)\.head\.(?P<head>\d+)|(?P<layer>.*\.neuron\d*)\.(?P<neuron>\d+)")
"""Pattern that matches the names of single heads and neurons of a site."""
SEVERAL = re.compile(r"(?P<part>resid_mid_cross|resid_mid|cross_attn|attn|mlp|mixer)(?P<rest>[._].*)?")
"""Pattern of the names that are numbered if a block has several of them."""


@dataclass
class Block:
    """Consecutive branches of one residual stream, from the input to the output.

    Attributes:
        branches: The branches.
        frame: The outer residual add that delimits the block, or None.
    """

    branches: list[Branch] = field(default_factory=list)
    frame: Branch | None = None


def sites(graph: Graph) -> dict[str, Place]:
    """Locates the sites of a transformer in a recorded graph, such as residual streams, heads and MLP neurons.

    The name of an attention call, such as ``blocks.1.attn``, refers to the output of the attention, which has one row
    per head.

    Args:
        graph: The graph of a recording.

    Returns:
        The place in the graph of each site, keyed by the name of the site, in the order of the forward pass.
    """
    structure = ResidualAdds(graph)
    streams = _streams(structure)
    named: dict[str, Place] = {}
    for prefix, blocks in _prefixes(streams, structure):
        for number, block in enumerate(blocks):
            for name, place in _numbered(list(_sites_of(block, structure))):
                named[f"{prefix}blocks.{number}.{name}"] = place
    return named


# -- streams and blocks ---------------------------------------------------------------------------------------------


def _streams(structure: ResidualAdds) -> list[list[Block]]:
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


def _previous(branch: Branch, structure: ResidualAdds) -> int | None:
    """Returns the last residual add on which a stream depends, or None if the stream depends on other inputs too."""
    start = branch.stream.vertex
    below = structure.below[start] | 1 << start
    previous = next((vertex for vertex in reversed(structure.branches) if below >> vertex & 1), None)
    if previous is None:
        return None
    return previous if structure.inputs_of(start) == structure.inputs_of(previous) else None


def _blocks(branches: Sequence[Branch], structure: ResidualAdds) -> list[Block]:
    blocks: list[Block] = []
    frames = [frame for frame in structure.frames if _is_single(frame, structure)]
    for branch in branches:
        frame = next((frame for frame in frames if branch.vertex in frame.inner), None)
        if not blocks or frame is not blocks[-1].frame or (frame is None and _is_next(branch, blocks[-1], structure)):
            blocks.append(Block(frame=frame))
        blocks[-1].branches.append(branch)
    is_position = len(blocks) > 1 and _is_position(blocks[0].branches, structure)
    return blocks[1:] if is_position and any(branch.attention for branch in blocks[1].branches) else blocks


def _is_next(branch: Branch, block: Block, structure: ResidualAdds) -> bool:
    """Returns True if a branch starts the block after the given one."""
    is_mixer = not branch.attention and structure.is_mixer(branch.inner)
    own = block.branches
    has_attention = any(other.attention for other in own)
    is_full = not own[-1].attention and not (structure.is_mixer(own[-1].inner) and not has_attention)
    is_self = len(branch.attention) > len(branch.crossing)
    return is_self or (not branch.attention and (is_full or (is_mixer and not has_attention)))


def _is_single(frame: Branch, structure: ResidualAdds) -> bool:
    """Returns True if exactly one of the residual adds inside an outer one contains attention within its stream."""
    own = [structure.branches[vertex] for vertex in frame.inner if vertex in structure.branches]
    return sum(len(branch.attention) > len(branch.crossing) for branch in own) == 1


def _is_position(branches: Sequence[Branch], structure: ResidualAdds) -> bool:
    """Returns True if a block only adds a convolution that encodes positions."""
    return len(branches) == 1 and not branches[0].attention and sum(map(structure.is_linear, branches[0].inner)) == 1


def _prefixes(streams: list[list[Block]], structure: ResidualAdds) -> Iterator[tuple[str, list[Block]]]:
    """Yields each stream with the prefix of its site names, such as ``"encoder."``, or none for a single stream."""
    if not streams:
        return
    *others, last = sorted(streams, key=lambda blocks: -blocks[-1].branches[-1].vertex)
    has_cross = any(branch.crossing for block in last for branch in block.branches)
    for number, stream in enumerate(others):
        yield ("encoder." if len(others) == 1 else f"encoder{number}."), stream
    yield ("decoder." if has_cross else ""), last


# -- names ----------------------------------------------------------------------------------------------------------


def _sites_of(block: Block, structure: ResidualAdds) -> Iterator[tuple[str, Place]]:
    branches = [*block.branches, *_rest(block, structure)]
    outer = block.frame or branches[-1]
    yield "resid_pre", (block.frame or branches[0]).stream
    has_attention = any(branch.attention for branch in branches)
    for branch in branches:
        is_mixer = not has_attention and structure.is_mixer(branch.inner)
        yield from _sites_of_branch(branch, "mixer" if is_mixer else "mlp", structure)
        crossing = bool(branch.crossing) and len(branch.attention) == len(branch.crossing)
        if branch.vertex != outer.vertex:
            yield "resid_mid_cross" if crossing else "resid_mid", Buffer(branch.vertex, 0)
    yield "resid_post", Buffer(outer.vertex, 0)


def _rest(block: Block, structure: ResidualAdds) -> Iterator[Branch]:
    """Yields the part of an outer branch above the last inner add, if it is an MLP rather than a projection."""
    last = block.branches[-1].vertex
    if block.frame is not None:
        inner = [vertex for vertex in block.frame.inner if structure.depends(vertex, last) and vertex != last]
        if any(_of_neurons("mlp", inner, structure)):
            yield replace(block.frame, stream=Buffer(last, 0), inner=inner, attention=[], crossing=[])


def _numbered(named: Sequence[tuple[str, Place]]) -> Iterator[tuple[str, Place]]:
    """Numbers the branches of a block, and the sums after them, whose names would otherwise be the same."""
    counts = Counter(name for name, _ in named)
    seen: Counter[str] = Counter()
    for name, place in named:
        match = SEVERAL.fullmatch(name)
        part, rest = (match["part"], match["rest"] or "") if match is not None else (name, "")
        last = part if part.startswith("resid") else f"{part}_out"
        yield f"{part}{seen[last]}{rest}" if counts[last] > 1 else name, place
        seen[last] += name == last


def _sites_of_branch(branch: Branch, kind: str, structure: ResidualAdds) -> Iterator[tuple[str, Place]]:
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


def _parallel(branch: Branch, structure: ResidualAdds) -> dict[str, Edge]:
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
            elif any(structure.is_linear(v) and not _is_attending(v, branch, structure) for v in members):
                joined["mlp"] = Edge(vertex, number)
        if len(joined) == 2:
            return joined
    return {}


def _is_attending(vertex: int, branch: Branch, structure: ResidualAdds) -> bool:
    """Returns True if attention reads the result of a vertex, or the vertex depends on attention weights."""
    scores = [found[0].vertex for call in branch.attention if (found := structure.scores(call, branch.inner))]
    is_read = any(structure.depends(call, vertex) for call in branch.attention)
    return is_read or any(structure.depends(vertex, product) for product in scores)


def _without_stream(place: Edge, branch: Branch, structure: ResidualAdds) -> Edge:
    """Returns the edge that reads the branch itself, given an edge that reads the sum of branch and stream."""
    while True:
        top = structure.source(structure.graph.buffer(place)).vertex
        step, edges = structure.step(top), structure.graph.vertices[top].edges
        is_stream = [edge is not None and structure.source(edge) == branch.stream for edge in edges]
        if step is None or step.rule not in SUMS or len(edges) != 2 or sum(is_stream) != 1:
            return place
        place = Edge(top, is_stream.index(False))


def _of_attention(name: str, vertex: int, branch: Branch, structure: ResidualAdds) -> Iterator[tuple[str, Place]]:
    """Yields the sites of the queries, keys, values and output of an attention call."""
    scores = structure.scores(vertex, branch.inner)
    assert scores is not None
    yield from zip((f"{name}.q", f"{name}.k", f"{name}.v"), (*scores, structure.values(vertex)), strict=True)
    yield name, Buffer(vertex, 0)


def _of_neurons(kind: str, inner: Sequence[int], structure: ResidualAdds) -> Iterator[tuple[str, Place]]:
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
