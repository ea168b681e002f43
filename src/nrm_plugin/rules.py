"""LRP rules that are not part of Zennit."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from zennit.core import BasicHook, ParamMod, Stabilizer
from zennit.rules import NoMod, zero_bias
from zennit.types import ConvolutionTranspose


class Absolute(BasicHook):
    r"""Rule that distributes relevance in proportion to the absolute value of each contribution.

    .. math:: T_{ij} = \frac{|a_i w_{ij}|}{\sum_{i'} |a_{i'} w_{i'j}|}

    All fractions are nonnegative, so walks do not cancel, and the bias receives no relevance. In modules without
    weights (average pooling, sums), relevance is distributed in proportion to the absolute values of the inputs. If all
    inputs of a neuron are zero, relevance is distributed in proportion to the absolute weights, and no column
    vanishes.

    Args:
        stabilizer: Value added to the denominator, or a callable, as in Zennit's rules.
        zero_params: Names of additional parameters to set to zero, as in Zennit's rules.
        floor: Value added to the absolute value of every input, relative to the mean absolute input of the sample.

    Examples:
        >>> from zennit.composites import LayerMapComposite
        >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> rules = LayerMapComposite([(nn.Linear, Absolute()), (nn.ReLU, zennit.rules.Pass())])
        >>> mu = RelevanceMeasure(net, torch.randn(5, 3), 1, composite=rules)
        >>> bool((mu.marginal("input") >= 0).all())
        True

    Source: new in this package; docs/default-composite.md compares it with other rules.
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


class ConservingEpsilon(BasicHook):
    r"""Variant of LRP-ε that redistributes the relevance absorbed by ε in proportion to the absolute inputs.

    .. math:: T_{ij} = \frac{\sigma_j a_i w_{ij} + \varepsilon_j |a_i| / \sum_{i'} |a_{i'}|}{|z_j| + \varepsilon_j},
              \qquad \varepsilon_j = \max(0,\; \varepsilon\, m_j - |z_j|)

    with :math:`z_j = \sum_i a_i w_{ij}`, its sign :math:`\sigma_j`, and :math:`m_j = \bar w_j \sum_i |a_i|`, where
    :math:`\bar w_j` is the mean of :math:`|w|` over the weights of the output channel. Where :math:`|z_j| \ge
    \varepsilon\, m_j`, the rule is LRP-0 without bias. Elsewhere, the denominator is :math:`\varepsilon\, m_j`, so it
    is never smaller. Every column sums to one. If all inputs of a neuron are zero, they receive equal relevance. In
    modules without weights, such as average pooling, :math:`m_j` is the output of the module at the inputs
    :math:`|a_i|`.

    Args:
        epsilon: The parameter ε; 0 gives LRP-0 without bias.
        stabilizer: Value added to the denominator, or a callable, as in Zennit's rules.
        zero_params: Names of additional parameters to set to zero, as in Zennit's rules.
        floor: Lower bound on :math:`|a_i|`, relative to its mean over the sample.

    Raises:
        ValueError: If ``epsilon`` is negative.

    Examples:
        >>> from zennit.composites import LayerMapComposite
        >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> rules = LayerMapComposite([(nn.Linear, ConservingEpsilon(0.1)), (nn.ReLU, zennit.rules.Pass())])
        >>> mu = RelevanceMeasure(net, torch.randn(5, 3), 1, composite=rules)
        >>> torch.allclose(mu.marginal("input").sum(1), torch.ones(5), atol=1e-5)
        True

    Source: new in this package; LRP-0 and LRP-ε are from Bach et al. 2015.
    """

    def __init__(
        self, epsilon: float = 0.2, stabilizer: Any = 1e-30, zero_params: Any = None, floor: float = 1e-6
    ) -> None:
        if not epsilon >= 0:
            raise ValueError(f"epsilon={epsilon!r} must not be negative.")
        stabilize = Stabilizer.ensure(stabilizer)
        zeros = zero_bias(zero_params)

        def size(source: Tensor) -> Tensor:
            return torch.maximum(source.abs(), _least(source, floor))

        def mapper(relevance: Tensor, outputs: list[Tensor]) -> list[Tensor]:
            z, m = outputs
            taken = (epsilon * m - z.abs()).clamp(min=0)
            scaled = relevance / stabilize(z.abs() + taken)
            return [z.sign() * scaled, taken / stabilize(m) * scaled]

        super().__init__(
            input_modifiers=[_same, size],
            param_modifiers=[NoMod(zero_params=zeros), EvenMod(zero_params=zeros)],
            output_modifiers=[_same, _same],
            gradient_mapper=mapper,
            reducer=lambda inputs, gradients: inputs[0] * gradients[0] + inputs[1] * gradients[1],
        )


class Relative(BasicHook):
    r"""Rule that scales contributions by one factor per layer. Other rules divide by one denominator per neuron.

    .. math:: T_{ij} = \lambda\, a_i w_{ij}, \qquad
              \lambda = \frac{\sum_j |z_j|}{\sum_j z_j^2}, \qquad z_j = \sum_i a_i w_{ij}

    The sums over ``j`` run over the neurons of the layer, separately for each sample. Relevance :math:`R_j = c z_j`
    propagates to a total of :math:`c \sum_j |z_j|`, so it is conserved if no :math:`z_j` is negative, and otherwise
    only up to a factor. Use the rule with ``residual="sink"``, as in :class:`~nrm_plugin.NRMRelative`, and condition
    queries on survival, ``given=~ABSORBED``. Then :math:`\lambda` cancels along a chain of layers and makes branches
    comparable where they join. The rule has no hyperparameters. It never divides by small numbers because inputs and
    sums are scaled by the largest value in their layer. A layer whose outputs are all zero propagates no relevance.

    Examples:
        >>> from zennit.composites import LayerMapComposite
        >>> from zennit.types import Linear
        >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> with LayerMapComposite([(Linear, Relative()), (nn.ReLU, zennit.rules.Pass())]).context(net) as modified:
        ...     x = torch.randn(5, 3, requires_grad=True)
        ...     relevance, = torch.autograd.grad(modified(x)[:, 1].sum(), x)
        >>> relevance.shape
        torch.Size([5, 3])

    Source: our interpretation of the abstract of arXiv 2501.14322, not a reproduction; see docs/relative.md.
    """

    def __init__(self) -> None:
        super().__init__(
            input_modifiers=[_in_units],
            param_modifiers=[ParamMod(_kept, zero_params="bias", require_params=False)],
            output_modifiers=[_same],
            gradient_mapper=lambda relevance, outputs: relevance * _factor(outputs[0]),
            reducer=lambda inputs, gradients: inputs[0] * gradients[0],
        )

    def copy(self) -> Relative:
        """Returns a new instance of the rule. It has no parameters."""
        return type(self)()


def _largest(values: Tensor) -> Tensor:
    """Returns the maximum absolute value of each sample, of shape ``(N, 1, …)``, clamped to a positive minimum."""
    dims = tuple(range(1, values.ndim)) or (0,)
    return values.abs().amax(dims, keepdim=True).clamp(min=torch.finfo(values.dtype).tiny)


def _in_units(source: Tensor) -> Tensor:
    return source / _largest(source)


def _factor(z: Tensor) -> Tensor:
    r"""Computes :math:`\sum |z_j| / \sum z_j^2` for each sample, or 0 if all :math:`z_j` are zero."""
    unit, dims = _largest(z), tuple(range(1, z.ndim)) or (0,)
    sums = z.abs() / unit
    squares = sums.square().sum(dims, keepdim=True)
    return torch.where(squares > 0, sums.sum(dims, keepdim=True) / squares.clamp(min=0.5) / unit, 0).expand_as(z)


def _kept(parameter: Tensor, name: str) -> Tensor:
    return parameter


class EvenMod(ParamMod):
    """Parameter modifier that sets all weights of an output channel to their mean absolute value.

    Args:
        zero_params: Names of parameters to set to zero.
    """

    def __init__(self, zero_params: Any = None) -> None:
        super().__init__(_evened(0), zero_params=zero_params)

    def __call__(self, module: nn.Module) -> AbstractContextManager[nn.Module]:
        """Returns a context manager in which the weights of ``module`` are modified."""
        is_transposed = isinstance(module, ConvolutionTranspose) or getattr(module, "is_transposed", False)
        modifier = ParamMod(_evened(int(is_transposed)), zero_params=self.zero_params)
        return modifier(module)  # type: ignore[no-any-return]


def _evened(outputs: int) -> Callable[[Tensor, str], Tensor]:
    """Returns a modifier function for weights whose dimension ``outputs`` indexes the output channels."""

    def even(parameter: Tensor, name: str) -> Tensor:
        others = [dim for dim in range(parameter.ndim) if dim != outputs]
        if not others:
            return parameter.abs()
        # The mean is computed in cache-sized chunks, since the classifiers of many networks are large. All chunks share
        # one buffer, since separate allocations would fragment memory.
        width = max(1, (1 << 17) * parameter.shape[outputs] // parameter.numel())
        total = parameter.new_empty([1 if dim in others else size for dim, size in enumerate(parameter.shape)])
        memory = torch.empty_like(parameter.narrow(outputs, 0, min(width, parameter.shape[outputs])))
        for start in range(0, parameter.shape[outputs], width):
            piece = parameter.narrow(outputs, start, min(width, parameter.shape[outputs] - start))
            size = torch.abs(piece, out=memory.narrow(outputs, 0, piece.shape[outputs]))
            torch.sum(size, others, keepdim=True, out=total.narrow(outputs, start, piece.shape[outputs]))
        even = total / (parameter.numel() // total.numel())
        return even.expand_as(parameter)

    return even


def mean_sizes(weight: Tensor) -> Tensor:
    """Returns the mean absolute weight of each output channel, of shape ``(out,)``, for non-transposed layers."""
    even: Tensor = _evened(0)(weight, "weight")
    return even.as_strided((len(even),), (even.stride(0),))


def _least(source: Tensor, floor: float) -> Tensor:
    """Returns a positive lower bound on the absolute inputs of each sample, of shape ``(N, 1, …)``."""
    size = source.abs()
    mean = size.mean(dim=tuple(range(1, size.ndim)), keepdim=True) if size.ndim > 1 else size
    return (floor * mean).clamp(min=1e-15)  # far above the stabilizers, so that zero inputs also have shares


def _absolute(parameter: Tensor, name: str) -> Tensor:
    return parameter.abs()


def _same(tensor: Tensor) -> Tensor:
    return tensor
