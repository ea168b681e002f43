"""The structure of a recording, which does not depend on values: graph, named tensors and samples."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence

import torch
from torch import Tensor

from .audit import check_joined, check_known
from .contrast_step import ContrastNode
from .forward_observer import Observer
from .graph import Graph
from .module_names import OUTPUT
from .sample_positions import Samples
from .sample_rows import all_keep_rows, positions_are_fixed, vertices_of_rows
from .taps import Label, Observed, Taps


class Structure:
    """Structure of a recording: the graph, the taps (named tensors), and the position of the samples in each tensor.

    On construction, an error is raised if an operation of the graph has no kernel.

    Args:
        observer: The observer of the forward pass.
        output: The tensor at which the measure starts.
        count: Number of samples.
        batched: Whether the inputs have a batch dimension.
        shapes_of_two: As in :class:`~nrm_plugin.recording.sample_positions.Samples`.
        output_has_rows: As in :class:`~nrm_plugin.recording.sample_positions.Samples`.
        contrast: The node of a contrast between outputs, at which the measure starts, or None.

    Raises:
        InputError: If the output does not depend on any input.
        UnsupportedOperationError: If an operation between the inputs and the output has no kernel.
    """

    def __init__(
        self,
        observer: Observer,
        output: Tensor,
        count: int,
        batched: bool,
        shapes_of_two: Callable[[], Mapping[Hashable, torch.Size]],
        output_has_rows: bool,
        contrast: ContrastNode | None = None,
    ) -> None:
        self.graph = Graph(output, observer.leaves, contrast)
        check_joined(self.graph, observer.leaves)
        check_known(self.graph, observer.observed)
        may_mix = observer.has_untracked and count > 1
        inputs = {id(leaf) for leaf in observer.inputs}
        looked_up = [leaf for leaf in observer.leaves if id(leaf) not in inputs]
        is_plain = batched and not may_mix and all_keep_rows(self.graph, count, looked_up)
        self.samples = Samples(self.graph, count, batched, is_plain, shapes_of_two)
        self.samples.may_mix = may_mix
        self.samples.are_fixed = not may_mix and positions_are_fixed(self.graph)
        if not is_plain:
            leaves = {n: vertex.leaf for n, vertex in enumerate(self.graph.vertices) if vertex.leaf is not None}
            self.samples.inputs = {number for number, leaf in leaves.items() if id(leaf) in inputs}
            self.samples.output_has_rows = output_has_rows = output_has_rows or contrast is not None
            ends = self.samples.inputs | ({self.graph.output.vertex} if output_has_rows else set())
            self.samples.rows = vertices_of_rows(self.graph, count, ends) if count == 1 else set()
        observed = observer.observed if contrast is None else _with_contrast(observer.observed, contrast)
        self.taps = Taps(self.graph, observed, observer.modules, observer.containers, self.samples)


def _with_contrast(observed: Sequence[Observed], contrast: ContrastNode) -> list[Observed]:
    """Replaces the output of the model with the contrast among the observed tensors."""
    others = [seen for seen in observed if seen.label.name != OUTPUT]
    return [*others, Observed(Label(OUTPUT, "output", 0, None), contrast, 0, contrast.shape, None)]


__all__ = ["Structure"]
