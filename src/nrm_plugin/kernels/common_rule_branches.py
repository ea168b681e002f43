"""Branches (terms of the sum that defines a rule) of common rules on torch layers, computed in closed form.

The factors of these rules are known functions of one or two layer outputs. They are computed without replacing the
parameters of the layer or applying the gradient mapper of the rule.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from zennit.core import BasicHook, ParamMod
from zennit.rules import Epsilon, ZPlus

from ..model.affine_layers import broadcast, twin_of
from ..model.linear_maps import LinearMap, explicit_maps, window_maps
from ..model.shapes_without_values import data_address
from ..model.trace_guards import holds, without_modes
from ..rules import ConservingEpsilon, mean_sizes
from .cache_blocks import Block, block_of, blocks_for
from .known_gradient_mappers import inverse_by
from .layer_call import LayerCall
from .modified_layers import is_by_blocks
from .modifier_probes import is_positive
from .normalization import Columns, ColumnWriter, Normalization, may_read
from .recognized_rules import RuleForm, form_of, modified_bias
from .rule_branch import Branch

KEPT = 1 << 16
"""Maximum number of elements of a stored modified input. Larger inputs are recomputed."""

_FORMATS = (torch.float32, torch.float64)


def closed_branches(
    call: LayerCall, rule: BasicHook, normalization: Normalization | None
) -> tuple[list[Branch], Columns] | None:
    """Computes the branches of a common rule on a linear or convolutional layer in closed form.

    Args:
        call: The recorded call of the layer.
        rule: The rule of the layer.
        normalization: The normalization, if the factors should include the gain, or None.

    Returns:
        The branches and the columns of the kernel, or None for other rules and layers.
    """
    form = form_of(rule)
    weight = call.weight
    if form is None or weight is None or call.precision is not None or call.input.dtype not in _FORMATS:
        return None
    if any(is_by_blocks(call, ParamMod.ensure(modify)) for modify in rule.param_modifiers):
        return None
    reader = _Reader(call, rule, form, weight, ColumnWriter(call.form, normalization), normalization)
    with torch.no_grad(), without_modes():
        return reader.conserving() if isinstance(rule, ConservingEpsilon) else reader.single()


@dataclass(frozen=True)
class _LinearPart:
    """Linear part of one branch: the output without bias of the modified layer, evaluated at the modified input.

    Attributes:
        values: The linear part of the output, of shape ``(N, *out)``.
        source: The modified input.
        weight: The weight as modified by the rule.
        linear_map: Multiplication by the modified weight, and its transpose.
        is_own: Whether ``values`` may be overwritten because no other computation reads them.
    """

    values: Tensor
    source: Tensor
    weight: Tensor
    linear_map: LinearMap
    is_own: bool = True

    def memory(self) -> Tensor:
        """Returns memory for a factor: ``values`` if it may be overwritten, and otherwise a new tensor."""
        return self.values if self.is_own else torch.empty_like(self.values)


@dataclass(frozen=True)
class _Reader:
    """Computes the branches of one rule for one call of a layer.

    Attributes:
        call: The recorded call of the layer.
        rule: The rule of the layer.
        normalization: The normalization, if the factors should include the gain, or None.
        form: The parameters of the rule.
        weight: The weight of the layer.
        writer: Object that accumulates the columns of the kernel.
    """

    call: LayerCall
    rule: BasicHook
    form: RuleForm
    weight: Tensor
    writer: ColumnWriter
    normalization: Normalization | None

    def single(self) -> tuple[list[Branch], Columns] | None:
        """Computes the branches of a rule whose factors are all ``1 / (z + bias)``, stabilized."""
        parts = self._linear_parts()
        if parts is None:
            return None
        total = functools.reduce(torch.add, (part.values for part in parts))
        first = parts[0] if len(parts) == 1 else None
        bias = self._bias()
        memory = total if first is None else first.memory()
        write = self._signed if isinstance(self.rule, Epsilon) else self._positive
        for at in blocks_for(total):
            added = None if bias is None else block_of(bias, at, total.shape)
            write(at, block_of(total, at), added, block_of(memory, at))
        pairs = zip(parts, self.rule.input_modifiers, strict=False)
        return [
            self._branch(part.source, memory, part.linear_map, _constant(part.weight), modify) for part, modify in pairs
        ], self.writer.columns()

    def _branch(
        self,
        source: Tensor,
        factor: Tensor,
        linear_map: LinearMap,
        weight: Callable[[], Tensor],
        modify: Callable[[Tensor], Tensor],
    ) -> Branch:
        """Returns a branch that stores its modified input if it is small and recomputes it on demand otherwise."""
        is_kept = source is self.call.input or source.numel() <= KEPT
        return Branch(
            source if is_kept else self.call.input,
            factor,
            1.0,
            linear_map,
            weight,
            None if is_kept else lambda values: modify(values).detach(),
        )

    def _linear_parts(self) -> list[_LinearPart] | None:
        parts: list[_LinearPart] = []
        for modify_input, modify in zip(self.rule.input_modifiers, self.rule.param_modifiers, strict=True):
            is_all = isinstance(self.rule, ZPlus) and not parts and is_positive(self.call.input)
            source = self.call.input if is_all else self._source(modify_input)
            part = self._linear_part(source, modify.modifier(self.weight, "weight"))
            if part is None:
                return None
            parts.append(part)
            if is_all:
                break
        return parts

    def _source(self, modify: Callable[[Tensor], Tensor]) -> Tensor:
        """Returns the modified input, or the input tensor itself if the rule does not modify it.

        In the latter case, the output of the layer is already known.
        """
        return modify(self.call.input)

    def _linear_part(self, source: Tensor, weight: Tensor) -> _LinearPart | None:
        linear_map = explicit_maps(twin_of(self.call.module), weight, source)
        if linear_map is None:
            return None
        seen = self.call.image
        if seen is not None and source is self.call.input and data_address(weight) == data_address(seen.weight):
            # Without a bias, this is the output of the layer, which other operations read.
            is_own = self.call.module._parameters.get("bias") is not None
            return _LinearPart(seen.saved.tensor, source, weight, linear_map, is_own)
        return _LinearPart(linear_map.up(source.unsqueeze(0)).squeeze(0), source, weight, linear_map)

    def _bias(self) -> Tensor | None:
        """Returns the modified bias, in a shape that broadcasts against the output, or None if it is zero."""
        bias = modified_bias(self.rule.param_modifiers[0], self.call.module._parameters.get("bias"))
        return None if bias is None else broadcast(bias, self.call.module, len(self.call.form.shape))

    def _positive(self, at: Block, part: Tensor, bias: Tensor | None, out: Tensor) -> None:
        """Computes the factors of a block in which both the output and the bias are nonnegative."""
        added = self.form.epsilon if bias is None else bias + self.form.epsilon
        if self.normalization is not None and self.normalization.restores(part, added):
            torch.reciprocal(part, out=out)  # the factor times the gain
            return
        factor = (part + added).reciprocal_()
        gain = self.writer.gain(at, factor * part)
        out.copy_(factor if gain is None else factor.mul_(gain))

    def _signed(self, at: Block, part: Tensor, bias: Tensor | None, out: Tensor) -> None:
        factor = inverse_by(self.form.epsilon)(part if bias is None else part + bias)
        gain = self.writer.gain(at, factor * part)
        out.copy_(factor if gain is None else factor.mul_(gain))

    def conserving(self) -> tuple[list[Branch], Columns] | None:
        r"""Computes the branches of :class:`~nrm_plugin.rules.ConservingEpsilon`.

        The mean weight of a channel cancels in the second branch. This branch needs only sums over input windows.
        """
        same, size = (self._source(modify) for modify in self.rule.input_modifiers)
        windows = window_maps(twin_of(self.call.module), self.weight, size)
        part = None if windows is None else self._linear_part(same, self.weight)
        if windows is None or part is None:
            return None
        shape = self.call.form.shape
        sums = windows.up(size.unsqueeze(0)).squeeze(0)
        inverse = sums.clamp(min=torch.finfo(sums.dtype).tiny).reciprocal_()
        means = broadcast(mean_sizes(self.weight).mul_(self.form.share), self.call.module, len(shape))
        factor, other = part.memory(), torch.empty_like(part.values)
        for at in blocks_for(factor):
            values, out = block_of(part.values, at), (block_of(factor, at), block_of(other, at))
            least = block_of(sums, at, shape) * block_of(means, at, shape)
            self._conserve(at, values, least, block_of(inverse, at, shape), out)
        first, second = self.rule.input_modifiers
        return [
            self._branch(same, factor, part.linear_map, _constant(self.weight), first),
            self._branch(size, other, windows, _ones_like(self.weight), second),
        ], self.writer.columns()

    def _conserve(self, at: Block, part: Tensor, least: Tensor, inverse: Tensor, out: tuple[Tensor, Tensor]) -> None:
        size = part.abs()
        total = torch.maximum(least, size, out=least)
        taken = torch.sub(total, size, out=size)
        eps = self.form.epsilon
        least_total = eps / torch.finfo(total.dtype).eps
        if may_read(total) and holds("sums of one", lambda: total.amin() >= least_total):
            self.writer.gain(at, None)
            scaled = total.reciprocal_()
        else:
            scaled = (total + eps).reciprocal_()
            gain = self.writer.gain(at, total.mul_(scaled))
            scaled = scaled if gain is None else scaled.mul_(gain)
        torch.sign(part, out=out[0]).mul_(scaled)
        torch.mul(taken.mul_(scaled), inverse, out=out[1])


def _constant(weight: Tensor) -> Callable[[], Tensor]:
    return lambda: weight


def _ones_like(weight: Tensor) -> Callable[[], Tensor]:
    return lambda: weight.new_ones(()).expand(weight.shape)
