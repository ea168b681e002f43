r"""Joint relevance between the members (channels, positions or neurons) of wide layers, exact or as a low-rank sketch.

The joint relevance ``J`` of two distant layers takes one partial pass per member. For the search, a low-rank
approximation suffices: :math:`Y = J \Omega` takes one transposed pass per random vector and, with an orthonormal basis
``Q`` of ``Y``, :math:`Q Q^\top J` takes one partial pass per basis vector. The joint relevance between the members of
one layer and the groups of the other is always exact.

Source: Halko, Martinsson and Tropp, SIAM Review 2011, for the randomized range finder; its application to joint
relevance is new in this package.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..model.autocast import exact
from ..recording.propagation import push
from ..recording.taps import Tap
from .flow_passes import map_tap
from .groups import Over, by_label, labels_of
from .joints import joint_matrix, neighbor_matrix, propagated
from .local_joints import at_positions, local_joint
from .memory_budget import in_chunks, width_of

FEW = 64
"""Maximum number of members for which joint relevance is computed exactly, with one pass per member."""
FEWER = 8
"""Like :data:`FEW`, for image parts whose joint relevance is computed at another layer."""
RANK = 8
"""Rank of the approximation for layers with more members."""


class PairJoints:
    """Computes the joint relevance between the members (channels, positions or neurons) of consecutive layers.

    If the last layer is the image, the computation uses the positions of a layer that all walks to the image cross.
    This takes fewer and shorter passes; see :func:`~nrm_plugin.measure.flow_passes.map_tap`.

    Args:
        mu: The measure that provides joint relevance.
        layers: Layers, from the output to the input.
        kinds: The grouping that defines the members of each layer, such as ``"channel"``.

    Attributes:
        counts: Number of members in each layer.
        relevance: Marginal of each layer, of shape ``(N · references, *shape)``.
    """

    def __init__(self, mu: Any, layers: Sequence[Any], kinds: Sequence[Over]) -> None:
        self.mu, self.kinds = mu, list(kinds)
        mu._check_fresh()
        mu._pairs(layers, "list layers from the output to the input")
        self.taps: list[Tap] = [mu._tap(layer) for layer in layers]
        self.counts = [int(labels_of(tap, kind).max()) + 1 for tap, kind in zip(self.taps, kinds, strict=True)]
        own = list(self.taps)
        self._moves_image = self._move_image(layers[-1])
        with torch.inference_mode(False), torch.no_grad(), exact():
            totals = mu._pass([*own, self.taps[-1]])
            self.relevance = [totals.relevance(tap) for tap in self.taps]
            marginals = zip(own, kinds, [totals.relevance(tap) for tap in own], strict=True)
            self._masses = [by_label(mu._mixed(each).flatten(1), labels_of(tap, kind)) for tap, kind, each in marginals]

    def _move_image(self, lowest: Any) -> bool:
        """Replaces the image with a layer of the same spatial layout. Returns True if such a layer exists."""
        image = self.taps[-1]
        if "input" not in image.names:
            return False
        _, tap = map_tap(self.mu, self.taps[:-1], lowest)
        members = at_positions(image, self.kinds[-1], tap) if tap.place != image.place else None
        if members is not None:
            self.taps[-1], self.kinds[-1] = tap, members
        return members is not None

    def labels(self, place: int, groups: Tensor) -> Tensor:
        """Returns the group of each neuron of the layer at index ``place``, given the group of each member."""
        return groups[labels_of(self.taps[place], self.kinds[place])]

    def masses(self, place: int) -> Tensor:
        """Returns the mass of each member of the layer at index ``place``, in shape ``(N, members)``."""
        return self._masses[place]

    def of_members(self, pair: int) -> tuple[Tensor, bool]:
        """Computes the joint relevance of the members of two layers, exactly or approximately.

        Returns:
            The joint relevance, of shape ``(N, upper, lower)``, and True if it is exact.
        """
        upper, lower, relevance = self.taps[pair], self.taps[pair + 1], self.relevance[pair]
        with torch.inference_mode(False), torch.no_grad(), exact():
            if self.kinds[pair] == self.kinds[pair + 1] == "channel":
                direct = neighbor_matrix(self.mu._recording, upper, lower, relevance)
                if direct is not None:
                    return self.mu._mixed(direct[0]), True
        is_image = self._moves_image and pair == len(self.taps) - 2
        if min(self.counts[pair : pair + 2]) <= (FEWER if is_image else FEW):
            return self.of_groups(pair, self.kinds[pair], self.kinds[pair + 1]), not is_image
        return self._estimate(pair, is_image), False

    def _estimate(self, pair: int, is_image: bool) -> Tensor:
        """Estimates the joint relevance of the members of two layers, in shape ``(N, upper, lower)``."""
        upper, lower = self.taps[pair : pair + 2]
        kind = self.kinds[pair + 1]
        if upper.place == lower.place:
            return self.of_groups(pair, self.kinds[pair], kind)
        if self.kinds[pair] == "channel" and (is_image or kind == "channel"):
            parts, count = (kind, self.counts[pair + 1]) if is_image else (None, 0)
            local = local_joint(upper, lower, self.relevance[pair], self.relevance[pair + 1], parts, count)
            if local is not None:
                mixed: Tensor = self.mu._mixed(local)
                return mixed
        return self._sketch(pair)

    def of_groups(self, pair: int, above: Over, below: Over) -> Tensor:
        """Returns the exact joint relevance of the groups in two layers, in shape ``(N, groups, groups below)``."""
        upper, lower, relevance = self.taps[pair], self.taps[pair + 1], self.relevance[pair]
        with torch.inference_mode(False), torch.no_grad(), exact():
            if upper.place == lower.place:
                matrix = _of_one_layer(relevance, labels_of(upper, above), labels_of(lower, below))
            else:
                width = self._width(pair)
                matrix, _ = joint_matrix(self.mu._recording, upper, lower, relevance, (above, below), width)
            mixed: Tensor = self.mu._mixed(matrix)
        lost = self.counts[pair + 1] - mixed.shape[2] if below is self.kinds[pair + 1] else 0
        return torch.nn.functional.pad(mixed, (0, lost))  # small image parts may not contain any position

    def _width(self, pair: int) -> int:
        places = [tap.place for tap in self.taps[pair : pair + 2]]
        return width_of(self.mu._recording, self.mu._max_memory, places)

    def _sketch(self, pair: int) -> Tensor:
        relevance = self.relevance[pair]
        random = torch.Generator().manual_seed(0)
        signs = torch.randint(2, (RANK, self.counts[pair + 1]), generator=random).to(relevance) * 2 - 1
        with torch.inference_mode(False), torch.no_grad(), exact():
            above = self._above(pair, signs)
            basis, _ = torch.linalg.qr(above.double())
            below = self._below(pair, basis.to(relevance))
            mixed: Tensor = self.mu._mixed(basis @ below.double())
            return mixed

    def _above(self, pair: int, weights: Tensor) -> Tensor:
        """Computes ``J w``, with shape ``(N, members above, K)``, for weights ``w`` of shape ``(K, members below)``."""
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
        """Computes ``Qᵀ J``, with shape ``(N, K, members below)``, for ``Q`` of shape ``(N, members above, K)``."""
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


def _of_one_layer(relevance: Tensor, above: Tensor, below: Tensor) -> Tensor:
    """Returns the relevance of all intersections of groups in two groupings of the same layer.

    The result has shape ``(N, groups, other groups)``.
    """
    rows, columns = int(above.max()) + 1, int(below.max()) + 1
    sums = by_label(relevance.flatten(1), above * columns + below)
    return torch.nn.functional.pad(sums, (0, rows * columns - sums.shape[1])).view(-1, rows, columns)
