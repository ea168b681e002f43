"""Mass, sink, bypass and variation of each layer, with the total of plain LRP for comparison."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import InputError
from .measure import RelevanceMeasure


@dataclass(frozen=True)
class ProfileRow:
    """Profile of one layer, with ``mass + sink + bypass == 1``.

    Attributes:
        layer: Name of the tap.
        mass: Mass of the walks that cross the tap.
        sink: Mass of the walks that are absorbed above the tap.
        bypass: Mass of the walks that bypass the tap.
        variation: Tap variation, at least 1. A value above 1 means that relevance at the tap has mixed signs.
        plain: Total relevance of plain LRP with the same rules and an initial relevance of 1 at the output, or None if
            it was not computed.
    """

    layer: str
    mass: float
    sink: float
    bypass: float
    variation: float
    plain: float | None = None


def profile(
    mu: RelevanceMeasure, layers: Sequence[str] | None = None, plain: RelevanceMeasure | None = None, sample: int = 0
) -> list[ProfileRow]:
    """Summarizes a measure by one row per layer, from the output to the input.

    Args:
        mu: The measure to summarize.
        layers: Names of taps; by default, all taps.
        plain: A measure of the same model and inputs with the same rules and ``residual="sink"``. Its marginals are
            the relevance of LRP without normalization, starting from 1 at the output.
        sample: Index of the sample.

    Raises:
        InputError: If ``plain`` redistributes relevance or is a measure of a different model.

    Examples:
        >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> mu, plain = (RelevanceMeasure(net, torch.randn(1, 3), 1, residual=r) for r in ("redistribute", "sink"))
        >>> [row.layer for row in profile(mu, plain=plain)]
        ['output', '1', '0', 'input']
    """
    if plain is not None and plain.composite.normalization.residual != "sink":
        raise InputError("plain= must be a measure with residual='sink'; this one redistributes.")
    if plain is not None and plain.layers != mu.layers:
        raise InputError("plain= is a measure of another model: its layers are not the same.")
    known = {name: place for place, name in enumerate(mu.layers)}
    names = list(dict.fromkeys(layers)) if layers is not None else _distinct(mu)
    names.sort(key=lambda name: -known.get(name, 0))
    masses = mu.marginal(names)
    plains = {} if plain is None else plain.marginal(names)
    return [
        ProfileRow(
            name,
            float(masses[name][sample].sum()),
            float(mu.sink(name)[sample]),
            float(mu.bypass(name)[sample]),
            float(mu.variation(name)[sample]),
            float(plains[name][sample].sum()) if plains else None,
        )
        for name in names
    ]


def _distinct(mu: RelevanceMeasure) -> list[str]:
    """Returns all layers except aliases. If the last layer is the output tensor, it is named ``"output"``."""
    *below, last = mu.layers
    if len(below) > 1 and mu.shape(below[-1]) == mu.shape(last):
        below.pop()
    return [*below, last]


__all__ = ["ProfileRow", "profile"]
