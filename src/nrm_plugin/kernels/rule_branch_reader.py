"""Decomposition of a rule into branches (terms of its sum) for one call of an affine layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from zennit.core import BasicHook, ParamMod
from zennit.rules import Gamma

from ..model.affine_layers import WEIGHTED, is_affine
from .cache_blocks import WHOLE, Block, block_of, blocks_for
from .common_rule_branches import closed_branches
from .known_gradient_mappers import closed_mapper
from .layer_call import LayerCall
from .mapper_factors import Mapper, applied_mapper
from .modified_layers import ModifiedLayer, modified_layer, rerun_without_bias
from .modifier_probes import modified_inputs, signs_of
from .normalization import Columns, ColumnWriter, Normalization
from .rule_branch import Branch, WeightedLayer
from .rule_branch_kernel import BranchKernel, ReadBranches

_SEPARATE: dict[type, list[tuple[int, ...]]] = {Gamma: [(0, 1), (2, 3)]}
"""Groups of branches with disjoint outputs. The γ-rule has one pair for positive and one for negative outputs."""


def branch_kernel(call: LayerCall, rule: BasicHook, normalization: Normalization | None) -> BranchKernel | None:
    """Returns the kernel of a rule for one call, as a sum over branches.

    Args:
        call: The recorded call of the layer.
        rule: The rule, defined by modifiers.
        normalization: The normalization, if the factors should include the gain, or None.

    Returns:
        The kernel, or None if the layer is not affine or the rule has another form.
    """
    if not is_affine(call.module):
        return None
    closed = closed_branches(call, rule, normalization)
    if closed is not None:
        return BranchKernel(closed, call.input, _weighted_layer(call))
    sources = modified_inputs(rule, call.input)
    signs = signs_of(rule, sources)
    if signs is None:
        return None
    reader = _BranchReader(call, rule, normalization, sources, signs)
    first, *others = _SEPARATE.get(type(rule), [tuple(range(len(sources)))])
    branches = reader.read(first)
    if branches is None:
        return None
    read_others = (lambda: reader.certain(others[0])) if others else None
    return BranchKernel(branches, call.input, _weighted_layer(call), read_others)


def _weighted_layer(call: LayerCall) -> WeightedLayer | None:
    module, weight = call.module, call.weight
    if weight is None or not isinstance(module, WEIGHTED):
        return None
    return WeightedLayer(
        weight,
        rerun_without_bias(module, call.run),
        is_injective=getattr(module, "padding_mode", "zeros") == "zeros",
        groups=int(getattr(module, "groups", 1)),
        is_transposed=isinstance(module, nn.modules.conv._ConvTransposeNd) or getattr(module, "is_transposed", False),
    )


@dataclass(frozen=True)
class _BranchReader:
    """Computes the branches of a rule for one call of a layer.

    Attributes:
        call: The recorded call of the layer.
        rule: The rule, defined by modifiers.
        normalization: The normalization, if the factors should include the gain, or None.
        sources: The modified input of each branch.
        signs: The sign of each branch in the reducer.
    """

    call: LayerCall
    rule: BasicHook
    normalization: Normalization | None
    sources: list[Tensor]
    signs: list[float]

    def certain(self, chosen: tuple[int, ...]) -> ReadBranches:
        """Computes further branches of a rule that is already known to be a sum over branches."""
        branches = self.read(chosen)
        assert branches is not None
        return branches

    @torch.no_grad()
    def read(self, chosen: tuple[int, ...]) -> ReadBranches | None:
        """Computes the branches with the given indices. Returns None if the rule has another form."""
        if not all(self._is_identity(modifier) for modifier in self.rule.output_modifiers):
            return None
        layers = self._modified_layers(chosen)
        output = self.call.output

        def outputs(at: Block) -> list[Tensor]:
            return [layer.output(at, output.shape) for layer in layers]

        mapper = closed_mapper(self.rule) or applied_mapper(self.rule, outputs, output)
        if mapper is None:
            return None
        maps = {k: layers[k].linear_map for k in chosen if self.signs[k] != 0}
        leaders = _leaders(mapper, [k for k, known in maps.items() if known is not None])
        factors = {leader: layers[leader].memory(output) for leader in dict.fromkeys(leaders.values())}
        columns = self._write(factors, self._column_blocks(layers, mapper, leaders, outputs))
        branches = [
            Branch(self.sources[k], factors[leaders[k]], self.signs[k], known, layers[k].weight)
            for k, known in maps.items()
            if known is not None
        ]
        return branches, columns

    def _is_identity(self, modifier: Callable[[Tensor], Tensor]) -> bool:
        probe = self.call.like.new_ones(1)
        return modifier(probe) is probe

    def _modified_layers(self, chosen: tuple[int, ...]) -> list[ModifiedLayer]:
        """Returns the modified layers of the branches. Those neither chosen nor read by the mapper are placeholders."""
        return [
            modified_layer(self.call, ParamMod.ensure(modifier), source, sign)
            if k in chosen or sign == 0
            else ModifiedLayer(self.call.like.new_ones(()))
            for k, (source, modifier, sign) in enumerate(
                zip(self.sources, self.rule.param_modifiers, self.signs, strict=True)
            )
        ]

    def _column_blocks(
        self,
        layers: list[ModifiedLayer],
        mapper: Mapper,
        leaders: dict[int, int],
        outputs: Callable[[Block], list[Tensor]],
    ) -> Iterator[_ColumnBlock]:
        """Yields the factors and the column sums block by block.

        A rule takes about a dozen elementwise operations, which are faster if a block fits into the cache. Where the
        denominator is zero, the factor is set to zero, and the column propagates no relevance.
        """
        output = self.call.output
        distinct = tuple(dict.fromkeys(leaders.values()))
        wanted = tuple(mapper.leaders[k] for k in distinct)
        for at in blocks_for(output) if mapper.is_local else [WHOLE]:
            mapped = mapper.factors(outputs(at), wanted)
            factors = {k: torch.nan_to_num(mapped[mapper.leaders[k]], 0, 0, 0) for k in distinct}
            terms = [
                (factors[leader], block_of(layers[k].linear_part, at), self.signs[k]) for k, leader in leaders.items()
            ]
            yield _ColumnBlock(at, factors, _signed_sum(terms, block_of(output, at)))

    def _write(self, factors: dict[int, Tensor], read: Iterator[_ColumnBlock]) -> Columns:
        """Stores the factors, multiplied by the gain if the kernel is normalized. Returns the columns.

        Factors reuse the memory of the outputs. Each block is read before it is overwritten.
        """
        writer = ColumnWriter(self.call.form, self.normalization)
        for block in read:
            gain = writer.gain(block.at, block.column_sum)
            for k, factor in factors.items():
                factor[block.at] = block.factors[k] if gain is None else block.factors[k].mul_(gain)
        return writer.columns()


@dataclass(frozen=True)
class _ColumnBlock:
    """Factors and column sums of one block of the outputs.

    Attributes:
        at: The block, as indices into the output of shape ``(N, *out)``.
        factors: ``m_k(1)`` in the block, keyed by the index of the first branch with this factor.
        column_sum: ``c`` in the block.
    """

    at: Block
    factors: dict[int, Tensor]
    column_sum: Tensor


def _leaders(mapper: Mapper, numbers: list[int]) -> dict[int, int]:
    """Returns the first of the given branches with the same factor, keyed by branch."""
    return {k: next(other for other in numbers if mapper.leaders[other] == mapper.leaders[k]) for k in numbers}


def _signed_sum(terms: list[tuple[Tensor, Tensor, float]], like: Tensor) -> Tensor:
    """Computes ``Σ_k sign_k factor_k image_k``."""
    if not terms:
        return torch.zeros_like(like)
    (factor, image, sign), *others = terms
    total = factor * image
    if sign != 1:
        total.mul_(sign)
    for factor, image, sign in others:
        total.addcmul_(factor, image, value=sign)
    return total
