"""What is left of an explanation, and of a prediction, when only some neurons of some layers are kept.

The restricted measure is that of the walks through kept neurons at every chosen layer. How far it is from the full one
is measured by MSE and SMAPE of heat maps and of layer masses. Which neurons to keep is found by backward elimination of
those with the least joint relevance; ours, after the neuron selection of arXiv 2412.05686.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..events.event import Event, at
from ..measure.groups import Over, by_label, labels_of
from ..measure.measure import RelevanceMeasure
from .walks import overs

Fill = Literal["zero", "mean", "resample"]
FILLS: tuple[Fill, ...] = ("zero", "mean", "resample")
Metric = Literal["mse", "smape"]
METRICS: tuple[Metric, ...] = ("mse", "smape")


def mse(full: Tensor, restricted: Tensor) -> Tensor:
    r"""Mean squared error of each sample, ``(N,)``.

    .. math:: \frac 1 n \sum_i (r_i - \hat r_i)^2

    Zero exactly when all values are equal. It has the scale of relevance squared: compare it between maps of one size.

    Args:
        full: ``(N, …)``.
        restricted: The same shape.

    Examples:
        >>> mse(torch.tensor([[0.5, 0.5]]), torch.tensor([[0.5, 0.0]]))
        tensor([0.1250])
    """
    return (full - restricted).square().flatten(1).mean(1)


def smape(full: Tensor, restricted: Tensor) -> Tensor:
    r"""Symmetric mean absolute percentage error of each sample, ``(N,)``, from 0 to 200.

    .. math:: \frac{100}{n} \sum_i \frac{|r_i - \hat r_i|}{(|r_i| + |\hat r_i|) / 2}

    A neuron that is zero in both counts as 0 and still in :math:`n`; one that is zero in one of them counts as 200, and
    so does one of opposite sign, however small it is.

    Args:
        full: ``(N, …)``.
        restricted: The same shape.

    Examples:
        >>> smape(torch.tensor([[0.5, 0.5, 0.0, 0.0]]), torch.tensor([[0.5, 0.0, 0.0, 0.0]]))
        tensor([50.])
    """
    total = full.abs() + restricted.abs()
    shares = 2 * (full - restricted).abs() / total.masked_fill(total == 0, 1)
    return 100 * shares.flatten(1).mean(1)


@dataclass(frozen=True)
class Restriction:
    """The measure of the walks through kept neurons, beside that of all.

    Attributes:
        heat_map: ``μ(pixel and kept)``.
        mass: ``μ(kept)``, ``(N,)``: mass of the walks through kept neurons at every chosen layer.
        mse: Error of the heat map, ``(N,)``.
        smape: The same in per cent.
        layers: For each chosen layer, MSE and SMAPE of the masses of its groups, ``(N,)`` each.

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
    r"""Heat map and layer masses of the walks that cross only kept neurons, and their errors.

    .. math:: \hat r_i = \mu(n_0 = i \wedge n_{l_1} \in S_1 \wedge \dots \wedge n_{l_L} \in S_L)

    Args:
        mu: The measure.
        kept: For each layer a mask over its channels ``(C,)`` or ``(N, C)``, or over its neurons, ``(*shape)`` or
            ``(N, *shape)``.
        at_layer: Where the heat map is taken.
        over: What is summed up in it before it is compared.

    Raises:
        InputError: A mask does not fit its layer, or nothing is given.

    Examples:
        >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> mu = RelevanceMeasure(net, torch.randn(5, 3), 1)
        >>> found = restriction(mu, {"1": torch.tensor([True, True, False, False])})
        >>> torch.allclose(found.heat_map.sum(1), found.mass, atol=1e-5)
        True

    Source: ours; for one common factor, ``heat_map / mass`` is the pruned relevance of arXiv 2404.14271.
    """
    masks = {layer: neuron_mask(mu, layer, mask) for layer, mask in kept.items()}
    event = kept_event(masks)
    layers = list(masks)
    asked = [at_layer, *layers]
    full, left = mu.marginal(asked), mu.marginal(asked, joint=event)
    tap = mu._tap(at_layer)
    labels = labels_of(tap, over)
    heat_maps = (by_label(found[at_layer].flatten(1), labels) for found in (full, left))
    first, second = heat_maps
    errors = {}
    for layer in layers:
        groups = labels_of(mu._tap(layer), "channel")
        pair = [by_label(found[layer].flatten(1), groups) for found in (full, left)]
        errors[layer] = (mse(*pair), smape(*pair))
    return Restriction(left[at_layer], mu(event), mse(first, second), smape(first, second), errors)


def neuron_mask(mu: RelevanceMeasure, layer: str, mask: Tensor) -> Tensor:
    """A mask over channels or neurons as one over neurons, ``(N, *shape)``.

    Raises:
        InputError: It fits neither.
    """
    tap = mu._tap(layer)
    shape, inner = torch.Size(tap.shape), torch.Size(tap.shape[1:])
    if mask.dtype != torch.bool:
        raise InputError(f"the mask of {layer!r} is of {mask.dtype}; give a boolean one, true where neurons are kept.")
    if mask.shape in (shape, inner):
        return mask.expand(shape)
    channels = shape[tap.channel_dim]
    if mask.shape in (torch.Size([channels]), torch.Size([shape[0], channels])):
        labels = labels_of(tap, "channel").to(mask.device)
        return mask.expand(shape[0], channels)[:, labels]
    raise InputError(
        f"the mask of {layer!r} has shape {tuple(mask.shape)}; give one over its {channels} channels or its neurons "
        f"{tuple(inner)}, with or without {shape[0]} samples before."
    )


def kept_event(masks: Mapping[str, Tensor]) -> Event:
    """The walks that cross a kept neuron in every layer."""
    if not masks:
        raise InputError("no layer was given; name at least one, with the neurons that are kept.")
    first, *rest = (at(layer)[mask] for layer, mask in masks.items())
    event: Event = first
    for atom in rest:
        event = event & atom
    return event


@dataclass(frozen=True)
class CurvePoint:
    """Errors at one number of kept groups.

    Attributes:
        count: Groups kept in all chosen layers together.
        mse: Of the heat map, ``(N,)``.
        smape: Of the heat map, ``(N,)``.
        mass: Joint relevance of what is kept, ``(N,)``.

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
    """Groups to keep, for each sample.

    Attributes:
        kept: For each layer, ``(N, groups)``.
        count: Groups kept in all layers together, ``(N,)``.
        order: When each group is given up, 0 for the last one that is left: ``(N, all groups)``, layer after layer.
        curve: Errors at several numbers of kept groups, from many to few.
        event: The walks through kept neurons only.

    Examples:
        >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> mu = RelevanceMeasure(net, torch.randn(5, 3), 1)
        >>> found = select_neurons(mu, ["1"], budget=2)
        >>> pruned = mu.marginal("input", given=found.event, min_ratio=0)
        >>> found.count, pruned.shape
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
    r"""The groups of neurons without which the explanation changes least.

    Backward elimination. In each round every group :math:`g` of every layer gets its joint relevance with what is kept
    in the others, :math:`\mu(n_l \in g \wedge n_{l_1} \in S_1 \wedge \dots)`, which is what the heat map loses without
    it, and those with the least absolute values are given up. Each layer keeps one group at least. All samples are
    selected for together, each its own groups.

    With ``error`` the number of groups is then found by bisection of the order in which they were given up: the
    smallest of these nested sets. For kernels without sign the error grows with everything that is given up; for signed
    ones a smaller set may exist. That a smaller set outside of the order exists is never excluded.

    Args:
        mu: The measure.
        layers: Two or more layers are restricted together; the order does not matter.
        budget: Groups to keep, in all layers together.
        error: ``{"mse": …}`` or ``{"smape": …}`` that the heat map of the input may have.
        over: What a group is: ``"channel"``, ``"position"``, ``"neuron"`` or labels, or a list of one for each layer.
        rounds: Times that joint relevance is found anew; more are slower and choose better.

    Raises:
        ValueError: Neither or both of ``budget`` and ``error``, or a budget with less than one group for each layer.

    Examples:
        >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> mu = RelevanceMeasure(net, torch.randn(5, 3), 1, composite=NRMAbsolute())
        >>> found = select_neurons(mu, ["1"], error={"smape": 20.0})
        >>> bool((restriction(mu, found.kept).smape <= 20.0).all())
        True

    Source: ours.
    """
    pool = _Pool(mu, layers, over)
    _check_wanted(pool, budget, error, rounds)
    last = pool.sizes if budget is None else budget
    order, curve = _eliminated(pool, rounds, len(layers) if budget is None else last)
    if budget is not None:
        counts = torch.full((mu.batch,), budget)
    else:
        assert error is not None
        ((metric, limit),) = error.items()
        counts = _bisected(pool, order, metric, float(limit))
    kept = pool.split(order < counts[:, None].to(order.device))
    masks = pool.masks(kept)
    return Selection(kept, counts, order, curve, kept_event(masks))


def _check_wanted(pool: _Pool, budget: int | None, error: Mapping[Metric, float] | None, rounds: int) -> None:
    if (budget is None) == (error is None):
        raise ValueError("say what to keep by budget= or by error=, one of them.")
    if budget is not None and not len(pool.layers) <= budget <= pool.sizes:
        raise ValueError(f"budget={budget!r}: keep at least one group of each layer, and of {pool.sizes} at most.")
    if error is not None and (len(error) != 1 or next(iter(error)) not in METRICS):
        raise ValueError(f"error={dict(error)!r}: give one of {{'mse': limit}} and {{'smape': limit}}.")
    if rounds < 1:
        raise ValueError(f"rounds={rounds!r} must be at least 1.")


class _Pool:
    """All groups of the chosen layers, one after the other."""

    def __init__(self, mu: RelevanceMeasure, layers: Sequence[str], over: Over | Sequence[Over]) -> None:
        if isinstance(layers, str) or not len(layers) or len(set(layers)) < len(layers):
            raise ValueError(f"give a list of one or more different layers, got {layers!r}.")
        self.mu, self.layers = mu, list(layers)
        kinds = overs(over, len(self.layers))
        taps = [mu._tap(layer) for layer in self.layers]
        self.labels = [labels_of(tap, kind).to(mu._start.device) for tap, kind in zip(taps, kinds, strict=True)]
        self.counts = [int(labels.max()) + 1 for labels in self.labels]
        self.sizes = sum(self.counts)
        self.full = mu.marginal("input")

    def split(self, flat: Tensor) -> dict[str, Tensor]:
        """``(N, all groups)`` by layer."""
        return dict(zip(self.layers, torch.split(flat, self.counts, 1), strict=True))

    def masks(self, kept: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Masks over neurons, ``(N, *shape)``."""
        return {layer: kept[layer][:, labels] for layer, labels in zip(self.layers, self.labels, strict=True)}

    def joint(self, kept: Tensor) -> tuple[Tensor, CurvePoint]:
        """What each group carries together with those that are kept, and the errors."""
        event = kept_event(self.masks(self.split(kept)))
        found = self.mu.marginal([*self.layers, "input"], joint=event)
        parts = [
            by_label(found[layer].flatten(1), labels) for layer, labels in zip(self.layers, self.labels, strict=True)
        ]
        heat_map = found["input"]
        count = int(kept.sum(1).max())
        point = CurvePoint(count, mse(self.full, heat_map), smape(self.full, heat_map), parts[0].sum(1))
        return torch.cat(parts, 1), point


def _eliminated(pool: _Pool, rounds: int, last: int) -> tuple[Tensor, list[CurvePoint]]:
    """The order in which groups are given up, down to ``last``, and the curve."""
    first = pool.sizes
    schedule = [round(first * (last / first) ** (step / rounds)) for step in range(1, rounds + 1)]
    kept = torch.ones((pool.mu.batch, first), dtype=torch.bool, device=pool.full.device)
    order = torch.zeros_like(kept, dtype=torch.long)
    curve = []
    left = first
    for target in schedule:
        joint, point = pool.joint(kept)
        curve.append(point)
        given_up = _ranked(pool, joint, kept)[:, target:left]
        order.scatter_(1, given_up, torch.arange(target, left, device=order.device).expand_as(given_up))
        kept.scatter_(1, given_up, False)
        left = target
    joint, point = pool.joint(kept)
    curve.append(point)
    rest = _ranked(pool, joint, kept)[:, :left]
    order.scatter_(1, rest, torch.arange(left, device=order.device).expand_as(rest))
    return order, curve


def _ranked(pool: _Pool, joint: Tensor, kept: Tensor) -> Tensor:
    """Groups by what they carry, the largest first and before all others the largest of each layer."""
    score = joint.abs().masked_fill(~kept, -1)
    for part in torch.split(score, pool.counts, 1):
        part.scatter_(1, part.argmax(1, keepdim=True), torch.inf)
    return score.argsort(stable=True, dim=1, descending=True)


def _bisected(pool: _Pool, order: Tensor, metric: Metric, limit: float) -> Tensor:
    """The smallest number of groups, for each sample, whose heat map is within the error, ``(N,)``."""
    low = torch.full((len(order),), len(pool.layers), device=order.device)
    high = torch.full_like(low, pool.sizes)
    while bool((low < high).any()):
        middle = (low + high) // 2
        _, point = pool.joint(order < middle[:, None])
        fits = getattr(point, metric) <= limit
        high = torch.where(fits, middle, high)
        low = torch.where(fits, low, middle + 1).minimum(high)
    return high.cpu()


@contextmanager
def ablation(
    model: nn.Module, kept: Mapping[str, Tensor], fill: Fill = "zero", reference: Mapping[str, Tensor] | None = None
) -> Iterator[None]:
    """While it lasts, neurons that are not kept have another activation.

    Args:
        model: The network; hooks are taken off again.
        kept: For each module, by name, a mask of its output, ``(C,)``, ``(N, C)``, ``(*shape)`` or ``(N, *shape)``;
            channels are dimension 1.
        fill: ``"zero"``, ``"mean"`` over reference activations, or ``"resample"``: those of the reference sample with
            the number ``n`` modulo their number, for sample ``n``.
        reference: Activations of each module over reference samples, from :func:`activations`; for the last two.

    Raises:
        ValueError: Another fill, or no reference for one that needs it.

    Examples:
        >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> x = torch.randn(5, 3)
        >>> with ablation(net, {"1": torch.zeros(4, dtype=torch.bool)}):
        ...     torch.equal(net(x), net[2].bias.expand(5, 2))
        True
    """
    if fill not in FILLS:
        raise ValueError(f"fill={fill!r} is unknown; choose one of {', '.join(map(repr, FILLS))}.")
    if fill != "zero" and any(layer not in (reference or {}) for layer in kept):
        raise ValueError(f"fill={fill!r} needs reference=, as activations(model, samples, layers) returns it.")
    with ExitStack() as stack:
        for layer, mask in kept.items():
            other = None if fill == "zero" or reference is None else reference[layer]
            handle = model.get_submodule(layer).register_forward_hook(_replacing(mask, fill, other))
            stack.callback(handle.remove)
        yield


def _replacing(mask: Tensor, fill: Fill, reference: Tensor | None) -> Callable[..., Tensor]:
    def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        shape = output.shape
        inside = mask.to(output.device)
        if inside.shape not in (shape, shape[1:]):
            per_sample = inside.expand(shape[0], shape[1])
            inside = per_sample.reshape(shape[0], shape[1], *(1,) * (len(shape) - 2))
        if reference is None:
            other = output.new_zeros(())
        elif fill == "mean":
            other = reference.mean(0)
        else:
            other = reference[torch.arange(shape[0], device=reference.device) % len(reference)]
        return torch.where(inside, output, other)

    return hook


def activations(model: nn.Module, inputs: Any, layers: Sequence[str]) -> dict[str, Tensor]:
    """What each module returns, ``(N, *shape)``, of one run.

    Examples:
        >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> activations(net, torch.randn(5, 3), ["1"])["1"].shape
        torch.Size([5, 4])
    """
    found: dict[str, Tensor] = {}
    with ExitStack() as stack, torch.no_grad():
        for layer in layers:

            def keep(module: nn.Module, args: Any, output: Tensor, layer: str = layer) -> None:
                found[layer] = output.detach().clone()  # an activation that follows may write over it

            stack.callback(model.get_submodule(layer).register_forward_hook(keep).remove)
        model(*inputs) if isinstance(inputs, tuple) else model(inputs)
    return found
