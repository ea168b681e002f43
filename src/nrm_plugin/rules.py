"""Rules that Zennit lacks, written as Zennit rules."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from zennit.core import BasicHook, ParamMod, Stabilizer
from zennit.rules import NoMod, zero_bias


class Absolute(BasicHook):
    r"""Shares by absolute contribution.

    .. math:: T_{ij} = \frac{|a_i w_{ij}|}{\sum_{i'} |a_{i'} w_{i'j}|}

    Never negative, so that no walks cancel; the bias has no share. On modules without weights (average pooling,
    sums) it is the absolute share of the inputs. A neuron whose inputs are all zero shares by weight alone, so that
    no column is dead.

    Args:
        stabilizer: Added to the denominator, or a callable, as in Zennit's rules.
        floor: Added to every input, in units of the mean absolute input of the sample.
        zero_params: Names of further parameters to set to zero, as in Zennit's rules.

    Source: MEASURE, section 5 (ours).
    """

    def __init__(self, stabilizer: Any = 1e-30, zero_params: Any = None, floor: float = 1e-6) -> None:
        stabilize = Stabilizer.ensure(stabilizer)

        def raised(source: Tensor) -> Tensor:
            return source.abs() + _least(source, floor)

        modifier = ParamMod(_absolute, zero_params=zero_bias(zero_params), require_params=False)
        super().__init__(
            input_modifiers=[raised],
            param_modifiers=[modifier],
            output_modifiers=[_same],
            gradient_mapper=lambda relevance, outputs: relevance / stabilize(outputs[0]),
            reducer=lambda inputs, gradients: inputs[0] * gradients[0],
        )


class Bounded(BasicHook):
    r"""Shares by signed contribution :math:`z_{ij} = a_i w_{ij}`, of a bounded variation in every column.

    .. math:: T_{ij} = \frac{\sigma_j z_{ij} + \lambda_j |z_{ij}|}{\sigma_j z_j + \lambda_j s_j}, \qquad
              \lambda_j = \max\Bigl(0, \frac{s_j - B |z_j|}{B s_j - |z_j|}\Bigr)

    with :math:`z_j = \sum_i z_{ij}`, :math:`s_j = \sum_i |z_{ij}|`, :math:`\sigma_j` the sign of :math:`z_j`. The
    bias has no share, so that every column sums to one, and :math:`\lambda_j` is the smallest one for which
    :math:`\sum_i |T_{ij}| \le B`. So this is LRP-0 without bias where contributions hardly cancel, and elsewhere γ
    with a γ for each column, :math:`2 \lambda_j / (1 - \lambda_j)`; or, which is the same, αβ with
    :math:`\alpha = (B + 1) / 2` and :math:`\beta = (B - 1) / 2`. A neuron whose contributions cancel exactly, or whose
    inputs are all zero, shares as in :class:`Absolute`.

    Args:
        bound: ``B``, at least 1. At 1 only contributions of the sign of the sum have a share; ``math.inf`` is LRP-0.
        stabilizer: Added to the denominator, or a callable, as in Zennit's rules.
        floor: Stands for inputs that are zero in the absolute share, in units of the mean absolute input of the
            sample.
        zero_params: Names of further parameters to set to zero, as in Zennit's rules.

    Raises:
        ValueError: ``bound`` is below 1.

    Source: ours; αβ is from Bach et al. 2015, γ from Montavon et al. 2019.
    """

    def __init__(
        self, bound: float = 4.0, stabilizer: Any = 1e-30, zero_params: Any = None, floor: float = 1e-6
    ) -> None:
        if not bound >= 1:
            raise ValueError(f"bound={bound!r} must be at least 1: shares that sum to one vary by no less.")
        stabilize = Stabilizer.ensure(stabilizer)
        zeros = zero_bias(zero_params)

        def size(source: Tensor) -> Tensor:
            return torch.where(source == 0, _least(source, floor), source.abs())

        def mapper(relevance: Tensor, outputs: list[Tensor]) -> list[Tensor]:
            z, s = outputs
            spare = (s - z.abs() / bound).clamp(min=torch.finfo(s.dtype).tiny)
            mixed = (s / bound - z.abs()).clamp(min=0) / spare
            scaled = relevance / stabilize(z.abs() + mixed * s)
            return [z.sign() * scaled, mixed * scaled]

        super().__init__(
            input_modifiers=[_same, size],
            param_modifiers=[NoMod(zero_params=zeros), ParamMod(_absolute, zero_params=zeros)],
            output_modifiers=[_same, _same],
            gradient_mapper=mapper,
            reducer=lambda inputs, gradients: inputs[0] * gradients[0] + inputs[1] * gradients[1],
        )


def _least(source: Tensor, floor: float) -> Tensor:
    """The floor of each sample, ``(N, 1, …)``, never zero."""
    size = source.abs()
    mean = size.mean(dim=tuple(range(1, size.ndim)), keepdim=True) if size.ndim > 1 else size
    return (floor * mean).clamp(min=1e-15)  # well above the stabilizers, so that a sample of zeros is shared as well


def _absolute(parameter: Tensor, name: str) -> Tensor:
    return parameter.abs()


def _same(tensor: Tensor) -> Tensor:
    return tensor
