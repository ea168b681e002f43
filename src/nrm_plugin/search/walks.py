r"""Search for the walks with the most relevance, over groups of neurons in selected layers or over single neurons.

A *group walk* consists of one group of neurons in each of several layers; its mass is the joint relevance of these
groups. The search and its bound are new in this package; they are based on the search for relevant walks of single
neurons by Xiong et al. (ICML 2023).

Source: docs/critical-paths.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from ..errors import brief
from ..events.event import Atom, Event, at
from ..measure.group_search import find_groups, layer_name
from ..measure.groups import Over
from ..measure.layer_groups import Groups
from ..measure.layer_taps import Layer
from ..measure.measure import RelevanceMeasure
from .best_first_walks import BestFirstSearch
from .group_walks import group_walks
from .layer_chain import LayerChain, check_count, check_one_sample, intersection
from .max_product_walks import MaxProduct
from .walk_bounds import now


@dataclass(frozen=True)
class GroupWalk:
    """Walk over groups, with the mass of the walks that cross all of its groups.

    Attributes:
        groups: Index of the group (channel, position, neuron or label) in each layer, from the output to the input, or
            None for layers that a walk of single neurons does not cross.
        mass: Signed joint relevance of the groups.
        certified: Whether no walk that is not returned can have a larger absolute mass.

    Examples:
        >>> GroupWalk((3, 0), 0.5, True).groups
        (3, 0)
    """

    groups: tuple[int | None, ...]
    mass: float
    certified: bool


@dataclass(frozen=True)
class TopWalks:
    """Walks with the largest absolute mass, as returned by :func:`top_walks`.

    Attributes:
        layers: The layers, from the output to the input.
        walks: The walks with the largest absolute mass, in decreasing order.
        missed: Upper bound on the absolute mass of all walks that are not in ``walks``.
        expanded: Number of prefixes that were propagated to the next layer.
        seconds: Duration of the search in seconds.
        names: Names of the groups in each layer for ``over="groups"``.

    Examples:
        >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> mu = RelevanceMeasure(net, torch.randn(1, 3), 1)
        >>> top = top_walks(mu, ["1", "input"], 2)
        >>> top.certified, torch.allclose(mu(top.event(0)), torch.tensor(top.walks[0].mass), atol=1e-5)
        (2, True)
    """

    layers: tuple[str, ...]
    walks: tuple[GroupWalk, ...]
    missed: float
    expanded: int
    seconds: float
    _atoms: tuple[Atom, ...] = field(default=(), repr=False, compare=False)
    _labels: tuple[Tensor, ...] = field(default=(), repr=False, compare=False)
    names: tuple[tuple[str, ...], ...] = field(default=(), repr=False)

    @property
    def certified(self) -> int:
        """Number of walks certified to be among the largest.

        Examples:
            >>> TopWalks(("1",), (GroupWalk((3,), 0.5, True), GroupWalk((0,), 0.1, False)), 0.2, 1, 0.0).certified
            1
        """
        return sum(walk.certified for walk in self.walks)

    @property
    def mass(self) -> float:
        """Total mass of the returned walks (disjoint events).

        Examples:
            >>> TopWalks(("1",), (GroupWalk((3,), 0.5, True), GroupWalk((0,), 0.25, False)), 0.3, 1, 0.0).mass
            0.75
        """
        return sum(walk.mass for walk in self.walks)

    def event(self, number: int) -> Event:
        """Returns one of the walks as an event.

        Examples:
            >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
            >>> mu = RelevanceMeasure(net, torch.randn(1, 3), 1)
            >>> top_walks(mu, ["1", "input"], 2).event(0)
            at('1')[mask of 1 in (4,)] & at('input')[mask of 1 in (3,)]
        """
        parts = zip(self._atoms, self._labels, self.walks[number].groups, strict=True)
        return intersection([~atom if group is None else atom[labels == group] for atom, labels, group in parts])

    def neurons(self, number: int) -> dict[str, tuple[int, ...]]:
        """Returns, for each layer, the index of the neuron that the walk crosses, e.g. ``(channel, row, column)``.

        Examples:
            >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
            >>> mu = RelevanceMeasure(net, torch.randn(1, 3), 1, composite=NRMAbsolute())
            >>> list(top_walks(mu, k=1, over="neuron").neurons(0))
            ['2', '1', '0', 'input']
        """
        parts = zip(self.layers, self._labels, self.walks[number].groups, strict=True)
        return {name: _index(labels, group) for name, labels, group in parts if group is not None}


def top_walks(
    mu: RelevanceMeasure,
    layers: Sequence[Layer] | None = None,
    k: int = 10,
    over: Over | Sequence[Over] = "channel",
    budget: float = 60.0,
    expansions: int | None = None,
    groups: Groups | None = None,
) -> TopWalks:
    r"""Searches for the ``k`` group walks with the largest absolute mass and bounds the mass of all others.

    .. math:: \mu(g_1, \dots, g_L) = \mu(n_{l_1} \in g_1 \wedge \dots \wedge n_{l_L} \in g_L)

    The search is best-first: the prefix with the largest bound on its completions is propagated to the next layer,

    .. math:: |\mu(g_1, \dots, g_L)| \le \sum_{i \in g_m} |r_m(i)|\, h_m(i), \qquad
              h_m(i) = \max_{g} \sum_{i' \in g} |\tilde T_{i'i}|\, h_{m+1}(i'), \qquad h_L = 1

    where :math:`r_m` is the relevance of the prefix and :math:`\tilde T` the kernel of all steps between two layers. If
    memory allows, the maximum is taken outside the sum, which tightens the bound. To find good walks early, the search
    starts greedily with the prefixes of largest mass and later alternates between these and the prefixes of largest
    bound. It can be stopped at any time: up to rounding, masses are exact and the bound is valid.

    Without ``layers``, walks consist of single neurons from the output to an input. If all kernels are nonnegative, as
    with :class:`~nrm_plugin.composites.NRMAbsolute`, max-product finds the largest walks exactly:

    .. math:: V(i) = 1 \text{ at inputs}, \; V(j) = \max_i \tilde T_{ij} V(i), \; \max_w \mu(w) = \max_k \mu(k) V(k)

    Max-product computes the kernel of every step column by column, with one vector per output of the step. This takes
    seconds for small networks and hours for VGG16.

    Args:
        mu: A single-sample measure.
        layers: One or more taps, each below the previous one; or None for all taps, which requires ``over="neuron"``.
        k: Number of walks to return.
        over: ``"channel"``, ``"position"``, ``"neuron"`` or labels, or a list with one per layer; or ``"groups"`` for
            groups that preserve most of the dependence between the layers. All walks over such groups are enumerated.
        budget: Time limit in seconds, or ``math.inf`` for a certified result. The passes that compute bounds can exceed
            it; without ``layers``, they are always completed. The first walk is completed in any case; ``missed``
            bounds the mass of walks that were not found.
        expansions: Number of expanded prefixes after which the search stops, not counting the first walk. With
            ``budget=math.inf``, results do not depend on the speed of the machine.
        groups: The groups for ``over="groups"``; by default, they are found by a search on this measure.

    Raises:
        ValueError: If the measure contains several samples, no layer is given, ``k`` is below 1, or ``layers`` is None
            without ``over="neuron"``.
        EventError: If a layer is not below the previous one.
        NRMError: If ``layers`` is None and a kernel has negative elements, which max-product does not support.

    Examples:
        >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> mu = RelevanceMeasure(net, torch.randn(1, 3), 1, composite=NRMAbsolute())
        >>> top = top_walks(mu, ["0", "input"], 3)
        >>> len(top.walks), top.missed <= abs(top.walks[-1].mass)
        (3, True)
        >>> best = top_walks(mu, k=1, over="neuron")
        >>> torch.allclose(mu(best.event(0)), torch.tensor(best.walks[0].mass), atol=1e-5)
        True

    Source: docs/critical-paths.md; Xiong et al., ICML 2023, for walks of single neurons. The bound is new in this
    package.
    """
    check_count(k, "k")
    check_one_sample(mu)
    mu._check_fresh()
    begin = now()
    if isinstance(over, str) and over == "groups" and layers is not None:
        return _walks_over_groups(mu, layers, k, groups, begin)
    with torch.inference_mode(False), torch.no_grad():
        if layers is None:
            return _neuron_walks(mu, k, over, begin, budget, expansions)
        search = BestFirstSearch(LayerChain(mu, layers, over), k, begin, budget, expansions)
        search.run()
    walks = [GroupWalk(walk.groups, walk.mass, abs(walk.mass) >= search.missed) for walk in search.largest_first()]
    chain = search.chain
    return TopWalks(
        chain.names, tuple(walks), search.missed, search.expanded, now() - begin, chain.atoms, chain.shaped_labels()
    )


def _walks_over_groups(
    mu: RelevanceMeasure, layers: Sequence[Layer], k: int, groups: Groups | None, begin: float
) -> TopWalks:
    names = [layer_name(mu, layer) for layer in layers]
    groups = groups or find_groups(mu, names)
    every = group_walks(mu, names, groups)
    order = np.argsort(-np.abs(every.masses), axis=None, kind="stable")
    places = np.stack(np.unravel_index(order, every.masses.shape), 1).tolist()
    masses = every.masses.flatten()[order] * float(mu.sign[0])
    walks = [GroupWalk(tuple(place), float(mass), True) for place, mass in zip(places[:k], masses[:k], strict=True)]
    missed = float(abs(masses[k])) if len(masses) > k else 0.0
    labels = tuple(groups.over(mu, name) for name in every.layers)
    atoms = tuple(at(name) for name in every.layers)
    return TopWalks(every.layers, tuple(walks), missed, 0, now() - begin, atoms, labels, every.names)


def _neuron_walks(
    mu: RelevanceMeasure, k: int, over: object, begin: float, budget: float, expansions: int | None
) -> TopWalks:
    if over != "neuron":
        raise ValueError(
            f"over={brief(over)} needs layers=; without layers, walks consist of single neurons: over='neuron'."
        )
    search = MaxProduct(mu)
    paths = search.walks(k, begin + budget, expansions)
    taps = search.crossed_taps(paths)
    walks = [GroupWalk(tuple(path.neurons.get(tap.place) for tap in taps), path.mass, True) for path in paths]
    names = tuple(search.names[tap.place] for tap in taps)
    labels = tuple(torch.arange(tap.shape[1:].numel()).reshape(tap.shape[1:]) for tap in taps)
    atoms = tuple(at(name) for name in names)
    return TopWalks(names, tuple(walks), search.missed, search.expanded, now() - begin, atoms, labels)


def _index(labels: Tensor, group: int) -> tuple[int, ...]:
    return tuple(int(i) for i in (labels == group).nonzero()[0])
