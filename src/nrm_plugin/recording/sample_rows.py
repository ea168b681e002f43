"""Operations that keep the samples in the rows of a tensor, whatever its values.

All other operations are tested numerically; see :mod:`~nrm_plugin.recording.sample_positions`.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels.known_rules import is_known_linear
from ..kernels.layer_call import LayerCall
from ..kernels.layer_step import LayerStep
from ..model.affine_layers import Weighted
from ..model.trace_guards import untraced
from ..model.zero_one_routes import operation
from .graph import Graph, Vertex

_FREE = frozenset(
    """
    alias view unsafeview reshapealias clone tocopy contiguous detach accumulategrad expand where maskedfill maximum
    minimum maxpool1d maxpool2dwithindices maxpool3dwithindices mkldnnmaxpool2d adaptivemaxpool2d adaptivemaxpool3d
    fractionalmaxpool2d fractionalmaxpool3d pixelshuffle pixelunshuffle reflectionpad1d reflectionpad2d reflectionpad3d
    replicationpad1d replicationpad2d replicationpad3d upsamplenearest1d upsamplenearest2d upsamplenearest3d lift
    """.split()
)
"""Routes that keep rows if inputs and outputs have the same number of rows and, except for views, of dimensions."""
_ALONG = frozenset(
    """
    select slice cat stack split splitwithsizes unsafesplit unsafesplitwithsizes chunk unbind unsqueeze squeeze
    indexselect gather sort topk max min amax amin median nanmedian mode kthvalue cummax cummin unfold
    """.split()
)
"""Routes that keep rows if they operate along dimensions other than the first."""
_FIXED = _FREE.union(
    """
    transpose permute t movedim swapaxes select slice narrow cat stack split splitwithsizes unsafesplit chunk unbind
    unsafesplitwithsizes unsqueeze squeeze repeat unfold im2col diagonal flip roll rot90 asstrided copyslices copy
    constantpadnd channelshuffle tril triu liftfresh backwardhookfunction upsamplenearestexact1d upsamplenearestexact2d
    upsamplenearestexact3d
    """.split()
)
"""Routes that depend on tensor shapes and numeric arguments, but not on tensor values."""
ROUNDING = 1e-3
"""Largest difference, relative to the largest element, that is attributed to rounding."""
_SOFTMAX = (nn.Softmax, nn.Softmin, nn.LogSoftmax)
_FAMILIES = ("activation", "pooling", "dropout", "upsampling", "batchnorm", "instancenorm", "normalization", "conv")
"""Modules of ``torch.nn.modules`` whose layers act on each row separately."""


def all_keep_rows(graph: Graph, count: int, looked_up: Sequence[Tensor] = ()) -> bool:
    """Returns True if the first dimension of every tensor is proven to index independent samples.

    Args:
        graph: Graph of the recording.
        count: Number of samples.
        looked_up: Embeddings of integer inputs, which the model may have transposed before the lookup.
    """
    if any(count in leaf.shape[1:-1] for leaf in looked_up):
        return False
    return all(_has_rows(vertex, count) and _keeps_rows(graph, vertex) for vertex in graph.vertices)


def vertices_of_rows(graph: Graph, count: int, ends: Set[int]) -> set[int]:
    """Returns the vertices whose rows are proven to be samples, given that the rows of the vertices ``ends`` are."""
    keeping = [_has_rows(vertex, count) and _keeps_rows(graph, vertex) for vertex in graph.vertices]
    proven = set(ends)
    for number, vertex in enumerate(graph.vertices):  # down from the output
        below = [edge.vertex for edge in vertex.edges if edge is not None]
        if number in proven and keeping[number]:
            proven.update(other for other in below if _has_rows(graph.vertices[other], count))
    for number in range(len(graph.vertices) - 1, -1, -1):  # up from the inputs
        below = [edge.vertex for edge in graph.vertices[number].edges if edge is not None]
        if keeping[number] and below and proven.issuperset(below):
            proven.add(number)
    return proven


def _has_rows(vertex: Vertex, count: int) -> bool:
    return all(list(shape[:1]) == [count] for shape in vertex.shapes)


def rules_are_known(graph: Graph) -> bool:
    """Returns True if all rules are part of Zennit or this package and thus act on each row separately."""
    return all(
        is_known_linear(vertex.step.layer_call.rule) for vertex in graph.vertices if isinstance(vertex.step, LayerStep)
    )


def positions_are_fixed(graph: Graph) -> bool:
    """Returns True if no sample's position depends on values, for example on indices among the inputs."""
    return all(
        operation(vertex.node).lower() in _FIXED
        if vertex.step is None
        else isinstance(vertex.step, LayerStep) or vertex.step.keeps_rows
        for vertex in graph.vertices
    )


def _keeps_rows(graph: Graph, vertex: Vertex) -> bool:
    step = vertex.step
    if isinstance(step, LayerStep):
        call = step.layer_call
        return is_known_linear(call.rule) and (step.keeps_rows or _is_layer_of_rows(call))
    return _is_route_of_rows(graph, vertex) if step is None else step.keeps_rows


def _is_layer_of_rows(call: LayerCall) -> bool:
    """Returns True if a torch layer acts on each row of its input separately."""
    kind, dims = type(call.module), len(call.saved_input.shape)
    path = kind.__module__.removeprefix("torch.nn.modules.")
    if dims < 2:
        return path == "activation" and not isinstance(call.module, (*_SOFTMAX, nn.GLU, nn.MultiheadAttention))
    if isinstance(call.module, (*_SOFTMAX, nn.GLU)):
        dim = call.module.dim
        return dim is not None and int(dim) % dims != 0
    if isinstance(call.module, (nn.LayerNorm, nn.RMSNorm)):
        return len(call.module.normalized_shape) < dims
    if isinstance(call.module, nn.modules.conv._ConvNd):
        return dims == len(call.module.kernel_size) + 2
    if isinstance(call.module, Weighted):
        return _scales_with_rows(call.module, call.input)
    if kind.__module__ == "zennit.layer":
        return int(getattr(call.module, "dim", 0)) % dims != 0
    is_linear = kind.forward is nn.Linear.forward or (path == "linear" and isinstance(call.module, nn.Identity))
    return is_linear or (path in _FAMILIES and not isinstance(call.module, nn.MultiheadAttention))


def _scales_with_rows(layer: Weighted, source: Tensor) -> bool:
    r"""Returns True if a linear layer that overrides ``forward`` acts on each row separately.

    A linear map :math:`A` does so if and only if it commutes with every scaling :math:`D` of rows. One random scaling
    of random rows :math:`x` suffices: if row :math:`i` of :math:`ADx - DAx`, which is
    :math:`\sum_{j \ne i} (d_j - d_i) A_{ij} x_j`, is zero, then so are all its :math:`A_{ij}`, with probability one.
    """
    generator = torch.Generator().manual_seed(0)
    with untraced(), torch.inference_mode(False), torch.no_grad():
        numbers = torch.rand(len(source), generator=generator).to(source) + 0.5
        noise = torch.randn(source.shape, generator=generator).to(source)
        plain, scaled = (layer.function(rows, layer.weight, None) for rows in (noise, _scaled_rows(noise, numbers)))
        off = (_scaled_rows(plain, numbers) - scaled).abs().max() if len(plain) == len(source) else torch.inf
        return bool(off <= ROUNDING * scaled.abs().max())


def _is_route_of_rows(graph: Graph, vertex: Vertex) -> bool:
    node, name, dims = vertex.node, operation(vertex.node).lower(), len(vertex.shapes[0])
    if name in _FREE:
        sources = [len(graph.shape(edge)) for edge in vertex.edges if edge is not None]
        return "view" in name or name == "reshapealias" or all(size == dims for size in sources)
    if name in ("copyslices", "asstrided"):
        return _moves_rows_to_rows(graph, vertex)
    source = next((len(graph.shape(edge)) for edge in vertex.edges if edge is not None), dims)
    if name in _ALONG:
        saved = getattr(node, "_saved_dim", getattr(node, "_saved_dimension", None))
        # Along the first dimension, tensors with N rows are either unchanged or concatenated to more rows.
        is_whole = name in ("slice", "cat", "split", "splitwithsizes")
        return is_whole or _are_inner(saved, dims if name in ("stack", "unsqueeze") else source)
    if name == "transpose":
        return _are_inner((node._saved_dim0, node._saved_dim1), dims)
    if name == "permute":
        return _signed(node._saved_dims[0]) % dims == 0
    if name == "constantpadnd":
        return len(node._saved_pad) < 2 * dims or not any(node._saved_pad[-2:])
    return name == "index" and _is_index_of_rows(node)


def _moves_rows_to_rows(graph: Graph, vertex: Vertex) -> bool:
    """Returns True if a route that does not depend on values maps each row to the same row.

    The backward function of the route is evaluated on ones and on one random number per row. If each element of an
    input contributes only to its own row, each row of the two results differs by that number as a factor. Strides would
    not suffice for this test: rows need not be contiguous, for example after a convolution in ``channels_last`` format.
    """
    sources = [None if edge is None else graph.shape(edge) for edge in vertex.edges]
    shape, dtype = vertex.shapes[0], vertex.dtypes[0]
    if vertex.is_short or any(source is not None and source[:1] != shape[:1] for source in sources):
        return False  # in half precision, autograd would round the random numbers
    if shape[0] == 1:
        return True  # there is only one row
    with untraced(), torch.inference_mode(False), torch.no_grad():
        numbers = torch.rand(shape[0], generator=torch.Generator().manual_seed(0), dtype=dtype) + 0.5
        ones = torch.ones(shape, dtype=dtype, device=vertex.node._input_metadata[0].device)
        numbers = numbers.to(ones.device)
        plain, scaled = (vertex.route([vector]) for vector in (ones, _scaled_rows(ones, numbers)))
        return all(
            source is None or one is None or _is_close(_scaled_rows(one, numbers), other)
            for source, one, other in zip(sources, plain, scaled, strict=True)
        )


def _scaled_rows(tensor: Tensor, numbers: Tensor) -> Tensor:
    return tensor * numbers.reshape(-1, *(1,) * (tensor.ndim - 1)).to(tensor.dtype)


def _is_close(one: Tensor, other: Tensor | None) -> bool:
    return other is not None and torch.allclose(one, other, rtol=1e-5, atol=0.0)


def _are_inner(saved: Any, dims: int) -> bool:
    """Returns True if the dimensions stored by autograd are known and do not include the first dimension."""
    if saved is None:
        return False
    stored = list(saved) if isinstance(saved, (tuple, list)) else [saved]
    return bool(stored) and all(_signed(dim) % dims != 0 for dim in stored)


def _is_index_of_rows(node: Any) -> bool:
    """Returns True if an indexing operation keeps all rows of the first dimension, in order."""
    try:
        used = [number for number, index in enumerate(node._saved_indices) if index is not None]
    except RuntimeError:  # an index was overwritten, so relevance that arrives here raises an error
        return False
    return bool(used) and used[0] > 0 and used[-1] - used[0] == len(used) - 1


def _signed(number: Any) -> int:
    """Converts a dimension stored by autograd, which represents negative numbers modulo 2⁶⁴."""
    return int(number) - (1 << 64) if int(number) >= 1 << 63 else int(number)


__all__ = ["all_keep_rows", "positions_are_fixed", "rules_are_known", "vertices_of_rows"]
