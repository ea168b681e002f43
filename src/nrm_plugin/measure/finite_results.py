"""Check for non-finite results and search for the step that produces them.

Only results are checked. If a check fails, an additional pass searches for the first step with non-finite relevance.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from ..errors import NonFiniteError
from ..model.inputs_and_outputs import are_finite, is_finite
from ..model.nested_tensors import tensors_in
from ..recording.places import Buffer, Edge, Sink
from ..recording.propagation import Vectors, pull
from ..recording.recording import Recording


class Measure(Protocol):
    """Protocol for the attributes of a measure that the search for non-finite relevance uses."""

    @property
    def _recording(self) -> Recording: ...

    @property
    def _start(self) -> Tensor: ...


def check_finite(measure: Any, results: Any) -> None:
    """Raises :class:`NonFiniteError` if a result is not finite. The message names the step that produces it.

    Args:
        measure: Measure that computed the results.
        results: A tensor, or a list, tuple or dictionary of these; other objects are not checked.
    """
    if not are_finite(tensors_in(results)):
        raise NonFiniteError(_message(measure))


def _message(measure: Measure) -> str:
    recording, start = measure._recording, measure._start
    for is_absolute in (False, True):
        vertex = source(recording, start, is_absolute)
        if vertex is not None:
            name, step = recording.taps.name_at(vertex), recording.graph.vertices[vertex].step
            rule = f" ({step.rule})" if step is not None and step.rule else ""
            return (
                f"relevance is nan or inf. Finite relevance arrives at {name!r}{rule}, but not all that leaves it is "
                f"finite: values of the model are nan or inf there, or too large or too small for {start.dtype}. "
                "Keep them finite, as by a large negative number in place of -inf, or a small number added to a "
                "denominator or to the argument of log; if they overflow, use float64: `model.double()` and "
                "`inputs.double()`."
            )
    return (
        f"a result is nan or inf, although all relevance is finite: it exceeds the range of {start.dtype}. Use "
        "float64: `model.double()` and `inputs.double()`."
    )


def source(recording: Recording, start: Tensor, is_absolute: bool = False) -> int | None:
    """Returns the first vertex that turns finite relevance into non-finite relevance.

    Args:
        recording: The recording of the forward pass.
        start: The relevance of the outputs.
        is_absolute: Whether to propagate with the absolute values of all kernels.
    """
    try:
        with torch.inference_mode(False), torch.no_grad():
            pull(recording.graph, [(recording.graph.output, {"": start})], _Search(), is_absolute)
    except _FoundError as found:
        return found.vertex
    return None


class _FoundError(Exception):
    """Raised to stop the pass at the first non-finite relevance."""

    def __init__(self, vertex: int) -> None:
        super().__init__(vertex)
        self.vertex = vertex


class _Search:
    """Callbacks of a pass that stop it at the first non-finite relevance."""

    def at_buffer(self, buffer: Buffer, vectors: Vectors[str]) -> Vectors[str]:
        return self._checked(buffer.vertex, vectors)

    def at_edge(self, edge: Edge, vectors: Vectors[str]) -> Vectors[str]:
        return self._checked(edge.vertex, vectors)

    def at_sink(self, sink: Sink, number: int, kind: str, vectors: Vectors[str], share: Tensor) -> None:
        self._checked(sink.vertex, {key: vector * share for key, vector in vectors.items()})

    def _checked(self, vertex: int, vectors: Vectors[str]) -> Vectors[str]:
        if not all(map(is_finite, vectors.values())):
            raise _FoundError(vertex)
        return vectors


__all__ = ["check_finite", "source"]
