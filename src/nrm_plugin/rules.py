"""Rules that Zennit lacks, written as Zennit rules."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from zennit.core import BasicHook, ParamMod, Stabilizer
from zennit.rules import zero_bias


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
            size = source.abs()
            mean = size.mean(dim=tuple(range(1, size.ndim)), keepdim=True) if size.ndim > 1 else size
            return size + (floor * mean).clamp(min=torch.finfo(size.dtype).tiny ** 0.5)

        modifier = ParamMod(_absolute, zero_params=zero_bias(zero_params), require_params=False)
        super().__init__(
            input_modifiers=[raised],
            param_modifiers=[modifier],
            output_modifiers=[_same],
            gradient_mapper=lambda relevance, outputs: relevance / stabilize(outputs[0]),
            reducer=lambda inputs, gradients: inputs[0] * gradients[0],
        )


def _absolute(parameter: Tensor, name: str) -> Tensor:
    return parameter.abs()


def _same(output: Tensor) -> Tensor:
    return output
