r"""Propagation of relevance with absolute kernels, :math:`\sum_j |T_{ij}| R_j`, in closed form or column by column."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import NRMError
from .base import Kernel, vjp
from .rule_branch import Branch, WeightedLayer

DENSE_LIMIT = 4096
"""Maximum number of outputs per sample for which ``|T|`` is computed column by column."""


def dense_absolute(kernel: Kernel, relevance: Tensor, chunk: int = 64) -> tuple[Tensor, ...]:
    r"""Computes ``Σ_j |T_ij| R_j`` from the explicit columns of ``T``.

    Args:
        kernel: Any kernel that does not mix samples.
        relevance: Relevance at the output, of shape ``(K, N, *out)``.
        chunk: Number of columns per chunk.

    Returns:
        Relevance at each input, of shape ``(K, N, *in)``.

    Raises:
        NRMError: If the output has more than ``DENSE_LIMIT`` elements per sample.
    """
    size = math.prod(relevance.shape[2:])
    if size > DENSE_LIMIT:
        raise NRMError(
            f"the walk variation requires |T| of a step with {size} outputs per sample, but its rule has no closed "
            f"form for |T|, which is computed column by column only up to {DENSE_LIMIT} outputs. Use "
            "`variation(layer)`, which is exact for every rule, or a rule of Zennit without padding modes."
        )
    kernel.complete_for(None)
    flat = relevance.flatten(2)
    totals: list[Tensor] | None = None
    for start in range(0, size, chunk):
        width = min(chunk, size - start)
        unit = relevance.new_zeros((width, relevance.shape[1], size))
        unit[torch.arange(width), :, start + torch.arange(width)] = 1
        columns = kernel.pull(unit.reshape(width, *relevance.shape[1:]))
        weights = flat[:, :, start : start + width]
        sums = [torch.einsum("knj,jn...->kn...", weights, column.abs()) for column in columns]
        totals = sums if totals is None else [old + new for old, new in zip(totals, sums, strict=True)]
    assert totals is not None
    return tuple(totals)


def closed_absolute(
    branches: list[Branch], layer: WeightedLayer | None, like: Tensor, relevance: Tensor
) -> Tensor | None:
    """Computes ``Σ_j |T_ij| R_j`` from the branches of a rule in closed form.

    Args:
        branches: All branches of a rule.
        layer: The layer whose weights the branches modify, or None for a module without weights.
        like: A tensor of the same shape as the input, ``(N, *in)``.
        relevance: Relevance at the output, of shape ``(K, N, *out)``.

    Returns:
        Relevance at the input, of shape ``(K, N, *in)``, or None if there is no closed form.
    """
    if layer is not None and not layer.is_injective:
        return None
    terms = _disjoint_terms(branches, layer, like)
    if terms is None:
        return None if layer is None or layer.is_transposed else _from_patches(branches, layer, relevance)
    total = relevance.new_zeros((len(relevance), *like.shape))
    for term in terms:
        total = total + term.input.abs() * term.down(term.factor.abs() * relevance)
    return total


@dataclass(frozen=True)
class _Term:
    r"""Term :math:`a_i |w_{ij}| m_j` of a kernel.

    Attributes:
        input: ``a``, of shape ``(N, *in)``.
        factor: ``m``, of shape ``(N, *out)``.
        down: Function that multiplies relevance by the transpose of ``|w|``.
    """

    input: Tensor
    factor: Tensor
    down: Callable[[Tensor], Tensor]


def _disjoint_terms(branches: list[Branch], layer: WeightedLayer | None, like: Tensor) -> list[_Term] | None:
    r"""Splits a kernel into terms with disjoint support. Returns None if its terms overlap.

    On the positive weights, and likewise on the negative ones, each modified weight of a rule is a multiple of the
    original weight. Branches with equal factors are summed first, as ZBox requires; the resulting terms must not
    overlap.
    """
    terms = []
    for sign in (None,) if layer is None else (1.0, -1.0):
        groups: list[tuple[Tensor, Tensor]] = []
        for branch in branches:
            multiple = 1.0 if layer is None or sign is None else _multiple(branch.weight, layer.weight, sign)
            if multiple is None:
                return None
            source = (branch.sign * multiple) * branch.input.detach()
            for index, (other, factor) in enumerate(groups):
                if branch.factor is factor or torch.equal(branch.factor, factor):
                    groups[index] = (other + source, factor)
                    break
            else:
                groups.append((source, branch.factor))
        if _overlap(groups):
            return None
        if groups:
            down = branches[0].linear_map.down if layer is None or sign is None else _down(layer, like, sign)
            terms += [_Term(source, factor, down) for source, factor in groups]
    return terms


def _multiple(modified: Tensor, weight: Tensor, sign: float) -> float | None:
    """Returns λ such that ``modified = λ weight`` on all weights of the given sign, or None if there is none."""
    chosen = (weight * sign) > 0
    here, there = weight[chosen], modified[chosen]
    if here.numel() == 0:
        return 0.0
    multiple = float((there / here)[0])
    tolerance = 1e3 * torch.finfo(here.dtype).eps * float(here.abs().max()) * max(1.0, abs(multiple))
    return multiple if float((there - multiple * here).abs().max()) <= tolerance else None


def _down(layer: WeightedLayer, like: Tensor, sign: float) -> Callable[[Tensor], Tensor]:
    """Returns the function that multiplies relevance by the transpose of ``|w|``, restricted to weights of one sign."""
    leaf = like.detach().requires_grad_()
    with torch.enable_grad():
        image = layer.rerun(leaf, (layer.weight * sign).clamp(min=0))
    return lambda relevance: vjp([image], leaf, [relevance])[0]


def _overlap(groups: list[tuple[Tensor, Tensor]]) -> bool:
    for index, (source, factor) in enumerate(groups):
        for other, across in groups[:index]:
            if bool(((source != 0) & (other != 0)).any()) and bool(((factor != 0) & (across != 0)).any()):
                return True
    return False


def _from_patches(branches: list[Branch], layer: WeightedLayer, relevance: Tensor) -> Tensor:
    """Computes ``Σ_j |T_ij| R_j`` for any branches from unfolded input patches, one output channel at a time."""
    like, weight = branches[0].input.detach(), layer.weight
    size = weight[0].numel()
    # With this weight, a layer unfolds its input into patches.
    selection = torch.eye(size, dtype=like.dtype, device=like.device).reshape(size, *weight.shape[1:])
    selection = selection.repeat(layer.groups, *(1,) * (selection.ndim - 1))
    channel = -1 if weight.ndim == 2 else 1
    with torch.no_grad():
        patches = [
            layer.rerun(branch.sign * branch.input.detach(), selection).movedim(channel, -1) for branch in branches
        ]
    total = relevance.new_zeros((len(relevance), *patches[0].shape))
    modified = [branch.weight.flatten(1) for branch in branches]
    per_group = len(weight) // layer.groups
    for number in range(len(weight)):
        start = number // per_group * size
        parts = (
            patch[..., start : start + size] * row[number] * branch.factor.select(channel, number).unsqueeze(-1)
            for patch, row, branch in zip(patches, modified, branches, strict=True)
        )
        arriving = relevance.select(channel if channel < 0 else channel + 1, number).unsqueeze(-1)
        total[..., start : start + size] += functools.reduce(torch.add, parts).abs() * arriving
    leaf = like.requires_grad_()
    with torch.enable_grad():
        image = layer.rerun(leaf, selection)
    return vjp([image], leaf, [total.movedim(-1, channel if channel < 0 else channel + 1)])[0]
