r"""Selection of neurons and the error of an explanation restricted to them.

The measure is restricted to the walks through kept neurons in every selected layer. It is compared with the full
measure by the MSE and SMAPE of heat maps and layer masses. Neurons are selected by backward elimination, starting with
the smallest joint relevance. The method is new in this package; it is based on the neuron selection of arXiv
2412.05686.

Source: docs/critical-paths.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from ..errors import InputError, brief
from ..events.event import Event, at
from ..measure.groups import Over, by_label, labels_of
from ..measure.measure import RelevanceMeasure
from ..model.devices import on_device_of
from .layer_chain import intersection, kinds_of_groups

Metric = Literal["mse", "smape"]
METRICS: tuple[Metric, ...] = ("mse", "smape")


def mse(full: Tensor, restricted: Tensor) -> Tensor:
    r"""Computes the mean squared error of each sample, as a tensor of shape ``(N,)``.

    .. math:: \frac 1 n \sum_i (r_i - \hat r_i)^2

    The error is zero if and only if all values are identical. It is in units of squared relevance and comparable only
    between maps of the same size.

    Args:
        full: Values of the full measure, of shape ``(N, …)``.
        restricted: Values of the restricted measure, with the same shape.

    Examples:
        >>> mse(torch.tensor([[0.5, 0.5]]), torch.tensor([[0.5, 0.0]]))
        tensor([0.1250])
    """
    return (full - restricted).square().flatten(1).mean(1)


def smape(full: Tensor, restricted: Tensor) -> Tensor:
    r"""Computes the symmetric mean absolute percentage error of each sample, as a tensor of shape ``(N,)``.

    .. math:: \frac{100}{n} \sum_i \frac{|r_i - \hat r_i|}{(|r_i| + |\hat r_i|) / 2}

    The error is between 0 and 200. Neurons that are zero in both tensors contribute 0 but count toward :math:`n`.
    Neurons that are zero in only one of the tensors, or that have opposite signs, contribute 200 regardless of their
    magnitude.

    Args:
        full: Values of the full measure, of shape ``(N, …)``.
        restricted: Values of the restricted measure, with the same shape.

    Examples:
        >>> smape(torch.tensor([[0.5, 0.5, 0.0, 0.0]]), torch.tensor([[0.5, 0.0, 0.0, 0.0]]))
        tensor([50.])
    """
    total = full.abs() + restricted.abs()
    shares = 2 * (full - restricted).abs() / total.masked_fill(total == 0, 1)
    return 100 * shares.flatten(1).mean(1)


@dataclass(frozen=True)
class Restriction:
    """Measure restricted to the walks through kept neurons and its deviation from the full measure.

    Attributes:
        heat_map: ``μ(pixel and kept)``, of shape ``(N, …)``.
        mass: ``μ(kept)``, of shape ``(N,)``, the mass of the walks through kept neurons in every selected layer.
        mse: Mean squared error of the heat map, of shape ``(N,)``.
        smape: Symmetric mean absolute percentage error of the heat map, of shape ``(N,)``.
        layers: MSE and SMAPE of the channel masses of each selected layer, of shape ``(N,)`` each.

    Examples:
        >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> mu = RelevanceMeasure(net, torch.randn(5, 3), 1)
        >>> all_kept = restriction(mu, {"1": torch.ones(4, dtype=torch.bool)})
        >>> bool((all_kept.mse < 1e-10).all())
        True
    """

    heat_map: Tensor
    mass: Tensor
    mse: Tensor
    smape: Tensor
    layers: dict[str, tuple[Tensor, Tensor]]


def restriction(
    mu: RelevanceMeasure, kept: Mapping[str, Tensor], at_layer: str = "input", over: Over = "neuron"
) -> Restriction:
    r"""Restricts the measure to the walks through kept neurons in every layer and computes the resulting errors.

    .. math:: \hat r_i = \mu(n_0 = i \wedge n_{l_1} \in S_1 \wedge \dots \wedge n_{l_L} \in S_L)

    Args:
        mu: The measure to restrict.
        kept: Boolean masks over the channels of each layer, of shape ``(C,)`` or ``(N, C)``, or over its neurons,
            ``(*shape)`` or ``(N, *shape)``, keyed by layer name.
        at_layer: The layer of the heat map.
        over: Groups over which the heat map is summed before the comparison.

    Raises:
        InputError: If a mask does not match its layer or if no layer is given.

    Examples:
        >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> mu = RelevanceMeasure(net, torch.randn(5, 3), 1)
        >>> restricted = restriction(mu, {"1": torch.tensor([True, True, False, False])})
        >>> torch.allclose(restricted.heat_map.sum(1), restricted.mass, atol=1e-5)
        True

    Source: new in this package; ``heat_map / mass`` equals the pruned relevance of arXiv 2404.14271 up to a common
    factor.
    """
    masks = {layer: neuron_mask(mu, layer, mask) for layer, mask in kept.items()}
    event = kept_event(masks)
    layers = [at_layer, *masks]
    full, restricted = mu.marginal(layers), mu.marginal(layers, joint=event)

    def errors(layer: str, over: Over) -> tuple[Tensor, Tensor]:
        labels = labels_of(mu._tap(layer), over)
        pair = by_label(full[layer].flatten(1), labels), by_label(restricted[layer].flatten(1), labels)
        return mse(*pair), smape(*pair)

    of_layers = {layer: errors(layer, "channel") for layer in masks}
    return Restriction(restricted[at_layer], mu(event), *errors(at_layer, over), of_layers)


def neuron_mask(mu: RelevanceMeasure, layer: str, mask: Tensor) -> Tensor:
    """Expands a mask over channels or neurons to a mask over neurons, in shape ``(N, *shape)``.

    Raises:
        InputError: If the mask is not boolean or matches neither channels nor neurons.
    """
    tap = mu._tap(layer)
    shape, inner = torch.Size(tap.shape), torch.Size(tap.shape[1:])
    if mask.dtype != torch.bool:
        raise InputError(
            f"the mask of {brief(layer)} has dtype {mask.dtype}; give a boolean mask that is true for kept neurons."
        )
    if mask.shape in (shape, inner):
        return mask.expand(shape)
    channels = shape[tap.channel_dim]
    if mask.shape in (torch.Size([channels]), torch.Size([shape[0], channels])):
        labels = labels_of(tap, "channel").to(mask.device)
        return mask.expand(shape[0], channels)[:, labels]
    raise InputError(
        f"the mask of {brief(layer)} has shape {tuple(mask.shape)}; give one over its {channels} channels or its "
        f"neurons {tuple(inner)}, with or without a first dimension of {shape[0]} samples."
    )


def kept_event(masks: Mapping[str, Tensor]) -> Event:
    """Returns the event that a walk crosses a kept neuron in every layer.

    Raises:
        InputError: If no layer is given.
    """
    if not masks:
        raise InputError("no layer was given; give a mask of kept neurons for at least one layer.")
    return intersection([at(layer)[mask] for layer, mask in masks.items()])


@dataclass(frozen=True)
class CurvePoint:
    """Point of the error curve for a given number of kept groups.

    Attributes:
        count: Number of groups kept across all layers.
        mse: Mean squared error of the heat map of the input, of shape ``(N,)``.
        smape: Symmetric mean absolute percentage error of the heat map, of shape ``(N,)``.
        mass: Joint relevance of the kept groups, of shape ``(N,)``.

    Examples:
        >>> CurvePoint(3, torch.zeros(1), torch.zeros(1), torch.ones(1)).count
        3
    """

    count: int
    mse: Tensor
    smape: Tensor
    mass: Tensor


@dataclass(frozen=True)
class Selection:
    """Selected groups of each sample, as returned by :func:`select_neurons`.

    Attributes:
        kept: Mask of the kept groups in each layer, of shape ``(N, groups)``.
        count: Number of groups kept across all layers, of shape ``(N,)``.
        order: Rank of each group, of shape ``(N, all groups)``, concatenated over layers; rank 0 is eliminated last.
        curve: Errors for several numbers of kept groups, in descending order.
        event: The event that a walk crosses a kept neuron in every layer.

    Examples:
        >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> mu = RelevanceMeasure(net, torch.randn(5, 3), 1)
        >>> selection = select_neurons(mu, ["1"], budget=2)
        >>> pruned = mu.marginal("input", given=selection.event, min_ratio=0)
        >>> selection.count, pruned.shape
        (tensor([2, 2, 2, 2, 2]), torch.Size([5, 3]))
    """

    kept: dict[str, Tensor]
    count: Tensor
    order: Tensor = field(repr=False)
    curve: list[CurvePoint] = field(repr=False)
    event: Event = field(repr=False)


def select_neurons(
    mu: RelevanceMeasure,
    layers: Sequence[str],
    budget: int | None = None,
    error: Mapping[Metric, float] | None = None,
    over: Over | Sequence[Over] = "channel",
    rounds: int = 12,
) -> Selection:
    r"""Selects the groups of neurons that best preserve the explanation.

    Groups are selected by backward elimination. Each round computes the joint relevance of every group :math:`g` of
    every layer with the kept groups of the other layers, :math:`\mu(n_l \in g \wedge n_{l_1} \in S_1 \wedge \dots)`.
    This is the mass that the heat map would lose without the group. The groups with the smallest absolute values are
    eliminated. Each layer keeps at least one group. Groups are selected separately for each sample, but all
    samples share the same passes.

    With ``error``, the smallest of these nested sets that satisfies the limit is found by bisection over the order of
    elimination. For nonnegative kernels, the error increases with every elimination; for signed kernels, the order
    might contain a smaller set that also satisfies the limit. Other sets are not considered.

    Args:
        mu: The measure whose neurons are selected.
        layers: One or more layers, in any order, which are restricted jointly.
        budget: Total number of groups to keep in all layers.
        error: ``{"mse": limit}`` or ``{"smape": limit}`` for the heat map of the input.
        over: The kind of groups: ``"channel"``, ``"position"``, ``"neuron"`` or labels, or a list with one per layer.
        rounds: Number of elimination rounds. More rounds give a better selection but take longer.

    Raises:
        ValueError: If neither or both of ``budget`` and ``error`` are given, or the budget is below one group per
            layer.

    Examples:
        >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> mu = RelevanceMeasure(net, torch.randn(5, 3), 1, composite=NRMAbsolute())
        >>> selection = select_neurons(mu, ["1"], error={"smape": 20.0})
        >>> bool((restriction(mu, selection.kept).smape <= 20.0).all())
        True

    Source: new in this package.
    """
    pool = _GroupPool(mu, layers, over)
    _check_limits(pool, budget, error, rounds)
    order, curve = _elimination(pool, rounds, budget or len(layers))
    counts = torch.full((mu.batch,), budget or 0)
    for metric, limit in (error or {}).items():
        counts = _smallest_counts(pool, order, metric, float(limit))
    kept = pool.split(order < counts[:, None].to(order.device))
    return Selection(kept, counts, order, curve, kept_event(pool.masks(kept)))


def _check_limits(pool: _GroupPool, budget: int | None, error: Mapping[Metric, float] | None, rounds: int) -> None:
    if (budget is None) == (error is None):
        raise ValueError("give either budget=, the number of groups to keep, or error=, the largest allowed error.")
    if budget is not None and not len(pool.layers) <= budget <= pool.size:
        raise ValueError(
            f"budget={brief(budget)}: keep at least one group of each layer ({len(pool.layers)}), and at most "
            f"{pool.size}."
        )
    if error is not None and (len(error) != 1 or next(iter(error)) not in METRICS):
        raise ValueError(f"error={dict(error)!r}: give one of {{'mse': limit}} and {{'smape': limit}}.")
    if rounds < 1:
        raise ValueError(f"rounds={brief(rounds)} must be at least 1.")


class _GroupPool:
    """Groups of all selected layers, concatenated."""

    def __init__(self, mu: RelevanceMeasure, layers: Sequence[str], over: Over | Sequence[Over]) -> None:
        if isinstance(layers, str) or not len(layers) or len(set(layers)) < len(layers):
            raise ValueError(f"layers={brief(layers)}: give a list of one or more different layers.")
        self.mu, self.layers = mu, list(layers)
        kinds = kinds_of_groups(over, len(self.layers))
        taps = [mu._tap(layer) for layer in self.layers]
        self.labels = [labels_of(tap, kind).to(mu._start.device) for tap, kind in zip(taps, kinds, strict=True)]
        self.counts = [int(labels.max()) + 1 for labels in self.labels]
        self.size = sum(self.counts)
        self.full = mu.marginal("input")

    def split(self, flat: Tensor) -> dict[str, Tensor]:
        """Splits a tensor of shape ``(N, all groups)`` into one tensor of shape ``(N, groups)`` per layer."""
        return dict(zip(self.layers, torch.split(flat, self.counts, 1), strict=True))

    def masks(self, kept: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Expands masks over groups to masks over neurons, in shape ``(N, *shape)``."""
        return {layer: kept[layer][:, labels] for layer, labels in zip(self.layers, self.labels, strict=True)}

    def joint(self, kept: Tensor) -> tuple[Tensor, CurvePoint]:
        """Computes the joint relevance of each group with the kept groups and the errors after restriction to them.

        Returns:
            The joint relevance, of shape ``(N, all groups)``, and a point of the error curve.
        """
        event = kept_event(self.masks(self.split(kept)))
        marginals = self.mu.marginal([*self.layers, "input"], joint=event)
        groups = zip(self.layers, self.labels, strict=True)
        parts = [on_device_of(by_label(marginals[layer].flatten(1), labels), kept) for layer, labels in groups]
        heat_map = marginals["input"]
        count = int(kept.sum(1).max())
        point = CurvePoint(count, mse(self.full, heat_map), smape(self.full, heat_map), parts[0].sum(1))
        return torch.cat(parts, 1), point


def _elimination(pool: _GroupPool, rounds: int, last: int) -> tuple[Tensor, list[CurvePoint]]:
    """Ranks all groups by elimination order. The best ``last`` groups are ranked in a single round.

    Returns:
        The rank of each group, of shape ``(N, all groups)``, and the error curve.
    """
    schedule = [round(pool.size * (last / pool.size) ** (step / rounds)) for step in range(1, rounds + 1)]
    kept = torch.ones((pool.mu.batch, pool.size), dtype=torch.bool, device=pool.mu._start.device)
    order = torch.zeros_like(kept, dtype=torch.long)
    curve = []
    count = pool.size
    for target in [*schedule, 0]:
        joint, point = pool.joint(kept)
        curve.append(point)
        eliminated = _ranked(pool, joint, kept)[:, target:count]
        order.scatter_(1, eliminated, torch.arange(target, count, device=order.device).expand_as(eliminated))
        kept.scatter_(1, eliminated, False)
        count = target
    return order, curve


def _ranked(pool: _GroupPool, joint: Tensor, kept: Tensor) -> Tensor:
    """Sorts the kept groups by absolute joint relevance, with the strongest group of each layer first."""
    score = joint.abs().masked_fill(~kept, -1)
    for part in torch.split(score, pool.counts, 1):
        part.scatter_(1, part.argmax(1, keepdim=True), torch.inf)
    return score.argsort(stable=True, dim=1, descending=True)


def _smallest_counts(pool: _GroupPool, order: Tensor, metric: Metric, limit: float) -> Tensor:
    """Returns, for each sample, the smallest number of groups whose error is within the limit, in shape ``(N,)``."""
    low = torch.full((len(order),), len(pool.layers), device=order.device)
    high = torch.full_like(low, pool.size)
    while bool((low < high).any()):
        middle = (low + high) // 2
        _, point = pool.joint(order < middle[:, None])
        is_small = on_device_of(getattr(point, metric) <= limit, low)
        high = torch.where(is_small, middle, high)
        low = torch.where(is_small, low, middle + 1).minimum(high)
    return high.cpu()
