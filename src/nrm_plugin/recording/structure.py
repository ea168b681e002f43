"""The structure of a recording, which does not depend on values and is determined only once."""

from __future__ import annotations

from torch import Tensor

from .audit import check_joined, check_known
from .graph import Graph
from .observer import Observer
from .samples import Samples
from .taps import Taps


class Structure:
    """Graph, taps and samples of one forward pass, audited.

    Args:
        observer: The observer of the forward pass.
        output: The tensor at which the measure starts.
        count: Number of samples.
        batched: Whether the inputs have a dimension of samples.

    Raises:
        InputError: The output depends on none of the inputs.
        UnsupportedOperationError: An operation between inputs and output has no kernel.
    """

    def __init__(self, observer: Observer, output: Tensor, count: int, batched: bool) -> None:
        self.graph = Graph(output, observer.leaves)
        check_joined(self.graph, observer.leaves)
        check_known(self.graph, observer.observed)
        self.samples = Samples(self.graph, count, batched)
        self.taps = Taps(self.graph, observer.observed, observer.modules, observer.containers, batched)


__all__ = ["Structure"]
