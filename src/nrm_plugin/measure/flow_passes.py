r"""Passes that compute the joint relevance between the nodes of a flow and the heat maps of the nodes.

One downward pass per layer yields the joint relevance of its nodes with the nodes of all lower layers. Downward passes
stop at a **middle** tap, which every walk to the lowest layer crosses. A transposed pass propagates the few groups of
the lowest layer up to the same tap. The joint relevance of a node ``A`` and a group ``B`` of the lowest layer is then a
sum over the neurons ``i`` of the middle tap,

.. math:: \mu(A \cap B) = \sum_i \mu(A \cap \{n_m = i\}) \; \mu(B \mid n_m = i)

The sum is exact because walks form a Markov chain: below a neuron, relevance does not depend on the walk above it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..model.autocast import exact
from ..recording.propagation import push
from ..recording.taps import Tap
from .groups import by_label
from .joints import propagated_to
from .layer_taps import separates
from .memory_budget import in_chunks, width_of

POSITIONS = 48
"""Number of positions along each side of a tap that is sufficient for flow heat maps."""


class FlowPasses:
    """Computes the joint relevance between the nodes of a flow graph, for all pairs of layers, in one pass per layer.

    Args:
        mu: The measure whose flow is computed.
        taps: The recorded tensors of the layers, from the output to the input.
        labels: Node index of each neuron in each layer.
        maps: The tap whose positions form the heat maps, or None for no heat maps.

    Attributes:
        joints: Joint relevance of shape ``(N, K_upper, K_lower)``, keyed by the indices of the upper and the lower
            layer.
        maps: Joint relevance of each node and each position, of shape ``(N, K, *positions)``, for each layer at or
            above the tap of the heat maps.
    """

    def __init__(self, mu: Any, taps: Sequence[Tap], labels: Sequence[Tensor], maps: Tap | None) -> None:
        self.mu, self.taps = mu, list(taps)
        self.joints: dict[tuple[int, int], Tensor] = {}
        self.maps: dict[int, Tensor] = {}
        self._labels = [one.to(mu._recording.graph.device(tap.place)) for one, tap in zip(labels, taps, strict=True)]
        self._map_tap = maps
        self._stop = _stop(mu, self.taps, maps)
        totals = mu._pass([*taps, self._stop])
        self._relevance: list[Tensor] = [totals.relevance(tap) for tap in taps]
        self._at_stop: Tensor = totals.relevance(self._stop)
        last = len(taps) - 1
        self._is_split = last > 0 and self._stop.place != taps[-1].place and mu._is_below(taps[-1].place, self._stop)
        self._given = self._transposed() if self._is_split else None
        for number in range(last + (not self._is_split)):
            self._run(number)

    def _run(self, number: int) -> None:
        """Runs the pass for the nodes of a layer and sums the relevance arriving at lower layers, node by node."""
        nodes, upper = self._nodes(number), self.taps[number]
        places = {self._stop.place} | {tap.place for tap in self.taps[number + 1 :]}
        below = [tap for tap in self._layers() if tap.place in places and tap.place != upper.place]
        used = [node for node, vector in enumerate(nodes) if bool(vector.any())]
        if len(used) == 1 and upper.place == self.mu._recording.graph.output:
            arrived = {tap.place: self._marginal(tap).unsqueeze(0) for tap in below}
        else:
            arrived = self._propagated(upper, below, nodes[used]) if below and used else {}
        arrived[upper.place] = nodes[used]
        for lower in range(number + 1, len(self.taps)):
            self._store(number, lower, used, len(nodes), arrived)
        if self._map_tap is not None and self._map_tap.place in arrived:
            rows = _all_rows(arrived[self._map_tap.place], used, len(nodes))
            self.maps[number] = self._positions(rows, self._map_tap)

    def _layers(self) -> list[Tap]:
        """Returns the taps at which vectors are collected. Passes stop at the last one."""
        layers = self.taps[: -1 if self._is_split else None]
        return layers if any(tap.place == self._stop.place for tap in layers) else [*layers, self._stop]

    def _marginal(self, tap: Tap) -> Tensor:
        known = zip(self.taps, self._relevance, strict=True)
        return next((values for one, values in known if one.place == tap.place), self._at_stop)

    def _nodes(self, number: int) -> Tensor:
        """Returns the relevance of a layer, restricted to each of its nodes, in shape ``(K, N, *shape)``."""
        labels, relevance = self._labels[number], self._relevance[number]
        count = int(labels.max()) + 1
        return torch.stack([relevance * (labels == node) for node in range(count)])

    def _propagated(self, upper: Tap, below: Sequence[Tap], nodes: Tensor) -> dict[Any, Tensor]:
        """Propagates the relevance of each node to the lower taps. Returns shape ``(K, N, *shape)`` per tap."""

        def run(some: Sequence[int]) -> list[list[Tensor]]:
            vectors = {node: upper.layout.fold(nodes[node]) for node in some}
            arrived, _ = propagated_to(self.mu._recording, upper, below, vectors)
            rows = [tap.layout.unfold(each, 1) for tap, each in zip(below, arrived, strict=True)]
            return [list(each) for each in zip(*rows, strict=True)]

        rows = in_chunks(range(len(nodes)), self._width(upper, below[-1]), run, "flow")
        return {tap.place: torch.stack(each) for tap, each in zip(below, zip(*rows, strict=True), strict=True)}

    def _transposed(self) -> Tensor:
        r"""Computes :math:`\mu(B \mid i)` at the middle tap for each group ``B`` of the lowest layer.

        Returns:
            The conditional masses, of shape ``(K, N, *shape)``.
        """
        lowest, stop, labels = self.taps[-1], self._stop, self._labels[-1]
        start = self.mu._start

        def run(groups: Sequence[int]) -> list[Tensor]:
            members = [lowest.layout.fold((labels == group).unsqueeze(0).to(start.dtype)) for group in groups]
            masks = torch.stack([mask.expand(lowest.tensor_shape) for mask in members])
            collected, _ = push(self.mu._recording.graph, lowest.place, stop.place, masks)
            if collected is None:
                collected = self._at_stop.new_zeros((len(groups), *stop.tensor_shape))
            return list(stop.layout.unfold(collected, 1))

        groups = range(int(labels.max()) + 1)
        return torch.stack(in_chunks(groups, self._width(stop, lowest), run, "flow"))

    def _store(self, upper: int, lower: int, used: list[int], count: int, arrived: dict[Any, Tensor]) -> None:
        """Stores the joint relevance of the nodes of two layers in ``joints``."""
        if self._given is not None and lower == len(self.taps) - 1:
            here = arrived[self._stop.place].transpose(0, 1).flatten(2)
            sums = here @ self._given.transpose(0, 1).flatten(2).transpose(1, 2)
        else:
            values = arrived[self.taps[lower].place]
            sums = by_label(values.transpose(0, 1).flatten(2), self._labels[lower])
        rows = sums.new_zeros((sums.shape[0], count, sums.shape[2]))
        rows[:, used] = sums
        self.joints[upper, lower] = self.mu._mixed(rows)

    def heat_maps(self, number: int, image: Tap) -> Tensor | None:
        """Returns the joint relevance of each node in a layer and each pixel, in shape ``(N, K, *image positions)``.

        If heat maps are computed at another tap than the image, the relevance of each position is distributed evenly
        over the corresponding pixels. Returns None for layers below that tap, except for the image itself.
        """
        if self.taps[number].place == image.place:
            return self._positions(self._nodes(number), image)
        values = self.maps.get(number)
        if values is None or self._map_tap is None or self._map_tap.place == image.place:
            return values
        for dim, size in ((2, image.shape[2]), (3, image.shape[3])):
            places = torch.arange(size, device=values.device) * values.shape[dim] // size
            sizes = torch.bincount(places, minlength=values.shape[dim]).to(values)
            shape = [-1 if at == dim else 1 for at in range(4)]
            values = (values / sizes.view(shape)).index_select(dim, places)
        return values

    def _positions(self, values: Tensor, tap: Tap) -> Tensor:
        """Sums values of shape ``(K, N, *shape)`` over channels. Returns shape ``(N, K, *positions)``."""
        channel = 1 + tap.channel_dim % len(tap.shape)
        mixed: Tensor = self.mu._mixed(values.sum(channel).transpose(0, 1))
        return mixed

    def _width(self, upper: Tap, lower: Tap) -> int:
        return width_of(self.mu._recording, self.mu._max_memory, [upper.place, lower.place])


def flow_passes(mu: Any, taps: Sequence[Tap], labels: Sequence[Tensor], maps: Tap | None) -> FlowPasses:
    """Constructs :class:`FlowPasses` from the same arguments, in any gradient mode."""
    mu._check_fresh()
    with torch.inference_mode(False), torch.no_grad(), exact():
        return FlowPasses(mu, taps, labels, maps)


def map_tap(mu: Any, layers: Sequence[Tap], image: Any) -> tuple[Any, Tap]:
    """Chooses the tap at whose positions the heat maps of a flow are computed.

    Candidates are the last layer and the taps below all layers. They must have the aspect ratio of the image and at
    least :data:`POSITIONS` positions along each side, and all walks from the layers to the image must cross them. Among
    the candidates with the resolution of the uppermost one, the tap nested in the fewest modules is chosen. If there is
    no candidate, or if the shorter side of the image has at most :data:`POSITIONS` positions, the image itself is used.

    Args:
        mu: The measure whose flow is computed.
        layers: The layers of the flow above the image.
        image: The image tap, as its name or ``at(…)``.

    Returns:
        The name of the tap, or ``image``, and the tap itself.
    """
    lowest = mu._tap(image)
    if len(lowest.shape) != 4 or lowest.channel_dim != 1 or not layers or min(lowest.shape[2:]) <= POSITIONS:
        return image, lowest
    candidates: list[tuple[str, Tap]] = []
    for name in reversed(mu.layers):
        tap: Tap = mu._tap(name)
        if not _has_positions(tap, lowest) or (candidates and tap.shape[2:] != candidates[0][1].shape[2:]):
            continue
        is_under = tap.place == layers[-1].place or mu._is_below(tap.place, layers[-1])
        if is_under and all(separates(mu._recording, one, tap, lowest) for one in layers):
            candidates.append((name, tap))
    # Among layers of equal resolution, readers know best those that are not nested in a block.
    return min(candidates, key=lambda one: one[0].count("."), default=(image, lowest))


def _has_positions(tap: Tap, image: Tap) -> bool:
    """Returns True if a tap has enough positions and the aspect ratio of the image."""
    if len(tap.shape) != 4 or tap.channel_dim != 1 or min(tap.shape[2:]) < POSITIONS:
        return False
    ratios = [whole / part for whole, part in zip(image.shape[2:], tap.shape[2:], strict=True)]
    return min(ratios) >= 1 and abs(ratios[0] / ratios[1] - 1) <= 0.05


def _stop(mu: Any, taps: Sequence[Tap], maps: Tap | None) -> Tap:
    """Returns the tap at which downward passes stop.

    This is the tap of the heat maps if it is below all layers (or all except the last one), and otherwise the last
    layer.
    """
    if maps is None:
        return taps[-1]
    above = taps[:-1] if mu._is_below(taps[-1].place, maps) else taps
    is_under = all(one.place == maps.place or mu._is_below(maps.place, one) for one in above)
    return maps if is_under else taps[-1]


def _all_rows(values: Tensor, used: list[int], count: int) -> Tensor:
    rows = values.new_zeros((count, *values.shape[1:]))
    rows[used] = values
    return rows
