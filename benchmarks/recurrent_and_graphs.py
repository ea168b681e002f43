"""Conservation check of recurrent layers and of layers from torch_geometric.

``python -m benchmarks.recurrent_and_graphs`` measures random networks under the default composite, and writes the
results as JSON and the tables of ``docs/recurrent-and-graphs.md``. It needs torch_geometric, which
``make graph-networks`` installs.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

from benchmarks import tables
from benchmarks.conservation import conservation_check, random_biases, store
from nrm_plugin import RelevanceMeasure
from tests.graph_nets import random_graph
from tests.hosts.graph_layers import LAYERS, POOLS, Net, Pooled

TIMES, FEATURES, HIDDEN = 10, 4, 8


class Last(nn.Module):
    """Classifies the last hidden state; with ``lengths`` the batch is packed."""

    def __init__(self, layer: nn.RNNBase, lengths: list[int] | None = None) -> None:
        super().__init__()
        self.rnn, self.head, self.lengths = layer, nn.Linear(HIDDEN, 2), lengths

    def forward(self, x: Tensor, *given: Tensor) -> Tensor:
        read: Any = x
        if self.lengths is not None:
            read = pack_padded_sequence(x, torch.tensor(self.lengths), batch_first=True, enforce_sorted=False)
        last = self.rnn(read, given)[1] if given else self.rnn(read)[1]
        return self.head((last[0] if isinstance(last, tuple) else last)[-1])


def recurrent() -> Iterator[tuple[str, RelevanceMeasure]]:
    """Yields recurrent networks by their name on the page."""
    x, state = torch.randn(4, TIMES, FEATURES), torch.randn(1, 4, HIDDEN)
    kinds: dict[str, type[nn.RNNBase]] = {"LSTM": nn.LSTM, "GRU": nn.GRU, "RNN": nn.RNN}
    for name, kind in kinds.items():
        torch.manual_seed(0)
        yield (
            f"{name}, {TIMES} time steps",
            RelevanceMeasure(Last(kind(FEATURES, HIDDEN, batch_first=True)).eval(), x, 1),
        )
    net = Last(nn.LSTM(FEATURES, HIDDEN, batch_first=True)).eval()
    yield "LSTM, user-supplied states", RelevanceMeasure(net, x, 1, additional_forward_args=(state, state.flip(1)))
    both = nn.GRU(FEATURES, HIDDEN, 2, batch_first=True, bidirectional=True)
    yield "GRU, two layers, both directions, packed", RelevanceMeasure(Last(both, [10, 4, 7, 10]).eval(), x, 1)


def graphs() -> Iterator[tuple[str, RelevanceMeasure]]:
    """Yields two layers of each kind with a mean over nodes; one layer with each kind of pooling."""
    x, edges = random_graph(50, 200)
    edges = edges[:, edges[1].argsort()]
    nets = {name: Net(layer, True) for name, layer in LAYERS.items()}
    nets |= {f"pooling: {name}": Pooled(pool()) for name, pool in POOLS.items()}
    for name, net in nets.items():
        model = random_biases(net)
        yield name, RelevanceMeasure(model, x.float(), 1, additional_forward_args=(edges,), batched=False)


def main() -> None:
    """Writes the results and the tables."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    results: dict[str, list[dict[str, Any]]] = {}
    for part, measures in (("recurrent", recurrent()), ("graphs", graphs())):
        for name, mu in measures:
            results.setdefault(part, []).append({"network": name, **conservation_check(mu)})
            print(results[part][-1], flush=True)
    store("recurrent_and_graphs", results, "torch_geometric")
    tables.write("recurrent_and_graphs")


if __name__ == "__main__":
    main()
