"""Graph networks in plain torch that compute the same as torch_geometric's layers of the same names."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def looped(edges: Tensor, nodes: int) -> Tensor:
    """The edges, with an additional edge from every node to itself."""
    return torch.cat([edges, torch.arange(nodes).expand(2, -1)], 1)


class GCN(nn.Module):
    """``D^-1/2 (A + 1) D^-1/2 X W + b``."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.lin = nn.Linear(inputs, outputs, bias=False)
        self.bias = nn.Parameter(torch.randn(outputs) / 10)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        row, col = looped(edges, len(x))
        degree = torch.bincount(col, minlength=len(x)).to(x.dtype)
        h = self.lin(x)
        messages = h.index_select(0, row) * (degree[row] * degree[col]).rsqrt().unsqueeze(1)
        return torch.zeros_like(h).index_add_(0, col, messages) + self.bias


class GIN(nn.Module):
    """``MLP((1 + ε) x_i + Σ x_j)``."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.nn = nn.Sequential(nn.Linear(inputs, outputs), nn.ReLU(), nn.Linear(outputs, outputs))

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        row, col = edges
        total = torch.zeros_like(x).scatter_add(0, col.unsqueeze(1).expand(-1, x.shape[1]), x[row])
        return self.nn(1.1 * x + total)


class GAT(nn.Module):
    """Attention over neighbors, two heads."""

    def __init__(self, inputs: int, outputs: int, heads: int = 2) -> None:
        super().__init__()
        self.lin, self.shape = nn.Linear(inputs, outputs, bias=False), (heads, outputs // heads)
        self.to_node, self.of_node = (nn.Parameter(torch.randn(self.shape)) for _ in range(2))
        self.bias = nn.Parameter(torch.randn(outputs) / 10)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        row, col = looped(edges, len(x))
        h = self.lin(x).view(-1, *self.shape)
        score = nn.functional.leaky_relu((h * self.of_node).sum(-1)[row] + (h * self.to_node).sum(-1)[col], 0.2)
        index = col.unsqueeze(1).expand_as(score)
        top = score.new_zeros(len(x), len(self.shape)).scatter_reduce(
            0, index, score.detach(), "amax", include_self=False
        )
        weight = (score - top[col]).exp()
        weight = weight / score.new_zeros(top.shape).scatter_add(0, index, weight)[col]
        return torch.zeros_like(h).index_add(0, col, weight.unsqueeze(-1) * h[row]).flatten(1) + self.bias


class SAGE(nn.Module):
    """``W_l mean x_j + W_r x_i``."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.l, self.r = nn.Linear(inputs, outputs), nn.Linear(inputs, outputs, bias=False)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        row, col = edges
        index = col.unsqueeze(1).expand(-1, x.shape[1])
        mean = x.new_zeros(x.shape).scatter_reduce(0, index, x[row], "mean", include_self=False)
        return self.l(mean) + self.r(x)


LAYERS: dict[str, Any] = {kind.__name__: kind for kind in (GCN, GIN, GAT, SAGE)}


class GraphNet(nn.Module):
    """Two layers and a head, for every node or for every graph."""

    def __init__(self, layer: Any, inputs: int = 3, is_pooled: bool = False) -> None:
        super().__init__()
        self.conv1, self.conv2, self.head = layer(inputs, 4), layer(4, 4), nn.Linear(4, 2)
        self.is_pooled = is_pooled

    def forward(self, x: Tensor, edges: Tensor, graph: Tensor | None = None) -> Tensor:
        h = self.conv2(self.conv1(x, edges).relu(), edges).relu()
        if self.is_pooled:
            graph = torch.zeros(len(x), dtype=torch.long) if graph is None else graph
            count = torch.bincount(graph).to(x.dtype)
            h = h.new_zeros(len(count), h.shape[1]).index_add(0, graph, h) / count.unsqueeze(1)
        return self.head(h)


def random_graph(nodes: int, edges: int, seed: int = 0, features: int = 3) -> tuple[Tensor, Tensor]:
    """Features in float64 and edges between different nodes; every node has an incoming edge."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn((nodes, features), generator=draw, dtype=torch.float64)
    col = torch.cat([torch.arange(nodes), torch.randint(nodes, (edges - nodes,), generator=draw)])
    row = (col + torch.randint(1, nodes, (edges,), generator=draw)) % nodes
    return x, torch.stack([row, col])
