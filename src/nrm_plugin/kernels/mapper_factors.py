r"""Factors :math:`m_k(1)` by which the gradient mapper of a rule multiplies relevance."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from zennit.core import BasicHook

from ..model.trace_guards import audit
from .cache_blocks import Block, block_of, blocks
from .known_rules import is_known_linear

Factors = Callable[[list[Tensor], tuple[int, ...]], dict[int, Tensor]]


@dataclass(frozen=True)
class Mapper:
    """Gradient mapper that multiplies the relevance of each branch elementwise by a factor.

    Attributes:
        leaders: For each branch, index of the first branch with the same factor (its leader). A factor is computed once
            for all branches with the same leader.
        factors: Function that returns the factors of the given leaders, given the outputs of all branches.
        is_local: Whether each element of a factor depends only on the same element of the outputs.
    """

    leaders: tuple[int, ...]
    factors: Factors
    is_local: bool = True


def applied_mapper(rule: BasicHook, outputs: Callable[[Block], list[Tensor]], like: Tensor) -> Mapper | None:
    """Returns the factors of a rule, computed by applying its gradient mapper to ones.

    Args:
        rule: Rule whose gradient mapper is applied.
        outputs: Function that returns the outputs of all branches at one block.
        like: A tensor of the same shape as the output, ``(N, *out)``.

    Returns:
        The mapper, or None if the rule's gradient mapper is not an elementwise product.
    """
    first = next(iter(blocks(like)))
    ones = torch.ones_like(block_of(like, first))
    factors = mapped(rule, ones, outputs(first))
    if any(factor.shape != ones.shape for factor in factors):
        return None
    corner = tuple(slice(0, 1 if dim < 2 < like.ndim else 4) for dim in range(like.ndim))
    at_corner = outputs(corner)
    with audit():
        if not is_known_linear(rule) and not _is_elementwise(rule, at_corner):
            return None
        is_local = _is_local(rule, at_corner, [factor[corner] for factor in factors])

    def by_leader(outputs: list[Tensor], wanted: tuple[int, ...]) -> dict[int, Tensor]:
        mapped_to = mapped(rule, torch.ones_like(outputs[0]), outputs)
        return {leader: mapped_to[leader] for leader in wanted}

    leaders = tuple(next(k for k, other in enumerate(factors) if other is factor) for factor in factors)
    return Mapper(leaders, by_leader, is_local)


def mapped(rule: BasicHook, relevance: Tensor, outputs: list[Tensor]) -> list[Tensor]:
    """Applies the gradient mapper of a rule to relevance. Returns one tensor per branch."""
    result = rule.gradient_mapper(relevance, outputs)
    return [result] if isinstance(result, Tensor) else list(result)


def _is_elementwise(rule: BasicHook, outputs: list[Tensor]) -> bool:
    """Returns True if the gradient mapper multiplies each element of the relevance by a factor."""
    like = outputs[0]
    probe = torch.linspace(-1, 2, like.numel(), dtype=like.dtype, device=like.device).reshape(like.shape)
    factors = mapped(rule, torch.ones_like(like), outputs)
    for factor, product in zip(factors, mapped(rule, probe, outputs), strict=True):
        difference = (product - factor * probe).abs()
        if bool((difference > 1e-3 * factor.abs() + 1e-30).logical_and(factor.isfinite()).any()):
            return False
    return True


def _is_local(rule: BasicHook, outputs: list[Tensor], factors: list[Tensor]) -> bool:
    """Returns True if each element of a factor depends only on the same element of the outputs.

    Args:
        rule: The rule to test.
        outputs: The outputs of all branches in a small block.
        factors: The factors in this block, computed from a larger block of outputs.
    """
    return all(
        torch.allclose(here, there, rtol=1e-6, atol=0, equal_nan=True)
        for here, there in zip(mapped(rule, torch.ones_like(outputs[0]), outputs), factors, strict=True)
    )
