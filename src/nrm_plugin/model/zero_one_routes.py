"""0/1 routes: operations whose Jacobian has only the entries 0 and 1, such as indexing, reshaping and max pooling.

Relevance passes through them in the same way as gradients in autograd.
"""

from __future__ import annotations

import functools
import re
from typing import Any

from torch import nn
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import Node
from torch.nn.modules._functions import BackwardHookFunction

_MODULES = (
    nn.Identity,
    nn.Flatten,
    nn.Unflatten,
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
    nn.AlphaDropout,
    nn.FeatureAlphaDropout,
    nn.MaxPool1d,
    nn.MaxPool2d,
    nn.MaxPool3d,
    nn.AdaptiveMaxPool1d,
    nn.AdaptiveMaxPool2d,
    nn.AdaptiveMaxPool3d,
    nn.MaxUnpool1d,
    nn.MaxUnpool2d,
    nn.MaxUnpool3d,
    nn.FractionalMaxPool2d,
    nn.FractionalMaxPool3d,
    nn.PixelShuffle,
    nn.PixelUnshuffle,
    nn.ChannelShuffle,
    nn.Unfold,
    nn.ReflectionPad1d,
    nn.ReflectionPad2d,
    nn.ReflectionPad3d,
    nn.ReplicationPad1d,
    nn.ReplicationPad2d,
    nn.ReplicationPad3d,
    nn.CircularPad1d,
    nn.CircularPad2d,
    nn.CircularPad3d,
    nn.ConstantPad1d,
    nn.ConstantPad2d,
    nn.ConstantPad3d,
    nn.ZeroPad1d,
    nn.ZeroPad2d,
    nn.ZeroPad3d,
    nn.UpsamplingNearest2d,
)

_NODES = frozenset(
    """
    Alias View ReshapeAlias UnsafeView Transpose Permute T Squeeze Unsqueeze Expand Repeat Cat Stack Split
    SplitWithSizes UnsafeSplit UnsafeSplitWithSizes Chunk Unbind Select Slice Index IndexSelect Gather Clone ToCopy
    AsStrided Movedim Narrow Diagonal Flip Roll Rot90 Sort Topk Where MaskedFill MaskedSelect ConstantPadNd
    ReflectionPad1D ReflectionPad2D ReflectionPad3D ReplicationPad1D ReplicationPad2D ReplicationPad3D
    MaxPool2DWithIndices MaxPool3DWithIndices MaxPool1D MkldnnMaxPool2D AdaptiveMaxPool2D AdaptiveMaxPool3D
    FractionalMaxPool2D FractionalMaxPool3D MaxUnpool2D MaxUnpool3D Max Min Amax Amin Maximum Minimum
    PixelShuffle PixelUnshuffle ChannelShuffle Im2Col Tril Triu UpsampleNearest1D UpsampleNearest2D
    UpsampleNearest3D UpsampleNearestExact1D UpsampleNearestExact2D UpsampleNearestExact3D CopySlices Copy
    Unfold Take TakeAlongDim Contiguous Detach AccumulateGrad Swapaxes LiftFresh Lift
    DiagEmbed Median NanMedian Kthvalue Mode Cummax Cummin Aminmax BackwardHookFunction
    """.lower().split()
)
_NAME = re.compile(r"^(.*?)(?:Backwards?)?\d*$")


def is_route(module: nn.Module) -> bool:
    """Returns True if a module only routes values (its Jacobian has entries 0 and 1), such as max pooling or padding.

    Dropout is assumed to be inactive, as ensured by :func:`~nrm_plugin.model.checks.check_model`.
    """
    return isinstance(module, _MODULES) or (isinstance(module, nn.Upsample) and module.mode.startswith("nearest"))


def operation(node: Node) -> str:
    """Returns the operation of an autograd node, such as ``MaxPool2DWithIndices`` for ``MaxPool2DWithIndicesBackward``.

    A custom ``autograd.Function`` may have the same name as a torch operation. Its name is returned as
    ``autograd.Function NAME``.
    """
    if isinstance(node, BackwardCFunction):
        kind = type(node)._forward_cls
        return "BackwardHookFunction" if kind is BackwardHookFunction else f"autograd.Function {kind.__name__}"
    return _operation(node.name())


@functools.cache
def _operation(name: str) -> str:
    """Extracts the operation from the name of an autograd node."""
    name = name.rsplit("::", 1)[-1]
    match = _NAME.match(name)
    return match.group(1) if match else name


def is_route_node(node: Node) -> bool:
    """Returns True if an autograd node is known to only route values (its Jacobian has entries 0 and 1)."""
    return operation(node).lower() in _NODES


_WHOLE = frozenset(["Alias", "View", "UnsafeView", "ReshapeAlias", "Clone"])


def is_whole(node: Node) -> bool:
    """Returns True if an autograd node returns a view or copy of all elements of a tensor."""
    return operation(node) in _WHOLE


def written(node: Any, number: int) -> tuple[Any, int]:
    """Returns the node and output number of the last in-place write that overwrites a whole tensor.

    Nodes that torch inserts for full backward hooks are identities and are skipped.
    """
    while node is not None and (name := operation(node)) in ("Copy", "BackwardHookFunction"):
        if name != "Copy":
            node, number = node.next_functions[number]
            continue
        below, place = node.next_functions[-1]  # the first is the overwritten tensor
        if below is None or below._input_metadata[place].shape != node._input_metadata[0].shape:
            break
        node, number = below, place
    return node, number


def source_of(node: Any) -> Any:
    """Returns the autograd node that computed a tensor, skipping views of all elements and in-place writes."""
    node, _ = written(node, 0)
    while node is not None and is_whole(node):
        node, _ = written(*node.next_functions[0])
    return node
