"""The graph of a recording, on small autograd graphs of routes.

Covers: nrm_plugin.recording.places.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nrm_plugin.recording.graph import Graph
from nrm_plugin.recording.places import Buffer, Edge, Sink


def leaf(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


def vertex_of(graph: Graph, tensor: Tensor) -> int:
    """The vertex that wrote a tensor, or the end of the graph at a leaf."""
    if tensor.grad_fn is not None:
        return graph.position[tensor.grad_fn]
    return next(index for index, vertex in enumerate(graph.vertices) if vertex.leaf is tensor)


def test_a_walk_meets_every_vertex_before_those_that_it_reads_from():
    x = leaf(1.0, 2.0)
    graph = Graph(torch.cat([x.flip(0), x.unsqueeze(0).expand(2, 2).flatten()]), [x])
    assert graph.output == Buffer(0, 0)
    assert graph.shape(graph.output) == (6,)
    assert graph.vertices[-1].leaf is x
    for index, vertex in enumerate(graph.vertices):
        assert all(buffer is not None and buffer.vertex > index for buffer in vertex.edges)


def test_tensors_that_do_not_depend_on_the_inputs_are_constants():
    x, parameter = leaf(1.0, 2.0), leaf(3.0)
    joined = torch.cat([x, parameter.flip(0)])
    graph = Graph(joined, [x])
    assert [vertex.leaf for vertex in graph.vertices] == [None, x]
    assert graph.vertices[0].edges == (Buffer(1, 0), None)
    shares = graph.vertices[0].constant_share()
    assert shares is not None
    assert [share.tolist() for share in shares] == [[0.0, 0.0, 1.0]]


def test_both_parts_are_read_if_both_are_inputs():
    x, parameter = leaf(1.0, 2.0), leaf(3.0)
    joined = torch.cat([x, parameter.flip(0)])
    graph = Graph(joined, [x, parameter])
    assert {id(vertex.leaf) for vertex in graph.vertices if vertex.leaf is not None} == {id(x), id(parameter)}
    assert None not in graph.vertices[0].edges
    assert graph.vertices[0].constant_share() is None


def test_an_output_of_constants_alone_is_one_vertex():
    graph = Graph(leaf(1.0).flip(0).flip(0), [leaf(2.0)])
    assert len(graph.vertices) == 1
    assert graph.vertices[0].edges == (None,)


def test_marks_below_are_those_that_a_walk_can_still_cross():
    x, y = leaf(1.0, 2.0), leaf(3.0)
    flipped = x.flip(0)
    rolled = flipped.roll(1)
    joined = torch.cat([rolled, flipped, y])
    graph = Graph(joined, [x, y])
    top, rolling, flipping, end, other = (vertex_of(graph, tensor) for tensor in (joined, rolled, flipped, x, y))
    on_output, on_flipped, on_skip, on_x, on_y = 1, 2, 4, 8, 16
    marks = graph.marks_below(
        {
            graph.output: on_output,
            Buffer(flipping, 0): on_flipped,
            Edge(top, 1): on_skip,
            Buffer(end, 0): on_x,
            Buffer(other, 0): on_y,
        }
    )
    assert marks.below_edge[top] == (on_flipped | on_x, on_skip | on_flipped | on_x, on_y)
    assert marks.below_vertex[top] == on_flipped | on_skip | on_x | on_y
    assert marks.below_edge[rolling] == (on_flipped | on_x,)
    assert marks.below_vertex[flipping] == on_x
    assert marks.below_vertex[end] == marks.below_vertex[other] == 0


def test_a_place_is_a_key_and_buffers_are_crossed_before_the_edges_below_them():
    assert sorted([Edge(1, 0), Buffer(1, 0), Edge(0, 2), Buffer(0, 0)], key=lambda place: place.order) == [
        Buffer(0, 0),
        Edge(0, 2),
        Buffer(1, 0),
        Edge(1, 0),
    ]
    assert len({Buffer(0, 1), Buffer(0, 1), Edge(0, 1), Sink(0), Sink(0)}) == 3


def test_a_view_in_the_same_shape_passes_the_relevance_itself():
    x = leaf(1.0, 2.0)
    viewed, other = x.view_as(x), x.view(2, 1)
    graph = Graph(torch.cat([viewed, other.flatten()]), [x])
    row = torch.tensor([[3.0, -1.0]]).double()
    same = graph.vertices[vertex_of(graph, viewed)]
    given = [row[0]]
    assert same.is_identity
    assert same.route(given)[0] is given[0]
    assert same.pull([row])[0][0] is row
    reshaped = graph.vertices[vertex_of(graph, other)]
    assert not reshaped.is_identity
    assert reshaped.route([row[0].view(2, 1)])[0].shape == (2,)
