"""Predictions of path patching for every chain: joint relevance, and products of scores of single sets or edges.

All are in units of the output, ``(N, upper, lower)``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn
from zennit.composites import EpsilonPlusFlat, LayerMapComposite
from zennit.rules import Epsilon, Norm, Pass
from zennit.types import Activation, AvgPool, Linear

from benchmarks.path_patching.nets import Case
from benchmarks.path_patching.patching import Patching
from nrm_plugin import Normalized, NRMAbsolute, NRMDefault, RelevanceMeasure, at

LRP_0 = LayerMapComposite([(Activation, Pass()), (AvgPool, Norm()), (Linear, Epsilon(1e-9))])


@dataclass(frozen=True)
class Chains:
    """The sets of one kind: names of the sites, lowest first, masks of the lowest one and of those above."""

    sites: tuple[str, ...]
    lower: list[Tensor]
    upper: list[list[Tensor]]


@dataclass(frozen=True)
class Measured:
    """A measure, the prefix of its names of the sites, and the number that it explains."""

    mu: RelevanceMeasure
    prefix: str

    def masses(self, chains: Chains) -> Tensor:
        """Joint relevance of every chain."""
        sites = [self.prefix + site for site in chains.sites]
        rows = []
        for masks in chains.upper:
            event = reduce(lambda a, b: a & b, (at(site)[mask] for site, mask in zip(sites[1:], masks, strict=True)))
            rows.append(summed(self.mu.marginal(sites[0], joint=event), chains.lower))
        return torch.stack(rows, 1) * self.mu.output[:, None, None]

    def single(self, chains: Chains) -> list[Tensor]:
        """Marginal of every set, by site: ``(N, 1, lower)``, and ``(N, upper, 1)`` for the others."""
        return by_site(chains, lambda site: self.mu.marginal(self.prefix + site), self.mu.output)

    def edges(self, chains: Chains) -> list[Tensor]:
        """Joint relevance of every two neighbouring sets of a chain of three and more sites."""
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
    """Sum of the values in each mask, ``(N, masks)``."""
    return values.flatten(1) @ torch.stack(list(masks)).flatten(1).to(values.dtype).T


def by_site(chains: Chains, values: Callable[[str], Tensor], scale: Tensor | float = 1.0) -> list[Tensor]:
    factor = scale[:, None] if isinstance(scale, Tensor) else scale
    found = [(factor * summed(values(chains.sites[0]), chains.lower)).unsqueeze(1)]
    for number, site in enumerate(chains.sites[1:]):
        found.append((factor * summed(values(site), [masks[number] for masks in chains.upper])).unsqueeze(2))
    return found


def product(parts: list[Tensor], total: Tensor) -> Tensor:
    """Product of shares of ``total``, in its unit."""
    return reduce(torch.mul, parts) / total[:, None, None] ** (len(parts) - 1)


# -- measures ---------------------------------------------------------------------------------------------------------


def leaky(case: Case, **settings: Any) -> Measured:
    """A measure of the whole net without a reference."""
    mu = RelevanceMeasure(case.whole, case.x, case.target, against=case.against, **settings)
    return Measured(mu, "rest.")


def signed(case: Case) -> Tensor:
    """1 for the target, -1 for the other output if there is one, ``(N, outputs)``."""
    with torch.no_grad():
        start = torch.zeros_like(case.whole(case.x)).scatter(1, case.target[:, None], 1.0)
    return start if case.against is None else start.scatter(1, case.against[:, None], -1.0)


def against_reference(case: Case, start: str, slopes: str) -> Measured:
    """The measure against the reference input, or of the part above the lowest site, against zero activations."""
    if start == "input":
        other = case.other.expand(len(case.x), *case.x.shape[1:])
        return Measured(RelevanceMeasure(case.whole, case.x, start=signed(case), reference=other, slopes=slopes), "rest.")  # type: ignore[arg-type]
    inputs = case.inputs(case.x)
    zero = torch.zeros_like(inputs[0]), *inputs[1:]
    return Measured(
        RelevanceMeasure(case.whole.rest, inputs, start=signed(case), reference=zero, slopes=slopes),  # type: ignore[arg-type]
        "",
    )


# -- plain PyTorch ----------------------------------------------------------------------------------------------------


def activations_and_gradients(case: Case) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Of the explained number at every site."""
    seen, outputs = case.run(tuple(part.requires_grad_() for part in case.inputs(case.x)), {})
    gradients = torch.autograd.grad(case.explained(outputs).sum(), list(seen.values()))
    return {site: a.detach() for site, a in seen.items()}, dict(zip(seen, gradients, strict=True))


def conditional_relevance(case: Case, chains: Chains) -> Tensor:
    """zennit-crp's relevance of the lowest site under a condition on the channels of the others."""
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
    """Whether no mask divides the positions of a channel; zennit-crp's conditions are channels."""
    masks = [mask for masks in chains.upper for mask in masks]
    return all(mask.ndim == 1 or bool((mask.flatten(1).all(1) == mask.flatten(1).any(1)).all()) for mask in masks)


def chosen(mask: Tensor) -> list[int]:
    """Numbers of the channels of a mask."""
    return mask.flatten(1).any(1).nonzero()[:, 0].tolist() if mask.ndim > 1 else mask.nonzero()[:, 0].tolist()  # type: ignore[no-any-return]


# -- all --------------------------------------------------------------------------------------------------------------

EXACT = "path patching"
REFERENCES = ("zero", "input")
CRP = "zennit-crp, EpsilonPlusFlat"


def predictions(case: Case, kinds: dict[str, Chains], start: str, crp: bool) -> Iterator[tuple[str, str, Tensor]]:
    """Kind, score, and its value for every chain; path patching itself is the score ``EXACT``."""
    patching = Patching(case, start)
    measures = {
        "joint, tangents": against_reference(case, start, "tangent"),
        "joint, secants": against_reference(case, start, "secant"),
        "joint, NRMDefault": leaky(case, composite=NRMDefault()),
        "joint, EpsilonPlusFlat": leaky(case, composite=EpsilonPlusFlat()),
        "joint, NRMAbsolute": leaky(case, composite=NRMAbsolute()),
        "joint, LRP-0": leaky(case, composite=Normalized(LRP_0, residual="sink")),
    }
    values, gradients = activations_and_gradients(case)
    total = patching.value
    change = total - case.explained(patching.run({}, patching.start)[1])
    for kind, chains in kinds.items():
        yield kind, EXACT, patching.effects(chains.sites, chains.lower, chains.upper)
        for name, measure in measures.items():
            yield kind, name, measure.masses(chains)
        if crp and is_of_channels(chains):
            yield kind, CRP, conditional_relevance(case, chains)
        exact = [patching.single(chains.sites[0], chains.lower).unsqueeze(1)]
        for number, site in enumerate(chains.sites[1:]):
            exact.append(patching.single(site, [masks[number] for masks in chains.upper]).unsqueeze(2))
        yield kind, "product of exact single patches", product(exact, change)
        for name in ("joint, NRMDefault", "joint, secants"):
            measure = measures[name]
            shares = measure.single(chains)
            yield kind, f"product of marginals, {name.removeprefix('joint, ')}", product(shares, measure.mu.output)
        taylor = by_site(chains, lambda site: gradients[site] * (values[site] - patching.reference[site]))
        yield kind, "product of gradient × change", product(taylor, change)
        yield kind, "product of gradient × activation", product(by_site(chains, lambda s: gradients[s] * values[s]), total)
        if len(chains.sites) > 2:
            edges = measures["joint, tangents"].edges(chains)
            yield kind, "product of EAP's edges", product(edges, change)
