"""Module outputs for ranking reference samples, recorded while a measure runs the model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..errors import InputError


def single_activations(outputs: Mapping[str, list[Any]]) -> dict[str, Tensor]:
    """Returns the output tensor of each module in the last forward pass. Clears the recorded outputs.

    Raises:
        InputError: If a module was not called exactly once or does not return a single tensor.
    """
    activations = {}
    for layer, calls in outputs.items():
        if len(calls) != 1:
            why = "is called more than once" if calls else "was not called"
            raise InputError(f"{layer!r} {why}, so it has no single activation by which to rank.")
        activations[layer] = calls.pop()
        if not isinstance(activations[layer], Tensor):
            raise InputError(f"{layer!r} returns no tensor, so it has no activation by which to rank.")
    return activations
