"""Passes over small autograd graphs of routes, compared with the gradient. Their cost: tests/test_cost.py."""

from __future__ import annotations

import torch
from torch import Tensor

from nrm_plugin.recording.graph import Graph
from nrm_plugin.recording.places import Buffer, Edge, Sink
from nrm_plugin.recording.propagation import Cost, pull, push

X = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64, requires_grad=True)
CONSTANT = torch.tensor([4.0, 5.0], dtype=torch.float64)
OUTPUT = torch.cat([X.flip(0), CONSTANT, X.repeat(2)])
VECTORS = torch.rand((2, len(OUTPUT)), dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Collected:
    """Stores every vector, and multiplies those at one place by a mask."""

    def __init__(self, place: Buffer | Edge | None = None, mask: Tensor | None = None) -> None:
        self.vectors: dict[Buffer | Edge | Sink, dict[str, Tensor]] = {}
        self.kinds: set[str] = set()
        self._place, self._mask = place, mask

    def at_buffer(self, buffer: Buffer, vectors: dict[str, Tensor]) -> dict[str, Tensor]:
        self.vectors[buffer] = vectors
        return {key: self._mask * vector for key, vector in vectors.items()} if buffer == self._place else vectors

    at_edge = at_buffer

    def at_sink(self, sink: Sink, number: int, kind: str, vectors: dict[str, Tensor], share: Tensor) -> None:
        self.kinds.add(kind)
        self.vectors[sink] = {key: vector * share for key, vector in vectors.items()}


def graph_and_input() -> tuple[Graph, Buffer]:
    graph = Graph(OUTPUT, [X])
    return graph, Buffer(len(graph.vertices) - 1, 0)


def gradient(vector: Tensor) -> Tensor:
    (result,) = torch.autograd.grad(OUTPUT, X, vector, retain_graph=True)
    return result


def test_a_pass_down_is_the_gradient_and_constants_absorb_the_rest():
    graph, at_input = graph_and_input()
    visitor = Collected()
    cost = pull(graph, [(graph.output, {"a": VECTORS[0]}), (graph.output, {"b": VECTORS[1]})], visitor)
    for key, vector in zip("ab", VECTORS, strict=True):
        torch.testing.assert_close(visitor.vectors[at_input][key], gradient(vector))
        torch.testing.assert_close(visitor.vectors[Sink(0)][key].sum(), vector[3:5].sum())
    assert visitor.kinds == {"constants"}
    assert cost == Cost()


def test_vectors_of_one_key_that_start_at_one_buffer_add_up():
    graph, at_input = graph_and_input()
    visitor = Collected()
    pull(graph, [(graph.output, {"a": vector}) for vector in VECTORS], visitor)
    torch.testing.assert_close(visitor.vectors[at_input]["a"], gradient(VECTORS.sum(0)))


def test_what_the_visitor_returns_is_propagated():
    graph, at_input = graph_and_input()
    mask = torch.arange(len(OUTPUT)) < 3
    visitor = Collected(graph.output, mask)
    pull(graph, [(graph.output, {"a": VECTORS[0]})], visitor)
    torch.testing.assert_close(visitor.vectors[at_input]["a"], gradient(VECTORS[0] * mask))


def test_a_pass_up_is_the_transpose_of_a_pass_down():
    graph, at_input = graph_and_input()
    values = torch.rand((2, 3), dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for bound in (False, True):
        rows, cost = push(graph, at_input, graph.output, values, bound=bound)
        assert rows is not None
        for row, value in zip(rows, values, strict=True):
            for vector in VECTORS:
                torch.testing.assert_close((row * vector).sum(), (value * gradient(vector)).sum())
        assert cost == Cost()


def test_values_of_an_edge_are_pushed_through_this_edge_alone():
    graph, _ = graph_and_input()
    values = torch.ones((1, 3), dtype=torch.float64)
    rows, _ = push(graph, Edge(0, 0), graph.output, values)
    assert rows is not None
    assert rows[0].tolist() == [1.0, 1.0, 1.0, *[0.0] * 8]
    same, _ = push(graph, Edge(0, 0), Edge(0, 0), values)
    assert same is values


def test_costs_add_up():
    assert Cost(1, 2) + Cost(3, 4) == Cost(4, 6)
