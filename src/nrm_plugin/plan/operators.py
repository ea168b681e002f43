"""Properties of torch operators on which tracing and simplification depend, determined once for each operator."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

aten = torch.ops.aten


def _packets(names: str) -> frozenset[Any]:
    return frozenset(getattr(aten, name) for name in names.split())


FILLED = _packets(
    """
    new_zeros new_ones new_full new_empty zeros_like ones_like full_like empty_like zeros ones full empty empty_strided
    new_empty_strided
    """
)
"""Operators that create tensors and read at most the shape of an argument."""

ELEMENTWISE = _packets(
    """
    mul add sub div neg abs sign copysign reciprocal maximum minimum nan_to_num clamp clamp_min clamp_max relu where
    sqrt square addcmul addcdiv ne eq ge gt le lt logical_and logical_or bitwise_not bitwise_and zeros_like ones_like
    mul_ add_ sub_ div_ neg_ abs_ reciprocal_ nan_to_num_ clamp_ clamp_min_ relu_ addcmul_ masked_fill masked_fill_
    """
)
"""Elementwise operators."""

_REDUCTIONS = frozenset([aten.sum.dim_IntList, aten.mean.dim, aten.amin.default, aten.amax.default])
"""Reductions over dimensions."""

Forwarding = Literal["", "alias", "view", "copy", "product", "move"]
"""How an operator may return its first argument: always ("alias"), or if shape and strides stay the same ("view"), if
also neither tensor is overwritten later ("copy"), or if also the factor is one ("product"). An operator that overwrites
its first argument with its second is a "move"."""

_FORWARDING: dict[Any, Forwarding] = {
    aten.detach.default: "alias",
    aten.alias.default: "alias",
    aten.lift_fresh.default: "alias",
    aten.view.default: "view",
    aten._unsafe_view.default: "view",
    aten.expand.default: "view",
    aten.squeeze.dim: "view",
    aten.squeeze.default: "view",
    aten.slice.Tensor: "view",
    aten.clone.default: "copy",
    aten._lazy_clone.default: "copy",
    aten.lift_fresh_copy.default: "copy",
    aten._to_copy.default: "copy",
    aten.mul.Tensor: "product",
    aten.copy_.default: "move",
}

_DETERMINISTIC = ("aten._scaled_dot_product", "aten.native_dropout")
"""Operators that draw random numbers only in training mode. Measures are computed in evaluation mode."""


@dataclass(frozen=True, slots=True, eq=False)
class Facts:
    """Properties of a torch operator.

    Attributes:
        function: The operator.
        writes: Position and name of the overwritten arguments.
        is_filled: Whether the operator creates a tensor and reads at most the shape of an argument.
        draws: Whether the operator draws random numbers.
        is_recorded: Whether the operator is traced even if it reads only constants.
        makes_memory: Whether the results may be in newly allocated memory.
        is_static: Whether the operator returns numbers that do not depend on values.
        is_shaped_by_values: Whether the shapes of the results depend on values.
        is_elementwise: Whether the operator is elementwise.
        is_reduction: Whether the operator reduces a tensor over dimensions.
        forwarding: How the operator may return its first argument.
    """

    function: Any
    writes: tuple[tuple[int, str], ...]
    is_filled: bool
    draws: bool
    is_recorded: bool
    makes_memory: bool
    is_static: bool
    is_shaped_by_values: bool
    is_elementwise: bool
    is_reduction: bool
    forwarding: Forwarding


FACTS: dict[int, Facts] = {}
"""Properties of operators, keyed by ``id()``, since hashing torch operators is slow. The operators are kept alive."""


def facts_of(function: Any) -> Facts:
    """Returns the properties of a torch operator."""
    known = FACTS.get(id(function))
    if known is None:
        known = FACTS[id(function)] = _read(function)
    return known


def _read(function: Any) -> Facts:
    schema, packet = function._schema, function.overloadpacket
    arguments = enumerate(schema.arguments)
    writes = [(at, one.name) for at, one in arguments if one.alias_info is not None and one.alias_info.is_write]
    draws = torch.Tag.nondeterministic_seeded in function.tags and not str(function).startswith(_DETERMINISTIC)
    return Facts(
        function,
        tuple(writes),
        is_filled=packet in FILLED,
        draws=draws,
        is_recorded=packet in FILLED or draws,
        makes_memory=not writes and any(one.alias_info is None for one in schema.returns),
        is_static=function in (aten.is_set_to.default, aten.is_same_size.default),
        is_shaped_by_values=torch.Tag.dynamic_output_shape in function.tags,
        is_elementwise=packet in ELEMENTWISE,
        is_reduction=function in _REDUCTIONS,
        forwarding=_FORWARDING.get(function, ""),
    )


__all__ = ["FACTS", "Facts", "facts_of"]
