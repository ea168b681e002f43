r"""Attribution graph of a measure: outputs, features, errors and inputs, connected by direct relevance.

.. math:: A_{ji} = \mu\big(j \cap i \cap \neg \textstyle\bigcup\, \text{nodes between } j \text{ and } i\big)

Walks can pass through features that are not nodes, so the selection of nodes loses no relevance. If no mass is
negative, the influence of a node therefore equals the mass of the walks through it that cross no error above it. The
graph follows circuit-tracer; the definition of its edges by the measure is new in this package.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor, nn

from ..errors import InputError, brief, printable
from ..events.event import Event, at
from ..measure.groups import Over, labels_of
from ..measure.measure import RelevanceMeasure
from .attribution_graph import AttributionGraph, GraphNode, Kind
from .features import ordered_sites


@dataclass(frozen=True)
class _Tap:
    """Nodes of an attribution graph whose neurons belong to one recorded tensor (tap).

    Attributes:
        name: Name of the tap.
        nodes: Nodes at this tap.
        labels: Node index of each neuron, of shape ``tap.shape[1:]``; neurons that are not nodes have the number of
            nodes.
        targets: Number of nodes with incoming edges: all except errors and inputs, which come last.
    """

    name: str
    nodes: list[GraphNode]
    labels: Tensor
    targets: int

    def event(self, number: int) -> Event:
        """Returns the event that a walk crosses a node."""
        return at(self.name)[self.labels == number]

    @property
    def any(self) -> Event:
        """The event that a walk crosses any of the nodes."""
        return at(self.name)[self.labels < len(self.nodes)]


def attribution_graph(
    mu: RelevanceMeasure,
    model: nn.Module,
    top: int = 100,
    sample: int | None = None,
    inputs: Over = "position",
    input_layer: str | None = None,
    names: Mapping[str, Sequence[str]] | None = None,
) -> AttributionGraph:
    """Computes the graph of direct relevance between outputs, the most relevant features, errors and inputs.

    The nodes are the outputs with nonzero weight, the ``top`` features (each at one position), one error per layer and
    position, and the groups of the input. Each output and feature takes one relevance vector per lower layer.

    Args:
        mu: A measure of ``model``.
        model: The model returned by :func:`~nrm_plugin.with_features`.
        top: Number of features, selected by absolute mass.
        sample: Index of the sample; required if the measure has several.
        inputs: Groups of the input: ``"position"``, ``"channel"``, ``"neuron"`` or labels.
        input_layer: The tap of the input nodes; by default the first tap: ``"input"``, or the embedding of integer
            inputs.
        names: Names of the nodes, such as ``{"input": tokens, "output": classes}``; names of features are keyed by
            layer name.

    Raises:
        InputError: If the sample does not exist or ``top`` is not positive.

    Examples:
        >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> traced = with_features(net, {"1": Dictionary(torch.rand(4, 8), torch.rand(8, 4))})
        >>> mu = RelevanceMeasure(traced, torch.randn(5, 3), 1)
        >>> graph = attribution_graph(mu, traced, top=3, sample=0, inputs="neuron")
        >>> [node.kind for node in graph.nodes]
        ['output', 'feature', 'feature', 'feature', 'error', 'input', 'input', 'input']
        >>> graph.edges.shape
        torch.Size([8, 8])

    Source: docs/features.md.
    """
    number = _sample(mu, sample, top)
    taps = _taps(mu, model, top, number, names or {})
    taps.append(_inputs(mu, input_layer or mu.layers[0], inputs, (names or {}).get("input")))
    offsets = [0]
    for tap in taps:
        offsets.append(offsets[-1] + len(tap.nodes))
    edges = torch.zeros(offsets[-1], offsets[-1], dtype=torch.float64)
    for upper, target in enumerate(taps):
        for lower in range(upper + 1, len(taps)):
            between = [tap.any for tap in taps[upper + 1 : lower]]
            rows = _edges(mu, target, taps[lower], between, number)
            into = slice(offsets[upper], offsets[upper] + len(rows))
            edges[into, offsets[lower] : offsets[lower + 1]] = rows
    weights = torch.zeros(offsets[-1], dtype=torch.float64)
    weights[: offsets[1]] = mu.marginal("output", over=taps[0].labels)[number, : offsets[1]].double().cpu().abs()
    return AttributionGraph(tuple(node for tap in taps for node in tap.nodes), edges, weights)


def _sample(mu: RelevanceMeasure, sample: int | None, top: int) -> int:
    if sample is None and mu.batch > 1:
        raise InputError(f"an attribution graph covers one sample, and the measure has {mu.batch}: pass sample=.")
    if sample is not None and not 0 <= sample < mu.batch:
        raise InputError(f"sample={brief(sample)}: the measure has samples 0 to {mu.batch - 1}.")
    if not isinstance(top, int) or top < 1:
        raise InputError(f"top={brief(top)} must be an integer of at least 1.")
    return sample or 0


def _edges(mu: RelevanceMeasure, target: _Tap, source: _Tap, between: list[Event], number: int) -> Tensor:
    """Returns the mass of the walks from targets to sources with no nodes in between, in shape ``(targets, K)``."""
    events = [reduce(lambda event, tap: event & ~tap, between, target.event(k)) for k in range(target.targets)]
    if not events:
        return torch.zeros(0, len(source.nodes), dtype=torch.float64)
    masses = mu.marginal(source.name, over=source.labels, joint=events)
    return masses[:, number, : len(source.nodes)].double().cpu()


# -- the nodes of each tap --------------------------------------------------------------------------------------------


def _taps(
    mu: RelevanceMeasure, model: nn.Module, top: int, number: int, names: Mapping[str, Sequence[str]]
) -> list[_Tap]:
    """Returns the nodes of the output and of each layer with features, from the output to the input."""
    sites = ordered_sites(mu, model)
    counts = {site: len(module.dictionary) for site, module in sites.items()}
    maps = mu.marginal([f"{site}.features" for site in sites])
    masses = [maps[f"{site}.features"][number][..., :count].reshape(-1).abs().cpu() for site, count in counts.items()]
    together = torch.cat(masses)
    chosen = torch.zeros(len(together), dtype=torch.bool)
    chosen[together.topk(min(top, len(together))).indices] = True
    chosen &= together > 0
    parts = torch.split(chosen, [len(part) for part in masses])
    taps = [_outputs(mu, len(sites), number, names.get("output"))]
    for level, (site, part) in enumerate(zip(sites, parts, strict=True)):
        shape = mu.shape(f"{site}.features")[1:]
        taps.append(_features(site, len(sites) - 1 - level, shape, counts[site], part, names.get(site)))
    return taps


def _outputs(mu: RelevanceMeasure, layer: int, number: int, names: Sequence[str] | None) -> _Tap:
    masses = mu.marginal("output")[number].cpu()
    width = masses.shape[-1] if masses.ndim else 1
    flat = masses.reshape(-1)
    labels = torch.full(flat.shape, int((flat != 0).sum()))
    nodes: list[GraphNode] = []
    for neuron in flat.abs().argsort(descending=True)[: int((flat != 0).sum())].tolist():
        labels[neuron] = len(nodes)
        nodes.append(_node("output", layer, neuron // width, neuron % width, names))
    return _Tap("output", nodes, labels.reshape(masses.shape), len(nodes))


def _features(
    site: str, layer: int, shape: torch.Size, count: int, chosen: Tensor, names: Sequence[str] | None
) -> _Tap:
    neurons, width = chosen.nonzero().flatten(), shape[-1]
    positions = shape[:-1].numel()
    labels = torch.full((positions, width), len(neurons) + positions)
    labels[neurons // count, neurons % count] = torch.arange(len(neurons))
    labels[:, count:] = len(neurons) + torch.arange(positions).unsqueeze(1)
    nodes = [_node("feature", layer, neuron // count, neuron % count, names) for neuron in neurons.tolist()]
    nodes += [GraphNode("error", layer, position, None, "error") for position in range(positions)]
    return _Tap(f"{site}.features", nodes, labels.reshape(shape), len(neurons))


def _inputs(mu: RelevanceMeasure, layer: str, over: Over, names: Sequence[str] | None) -> _Tap:
    labels = labels_of(mu._tap(layer), over)
    count = int(labels.max()) + 1
    nodes = [GraphNode("input", -1, k, None, _name(k, "input", names)) for k in range(count)]
    return _Tap(layer, nodes, labels, 0)


def _node(kind: Kind, layer: int, position: int, unit: int, names: Sequence[str] | None) -> GraphNode:
    return GraphNode(kind, layer, position, unit, _name(unit, kind, names))


def _name(index: int, kind: Kind, names: Sequence[str] | None) -> str:
    if names is None:
        return str(index)
    if index >= len(names):
        raise InputError(f"names= has {len(names)} names of {kind} nodes, but one has the index {index}.")
    return printable(names[index])


__all__ = ["attribution_graph"]
