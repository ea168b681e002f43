r"""Step of a contrast: a weighted sum of the outputs, fused with the linear layer that computes them.

For outputs :math:`f = W a + b` with weights ``s``, the contrast :math:`g = \sum_k s_k f_k` is a linear layer with one
output per sample, weight :math:`\sum_k s_k w_k` and bias :math:`\sum_k s_k b_k`, to which the rule of the layer is
applied. If the outputs are not computed by a layer with weights, relevance is distributed in proportion to
:math:`s_k f_k / g`.

Source: docs/differences.md.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from zennit.rules import Pass

from ..errors import UnsupportedRuleError
from ..kernels.base import Kernel
from ..kernels.form import Form
from ..kernels.forward_state import Saved, not_recorded
from ..kernels.known_rules import is_by_modifiers, is_known_linear
from ..kernels.layer_call import LayerCall, forward
from ..kernels.layer_step import LayerStep
from ..kernels.modified_layers import rerun_without_bias
from ..kernels.normalization import Normalization
from ..kernels.rule_reader import PlainGradient, read_rule
from ..kernels.step import Step
from ..model.affine_layers import WEIGHTED, Weighted, broadcast, is_affine
from ..model.autocast import InFloat32
from ..model.targets import sample_sums
from ..model.zero_one_routes import operation
from .graph import Graph, Vertex
from .places import Buffer, Edge
from .sample_layout import Layout
from .sample_positions import Samples

NAME = "contrast"
"""Name of the step if it is not fused with a layer."""
_VIEWS = frozenset(
    """
    alias view reshapealias unsafeview transpose permute t squeeze unsqueeze select slice index indexselect gather
    asstrided clone tocopy contiguous narrow movedim swapaxes diagonal flip unbind split splitwithsizes chunk
    """.split()
)
"""Routes that only select or reorder elements. The search for the layer that computes the outputs follows them."""


@dataclass(frozen=True, eq=False)
class ContrastNode:
    """Node of a contrast (weighted sum of outputs), with the attributes of an autograd node that :class:`Graph` reads.

    Attributes:
        step: The step of the contrast.
        next_functions: The node whose output the step reads and the index of this output.
        shape: Shape of the contrast.
        dtype: The dtype of the contrast.
        device: Device of the contrast.
    """

    step: Step
    next_functions: tuple[tuple[Any, int], ...]
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    @property
    def _input_metadata(self) -> list[ContrastNode]:
        return [self]

    def name(self) -> str:
        """Returns the name of the operation."""
        return NAME


class ColumnKernel(Kernel):
    """Kernel with a single output per sample, which is therefore stored as one column.

    Args:
        column: Relevance of each input element per unit of output relevance, with the shape of the input.
        layout: Which dimension of the input indexes the samples.
        is_stochastic: Whether the column of each sample sums to one.
    """

    def __init__(self, column: Tensor, layout: Layout, is_stochastic: bool = False) -> None:
        self.column, self.layout, self.is_stochastic = column, layout, is_stochastic

    def pull(self, relevance: Tensor) -> tuple[Tensor, ...]:
        return (self._times(relevance, self.column),)

    def pull_absolute(self, relevance: Tensor) -> tuple[Tensor, ...]:
        return (self._times(relevance, self.column.abs()),)

    def push(self, values: tuple[Tensor | None, ...], shape: torch.Size) -> Tensor:
        return self._summed(values, self.column, shape)

    def push_bound(self, values: tuple[Tensor | None, ...], shape: torch.Size) -> Tensor:
        return self._summed(values, self.column.abs(), shape)

    def column_sum(self, like: Tensor) -> Tensor:
        return _sample_sums(self.column, self.layout).reshape(like.shape)

    def _times(self, relevance: Tensor, column: Tensor) -> Tensor:
        form = self.layout.shape(column.shape)
        rows = relevance.reshape(len(relevance), form[0], *(1,) * (len(form) - 1)).expand(-1, *form)
        return self.layout.fold(rows, 1) * column

    def _summed(self, values: tuple[Tensor | None, ...], column: Tensor, shape: torch.Size) -> Tensor:
        (value,) = values
        assert value is not None
        return self.layout.unfold(value * column, 1).flatten(2).sum(2).reshape(len(value), *shape)


class ContrastStep(Step):
    """Node of the graph that propagates the relevance of a contrast to the layer or tensor below it.

    Args:
        name: Name of the step.
        output: The contrast ``g``, one value per sample.
        normalization: How the columns are normalized.
        rule: Name of the rule or operation.
        read: Function that constructs the kernel when it is first needed.
        keeps_rows: Whether the first dimension of every tensor indexes the samples.
    """

    def __init__(
        self,
        name: str,
        output: Tensor,
        normalization: Normalization,
        rule: str,
        read: Callable[[], Kernel],
        keeps_rows: bool,
    ) -> None:
        super().__init__(name, output, normalization, rule)
        self._read = read
        self.keeps_rows = keeps_rows

    def _build(self) -> Kernel:
        return self._read()


def contrast_node(graph: Graph, samples: Samples, output: Tensor, vector: Tensor) -> ContrastNode:
    """Returns a node that computes a contrast between the outputs, for use as the new root of the graph.

    Args:
        graph: The graph of a recording.
        samples: The position of the samples in each recorded tensor.
        output: The output of the model.
        vector: The weights ``s`` of the outputs, of shape ``(N, …)``.

    Raises:
        UnsupportedRuleError: If the rule of the layer that computes the outputs is not defined by Zennit's modifiers.
        FoldingError: If no dimension of a tensor indexes the samples.
    """
    layout = samples.layout(graph.output)
    weights, outputs = layout.fold(vector), output.detach().to(vector.dtype)
    number = _sample_sums(weights * outputs, layout)
    number = number.reshape(-1, 1) if samples.batched else number
    with torch.inference_mode(False), not_recorded():
        layer = _layer_of_outputs(graph, weights)
        if layer is None:
            place = graph.output
            step = _step_of_shares(weights * outputs, layout, number, samples.is_plain)
        else:
            place = layer.source
            step = _fused_step(layer, number, samples)
    below = (graph.nodes[place.vertex], place.number)
    return ContrastNode(step, (below,), number.shape, number.dtype, number.device)


def _step_of_shares(parts: Tensor, layout: Layout, number: Tensor, keeps_rows: bool) -> ContrastStep:
    r"""Returns the step that distributes relevance in proportion to :math:`s_k f_k / g`."""

    def read() -> Kernel:
        form = layout.shape(parts.shape)
        total = number.reshape(-1, *(1,) * (len(form) - 1)).expand(form)
        return ColumnKernel(parts / layout.fold(total), layout, is_stochastic=True)

    return ContrastStep(NAME, number, Normalization(), "shares", read, keeps_rows)


@dataclass(frozen=True)
class _Layer:
    """Layer with a weight that computes the outputs.

    Attributes:
        step: The call of the layer, as a node of the computation graph.
        vertex: Index of this node in the graph of the recording.
        source: The input of the layer.
        weights: The weights ``s``, with the shape of the layer's output.
    """

    step: LayerStep
    vertex: int
    source: Buffer
    weights: Tensor


def _layer_of_outputs(graph: Graph, weights: Tensor) -> _Layer | None:
    """Returns the layer with a weight that computes the outputs, or None if another operation computes them."""
    buffer = graph.output
    while True:
        vertex = graph.vertices[buffer.vertex]
        edges = [edge for edge in vertex.edges if edge is not None]
        if len(edges) != 1:
            return None
        if isinstance(vertex.step, LayerStep):
            vertex.step.fold()
            if not vertex.step.is_identity:  # skip a batch normalization that is fused with the layer below
                return _Layer(vertex.step, buffer.vertex, edges[0], weights) if _is_weighted(vertex.step) else None
        else:
            passed = _below_view(vertex, buffer.number, weights)
            if passed is None:
                return None
            weights = passed.sum_to_size(graph.shape(edges[0]))
        buffer = edges[0]


def _below_view(vertex: Vertex, number: int, weights: Tensor) -> Tensor | None:
    """Returns the weights of the elements that a view selects, or None for other operations."""
    if vertex.step is not None or operation(vertex.node).lower() not in _VIEWS:
        return None
    parts, _ = vertex.pull([weights.unsqueeze(0) if k == number else None for k in range(len(vertex.shapes))])
    part = next((part for part, edge in zip(parts, vertex.edges, strict=True) if edge is not None), None)
    return None if part is None else part.squeeze(0)


def _is_weighted(step: LayerStep) -> bool:
    call = step.layer_call
    return isinstance(call.module, WEIGHTED) and is_affine(call.module) and type(call.rule) is not Pass


def _fused_step(layer: _Layer, number: Tensor, samples: Samples) -> ContrastStep:
    """Returns the step that applies the rule of a layer to a single output, the weighted sum of its outputs."""
    step, call = layer.step, layer.step.layer_call
    if not is_by_modifiers(call.rule) and type(call.rule) is not PlainGradient:
        raise UnsupportedRuleError(
            f"the rule {type(call.rule).__name__} of layer {call.name!r} has its own backward, so it cannot be "
            "applied to a contrast of the outputs of this layer. Write the rule with BasicHook's modifiers, or map "
            "the last layer to another rule."
        )
    layout = samples.layout(Edge(layer.vertex, 0))
    with InFloat32() if step.is_short else nullcontext():
        fused = _fused_layer(call, layer.weights, number, layout, samples.layout(Buffer(layer.vertex, 0)))
    own = replace(
        call,
        rule=call.rule.copy(),
        module=fused,
        run=forward,
        form=Form(number),
        saved_output=Saved(number, values=False),
        image=None,
    )

    def read() -> Kernel:
        kernel, ones = read_rule(own), torch.ones_like(number).unsqueeze(0)
        kernel.complete_for(ones)
        with torch.no_grad():
            (column,) = kernel.pull(ones)
        return ColumnKernel(column.squeeze(0), layout)

    keeps_rows = samples.is_plain and is_known_linear(call.rule)
    result = ContrastStep(step.name, number, step.normalization, step.rule, read, keeps_rows)
    result.call = step.call
    result.is_short = step.is_short
    return result


def _fused_layer(call: LayerCall, weights: Tensor, number: Tensor, layout: Layout, output_layout: Layout) -> Weighted:
    r"""Returns a layer with a single output per sample, :math:`\sum_k s_k w_k \cdot a + \sum_k s_k b_k`.

    The layer reads only the elements that are connected to an explained output. Zero weights would not exclude the
    other elements because rules such as Flat replace the weights.

    Args:
        call: The recorded call of the layer.
        weights: The weights ``s``, with the shape of the layer's output.
        number: The contrast ``g``.
        layout: The layout of the input.
        output_layout: The layout of the output.
    """
    weight, bias = call.module._parameters["weight"], call.module._parameters["bias"]
    assert weight is not None
    rerun = rerun_without_bias(call.module, call.run)
    leaf = call.input.detach().to(weights.dtype).requires_grad_()

    def rows(values: Tensor, matrix: Tensor) -> Tensor:
        with torch.enable_grad():
            image = rerun(leaf, matrix)
        (part,) = torch.autograd.grad(image, leaf, values.to(image.dtype))
        return layout.unfold(part).reshape(layout.count, -1)

    fused, index = rows(weights, weight.detach()), None
    connected = rows((weights != 0).to(weights.dtype), torch.ones_like(weight)) != 0
    if not bool(connected.all()):
        index = _connected(connected)
        fused = _chosen(fused, index)
    added = (
        None
        if bias is None
        else weights * broadcast(bias.detach(), call.module, len(call.form.shape)).to(weights.dtype)
    )
    constant = None if added is None else _sample_sums(added, output_layout).reshape(number.shape)

    def function(source: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        read = _chosen(layout.unfold(source).reshape(layout.count, -1), index)
        image = (read * weight).sum(1).reshape(number.shape)
        return image if bias is None else image + bias

    return Weighted(function, fused, constant, -1)


def _connected(mask: Tensor) -> Tensor:
    """Returns the column indices of the True elements in each row, padded with the column count."""
    order = mask.int().argsort(dim=1, descending=True, stable=True)[:, : int(mask.sum(1).max())]
    return torch.where(mask.gather(1, order), order, mask.shape[1])


def _chosen(rows: Tensor, index: Tensor | None) -> Tensor:
    """Gathers elements of ``rows``, whose shape is ``(N, D)``, at the given indices. The index ``D`` selects 0."""
    return rows if index is None else torch.nn.functional.pad(rows, (0, 1)).gather(1, index)


def _sample_sums(tensor: Tensor, layout: Layout) -> Tensor:
    return sample_sums(layout.unfold(tensor))


__all__ = ["NAME", "ColumnKernel", "ContrastNode", "ContrastStep", "contrast_node"]
