"""Routes of tensors in short formats: exact in float32, as autograd passes relevance between float32 tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from nrm_plugin.recording.graph import Graph
from nrm_plugin.recording.indexed_routes import indexed_route
from nrm_plugin.recording.places import Buffer, Edge
from nrm_plugin.recording.propagation import pull

SHORT = [torch.bfloat16, torch.float16]


def written(x: Tensor) -> Tensor:
    x = x.clone()
    x[:, :1] = x[:, 1:2] * 1
    return x


def unpooled(x: Tensor) -> Tensor:
    values, where = F.max_pool2d(x, 2, return_indices=True)
    return F.max_unpool2d(values, where, 2)


ROUTES: dict[str, Callable[[Tensor], Tensor]] = {
    "float": lambda x: x.float(),
    "double": lambda x: x.double(),
    "index": lambda x: x[:, [0, 0, 1]],
    "index of repeated rows": lambda x: x[torch.zeros(50, dtype=torch.long)],
    "masked_select": lambda x: x.masked_select(x > 0),
    "reflection": lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect"),
    "circular": lambda x: F.pad(x, (1, 1, 1, 1), mode="circular"),
    "constant": lambda x: F.pad(x, (1, 1, 1, 1)),
    "max_pool2d": lambda x: F.max_pool2d(x, 3, 1),
    "max_pool3d": lambda x: F.max_pool3d(x, 2),
    "adaptive": lambda x: F.adaptive_max_pool2d(x, 3),
    "unpooled": unpooled,
    "max": lambda x: x.max(),
    "amax": lambda x: x.amax(1),
    "take": lambda x: x.take(torch.tensor([0, 0, 3])),
    "cummax": lambda x: x.cummax(1)[0],
    "written": written,
    "copied": lambda x: torch.zeros(x.shape).copy_(x),
    "cat": lambda x: torch.cat([x, torch.ones(x.shape)]),
    "where": lambda x: torch.where(x > 0, x, 0.5),
    "expand": lambda x: x[:1].expand(50, -1, -1, -1),
}


def routed(route: Callable[[Tensor], Tensor], x: Tensor) -> Graph:
    leaf = x.detach().requires_grad_()
    return Graph(route(leaf.clone()), [leaf])


class AtLeaf:
    """The relevance that arrives at the last vertex."""

    def __init__(self, vertex: int) -> None:
        self.buffer = Buffer(vertex, 0)
        self.vectors: dict[int, Tensor] = {}

    def at_buffer(self, buffer: Buffer, vectors: dict[int, Tensor]) -> dict[int, Tensor]:
        if buffer == self.buffer:
            self.vectors = vectors
        return vectors

    def at_edge(self, edge: Edge, vectors: dict[int, Tensor]) -> dict[int, Tensor]:
        return vectors

    def at_sink(self, *args: Any) -> None:
        """Constants."""


def drawn(shape: Any, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("short", SHORT)
@pytest.mark.parametrize("name", ROUTES)
def test_relevance_is_not_rounded_to_a_short_format(name: str, short: torch.dtype) -> None:
    """Without ties among the values, of which each is in both formats."""
    x = (torch.randperm(96, generator=torch.Generator().manual_seed(1)).reshape(2, 3, 4, 4) - 30.0) / 4
    leaf = x.clone().requires_grad_()
    output = ROUTES[name](leaf.clone())
    relevance = drawn((2, *output.shape), 2) * 1e-6
    expected = [torch.autograd.grad(output, leaf, row.to(output.dtype), True)[0] for row in relevance]

    graph = routed(ROUTES[name], x.to(short))
    arrived = AtLeaf(len(graph.vertices) - 1)
    pull(graph, [(graph.output, dict(enumerate(relevance)))], arrived)
    for key, value in enumerate(expected):
        assert arrived.vectors[key].dtype == torch.float32
        torch.testing.assert_close(arrived.vectors[key], value, rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("short", SHORT)
@pytest.mark.parametrize("name", ["index", "max_pool2d", "copied", "written", "constant", "float"])
def test_the_transpose_and_the_share_of_constants(name: str, short: torch.dtype) -> None:
    """``<v, pull(R)> = <push(v), R>``, and ones at the inputs and constants reach each output once."""
    x = torch.arange(96.0).reshape(2, 3, 4, 4)[:, torch.randperm(3)].to(short)
    vertex = routed(ROUTES[name], x).vertices[0]
    shape = vertex.shapes[0]
    relevance = drawn((1, *shape), 3)
    parts, _ = vertex.pull([relevance])
    known = [part for part, edge in zip(parts, vertex.edges, strict=True) if edge is not None]
    values = [drawn(part.shape, 4) for part in known if part is not None]
    given = iter(values)
    (pushed,) = vertex.push([None if edge is None else next(given) for edge in vertex.edges], [None])
    assert pushed is not None
    there = sum(float((v * part).sum()) for v, part in zip(values, known, strict=True) if part is not None)
    assert float((pushed * relevance).sum()) == pytest.approx(there, rel=1e-4)

    ones = iter([torch.ones_like(value) for value in values])
    (reached,) = vertex.push([None if edge is None else next(ones) for edge in vertex.edges], [None])
    shares = vertex.constant_share()
    share = torch.zeros(shape) if shares is None else shares[0]
    assert reached is not None
    assert torch.equal(reached[0] + share, torch.ones(shape))
    assert (name == "constant") == bool(share.any())


def test_a_route_that_shares_among_ties_has_no_index() -> None:
    x = torch.ones(2, 3, dtype=torch.bfloat16, requires_grad=True)
    node: Any = (x * 1).amax(1).grad_fn
    route = lambda relevance: [node(*relevance)]  # noqa: E731
    assert indexed_route(route, [torch.zeros(2, dtype=torch.bfloat16)], [True]) is None
