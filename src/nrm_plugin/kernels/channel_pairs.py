"""Joint relevance of the input and output channels of a layer, from a single weight gradient per branch."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import NRMError
from .rule_branch import Branch, WeightedLayer
from .rule_branch_kernel import BranchKernel


def channel_edges(kernel: BranchKernel, relevance: Tensor) -> Tensor:
    r"""Computes the joint relevance of all pairs of an output and an input channel.

    .. math:: J_{noi} = \sum_k \sum_\tau W_k[o,i,\tau]\; \frac{\partial}{\partial W_k[o,i,\tau]}
              \langle \mathrm{branch}_k(\rho_k in_k),\, m_k(1) \odot R \rangle_n

    Args:
        kernel: The kernel of the step.
        relevance: Relevance at the output, of shape ``(N, *out)``, already multiplied by the gain.

    Returns:
        The joint relevance, of shape ``(N, K_out, K_in)``; zero for channels of different groups.

    Raises:
        NRMError: If the layer has no weights.
    """
    layer = kernel.layer
    if layer is None:
        raise NRMError("a step without weights has no matrix of channel pairs.")
    kernel.complete_for(relevance.unsqueeze(0))
    rows = []
    for sample in range(len(relevance)):
        edges = torch.zeros_like(layer.weight)
        for branch in kernel.branches:
            arriving = (branch.factor[sample] * relevance[sample]).unsqueeze(0)
            slope = _weight_gradient(layer, branch, branch.input[sample : sample + 1].detach(), arriving)
            edges = torch.addcmul(edges, branch.weight.detach(), slope, value=branch.sign)
        rows.append(edges.flatten(2).sum(-1) if edges.ndim > 2 else edges)
    return _over_all_channels(layer, torch.stack(rows))


def _weight_gradient(layer: WeightedLayer, branch: Branch, source: Tensor, relevance: Tensor) -> Tensor:
    """Computes ``∂⟨branch(source), relevance⟩ / ∂W`` for one sample."""
    if branch.linear_map.weight_gradient is not None:
        return branch.linear_map.weight_gradient(source, relevance)
    with torch.enable_grad():
        leaf = branch.weight.detach().requires_grad_()
        image = layer.rerun(source, leaf)
    return torch.autograd.grad(image, leaf, relevance)[0]


def _over_all_channels(layer: WeightedLayer, edges: Tensor) -> Tensor:
    """Expands edges of shape ``(N, weight rows, channels per group)`` to ``(N, K_out, K_in)``, with zeros elsewhere."""
    samples, rows, inner = edges.shape
    per_group = rows // layer.groups
    full = edges.new_zeros(samples, layer.groups, per_group, layer.groups, inner)
    index = torch.arange(layer.groups)
    full[:, index, :, index] = edges.reshape(samples, layer.groups, per_group, inner).transpose(0, 1)
    full = full.reshape(samples, rows, layer.groups * inner)
    return full.transpose(1, 2) if layer.is_transposed else full
