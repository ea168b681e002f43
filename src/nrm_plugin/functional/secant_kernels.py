r"""Secant (finite-difference) kernels of linear and multilinear functions, softmax and normalization layers.

They propagate multipliers ``m``, the ratios of relevance ``R`` to the difference ``δ`` from the reference:

.. math:: m_i = \sum_j \mathrm{slope}_{ij} m_j, \qquad R = \delta m

Source: docs/differences.md.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..errors import UnsupportedOperationError
from ..kernels.absolute_kernels import dense_absolute
from ..kernels.base import Kernel, vjp
from .averaging import POOLS
from .differences import DifferenceCall, secant_of
from .function_call import FunctionCall, Slot
from .unsupported import UnknownKernel

Multipliers = tuple[Tensor, ...]


class MultiplierKernel(Kernel):
    """Base class of kernels that propagate multipliers, the ratios of relevance to the difference from the reference.

    Args:
        call: The recorded calls for the input and the reference.
    """

    def __init__(self, call: DifferenceCall) -> None:
        self.before, self.divisor = call.before, call.divisor
        self.is_stochastic = call.is_exact

    @abstractmethod
    def multipliers(self, above: Tensor) -> Multipliers:
        """Propagates multipliers of shape ``(K, N, *out)`` at the output to shape ``(K, N, *in)`` at each input."""

    def absolute_multipliers(self, above: Tensor) -> Multipliers | None:
        """Propagates multipliers by the absolute slopes. Returns None if this would take a dense matrix."""
        return None

    def pull(self, relevance: Tensor) -> Multipliers:
        below = self.multipliers(relevance / self.divisor)
        return tuple(part * delta for part, delta in zip(below, self.before, strict=True))

    def pull_absolute(self, relevance: Tensor) -> Multipliers:
        below = self.absolute_multipliers(relevance / self.divisor.abs())
        if below is None:
            return dense_absolute(self, relevance)
        return tuple(part * delta.abs() for part, delta in zip(below, self.before, strict=True))


# -- linear and multilinear functions ---------------------------------------------------------------------------------


class PathKernel(MultiplierKernel):
    """Kernel of a polynomial function: its mean Jacobian along the line from the reference to the input.

    The mean is computed exactly, by Gauss-Legendre quadrature. A product of two inputs requires a single node.

    Args:
        call: The recorded calls for the input and the reference.
        absolute: Function that replaces the coefficients of a call with their absolute values, which turns its slopes
            into absolute slopes. None if that is not possible.
        is_linear: Whether the function is linear in one input.
    """

    def __init__(
        self,
        call: DifferenceCall,
        absolute: Callable[[FunctionCall], FunctionCall] | None = None,
        is_linear: bool = False,
    ) -> None:
        super().__init__(call)
        self.call, self.absolute, self.is_linear = call, absolute, is_linear
        self._images = self._jacobians(call.call, lambda value: value)

    def _jacobians(
        self, call: FunctionCall, change: Callable[[Tensor], Tensor]
    ) -> list[tuple[float, Tensor, list[Tensor]]]:
        """Evaluates the function at each quadrature node. Returns ``(weight, output, inputs)`` per node."""
        values, references = self.call.values, self.call.reference_values
        if self.is_linear:
            references = values  # all tangents are the same
        images = []
        for place, weight in _QUADRATURE[1 if len(values) < 3 else 2]:
            pairs = zip(values, references, strict=True)
            with torch.enable_grad():
                points = [one if one is two else torch.lerp(two, one, place) for one, two in pairs]
                leaves = [change(point).detach().requires_grad_() for point in points]
                images.append((weight, call.run(*leaves), leaves))
        return images

    def multipliers(self, above: Tensor) -> Multipliers:
        return _averaged(self._images, above)

    def absolute_multipliers(self, above: Tensor) -> Multipliers | None:
        if self.absolute is None:
            return None
        return _averaged(self._jacobians(self.absolute(self.call.call), Tensor.abs), above)


_QUADRATURE = {1: [(0.5, 1.0)], 2: [(0.5 - math.sqrt(3) / 6, 0.5), (0.5 + math.sqrt(3) / 6, 0.5)]}
"""Nodes and weights of Gauss-Legendre quadrature on [0, 1], keyed by the number of nodes."""


def _averaged(images: list[tuple[float, Tensor, list[Tensor]]], above: Tensor) -> Multipliers:
    total: Multipliers | None = None
    for weight, output, leaves in images:
        parts = tuple(part * weight for part in vjp([output], leaves, [above.to(output.dtype)]))
        total = parts if total is None else tuple(old + new for old, new in zip(total, parts, strict=True))
    assert total is not None
    return total


def polynomial(call: DifferenceCall) -> Kernel:
    """Returns the kernel of a function with complex intermediate values, if it is linear or a product of two inputs."""
    kernel = PathKernel(call)
    columns = kernel.column_sum(call.after)
    scale = torch.finfo(call.after.dtype).eps ** 0.5 * call.outputs[0].abs().amax()
    if bool(((columns - 1) * call.after).abs().gt(scale).any()) and call.is_exact:
        return UnknownKernel(UnsupportedOperationError(_NOT_LINEAR.format(name=call.name)), call.shapes)
    return kernel


_NOT_LINEAR = (
    "relevance of a difference arrived at {name!r}, a function of complex numbers that is neither linear nor a product "
    "of two inputs, and has no kernel of differences. Explain the output without reference=."
)


def _unchanged(call: FunctionCall) -> FunctionCall:
    return call


@secant_of(*(name for name in POOLS if name not in ("grid_sample", "roi_align", "lp_pool2d")), "index_add")
def average(call: DifferenceCall) -> Kernel:
    """Returns the kernel of a sum, average or interpolation."""
    mode = call.call.argument(3, "mode", "nearest") if call.name in ("interpolate", "upsample") else ""
    return PathKernel(call, None if mode == "bicubic" or call.name == "index_add" else _unchanged)


secant_of("scatter_add")(lambda call: PathKernel(call))


@secant_of("grid_sample", "roi_align", "deform_conv2d")
def sampling(call: DifferenceCall) -> Kernel:
    """Returns the kernel of sampling at constant positions, which is linear in the first input."""
    if len(call.values) == 1 and isinstance(call.call.args[0] if call.call.args else None, Slot):
        return PathKernel(call)
    return UnknownKernel(UnsupportedOperationError(_PLACES.format(name=call.name)), call.shapes)


_PLACES = (
    "relevance of a difference arrived at {name!r} with positions that the model computes, which has no kernel of "
    "differences. Explain the output without reference=, or decorate a function with nrm_plugin.register_kernel."
)


# -- softmax ----------------------------------------------------------------------------------------------------------


def exponential_mean(one: Tensor, two: Tensor) -> Tensor:
    r"""Computes the logarithmic mean of :math:`e^a` and :math:`e^b`, or 0 if either is 0.

    .. math:: \mathcal L(e^a, e^b) = \frac{e^a - e^b}{a - b} = e^{\max(a, b)}\, \varphi(|a - b|), \qquad
              \varphi(g) = \frac{1 - e^{-g}}{g}

    The difference of the exponents is known, so the result is accurate for exponentials that are nearly equal and for
    those whose quotient underflows.
    """
    return torch.maximum(one, two).exp() * _falling(one, two)


def _falling(one: Tensor, two: Tensor) -> Tensor:
    """Computes ``φ(|a - b|)``, which falls from 1 to 0. The difference between equal infinities is zero."""
    gap = torch.sub(two, one).abs().nan_to_num(0.0, torch.inf).clamp_min(torch.finfo(one.dtype).tiny).neg()
    return torch.expm1(gap) / gap


class SoftmaxKernel(MultiplierKernel):
    r"""Kernel of softmax, from the secants of the exponentials and the logarithm in :math:`p = e^{z - \log \sum e^z}`.

    .. math:: \mathrm{slope}_{ij} = \ell_i (\delta_{ij} - w_j), \qquad
              \ell = \mathcal L(p, p^0), \quad w_j = \frac{\mathcal L(e^{z_j}, e^{z^0_j})}{\mathcal L(S, S^0)}

    where :math:`\mathcal L` is the logarithmic mean. No slope exceeds one, and :math:`\sum_j w_j \leq 1`.

    Args:
        call: The recorded calls for the input and the reference.
        dim: Dimension of the softmax.
        sign: -1 for softmin.
        is_log: Whether the function is log-softmax.
    """

    def __init__(self, call: DifferenceCall, dim: int, sign: float = 1.0, is_log: bool = False) -> None:
        super().__init__(call)
        one, two = call.values[0] * sign, call.reference_values[0] * sign
        self.dim, self.sign = dim % max(1, one.ndim) + 1, sign
        first, second = _log_softmax(one, dim), _log_softmax(two, dim)
        self.share = _shares((first, second), (_total(one, first, dim), _total(two, second, dim)))
        self.slope = torch.ones_like(one) if is_log else exponential_mean(first, second)

    def multipliers(self, above: Tensor) -> Multipliers:
        own = above * self.slope
        return (self.sign * (own - self.share * own.sum(self.dim, keepdim=True)),)

    def absolute_multipliers(self, above: Tensor) -> Multipliers:
        own = above * self.slope
        rest = own.sum(self.dim, keepdim=True) - own
        return (own * (1 - self.share).abs() + self.share * rest,)


def exponential_shares(one: Tensor, two: Tensor, dim: int | list[int]) -> Tensor:
    """Computes the slopes of log-sum-exp along dimensions. They are positive and sum to at most one."""
    totals = torch.logsumexp(one, dim, keepdim=True), torch.logsumexp(two, dim, keepdim=True)
    first, second = ((value - total).nan_to_num(-torch.inf) for value, total in zip((one, two), totals, strict=True))
    return _shares((first, second), totals)


def _log_softmax(value: Tensor, dim: int) -> Tensor:
    """Computes log-softmax. It is ``-inf`` where all elements are masked."""
    return value.log_softmax(dim).nan_to_num(-torch.inf, torch.inf, -torch.inf)


def _total(value: Tensor, log_softmax: Tensor, dim: int) -> Tensor:
    """Computes log-sum-exp from log-softmax, at the maximum."""
    return (value.amax(dim, keepdim=True) - log_softmax.amax(dim, keepdim=True)).nan_to_num(-torch.inf)


def _shares(log_softmax: tuple[Tensor, Tensor], totals: tuple[Tensor, Tensor]) -> Tensor:
    """Computes the slopes of log-sum-exp from log-softmax and log-sum-exp ``S``, at the input and at the reference.

    They are the quotients of the logarithmic means of the exponentials and of their sums, both divided by the larger
    sum. That of the sums is ``φ(|ΔS|)``, so it does not underflow if the sums are far apart.
    """
    shift = torch.maximum(*totals)
    first, second = (
        value + (total - shift).nan_to_num(0.0, torch.inf, -torch.inf)
        for value, total in zip(log_softmax, totals, strict=True)
    )
    mean = _falling(*totals)
    return exponential_mean(first, second) / torch.where(mean > 0, mean, 1.0)


@secant_of("softmax", "log_softmax", "softmin")
def softmax(call: DifferenceCall) -> Kernel:
    """Returns the kernel of softmax, log-softmax or softmin."""
    dim = call.call.argument(1, "dim")
    if dim is None:  # the deprecated default of torch
        dim = 0 if call.values[0].ndim in (0, 1, 3) else 1
    return SoftmaxKernel(call, int(dim), -1.0 if call.name == "softmin" else 1.0, call.name == "log_softmax")


class LogSumExpKernel(MultiplierKernel):
    """Kernel of log-sum-exp, with the slopes of :func:`exponential_shares`."""

    def __init__(self, call: DifferenceCall) -> None:
        super().__init__(call)
        value, dims = call.values[0], call.call.argument(1, "dim")
        dims = [dims] if isinstance(dims, int) else list(dims)
        self.share = exponential_shares(value, call.reference_values[0], dims)
        self.reduced = torch.Size(1 if d in [i % value.ndim for i in dims] else n for d, n in enumerate(value.shape))

    def multipliers(self, above: Tensor) -> Multipliers:
        return (above.reshape(len(above), *self.reduced) * self.share,)

    absolute_multipliers = multipliers


secant_of("logsumexp")(LogSumExpKernel)


# -- normalization layers ---------------------------------------------------------------------------------------------


class NormKernel(MultiplierKernel):
    r"""Kernel of layer normalization and similar layers, which divide by a standard deviation.

    It is composed of the secant (finite-difference) maps of its elementary operations.

    .. math:: \Delta y = \gamma \left( \frac{\rho + \rho^0}{2} \Delta c
              - \frac{c + c^0}{2} \frac{(\rho \rho^0)^2}{\rho + \rho^0} \Delta v \right), \qquad
              \Delta v = \frac{1}{n} \sum (c + c^0) \Delta c

    where ``c`` is the centered input, ``v`` its variance, and ``ρ`` the reciprocal of its standard deviation. The
    superscript 0 marks values at the reference, and ``Δ`` is the difference between input and reference.

    Args:
        call: The recorded calls for the input and the reference.
        group: Shape to which the input is reshaped. The last dimension is normalized.
        weight: ``γ``, which broadcasts against the input, or None for ones.
        eps: Value added to the variance.
        is_centered: Whether the mean is subtracted.
    """

    def __init__(
        self, call: DifferenceCall, group: Sequence[int], weight: Tensor | None, eps: float, is_centered: bool = True
    ) -> None:
        super().__init__(call)
        self.group, self.weight, self.is_centered = list(group), weight, is_centered
        values = [value.reshape(self.group) for value in (call.values[0], call.reference_values[0])]
        first, second = ((self._variance(value) + eps).rsqrt() for value in values)
        self.total, self.scale = self._centered(values[0] + values[1]), (first + second) / 2
        self.curve = (first * second).square() / ((first + second) * (-2 * self.group[-1]))

    def _variance(self, values: Tensor) -> Tensor:
        if self.is_centered:
            return values.var(-1, correction=0, keepdim=True)
        return values.square().mean(-1, keepdim=True)

    def _centered(self, values: Tensor) -> Tensor:
        return values - values.mean(-1, keepdim=True) if self.is_centered else values

    def multipliers(self, above: Tensor) -> Multipliers:
        weighted = above if self.weight is None else above * self.weight
        grouped = weighted.reshape(len(above), *self.group)
        through = (grouped * self.total).sum(-1, keepdim=True) * self.curve
        below = torch.addcmul(grouped * self.scale, through, self.total)
        return (self._centered(below).reshape(above.shape),)


@secant_of("layer_norm", "native_layer_norm", "rms_norm")
def layer_norm(call: DifferenceCall) -> Kernel:
    """Returns the kernel of layer normalization or RMS normalization."""
    shape = list(call.call.argument(1, "normalized_shape"))
    weight = call.call.argument(2, "weight")
    is_centered = call.name != "rms_norm"
    eps = call.call.argument(4 if is_centered else 3, "eps")
    if eps is None:
        eps = torch.finfo(call.call.values[0].dtype).eps
    return _norm(call, [-1, math.prod(shape)], weight, float(eps), is_centered)


def _norm(call: DifferenceCall, group: Sequence[int], weight: object, eps: float, is_centered: bool = True) -> Kernel:
    if len(call.values) > 1 or isinstance(weight, Slot):
        return UnknownKernel(UnsupportedOperationError(_COMPUTED.format(name=call.name)), call.shapes)
    assert weight is None or isinstance(weight, Tensor)
    return NormKernel(call, group, weight, eps, is_centered)


_COMPUTED = (
    "relevance of a difference arrived at {name!r} with a weight or bias that the model computes, which has no kernel "
    "of differences. Multiply and add after a normalization without weights instead."
)


@secant_of("group_norm")
def group_norm(call: DifferenceCall) -> Kernel:
    """Returns the kernel of group normalization."""
    value = call.values[0]
    groups, eps = int(call.call.argument(1, "num_groups")), float(call.call.argument(4, "eps", 1e-5))
    weight = _per_channel(call.call.argument(2, "weight"), value)
    return _norm(call, [len(value), groups, value[0].numel() // groups], weight, eps)


@secant_of("instance_norm")
def instance_norm(call: DifferenceCall) -> Kernel:
    """Returns the kernel of instance normalization."""
    value, options = call.values[0], call.call
    if not options.argument(5, "use_input_stats", True):  # elementwise, by constant statistics
        return PathKernel(call)
    weight = _per_channel(options.argument(3, "weight"), value)
    eps = float(options.argument(7, "eps", 1e-5))
    return _norm(call, [*value.shape[:2], value[0, 0].numel()], weight, eps)


def _per_channel(weight: object, value: Tensor) -> object:
    return weight.reshape(-1, *(1,) * (value.ndim - 2)) if isinstance(weight, Tensor) else weight


__all__ = ["MultiplierKernel", "PathKernel", "exponential_mean", "exponential_shares", "polynomial"]
