"""The initial relevance of a measure: weighted outputs, a contrast between outputs, or differences from a reference."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from ..errors import TargetError
from ..model.contrast import contrast_vector, explained_number
from ..model.targets import chosen_target, normalized, sample_sums, start_vector
from .difference_start import difference_start


class Outputs(Protocol):
    """Protocol for objects with the outputs of a model, such as a recording, that provide the initial relevance."""

    references: int

    @property
    def is_batched(self) -> bool:
        """True if the inputs have a sample dimension."""

    @property
    def has_reference(self) -> bool:
        """True if the measure explains differences from a reference."""

    def unfolded(self) -> Tensor:
        """Returns the outputs with samples first, in shape ``(N, …)``."""

    def outputs(self) -> Tensor:
        """Returns the outputs in the shape returned by the model."""

    def differences(self) -> Tensor:
        """Returns the outputs minus the outputs at the reference, in shape ``(N, …)``."""

    def started(self, relevance: Tensor, contrast: Tensor | None = None) -> Tensor:
        """Implements :meth:`~nrm_plugin.recording.recording.Recording.started`."""


def every_one(outputs: Tensor, references: int) -> Tensor:
    """Returns one row of outputs per sample, without the copies for additional references."""
    return outputs if references == 1 else outputs[::references]


def start_of(recording: Outputs, target: Any, start: Any, against: Any) -> tuple[Tensor, Tensor]:
    """Computes the start vector of a measure and the scalar that it explains for each sample.

    Args:
        recording: The recording of the forward pass.
        target: As in :class:`~nrm_plugin.RelevanceMeasure`.
        start: As in :class:`~nrm_plugin.RelevanceMeasure`.
        against: As in :class:`~nrm_plugin.RelevanceMeasure`.

    Returns:
        The start vector, in the layout of the tensor at which the measure starts, and the explained scalar, of shape
        ``(N,)``.

    Raises:
        TargetError: If an argument does not match the outputs.
        FoldingError: If a sample depends on other samples.
    """
    if start is not None and against is not None:
        raise TargetError(
            "give start= or against=, not both: against= computes the start vector from target= and other outputs. A "
            "function passed as against= may return the weights of all outputs."
        )
    batched, every = recording.is_batched, recording.references
    outputs = recording.unfolded()[::every]
    if against is None:
        vector = start_vector(outputs, chosen_target(target, every_one(recording.outputs(), every), batched), start)
    else:
        vector = contrast_vector(outputs, target, against, batched)
    if recording.has_reference:
        return difference_start(recording, vector)
    if against is None:
        return recording.started(normalized(vector)), sample_sums(vector * outputs) / sample_sums(vector)
    number = explained_number(outputs, vector)
    return recording.started(normalized(vector.abs()), vector), number


__all__ = ["every_one", "start_of"]
