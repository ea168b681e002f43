"""Evaluation of a layer whose parameters a rule has modified, at an input that the rule has modified."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from zennit.core import ParamMod
from zennit.rules import NoMod

from ..model.affine_layers import broadcast, twin_of
from ..model.autocast import lowered
from ..model.linear_maps import LinearMap, blocked_maps, explicit_maps, recorded_maps
from ..model.shallow_copies import shared_copy
from ..model.shapes_without_values import data_address
from ..rules import EvenMod
from .cache_blocks import Block, block_of
from .known_rules import is_known_linear
from .layer_call import LayerCall, Run
from .modifier_probes import is_zero

LARGE = 1 << 22
"""Minimum number of weights for a linear layer to be modified block by block."""


@dataclass
class ModifiedLayer:
    """Output and linear map of a layer with modified parameters, evaluated at the modified input.

    Attributes:
        linear_part: The linear part of the output (without bias), or a scalar if all its elements are equal.
        bias: The bias, in a shape that broadcasts against the output.
        linear_map: Multiplication by the modified weight, and its transpose, or None if the input is zero or only the
            output is needed.
        weight: Function that computes the modified weight.
        is_own: Whether ``linear_part`` may be overwritten because no other computation reads it.
    """

    linear_part: Tensor
    bias: Tensor | None = None
    linear_map: LinearMap | None = None
    weight: Callable[[], Tensor] | None = None
    is_own: bool = False

    def output(self, at: Block, shape: torch.Size) -> Tensor:
        """Returns one block of the output with bias. The whole output has shape ``shape``."""
        part = block_of(self.linear_part.expand(shape), at)
        if self.bias is None:
            return part
        bias = block_of(self.bias.expand(shape), at)
        return part + bias if self.linear_part.ndim or bool(self.linear_part) else bias

    def memory(self, like: Tensor) -> Tensor:
        """Returns memory for a factor with the shape of ``like``. Reuses ``linear_part`` if possible."""
        if not all(self.linear_part.stride()) or self.linear_part.shape != like.shape:
            return torch.empty_like(like)
        return self.linear_part if self.is_own else torch.empty_like(self.linear_part)


def modified_layer(call: LayerCall, modify: ParamMod, source: Tensor, sign: float) -> ModifiedLayer:
    """Evaluates a layer with modified parameters at a modified input.

    Args:
        call: The call of the unmodified layer.
        modify: The parameter modifier of the rule.
        source: The modified input, of shape ``(N, *in)``.
        sign: Sign of the branch; if it is 0, only the output is needed.
    """
    if is_by_blocks(call, modify):
        return _by_blocks(call, modify, source)
    with modify(call.module) as modified:
        return _modified(call, modified, source, sign)


def _modified(call: LayerCall, modified: nn.Module, source: Tensor, sign: float) -> ModifiedLayer:
    """Evaluates a modified layer without bias. Subtracting the bias from its output would lose precision."""
    bias, weight = modified._parameters.get("bias"), modified._parameters.get("weight")
    is_unmodified = source is call.input and _share_memory(modified._parameters, call.module._parameters)
    if sign == 0 and call.is_output_known and is_unmodified:
        return ModifiedLayer(call.output)
    added = None if bias is None else broadcast(bias.detach(), modified, len(call.form.shape))
    if added is not None and added.device.type == "cpu" and not bool(added.any()):
        added = None
    if is_zero(source):
        return ModifiedLayer(call.like.new_zeros(()), added)
    if weight is None:
        linear_map, part = recorded_maps(lambda values: call.run(call.module, values), source)
        return ModifiedLayer(part, added, linear_map)
    matrix = weight.detach()
    explicit = _explicit_maps(call, modified, matrix, source)
    if explicit is None:
        rerun = rerun_without_bias(call.module, call.run)
        linear_map, part = recorded_maps(lambda values: rerun(values, matrix), source)
        return ModifiedLayer(part, added, linear_map, lambda: matrix, is_own=True)
    seen = call.image
    if seen is not None and source is call.input and data_address(matrix) == data_address(seen.weight):
        # Without a bias, this is the output of the layer, which other steps read.
        return ModifiedLayer(seen.saved.tensor, added, explicit, lambda: matrix, is_own=bias is not None)
    part = explicit.up(source.unsqueeze(0)).squeeze(0)
    return ModifiedLayer(part, added, explicit, lambda: matrix, is_own=True)


def _explicit_maps(call: LayerCall, modified: nn.Module, matrix: Tensor, source: Tensor) -> LinearMap | None:
    short = _shorter_format(call, source)
    if short is None:
        return explicit_maps(twin_of(modified), matrix, source)
    linear_map = explicit_maps(twin_of(modified), matrix.to(short), source)
    return None if linear_map is None else lowered(linear_map, short)


def _shorter_format(call: LayerCall, source: Tensor) -> torch.dtype | None:
    """Returns the dtype in which the layer multiplies by its weight if it is less precise than float32, or None."""
    return call.precision if source.dtype == torch.float32 else None


def is_by_blocks(call: LayerCall, modify: ParamMod) -> bool:
    """Returns True if the layer is a large linear layer and the modifier belongs to a built-in rule."""
    weight = call.module._parameters.get("weight")
    if weight is None or weight.numel() < LARGE or type(twin_of(call.module)).forward is not nn.Linear.forward:
        return False
    if not is_known_linear(call.rule) or isinstance(modify, (NoMod, EvenMod)):
        return False
    if "weight" in (modify.zero_params or ()):
        return False
    return modify.param_keys is None or "weight" in modify.param_keys


def _by_blocks(call: LayerCall, modify: ParamMod, source: Tensor) -> ModifiedLayer:
    """Evaluates a modified linear layer block by block, never storing the whole modified weight."""
    weight = call.module._parameters["weight"]
    assert weight is not None
    matrix = weight.detach()
    one_row = shared_copy(call.module)
    one_row._parameters["weight"] = nn.Parameter(matrix[:1], requires_grad=False)
    with modify(one_row) as modified:
        bias = modified._parameters.get("bias")
        added = None if bias is None else bias.detach()
    if is_zero(source):
        return ModifiedLayer(call.like.new_zeros(()), added)

    def modifier(rows: Tensor) -> Tensor:
        return modify.modifier(rows, "weight")  # type: ignore[no-any-return]

    short = _shorter_format(call, source)
    if short is None:
        linear_map = blocked_maps(matrix, modifier)
    else:
        linear_map = lowered(blocked_maps(matrix, lambda rows: modifier(rows).to(short)), short)
    part = linear_map.up(source.unsqueeze(0)).squeeze(0)
    return ModifiedLayer(part, added, linear_map, lambda: modifier(matrix))


def _share_memory(some: dict[str, Any], others: dict[str, Any]) -> bool:
    return all(
        one is None if other is None else one is not None and data_address(one) == data_address(other)
        for one, other in zip(some.values(), others.values(), strict=True)
    )


def rerun_without_bias(module: nn.Module, run: Run) -> Callable[[Tensor, Tensor], Tensor]:
    """Returns a function ``(input, weight) -> output`` that runs a layer without its bias."""

    def rerun(source: Tensor, weight: Tensor) -> Tensor:
        shell = shared_copy(module)  # a new copy for each run, since several threads may run it
        shell.__dict__["_parameters"].update(weight=weight, bias=None)
        return run(shell, source)

    return rerun
