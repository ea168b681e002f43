r"""Kernels: the propagation of relevance through one call of a module or function, as a linear map.

.. math:: R_i = \sum_j T_{ij} R_j, \qquad c_j = \sum_i T_{ij}

The output of the call has shape ``(N, *out)``. ``K`` relevance vectors are propagated at once, with shape ``(K, N,
*out)`` at the output and ``(K, N, *in)`` at each input of the call.

Source: docs/measure.md, "One step".
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor


class Kernel(ABC):
    """Base class of kernels: the linear map by which a call propagates relevance, before normalization."""

    is_stochastic = False
    """True if every column sums to exactly one. No gain is applied then, and no relevance is absorbed."""

    @abstractmethod
    def pull(self, relevance: Tensor) -> tuple[Tensor, ...]:
        """Propagates relevance from the output, of shape ``(K, N, *out)``, to each input, of shape ``(K, N, *in)``."""

    @abstractmethod
    def pull_absolute(self, relevance: Tensor) -> tuple[Tensor, ...]:
        r"""Propagates relevance like :meth:`pull`, by :math:`|T_{ij}|` instead of :math:`T_{ij}`."""

    def push(self, values: tuple[Tensor | None, ...], shape: torch.Size) -> Tensor:
        r"""Applies the transposed kernel, :math:`\sum_i T_{ij} v_i`, from the inputs to the output.

        Args:
            values: ``v`` at each input, of shape ``(K, N, *in)``, or None for zeros.
            shape: Shape of the output, ``(N, *out)``.

        Returns:
            Values at the output, of shape ``(K, N, *out)``.
        """
        first = next(value for value in values if value is not None)
        with torch.inference_mode(False), torch.enable_grad():
            seed = first.new_zeros((1, *shape)).requires_grad_()
            parts = zip(self.pull(seed), values, strict=True)
            # A gate receives zeros that do not depend on the relevance.
            pairs = [(part, value) for part, value in parts if value is not None and part.requires_grad]
            if not pairs:
                return first.new_zeros((len(first), *shape))
            return vjp([part for part, _ in pairs], seed, [value.unsqueeze(1) for _, value in pairs])[0].squeeze(1)

    def push_bound(self, values: tuple[Tensor | None, ...], shape: torch.Size) -> Tensor:
        r"""Returns an upper bound on :math:`\sum_i |T_{ij}| v_i` for ``v >= 0``; by default, the exact sum.

        Arguments and return value are as in :meth:`push`.
        """
        first = next(value for value in values if value is not None)
        with torch.inference_mode(False), torch.enable_grad():
            seed = first.new_zeros((1, *shape)).requires_grad_()
            parts = zip(self.pull_absolute(seed), values, strict=True)
            # If all branches are zero, the relevance at the inputs is zero and has no grad_fn.
            pairs = [(part.squeeze(0), v) for part, v in parts if v is not None and part.requires_grad]
            if not pairs:
                return first.new_zeros((len(first), *shape))
            rows = [
                torch.autograd.grad([p for p, _ in pairs], seed, [v[k] for _, v in pairs], retain_graph=True)[0]
                for k in range(len(first))
            ]
        return torch.cat(rows)

    def complete_for(self, relevance: Tensor | None) -> bool:
        """Computes the branches of the rule that are still missing and that the given relevance requires.

        Args:
            relevance: Relevance at the output, of shape ``(K, N, *out)``, or None to compute all branches.

        Returns:
            True if the column sums have changed.
        """
        return False

    def column_sum(self, like: Tensor) -> Tensor:
        r"""Computes the column sums :math:`c_j = \sum_i T_{ij}`, with the shape of the output ``like``."""
        with torch.inference_mode(False), torch.enable_grad():
            seed = torch.zeros_like(like).unsqueeze(0).requires_grad_()
            # The zeros at a gate have no grad_fn.
            totals = [part.sum() for part in self.pull(seed) if part.requires_grad]
            if not totals:
                return torch.zeros_like(like)
            (column,) = torch.autograd.grad(totals, seed)
        return column.squeeze(0)


class IdentityKernel(Kernel):
    """Identity kernel, used for activations, dropout, and batch normalization after fusion."""

    is_stochastic = True

    def pull(self, relevance: Tensor) -> tuple[Tensor, ...]:
        return (relevance,)

    def pull_absolute(self, relevance: Tensor) -> tuple[Tensor, ...]:
        return (relevance,)

    def push(self, values: tuple[Tensor | None, ...], shape: torch.Size) -> Tensor:
        (value,) = values
        assert value is not None
        return value


def vjp(images: list[Tensor], inputs: Tensor | list[Tensor], relevance: list[Tensor]) -> tuple[Tensor, ...]:
    """Computes the vector-Jacobian products of ``K`` vectors stacked along the first dimension. Retains the graph."""
    create = torch.is_grad_enabled()
    if len(relevance[0]) == 1:
        parts = torch.autograd.grad(images, inputs, [item[0] for item in relevance], True, create)
        return tuple(part.unsqueeze(0) for part in parts)
    return torch.autograd.grad(images, inputs, relevance, True, create, is_grads_batched=True)
