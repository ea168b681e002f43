"""Branches of a rule on an affine layer: the terms of its sum, each with a modified input and a modified layer."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..model.linear_maps import LinearMap, side_by_side


@dataclass
class Branch:
    r"""Branch ``k`` of a rule for one call: one term of the sum that defines the rule.

    Attributes:
        source: ``in_k``, of shape ``(N, *in)``, or the input from which it is computed.
        factor: ``m_k(1)``, by which the gradient mapper multiplies relevance, of shape ``(N, *out)``, multiplied by the
            gain if the kernel is normalized.
        sign: ``ρ_k`` in :math:`\mathrm{reducer} = \sum_k \rho_k\, in_k \odot g_k`.
        linear_map: :math:`J_k`, multiplication by the modified weight, and its transpose.
        modified: Function that computes the modified weight, or None for a module without weights.
        modify_input: Function that computes ``in_k`` from ``source``, or None if ``source`` is ``in_k``.
    """

    source: Tensor
    factor: Tensor
    sign: float
    linear_map: LinearMap
    modified: Callable[[], Tensor] | None = None
    modify_input: Callable[[Tensor], Tensor] | None = None

    @property
    def input(self) -> Tensor:
        """``in_k``, of shape ``(N, *in)``."""
        return self.source if self.modify_input is None else self.modify_input(self.source)

    @property
    def weight(self) -> Tensor:
        """The modified weight. Not available for a module without weights."""
        assert self.modified is not None
        return self.modified()

    def pull(self, relevance: Tensor) -> Tensor:
        """Propagates relevance from the output, of shape ``(K, N, *out)``, to the input, of shape ``(K, N, *in)``."""
        return _signed(self.sign, _times(self.linear_map.down(self.factor * relevance), self.input))

    def push(self, values: Tensor) -> Tensor:
        """Applies the transpose of :meth:`pull`, from shape ``(K, N, *in)`` to ``(K, N, *out)``."""
        return _signed(self.sign, self.factor * self.linear_map.up(self.input * values))


@dataclass(frozen=True)
class WeightedLayer:
    """Unmodified layer of a rule, whose weight each branch modifies.

    Attributes:
        weight: The weight of the layer.
        rerun: Function ``(input, weight) -> output`` that runs the layer without its bias.
        is_injective: Whether each pair of an input and an output neuron is connected by at most one weight.
            Absolute values can then be taken factor by factor. This does not hold if padding repeats inputs.
        groups: Number of convolution groups.
        is_transposed: Whether the first dimension of the weight indexes input channels.
    """

    weight: Tensor
    rerun: Callable[[Tensor, Tensor], Tensor]
    is_injective: bool = True
    groups: int = 1
    is_transposed: bool = False


def pull_together(branches: list[Branch], relevance: Tensor) -> Tensor:
    """Propagates relevance through branches with the same factor, in a single convolution if possible."""
    down = side_by_side([branch.linear_map for branch in branches]) if len(branches) > 1 else None
    if down is None:
        return functools.reduce(torch.add, (branch.pull(relevance) for branch in branches))
    inputs = torch.stack([_signed(branch.sign, branch.input) for branch in branches], 1)
    return (down(branches[0].factor * relevance) * inputs).sum(2)


def _times(product: Tensor, factor: Tensor) -> Tensor:
    """Computes ``product * factor``, in place if the product owns its memory."""
    if torch.is_grad_enabled() or not all(product.stride()):
        return product * factor
    return product.mul_(factor)


def _signed(sign: float, values: Tensor) -> Tensor:
    return values if sign == 1 else sign * values
