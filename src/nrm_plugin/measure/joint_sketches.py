r"""Joint relevance of layers with many members, exactly or of low rank, for the search for groups.

The joint relevance ``J`` of two layers that are far apart takes a partial pass for each member. The search needs less:
:math:`Y = J \Omega` for a few random vectors takes a transposed pass for each, and with an orthonormal basis ``Q`` of
``Y``, :math:`Q Q^\top J` takes a partial pass for each. Joint relevance of the members of one layer and groups of the
other one is always exact.

Source: Halko, Martinsson and Tropp, SIAM Review 2011, for the random range; its use here is ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..model.autocast import exact
from ..recording.propagation import push
from ..recording.taps import Tap
from .groups import Over, by_label, labels_of
from .joints import joint_matrix, neighbour_matrix, propagated
from .memory_budget import in_chunks, width_of

FEW = 64
"""Members up to which joint relevance is computed by a pass for each."""
RANK = 8
"""Rank of the joint relevance of layers with more members."""


class PairJoints:
    """Joint relevance of the members of consecutive layers of a measure.

    Args:
        mu: The measure.
        layers: Layers, from the output to the input.
        kinds: The members of each layer.

    Attributes:
        counts: Number of members of each layer.
        relevance: Marginal of each layer, ``(N · references, *shape)``.
    """

    def __init__(self, mu: Any, layers: Sequence[Any], kinds: Sequence[Over]) -> None:
        self.mu, self.kinds = mu, list(kinds)
        mu._check_fresh()
        mu._pairs(layers, "list layers from the output to the input")
        self.taps: list[Tap] = [mu._tap(layer) for layer in layers]
        self.counts = [int(labels_of(tap, kind).max()) + 1 for tap, kind in zip(self.taps, kinds, strict=True)]
        with torch.inference_mode(False), torch.no_grad(), exact(mu._start.device):
            totals = mu._pass(self.taps)
            self.relevance = [totals.relevance(tap) for tap in self.taps]

    def labels(self, place: int, groups: Tensor) -> Tensor:
        """Returns the group of each neuron of a layer, given the group of each member."""
        return groups[labels_of(self.taps[place], self.kinds[place])]

    def masses(self, place: int) -> Tensor:
        """Returns the mass of each member of a layer, ``(N, members)``."""
        labels = labels_of(self.taps[place], self.kinds[place])
        values: Tensor = self.mu._mixed(self.relevance[place]).flatten(1)
        return by_label(values, labels)

    def of_members(self, pair: int) -> tuple[Tensor, bool]:
        """Returns the joint relevance of the members of a pair, ``(N, upper, lower)``, and whether it is exact."""
        upper, lower, relevance = self.taps[pair], self.taps[pair + 1], self.relevance[pair]
        with torch.inference_mode(False), torch.no_grad(), exact(relevance.device):
            if self.kinds[pair] == self.kinds[pair + 1] == "channel":
                direct = neighbour_matrix(self.mu._recording, upper, lower, relevance)
                if direct is not None:
                    return self.mu._mixed(direct[0]), True
        if min(self.counts[pair : pair + 2]) <= FEW:
            return self.of_groups(pair, self.kinds[pair], self.kinds[pair + 1]), True
        return self._sketch(pair), False

    def of_groups(self, pair: int, above: Over, below: Over) -> Tensor:
        """Returns the joint relevance of groups of a pair, ``(N, groups above, groups below)``."""
        upper, lower, relevance = self.taps[pair], self.taps[pair + 1], self.relevance[pair]
        with torch.inference_mode(False), torch.no_grad(), exact(relevance.device):
            width = self._width(pair)
            matrix, _ = joint_matrix(self.mu._recording, upper, lower, relevance, (above, below), width)
            mixed: Tensor = self.mu._mixed(matrix)
            return mixed

    def _width(self, pair: int) -> int:
        places = [tap.place for tap in self.taps[pair : pair + 2]]
        return width_of(self.mu._recording, self.mu._max_memory, places)

    def _sketch(self, pair: int) -> Tensor:
        relevance = self.relevance[pair]
        random = torch.Generator().manual_seed(0)
        signs = torch.randint(2, (RANK, self.counts[pair + 1]), generator=random).to(relevance) * 2 - 1
        with torch.inference_mode(False), torch.no_grad(), exact(relevance.device):
            above = self._above(pair, signs)
            basis, _ = torch.linalg.qr(above.double())
            below = self._below(pair, basis.to(relevance))
            mixed: Tensor = self.mu._mixed(basis @ below.double())
            return mixed

    def _above(self, pair: int, weights: Tensor) -> Tensor:
        """Returns ``J w`` of weights ``(K, members below)``, ``(N, members above, K)``."""
        upper, lower = self.taps[pair : pair + 2]
        rows, columns = (labels_of(tap, kind) for tap, kind in zip((upper, lower), self.kinds[pair:], strict=False))
        columns = columns.to(weights.device)

        def run(some: Sequence[Tensor]) -> list[Tensor]:
            starts = [lower.layout.fold(one[columns].unsqueeze(0)).expand(lower.tensor_shape) for one in some]
            collected, _ = push(self.mu._recording.graph, lower.place, upper.place, torch.stack(starts))
            relevance = upper.layout.fold(self.relevance[pair])
            values = (
                torch.zeros_like(relevance).expand(len(some), *relevance.shape)
                if collected is None
                else (collected * relevance)
            )
            return list(by_label(upper.layout.unfold(values, 1).flatten(2), rows))

        return torch.stack(in_chunks(list(weights), self._width(pair), run, "joint relevance"), 2)

    def _below(self, pair: int, basis: Tensor) -> Tensor:
        """Returns ``Qᵀ J`` of a basis ``(N, members above, K)``, ``(N, K, members below)``."""
        upper, lower = self.taps[pair : pair + 2]
        rows, columns = (labels_of(tap, kind) for tap, kind in zip((upper, lower), self.kinds[pair:], strict=False))
        rows = rows.to(basis.device)
        relevance = self.relevance[pair]

        def run(some: Sequence[Tensor]) -> list[Tensor]:
            vectors = {
                number: upper.layout.fold(relevance * one[:, rows.flatten()].reshape(relevance.shape))
                for number, one in enumerate(some)
            }
            arrived, _ = propagated(self.mu._recording, upper, lower, vectors)
            return list(by_label(lower.layout.unfold(arrived, 1).flatten(2), columns))

        return torch.stack(in_chunks(list(basis.movedim(2, 0)), self._width(pair), run, "joint relevance"), 1)
