"""Normalized composites by name in Zennit's registry, for tools that look one up there."""

from __future__ import annotations

from typing import Any, ClassVar

from zennit.composites import (
    EpsilonAlpha2Beta1,
    EpsilonAlpha2Beta1Flat,
    EpsilonGammaBox,
    EpsilonPlus,
    EpsilonPlusFlat,
    ExcitationBackprop,
    LayerMapComposite,
)
from zennit.core import Composite
from zennit.layer import Sum
from zennit.rules import Pass
from zennit.types import Activation, AvgPool, BatchNorm, Linear

from .canonizers import FuseBatchNorm
from .composites import Normalized, Sums, Uncovered, register
from .kernels import Residual
from .rules import Absolute, Relative


class Named(Normalized):
    """A composite of Zennit, normalized, as a class of its own.

    Args:
        residual, gain_limit, uncovered, sums: As in :class:`~nrm_plugin.Normalized`.
        rules: Arguments of Zennit's composite.

    Attributes:
        rules: Zennit's composite.

    Examples:
        >>> from zennit.composites import COMPOSITES
        >>> COMPOSITES["nrm_epsilon_plus"](residual="sink", epsilon=0.1).normalization.residual
        'sink'
    """

    rules: ClassVar[type[Composite]]

    def __init__(
        self,
        residual: Residual = "redistribute",
        gain_limit: float = 2.0,
        uncovered: Uncovered = "error",
        sums: Sums = "absolute",
        **rules: Any,
    ) -> None:
        super().__init__(self.rules(**rules), residual, gain_limit, uncovered, sums)


@register("nrm_epsilon_plus")
class NRMEpsilonPlus(Named):
    """Zennit's ``EpsilonPlus``, normalized; arguments as in :class:`Named`.

    Examples:
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.ReLU(), torch.nn.Flatten())
        >>> mu = RelevanceMeasure(net, torch.rand(1, 1, 4, 4), 3, composite=NRMEpsilonPlus())
        >>> mu.marginal("0").shape
        torch.Size([1, 2, 2, 2])
    """

    rules = EpsilonPlus


@register("nrm_epsilon_plus_flat")
class NRMEpsilonPlusFlat(Named):
    """Zennit's ``EpsilonPlusFlat``, normalized; arguments as in :class:`Named`.

    Examples:
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.ReLU(), torch.nn.Flatten())
        >>> mu = RelevanceMeasure(net, torch.rand(1, 1, 4, 4), 3, composite=NRMEpsilonPlusFlat())
        >>> mu.marginal("0").shape
        torch.Size([1, 2, 2, 2])
    """

    rules = EpsilonPlusFlat


@register("nrm_epsilon_alpha2_beta1")
class NRMEpsilonAlpha2Beta1(Named):
    """Zennit's ``EpsilonAlpha2Beta1``, normalized; arguments as in :class:`Named`.

    Examples:
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.ReLU(), torch.nn.Flatten())
        >>> mu = RelevanceMeasure(net, torch.rand(1, 1, 4, 4), 3, composite=NRMEpsilonAlpha2Beta1())
        >>> mu.marginal("0").shape
        torch.Size([1, 2, 2, 2])
    """

    rules = EpsilonAlpha2Beta1


@register("nrm_epsilon_alpha2_beta1_flat")
class NRMEpsilonAlpha2Beta1Flat(Named):
    """Zennit's ``EpsilonAlpha2Beta1Flat``, normalized; arguments as in :class:`Named`.

    Examples:
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.ReLU(), torch.nn.Flatten())
        >>> mu = RelevanceMeasure(net, torch.rand(1, 1, 4, 4), 3, composite=NRMEpsilonAlpha2Beta1Flat())
        >>> mu.marginal("0").shape
        torch.Size([1, 2, 2, 2])
    """

    rules = EpsilonAlpha2Beta1Flat


@register("nrm_epsilon_gamma_box")
class NRMEpsilonGammaBox(Named):
    """Zennit's ``EpsilonGammaBox``, normalized; arguments as in :class:`Named`.

    Examples:
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.ReLU(), torch.nn.Flatten())
        >>> mu = RelevanceMeasure(net, torch.rand(1, 1, 4, 4), 3, composite=NRMEpsilonGammaBox(low=-1, high=1))
        >>> mu.marginal("0").shape
        torch.Size([1, 2, 2, 2])
    """

    rules = EpsilonGammaBox


@register("nrm_excitation_backprop")
class NRMExcitationBackprop(Named):
    """Zennit's ``ExcitationBackprop``, normalized; arguments as in :class:`Named`.

    Examples:
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.ReLU(), torch.nn.Flatten())
        >>> mu = RelevanceMeasure(net, torch.rand(1, 1, 4, 4), 3, composite=NRMExcitationBackprop())
        >>> mu.marginal("0").shape
        torch.Size([1, 2, 2, 2])
    """

    rules = ExcitationBackprop


@register("nrm_relative")
class NRMRelative(Normalized):
    """The relative rule on all layers with weights and average pooling; a division only where skips join.

    Ask for its measure given survival, ``given=~ABSORBED``: it conserves relevance up to a factor.

    Args:
        layer_map: Rules that come before those of the composite, as in Zennit.
        canonizers: As in Zennit; None for batch-norm fusion.
        uncovered: As in :class:`~nrm_plugin.Normalized`.

    Examples:
        >>> net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
        >>> mu = RelevanceMeasure(net, torch.rand(5, 3), 1, composite=NRMRelative())
        >>> (mu.marginal("input").sum(1) + mu.sink("input")).round(decimals=3)
        tensor([1., 1., 1., 1., 1.])
        >>> mu.walk_variation(surviving=True).shape
        torch.Size([5])

    Source: ours, made after the abstract of arXiv 2501.14322; see docs/relative.md.
    """

    def __init__(
        self,
        layer_map: list[Any] | None = None,
        canonizers: list[Any] | None = None,
        uncovered: Uncovered = "error",
    ) -> None:
        rules = [
            (Activation, Pass()),
            (BatchNorm, Pass()),
            (Sum, Absolute()),
            (AvgPool, Relative()),
            (Linear, Relative()),
        ]
        chosen = [FuseBatchNorm()] if canonizers is None else canonizers
        composite = LayerMapComposite([*(layer_map or []), *rules], canonizers=chosen)
        super().__init__(composite, residual="sink", uncovered=uncovered)
