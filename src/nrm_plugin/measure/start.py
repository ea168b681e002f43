"""Where a measure starts: at weighted outputs, or at weighted differences of outputs."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..model.targets import chosen_target, normalized, sample_sums, start_vector
from ..recording.recording import Recording
from .difference_start import difference_start


def start_of(recording: Recording, target: Any, start: Any) -> tuple[Tensor, Tensor]:
    """Starts a measure.

    Args:
        recording: The recording.
        target: As in :class:`~nrm_plugin.RelevanceMeasure`.
        start: As in :class:`~nrm_plugin.RelevanceMeasure`.

    Returns:
        The start vector, in the layout of the tensor where the measure starts, and the explained number, ``(N,)``.

    Raises:
        TargetError: If an argument does not fit the outputs.
        FoldingError: If a sample depends on other samples.
    """
    batched, every = recording.samples.batched, recording.references
    outputs = recording.unfolded()[::every]
    vector = start_vector(outputs, chosen_target(target, recording.outputs()[::every], batched), start)
    if recording.has_reference:
        return difference_start(recording, vector)
    return recording.started(normalized(vector)), sample_sums(vector * outputs) / sample_sums(vector)


__all__ = ["start_of"]
