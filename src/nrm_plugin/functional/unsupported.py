"""Errors for relevance that reaches an operation without a kernel and inspection of autograd nodes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.utils.checkpoint import CheckpointFunction

from ..errors import UncoveredLayerError, UnsupportedOperationError
from ..kernels.base import Kernel
from ..kernels.step import step_of
from ..model.zero_one_routes import is_route_node, operation

MASKS = 10


class UnknownKernel(Kernel):
    """Kernel of an unknown operation, which raises an error if nonzero relevance reaches it.

    Args:
        error: The error to raise.
        shapes: Shape of each input.
    """

    is_stochastic = True  # no walk passes through it, so no column is normalized

    def __init__(self, error: Exception, shapes: Sequence[torch.Size]) -> None:
        self.error, self.shapes = error, list(shapes)

    def pull(self, relevance: Tensor) -> tuple[Tensor, ...]:
        if arrives(relevance):
            raise self.error
        return tuple(relevance.new_zeros((len(relevance), *shape)) for shape in self.shapes)

    pull_absolute = pull

    def push(self, values: tuple[Tensor | None, ...], shape: torch.Size) -> Tensor:
        first = next(value for value in values if value is not None)
        return first.new_zeros((len(first), *shape))


def arrives(relevance: Tensor | None) -> bool:
    """Returns True if any relevance is nonzero, or if its values cannot be read."""
    try:
        return relevance is not None and bool(relevance.any())
    except RuntimeError:  # values of batched gradients cannot be read
        return True


def is_known(node: Any) -> bool:
    """Returns True if an autograd node is a step or a 0/1 route."""
    return step_of(node) is not None or is_route_node(node)


def unknown_node_error(node: Any, where: str = "") -> UnsupportedOperationError:
    """Returns the error for relevance at an autograd node that is neither a step nor a 0/1 route.

    Args:
        node: The node that relevance has reached.
        where: Location in the model, such as ``", in 'layer1'"``.
    """
    if _is_checkpoint(node):
        return UnsupportedOperationError(
            f"torch.utils.checkpoint with use_reentrant=True{where} runs layers without gradients, so no relevance "
            "passes through them. Use use_reentrant=False, or disable checkpointing, as with "
            "`model.gradient_checkpointing_disable()`."
        )
    return UnsupportedOperationError(
        f"relevance would pass through the operation {operation(node)} (autograd node {node.name()}{where}), which has "
        "no kernel: it is neither a step nor a 0/1 route, as it is computed with complex numbers, in place, in a "
        "script, in an autograd.Function, or inside a transform of torch.func such as vmap. Move it to a separate "
        "module, and assign a rule to that module in the composite's layer_map: zennit.rules.Epsilon() if it is "
        "linear, Pass() if it is elementwise."
    )


def raise_on_arrival(outputs: Iterable[Tensor], first_node: int) -> None:
    """Registers hooks that raise an error if relevance reaches a node that is neither a step nor a 0/1 route.

    They replace the audit in a forward pass that is not recorded.

    Args:
        outputs: Outputs of the model.
        first_node: Sequence number of the first autograd node of the forward pass. Earlier nodes are not part of it.
    """
    visited: set[Any] = set()
    stack = [tensor.grad_fn for tensor in outputs]
    while stack:
        node = stack.pop()
        if node is None or node in visited or node._sequence_nr() < first_node:
            continue
        visited.add(node)
        stack += [below for below, _ in node.next_functions]
        # A custom function already has a step, or a hook that raises an error.
        is_custom = isinstance(node, BackwardCFunction) and not _is_checkpoint(node)
        if not is_custom and not is_known(node):
            node.register_prehook(_raising(unknown_node_error(node)))


def _raising(error: Exception) -> Callable[[Sequence[Tensor | None]], None]:
    def check(above: Sequence[Tensor | None]) -> None:
        if any(arrives(relevance) for relevance in above):
            raise error

    return check


def _is_checkpoint(node: Any) -> bool:
    return getattr(type(node), "_forward_cls", None) is CheckpointFunction


def consists_of_routes(output: Tensor, inputs: Sequence[Tensor], with_steps: bool = True) -> bool:
    """Returns True if autograd recorded only 0/1 routes (and steps, if ``with_steps``) between inputs and output."""
    visited = {tensor.grad_fn for tensor in inputs}
    stack = [output.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in visited or (with_steps and step_of(node) is not None):
            continue
        if not is_route_node(node):
            return False
        visited.add(node)
        stack += [below for below, _ in node.next_functions]
    return True


def is_elementwise(run: Callable[[Tensor], Tensor], source: Tensor, output: Tensor) -> bool:
    """Returns True if a function is elementwise, tested by changing half of the elements at a time.

    Each of the 10 masks separates half of all pairs of elements, so a dependence is missed with a probability of
    1/1024.
    """
    other = 1 - 2 * source
    changed = run(other.clone())
    number = torch.arange(source.numel(), device=source.device).reshape(source.shape)
    for bit in range(MASKS):
        mask = (number * 0x9E3779B1 >> (22 + bit)) % 2 == 0  # Fibonacci hashing: like random numbers, but reproducible
        mixed = run(torch.where(mask, source, other))
        if not torch.allclose(mixed, torch.where(mask, output, changed), rtol=1e-5, atol=1e-7, equal_nan=True):
            return False
    return True


def uncovered_layer_error(path: str, like: nn.Module, name: str) -> UncoveredLayerError:
    """Returns the error for a functional layer that has no rule in the composite."""
    return UncoveredLayerError(
        f"layer {path!r} ({type(like).__name__}, called as {name}) has no rule in this composite. Zennit would use its "
        "plain gradient, which does not conserve relevance. Map the layer to a rule in the composite's layer_map, or "
        "pass Normalized(composite, uncovered='gradient') to account for the relevance that its gradient does not "
        "propagate."
    )


__all__ = [
    "UnknownKernel",
    "consists_of_routes",
    "is_elementwise",
    "is_known",
    "raise_on_arrival",
    "uncovered_layer_error",
    "unknown_node_error",
]
