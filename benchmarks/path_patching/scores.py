"""Predictions of path patching for every chain: joint relevance, and products of single-set scores or edges.

All are in units of the output, ``(N, upper, lower)``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from zennit.composites import EpsilonPlus, EpsilonPlusFlat, LayerMapComposite
from zennit.core import Composite
from zennit.rules import Epsilon, Norm, Pass
from zennit.types import Activation, AvgPool, Convolution, Linear

from benchmarks.path_patching.nets import Case
from benchmarks.path_patching.patching import Patching
from nrm_plugin import ConservingEpsilon, NRMAbsolute, NRMDefault, RelevanceMeasure, at
from nrm_plugin.measure.references import Slopes

LRP_0 = LayerMapComposite([(Activation, Pass()), (AvgPool, Norm()), (Linear, Epsilon(1e-9))])


@dataclass(frozen=True)
class Chains:
    """The sets of one kind: names of the sites, lowest first, masks of the lowest one and of those above."""

    sites: tuple[str, ...]
    lower: list[Tensor]
    upper: list[list[Tensor]]


@dataclass(frozen=True)
class Measured:
    """A measure of the part above the lowest site. The relevance at a site does not depend on what is below it."""

    mu: RelevanceMeasure

    def masses(self, chains: Chains) -> Tensor:
        """Returns the joint relevance of every chain."""
        lowest, *above = chains.sites
        rows = []
        for masks in chains.upper:
            event = reduce(lambda a, b: a & b, (at(site)[mask] for site, mask in zip(above, masks, strict=True)))
            rows.append(summed(self.mu.marginal(lowest, joint=event), chains.lower))
        return torch.stack(rows, 1) * self.mu.output[:, None, None]

    def single(self, chains: Chains) -> list[Tensor]:
        """Returns the marginal of every set, by site: ``(N, 1, lower)``, and ``(N, upper, 1)`` for the others."""
        return by_site(chains, lambda site: self.mu.marginal(site), self.mu.output)

    def edges(self, chains: Chains) -> list[Tensor]:
        """Returns the joint relevance of each pair of neighboring sets in a chain of three or more sites."""
        lowest = Chains(chains.sites[:2], chains.lower, [masks[:1] for masks in chains.upper])
        found = [self.masses(lowest)]
        for number in range(1, len(chains.sites) - 1):
            rows = []
            for masks in chains.upper:
                pair = Chains(chains.sites[number : number + 2], [masks[number - 1]], [[masks[number]]])
                rows.append(self.masses(pair)[:, 0])
            found.append(torch.stack(rows, 1))
        return found


def summed(values: Tensor, masks: Sequence[Tensor]) -> Tensor:
    """Returns the sum of the values in each mask, ``(N, masks)``."""
    return values.flatten(1) @ torch.stack(list(masks)).flatten(1).to(values.dtype).T


def by_site(chains: Chains, values: Callable[[str], Tensor], scale: Tensor | float = 1.0) -> list[Tensor]:
    factor = scale[:, None] if isinstance(scale, Tensor) else scale
    found = [(factor * summed(values(chains.sites[0]), chains.lower)).unsqueeze(1)]
    for number, site in enumerate(chains.sites[1:]):
        found.append((factor * summed(values(site), [masks[number] for masks in chains.upper])).unsqueeze(2))
    return found


def weighted(gradients: Tensor) -> Tensor:
    """Returns the weights of GradCAM: the mean over positions for each channel or head, of the same shape."""
    means = gradients.unsqueeze(-1).flatten(2).mean(2)
    return means.reshape(*means.shape, *(1,) * (gradients.ndim - 2)).expand_as(gradients)


def shares(values: Tensor) -> Tensor:
    """Returns the values divided by their sum for each sample."""
    return values / values.flatten(1).sum(1).clamp(min=1e-30).reshape(-1, *(1,) * (values.ndim - 1))


def product(parts: list[Tensor], total: Tensor) -> Tensor:
    """Returns the product of scores as shares of ``total``, in units of ``total``."""
    return reduce(torch.mul, parts) / total[:, None, None] ** (len(parts) - 1)


# -- measures ---------------------------------------------------------------------------------------------------------


def leaky(case: Case, **settings: Any) -> Measured:
    """Returns a measure without a reference."""
    inputs = case.inputs(case.x)
    return Measured(RelevanceMeasure(case.whole.rest, inputs, case.target, against=case.against, **settings))


def signed(case: Case) -> Tensor:
    """Returns 1 for the target, -1 for the other output if there is one, and 0 otherwise, ``(N, outputs)``."""
    with torch.no_grad():
        start = torch.zeros_like(case.whole(case.x)).scatter(1, case.target[:, None], 1.0)
    return start if case.against is None else start.scatter(1, case.against[:, None], -1.0)


def against_reference(case: Case, patching: Patching, slopes: Slopes) -> Measured:
    """Returns the measure against the reference of path patching."""
    mu = RelevanceMeasure(case.whole.rest, patching.inputs, start=signed(case), reference=patching.start, slopes=slopes)
    return Measured(mu)


# -- plain PyTorch ----------------------------------------------------------------------------------------------------


def activations_and_gradients(case: Case) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Returns the activations of every site, and gradients of the explained output there."""
    seen, outputs = case.run(tuple(part.requires_grad_() for part in case.inputs(case.x)), {})
    gradients = torch.autograd.grad(case.explained(outputs).sum(), list(seen.values()))
    return {site: a.detach() for site, a in seen.items()}, dict(zip(seen, gradients, strict=True))


def conditional_relevance(case: Case, chains: Chains) -> Tensor:
    """Returns zennit-crp's relevance of the lowest site under a condition on the channels of the others."""
    from crp.attribution import CondAttribution

    attribution = CondAttribution(case.whole)
    total = case.explained(case.whole(case.x)).detach()
    sites = [f"rest.{site}" for site in chains.sites]
    rows = []
    for masks in chains.upper:
        # zennit-crp expects the highest layer first.
        channels = {site: chosen(mask) for site, mask in list(zip(sites[1:], masks, strict=True))[::-1]}
        conditions = [{**channels, "y": [int(y)]} for y in case.target]
        result = attribution(
            case.x.clone().requires_grad_(), conditions, EpsilonPlusFlat(), record_layer=sites[:1], init_rel=1
        )
        rows.append(summed(result.relevances[sites[0]].detach(), chains.lower))
    return torch.stack(rows, 1) * total[:, None, None]


def is_of_channels(chains: Chains) -> bool:
    """Returns True if all masks consist of whole channels, as the conditions of zennit-crp."""
    masks = [mask for masks in chains.upper for mask in masks]
    return all(mask.ndim == 1 or bool((mask.flatten(1).all(1) == mask.flatten(1).any(1)).all()) for mask in masks)


def chosen(mask: Tensor) -> list[int]:
    """Returns the indices of the channels of a mask."""
    return mask.flatten(1).any(1).nonzero()[:, 0].tolist() if mask.ndim > 1 else mask.nonzero()[:, 0].tolist()  # type: ignore[no-any-return]


# -- all --------------------------------------------------------------------------------------------------------------

EXACT = "path patching"
REFERENCES = ("zero", "input")
SLOPES: tuple[Slopes, ...] = ("tangent", "secant")
CRP = "zennit-crp, EpsilonPlusFlat"


@dataclass(frozen=True)
class Scores:
    """Everything that is computed once per case: measures, activations and gradients."""

    case: Case
    crp: bool
    measures: dict[str, Measured]
    values: dict[str, Tensor]
    gradients: dict[str, Tensor]

    @classmethod
    def of(cls, case: Case, crp: bool) -> Scores:
        first = [(Convolution, ConservingEpsilon(0.2))]  # the first convolution of the net lies below all sites
        composites: dict[str, Composite] = {"joint, NRMDefault": NRMDefault(first_map=first)}
        if not case.is_large:
            composites |= {"joint, EpsilonPlusFlat": EpsilonPlus(), "joint, NRMAbsolute": NRMAbsolute()}
        measures = {name: leaky(case, composite=composite) for name, composite in composites.items()}
        return cls(case, crp, measures, *activations_and_gradients(case))

    def without_reference(self, chains: Chains) -> Iterator[tuple[str, Tensor]]:
        """Yields the scores that do not depend on a reference."""
        for name, measure in self.measures.items():
            yield name, measure.masses(chains)
        if self.crp and self.case.x.is_floating_point() and is_of_channels(chains):
            yield CRP, conditional_relevance(self.case, chains)
        default = self.measures["joint, NRMDefault"]
        yield "product of marginals, NRMDefault", product(default.single(chains), default.mu.output)
        total = self.case.explained(self.case.whole(self.case.x))
        weights = {site: weighted(self.gradients[site]) for site in chains.sites}
        parts = by_site(chains, lambda site: self.gradients[site] * self.values[site])
        yield "product of gradient × activation", product(parts, total)
        yield "product of GradCAM", product(by_site(chains, lambda site: weights[site] * self.values[site]), total)
        sizes = by_site(chains, lambda site: shares(self.values[site].abs()))
        yield "product of activations", reduce(torch.mul, sizes) * total[:, None, None]

    def against(
        self, chains: Chains, patching: Patching, measures: dict[str, Measured]
    ) -> Iterator[tuple[str, Tensor]]:
        """Yields path patching, and scores that use its reference."""
        yield EXACT, patching.effects(chains.sites, chains.lower, chains.upper)
        for name, measure in measures.items():
            yield name, measure.masses(chains)
        change = patching.value - self.case.explained(patching.run({}, patching.start)[1])
        exact = [patching.single(chains.sites[0], chains.lower).unsqueeze(1)]
        for number, site in enumerate(chains.sites[1:]):
            exact.append(patching.single(site, [masks[number] for masks in chains.upper]).unsqueeze(2))
        yield "product of exact single patches", product(exact, change)
        yield "product of marginals, secants", product(measures["joint, secants"].single(chains), change)
        parts = by_site(chains, lambda site: self.gradients[site] * (self.values[site] - patching.reference[site]))
        yield "product of gradient × change", product(parts, change)
        if len(chains.sites) > 2:
            yield "product of EAP's edges", product(measures["joint, tangents"].edges(chains), change)


def predictions(case: Case, kinds: dict[str, Chains], crp: bool) -> Iterator[tuple[str, str, str, Tensor]]:
    """Yields the kind, reference, score, and its value for every chain; path patching itself is the score ``EXACT``."""
    scores = Scores.of(case, crp)
    shared = {kind: list(scores.without_reference(chains)) for kind, chains in kinds.items()}
    for start in REFERENCES[1 if case.is_large else 0 :]:
        patching = Patching(case, start)
        measures = {f"joint, {slopes}s": against_reference(case, patching, slopes) for slopes in SLOPES}
        for kind, chains in kinds.items():
            for name, values in (*scores.against(chains, patching, measures), *shared[kind]):
                yield kind, start, name, values
