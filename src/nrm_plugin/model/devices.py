"""Devices: tensors of models that are spread over several devices, and the random states of all devices."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor


def on_device_of(tensor: Tensor, other: Tensor) -> Tensor:
    """Returns the first tensor, moved to the device of the second if it is on another one."""
    return tensor if tensor.device == other.device else tensor.to(other.device)


def on_one_device(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Returns the tensors, all moved to the device of the first."""
    return [on_device_of(tensor, tensors[0]) for tensor in tensors]


def by_sample(factors: Tensor, values: Tensor) -> Tensor:
    """Reshapes factors of shape ``(N,)`` so that they multiply values of shape ``(N, …)``, on the device of these."""
    return on_device_of(factors, values).reshape(-1, *(1,) * (values.ndim - 1))


def random_states() -> list[Tensor]:
    """Returns the random states of the CPU and of all other devices, or of the CPU alone if only it is in use."""
    module = _accelerator()
    return [torch.get_rng_state(), *(module.get_rng_state(number) for number in range(_count(module)))]


def restore_random_states(states: Sequence[Tensor]) -> None:
    """Sets the random states that :func:`random_states` has returned."""
    torch.set_rng_state(states[0])
    module: Any = _accelerator()
    for number, state in enumerate(states[1:]):
        module.set_rng_state(state, number)


def _count(module: Any) -> int:
    return 0 if module is None else module.device_count()


def _accelerator() -> Any:
    """Returns torch's module for devices other than the CPU, such as ``torch.cuda``, or None if they are not in use."""
    device = torch.accelerator.current_accelerator()
    module: ModuleType | None = None if device is None else getattr(torch, device.type, None)
    is_used = hasattr(module, "get_rng_state") and getattr(module, "is_initialized", lambda: True)()
    return module if is_used else None


__all__ = ["by_sample", "on_device_of", "on_one_device", "random_states", "restore_random_states"]
