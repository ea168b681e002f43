r"""Secant (finite-difference) kernels of maxima and max pooling.

Let :math:`m` be the argmax at the input and :math:`m^0` the argmax at the reference. The difference of the maxima is
divided between these two elements. Either of them can switch from the reference to the input first; the two orders are
averaged. If element ``m`` switches first, it receives

.. math:: \max(a_m, a^0_{m^0}) - a^0_{m^0}

and ``m⁰`` receives the rest. If ``m⁰`` switches first, it receives :math:`\max(a^0_m, a_{m^0}) - a^0_{m^0}`, and ``m``
the rest.

Source: docs/differences.md.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..kernels.base import Kernel
from .differences import DifferenceCall, secant_of
from .function_call import FunctionCall
from .function_kernels import sum_to_shape
from .secant_kernels import MultiplierKernel, Multipliers


class MaximumKernel(MultiplierKernel):
    """Kernel of maxima over groups of elements.

    Args:
        call: The recorded calls for the input and the reference.
        pair: The elements at the input and at the reference, of shape ``(*in)`` each.
        places: Position of the maximum of each group, at the input and at the reference, of shape ``(*out)``, as
            indices into the flattened elements.
        sign: -1 for minima.
    """

    def __init__(
        self, call: DifferenceCall, pair: tuple[Tensor, Tensor], places: tuple[Tensor, Tensor], sign: float = 1.0
    ) -> None:
        super().__init__(call)
        self.shape, self.places = pair[0].shape, places
        one, two = (value.flatten() if sign == 1 else sign * value.flatten() for value in pair)
        self.slopes = _slopes(one, two, *places)

    def multipliers(self, above: Tensor) -> Multipliers:
        below = above.new_zeros(len(above), self.shape.numel())
        for place, slope in zip(self.places, self.slopes, strict=True):
            parts = (above * slope).reshape(len(above), -1)
            below = below.index_add(1, place.flatten(), parts)
        return self.spread(below.reshape(len(above), *self.shape))

    absolute_multipliers = multipliers  # slopes are in [0, 1]

    def spread(self, below: Tensor) -> Multipliers:
        """Splits the multipliers of all elements, of shape ``(K, *in)``, into the multipliers of each input."""
        return (below,)


class StackedKernel(MaximumKernel):
    """Kernel of the elementwise maximum of two tensors, with broadcasting."""

    def spread(self, below: Tensor) -> Multipliers:
        shapes = (delta.shape for delta in self.before)
        return tuple(sum_to_shape(below[:, number], shape) for number, shape in enumerate(shapes))


def _slopes(one: Tensor, two: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Computes the slopes, in [0, 1], of the elements that are largest at the input and at the reference."""
    at_first, at_second = (one[first], two[first]), (one[second], two[second])
    gain_first = (torch.maximum(at_first[0], at_second[1]) - at_second[1]).nan_to_num(0.0)
    gain_second = (torch.maximum(at_first[1], at_second[0]) - at_second[1]).nan_to_num(0.0)
    total = (at_first[0] - at_second[1]).nan_to_num(0.0)
    parts = (gain_first + total - gain_second) / 2, (gain_second + total - gain_first) / 2
    runs = (at_first[0] - at_first[1]), (at_second[0] - at_second[1])
    slopes = [
        torch.where(run == 0, torch.zeros_like(run), part / torch.where(run == 0, 1.0, run))
        for part, run in zip(parts, runs, strict=True)
    ]
    is_same = first == second
    return torch.where(is_same, 1.0, slopes[0]), torch.where(is_same, 0.0, slopes[1])


@secant_of("maximum", "minimum")
def extremum(call: DifferenceCall) -> Kernel:
    """Returns the kernel of the elementwise maximum or minimum of two tensors, one of which may be constant."""
    sign = 1.0 if call.name == "maximum" else -1.0
    if len(call.values) == 1:
        return _of_one(call)
    shape = call.after.shape
    pair = tuple(
        torch.stack([value.expand(shape) for value in values]) for values in (call.values, call.reference_values)
    )
    places = tuple(_flat_places((sign * stack).argmax(0, keepdim=True), stack.shape, 0)[0] for stack in pair)
    return StackedKernel(call, (pair[0], pair[1]), (places[0], places[1]), sign)


def _of_one(call: DifferenceCall) -> Kernel:
    from .secants import elementwise

    return elementwise(call)


def _flat_places(index: Tensor, shape: torch.Size, dim: int) -> Tensor:
    """Converts indices along ``dim``, as returned with ``keepdim=True``, to flat indices."""
    numbers = torch.arange(shape.numel(), device=index.device).reshape(shape)
    return numbers.gather(dim, index)


# -- of groups --------------------------------------------------------------------------------------------------------


class GroupsKernel(MaximumKernel):
    """Kernel of maxima over groups of elements, where all inputs are flattened and concatenated."""

    def spread(self, below: Tensor) -> Multipliers:
        shapes = [delta.shape for delta in self.before]
        parts = torch.split(below, [shape.numel() for shape in shapes], 1)
        return tuple(part.reshape(len(below), *shape) for part, shape in zip(parts, shapes, strict=True))


def extremum_of_groups(call: DifferenceCall) -> Kernel:
    """Returns the kernel of :func:`scatter_extremum`."""
    _, _, dim, index, _, how = call.call.args
    values = call.values, call.reference_values
    places = tuple(_places_of_groups(call.call, one, dim, index) for one in values)
    pair = tuple(torch.cat([value.flatten() for value in one]) for one in values)
    return GroupsKernel(call, (pair[0], pair[1]), (places[0], places[1]), 1.0 if how == "amax" else -1.0)


def _places_of_groups(call: FunctionCall, values: list[Tensor], dim: int, index: Tensor) -> Tensor:
    """Returns the index of each group's extremum in the concatenated flattened inputs, or 0 for an empty group."""
    source, *own = values
    results = call.run(*values)
    numbers = torch.arange(sum(value.numel() for value in values), device=source.device)
    of_source = numbers[: source.numel()].reshape(source.shape)
    none = len(numbers)
    hits = torch.where(source == results.gather(dim, index), of_source, none)
    places = torch.full_like(results, none, dtype=torch.int64).scatter_reduce(dim, index, hits, "amin")
    if own:
        places = torch.where(own[0] == results, numbers[source.numel() :].reshape(own[0].shape), places)
    return places.masked_fill(places == none, 0)


# -- along dimensions -------------------------------------------------------------------------------------------------


@secant_of("max", "min", "amax", "amin")
def along_dimensions(call: DifferenceCall) -> Kernel:
    """Returns the kernel of the maximum or minimum along dimensions."""
    sign = 1.0 if call.name.endswith("max") else -1.0
    value, dims = call.values[0], call.call.argument(1, "dim")
    dims = list(range(value.ndim)) if dims is None or dims == () else [dims] if isinstance(dims, int) else list(dims)
    dims = [dim % max(1, value.ndim) for dim in dims]
    pair = value, call.reference_values[0]
    places = tuple(_argmax(sign * one, dims).reshape(call.after.shape) for one in pair)
    return MaximumKernel(call, pair, (places[0], places[1]), sign)


def _argmax(values: Tensor, dims: list[int]) -> Tensor:
    """Returns the argmax along several dimensions, as an index into the flattened tensor."""
    kept = [dim for dim in range(values.ndim) if dim not in dims]
    numbers = torch.arange(values.numel(), device=values.device).reshape(values.shape)
    rows = values.permute(*kept, *dims).flatten(len(kept)) if dims else values.unsqueeze(-1)
    all_numbers = numbers.permute(*kept, *dims).flatten(len(kept)) if dims else numbers.unsqueeze(-1)
    return all_numbers.gather(-1, rows.argmax(-1, keepdim=True)).squeeze(-1)


# -- pooling ----------------------------------------------------------------------------------------------------------

_POOLS: dict[str, tuple[Any, int]] = {
    "max_pool1d": (nn.functional.max_pool1d, 1),
    "max_pool2d": (nn.functional.max_pool2d, 2),
    "max_pool3d": (nn.functional.max_pool3d, 3),
    "adaptive_max_pool1d": (nn.functional.adaptive_max_pool1d, 1),
    "adaptive_max_pool2d": (nn.functional.adaptive_max_pool2d, 2),
    "adaptive_max_pool3d": (nn.functional.adaptive_max_pool3d, 3),
    "fractional_max_pool2d": (nn.functional.fractional_max_pool2d, 2),
    "fractional_max_pool3d": (nn.functional.fractional_max_pool3d, 3),
}


@secant_of(*_POOLS, *(f"{name}_with_indices" for name in _POOLS))
def pooling(call: DifferenceCall) -> Kernel:
    """Returns the kernel of max pooling."""
    function, dims = _POOLS[call.name.removesuffix("_with_indices")]
    pair = call.values[0], call.reference_values[0]
    options = {key: value for key, value in call.call.kwargs.items() if key not in ("input", "self", "return_indices")}
    places = []
    for value in pair:
        given = call.call.args[1 : 2 if "adaptive" in call.name else 4 if "fractional" in call.name else 6]
        _, index = function(value, *given, **options, return_indices=True)
        planes = value.shape[value.ndim - dims :].numel()
        number = torch.arange(value.numel() // planes, device=value.device)
        offset = number.reshape(*value.shape[: value.ndim - dims], *(1,) * dims) * planes
        places.append(index + offset)
    return MaximumKernel(call, pair, (places[0], places[1]))


__all__ = ["MaximumKernel", "extremum_of_groups"]
