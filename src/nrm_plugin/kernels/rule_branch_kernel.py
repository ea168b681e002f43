"""Kernels of rules on affine layers, as sums over branches (pairs of a modified input and a modified layer)."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from ..model.trace_guards import holds
from .absolute_kernels import closed_absolute, dense_absolute
from .base import Kernel
from .normalization import Columns
from .rule_branch import Branch, WeightedLayer, pull_together

ReadBranches = tuple[list[Branch], Columns]
"""Branches with nonzero sign and input and the columns of their sum."""


class BranchKernel(Kernel):
    r"""Kernel of a rule on an affine module as a sum over branches, the form in which Zennit defines rules.

    .. math:: R = \sum_k \rho_k\, in_k \odot J_k^\top (m_k(1) \odot R'), \qquad
              c = \sum_k \rho_k\, m_k(1) \odot J_k in_k

    Args:
        branches: The branches computed so far and their columns. The columns are :class:`ColumnSums`, or a
            :class:`Deficit` if the factors include the gain and the kernel is thus already normalized.
        like: A tensor of the same shape as the input, ``(N, *in)``.
        layer: The layer that the branches modify, or None for a module without weights.
        read_others: Function that computes the remaining branches. It is called when relevance arrives at outputs for
            which the factors of the first branches are zero, such as negative outputs in the γ-rule.
    """

    def __init__(
        self,
        branches: ReadBranches,
        like: Tensor,
        layer: WeightedLayer | None = None,
        read_others: Callable[[], ReadBranches] | None = None,
    ) -> None:
        self.branches, self.columns = branches
        self.layer = layer
        self._like = like
        self._read_others = read_others

    def complete_for(self, relevance: Tensor | None) -> bool:
        if self._read_others is None or (relevance is not None and not self._is_outside_of_branches(relevance)):
            return False
        branches, columns = self._read_others()
        self._read_others = None
        self.branches, self.columns = [*self.branches, *branches], self.columns.joined(columns)
        return True

    def _is_outside_of_branches(self, relevance: Tensor) -> bool:
        """Returns True if relevance arrives at an output for which all factors are zero."""
        try:
            arrived = relevance != 0
            for branch in self.branches:
                arrived = arrived & (branch.factor == 0)
            return not holds("no relevance outside of the branches", lambda: ~arrived.any())
        except RuntimeError:  # values cannot be read inside torch.vmap
            return True

    def pull(self, relevance: Tensor) -> tuple[Tensor, ...]:
        parts = [pull_together(group, relevance) for group in self._by_factor()]
        if not parts:
            return (relevance.new_zeros((len(relevance), *self._like.shape)),)
        return (functools.reduce(torch.add, parts),)

    def _by_factor(self) -> list[list[Branch]]:
        """Groups the branches that share a factor tensor."""
        groups: dict[int, list[Branch]] = {}
        for branch in self.branches:
            groups.setdefault(id(branch.factor), []).append(branch)
        return list(groups.values())

    def pull_absolute(self, relevance: Tensor) -> tuple[Tensor, ...]:
        closed = closed_absolute(self.branches, self.layer, self._like, relevance)
        return dense_absolute(self, relevance) if closed is None else (closed,)

    def push(self, values: tuple[Tensor | None, ...], shape: torch.Size) -> Tensor:
        (value,) = values
        assert value is not None
        parts = [branch.push(value) for branch in self.branches]
        return functools.reduce(torch.add, parts) if parts else value.new_zeros((len(value), *shape))

    def push_bound(self, values: tuple[Tensor | None, ...], shape: torch.Size) -> Tensor:
        r"""Returns an upper bound on :math:`\sum_i |T_{ij}| v_i`: the sum of the absolute values of all branches.

        The bound is exact if padding does not repeat inputs and the branches have disjoint support, as is the case for
        all Zennit rules except ZBox.
        """
        if self.layer is None:
            return super().push_bound(values, shape)
        (value,) = values
        assert value is not None
        total = value.new_zeros((len(value), *shape))
        with torch.no_grad():
            for branch in self.branches:
                arriving = (branch.input.detach().abs() * value).flatten(0, 1)
                image = self.layer.rerun(arriving, branch.weight.detach().abs()).view(len(value), -1, *shape[1:])
                total.addcmul_(image, branch.factor.detach().abs().expand(shape), value=abs(branch.sign))
        return total

    def column_sum(self, like: Tensor) -> Tensor:
        return self.columns.sums(like)
