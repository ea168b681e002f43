"""Stored outputs of module calls. These modules need not run when the model is run again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels.forward_state import Saved
from ..kernels.step import step_of
from ..model.shapes_without_values import PLAIN
from ..model.zero_one_routes import source_of

WORTH = 4
"""Minimum ratio of recorded memory to output memory for the outputs of a call to be stored."""


def size_of(tensor: Tensor) -> int:
    """Returns the size of a tensor's elements in bytes."""
    return tensor.numel() * tensor.element_size()


@dataclass(frozen=True)
class StoredCall:
    """Call of a module whose outputs are stored, so that the module need not run again.

    Attributes:
        name: Name of the module.
        call: Index of the call.
        first: Index of the first step of the call.
        stop: Index of the first step after the call.
        outputs: The output of the call, with tensors as :class:`~nrm_plugin.kernels.forward_state.Saved`.
    """

    name: str
    call: int
    first: int
    stop: int
    outputs: Any

    def output(self, passed: Callable[[Tensor], Tensor]) -> Any:
        """Returns the output of the call, with each stored tensor replaced.

        Args:
            passed: Function that maps a stored tensor to the tensor to return in its place.
        """
        return mapped(self.outputs, lambda saved: passed(saved.tensor))


def mapped(value: Any, change: Callable[[Any], Any]) -> Any:
    """Applies a function to each tensor or saved tensor in nested tuples, lists and dictionaries."""
    if isinstance(value, (Tensor, Saved)):
        return change(value)
    if type(value) in (tuple, list):
        return type(value)(mapped(item, change) for item in value)
    return {key: mapped(item, change) for key, item in value.items()} if type(value) is dict else value


def are_kept(output: Any, first: int, gates: Any) -> bool:
    """Returns True if stored outputs can replace a call because they depend only on its steps.

    Gates, views of earlier tensors, and tensors without relevance have properties that their values do not determine.

    Args:
        output: The output of the call.
        first: Index of the first step of the call.
        gates: The gates of the forward pass.
    """
    if isinstance(output, Tensor):
        step = None if output.grad_fn is None else step_of(source_of(output.grad_fn))
        is_own = step is not None and step.holder is not None and step.number >= first
        return is_own and type(output) in PLAIN and not gates.holds(output)
    if type(output) in (tuple, list):
        return all(are_kept(item, first, gates) for item in output)
    if type(output) is dict:
        return all(are_kept(item, first, gates) for item in output.values())
    return output is None or isinstance(output, (bool, int, float, str))


def kept(tensor: Tensor) -> Saved:
    """Saves a detached tensor, copied if its storage is much larger than the tensor itself."""
    own = tensor.detach()
    return Saved(own.clone() if own.untyped_storage().nbytes() > 2 * size_of(own) else own)


def bytes_of(output: Any) -> int:
    """Returns the total size in bytes of the tensors in an output."""
    sizes: list[int] = []
    mapped(output, lambda tensor: sizes.append(size_of(tensor)))
    return sum(sizes)


def versions(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[tuple[Tensor, int]]:
    """Returns the tensors among the arguments of a call, with their version counters."""
    return [(value, value._version) for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]


def entries(tensor: Tensor) -> Tensor:
    """Returns a copy of a few elements, at most two per dimension, for comparisons between runs."""
    some = tensor.detach()[tuple(slice(None, None, max(1, (size + 1) // 2)) for size in tensor.shape)]
    return some.reshape(-1).to(torch.float64 if tensor.dtype == torch.float64 else torch.float32, copy=True)


def is_container(module: nn.Module) -> bool:
    """Returns True if a module has child modules."""
    return any(child is not None for child in module._modules.values())


__all__ = ["StoredCall", "are_kept", "entries", "kept", "size_of", "versions"]
