"""Layers and pooling of torch_geometric: `make test-hosts`."""

from __future__ import annotations

import pytest
import torch

from nrm_plugin import RelevanceMeasure, at
from nrm_plugin.errors import UnsupportedOperationError
from tests.conftest import untouched
from tests.graph_nets import random_graph

pyg = pytest.importorskip("torch_geometric.nn", reason="torch_geometric is missing; see `make test-hosts`")

from torch_geometric.data import Batch, Data  # noqa: E402

from tests.hosts.graph_layers import LAYERS, POOLS, Net, Pooled  # noqa: E402


@pytest.mark.parametrize("is_pooled", [False, True], ids=["node", "graph"])
@pytest.mark.parametrize("name", LAYERS)
def test_relevance_is_conserved_in_a_layer(name, is_pooled):
    x, edges = random_graph(10, 30)
    net, x = Net(LAYERS[name], is_pooled).eval(), x.float()
    edges = edges[:, edges[1].argsort()]
    with untouched(net, x):
        target = 1 if is_pooled else (4, 1)
        mu = RelevanceMeasure(net, x, target, additional_forward_args=(edges,), batched=False)
    torch.testing.assert_close(mu.output, net(x, edges)[0 if is_pooled else 4, 1:].detach())
    for tap in ("input", "conv1", "conv2", "output"):
        total = mu.marginal(tap).flatten(1).sum(1) + mu.sink(tap) + mu.bypass(tap)
        assert float((total - 1).abs()) <= 1e-4 * max(1.0, float(mu.variation(tap)))
    assert float(mu.sink("input", "residual").abs()) <= 0.05
    nodes = mu.marginal("conv1").sum(2)[0]
    torch.testing.assert_close(mu(at("conv1")[[0, 3]]), nodes[[0, 3]].sum(0, keepdim=True))


@pytest.mark.parametrize("name", POOLS)
def test_relevance_is_conserved_in_a_pooling_layer(name):
    x, edges = random_graph(12, 30)
    net, x = Pooled(POOLS[name]()).eval(), x.float()
    mu = RelevanceMeasure(net, x, 1, additional_forward_args=(edges,), batched=False)
    torch.testing.assert_close(mu.output, net(x, edges)[0, 1:].detach())
    for tap in ("input", "conv", "output"):
        total = mu.marginal(tap).flatten(1).sum(1) + mu.sink(tap) + mu.bypass(tap)
        assert float((total - 1).abs()) <= 1e-4 * max(1.0, float(mu.variation(tap)))
    assert float(mu.sink("input", "residual").abs()) <= 0.05


@pytest.mark.filterwarnings("ignore:Sparse")
def test_a_pooling_layer_with_sparse_products_raises_and_names_the_operation():
    x, edges = random_graph(12, 30)
    net = Pooled(pyg.ASAPooling(8, 0.5)).eval()
    with pytest.raises(
        UnsupportedOperationError, match=r"sparse_coo_tensor.*creates a sparse tensor of computed values"
    ):
        RelevanceMeasure(net, x.float(), 1, additional_forward_args=(edges,), batched=False)


def test_the_target_selects_a_graph_of_a_batch():
    graphs = [Data(x=x.float(), edge_index=edges) for x, edges in (random_graph(6, 14), random_graph(5, 12, seed=1))]
    both = Batch.from_data_list(graphs)
    net = Net(LAYERS["GCN"], True).eval()
    mu = RelevanceMeasure(net, both.x, (1, 0), additional_forward_args=(both.edge_index, both.batch), batched=False)
    nu = RelevanceMeasure(net, graphs[1].x, 0, additional_forward_args=(graphs[1].edge_index,), batched=False)
    assert not mu.marginal("input")[0, :6].any()
    torch.testing.assert_close(mu.marginal("input")[:, 6:], nu.marginal("input"))


@pytest.mark.filterwarnings("ignore:Sparse")
def test_a_sparse_adjacency_matrix_is_equivalent_to_its_edges():
    x, edges = random_graph(8, 20)
    edges = torch.unique(edges, dim=1)
    net, x = Net(LAYERS["GCN"], True).eval(), x.float()
    ones = torch.ones(edges.shape[1])
    adjacency = torch.sparse_coo_tensor(edges.flip(0), ones, (8, 8), check_invariants=True).to_sparse_csr()
    mu, nu = (
        RelevanceMeasure(net, x, 1, additional_forward_args=(form,), batched=False) for form in (edges, adjacency)
    )
    torch.testing.assert_close(mu.output, nu.output)
    torch.testing.assert_close(mu.marginal("input"), nu.marginal("input"), rtol=0, atol=1e-5)
