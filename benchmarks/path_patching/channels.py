"""Channels of all layers in one ranking: agreement with the ablation of single channels, and of the ranked channels.

An ablated channel is set to zero, or to its activations for the reference input. SRG is the mean explained output while
the channels are ablated in the order of their scores: least relevant first minus most relevant first.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack

import torch
from captum.attr import InternalInfluence, LayerConductance, LayerIntegratedGradients
from torch import Tensor
from zennit.composites import EpsilonPlusFlat
from zennit.core import Composite

from benchmarks.circuits.metrics import correlation
from benchmarks.path_patching.nets import Case
from benchmarks.path_patching.scores import LRP_0, signed
from nrm_plugin import Normalized, NRMAbsolute, NRMDefault, RelevanceMeasure

SHARES = (0.0, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 1.0)
STEPS = 20
Maps = dict[str, Tensor]
"""A tensor by layer."""


def seen(case: Case, x: Tensor, patched: Callable[[str, Tensor], Tensor] | None = None) -> tuple[Maps, Tensor]:
    """Returns the outputs of the layers and of the net, where ``patched`` may change those of a layer."""
    found: Maps = {}
    with ExitStack() as stack:
        for layer in case.layers:

            def hook(module: object, args: object, output: Tensor, layer: str = layer) -> Tensor:
                found[layer] = output if patched is None else patched(layer, output)
                return found[layer]

            stack.callback(case.whole.get_submodule(layer).register_forward_hook(hook).remove)
        outputs = case.whole(x)
    return {layer: found[layer] for layer in case.layers}, outputs  # not in the order of the run


def by_channel(maps: Maps) -> Tensor:
    """Returns the sums over positions, with the channels of all layers concatenated, ``(N, K)``."""
    return torch.cat([one.detach().flatten(2).sum(2) if one.ndim > 2 else one.detach() for one in maps.values()], 1)


# -- scores -----------------------------------------------------------------------------------------------------------


def gradients(case: Case, composite: Composite | None = None) -> tuple[Maps, Maps]:
    """Returns layer outputs, and gradients of the explained output there; with a composite, Zennit's relevance."""
    with ExitStack() as stack:
        if composite is not None:
            stack.enter_context(composite.context(case.whole))
        values, outputs = seen(case, case.x.clone().requires_grad_())
        number = case.explained(outputs)
        start = number.detach() if composite is not None else torch.ones_like(number)
        slopes = torch.autograd.grad(number, list(values.values()), start)
    return {layer: one.detach() for layer, one in values.items()}, dict(zip(values, slopes, strict=True))


def against_reference(case: Case, other: Tensor) -> dict[str, Tensor]:
    """Returns the scores that depend on a reference input; Captum's methods run once for each layer."""
    found = {}
    for name, slopes in (("μ, tangents", "tangent"), ("μ, secants", "secant")):
        mu = RelevanceMeasure(case.whole, case.x, start=signed(case), reference=other, slopes=slopes)  # type: ignore[arg-type]
        found[name] = by_channel(mu.marginal(list(case.layers))) * mu.output[:, None]
    for method in (LayerIntegratedGradients, LayerConductance, InternalInfluence):
        maps = {}
        for layer in case.layers:
            explainer = method(case.whole, case.whole.get_submodule(layer))
            maps[layer] = explainer.attribute(case.x, baselines=other, target=case.target, n_steps=STEPS)
        found[method.__name__] = by_channel(maps)
    return found


def without_reference(case: Case) -> dict[str, Tensor]:
    """Returns all other scores."""
    composites = {
        "μ, NRMDefault": NRMDefault(),
        "μ, EpsilonPlusFlat": EpsilonPlusFlat(),
        "μ, NRMAbsolute": NRMAbsolute(),
        "μ, LRP-0": Normalized(LRP_0, residual="sink", sums="signed"),
    }
    found = {}
    for name, composite in composites.items():
        mu = RelevanceMeasure(case.whole, case.x, case.target, composite=composite)
        found[name] = by_channel(mu.marginal(list(case.layers))) * mu.output[:, None]
    values, slopes = gradients(case)
    found["activation"] = by_channel(values)
    found["gradient × activation"] = by_channel({layer: slopes[layer] * one for layer, one in values.items()})
    found["Zennit, EpsilonPlusFlat"] = by_channel(gradients(case, EpsilonPlusFlat())[1])
    draw = torch.Generator().manual_seed(0)
    found["random"] = torch.rand(found["activation"].shape, generator=draw).to(case.x.dtype)
    return found


# -- ablation ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def ablated(case: Case, retained: Tensor, before: Maps) -> Tensor:
    """Returns the explained output if all channels but those retained, ``(N, K)``, take the values of ``before``."""
    parts = dict(zip(before, retained.split([one.shape[1] for one in before.values()], 1), strict=True))

    def patched(layer: str, output: Tensor) -> Tensor:
        mask = parts[layer].reshape(*parts[layer].shape, *(1,) * (output.ndim - 2))
        return torch.where(mask, output, before[layer])

    return case.explained(seen(case, case.x, patched)[1])


def single_effects(case: Case, before: Maps) -> Tensor:
    """Returns the decrease of the explained output for each channel that is ablated alone, ``(N, K)``."""
    count = sum(one.shape[1] for one in before.values())
    whole = torch.ones(len(case.x), count, dtype=torch.bool)
    number = ablated(case, whole, before)
    channels = torch.eye(count, dtype=torch.bool)
    return torch.stack([number - ablated(case, whole & ~channel, before) for channel in channels], 1)


def srg(case: Case, scores: Tensor, before: Maps) -> Tensor:
    """Returns the mean explained output, least relevant channels first minus most relevant first, ``(N,)``."""
    rank = scores.argsort(dim=1, stable=True).argsort(1)
    areas = []
    for order in (rank, scores.shape[1] - 1 - rank):
        curve = [ablated(case, order >= round(share * scores.shape[1]), before) for share in SHARES]
        areas.append(torch.trapezoid(torch.stack(curve), torch.tensor(SHARES, dtype=curve[0].dtype), dim=0))
    return areas[0] - areas[1]


def ranked(case: Case) -> dict[str, dict[str, dict[str, Tensor]]]:
    """Returns both metrics of every score, by fill and by sample.

    Channels are ablated to zero, with the zero image as reference of the scores that have one, or to their values at
    the reference input, which is then the reference of these scores.
    """
    shared = without_reference(case)
    found: dict[str, dict[str, dict[str, Tensor]]] = {}
    for fill in ("zero", "input"):
        other = case.other.expand_as(case.x) if fill == "input" else torch.zeros_like(case.x)
        with torch.no_grad():
            before, _ = seen(case, other)
        if fill == "zero":
            before = {layer: torch.zeros_like(one) for layer, one in before.items()}
        effects = single_effects(case, before)
        for name, values in {**against_reference(case, other), **shared}.items():
            found.setdefault(fill, {})[name] = {
                "correlation": correlation(values.double(), effects.double()).float(),
                "SRG": srg(case, values, before).float(),
            }
    return found
