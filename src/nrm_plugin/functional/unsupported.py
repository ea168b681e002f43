"""Operations without a kernel: errors when relevance arrives, and tests of their inputs and outputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ..errors import UncoveredLayerError
from ..kernels.base import Kernel
from ..kernels.step import step_of
from ..model.routing import is_route_node

MASKS = 10


class UnknownKernel(Kernel):
    """Kernel of an unknown operation, which raises when relevance arrives, but not for the zeros of a gate.

    Args:
        error: The error that is raised when relevance arrives.
        shapes: Shape of each input.
    """

    is_stochastic = True  # no walk passes through it, so no column is normalized

    def __init__(self, error: Exception, shapes: Sequence[torch.Size]) -> None:
        self.error, self.shapes = error, list(shapes)

    def pull(self, relevance: Tensor) -> tuple[Tensor, ...]:
        if self._arrives(relevance):
            raise self.error
        return tuple(relevance.new_zeros((len(relevance), *shape)) for shape in self.shapes)

    pull_absolute = pull

    def push(self, values: tuple[Tensor | None, ...], shape: torch.Size) -> Tensor:
        first = next(value for value in values if value is not None)
        return first.new_zeros((len(first), *shape))

    def _arrives(self, relevance: Tensor) -> bool:
        try:
            return bool(relevance.any())
        except RuntimeError:  # values of batched gradients cannot be read
            return True


def consists_of_routes(output: Tensor, inputs: Sequence[Tensor], with_steps: bool = True) -> bool:
    """Whether autograd recorded only routes (and steps) between some inputs and an output."""
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
    """Whether a function is elementwise, tested by changing half of the elements at a time.

    Each mask separates half of all pairs of elements, so the chance of missing a dependence is 1/1024.
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
    """The error for a function on a weight without a rule in the composite."""
    return UncoveredLayerError(
        f"layer {path!r} ({type(like).__name__}, called as {name}) has no rule in this composite. Zennit would use its "
        "plain gradient, which does not conserve relevance. Map the layer to a rule in the composite's layer_map, or "
        "pass Normalized(composite, uncovered='gradient') to account for what its gradient loses."
    )


__all__ = ["UnknownKernel", "consists_of_routes", "is_elementwise", "uncovered_layer_error"]
