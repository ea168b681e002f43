"""Layers and pooling of torch_geometric, and small networks of them, for tests and benchmarks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch_geometric.nn as pyg
from torch import Tensor, nn


def mlp(inputs: int, outputs: int = 8) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, outputs), nn.ReLU(), nn.Linear(outputs, outputs))


class WithEdges(nn.Module):
    """A layer with edge features or edge types; ``inputs`` is given if the layer preserves its width."""

    def __init__(self, layer: nn.Module, inputs: int | None = None, kinds: int = 0) -> None:
        super().__init__()
        self.layer, self.kinds = layer, kinds
        self.before = nn.Identity() if inputs is None else nn.Linear(inputs, 8)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        numbers = torch.arange(edges.shape[1])
        attributes = numbers % self.kinds if self.kinds else (numbers[:, None] * torch.tensor([0.3, 0.7, 1.1])).sin()
        return self.layer(self.before(x), edges, attributes)


class Narrow(nn.Module):
    """A layer that preserves its width."""

    def __init__(self, layer: nn.Module, inputs: int) -> None:
        super().__init__()
        self.before, self.layer = nn.Linear(inputs, 8), layer

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        return self.layer(self.before(x), edges)


class Initial(Narrow):
    """A layer with a residual connection to the initial features."""

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        h = self.before(x)
        return self.layer(h, h, edges)


class Placed(nn.Module):
    """A layer whose nodes have positions in space."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        positions = (torch.arange(len(x))[:, None] * torch.tensor([0.3, 0.7, 1.1])).sin()
        return self.layer(x, positions, edges)


LAYERS: dict[str, Callable[[int], nn.Module]] = {
    "AntiSymmetric": lambda i: Narrow(pyg.AntiSymmetricConv(8), i),
    "APPNP": lambda i: Narrow(pyg.APPNP(3, 0.1), i),
    "ARMA": lambda i: pyg.ARMAConv(i, 8),
    "CG": lambda i: WithEdges(pyg.CGConv(8, 3), i),
    "Cheb": lambda i: pyg.ChebConv(i, 8, 2),
    "ClusterGCN": lambda i: pyg.ClusterGCNConv(i, 8),
    "Edge": lambda i: pyg.EdgeConv(mlp(2 * i)),
    "EG": lambda i: pyg.EGConv(i, 8, num_heads=2),
    "FeaSt": lambda i: pyg.FeaStConv(i, 8, heads=2),
    "FiLM": lambda i: pyg.FiLMConv(i, 8),
    "GAT": lambda i: pyg.GATConv(i, 4, heads=2),
    "Gated": lambda i: pyg.GatedGraphConv(8, 2),
    "GATv2": lambda i: pyg.GATv2Conv(i, 4, heads=2),
    "GATv2, edges": lambda i: WithEdges(pyg.GATv2Conv(i, 4, heads=2, edge_dim=3)),
    "GCN": lambda i: pyg.GCNConv(i, 8),
    "GCN2": lambda i: Initial(pyg.GCN2Conv(8, 0.1), i),
    "GEN": lambda i: pyg.GENConv(i, 8),
    "General": lambda i: pyg.GeneralConv(i, 8),
    "GIN": lambda i: pyg.GINConv(mlp(i)),
    "GINE": lambda i: WithEdges(pyg.GINEConv(mlp(i), edge_dim=3)),
    "GMM": lambda i: WithEdges(pyg.GMMConv(i, 8, 3, 2)),
    "GPS": lambda i: Narrow(pyg.GPSConv(8, pyg.GCNConv(8, 8), heads=2), i),
    "Graph": lambda i: pyg.GraphConv(i, 8),
    "Hypergraph": lambda i: pyg.HypergraphConv(i, 8),
    "LE": lambda i: pyg.LEConv(i, 8),
    "MF": lambda i: pyg.MFConv(i, 8),
    "NN": lambda i: WithEdges(pyg.NNConv(i, 8, nn.Linear(3, 8 * i))),
    "PNA": lambda i: pyg.PNAConv(i, 8, ["mean", "max", "std"], ["identity"], torch.tensor([1, 2, 3])),
    "PointNet": lambda i: Placed(pyg.PointNetConv(mlp(i + 3))),
    "PointTransformer": lambda i: Placed(pyg.PointTransformerConv(i, 8)),
    "ResGated": lambda i: pyg.ResGatedGraphConv(i, 8),
    "RGCN": lambda i: WithEdges(pyg.RGCNConv(i, 8, 3), kinds=3),
    "SAGE": lambda i: pyg.SAGEConv(i, 8),
    "SAGE lstm": lambda i: pyg.SAGEConv(i, 8, aggr="lstm"),
    "SAGE max": lambda i: pyg.SAGEConv(i, 8, aggr="max"),
    "SG": lambda i: pyg.SGConv(i, 8, K=2),
    "SSG": lambda i: pyg.SSGConv(i, 8, 0.1),
    "SuperGAT": lambda i: pyg.SuperGATConv(i, 4, heads=2),
    "TAG": lambda i: pyg.TAGConv(i, 8),
    "Transformer": lambda i: pyg.TransformerConv(i, 4, heads=2),
    "Transformer, edges": lambda i: WithEdges(pyg.TransformerConv(i, 4, heads=2, edge_dim=3, beta=True)),
}
"""Layers by name; each takes the number of input features and returns eight features."""

POOLS: dict[str, Callable[[], nn.Module]] = {
    "attentional": lambda: pyg.AttentionalAggregation(nn.Linear(8, 1)),
    "GMT": lambda: pyg.GraphMultisetTransformer(8, 2),
    "LSTM": lambda: pyg.LSTMAggregation(8, 8),
    "median": pyg.MedianAggregation,
    "power mean": pyg.PowerMeanAggregation,
    "quantile": lambda: pyg.QuantileAggregation(0.4),
    "SAG": lambda: pyg.SAGPooling(8, 0.5),
    "Set2Set": lambda: nn.Sequential(pyg.Set2Set(8, 2), nn.Linear(16, 8)),
    "set transformer": lambda: pyg.SetTransformerAggregation(8),
    "softmax": lambda: pyg.SoftmaxAggregation(learn=True),
    "standard deviation": pyg.StdAggregation,
    "top k": lambda: pyg.TopKPooling(8, 0.5),
}


class Net(nn.Module):
    """Two layers of one type and a head, for every node or for every graph."""

    def __init__(self, layer: Any, is_pooled: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv1, self.conv2, self.head, self.is_pooled = layer(3), layer(8), nn.Linear(8, 2), is_pooled

    def forward(self, x: Tensor, edge_index: Tensor, batch: Tensor | None = None) -> Tensor:
        h = self.conv2(self.conv1(x, edge_index).relu(), edge_index).relu()
        return self.head(pyg.global_mean_pool(h, batch) if self.is_pooled else h)


class Pooled(nn.Module):
    """A layer, a pooling layer, and a head."""

    def __init__(self, pool: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.pool, self.head = pyg.GCNConv(3, 8), pool, nn.Linear(8, 2)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        h, batch = self.conv(x, edge_index).relu(), torch.zeros(len(x), dtype=torch.long)
        if isinstance(self.pool, nn.Sequential):
            return self.head(self.pool[1](self.pool[0](h, batch)))
        if isinstance(self.pool, pyg.aggr.Aggregation):
            return self.head(self.pool(h, batch))
        return self.head(pyg.global_mean_pool(self.pool(h, edge_index, batch=batch)[0], None))
