"""Deprecated search for the best walk of single neurons; use ``top_walks(mu, k=1, over="neuron")`` instead."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..errors import NRMError
from ..imports import warn_deprecated
from ..measure.measure import RelevanceMeasure
from .layer_chain import check_count
from .walks import top_walks


@dataclass(frozen=True)
class NeuronWalk:
    """Walk of single neurons with the largest mass, as returned by the deprecated :func:`best_walk`.

    Attributes:
        mass: Mass of the walk.
        neurons: Index of the neuron at each named tap that the walk crosses, from the output to the input.

    Examples:
        >>> NeuronWalk(0.5, {"1": (3,)}).neurons["1"]
        (3,)
    """

    mass: float
    neurons: dict[str, tuple[int, ...]]


def best_walk(mu: RelevanceMeasure, chunk: int = 256) -> NeuronWalk:
    """Deprecated: use ``top_walks(mu, k=1, over="neuron")`` and :meth:`TopWalks.neurons`.

    Returns the walk of single neurons with the largest mass.

    Args:
        mu: A single-sample measure, with nonnegative kernels.
        chunk: Ignored; the ``max_memory`` of the measure limits the memory.

    Raises:
        ValueError: If the measure contains several samples.
        NRMError: If a kernel has negative elements or if all relevance is absorbed.

    Examples:
        >>> import warnings
        >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> mu = RelevanceMeasure(net, torch.randn(1, 3), 1, composite=NRMAbsolute())
        >>> with warnings.catch_warnings(action="ignore"):
        ...     walk = best_walk(mu)
        >>> walk.neurons == top_walks(mu, k=1, over="neuron").neurons(0)
        True
    """
    warn_deprecated("best_walk(mu)", 'top_walks(mu, k=1, over="neuron")')
    check_count(chunk, "chunk")
    top = top_walks(mu, k=1, over="neuron", budget=math.inf)
    if not top.walks:
        raise NRMError("no walk carries relevance to an input, since all of it is absorbed.")
    return NeuronWalk(top.walks[0].mass, top.neurons(0))
