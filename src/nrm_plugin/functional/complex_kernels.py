r"""Kernels of affine functions of real tensors with complex intermediate results, such as an FFT filter.

.. math:: y = M x + b, \qquad \text{for instance } M = \mathrm{Re}(F_s) \otimes \mathrm{Re}(F_h) - \dots

The matrix is computed by applying the function to unit vectors. Dimensions along which the function acts identically at
each position, such as samples and channels, are detected first and left out of the matrix.

Source: docs/measure.md (operations without a module).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import UnsupportedOperationError
from ..kernels.base import Kernel
from ..kernels.rule_reader import read_rule_at
from ..model.affine_layers import Weighted, layer_like
from .function_call import FunctionCall
from .unsupported import UnknownKernel, uncovered_layer_error

ENTRIES = 1 << 26
"""Maximum number of elements of the matrix."""


@dataclass(frozen=True)
class Layout:
    """Reshaping of a tensor to ``(samples, positions, features)`` and back.

    Attributes:
        shape: Shape of the tensor.
        order: Permutation of the dimensions: samples and positions first, then all others.
        folded: Number of sample and position dimensions.
        has_samples: Whether the first of these dimensions indexes samples.
    """

    shape: torch.Size
    order: tuple[int, ...]
    folded: int
    has_samples: bool

    @property
    def features(self) -> int:
        """Number of features at each position."""
        return math.prod(self.shape[dim] for dim in self.order[self.folded :])

    def fold(self, tensor: Tensor) -> Tensor:
        """Reshapes a tensor from ``(K, *shape)`` to ``(K, samples, positions, features)``."""
        sizes = [self.shape[dim] for dim in self.order]
        samples = sizes[0] if self.has_samples else 1
        positions = math.prod(sizes[self.has_samples : self.folded])
        moved = tensor.permute(0, *(dim + 1 for dim in self.order))
        return moved.reshape(len(tensor), samples, positions, self.features)

    def unfold(self, tensor: Tensor) -> Tensor:
        """Inverts :meth:`fold`."""
        sizes = [self.shape[dim] for dim in self.order]
        inverse = [self.order.index(dim) + 1 for dim in range(len(self.order))]
        return tensor.reshape(len(tensor), *sizes).permute(0, *inverse)


class FoldedKernel(Kernel):
    """Kernel of a linear layer whose input concatenates the features of several tensors.

    Args:
        inner: Kernel of the layer, with a single input.
        inputs: Layout of each input.
        output: Layout of the output.
    """

    def __init__(self, inner: Kernel, inputs: list[Layout], output: Layout) -> None:
        self.inner, self.inputs, self.output = inner, inputs, output
        self.is_stochastic = inner.is_stochastic

    def pull(self, relevance: Tensor) -> tuple[Tensor, ...]:
        return self._apart(self.inner.pull(self.output.fold(relevance))[0])

    def pull_absolute(self, relevance: Tensor) -> tuple[Tensor, ...]:
        return self._apart(self.inner.pull_absolute(self.output.fold(relevance))[0])

    def column_sum(self, like: Tensor) -> Tensor:
        folded = self.output.fold(like.unsqueeze(0)).squeeze(0)
        return self.output.unfold(self.inner.column_sum(folded).unsqueeze(0)).squeeze(0)

    def complete_for(self, relevance: Tensor | None) -> bool:
        return self.inner.complete_for(None if relevance is None else self.output.fold(relevance))

    def _apart(self, together: Tensor) -> tuple[Tensor, ...]:
        parts = torch.split(together, [layout.features for layout in self.inputs], -1)
        return tuple(layout.unfold(part) for layout, part in zip(self.inputs, parts, strict=True))


def complex_kernel(call: FunctionCall) -> Kernel:
    """Returns the kernel of a call whose result is jointly affine in its inputs."""
    with torch.no_grad():
        probe = _Probe(call)
        if not probe.is_affine():
            return UnknownKernel(UnsupportedOperationError(_NOT_AFFINE.format(where=_where(call))), call.shapes)
        pairs = probe.shared_dimensions()
        inputs = [_layout(shape, [one for one, _ in pairs], pairs) for shape in call.shapes]
        output = _layout(probe.shape, [other for _, other in pairs], pairs)
        if sum(one.features for one in inputs) * output.features > ENTRIES:
            return UnknownKernel(UnsupportedOperationError(_TOO_LARGE.format(where=_where(call))), call.shapes)
        weight = probe.matrix(inputs, output)
        bias = _smallest(output.fold(probe.offset.unsqueeze(0))[0])
    like = layer_like("linear")
    rule = call.settings.rules.of_weight(weight, like, call.path)
    if rule is None:
        return UnknownKernel(uncovered_layer_error(call.path, like, call.name), call.shapes)
    shell = Weighted(_product, weight, bias, -1, padding_mode="computed")
    together = torch.cat([one.fold(v.unsqueeze(0))[0] for one, v in zip(inputs, call.values, strict=True)], -1)
    return FoldedKernel(read_rule_at(rule, shell, together, call.path), inputs, output)


def _product(source: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return source @ weight.T if bias is None else source @ weight.T + bias


def _layout(shape: torch.Size, first: list[int], pairs: list[tuple[int, int]]) -> Layout:
    rest = [dim for dim in range(len(shape)) if dim not in first]
    return Layout(shape, (*first, *rest), len(first), bool(pairs) and pairs[0] == (0, 0))


def _smallest(bias: Tensor) -> Tensor | None:
    """Removes leading dimensions along which a bias is constant. Returns None if the bias is zero."""
    while bias.ndim > 1 and bool((bias == bias[:1]).all()):
        bias = bias[0]
    return bias if bool(bias.any()) else None


class _Probe:
    """Evaluates the function of a call at test inputs to find out whether it is affine and what its matrix is.

    Args:
        call: The call whose function is evaluated.
    """

    def __init__(self, call: FunctionCall) -> None:
        self.run, self.values = call.run, call.values
        self.offset: Tensor = call.run(*map(torch.zeros_like, self.values))
        self.shape = self.offset.shape
        self.tolerance = 1e3 * torch.finfo(self.offset.dtype).eps
        self._generator = torch.Generator().manual_seed(0)

    def linear(self, values: list[Tensor]) -> Tensor:
        """Evaluates the linear part of the function, without its offset."""
        result: Tensor = self.run(*(value.contiguous() for value in values)) - self.offset
        return result

    def _random(self, like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=self._generator, dtype=torch.float64).to(like)

    def is_affine(self) -> bool:
        """Tests superposition at the inputs of the call and at random inputs of similar magnitude."""
        other = [self._random(value) * value.abs().mean().clamp(min=1e-6) for value in self.values]
        for first in (list(self.values), [self._random(value) for value in other]):
            both = self.linear([one - 2 * two for one, two in zip(first, other, strict=True)])
            if not self._are_equal(both, self.linear(first) - 2 * self.linear(other)):
                return False
        return True

    def _are_equal(self, one: Tensor, other: Tensor) -> bool:
        scale = float(other.abs().max()) if other.numel() else 0.0
        return bool(((one - other).abs() <= self.tolerance * max(scale, 1e-30)).all())

    def shared_dimensions(self) -> list[tuple[int, int]]:
        """Returns pairs of input and output dimensions along which the function acts identically at each position.

        Along such a pair of dimensions, the function commutes with every matrix. This is tested with two random
        matrices.
        """
        ranks = {value.ndim for value in self.values}
        pairs: list[tuple[int, int]] = []
        for dim in range(len(self.shape)):
            taken = {one for one, _ in pairs}
            nearest = sorted(range(min(ranks)) if len(ranks) == 1 else (), key=lambda one: abs(one - dim))
            for one in (one for one in nearest if one not in taken):
                if all(value.shape[one] == self.shape[dim] for value in self.values) and self._commutes(one, dim):
                    pairs.append((one, dim))
                    break
        return pairs

    def _commutes(self, one: int, dim: int) -> bool:
        size = self.shape[dim]
        for _ in range(2):
            values = [self._random(value) for value in self.values]
            mixer = self._random(values[0].new_empty(size, size))
            mixed = self.linear([_along(mixer, value, one) for value in values])
            if not self._are_equal(mixed, _along(mixer, self.linear(values), dim)):
                return False
        return True

    def matrix(self, inputs: list[Layout], output: Layout) -> Tensor:
        """Computes the matrix of the features, with shape ``(out, in)``, by evaluating the function on unit vectors."""
        columns = []
        for number, layout in enumerate(inputs):
            like = layout.fold(self.values[number].unsqueeze(0))
            _, samples, positions, size = like.shape
            for start in range(0, size, samples * positions):
                units = torch.eye(size, dtype=like.dtype, device=like.device)[start : start + samples * positions]
                folded = like.new_zeros(samples * positions, size)
                folded[: len(units)] = units
                values = [torch.zeros_like(value) for value in self.values]
                values[number] = layout.unfold(folded.reshape(like.shape))[0]
                images = output.fold(self.linear(values).unsqueeze(0))[0].flatten(0, 1)
                columns.append(images[: len(units)])
        weight = torch.cat(columns).T.contiguous()
        rounding = 4 * torch.finfo(weight.dtype).eps * weight.abs().max()
        return torch.where(weight.abs() <= rounding, 0.0, weight)  # zeros with rounding errors would receive shares


def _along(matrix: Tensor, tensor: Tensor, dim: int) -> Tensor:
    """Multiplies a tensor by a matrix along dimension ``dim``."""
    return (tensor.movedim(dim, -1) @ matrix.T).movedim(-1, dim)


def _where(call: FunctionCall) -> str:
    return f"relevance arrived at {call.name!r} in {call.path or 'the model'!r}, which returns complex numbers"


_ADVICE = (
    "Do this in a separate module that maps one real tensor to another, and assign a rule to this module in the "
    "composite's layer_map: zennit.rules.Epsilon() if it is linear, Pass() if it is elementwise."
)
_NOT_AFFINE = (
    "{where} and converts them to real numbers by a nonlinear function, which has no kernel. "
    "Magnitudes are supported as `z.abs()`, power spectra as `z.abs() ** 2`. " + _ADVICE
)
_TOO_LARGE = "{where}. The matrix of this function is too large to be stored. " + _ADVICE

__all__ = ["complex_kernel"]
